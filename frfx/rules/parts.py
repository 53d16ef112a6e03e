"""Functions of single entries, on a CPU part by part, so that each stays in the cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from frfx.recording import is_recorded

_CACHED = 1 << 17
"""Entries that a thread takes at a time."""


def by_parts(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return what a function of single entries makes of tensors."""
    first, most = tensors[0], torch.get_num_threads() * _CACHED
    if first.numel() <= most or not all(t.is_cpu and t.shape == first.shape for t in tensors):
        return function(*tensors)
    if is_recorded(*tensors):
        return function(*tensors)
    parts = [t.reshape(-1).split(most) for t in tensors]
    start, *others = zip(*parts, strict=True)
    found = function(*start)
    whole = found.new_empty(first.shape)
    begun, *left = whole.view(-1).split(most)
    begun.copy_(found)
    for part, given in zip(left, others, strict=True):
        part.copy_(function(*given))
    return whole
