"""Operators that act on every spatial dimension by a matrix of its own: Kronecker products."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from frfx.linalg.pseudo_inverse import Factor, Spectrum, default_rcond, solve_dtype


@dataclass(frozen=True)
class Separable:
    """Multiplication of each of the last dimensions by a matrix: pooling, interpolation, padding.

    Attributes:
        matrices: One a dimension, shape (m_i, n_i), float64 or what the operands come in; together
            they map (..., n_1, ..., n_d) to (..., m_1, ..., m_d).
        dtype: The type that the operands come in, where the matrices are known better; None for
            the matrices' own.
    """

    matrices: tuple[Tensor, ...]
    dtype: torch.dtype | None = None

    def mv(self, x: Tensor) -> Tensor:
        """Apply the operator: (..., n_1, ..., n_d) -> (..., m_1, ..., m_d)."""
        return multiply([m.to(x.dtype) for m in self.matrices], x)

    def rmv(self, y: Tensor) -> Tensor:
        """Apply the transpose: (..., m_1, ..., m_d) -> (..., n_1, ..., n_d)."""
        return multiply([m.mT.to(y.dtype) for m in self.matrices], y)


def multiply(matrices: Sequence[Tensor | None], x: Tensor) -> Tensor:
    """Multiply each of the last dimensions by its matrix; None leaves a dimension alone.

    What shrinks the tensor most comes first.
    """
    pairs = [(matrix, i - len(matrices)) for i, matrix in enumerate(matrices) if matrix is not None]
    for matrix, dim in sorted(pairs, key=lambda pair: pair[0].shape[0] / pair[0].shape[1]):
        x = _multiply_one(matrix, x, dim)
    return x


def _multiply_one(matrix: Tensor, x: Tensor, dim: int) -> Tensor:
    if dim == -1:
        return F.linear(x, matrix)
    if dim == -2:
        return matrix @ x
    behind = x.shape[dim + 1 :]
    return (matrix @ x.flatten(dim + 1)).unflatten(-1, behind)


@dataclass(frozen=True)
class SeparableFactor(Factor):
    """The pseudo-inverse of a Kronecker product that is one itself.

    Attributes:
        inverses: One matrix a dimension, shape (n_i, m_i); None for the identity.
        spectrum: The operator's singular values in short.
        dtype: The type that is solved in.
    """

    inverses: tuple[Tensor | None, ...]
    spectrum: Spectrum
    dtype: torch.dtype

    def solve(self, residual: Tensor) -> Tensor:
        """Map residuals (..., m_1, ..., m_d) to deviations (..., n_1, ..., n_d)."""
        return multiply(self.inverses, residual.to(self.dtype))

    @property
    def nbytes(self) -> int:
        """The memory that the factor holds, in bytes."""
        return sum(inverse.nbytes for inverse in self.inverses if inverse is not None)


@dataclass(frozen=True)
class FilteredFactor(Factor):
    """The pseudo-inverse of a Kronecker product that damping, or a cutoff, keeps from being one.

    Attributes:
        analysis: The left singular vectors, one matrix (r_i, m_i) a dimension.
        weight: What the products of the singular values become, shape (r_1, ..., r_d).
        synthesis: The right singular vectors, one matrix (n_i, r_i) a dimension.
        spectrum: The operator's singular values in short.
    """

    analysis: tuple[Tensor, ...]
    weight: Tensor
    synthesis: tuple[Tensor, ...]
    spectrum: Spectrum

    def solve(self, residual: Tensor) -> Tensor:
        """Map residuals (..., m_1, ..., m_d) to deviations (..., n_1, ..., n_d)."""
        coefficients = multiply(self.analysis, residual.to(self.weight.dtype))
        return multiply(self.synthesis, coefficients * self.weight)

    @property
    def nbytes(self) -> int:
        """The memory that the factor holds, in bytes."""
        return sum(t.nbytes for t in (*self.analysis, self.weight, *self.synthesis))


def prepare(operator: Separable, rcond: float | None = None, damping: float = 0.0) -> Factor:
    """Factor a separable operator through the singular value decompositions of its matrices.

    The singular values of a Kronecker product are the products of those of its factors, so
    `argmin |A d - r|^2 + damping s^2 |d|^2` is
    `d = (V_1 x ... x V_d) W (U_1 x ... x U_d)^T r` with `W = p / (p^2 + damping s^2)` for the
    products p above the cutoff, s the largest of them. Where the products that are kept are
    all those of some singular values of every dimension, and nothing is damped, that is the
    Kronecker product of one matrix a dimension.

    Args:
        operator: What is factored; in double, whatever it comes in.
        rcond: Products up to this share of the largest count as zero; None for the machine
            epsilon of the operands times the largest dimension. Never less than that of double,
            in which the zeros themselves are computed.
        damping: Tikhonov's parameter relative to the squared largest product.
    """
    dtype = solve_dtype(operator.dtype or operator.matrices[0].dtype)
    size = max(max(matrix.shape) for matrix in operator.matrices)
    floor = default_rcond(torch.float64, size)
    rcond = max(default_rcond(dtype, size) if rcond is None else rcond, floor)
    parts = [torch.linalg.svd(m.double(), full_matrices=False) for m in operator.matrices]
    products = _outer([singular for _, singular, _ in parts])
    largest = products.amax()
    kept = products > rcond * largest
    spectrum = Spectrum(float(largest), float(products.amin()), not bool(kept.all()))
    each = [_any_beside(kept, dim) for dim in range(kept.ndim)]
    if damping == 0 and torch.equal(kept, _outer(each)):
        inverses = tuple(
            _unless_identity(right[some].mT @ (left[:, some] / singular[some]).mT, dtype)
            for (left, singular, right), some in zip(parts, each, strict=True)
        )
        return SeparableFactor(inverses, spectrum, dtype)
    weight = torch.where(kept, products / (products.square() + damping * largest.square()), 0)
    return FilteredFactor(
        tuple(left.mT.to(dtype).contiguous() for left, _, _ in parts),
        weight.to(dtype),
        tuple(right.mT.to(dtype).contiguous() for _, _, right in parts),
        spectrum,
    )


def _outer(vectors: Sequence[Tensor]) -> Tensor:
    """Return the products of the entries of vectors, one dimension a vector."""
    return functools.reduce(lambda whole, vector: whole[..., None] * vector, vectors)


def _any_beside(kept: Tensor, dim: int) -> Tensor:
    """Return for every place of a dimension whether anything there is kept."""
    return kept.movedim(dim, 0).reshape(kept.shape[dim], -1).any(1)


def _unless_identity(matrix: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the matrix in a type, or None if it is the identity to rounding."""
    rows, columns = matrix.shape
    identity = torch.eye(rows, columns, dtype=matrix.dtype, device=matrix.device)
    if rows == columns and torch.allclose(matrix, identity, rtol=0, atol=1e-14):
        return None
    return matrix.to(dtype).contiguous()
