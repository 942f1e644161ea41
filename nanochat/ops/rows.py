"""What a row of tokens is made of: documents packed one behind the other, and pads at its end."""

import torch
import torch.nn.functional as F
from torch import Tensor


def valid_tokens(like: Tensor, lengths: Tensor) -> Tensor:
    """like: (B, T, ...), lengths: (B,) -> (B, T) bool on its device, False on pads."""
    return torch.arange(like.size(1), device=like.device) < lengths.to(like.device)[:, None]


def document_starts(seq_idx: Tensor, valid: Tensor | None = None) -> Tensor:
    """(B, T) any index that changes where a document ends -> (B, T) bool, True where one begins behind another.

    valid: (B, T) bool; a pad begins no document.
    """
    starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    return starts if valid is None else starts & valid


def document_numbers(seq_idx: Tensor, valid: Tensor | None = None) -> Tensor:
    """The same index -> (B, T) long, counted from 0 in each row; pads stay with the last valid token."""
    return document_starts(seq_idx, valid).cumsum(1)
