"""Solve with matrices: as they are, one a window, or written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from frfx.linalg import separable
from frfx.linalg.backend import Backend, torch_backend
from frfx.linalg.operators import Convolution, Diagonal, Matrix, Transposed, convolution_of
from frfx.linalg.products import addmm, matmul
from frfx.linalg.pseudo_inverse import (
    Factor,
    Spectrum,
    default_rcond,
    gram_matrix,
    inverse_gram,
    pseudo_inverse,
    resolve_cutoff,
    solve_dtype,
)
from frfx.linalg.separable import Separable

_GRAM_UP_TO = 1e3
"""Squared condition number up to which a pseudo-inverse may stay in two parts: as the inverse of
the Gram matrix is rounded to the precision of the weights, the rounding is multiplied by it."""

_COLUMNS = 4096
"""Columns of a matrix that are written out at a time."""

_SUMMED_IN_SINGLE = 1 << 12
"""Products that are summed in single at most for the Gram matrix of such a matrix, then in double.
"""


@dataclass(frozen=True)
class MatrixFactor(Factor):
    """The pseudo-inverse of a matrix, or of a batch that together makes up one operator.

    Attributes:
        inverse: Shape (..., n, m).
        spectrum: The singular values in short.
    """

    inverse: Tensor
    spectrum: Spectrum

    def solve(self, residual: Tensor) -> Tensor:
        """Map residuals (..., m) to deviations (..., n); of a batch, (..., N, m)."""
        return matmul(residual.to(self.inverse.dtype), self.inverse.mT)

    def correct(self, x: Tensor, target: Tensor, output: Tensor) -> Tensor:
        """Return `x + solve(target - output)`."""
        if x.ndim != 2 or not x.dtype == target.dtype == self.inverse.dtype:
            return super().correct(x, target, output)
        return addmm(x, target - output, self.inverse.mT)

    def followed_by(self, after: Callable[[Tensor], Tensor]) -> MatrixFactor:
        """Return the factor whose deviations are what a linear map makes of these.

        Args:
            after: Maps rows (r, n) to rows (r, k).
        """
        return MatrixFactor(after(self.inverse.mT).mT.contiguous(), self.spectrum)

    @property
    def nbytes(self) -> int:
        """The memory that the factor holds, in bytes."""
        return self.inverse.nbytes


@dataclass(frozen=True)
class GramFactor(Factor):
    """The pseudo-inverse of a matrix much longer than wide, or the other way, in two parts.

    `A+ = A^T (A A^T)^-1` or `(A^T A)^-1 A^T`: the inverse of the short side is small, and A itself
    is the model's.

    Attributes:
        matrix: A, shape (m, n).
        inverse: The inverse of the Gram matrix of the short side.
        spectrum: The matrix's singular values in short.
    """

    matrix: Tensor
    inverse: Tensor
    spectrum: Spectrum

    def solve(self, residual: Tensor) -> Tensor:
        """Map residuals (..., m) to deviations (..., n)."""
        residual = residual.to(self.inverse.dtype)
        matrix = self.matrix.to(self.inverse.dtype)
        if matrix.shape[0] <= matrix.shape[1]:
            return matmul(matmul(residual, self.inverse), matrix)
        return matmul(matmul(residual, matrix), self.inverse)

    def followed_by(self, after: Callable[[Tensor], Tensor]) -> MatrixFactor:
        """Return the factor whose deviations are what a linear map makes of these.

        Args:
            after: Maps rows (r, n) to rows (r, k).
        """
        matrix = self.matrix.to(self.inverse.dtype)
        if matrix.shape[0] <= matrix.shape[1]:
            rows = matmul(self.inverse, after(matrix))
        else:
            rows = matmul(matrix, after(self.inverse))
        return MatrixFactor(rows.mT.contiguous(), self.spectrum)

    @property
    def nbytes(self) -> int:
        """The memory that the factor holds, in bytes; the matrix is the model's."""
        return self.inverse.nbytes


@dataclass(frozen=True)
class DiagonalFactor(Factor):
    """The pseudo-inverse of a diagonal, in double, so that it limits no precision.

    Attributes:
        inverse: Broadcasts as the diagonal does.
        spectrum: The diagonal's singular values in short.
    """

    inverse: Tensor
    spectrum: Spectrum

    def solve(self, residual: Tensor) -> Tensor:
        """Map residuals to deviations entry by entry, in the residual's precision."""
        dtype = solve_dtype(residual.dtype)
        return residual.to(dtype) * self.inverse.to(dtype)

    @property
    def nbytes(self) -> int:
        """The memory that the factor holds, in bytes."""
        return self.inverse.nbytes


@dataclass(frozen=True)
class WindowFactor(Factor):
    """The pseudo-inverse of a convolution whose windows share no entry: a matrix a window.

    Attributes:
        inverse: The pseudo-inverse of the kernel in the layout of a transposed convolution.
        operator: The convolution.
        transposed: Whether it is the transpose that is solved with.
        spectrum: The kernel's singular values in short.
    """

    inverse: Tensor
    operator: Convolution
    transposed: bool
    spectrum: Spectrum

    def solve(self, residual: Tensor) -> Tensor:
        """Map residuals (N, *out_shape) to deviations (N, *in_shape)."""
        inverse = self.operator.with_kernel(self.inverse)
        residual = residual.to(self.inverse.dtype)
        return inverse.mv(residual) if self.transposed else inverse.rmv(residual)

    @property
    def nbytes(self) -> int:
        """The memory that the factor holds, in bytes."""
        return self.inverse.nbytes


@dataclass(frozen=True)
class WrittenOutFactor(Factor):
    """The pseudo-inverse of an operator that was written out, as a matrix a group.

    Attributes:
        factor: That of the matrix, or of a batch of them.
        shape: The shape of a deviation.
        groups: How many matrices there are.
    """

    factor: Factor
    shape: tuple[int, ...]
    groups: int

    @property
    def spectrum(self) -> Spectrum:  # type: ignore[override]
        """The singular values of all matrices in short."""
        return self.factor.spectrum

    def solve(self, residual: Tensor) -> Tensor:
        """Map residuals (N, *out_shape) to deviations (N, *in_shape)."""
        if self.groups == 1:
            return self.factor.solve(residual.flatten(1)).unflatten(1, self.shape)
        by_group = residual.flatten(1).unflatten(1, (self.groups, -1)).transpose(0, 1)
        deviation = self.factor.solve(by_group).transpose(0, 1)
        return deviation.flatten(1).unflatten(1, self.shape)

    @property
    def nbytes(self) -> int:
        """The memory that the factor holds, in bytes."""
        return self.factor.nbytes


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

    def prepare(
        self,
        operator: Matrix | Diagonal | Separable | Convolution | Transposed,
        backend: Backend = torch_backend,
        spectrum: Spectrum | None = None,
    ) -> Factor:
        """Factor an operator; single products of matrices stay with torch on every backend.

        Args:
            operator: What is factored.
            backend: Not used.
            spectrum: Of an operator that is written out: its singular values where they are known.
        """
        del backend
        if isinstance(operator, Separable):
            return separable.prepare(operator, self.rcond, self.damping)
        if isinstance(operator, Diagonal):
            return self._diagonal(operator.diagonal)
        if isinstance(operator, Matrix):
            return self._matrix(operator.matrix)
        conv = convolution_of(operator)
        if conv.disjoint:
            return self._windows(conv, transposed=isinstance(operator, Transposed))
        matrices = write_out(operator)
        groups = len(matrices)
        if groups == 1:
            factor = self._matrix(matrices[0], spectrum)
        else:
            factor = self._batch(matrices, spectrum)
        return WrittenOutFactor(factor, operator.in_shape, groups)

    def _cutoff(self, dtype: torch.dtype, size: int) -> float:
        return resolve_cutoff(self.rcond, self.damping, default_rcond(dtype, size))

    def _matrix(self, matrix: Tensor, known: Spectrum | None = None) -> Factor:
        rows, columns = matrix.shape
        dtype = solve_dtype(matrix.dtype)
        exact = matrix.dtype == torch.float64
        wide = rows <= columns
        cutoff = self._cutoff(matrix.dtype, max(rows, columns))
        if not exact and max(rows, columns) >= 2 * min(rows, columns) >= 512:
            # Products in single cost what the rounding of their inverse does, which is bounded.
            first, *parts = (matrix if wide else matrix.mT).to(dtype).split(_SUMMED_IN_SINGLE, 1)
            product = gram_matrix(first.contiguous()).double()
            for part in parts:
                product += gram_matrix(part.contiguous())
            scale = None if known is None else known.largest
            inverse, spectrum = inverse_gram(product, cutoff, self.damping, scale)
            spectrum = spectrum if known is None else known.cut_off(cutoff)
            if (1 + self.damping) <= _GRAM_UP_TO * (spectrum.condition**-2 + self.damping):
                return GramFactor(matrix, inverse.to(dtype).contiguous(), spectrum)
        return self._batch(matrix, known)

    def _batch(self, matrices: Tensor, known: Spectrum | None = None) -> MatrixFactor:
        """Factor matrices (..., m, n), whose singular values may be known."""
        cutoff = self._cutoff(matrices.dtype, max(matrices.shape[-2:]))
        inverse, spectrum = pseudo_inverse(
            matrices.double(),
            exact=matrices.dtype == torch.float64,
            rcond=cutoff,
            damping=self.damping,
            scale=None if known is None else known.largest,
        )
        spectrum = spectrum if known is None else known.cut_off(cutoff)
        return MatrixFactor(inverse.to(solve_dtype(matrices.dtype)).contiguous(), spectrum)

    def _windows(self, operator: Convolution, transposed: bool) -> WindowFactor:
        kernel = operator.kernel
        factor = self._batch(kernel.flatten(1).unflatten(0, (operator.groups, -1)))
        inverse = factor.inverse.mT.reshape(kernel.shape).contiguous()
        return WindowFactor(inverse, operator, transposed, factor.spectrum)

    def _diagonal(self, diagonal: Tensor) -> DiagonalFactor:
        scale = diagonal.double()
        singular = scale.abs()
        largest = singular.amax()
        kept = singular > self._cutoff(diagonal.dtype, 1) * largest
        inverse = torch.where(kept, scale / (scale.square() + self.damping * largest.square()), 0)
        spectrum = Spectrum(float(largest), float(singular.amin()), not bool(kept.all()))
        return DiagonalFactor(inverse, spectrum)


def written_out_bytes(operator: Convolution | Transposed) -> int:
    """Return the memory, in bytes, of an operator written out as matrices in double."""
    entries = math.prod(operator.in_shape) * math.prod(operator.out_shape)
    return 8 * entries // convolution_of(operator).groups


def write_out(operator: Convolution | Transposed) -> Tensor:
    """Return an operator's matrices (groups, outputs, inputs), in the type of its kernel."""
    kernel, groups = operator.kernel, convolution_of(operator).groups
    inputs = math.prod(operator.in_shape) // groups
    columns = []
    for start in range(0, inputs, _COLUMNS):
        count = min(_COLUMNS, inputs - start)
        # An entry of every group at once: none of them reads what another one does.
        basis = torch.zeros(count, groups, inputs, dtype=kernel.dtype, device=kernel.device)
        each = torch.arange(count, device=kernel.device)
        basis[each, :, start + each] = 1
        image = operator.mv(basis.view(count, *operator.in_shape))
        columns.append(image.reshape(count, groups, -1))
    return torch.cat(columns).permute(1, 2, 0)
