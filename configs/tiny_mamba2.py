"""7 Mamba-2 layers, width 256, context 512, for a CPU: about the parameters of tiny_transformer.

python -m scripts.base_train configs/tiny_mamba2.py
"""

depth = 7
d_model = 256
block_pattern = "M2"
mamba2_d_state = 64
head_dim = 128
max_seq_len = 512
softcap = 0.0
head_tie = 0.05
matrix_lr = 0.01
device_batch_size = 8
total_batch_size = 4096
num_iterations = 300
eval_every = 100
eval_tokens = 65536
sample_every = 0
save_every = 50
model_tag = "tiny_mamba2"
