"""Least squares without a matrix: conjugate gradients on two products, for every sample."""

from __future__ import annotations

import torch
from torch import Tensor

from frfx.linalg.bidiagonal import (
    Bidiagonal,
    bidiagonalise,
    largest_singular_values,
    unstructured,
)
from frfx.linalg.conjugate_gradients import Convergence
from frfx.linalg.linear_function import Map

_NOISE = 100.0
"""How many units of rounding of `||J|| ||r||` the computed `J^T r` may be off."""

_KNOWN_STEPS = 4
"""Steps of a bidiagonalisation: what the residual sees of the largest singular value of a block is
then within a tenth of it."""


def cgls(
    mv: Map,
    rmv: Map,
    right: Tensor,
    *,
    tolerance: Tensor | float,
    max_steps: int,
    shift: Tensor | float = 0.0,
    miss: Tensor | float = 0.0,
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

    Returns:
        Shape (N, n) in the type of `right`, and how it went. Samples whose gradient is down to
        rounding have converged; those with a product that is not finite have not.

    Reference:
        Hestenes and Stiefel (1952); Bjorck, Numerical Methods for Least Squares Problems, 7.4.1.
    """
    unit = _unit(right)
    right = right / unit
    start = unstructured(right)
    largest = _squares(rmv(start)) / _squares(start)
    iteration = _Iteration(right, rmv(right), largest, shift, tolerance, miss)
    iteration.run(mv, rmv, max_steps)
    return iteration.solution * unit, iteration.convergence()


def damped_cgls(
    mv: Map, rmv: Map, right: Tensor, *, damping: float, tolerance: float, max_steps: int
) -> tuple[Tensor, Convergence]:
    """Return what `cgls` does, the shift relative to the largest singular value of a sample.

    How large that is, and the first steps, are read off one bidiagonalisation of J: whatever the
    shift, they stay among the vectors that it makes.

    Args:
        mv: See `cgls`, as all that follows.
        rmv: The transpose.
        right: Shape (N, m).
        damping: Tikhonov's parameter relative to the square of the largest singular value, as
            `bidiagonalise` from `right` on and the power method from elsewhere estimate it.
        tolerance: Of the residual of the normal equations.
        max_steps: Bound on the steps.

    Reference:
        Paige and Saunders (1982), LSQR, 2 and 3.
    """
    if not damping:
        return cgls(mv, rmv, right, tolerance=tolerance, max_steps=max_steps)
    unit = _unit(right)
    known = bidiagonalise(mv, rmv, right / unit, _KNOWN_STEPS)
    # What the right-hand side does not see at all would make the damping jump, once it does.
    largest = known.largest().maximum(largest_singular_values(mv, rmv, rmv(unstructured(right)), 1))
    scale = torch.where(largest.isfinite() & (largest > 0), largest, 1)[:, None]
    known = known / scale
    # Of J over its largest singular value, so that no square of its products leaves the range.
    iteration = _Iteration(
        known.start, known.rmv(known.start), torch.ones_like(largest), damping, tolerance
    )
    iteration.run(known.mv, known.rmv, min(_KNOWN_STEPS, max_steps))
    iteration.expand(known)
    iteration.run(lambda x: mv(x) / scale, lambda y: rmv(y) / scale, max_steps - _KNOWN_STEPS)
    return iteration.solution * (unit / scale), iteration.convergence()


class _Iteration:
    """The state of conjugate gradients, from no step on.

    Args:
        right: The right-hand sides, shape (N, m).
        gradient: `J^T right`.
        largest: An estimate of the largest eigenvalue of `J^T J`, shape (N,).
        shift: See `cgls`, as all that follows.
        tolerance: One number or one a sample.
        miss: As the tolerance.

    Attributes:
        solution: The solution so far, shape (N, n).
    """

    def __init__(
        self,
        right: Tensor,
        gradient: Tensor,
        largest: Tensor,
        shift: Tensor | float,
        tolerance: Tensor | float,
        miss: Tensor | float = 0.0,
    ) -> None:
        self._shift = torch.as_tensor(shift, dtype=right.dtype, device=right.device)
        self._shift = self._shift.expand(len(right))
        self._largest = largest  # the largest ratio met so far
        self._residual = right
        self._first = self._size = _squares(gradient)
        self._direction = torch.where(self._size.isfinite()[:, None], gradient, 0)
        self.solution = torch.zeros_like(gradient)
        self._least, self._enough = miss**2 * _squares(right), tolerance**2 * self._first
        # What is left of J^T r below this is rounding; a direction made of it leads anywhere.
        self._noise = (_NOISE * torch.finfo(right.dtype).eps) ** 2
        self._steps = torch.zeros(len(right), dtype=torch.long, device=right.device)

    def _is_open(self) -> Tensor:
        left = _squares(self._residual) + self._shift * _squares(self.solution)
        rounding = self._noise * self._largest * left
        return (self._size > self._enough) & (left > self._least) & (self._size > rounding)

    def run(self, mv: Map, rmv: Map, steps: int) -> None:
        """Take so many steps, or fewer where all samples are solved before."""
        for _ in range(steps):
            active = self._is_open()
            if not bool(active.any()):  # synchronises
                break
            image = mv(self._direction)
            length = _squares(self._direction)
            curvature = _squares(image) + self._shift * length
            ratio = torch.where(active, curvature / length, 0)
            self._largest = self._largest.maximum(ratio)
            active &= curvature > 0
            ratio = torch.where(active, self._size / torch.where(active, curvature, 1), 0)[:, None]
            self.solution = self.solution + ratio * self._direction
            self._residual = self._residual - ratio * image
            gradient = rmv(self._residual) - self._shift[:, None] * self.solution
            before = self._size
            self._size = torch.where(active, _squares(gradient), before)
            ratio = torch.where(active, self._size / torch.where(active, before, 1), 0)[:, None]
            following = gradient + ratio * self._direction
            self._direction = torch.where(active[:, None], following, self._direction)
            self._steps += active

    def expand(self, known: Bidiagonal) -> None:
        """Write what is in terms of a bidiagonalisation's vectors as vectors of J."""
        self._residual = known.of_left(self._residual)
        self._direction = known.of_right(self._direction)
        self.solution = known.of_right(self.solution)

    def convergence(self) -> Convergence:
        """Return how it went."""
        first = torch.where(self._first > 0, self._first, 1)
        left = torch.where(self._first > 0, self._size / first, 0).sqrt()
        # Of a product that is not finite, no step is known.
        finite = self._size + _squares(self._residual) + self._shift + self._largest
        finite = finite.isfinite()
        there = ~self._is_open() & finite
        return Convergence(torch.where(finite, left, 1), self._steps, there)


def _unit(right: Tensor) -> Tensor:
    """Return what right-hand sides are divided by, so that no square leaves the type's range."""
    unit = right.abs().amax(1, keepdim=True)
    return torch.where(unit > 0, unit, 1)


def _squares(vectors: Tensor) -> Tensor:
    return vectors.square().sum(1)
