"""Batched, damped Moore-Penrose pseudo-inverses and what a solver keeps of them."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

_GRAM_FLOOR = 1e-7
"""Singular values below this share of the largest drown in a float64 Gram matrix's rounding."""


@dataclass(frozen=True)
class Spectrum:
    """What is known of an operator's singular values.

    Attributes:
        largest: The largest singular value.
        smallest: The smallest of the min(m, n) singular values.
        deficient: Whether some of them count as zero.
    """

    largest: float
    smallest: float
    deficient: bool

    @property
    def condition(self) -> float:
        """The condition number; infinite if a singular value is zero."""
        return self.largest / self.smallest if self.smallest > 0 else float("inf")


class Factor(abc.ABC):
    """An operator made ready for solving; the same for every sample and every batch.

    Attributes:
        spectrum: The operator's singular values in short.
    """

    spectrum: Spectrum

    @abc.abstractmethod
    def solve(self, residual: Tensor) -> Tensor:
        """Return the least-norm least-squares solution of `operator(d) = residual`."""

    @property
    @abc.abstractmethod
    def nbytes(self) -> int:
        """The memory that the factor holds, in bytes."""


def solve_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type that systems of this type are solved in: single at least."""
    return torch.promote_types(dtype, torch.float32)


def default_rcond(dtype: torch.dtype, size: int) -> float:
    """Return NumPy's cutoff for singular values, in the precision that is solved in."""
    return torch.finfo(solve_dtype(dtype)).eps * size


def nbytes(*tensors: Tensor) -> int:
    """Return the memory of tensors, in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def pseudo_inverse(
    matrices: Tensor, *, exact: bool, rcond: float, damping: float = 0.0
) -> tuple[Tensor, Spectrum]:
    """Invert a batch of matrices that together make up one operator.

    Solves `argmin |A d - r|^2 + damping s^2 |d|^2` with s the largest singular value of the batch;
    without damping it is the pseudo-inverse with singular values up to `rcond * s` cut off.

    Args:
        matrices: Shape (..., m, n), float64 or complex128.
        exact: Use singular value decompositions. Otherwise the Gram matrices of the short side,
            several times faster and exact for singular values above 1e-7 s: enough for weights
            that came in single precision.
        rcond: Cutoff relative to s.
        damping: Tikhonov's parameter relative to s^2.

    Returns:
        The inverses, shape (..., n, m), and the singular values in short.
    """
    rows, columns = matrices.shape[-2:]
    adjoint = matrices.mH
    if exact:
        left, singular, right = torch.linalg.svd(matrices, full_matrices=False)
        squared = singular.square()
    else:
        gram = matrices @ adjoint if rows <= columns else adjoint @ matrices
        squared, vectors = torch.linalg.eigh(gram)
        squared = squared.clamp(min=0)
        singular = squared.sqrt()
        rcond = max(rcond, _GRAM_FLOOR)
    largest = singular.amax()
    kept = singular > rcond * largest
    weight = torch.where(kept, 1 / (squared + damping * largest.square()), 0)
    weight = weight.to(matrices.dtype)
    if exact:
        inverse = right.mH @ ((weight * singular)[..., None] * left.mH)
    elif rows <= columns:
        inverse = adjoint @ ((vectors * weight[..., None, :]) @ vectors.mH)
    else:
        inverse = ((vectors * weight[..., None, :]) @ vectors.mH) @ adjoint
    spectrum = Spectrum(float(largest), float(singular.amin()), not bool(kept.all()))
    return inverse, spectrum
