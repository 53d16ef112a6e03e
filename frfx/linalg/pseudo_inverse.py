"""Batched, damped Moore-Penrose pseudo-inverses and what a solver keeps of them."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frfx.linalg.bidiagonal import largest_singular_values, unstructured
from frfx.linalg.products import matmul

_GRAM_FLOOR = 1e-7
"""Singular values below this share of the largest drown in a float64 Gram matrix's rounding."""

_CHOLESKY_FROM = 24
"""Gram matrices of this size and more are inverted by Cholesky, which is then much faster."""

_CHOLESKY_FLOOR = 1e-6
"""Cholesky is trusted while every singular value is above this share of the largest."""

_DEFLATION_FROM = 512
"""From this size on, what few eigenvalues have to be cut off a Gram matrix are looked for alone."""

_DEFLATION_FLOOR = 1e-4
"""Least cutoff for that: what it leaves of a float64 Gram matrix is exact to single precision."""

_DEFLATED = 64
"""How many eigenvectors are iterated; half as many, say, are then found in a few steps."""

_DEFLATION_STEPS = 20
"""Bound on these steps."""

_BLOCK = 256
"""Rows of large Gram matrices that are computed at a time, up to the diagonal."""

_EXACT_WORK = 1 << 20
"""Multiplications up to which singular values are computed by their own decomposition."""

_LANCZOS_STEPS = 12
"""Steps of a bidiagonalisation; the largest singular value is then known to a few percent."""


@dataclass(frozen=True)
class Spectrum:
    """What is known of an operator's singular values.

    Attributes:
        largest: The largest singular value; of large matrices in single precision an estimate, a
            few percent off at most.
        smallest: The smallest of the min(m, n) singular values, likewise.
        deficient: Whether some of them count as zero.
    """

    largest: float
    smallest: float
    deficient: bool

    @property
    def condition(self) -> float:
        """The condition number; infinite if a singular value is zero."""
        return self.largest / self.smallest if self.smallest > 0 else float("inf")

    def cut_off(self, rcond: float) -> Spectrum:
        """Return the same where singular values up to a share of the largest count as zero."""
        return replace(self, deficient=not self.smallest > rcond * self.largest)

    def __truediv__(self, scale: float) -> Spectrum:
        """Return the spectrum of the operator divided by a positive number."""
        return Spectrum(self.largest / scale, self.smallest / scale, self.deficient)

    @staticmethod
    def union(parts: Iterable[Spectrum]) -> Spectrum:
        """Return the spectrum of a block-diagonal operator."""
        largest, smallest, deficient = zip(
            *((p.largest, p.smallest, p.deficient) for p in parts), strict=True
        )
        return Spectrum(max(largest), min(smallest), any(deficient))


class Factor(abc.ABC):
    """An operator made ready for solving; the same for every sample and every batch.

    Attributes:
        spectrum: The operator's singular values in short.
    """

    spectrum: Spectrum

    @abc.abstractmethod
    def solve(self, residual: Tensor) -> Tensor:
        """Return the least-norm least-squares solution of `operator(d) = residual`."""

    def correct(self, x: Tensor, target: Tensor, output: Tensor) -> Tensor:
        """Return `x + solve(target - output)`."""
        return x + self.solve(target - output)

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


def resolve_cutoff(rcond: float | None, damping: float, default: float) -> float:
    """Return the share of the largest singular value up to which others count as zero.

    Args:
        rcond: What is asked for; None for the default.
        damping: Tikhonov's parameter relative to the squared largest singular value. Where it says
            more than the default cutoff, none is left, and -1 returned.
        default: See `default_rcond`.
    """
    if rcond is not None:
        return rcond
    return -1.0 if damping > default**2 else default


def pseudo_inverse(
    matrices: Tensor,
    *,
    exact: bool,
    rcond: float,
    damping: float = 0.0,
    scale: float | None = None,
) -> tuple[Tensor, Spectrum]:
    """Invert a batch of matrices that together make up one operator.

    Solves `argmin |A d - r|^2 + damping s^2 |d|^2` with s the largest singular value of the batch;
    singular values up to `rcond * s` are cut off.

    Args:
        matrices: Shape (..., m, n), float64 or complex128.
        exact: Use singular value decompositions. Otherwise the Gram matrices of the short side,
            several times faster and exact for singular values above 1e-7 s: enough for weights
            that came in single precision.
        rcond: Cutoff relative to s.
        damping: Tikhonov's parameter relative to s^2.
        scale: s, if the batch is a part of an operator whose spectrum is known; what the second
            result says of the part may then be missing. None for the largest of the batch.

    Returns:
        The inverses, shape (..., n, m), and the singular values in short.
    """
    rows, columns = matrices.shape[-2:]
    if exact:
        return _by_svd(matrices, rcond, damping, scale)
    adjoint, wide = matrices.mH, rows <= columns
    product = gram_matrix(matrices if wide else adjoint)
    inverse, spectrum = inverse_gram(product, rcond, damping, scale)
    return (adjoint @ inverse if wide else inverse @ adjoint), spectrum


def solve_damped(product: Tensor, right: Tensor, damping: float) -> Tensor:
    """Apply the inverse of damped Gram matrices, without making it.

    For what is applied once: a Cholesky decomposition and two substitutions a system.

    Args:
        product: Shape (..., m, m), positive semidefinite; it is written over.
        right: Shape (..., m, N).
        damping: What is added to the diagonal, well above the rounding.
    """
    product.diagonal(dim1=-2, dim2=-1).add_(damping)
    triangle, _ = torch.linalg.cholesky_ex(product)
    return torch.cholesky_solve(right, triangle)


def pseudo_inverses(matrices: Tensor, rcond: float | None = None, damping: float = 0.0) -> Tensor:
    """Return the pseudo-inverse of every matrix of a batch, each with a scale of its own.

    For matrices that come with the samples: what a sample gets depends on no other, nothing waits
    for the device, and a matrix that is not finite has an inverse of NaN. Computed in double, of
    single precision and less through the Gram matrix of the short side. They count as constants:
    no gradient flows through them.

    Args:
        matrices: Shape (..., m, n), floating point.
        rcond: Singular values up to this share of their matrix's largest count as zero; None for
            the machine epsilon times the larger dimension.
        damping: Tikhonov's parameter relative to the squared largest singular value.

    Returns:
        Shape (..., n, m), of the type of the matrices, but single at least.
    """
    rows, columns = matrices.shape[-2:]
    rcond = resolve_cutoff(rcond, damping, default_rcond(matrices.dtype, max(rows, columns)))
    with torch.no_grad():
        double = matrices.double()
        finite = torch.isfinite(double).all(-1, keepdim=True).all(-2, keepdim=True)
        double = torch.where(finite, double, 0)  # LAPACK refuses NaN
        if matrices.dtype == torch.float64:
            left, singular, adjoint = torch.linalg.svd(double, full_matrices=False)
            weights = _weights_of_each(singular, rcond, damping) * singular
            inverse = adjoint.mT @ (weights[..., None] * left.mT)
        else:
            wide = rows <= columns
            squared, vectors = torch.linalg.eigh(double @ double.mT if wide else double.mT @ double)
            if damping < _GRAM_FLOOR**2:
                rcond = max(rcond, _GRAM_FLOOR)
            weights = _weights_of_each(squared.clamp(min=0).sqrt(), rcond, damping)
            gram = (vectors * weights[..., None, :]) @ vectors.mT
            inverse = double.mT @ gram if wide else gram @ double.mT
        return torch.where(finite, inverse, math.nan).to(solve_dtype(matrices.dtype))


def _weights_of_each(singular: Tensor, rcond: float, damping: float) -> Tensor:
    """Return `1 / (s_i^2 + damping s^2)` with the s of each matrix, zero where s_i is cut off."""
    largest = singular.amax(-1, keepdim=True)
    kept = (singular > rcond * largest) & (singular > 0)
    shifted = singular.square() + damping * largest.square()
    return torch.where(kept, 1 / torch.where(kept, shifted, 1), 0)


def largest_singular_value(matrix: Tensor) -> float:
    """Return the largest singular value of a batch of matrices; of large ones a close estimate.

    Large ones are only multiplied by vectors, for their Gram matrices would take longer than many
    solves.
    """
    if min(matrix.shape[-2:]) < _CHOLESKY_FROM:
        return float(singular_values(matrix).amax())
    found = largest_singular_values(
        lambda x: (matrix @ x[..., None])[..., 0],
        lambda y: (matrix.mH @ y[..., None])[..., 0],
        unstructured(matrix[..., 0, :]),
        _LANCZOS_STEPS,
    )
    return float(found.amax())


def singular_values(matrices: Tensor, gram: Callable[[], Tensor] | None = None) -> Tensor:
    """Return the singular values of a batch, shape (..., min(m, n)).

    Through the Gram matrices of the short side, much faster and exact above 1e-7 of the largest,
    but for the smallest problems.

    Args:
        matrices: Shape (..., m, n).
        gram: Makes these Gram matrices, if there is a faster way than their products.
    """
    rows, columns = matrices.shape[-2:]
    if matrices.numel() * min(rows, columns) <= _EXACT_WORK:
        return torch.linalg.svdvals(matrices)
    if gram is not None:
        product = gram()
    else:
        product = gram_matrix(matrices if rows <= columns else matrices.mH)
    return torch.linalg.eigvalsh(product).clamp(min=0).sqrt()


def gram_matrix(matrices: Tensor) -> Tensor:
    """Return `A A^H` of (..., m, n) in its type; of large matrices, every product is made once."""
    size = matrices.shape[-2]
    if size < 2 * _BLOCK:
        return matmul(matrices, matrices.mH)
    product = matrices.new_empty(*matrices.shape[:-1], size)
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        rows = matmul(matrices[..., start:stop, :], matrices[..., :stop, :].mH)
        product[..., start:stop, :stop] = rows
        product[..., :start, start:stop] = rows[..., :start].mH
    return product


def inverse_gram(
    product: Tensor, rcond: float, damping: float = 0.0, scale: float | None = None
) -> tuple[Tensor, Spectrum]:
    """Invert Gram matrices as `pseudo_inverse` does on its way.

    Args:
        product: Shape (..., m, m), positive semidefinite, float64 or complex128.
        rcond: See `pseudo_inverse`; of the matrices whose products they are, as all that follows.
        damping: See `pseudo_inverse`.
        scale: See `pseudo_inverse`.
    """
    small = product.shape[-1] < _CHOLESKY_FROM
    return (_by_eigh if small else _by_cholesky)(product, rcond, damping, scale)


def _weights(
    squared: Tensor, rcond: float, damping: float, scale: float | None
) -> tuple[Tensor, Spectrum]:
    """Return `1 / (s_i^2 + damping s^2)`, zero where s_i is cut off."""
    singular = squared.sqrt()
    largest = float(singular.amax())
    scale = largest if scale is None else scale
    kept = singular > rcond * scale
    weights = torch.where(kept, 1 / (squared + damping * scale**2), 0)
    return weights, Spectrum(largest, float(singular.amin()), not bool(kept.all()))


def _by_svd(
    matrices: Tensor, rcond: float, damping: float, scale: float | None
) -> tuple[Tensor, Spectrum]:
    left, singular, right = torch.linalg.svd(matrices, full_matrices=False)
    weights, spectrum = _weights(singular.square(), rcond, damping, scale)
    weighted = (weights * singular).to(matrices.dtype)
    return right.mH @ (weighted[..., None] * left.mH), spectrum


def _by_eigh(
    product: Tensor, rcond: float, damping: float, scale: float | None
) -> tuple[Tensor, Spectrum]:
    squared, vectors = torch.linalg.eigh(product)
    if damping < _GRAM_FLOOR**2:  # else the rounding is damped, too
        rcond = max(rcond, _GRAM_FLOOR)
    weights, spectrum = _weights(squared.clamp(min=0), rcond, damping, scale)
    return (vectors * weights.to(product.dtype)[..., None, :]) @ vectors.mH, spectrum


def _by_cholesky(
    product: Tensor, rcond: float, damping: float, scale: float | None
) -> tuple[Tensor, Spectrum]:
    """Invert Gram matrices; those that are too near to singular by their eigenvalues."""
    batch, size = product.shape[:-2], product.shape[-1]
    product = product.reshape(-1, size, size)
    known = scale is not None
    largest = scale = largest_singular_value(product) ** 0.5 if scale is None else scale
    shift = damping * scale**2
    shifted = product.clone() if shift else product
    shifted.diagonal(dim1=-2, dim2=-1).add_(shift)
    triangle, failed = torch.linalg.cholesky_ex(shifted)
    if bool(failed.any()):  # what is left may have a zero pivot, which is an error below
        triangle[failed != 0] = torch.eye(size, dtype=triangle.dtype, device=triangle.device)
    inverse = torch.cholesky_inverse(triangle)
    # |G^-1| <= |G^-1|_F, so 1 / |G^-1|_F is a lower bound of the smallest eigenvalue: of the damped
    # matrix, which has to be trusted, or of the matrix itself, which may have to be cut.
    entries = inverse.mT.flatten(1)  # as LAPACK writes them; the norm of reals is much faster
    entries = torch.view_as_real(entries).flatten(1) if inverse.is_complex() else entries
    bound = 1 / torch.linalg.vector_norm(entries, dim=1)
    if rcond > 0:
        bound = bound - shift
    floor = (max(rcond, _CHOLESKY_FLOOR) * scale) ** 2
    near = (failed != 0) | ~(bound > floor)
    parts = []
    if bool(near.any()):
        deflated = None
        if len(inverse) == 1 and not bool(failed.any()) and rcond >= _DEFLATION_FLOOR:
            deflated = _without_largest(inverse[0], 1 / ((rcond * scale) ** 2 + shift))
        if deflated is not None:
            inverse, value = deflated[0][None], deflated[1]
            smallest = max(1 / value - shift, 0.0) ** 0.5
            parts.append(Spectrum(largest, smallest, deficient=smallest <= rcond * scale))
        else:
            inverse[near], spectrum = _by_eigh(product[near], rcond, damping, scale)
            parts.append(spectrum)
    if known:
        return inverse.reshape(*batch, size, size), Spectrum(largest, math.nan, bool(near.any()))
    if not bool(near.all()):
        # The smallest eigenvalue lies in a matrix whose bound is within its size of the least.
        bound = torch.where(near, float("inf"), bound)
        candidates = inverse[bound <= bound.amin() * size**0.5]
        if len(candidates) > 64:
            candidates = inverse[torch.topk(bound, 64, largest=False).indices]
        smallest = 1 / largest_singular_value(candidates) - shift
        parts.append(Spectrum(largest, max(smallest, 0.0) ** 0.5, deficient=False))
    return inverse.reshape(*batch, size, size), Spectrum.union(parts)


def _without_largest(matrix: Tensor, bound: float) -> tuple[Tensor, float] | None:
    """Remove the eigenvectors of eigenvalues above a bound from a positive definite matrix.

    Returns:
        The matrix without them and the largest eigenvalue, or None where they are too many, or too
        near to one another, for it to be worth while.

    Reference:
        Subspace iteration with Rayleigh-Ritz projections (Golub and Van Loan, Sec. 8.2.4). The
        matrix is projected from both sides, so what an eigenvector is off by counts squared.
    """
    if matrix.shape[-1] < _DEFLATION_FROM:
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    shape, double = (len(matrix), _DEFLATED), torch.float64
    vectors = torch.randn(shape, generator=generator, dtype=double, device="cpu")
    vectors = vectors.to(matrix.device, matrix.dtype)
    for _ in range(_DEFLATION_STEPS):
        vectors, _ = torch.linalg.qr(vectors)
        image = matrix @ vectors
        values, rotation = torch.linalg.eigh(vectors.mH @ image)
        vectors, image = vectors @ rotation, image @ rotation
        error = torch.linalg.vector_norm(image - values * vectors, dim=0)
        doubtful = (values > bound / 2) & (error > _GRAM_FLOOR * values)
        if bool(values[0] > bound):
            return None
        if not bool(doubtful.any()):
            found = values > bound
            vectors, image = vectors[:, found], image[:, found]
            rest = image - vectors @ (vectors.mH @ image)
            without = torch.addmm(matrix, vectors, image.mH, alpha=-1)
            return without.addmm_(rest, vectors.mH, alpha=-1), float(values[-1])
        vectors = image
    return None
