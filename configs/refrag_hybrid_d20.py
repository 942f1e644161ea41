"""8 attention, then 12 Mamba layers with room for three hops of documents, width 1,280. Not run by us yet.

The architecture is base_train's, the rest refrag_finetune's; each script reads its own keys.
8 GPUs: torchrun --standalone --nproc_per_node=8 -m scripts.base_train configs/refrag_hybrid_d20.py
"""

depth = 20
block_pattern = ["T"] * 8 + ["M"] * 12
max_seq_len = 6144
device_batch_size = 2
total_batch_size = 294912
target_param_data_ratio = 20
retriever_type = "dense"
max_hops = 3
top_k_per_hop = 3
use_rewards = True
