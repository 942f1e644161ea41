"""How many chunks a sample of the reconstruction curriculum has, stage by stage (arXiv 2509.01092, Table 8).

Without it the paper's encoder learns nothing (their log-perplexity .135 against 1.599 at 2,048 tokens).
"""

import numpy as np

STAGES = 9
TOTALS = (2000, 2000, 2000, 4000, 4000, 4000, 8000, 8000, 8000)  # samples of 1, 2, 4, ..., 256 chunks
FIRST = 1333  # samples of one chunk in the first stage; of 2, 4, ... chunks a quarter, a sixteenth, ..., at least 1


def ratio(first: float, total: float, stages: int = STAGES) -> float:
    """r with first * (1 + r + ... + r^(stages - 1)) = total, by bisection."""
    low, high = 0.0, total / first
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if first * sum(middle**t for t in range(stages)) < total else (low, middle)
    return low


def table() -> np.ndarray:
    """(9, 9): how many samples of 2^row chunks stage `column` has, unrounded."""
    rows = []
    for j, total in enumerate(TOTALS):
        first = max(1, FIRST // 4**j)
        r = ratio(first, total)
        rows.append([first * r**t for t in range(STAGES)])
    return np.array(rows)


def size_shares(progress: float, largest: int) -> np.ndarray:
    """(n,) shares of samples of 1, 2, 4, ... up to `largest` chunks, at a progress in [0, 1) through the curriculum.

    In a curriculum that ends at fewer chunks than the paper's, the last stages are those of its largest size.
    """
    column = table()[: int(np.log2(max(1, largest))) + 1, min(STAGES - 1, int(progress * STAGES))]
    return column / column.sum()
