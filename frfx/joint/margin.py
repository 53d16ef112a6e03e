"""The constraint that the label wins: `g_y(a) >= g_i(a) + m` for every other class i."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from frfx.joint.dual import nearest_point_multipliers
from frfx.joint.region import Region
from frfx.joint.sqp import Subproblem

_WINDOW = 0.2
"""A class is in the way if it lies below the margin, or above by up to this share of the largest
violation that the sample has had: a step of that size may bring it there."""

_FORGET = 0.3

_FIRST = 0.5
"""The first step has rows for the classes that miss by this share of the largest violation, at
least: it comes from so far away that the next looks anew at all others."""

_FEW = 128
"""Fewer samples than that are solved for together with those that have more classes in the way."""

_NORMAL = (1e-30, 1e30)
"""Squared norms of rows that every type holds without a loss."""

_ROW_MEMORY = 1 << 27
"""How many numbers the rows of the samples that are solved for together may hold."""


class MarginConstraint:
    """The label of every sample wins by a margin.

    Args:
        region: The network from the feature to the logits (N, K).
        labels: Shape (N,).
        margin: By how much the label must exceed every other logit.
        slack: What may be missing of the margin where it counts as reached.
        classes: How many other classes are linearised at most, those most in the way.
    """

    def __init__(
        self, region: Region, labels: Tensor, margin: float, slack: float, classes: int
    ) -> None:
        self.region, self.labels, self.margin, self.slack = region, labels.long(), margin, slack
        self.classes = classes
        self.largest: Tensor | None = None

    def judge(self, output: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the logits (L, K) of some samples miss, and whether that is nothing."""
        violation = (-self.surplus(output, rows).amin(1)).clamp(min=0)
        return violation, violation == 0

    def surplus(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Return by how much the label wins over every other class, beyond the margin."""
        labels = self.labels[rows, None]
        surplus = logits.gather(1, labels) - self.margin - logits
        return surplus.scatter_(1, labels, torch.inf)

    def linearise(self, feature: Tensor, rows: Tensor) -> MarginPoint:
        """Return the constraint at the features (L, ...) of some samples."""
        return MarginPoint(self, feature, rows)

    def window(self, violation: Tensor, rows: Tensor) -> Tensor:
        """Return below which surplus a class is in the way of some samples, shape (L, 1)."""
        if self.largest is None:
            self.largest = violation.new_zeros(len(self.labels))
        largest = violation.maximum(_FORGET * self.largest[rows])
        self.largest[rows] = largest
        return (_WINDOW * largest).clamp(min=self.margin)[:, None]

    def slopes(self, feature: Tensor, logits: Tensor, rows: Tensor, rivals: Tensor) -> Tensor:
        """Return the gradients of `g_y - g_i` for one rival i a sample, shape (L, n)."""
        side = torch.zeros_like(logits).scatter_(1, self.labels[rows, None], 1)
        side.scatter_add_(1, rivals[:, None], side.new_full((len(rows), 1), -1))
        (slopes,) = torch.autograd.grad(logits, feature, side)
        return slopes.flatten(1)


class MarginPoint:
    """The constraint at one feature a sample.

    Attributes:
        violation: What is missing of the margin, shape (L,); infinite where it is not a number.
        reached: Whether the label wins by the margin, up to the slack, shape (L,).
    """

    def __init__(self, constraint: MarginConstraint, feature: Tensor, rows: Tensor) -> None:
        self._constraint, self._rows = constraint, rows
        self._leaf = feature.detach().requires_grad_()
        with torch.enable_grad():
            self._logits = constraint.region(self._leaf, rows)
        logits = self._logits.detach()
        self._all = constraint.surplus(logits, rows)
        violation = (-self._all.amin(1)).clamp(min=0)
        self.violation = torch.where(torch.isfinite(logits).all(1), violation, torch.inf)
        self.reached = self.violation <= constraint.slack

    def _look(self, wanted: Tensor) -> None:
        """Choose the classes that get rows.

        The set is chosen anew at every step: what a step brings into the way is seen at the next.
        """
        constraint, surplus = self._constraint, self._all
        first = constraint.largest is None
        finite = self.violation.isfinite()
        violation = torch.where(finite, self.violation, 0)
        self._surplus, self._rivals = surplus.topk(
            min(constraint.classes, max(1, surplus.shape[1] - 1)), largest=False
        )
        self._in_way = self._surplus < constraint.window(violation, self._rows)
        if first:
            self._in_way &= self._surplus <= _FIRST * self._surplus[:, :1]
        self._in_way[:, 0] = True
        self._in_way &= (finite & wanted)[:, None]
        # What is missing within the slack may cost far more to win back than it is.
        self._surplus = torch.where(
            self.reached[:, None], self._surplus.clamp(min=0), self._surplus
        )

    def correct(self, asked: Subproblem) -> Tensor:
        """Return the nearest point of the half-spaces that rivals, and the cut, leave."""
        offset, weight, use_cut = asked.offset, asked.weight, asked.use_cut
        self._look(asked.wanted)
        first = self._constraint.slopes(self._leaf, self._logits, self._rows, self._rivals[:, 0])
        count = self._in_way.sum(1)
        size = first.square().sum(1)
        alone = (count == 1) & ~use_cut & (size > _NORMAL[0]) & (size < _NORMAL[1])
        # The nearest point of a half-space, for all: it is what it is for those that have but one.
        missing = (-self._surplus[:, 0] - weight * torch.linalg.vecdot(first, offset)).clamp(min=0)
        correction = torch.where(alone[:, None], first * (missing / size)[:, None], 0)
        index = ((count > 0) & ~alone).nonzero()[:, 0]
        index = index[count[index].argsort(stable=True)]
        counts = count[index].tolist()
        for piece in self._pieces(counts, first.shape[1]):
            part, widths = index[piece], counts[piece]
            in_way, surplus = self._in_way[part], self._surplus[part]
            entry, place = in_way[:, 1:].nonzero(as_tuple=True)
            others = self._other_rows(part[entry], place + 1)
            offsets, cuts, rows = offset[part].double(), asked.cut[part], first[part]
            weights, behinds, cutting = (v[part, None] for v in (weight, asked.behind, use_cut))
            corrections = []
            start = 0
            for group, width in _groups(widths):
                length = group.stop - group.start
                stop = start + sum(widths[group]) - length
                matrix = first.new_zeros(length, width + 1, first.shape[1], dtype=torch.float64)
                matrix[:, 0] = rows[group]
                if stop > start:
                    row = entry[start:stop] - group.start
                    matrix[row, place[start:stop] + 1] = others[start:stop].double()
                matrix[:, width] = cuts[group]
                back = torch.bmm(matrix, offsets[group, :, None])[..., 0]
                bound = torch.cat([-surplus[group, :width], behinds[group]], 1)
                bound = torch.addcmul(bound.double(), weights[group], back, value=-1)
                active = torch.cat([in_way[group, :width], cutting[group]], 1)
                gram = torch.bmm(matrix, matrix.mT)
                multipliers = nearest_point_multipliers(gram, bound, active)
                corrections.append(torch.bmm(multipliers[:, None], matrix)[:, 0])
                start = stop
            correction[part] = torch.cat(corrections).to(correction.dtype)
        return correction

    def _pieces(self, counts: list[int], size: int) -> Iterator[slice]:
        """Yield samples whose rows fit into memory together."""
        length = max(1, _ROW_MEMORY // ((max(counts, default=0) + 1) * size))
        yield from (slice(start, start + length) for start in range(0, len(counts), length))

    def _other_rows(self, sample: Tensor, rank: Tensor) -> Tensor:
        """Return the rows of other rivals than the first, one sample and rank each."""
        rows = [self._leaf.new_zeros(0, self._leaf[0].numel())]
        for some, place in zip(
            sample.split(len(self._rows)), rank.split(len(self._rows)), strict=True
        ):
            if len(some) == 0:
                break
            leaf = self._leaf.detach()[some].requires_grad_()
            with torch.enable_grad():
                logits = self._constraint.region(leaf, self._rows[some])
            rivals = self._rivals[some, place]
            rows.append(self._constraint.slopes(leaf, logits, self._rows[some], rivals))
        return torch.cat(rows)


def _groups(counts: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Yield which of some samples have about as many classes in the way, and how many.

    Args:
        counts: How many every sample has, in ascending order.
    """
    start, high = 0, 1
    while start < len(counts):
        stop = bisect_right(counts, high)
        if stop - start >= _FEW or stop == len(counts):
            yield slice(start, stop), counts[stop - 1]
            start = stop
        high *= 2
