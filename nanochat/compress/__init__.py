"""REFRAG's compressed contexts (arXiv 2509.01092): documents enter the model as one vector for each chunk, and a policy
chooses the few chunks that enter as tokens.

chunks.py       a rendered prompt, cut into chunks; the same prompt with some of them in place of vectors
encoder.py      chunk -> vector: the model's own bottom blocks; vectors kept beside a knowledge base
policy.py       which chunks stay tokens: scores, sampling without replacement, and the rules it is compared with
curriculum.py   the reconstruction curriculum of the paper's Table 8
stages.py       the losses: reconstruction, continuation, questions, utility, reinforcement
reader.py       model, encoder and policies as one thing that answers, is saved and loaded
search.py       the search tool with what it finds compressed
evaluate.py     accuracy against compression for each policy
train.py        CompressConfig and compress_main: the stages one after the other in one Loop
judge.py        CompressEvalConfig and compress_eval_main: what rag_eval --mode compress does
"""
