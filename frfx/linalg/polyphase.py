"""The circular model of a convolution: an operator that one matrix a frequency diagonalises."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from frfx.linalg.form import Grid, chunk, fast_length
from frfx.linalg.operators import Convolution
from frfx.linalg.pseudo_inverse import Spectrum, singular_values

_SAMPLED_WORK = 1 << 30
"""Multiplications that the spectrum of a large model may cost."""


@dataclass(frozen=True)
class Polyphase:
    """The circular model of a convolution: a block-circulant operator on a periodic grid.

    The operand is cut into blocks of the stride, whose entries become channels (space to depth), so
    that every convolution is one of stride 1. The grid is the smallest on which no window wraps
    around, which for stride 1 without padding is the image itself, as in Eq. 12; with circular
    padding it is the image, and windows wrap as they do in the convolution. With other padding,
    where any grid as large is as good a model, it is one whose sides have fast transforms.

    Attributes:
        operator: The convolution.
        dtype: The real type that its matrices are made in.
    """

    operator: Convolution
    dtype: torch.dtype = torch.float64

    @property
    def groups(self) -> int:
        """The groups of channels."""
        return self.operator.groups

    @property
    def rows(self) -> int:
        """The channels of the result, by group."""
        return self.operator.out_channels // self.groups

    @property
    def columns(self) -> int:
        """The channels of the operand in blocks, by group."""
        return self.operator.kernel.shape[1] * math.prod(self.operator.stride)

    @functools.cached_property
    def blocks(self) -> tuple[int, ...]:
        """The shape of the operand in blocks."""
        sizes = zip(self.operator.size, self.operator.stride, strict=True)
        return tuple(-(-n // s) for n, s in sizes)

    @functools.cached_property
    def wraps(self) -> bool:
        """Whether the convolution itself is circular."""
        op = self.operator
        if op.padding_mode != "circular":
            return False
        sizes = zip(op.size, op.out_size, op.stride, strict=True)
        return all(n == out * stride for n, out, stride in sizes)

    @functools.cached_property
    def exact(self) -> bool:
        """Whether the convolution is the model's restriction to its own windows."""
        return self.wraps or not any(map(any, self.operator.padding))

    @functools.cached_property
    def grid(self) -> tuple[int, ...]:
        """The shape of the periodic grid."""
        if self.wraps:
            return self.blocks
        op = self.operator
        sizes = []
        for blocks, out, s, (before, _), extent in zip(
            self.blocks, op.out_size, op.stride, op.padding, op.extent, strict=True
        ):
            first, last = -before // s, (extent - 1 - before) // s
            sizes.append(max(blocks, out + last) - min(0, first))
        return tuple(sizes if self.exact else map(fast_length, sizes))

    def matrices(self, frequencies: Tensor, scale: float = 1.0) -> Tensor:
        """Return the operator over a scale at frequencies: (G, F, rows, columns), complex.

        `z^(u) = sum_m K[m] exp(2 pi i u m) x^(u)` over the taps m: Eq. 12, where the flip of Eq. 10
        and the padding on the left are the same shift of the result.
        """
        angle = self._angles(frequencies)
        cosine, sine = ((wave / scale).to(self.dtype) for wave in (angle.cos(), angle.sin()))
        shape = (len(frequencies), self.groups, self.rows, -1)
        parts = []
        for taps, kernel in self._by_phase:
            real, imaginary = cosine[:, taps] @ kernel, sine[:, taps] @ kernel
            parts.append(torch.complex(real, imaginary).view(shape))
        values = parts[0] if len(parts) == 1 else torch.stack(parts, -1).flatten(-2)
        return values.transpose(0, 1)

    @functools.cached_property
    def _taps(self) -> tuple[Tensor, Tensor]:
        """The shift of every tap of the kernel in blocks, (T, dims), and its phase in one, (T,)."""
        op = self.operator
        shifts, phases = [], []
        for tap in itertools.product(*map(range, op.kernel.shape[2:])):
            offsets = [
                d * j - before
                for d, j, (before, _) in zip(op.dilation, tap, op.padding, strict=True)
            ]
            shifts.append([m // s for m, s in zip(offsets, op.stride, strict=True)])
            phase = 0
            for m, s in zip(offsets, op.stride, strict=True):
                phase = phase * s + m % s
            phases.append(phase)
        device = op.kernel.device
        return (
            torch.tensor(shifts, dtype=torch.float64, device=device),
            torch.tensor(phases, device=device),
        )

    @functools.cached_property
    def _by_tap(self) -> Tensor:
        """The kernel as a matrix, a row a tap."""
        return self.operator.kernel.to(self.dtype).flatten(2).flatten(0, 1).T.contiguous()

    @functools.cached_property
    def _by_phase(self) -> list[tuple[Tensor, Tensor]]:
        """The taps of every phase, and their rows of the kernel."""
        phases = range(math.prod(self.operator.stride))
        if len(phases) == 1:  # as they are
            return [(torch.arange(len(self._by_tap), device=self._by_tap.device), self._by_tap)]
        found = [(self._taps[1] == phase).nonzero().flatten() for phase in phases]
        return [(taps, self._by_tap[taps]) for taps in found]

    def _angles(self, frequencies: Tensor) -> Tensor:
        shifts, _ = self._taps
        return 2 * math.pi * (frequencies.to(shifts.device) @ shifts.T)

    def squared_norms(self, frequencies: Tensor) -> Tensor:
        """Return the squared Frobenius norm of the operator at frequencies, shape (F,)."""
        angle, phases = self._angles(frequencies), self._taps[1]
        products = torch.where(phases[:, None] == phases, self._by_tap @ self._by_tap.T, 0)
        cosine, sine = angle.cos(), angle.sin()
        return ((cosine @ products) * cosine + (sine @ products) * sine).sum(1)

    def to_blocks(self, x: Tensor) -> Tensor:
        """Return the operand in blocks: (N, C, *size) -> (N, G, columns, *blocks)."""
        stride, n = self.operator.stride, x.shape[0]
        if math.prod(stride) == 1:
            return x.view(n, self.groups, -1, *x.shape[2:])
        sizes = zip(self.blocks, stride, x.shape[2:], strict=True)
        missing = [b * s - size for b, s, size in sizes]
        x = F.pad(x, [p for gap in missing[::-1] for p in (0, gap)])
        shape = [p for pair in zip(self.blocks, stride, strict=True) for p in pair]
        x = x.reshape(n, self.groups, -1, *shape)
        dims = len(stride)
        order = [0, 1, 2, *range(4, 3 + 2 * dims, 2), *range(3, 3 + 2 * dims, 2)]
        return x.permute(order).reshape(n, self.groups, self.columns, *self.blocks)

    def from_blocks(self, x: Tensor) -> Tensor:
        """Undo `to_blocks`; what lies beyond the image is dropped."""
        stride, n = self.operator.stride, x.shape[0]
        if math.prod(stride) > 1:
            dims = len(stride)
            x = x.reshape(n, self.groups, -1, *stride, *self.blocks)
            order = [p for i in range(dims) for p in (3 + dims + i, 3 + i)]
            x = x.permute(0, 1, 2, *order)
            x = x.reshape(n, -1, *(b * s for b, s in zip(self.blocks, stride, strict=True)))
            for dim, size in enumerate(self.operator.size, start=2):
                x = x.narrow(dim, 0, size)
            return x
        return x.reshape(n, -1, *self.blocks)

    def spectrum(self, rcond: float) -> Spectrum:
        """Return the singular values in short.

        Of large models, from a sample of the frequencies: those of the largest Frobenius norm,
        where the largest singular value is to be expected, and as many spread evenly. What is
        known of them is then an estimate.

        Args:
            rcond: Singular values up to this share of the largest count as zero.
        """
        grid = Grid(self.grid, self.grid, self.grid)
        runs, *_ = grid.conjugates()
        frequencies = torch.cat([grid.frequencies()[run] for run in runs])
        rows, columns = self.rows, self.columns
        work = self.groups * rows * columns * min(rows, columns)
        few = min(256, max(8, _SAMPLED_WORK // work))
        if len(frequencies) > few and len(frequencies) * work > _SAMPLED_WORK:
            norms = self.squared_norms(frequencies)
            largest = torch.topk(norms, few // 2).indices.to(frequencies.device)
            spread = torch.linspace(0, len(frequencies) - 1, few // 2, device=frequencies.device)
            frequencies = frequencies[torch.cat([largest, spread.long()]).unique()]
        scale = float(self.operator.kernel.abs().amax()) or 1.0  # the squares are within the range
        values = [singular_values(matrices) for matrices in self._chunks(frequencies, scale)]
        top = scale * max(float(v.amax()) for v in values)
        bottom = scale * min(float(v.amin()) for v in values)
        return Spectrum(top, bottom, deficient=False).cut_off(rcond)

    def _chunks(self, frequencies: Tensor, scale: float) -> Iterator[Tensor]:
        """Yield the matrices at frequencies, a bounded number at a time."""
        entries = self.groups * self.rows * self.columns
        for part in frequencies.split(max(1, chunk(self.operator.kernel.device) // entries)):
            yield self.matrices(part, scale)
