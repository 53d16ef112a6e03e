"""The constraint that the output is a given one: `g(a) = y*`, without forming a Jacobian."""

from __future__ import annotations

import torch
from torch import Tensor

from frfx.joint.region import Region
from frfx.joint.sqp import Subproblem
from frfx.linalg.cgls import cgls
from frfx.linalg.jacobian import Jacobian

_MET = 1e-3
"""The share of `||y* - g(a^)||` that may be missing where a target counts as reached."""


class OutputConstraint:
    """The output of every sample equals a target.

    Args:
        region: The network from the feature to the output.
        target: `y*`, shape (N, ...).
        output: `g(a^)`, of the same shape.
        iterations: Bound on those of one linear solve; the next linearisation takes up what is
            left.
    """

    def __init__(self, region: Region, target: Tensor, output: Tensor, iterations: int) -> None:
        self.region, self.target, self.iterations = region, target, iterations
        gap = (target - output).flatten(1).norm(dim=1)
        rounding = 16 * torch.finfo(output.dtype).eps * output.flatten(1).norm(dim=1)
        self.slack = (_MET * gap).maximum(rounding)

    def judge(self, output: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return how far the outputs (L, ...) of some samples are off, and whether that counts."""
        violation = (self.target[rows] - output).flatten(1).norm(dim=1)
        return violation, violation <= self.slack[rows]

    def linearise(self, feature: Tensor, rows: Tensor) -> OutputPoint:
        """Return the constraint at the features (L, ...) of some samples."""
        jacobian = Jacobian(lambda value: self.region(value, rows), feature)
        residual = (self.target[rows] - jacobian.output).flatten(1)
        return OutputPoint(jacobian, residual, self.slack[rows], self.iterations)


class OutputPoint:
    """The constraint at one feature a sample.

    Attributes:
        violation: `||g(a) - y*||`, shape (L,); infinite where it is not a number.
        reached: Whether that is within the slack, shape (L,).
    """

    def __init__(
        self, jacobian: Jacobian, residual: Tensor, slack: Tensor, iterations: int
    ) -> None:
        self._jacobian, self._residual, self._iterations = jacobian, residual, iterations
        self.violation = residual.norm(dim=1).nan_to_num(nan=torch.inf)
        self.reached = self.violation <= slack

    def correct(self, asked: Subproblem) -> Tensor:
        """Return the least step to the target, which is a point: no cut tells more."""
        # What is missing of a target that counts as reached may cost far more than it is.
        finite = (asked.wanted & self.violation.isfinite())[:, None]
        residual = torch.where(finite & ~self.reached[:, None], self._residual, 0)
        residual = residual - self._jacobian.mv(asked.weight[:, None] * asked.offset)
        tolerance = 0.1 * torch.finfo(residual.dtype).eps ** 0.5
        solution, _ = cgls(
            self._jacobian.mv,
            self._jacobian.rmv,
            torch.where(finite, residual, 0),
            tolerance=tolerance,
            miss=tolerance,
            max_steps=min(self._iterations, 2 * min(asked.offset.shape[1], residual.shape[1]) + 2),
        )
        return solution
