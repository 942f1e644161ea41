"""3 attention layers among 18 Mamba-2 layers, width 1,280: 1 in 7, the share of arXiv 2406.07887. Not run by us yet.

8 GPUs: torchrun --standalone --nproc_per_node=8 -m scripts.base_train configs/hybrid_sparse_attention_d20.py
"""

depth = 21
d_model = 1280
block_pattern = "3*mamba2+attn+3*mamba2"  # attention is never first, and once past the middle
mamba_use_mlp = True
max_seq_len = 2048
device_batch_size = 16
total_batch_size = 524288
target_param_data_ratio = 20
