"""Solve convolutions frequency by frequency."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from frfx.linalg.backend import Backend, torch_backend
from frfx.linalg.fourier import FourierMap, Grid
from frfx.linalg.operators import Convolution, Transposed
from frfx.linalg.pseudo_inverse import (
    Factor,
    Spectrum,
    default_rcond,
    largest_singular_value,
    pseudo_inverse,
    solve_dtype,
)

FACTOR_MEMORY = 1 << 29
"""Default bound, in bytes, on the factor of one convolution."""

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Polyphase:
    """The circular model of a convolution: a block-circulant operator on a periodic grid.

    The operand is cut into blocks of the stride, whose entries become channels (space to depth), so
    that every convolution is one of stride 1. The grid is the smallest on which no window wraps
    around, which for stride 1 without padding is the image itself, as in Eq. 12; with circular
    padding it is the image, and windows wrap as they do in the convolution.

    Attributes:
        operator: The convolution.
    """

    operator: Convolution

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
        return tuple(sizes)

    def matrices(self, frequencies: Tensor) -> Tensor:
        """Return the operator at frequencies (F, dims): (G, F, rows, columns), complex128.

        `z^(u) = sum_m K[m] exp(2 pi i u m) x^(u)` over the taps m: Eq. 12, where the flip of Eq. 10
        and the padding on the left are the same shift of the result.
        """
        op = self.operator
        taps = [range(k) for k in op.kernel.shape[2:]]
        shifts, phases = [], []
        for tap in itertools.product(*taps):
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
        kernel = op.kernel.double().flatten(2).unflatten(0, (self.groups, self.rows))
        shift = torch.tensor(shifts, dtype=torch.float64, device=device)
        angle = 2 * math.pi * (frequencies.to(device) @ shift.T)
        waves = torch.complex(angle.cos(), angle.sin())
        stride = math.prod(op.stride)
        phase_of = torch.tensor(phases, device=device)
        parts = []
        for phase in range(stride):
            taps_of = (phase_of == phase).nonzero().flatten()
            values = kernel[..., taps_of].to(waves.dtype)  # (G, rows, c, taps)
            parts.append(torch.einsum("ft,goct->gfoc", waves[:, taps_of], values))
        return torch.stack(parts, -1).flatten(-2)

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


class SpectralFactor(Factor):
    """The pseudo-inverse of the circular model.

    Args:
        operator: A convolution or the transpose of one.
        cutoff: See `pseudo_inverse`.
        damping: See `pseudo_inverse`.
        gram: Invert the Gram matrix of the rows or the columns instead, as a preconditioner does.
        memory: Bound in bytes on what is kept.
        backend: The array library that applies it.

    Attributes:
        model: The circular model.
        map: What is applied.
        spectrum: The singular values of the model.
    """

    def __init__(
        self,
        operator: Convolution | Transposed,
        *,
        cutoff: float,
        damping: float,
        gram: Literal["rows", "columns"] | None = None,
        memory: float = FACTOR_MEMORY,
        backend: Backend = torch_backend,
    ) -> None:
        transposed = isinstance(operator, Transposed)
        conv = operator.of if isinstance(operator, Transposed) else operator
        self.model = model = Polyphase(conv)
        self._cutoff, self._damping, self._gram = cutoff, damping, gram
        self._exact = conv.kernel.dtype == torch.float64
        self._transposed = transposed
        outer, inner = conv.out_size, model.blocks
        if transposed:
            outer, inner = inner, outer
        rows, columns = model.rows, model.columns
        if transposed:
            rows, columns = columns, rows
        # The map takes residuals to deviations, or one of the two to itself.
        sizes = {None: (outer, inner), "rows": (outer, outer), "columns": (inner, inner)}[gram]
        channels = {None: (columns, rows), "rows": (rows, rows), "columns": (columns, columns)}
        self._source_in_blocks = transposed if gram != "columns" else not transposed
        self._result_in_blocks = transposed if gram == "rows" else not transposed
        grid = Grid(model.grid, *sizes)
        frequencies = grid.frequencies("fft")
        self._spectra: list[Spectrum] | None = []  # None once all are known
        self._scale: float | None = None
        most = max(math.prod(grid.half(form)) for form in ("fft", "dft"))
        if most * model.groups * model.rows * model.columns > _CHUNK or damping:
            self._scale = max(
                largest_singular_value(self._forward(part)) for part in self._chunks(frequencies)
            )
        dtype = solve_dtype(conv.kernel.dtype)
        self.map = FourierMap(
            self._inverse,
            grid,
            groups=model.groups,
            rows=channels[gram][0],
            columns=channels[gram][1],
            dtype=dtype,
            device=conv.kernel.device,
            memory=memory,
            backend=backend,
        )
        self.dtype = dtype
        if self.map.streams:  # nothing has been inverted yet
            for part in self._chunks(frequencies):
                self._inverse(part)
        self.spectrum = Spectrum.union(self._spectra)
        self._spectra = None

    def _forward(self, frequencies: Tensor) -> Tensor:
        matrices = self.model.matrices(frequencies)
        return matrices.mH if self._transposed else matrices

    def _chunks(self, frequencies: Tensor) -> Iterator[Tensor]:
        entries = self.model.groups * self.model.rows * self.model.columns
        yield from frequencies.split(max(1, _CHUNK // entries))

    def _invert(self, matrices: Tensor) -> tuple[Tensor, Spectrum]:
        return pseudo_inverse(
            matrices,
            exact=self._exact,
            rcond=self._cutoff,
            damping=self._damping,
            scale=self._scale,
            gram=self._gram,
        )

    def _inverse(self, frequencies: Tensor) -> Tensor:
        inverse, spectrum = self._invert(self._forward(frequencies))
        if self._spectra is not None:
            self._spectra.append(spectrum)
        return inverse

    def solve(self, residual: Tensor) -> Tensor:
        """Map residuals (N, *out_shape) to deviations (N, *in_shape)."""
        residual = residual.to(self.dtype)
        groups = self.model.groups
        if self._source_in_blocks:
            source = self.model.to_blocks(residual)
        else:
            source = residual.reshape(len(residual), groups, -1, *residual.shape[2:])
        result = self.map(source)
        return self.model.from_blocks(result) if self._result_in_blocks else result.flatten(1, 2)

    @property
    def nbytes(self) -> int:
        """The memory that the factor holds, in bytes."""
        return self.map.nbytes


@dataclass(frozen=True)
class Spectral:
    """Pseudo-inverses of the transformed kernel at every frequency (Eq. 12-20).

    With F the discrete Fourier transform over the feature's spatial shape, the linear part of
    Eq. 17 with `G` taken from the forward feature is the circular convolution
    `F(K~)(u, v) F(d)(u, v) = F(pad(z* - z^))(u, v)`: the terms `G` and `b` cancel against `F(z^)`.
    One pseudo-inverse a frequency is Eq. 19 where C_in >= C_out and Eq. 20 where C_in < C_out, and
    the valid part of the result satisfies the convolution exactly in the first case, because a
    circular convolution does not wrap there. The same holds for any stride, dilation and groups,
    and for circular padding. With other padding the model is an approximation: the entries that
    the padding adds are solved for, too, and then dropped.

    Attributes:
        rcond: Singular values up to this share of the largest of all frequencies count as zero;
            None for the machine epsilon of the weights times the larger channel count.
        damping: Tikhonov's parameter relative to the squared largest singular value.
        memory: Bound in bytes on the factor; beyond it the matrices are made anew in chunks at
            every solve.
    """

    rcond: float | None = None
    damping: float = 0.0
    memory: float = FACTOR_MEMORY
    name = "spectral"

    def prepare(
        self, operator: Convolution | Transposed, backend: Backend = torch_backend
    ) -> SpectralFactor:
        """Factor a convolution, or the transpose of one, for one spatial shape."""
        kernel = operator.kernel
        cutoff = default_rcond(kernel.dtype, max(kernel.shape[:2]))
        return SpectralFactor(
            operator,
            cutoff=cutoff if self.rcond is None else self.rcond,
            damping=self.damping,
            memory=self.memory,
            backend=backend,
        )
