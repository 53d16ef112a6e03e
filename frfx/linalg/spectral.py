"""Solve convolutions frequency by frequency."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frfx.linalg.autocorrelation import Side
from frfx.linalg.backend import Backend, torch_backend
from frfx.linalg.copies import Copies, written_out
from frfx.linalg.form import Grid, spectral_bytes
from frfx.linalg.fourier import FourierMap
from frfx.linalg.operators import Convolution, Transposed, convolution_of
from frfx.linalg.polyphase import Polyphase
from frfx.linalg.pseudo_inverse import (
    Factor,
    Spectrum,
    default_rcond,
    inverse_gram,
    pseudo_inverse,
    resolve_cutoff,
    solve_damped,
    solve_dtype,
)

FACTOR_MEMORY = 1 << 29
"""Default bound, in bytes, on the factor of one convolution."""

_SINGLE_DAMPING = 1e-4
"""From this damping on, Gram matrices are conditioned well enough for single precision."""


class SpectralFactor(Factor):
    """The pseudo-inverse of the circular model.

    Args:
        operator: A convolution or the transpose of one.
        cutoff: See `pseudo_inverse`.
        damping: See `pseudo_inverse`.
        gram: Invert the Gram matrix of the rows or the columns instead, as a preconditioner does.
        memory: Bound in bytes on what is kept.
        spectrum: The singular values of the model where they are known.
        backend: The array library that applies it.

    Attributes:
        model: The circular model.
        map: What is applied.
        spectrum: The singular values of the model; see `Polyphase.spectrum`.
        dtype: The real type that is solved in.
    """

    def __init__(
        self,
        operator: Convolution | Transposed,
        *,
        cutoff: float,
        damping: float,
        gram: Side | None = None,
        memory: float = FACTOR_MEMORY,
        spectrum: Spectrum | None = None,
        backend: Backend = torch_backend,
    ) -> None:
        transposed, conv = isinstance(operator, Transposed), convolution_of(operator)
        self.dtype = solve_dtype(conv.kernel.dtype)
        damps = damping >= _SINGLE_DAMPING and cutoff <= 0  # and nothing else
        single = damps and self.dtype == torch.float32
        model = Polyphase(conv, torch.float32 if single else torch.float64)
        self._cutoff, self._damping, self._gram = cutoff, damping, gram
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
        entries, tight = model.groups * math.prod(channels[gram]), replace(model, smallest=True)
        needed, least = (
            spectral_bytes(Grid(m.grid, *sizes), entries, self.dtype) for m in (model, tight)
        )
        if least <= memory < needed:  # to make the matrices anew would take more than it saves
            model = tight
        self.model = model
        self._short = gram or ("rows" if rows <= columns else "columns")
        self._source_in_blocks = transposed if gram != "columns" else not transposed
        self._result_in_blocks = transposed if gram == "rows" else not transposed
        grid = Grid(model.grid, *sizes)
        if spectrum is None:
            spectrum = (replace(model, dtype=torch.float64) if single else model).spectrum(cutoff)
        self.spectrum = spectrum.cut_off(cutoff)
        # The operator is divided by its scale, so that its squares are within the range.
        self._scale = self.spectrum.largest or 1.0
        self._unscale = self._scale if gram is None else self._scale**2
        self.map = FourierMap(
            self._inverse,
            grid,
            groups=model.groups,
            rows=channels[gram][0],
            columns=channels[gram][1],
            dtype=self.dtype,
            device=conv.kernel.device,
            memory=memory,
            apply=self._apply_inverse if damps else None,
            backend=backend,
        )
        if not self.map.streams:
            self.model = replace(model)  # without what its matrices were made of

    def _matrices(self, frequencies: Tensor) -> Tensor:
        """Return the model's matrices at frequencies, scaled."""
        return self.model.matrices(frequencies, self._scale)

    def _products(self, frequencies: Tensor, matrices: Tensor | None = None) -> Tensor:
        """Return the operator's Gram matrices: of its short side, or of the one that is asked for.

        Args:
            frequencies: Shape (F, dims).
            matrices: The model's there, if they have been made.
        """
        side: Side = "rows" if (self._short == "rows") != self._transposed else "columns"
        return self.model.gram(frequencies, side, self._scale, matrices)

    def _apply_inverse(self, frequencies: Tensor, right: Tensor) -> Tensor:
        if self._gram is not None:
            product = self._products(frequencies)
            return solve_damped(product, right, self._damping) / self._unscale
        matrices = self._matrices(frequencies)
        product = self._products(frequencies, matrices)
        adjoint = matrices if self._transposed else matrices.mH
        if self._short == "rows":
            solution = adjoint @ solve_damped(product, right, self._damping)
        else:
            solution = solve_damped(product, adjoint @ right, self._damping)
        return solution / self._unscale

    def _inverse(self, frequencies: Tensor) -> Tensor:
        if self._gram is not None:
            inverse = self._inverse_gram(self._products(frequencies))
        else:
            matrices = self._matrices(frequencies)
            adjoint = matrices if self._transposed else matrices.mH
            if self.dtype == torch.float64:
                inverse, _ = pseudo_inverse(
                    adjoint.mH, exact=True, rcond=self._cutoff, damping=self._damping, scale=1.0
                )
            else:
                inverse = self._inverse_gram(self._products(frequencies, matrices))
                inverse = adjoint @ inverse if self._short == "rows" else inverse @ adjoint
        # Of complex numbers themselves, division by a real one is several times slower.
        torch.view_as_real(inverse).div_(self._unscale)
        return inverse

    def _inverse_gram(self, product: Tensor) -> Tensor:
        inverse, _ = inverse_gram(product, self._cutoff, self._damping, scale=1.0)
        return inverse

    @property
    def shift(self) -> float:
        """What the damping adds to the squared singular values."""
        return self._damping * self._scale**2

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

    def correct(self, x: Tensor, target: Tensor | Copies, output: Tensor) -> Tensor:
        """Return `x + solve(target - output)`."""
        blocked = math.prod(self.model.operator.stride) > 1
        mixed = not x.dtype == target.dtype == output.dtype == self.dtype
        if blocked or self._gram is not None or mixed:
            return super().correct(x, written_out(target), output)
        n, groups = len(x), self.model.groups
        output, plus = (t.reshape(n, groups, -1, *t.shape[2:]) for t in (output, x))
        if isinstance(target, Copies):
            target = target.grouped(groups)
        else:
            target = target.reshape(output.shape)
        return self.map(target, output, plus).flatten(1, 2)

    @property
    def nbytes(self) -> int:
        """The memory that the factor holds, in bytes."""
        return self.map.nbytes + self.model.nbytes


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

    def prepare(
        self,
        operator: Convolution | Transposed,
        backend: Backend = torch_backend,
        spectrum: Spectrum | None = None,
    ) -> SpectralFactor:
        """Factor a convolution, or the transpose of one, whose spectrum may be known."""
        kernel = operator.kernel
        default = default_rcond(kernel.dtype, max(kernel.shape[:2]))
        return SpectralFactor(
            operator,
            cutoff=resolve_cutoff(self.rcond, self.damping, default),
            damping=self.damping,
            memory=self.memory,
            spectrum=spectrum,
            backend=backend,
        )
