"""Memory that steps write to in turns, so that the next one finds it in the cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from frfx.linalg.products import matmul


class Scratch:
    """Two blocks of memory: what a step writes to the one, the next reads and writes to the other.

    A value is there until the second step after the one that made it.

    Args:
        like: A tensor of the type and device that is computed with.
        entries: How many entries a step writes at most.
    """

    def __init__(self, like: Tensor, entries: int) -> None:
        self._like = like
        self._blocks = (like.new_empty(entries), like.new_empty(entries))
        self._turn = 0
        self._taken: dict[tuple[int, ...], Tensor] = {}
        self._padded: Tensor | None = None

    def take(self, *shape: int) -> Tensor:
        """Return the block whose turn it is, in a shape."""
        self._turn = 1 - self._turn
        key = (self._turn, *shape)
        if key not in self._taken:  # the next part of a batch asks for the same
            self._taken[key] = self._blocks[self._turn][: math.prod(shape)].view(shape)
        return self._taken[key]

    def copy(self, x: Tensor) -> Tensor:
        """Return a contiguous copy."""
        return self.take(*x.shape).copy_(x)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply matrices, one of which may be the same for all of the other's."""
        batch = (a if a.ndim > b.ndim else b).shape[:-2]
        return matmul(a, b, self.take(*batch, a.shape[-2], b.shape[-1]))

    def residual(self, target: Tensor, output: Tensor, grid: tuple[int, ...] | None) -> Tensor:
        """Return `target - output`, in the corner of a grid of zeros if there is one."""
        if grid is None:
            return torch.sub(target, output, out=self.take(*target.shape))
        leading = target.ndim - len(grid)
        shape = (*target.shape[:leading], *grid)
        if self._padded is None or self._padded.shape != shape:
            self._padded = self._like.new_zeros(shape)
        corner = (slice(None),) * leading + tuple(map(slice, target.shape[leading:]))
        torch.sub(target, output, out=self._padded[corner])
        return self._padded
