"""20 Gated DeltaNet layers without MLPs, width 1,280: a pure linear attention, for comparison. Not run by us yet.

8 GPUs: torchrun --standalone --nproc_per_node=8 -m scripts.base_train configs/gdn_d20.py
"""

depth = 20
block_pattern = ["gdn"] * 20
max_seq_len = 2048
device_batch_size = 16
total_batch_size = 524288
target_param_data_ratio = 20
