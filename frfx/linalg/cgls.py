"""Least squares without a matrix: conjugate gradients on two products, for every sample."""

from __future__ import annotations

import torch
from torch import Tensor

from frfx.linalg.bidiagonal import largest_singular_values, unstructured
from frfx.linalg.conjugate_gradients import Convergence
from frfx.linalg.linear_function import Map

_NOISE = 100.0
"""How many units of rounding of `||J|| ||r||` the computed `J^T r` may be off."""

_LANCZOS_STEPS = 4
"""Steps of a bidiagonalisation: of residual blocks it then lies within a tenth of the answer."""


def cgls(
    mv: Map,
    rmv: Map,
    right: Tensor,
    *,
    tolerance: Tensor | float,
    max_steps: int,
    shift: Tensor | float = 0.0,
    miss: Tensor | float = 0.0,
    largest: Tensor | None = None,
) -> tuple[Tensor, Convergence]:
    """Return `argmin ||J d - right||^2 + shift ||d||^2`, of least norm, for every sample.

    Conjugate gradients on `(J^T J + shift) d = J^T right` from 0: for a consistent system the
    iterates span what those of `J J^T u = right`, `d = J^T u` do, and it converges for the others,
    too. The residual falls with every step, so that whatever ends the iteration, the answer is
    never worse than no step.

    Args:
        mv: Applies J: (N, n) -> (N, m).
        rmv: Applies its transpose.
        right: Shape (N, m).
        tolerance: A sample stops where the norm of its `J^T r - shift d` has fallen to this share;
            one number or one a sample, shape (N,).
        max_steps: Bound on the steps.
        shift: Tikhonov's parameter, one number or one a sample, shape (N,).
        miss: A sample stops, too, where the norm of its residual has fallen to this share; as
            the tolerance.
        largest: The largest singular value of J, shape (N,), if an estimate is known.

    Returns:
        Shape (N, n) in the type of `right`, and how it went. Samples whose gradient is down to
        rounding have converged; those with a product that is not finite have not.

    Reference:
        Hestenes and Stiefel (1952); Bjorck, Numerical Methods for Least Squares Problems, 7.4.1.
    """
    eps = torch.finfo(right.dtype).eps
    unit = right.abs().amax(1, keepdim=True)  # so that no square leaves the range of the type
    unit = torch.where(unit > 0, unit, 1)
    right = right / unit
    shift = torch.as_tensor(shift, dtype=right.dtype, device=right.device).expand(len(right))
    # What is left of J^T r below this is rounding; a direction made of it leads anywhere.
    noise = (_NOISE * eps) ** 2
    if largest is None:
        start = unstructured(right)
        scale = _squares(rmv(start)) / _squares(start)
    else:
        scale = largest.square()
    # That is of J^T J: the largest ratio met so far.
    residual, gradient = right, rmv(right)
    first = size = _squares(gradient)
    direction = torch.where(size.isfinite()[:, None], gradient, 0)
    solution = torch.zeros_like(gradient)
    least = miss**2 * _squares(right)
    steps = torch.zeros(len(right), dtype=torch.long, device=right.device)

    def is_open() -> Tensor:
        left = _squares(residual) + shift * _squares(solution)
        return (size > tolerance**2 * first) & (left > least) & (size > noise * scale * left)

    for _ in range(max_steps):
        active = is_open()
        if not bool(active.any()):  # synchronises
            break
        image = mv(direction)
        length = _squares(direction)
        curvature = _squares(image) + shift * length
        scale = scale.maximum(torch.where(active, curvature / length, 0))
        active &= curvature > 0
        ratio = torch.where(active, size / torch.where(active, curvature, 1), 0)[:, None]
        solution = solution + ratio * direction
        residual = residual - ratio * image
        gradient = rmv(residual) - shift[:, None] * solution
        before, size = size, torch.where(active, _squares(gradient), size)
        ratio = torch.where(active, size / torch.where(active, before, 1), 0)[:, None]
        direction = torch.where(active[:, None], gradient + ratio * direction, direction)
        steps += active
    left = torch.where(first > 0, size / torch.where(first > 0, first, 1), 0).sqrt()
    # Of a product that is not finite, no step is known.
    finite = (size + _squares(residual) + shift + scale).isfinite()
    return solution * unit, Convergence(torch.where(finite, left, 1), steps, ~is_open() & finite)


def damped_cgls(
    mv: Map, rmv: Map, right: Tensor, *, damping: float, tolerance: float, max_steps: int
) -> tuple[Tensor, Convergence]:
    """Return what `cgls` does, the shift relative to the largest singular value of a sample.

    Args:
        mv: See `cgls`, as all that follows.
        rmv: The transpose.
        right: Shape (N, m).
        damping: Tikhonov's parameter relative to the square of `largest_singular_value_of_each`.
        tolerance: Of the residual of the normal equations.
        max_steps: Bound on the steps.
    """
    largest = largest_singular_value_of_each(mv, rmv, right) if damping else None
    shift = 0.0 if largest is None else damping * largest.square()
    return cgls(
        mv, rmv, right, tolerance=tolerance, max_steps=max_steps, shift=shift, largest=largest
    )


def largest_singular_value_of_each(mv: Map, rmv: Map, like: Tensor) -> Tensor:
    """Return an estimate from below of the largest singular value of every sample.

    Args:
        mv: Applies J: (N, n) -> (N, m).
        rmv: Applies its transpose.
        like: Gives the shape (N, m), the type and the device.

    Returns:
        Shape (N,).
    """
    return largest_singular_values(mv, rmv, rmv(unstructured(like)), _LANCZOS_STEPS)


def _squares(vectors: Tensor) -> Tensor:
    return vectors.square().sum(1)
