"""10 pairs of attention and Mamba layers, width 1,280. Not run by us yet.

8 GPUs: torchrun --standalone --nproc_per_node=8 -m scripts.base_train configs/hybrid_alternating_d20.py
"""

depth = 20
block_pattern = ["T", "M"] * 10
max_seq_len = 2048
device_batch_size = 32
total_batch_size = 524288
target_param_data_ratio = 20
