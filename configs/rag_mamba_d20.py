"""20 Mamba layers with room for many documents, width 1,280. Not run by us yet.

The architecture is base_train's, the rest rag_finetune's; each script reads its own keys.
8 GPUs: torchrun --standalone --nproc_per_node=8 -m scripts.base_train configs/rag_mamba_d20.py
"""

depth = 20
block_pattern = ["M"] * 20
max_seq_len = 8192
device_batch_size = 4
total_batch_size = 524288
target_param_data_ratio = 20
retriever_type = "dense"
top_k = 10
max_doc_length = 800
