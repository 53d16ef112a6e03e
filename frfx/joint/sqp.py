"""Sequential quadratic programming towards the nearest feature that meets a constraint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from frfx.joint.report import Report

_PATIENCE = 2
"""How often a sample that misses its target starts from the forward feature before it is restored:
moved from where it is, by the least step to the target."""

_HOPS = 2
"""How many steps in a row may gain nothing, where steps are searched: beyond a kink it may take
more than one. Then the sample goes back to where it missed least, and every step must gain."""

_GROWTH = 2.0
"""How often what is missing at least such a step may miss."""

_JUMPS = 2
"""How often a sample that no part of a step brings nearer then takes the whole all the same."""

_REACH = (10.0, 1.0)
"""The longest first step, and the longest of the others, in norms of the forward feature: a
linearisation says little of what lies so far away."""

_SHORTER = 0.25
"""How much shorter a reached sample goes back towards `a^` once a whole step has gained nothing."""


@dataclass(frozen=True)
class Subproblem:
    """A step: the least d with which `weight * offset + d` meets the linearised constraint.

    Attributes:
        offset: From here to the forward feature, shape (L, n).
        weight: How much of it is gone back, shape (L,).
        cut: The correction before this one, shape (L, n).
        behind: The step may not fall back behind that one: its product with the cut is this at
            least, shape (L,).
        use_cut: Where that is asked for, shape (L,), bool.
        wanted: For which samples the correction is asked, shape (L,), bool; 0 for the others.
        left: How many steps there are, this one among them.
    """

    offset: Tensor
    weight: Tensor
    cut: Tensor
    behind: Tensor
    use_cut: Tensor
    wanted: Tensor
    left: int


class Point(Protocol):
    """A constraint, linearised at one feature a sample."""

    violation: Tensor
    reached: Tensor

    def correct(self, asked: Subproblem) -> Tensor:
        """Return what solves a subproblem, shape (L, n)."""


@runtime_checkable
class SearchedPoint(Point, Protocol):
    """One from which a step that gains nothing is shortened before it is gone.

    From others it is halved afterwards, if two in a row have gained nothing.
    """

    def share(self, step: Tensor, most: Tensor, allowed: Tensor) -> Tensor:
        """Return how much of the steps (L, n) is gone.

        Args:
            step: The steps.
            most: How much may be, shape (L,).
            allowed: What may be missing afterwards, if not less than now, shape (L,).

        Returns:
            Shape (L,); 0 where no part of a step does.
        """


class Constraint(Protocol):
    """What the output must meet."""

    def judge(self, output: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the outputs (L, ...) of the samples `rows` miss, and whether it is none."""

    def linearise(self, feature: Tensor, rows: Tensor) -> Point:
        """Return the constraint at the features (L, ...) of the samples `rows` (L,)."""


def nearest_feature(
    constraint: Constraint,
    feature: Tensor,
    steps: int,
    tolerance: float,
    output: Tensor | None = None,
) -> tuple[Tensor, Report]:
    """Return the features nearest to the forward ones that meet a constraint.

    Each step solves `min ||a - a^||` under the constraint linearised where the sample is. Where
    that misses the target, the next one may not fall back behind it: the linearisation before stays
    as one more constraint, for max pooling changes its winner under a step and would change it back
    under the next. Where it misses again and again, the sample is restored: it takes the least step
    to the target from where it is, halved where two in a row have made it worse. Where steps are
    searched, they are halved at once, and after some that gained nothing the sample goes back to
    where it missed least. A sample that has reached its target goes on from there to come nearer to
    `a^`, and leaves the batch once a step promises or brings less than the tolerance. The result is
    the nearest feature met on the way, or the one that misses least.

    Args:
        constraint: What is to be met.
        feature: `a^`, shape (N, ...).
        steps: How many linearisations at most.
        tolerance: Relative change of `||a - a^||` that is not worth another step.
        output: `g(a^)`, if it is known: what meets the constraint already then costs nothing.

    Returns:
        `a*`, and what became of every sample.
    """
    shape = feature.shape
    start = feature.detach().flatten(1)
    best = _Best(start)
    rows = torch.arange(len(start), device=start.device)
    if output is not None:
        violation, reached = constraint.judge(output, rows)
        best.update(rows, start, torch.zeros_like(best.distance), violation, reached, 0)
        rows = (~reached).nonzero()[:, 0]
    live = _Live(start[rows], rows)
    size = _norm(start)
    size = torch.where(size > 0, size, torch.inf)
    for count in range(steps + 1):
        if len(live.rows) == 0:  # synchronises, as every choice of samples does
            break
        rows, at = live.rows, live.at
        point = constraint.linearise(at.reshape(-1, *shape[1:]), rows)
        if count == 0:  # the slack is for what a step has missed by, not for what needs none
            point.reached = point.reached & (point.violation <= 0)
        violation, reached = point.violation, point.reached
        searched = isinstance(point, SearchedPoint)
        offset = live.origin - at
        distance = _norm(offset)
        gain = best.update(rows, at, distance, violation, reached, count)
        if count == steps:
            break
        returns = live.lost(point, best.reached[rows]) if searched else torch.zeros_like(reached)
        worse = ~reached & (violation >= live.before) & live.restored & (not searched)
        stalls = worse & live.worse | violation.isinf()
        live.worse = worse
        smooth = (live.misses == 0) & (gain >= 0)
        live.misses = (live.misses + ~stalls) * ~reached
        idle = reached & (gain < tolerance)
        done = idle & (smooth | (live.weight < 1)) | reached & (distance == 0)
        live.weight = torch.where(idle, _SHORTER * live.weight, live.weight)
        restored = ~reached & (live.misses > _PATIENCE)
        weight = torch.where(reached, live.weight, (~restored).to(at.dtype))
        use_cut = live.has_cut & ~reached
        behind = (1 - live.share) * live.slope
        wanted = ~(done | stalls | returns)
        asked = Subproblem(offset, weight, live.cut, behind, use_cut, wanted, steps - count)
        found = point.correct(asked)
        whole = weight == 1
        done |= reached & whole & (distance <= (1 + tolerance) * _norm(found))
        step = torch.addcmul(found, weight[:, None], offset)
        back = bool(stalls.any())  # synchronises
        if back:
            step = torch.where(stalls[:, None], live.step, step)
            found = torch.where(stalls[:, None], live.cut, found)
        length = _norm(step)
        done |= ~reached & ~returns & (length == 0)  # nothing that it could do moves it
        longest = _REACH[min(count, 1)] * size[rows]
        share = (longest / length).clamp(max=1).nan_to_num(nan=1)
        if isinstance(point, SearchedPoint):
            met = best.reached[rows]
            share = live.search(point, step, torch.where(wanted, share, 0), met, wanted & restored)
            done |= live.jumps > _JUMPS
        slope = torch.linalg.vecdot(found, step)
        moved = share
        has_cut = whole | restored
        if back:
            less = live.share * torch.where(violation.isinf(), 0.1, 0.5)
            moved = torch.where(stalls, less - live.share, share)
            share = torch.where(stalls, less, share)
            slope = torch.where(stalls, live.slope, slope)
            violation = torch.where(stalls, live.before, violation)
            restored = torch.where(stalls, live.restored, restored)
            has_cut = torch.where(stalls, live.has_cut, has_cut)
        live.share, live.slope, live.has_cut = share, slope, has_cut
        live.before, live.restored = violation, restored
        live.step, live.cut = step, found
        live.at = torch.addcmul(at, moved[:, None], step)
        if searched:
            live.at = torch.where(returns[:, None], best.at[rows], live.at)
        live.keep(~done)
    report = Report(best.reached, best.steps, best.distance, best.violation)
    return best.at.reshape(shape), report


def _norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1)


class _Best:
    """The nearest feature of every sample that meets the constraint, or the one that misses least.

    Attributes:
        steps: How many linearisations every sample has seen.
    """

    def __init__(self, start: Tensor) -> None:
        count = len(start)
        self._rounding = 64 * torch.finfo(start.dtype).eps  # what moves nothing nearer
        self.at = start.clone()
        self.distance = start.new_zeros(count)
        self.violation = start.new_full((count,), torch.inf)
        self.reached = torch.zeros(count, dtype=torch.bool, device=start.device)
        self.steps = torch.zeros(count, dtype=torch.long, device=start.device)

    def update(
        self,
        rows: Tensor,
        at: Tensor,
        distance: Tensor,
        violation: Tensor,
        reached: Tensor,
        count: int,
    ) -> Tensor:
        """Take over what is better; return by which share reached samples have come nearer."""
        had = self.reached[rows]
        gain = torch.where(had, 1 - distance / self.distance[rows], torch.inf)
        less = ~had & (violation < (1 - self._rounding) * self.violation[rows])
        better = torch.where(reached, ~had | (gain > 0), less)
        index = better.nonzero()[:, 0]
        chosen = rows[index]
        self.at[chosen] = at[index]
        self.distance[chosen] = distance[index]
        self.violation[chosen] = violation[index]
        self.reached[chosen] = reached[index]
        self.steps[rows] = count
        return gain


class _Live:
    """What is known of the samples still under way; every attribute has one entry a sample.

    Attributes:
        origin: The forward feature.
        at: Where the sample is.
        step: The step that has led there, as it was solved for.
        share: How much of it was gone.
        cut: The correction in it, a constraint on the next: that may not fall back behind it.
        slope: The product of the two.
        lowest: The least violation so far.
        hops: How many steps in a row have not fallen below.
        strict: Whether every step must gain.
        jumps: How often a whole step was taken that does not.
    """

    def __init__(self, start: Tensor, rows: Tensor) -> None:
        count, device = len(start), start.device
        self.rows = rows
        self.origin, self.at = start, start
        self.step = self.cut = torch.zeros_like(start)
        self.share = start.new_ones(count)
        self.slope = start.new_zeros(count)
        self.before = start.new_full((count,), torch.inf)
        self.weight = start.new_ones(count)
        self.misses = torch.zeros(count, dtype=torch.long, device=device)
        self.worse = torch.zeros(count, dtype=torch.bool, device=device)
        self.restored = torch.zeros(count, dtype=torch.bool, device=device)
        self.has_cut = torch.zeros(count, dtype=torch.bool, device=device)
        self.lowest = start.new_full((count,), torch.inf)
        self.hops = torch.zeros(count, dtype=torch.long, device=device)
        self.strict = torch.zeros(count, dtype=torch.bool, device=device)
        self.jumps = torch.zeros(count, dtype=torch.long, device=device)

    def lost(self, point: Point, met: Tensor) -> Tensor:
        """Return which samples go back to where they missed least, for good.

        Args:
            point: Where the samples are.
            met: Which have met the constraint before: they may leave it to come nearer.
        """
        self.hops = torch.where((point.violation < self.lowest) | met, 0, self.hops + 1)
        self.lowest = self.lowest.minimum(point.violation)
        lost = ~point.reached & ~self.strict & (self.hops > _HOPS)
        self.strict = self.strict | lost
        return lost

    def search(
        self, point: SearchedPoint, step: Tensor, most: Tensor, met: Tensor, restored: Tensor
    ) -> Tensor:
        """Return how much of a step is gone.

        Args:
            point: Where the samples are.
            step: The steps.
            most: How much of them may be gone; 0 where none is asked for.
            met: Which samples have met the constraint before.
            restored: Which take the least step to the target.
        """
        allowed = torch.where(self.strict, 0, _GROWTH * self.lowest)
        share = point.share(step, most, torch.where(met, torch.inf, allowed))
        stuck = ~point.reached & (share == 0) & (most > 0)
        jumps = stuck & restored
        # The others are restored next.
        self.misses = torch.where(stuck, self.misses.clamp(min=_PATIENCE), self.misses)
        self.jumps = self.jumps + jumps
        self.strict, self.hops = self.strict & ~jumps, torch.where(jumps, 0, self.hops)
        return torch.where(jumps, most, share)

    def keep(self, chosen: Tensor) -> None:
        """Let the other samples leave."""
        index = chosen.nonzero()[:, 0]
        if len(index) < len(chosen):
            for name, value in vars(self).items():
                setattr(self, name, value[index])
