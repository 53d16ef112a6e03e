"""The constraint that the output is a given one: `g(a) = y*`, without forming a Jacobian."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from frfx.joint.region import Region

_MET = 1e-3
"""The share of `||y* - g(a^)||` that may be missing where a target counts as reached."""

_ITERATIONS = 100
"""Bound on the iterations of one linear solve; the next linearisation takes up what is left."""

_NOISE = 100.0
"""How many units of rounding of `||J|| ||r||` the computed `J^T r` may be off."""


class OutputConstraint:
    """The output of every sample equals a target.

    Args:
        region: The network from the feature to the output.
        target: `y*`, shape (N, ...).
        output: `g(a^)`, of the same shape.
    """

    def __init__(self, region: Region, target: Tensor, output: Tensor) -> None:
        self.region, self.target = region, target
        gap = (target - output).flatten(1).norm(dim=1)
        rounding = 16 * torch.finfo(output.dtype).eps * output.flatten(1).norm(dim=1)
        self.slack = (_MET * gap).maximum(rounding)

    def judge(self, output: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return how far the outputs (L, ...) of some samples are off, and whether that counts."""
        violation = (self.target[rows] - output).flatten(1).norm(dim=1)
        return violation, violation <= self.slack[rows]

    def linearise(self, feature: Tensor, rows: Tensor) -> OutputPoint:
        """Return the constraint at the features (L, ...) of some samples."""
        # The fused kernels of attention have no second derivative, which `Jacobian.mv` takes.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            leaf = feature.detach().requires_grad_()
            output = self.region(leaf, rows)
        residual = (self.target[rows] - output.detach()).flatten(1)
        return OutputPoint(Jacobian(leaf, output), residual, self.slack[rows])


class OutputPoint:
    """The constraint at one feature a sample.

    Attributes:
        violation: `||g(a) - y*||`, shape (L,); infinite where it is not a number.
        reached: Whether that is within the slack, shape (L,).
    """

    def __init__(self, jacobian: Jacobian, residual: Tensor, slack: Tensor) -> None:
        self._jacobian, self._residual = jacobian, residual
        self.violation = residual.norm(dim=1).nan_to_num(nan=torch.inf)
        self.reached = self.violation <= slack

    def correct(
        self, offset: Tensor, weight: Tensor, cut: Tensor, behind: Tensor, use_cut: Tensor
    ) -> Tensor:
        """Return the least correction d with which `weight * offset + d` meets the linearisation.

        Args:
            offset: From here to the forward feature, shape (L, n).
            weight: How much of it is gone back, shape (L,).
            cut, behind, use_cut: Not used: the target is a point.
        """
        del cut, behind, use_cut
        # What is missing of a target that counts as reached may cost far more than it is.
        finite = self.violation.isfinite()[:, None]
        residual = torch.where(finite & ~self.reached[:, None], self._residual, 0)
        residual = residual - self._jacobian.mv(weight[:, None] * offset)
        return least_squares(
            self._jacobian.mv, self._jacobian.rmv, torch.where(finite, residual, 0)
        )


class Jacobian:
    """The Jacobian of an output with respect to a feature, sample by sample, as two products.

    Args:
        leaf: The feature (L, ...), which `output` was computed from.
        output: Shape (L, ...).
    """

    def __init__(self, leaf: Tensor, output: Tensor) -> None:
        self._leaf, self._output = leaf, output
        with torch.enable_grad():
            # J^T u is linear in u: its derivative, transposed, is J, at the price of a backward.
            self._probe = torch.zeros_like(output, requires_grad=True)
            (self._pulled,) = torch.autograd.grad(output, leaf, self._probe, create_graph=True)

    def mv(self, tangent: Tensor) -> Tensor:
        """Apply the Jacobian: (L, n) -> (L, m)."""
        tangent = tangent.reshape(self._leaf.shape)
        (product,) = torch.autograd.grad(self._pulled, self._probe, tangent, retain_graph=True)
        return product.flatten(1)

    def rmv(self, cotangent: Tensor) -> Tensor:
        """Apply the transpose: (L, m) -> (L, n)."""
        cotangent = cotangent.reshape(self._output.shape)
        (product,) = torch.autograd.grad(self._output, self._leaf, cotangent, retain_graph=True)
        return product.flatten(1)


def least_squares(
    mv: Callable[[Tensor], Tensor], rmv: Callable[[Tensor], Tensor], right: Tensor
) -> Tensor:
    """Return the least-norm minimiser of `||J d - right||`, for every sample.

    Conjugate gradients on `J^T J d = J^T right` from 0 (CGLS): for a consistent system the iterates
    span what those of `J J^T u = right`, `d = J^T u` do, and it converges for the others, too.

    Args:
        mv: Applies J: (L, n) -> (L, m).
        rmv: Applies its transpose.
        right: Shape (L, m).

    Returns:
        Shape (L, n), in the type of `right`.

    Reference:
        Hestenes and Stiefel (1952); Bjorck, Numerical Methods for Least Squares Problems, 7.4.1.
    """
    tolerance = 0.1 * torch.finfo(right.dtype).eps ** 0.5
    # What is left of J^T r below this is rounding; a direction made of it leads anywhere.
    probe = torch.arange(1, right.shape[1] + 1, device=right.device, dtype=right.dtype)
    probe = torch.cos(1.618 * probe.square()).expand_as(right)
    noise = (_NOISE * torch.finfo(right.dtype).eps) ** 2
    scale = _squares(rmv(probe)) / _squares(probe)  # of J^T J: the largest ratio met so far
    residual, gradient = right, rmv(right)
    direction, solution = gradient, torch.zeros_like(gradient)
    size = _squares(gradient)
    goal = tolerance**2 * size
    least = tolerance**2 * _squares(right)
    for _ in range(min(_ITERATIONS, 2 * min(right.shape[1], gradient.shape[1]) + 2)):
        left = _squares(residual)
        active = (size > goal) & (left > least) & (size > noise * scale * left)
        if not bool(active.any()):  # synchronises
            break
        image = mv(direction)
        curvature = _squares(image)
        scale = scale.maximum(torch.where(active, curvature / _squares(direction), 0))
        active &= curvature > 0
        length = torch.where(active, size / torch.where(active, curvature, 1), 0)[:, None]
        solution = solution + length * direction
        residual = residual - length * image
        gradient = rmv(residual)
        before, size = size, torch.where(active, _squares(gradient), size)
        ratio = torch.where(active, size / torch.where(active, before, 1), 0)[:, None]
        direction = torch.where(active[:, None], gradient + ratio * direction, direction)
    return solution


def _squares(vectors: Tensor) -> Tensor:
    return vectors.square().sum(1)
