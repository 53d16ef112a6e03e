"""The circular model of a convolution: an operator that one matrix a frequency diagonalises."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from frfx.linalg.autocorrelation import Autocorrelation, Side, differences
from frfx.linalg.form import Grid, chunk, fast_length
from frfx.linalg.operators import Convolution
from frfx.linalg.pseudo_inverse import Spectrum, gram_matrix, singular_values

_SAMPLED_WORK = 1 << 30
"""Multiplications that the spectrum of a large model may cost."""


@dataclass(frozen=True)
class Polyphase:
    """The circular model of a convolution: a block-circulant operator on a periodic grid.

    The operand is cut into blocks of the stride, whose entries become channels (space to depth), so
    that every convolution is one of stride 1. The grid is the smallest on which no window wraps
    around, which for stride 1 without padding is the image itself, as in Eq. 12; with circular
    padding that keeps the size it is the image, and windows wrap as they do in the convolution.
    With other padding, where any grid as large is as good a model, it is one whose sides have fast
    transforms.

    Attributes:
        operator: The convolution.
        dtype: The real type that its matrices are made in.
        smallest: Whether the grid is the smallest, whatever it takes to transform.
    """

    operator: Convolution
    dtype: torch.dtype = torch.float64
    smallest: bool = False

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
        return tuple(sizes if self.exact or self.smallest else map(fast_length, sizes))

    def matrices(self, frequencies: Tensor, scale: float = 1.0) -> Tensor:
        """Return the operator over a scale at frequencies: (G, F, rows, columns), complex.

        `z^(u) = sum_m K[m] exp(2 pi i u m) x^(u)` over the shifts m: Eq. 12, where the flip of
        Eq. 10 and the padding on the left are the same shift of the result.
        """
        angle, taps = self._angles(frequencies), self.taps.flatten(1)
        waves = (angle.cos(), angle.sin())
        real, imaginary = (wave.div_(scale).to(self.dtype) @ taps for wave in waves)
        shape = (len(frequencies), *self.taps.shape[1:])
        return torch.complex(real, imaginary).view(shape).transpose(0, 1)

    def gram(
        self, frequencies: Tensor, side: Side, scale: float = 1.0, matrices: Tensor | None = None
    ) -> Tensor:
        """Return the Gram matrices of the operator over a scale at frequencies.

        Args:
            frequencies: Shape (F, dims).
            side: `A A^H` of the rows, or `A^H A` of the columns.
            scale: What the operator is divided by.
            matrices: What `matrices` returns of these, if that is known.

        Returns:
            Shape (G, F, rows, rows) or (G, F, columns, columns), complex.
        """
        if side not in self._autocorrelations:
            taps = self.taps / self._peak  # whose squares are within the range
            count = math.prod(Grid(self.grid, self.grid, self.grid).half)
            correlates = self.correlates(side, count)
            known = Autocorrelation.of(self.shifts, taps, side) if correlates else None
            self._autocorrelations[side] = known
        autocorrelation = self._autocorrelations[side]
        if autocorrelation is not None:
            return autocorrelation.gram(frequencies, (self._peak / scale) ** 2)
        if matrices is None:
            matrices = self.matrices(frequencies, scale)
        return gram_matrix(matrices if side == "rows" else matrices.mH)

    def correlates(self, side: Side, frequencies: int) -> bool:
        """Tell whether Gram matrices of so many frequencies take less by the autocorrelation."""
        shifts, other = len(self.shifts), self.columns if side == "rows" else self.rows
        if shifts >= 2 * other:  # there are no fewer lags
            return False
        lags = len(differences(self.shifts)[0])
        return other * shifts**2 / 2 + lags * frequencies < 4 * other * frequencies

    @functools.cached_property
    def _autocorrelations(self) -> dict[Side, Autocorrelation | None]:
        """Those of either side that have been asked for; None where products take less."""
        return {}

    @functools.cached_property
    def _peak(self) -> float:
        return float(self.operator.kernel.abs().amax()) or 1.0

    @functools.cached_property
    def _offsets(self) -> tuple[Tensor, Tensor, Tensor]:
        """How far the kernel's entries reach: shifts in blocks, each entry's shift and phase."""
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
        different, which = torch.tensor(shifts, device=device).unique(dim=0, return_inverse=True)
        return different, which, torch.tensor(phases, device=device)

    @property
    def shifts(self) -> Tensor:
        """The shifts m of the kernel's taps, in blocks: (M, dims)."""
        return self._offsets[0]

    @functools.cached_property
    def taps(self) -> Tensor:
        """The kernel's taps K[m]: (M, G, rows, columns), zero where a block has no entry."""
        shifts, which, phases = self._offsets
        kernel = self.operator.kernel.to(self.dtype).flatten(2).movedim(2, 0)  # (T, out, in)
        taps = kernel.new_zeros(len(shifts), *kernel.shape[1:], math.prod(self.operator.stride))
        taps[which, ..., phases] = kernel
        return taps.view(len(shifts), self.groups, self.rows, self.columns)

    def _angles(self, frequencies: Tensor) -> Tensor:
        return 2 * math.pi * (frequencies.to(self.shifts.device) @ self.shifts.double().T)

    def squared_norms(self, frequencies: Tensor) -> Tensor:
        """Return the squared Frobenius norm of the operator at frequencies, shape (F,)."""
        angle, taps = self._angles(frequencies), self.taps.flatten(1)
        products = taps @ taps.T
        cosine, sine = angle.cos(), angle.sin()
        return ((cosine @ products) * cosine + (sine @ products) * sine).sum(1)

    @property
    def nbytes(self) -> int:
        """The memory that it holds for itself, in bytes."""
        taps = self.__dict__.get("taps")
        known = filter(None, self._autocorrelations.values())
        return sum(each.nbytes for each in known) + (0 if taps is None else taps.nbytes)

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
        most = max(1, chunk(self.operator.kernel.device) // (self.groups * rows * columns))
        short: Side = "rows" if rows <= columns else "columns"
        correlates = self.correlates(short, len(frequencies))
        values = []
        for part in frequencies.split(most):
            matrices = self.matrices(part, self._peak)
            gram = functools.partial(self.gram, part, short, self._peak) if correlates else None
            values.append(singular_values(matrices, gram))
        top = self._peak * max(float(v.amax()) for v in values)
        bottom = self._peak * min(float(v.amin()) for v in values)
        return Spectrum(top, bottom, deficient=False).cut_off(rcond)
