"""12 attention, then 8 Mamba layers, width 1,280: the first nanochat-turbo's hybrid. Not run by us yet.

8 GPUs: torchrun --standalone --nproc_per_node=8 -m scripts.base_train configs/hybrid_early_t_late_m_d20.py
"""

depth = 20
block_pattern = ["T"] * 12 + ["M"] * 8
mamba_d_state = 16
mamba_d_conv = 4
mamba_expand = 2
mamba_use_mlp = False
max_seq_len = 2048
device_batch_size = 32
total_batch_size = 524288
target_param_data_ratio = 20
