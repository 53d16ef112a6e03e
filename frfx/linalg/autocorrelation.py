"""Gram matrices of a circular model, from the products of a kernel's taps with one another.

`A A^H` at a frequency is the transform of the taps' autocorrelation. Once that is known, a Gram
matrix takes a multiplication a lag and entry; as a product of matrices, one a channel and entry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from frfx.linalg.products import matmul

Side = Literal["rows", "columns"]


@dataclass(frozen=True)
class Autocorrelation:
    """The autocorrelation of taps that are matrices: sums over `K[m + d] K[m]^T`.

    Attributes:
        lags: d, shape (L, dims): one of d and -d, and 0.
        even: The sums for d and -d, added; shape (L, G, n, n).
        odd: That for d, less that for -d.
    """

    lags: Tensor
    even: Tensor
    odd: Tensor

    @classmethod
    def of(cls, shifts: Tensor, taps: Tensor, side: Side) -> Autocorrelation:
        """Sum the products up.

        Args:
            shifts: m, shape (M, dims), of whole numbers that are all different.
            taps: K[m], shape (M, G, rows, columns), not so large or small that squares overflow.
            side: Which Gram matrix of `sum_m exp(2 pi i u m) K[m]` is asked for: that of the rows,
                `A A^H`, or of the columns, `A^H A`.
        """
        lags, which = differences(shifts)
        if side == "columns":
            taps = taps.mT
        half = len(lags) // 2  # in the order of numbers: 0 is the middle one
        even = taps.new_empty(len(lags) - half, *taps.shape[1:-1], taps.shape[-2])
        for number, total in enumerate(even, start=half):
            ahead, behind = (which == number).nonzero(as_tuple=True)
            left, right = (taps[i].movedim(0, -2).flatten(-2) for i in (ahead, behind))
            total.copy_(matmul(left, right.mT))
        turned = even.mT.clone()
        turned[0] = even[0]
        odd = even - turned if side == "rows" else turned - even  # A^H A has K[m]^T K[m + d]
        turned[0] = 0  # of 0 there is one
        return cls(lags[half:], even.add_(turned), odd)

    def gram(self, frequencies: Tensor, scale: float) -> Tensor:
        """Return the Gram matrices at frequencies (F, dims), times a scale: (G, F, n, n)."""
        angle = 2 * math.pi * (frequencies.to(self.lags.device) @ self.lags.double().T)
        real, imaginary = (
            (scale * wave).to(part.dtype) @ part.flatten(1)
            for wave, part in ((angle.cos(), self.even), (angle.sin(), self.odd))
        )
        shape = (len(frequencies), *self.even.shape[1:])
        return torch.complex(real, imaginary).view(shape).transpose(0, 1)

    @property
    def nbytes(self) -> int:
        """The memory that it holds, in bytes."""
        return self.lags.nbytes + self.even.nbytes + self.odd.nbytes


def differences(shifts: Tensor) -> tuple[Tensor, Tensor]:
    """Return all differences of shifts (M, dims) in order, and of every pair which one it is."""
    pairs = shifts[:, None] - shifts
    lags, which = pairs.flatten(0, 1).unique(dim=0, return_inverse=True)
    return lags, which.view(len(shifts), len(shifts))
