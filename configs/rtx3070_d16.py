"""10 attention, then 6 Mamba layers, width 1,024, for one GPU of 8 GB. Not run by us yet.

python -m scripts.base_train configs/rtx3070_d16.py
"""

depth = 16
block_pattern = ["T"] * 10 + ["M"] * 6
max_seq_len = 1024
device_batch_size = 4
total_batch_size = 131072
target_param_data_ratio = 20
