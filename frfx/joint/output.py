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

_FORCING = 0.03
"""The share of what is missing that a step may leave of many numbers, at most: how exact a solution
is worth its price, the next linearisation tells. Few are solved for in as many iterations at most,
exactly."""

_DECREASE = 1e-4
"""The share of the decrease that the slope promises that must be there (Armijo)."""

_SHORTENED = 10
"""How often a step is shortened, at most: to a half, or less where a parabola has its least."""


class OutputConstraint:
    """The output of every sample equals a target.

    Args:
        region: The network from the feature to the output.
        target: `y*`, shape (N, ...).
        output: `g(a^)`, of the same shape.
        iterations: Bound on those of one linear solve; the next linearisation takes up what is
            left.

    Attributes:
        forcing: The share of what is missing that the next step may leave, shape (N,): by which
            the last one was off what it had promised.
        poor: Whether that was more than a step may leave, shape (N,).

    Reference:
        Eisenstat and Walker (1996), Choosing the forcing terms in an inexact Newton method.
    """

    def __init__(self, region: Region, target: Tensor, output: Tensor, iterations: int) -> None:
        self.region, self.target, self.iterations = region, target, iterations
        missing = (target - output).flatten(1)
        rounding = 16 * torch.finfo(output.dtype).eps * output.flatten(1).norm(dim=1)
        slack = (_MET * missing.norm(dim=1)).maximum(rounding)
        self.slack = torch.where(slack.isfinite(), slack, 0)
        self.forcing = torch.full_like(self.slack, _FORCING)
        self.poor = torch.zeros_like(self.slack, dtype=torch.bool)
        self._promised = missing
        self._began = torch.full_like(self.slack, torch.inf)

    def judge(self, output: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return how far the outputs (L, ...) of some samples are off, and whether that counts."""
        violation = (self.target[rows] - output).flatten(1).norm(dim=1)
        return violation, violation <= self.slack[rows]

    def linearise(self, feature: Tensor, rows: Tensor) -> OutputPoint:
        """Return the constraint at the features (L, ...) of some samples."""
        point = OutputPoint(self, feature, rows)
        off = (point.residual - self._promised[rows]).norm(dim=1) / self._began[rows]
        known = self._began[rows].isfinite()
        self.forcing[rows] = torch.where(known, off.clamp(max=_FORCING), _FORCING)
        self.poor[rows] = known & ~(off < _FORCING)
        return point

    def expect(self, rows: Tensor, missing: Tensor, promised: Tensor) -> None:
        """Note how much some samples miss, (L,), and what they will by their linearisation, (L, m).

        Args:
            rows: The samples.
            missing: Infinite where that is not to be compared.
            promised: What they will miss.
        """
        self._promised[rows], self._began[rows] = promised, missing


class OutputPoint:
    """The constraint at one feature a sample.

    Attributes:
        residual: `y* - g(a)`, shape (L, m).
        violation: Its norm, shape (L,); infinite where it is not a number.
        reached: Whether that is within the slack, shape (L,).
    """

    def __init__(self, constraint: OutputConstraint, feature: Tensor, rows: Tensor) -> None:
        self._constraint, self._feature, self._rows = constraint, feature, rows
        self._jacobian = Jacobian(lambda value: constraint.region(value, rows), feature)
        self.residual = (constraint.target[rows] - self._jacobian.output).flatten(1)
        self.violation = self.residual.norm(dim=1).nan_to_num(nan=torch.inf)
        self.reached = self.violation <= constraint.slack[rows]

    def correct(self, asked: Subproblem) -> Tensor:
        """Return the least step to the target, which is a point: no cut tells more."""
        # What is missing of a target that counts as reached may cost far more than it is.
        finite = (asked.wanted & self.violation.isfinite())[:, None]
        missing = torch.where(finite & ~self.reached[:, None], self.residual, 0)
        missing = missing - self._jacobian.mv(asked.weight[:, None] * asked.offset)
        missing = torch.where(finite, missing, 0)
        constraint, rows = self._constraint, self._rows
        steps = 2 * min(asked.offset.shape[1], missing.shape[1]) + 2
        tolerance: Tensor | float = 0.1 * torch.finfo(missing.dtype).eps ** 0.5
        if steps > constraint.iterations:
            goal, forcing = _FORCING * constraint.slack[rows], constraint.forcing[rows]
            # As exact as brings it there in the steps that are left, unless these are worth little.
            enough = (goal / self.violation) ** (1 / asked.left)
            forcing = torch.where(constraint.poor[rows], forcing, forcing.minimum(enough))
            left = torch.where(self.reached, goal, forcing * self.violation)
            share = (left / missing.norm(dim=1)).nan_to_num(nan=_FORCING)
            tolerance = share.clamp(tolerance, _FORCING)
        solution, _ = cgls(
            self._jacobian.mv,
            self._jacobian.rmv,
            missing,
            tolerance=tolerance,
            miss=tolerance,
            max_steps=min(constraint.iterations, steps),
        )
        return solution

    def share(self, step: Tensor, most: Tensor, allowed: Tensor) -> Tensor:
        """Return how much of a step is gone, so that less is missing, or no more than allowed."""
        constraint, rows, size = self._constraint, self._rows, self._feature.shape[1:]
        image = self._jacobian.mv(step)
        slope = -torch.linalg.vecdot(self.residual, image)  # of half the squared violation
        share = torch.where(self.reached | (slope < 0) | (allowed > 0), most, 0)
        index = (~self.reached & (share > 0)).nonzero()[:, 0]
        for _ in range(_SHORTENED):
            if len(index) == 0:  # synchronises
                break
            gone = share[index]
            at = self._feature.flatten(1)[index] + gone[:, None] * step[index]
            output = constraint.region(at.unflatten(1, size), rows[index])
            violation, reached = constraint.judge(output, rows[index])
            first = 2 * gone * slope[index]
            more = violation.square() - self.violation[index].square()
            gains = more <= _DECREASE * first.clamp(max=0)
            fits = reached | gains | (violation <= allowed[index]) & violation.isfinite()
            least = (-0.5 * first * gone / (more - first)).nan_to_num(nan=0)
            shorter = least.maximum(0.1 * gone).minimum(0.5 * gone)
            share[index] = torch.where(fits, gone, shorter)
            index = index[~fits]
        share[index] = 0
        began = torch.where(share > 0, self.violation, torch.inf)  # nothing is told of no step
        constraint.expect(rows, began, self.residual - share[:, None] * image)
        return share
