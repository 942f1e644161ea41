"""20 attention layers, width 1,280: nanochat's d20, 561M parameters with a vocabulary of 65,536. Not run by us yet.

8 GPUs: torchrun --standalone --nproc_per_node=8 -m scripts.base_train configs/transformer_d20.py
"""

depth = 20
max_seq_len = 2048
device_batch_size = 32
total_batch_size = 524288
target_param_data_ratio = 20
compile = True
