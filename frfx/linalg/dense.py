"""Solve with matrices and diagonals as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from frfx.linalg import separable
from frfx.linalg.operators import Diagonal, Matrix
from frfx.linalg.pseudo_inverse import (
    Factor,
    Spectrum,
    default_rcond,
    nbytes,
    pseudo_inverse,
    solve_dtype,
)
from frfx.linalg.separable import Separable


@dataclass(frozen=True)
class MatrixFactor(Factor):
    """`inverse` is the pseudo-inverse, shape (n, m)."""

    inverse: Tensor
    spectrum: Spectrum

    def solve(self, residual: Tensor) -> Tensor:
        """Map residuals (..., m) to deviations (..., n)."""
        return F.linear(residual.to(self.inverse.dtype), self.inverse)

    @property
    def nbytes(self) -> int:
        """The memory that the factor holds, in bytes."""
        return nbytes(self.inverse)


@dataclass(frozen=True)
class DiagonalFactor(Factor):
    """`inverse` broadcasts as the diagonal does; in double, so that it limits no precision."""

    inverse: Tensor
    spectrum: Spectrum

    def solve(self, residual: Tensor) -> Tensor:
        """Map residuals to deviations entry by entry, in the residual's precision."""
        dtype = solve_dtype(residual.dtype)
        return residual.to(dtype) * self.inverse.to(dtype)

    @property
    def nbytes(self) -> int:
        """The memory that the factor holds, in bytes."""
        return nbytes(self.inverse)


@dataclass(frozen=True)
class Dense:
    """Pseudo-inverses of whole matrices, made once in double precision.

    Attributes:
        rcond: Singular values up to this share of the largest count as zero; None for the
            machine epsilon of the weights times the larger dimension.
        damping: Tikhonov's parameter relative to the squared largest singular value.
    """

    rcond: float | None = None
    damping: float = 0.0
    name = "dense"

    def prepare(self, operator: Matrix | Diagonal | Separable) -> Factor:
        """Factor an operator."""
        if isinstance(operator, Separable):
            return separable.prepare(operator, self.rcond, self.damping)
        if isinstance(operator, Diagonal):
            return self._diagonal(operator.diagonal)
        matrix = operator.matrix
        inverse, spectrum = pseudo_inverse(
            matrix.double(),
            exact=matrix.dtype == torch.float64,
            rcond=self._cutoff(matrix.dtype, max(matrix.shape)),
            damping=self.damping,
        )
        return MatrixFactor(inverse.to(solve_dtype(matrix.dtype)).contiguous(), spectrum)

    def _cutoff(self, dtype: torch.dtype, size: int) -> float:
        return default_rcond(dtype, size) if self.rcond is None else self.rcond

    def _diagonal(self, diagonal: Tensor) -> DiagonalFactor:
        scale = diagonal.double()
        singular = scale.abs()
        largest = singular.amax()
        kept = singular > self._cutoff(diagonal.dtype, 1) * largest
        inverse = torch.where(kept, scale / (scale.square() + self.damping * largest.square()), 0)
        spectrum = Spectrum(float(largest), float(singular.amin()), not bool(kept.all()))
        return DiagonalFactor(inverse, spectrum)
