"""The constraint that the label wins: `g_y(a) >= g_i(a) + m` for every other class i."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from frfx.joint.dual import nearest_point_multipliers
from frfx.joint.region import Region

_WINDOW = 0.2
"""A class is in the way if it lies below the margin, or above by up to this share of the largest
violation that the sample has had: a step of that size may bring it there."""

_FORGET = 0.3

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
        violation = (-self._surplus(output, rows).amin(1)).clamp(min=0)
        return violation, violation == 0

    def _surplus(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Return by how much the label wins over every other class, beyond the margin."""
        labels = self.labels[rows, None]
        surplus = logits.gather(1, labels) - logits - self.margin
        return surplus.scatter(1, labels, torch.inf)

    def linearise(self, feature: Tensor, rows: Tensor) -> MarginPoint:
        """Return the constraint at the features (L, ...) of some samples."""
        with torch.enable_grad():
            leaf = feature.detach().requires_grad_()
            logits = self.region(leaf, rows)
        values = logits.detach()
        surplus = self._surplus(values, rows)
        violation = (-surplus.amin(1)).clamp(min=0)
        if self.largest is None:
            self.largest = surplus.new_zeros(len(self.labels))
        finite = torch.isfinite(values).all(1)
        largest = torch.where(finite, violation, 0).maximum(_FORGET * self.largest[rows])
        self.largest[rows] = largest
        return MarginPoint(self, leaf, rows, logits, surplus, violation, finite, largest)


class MarginPoint:
    """The constraint at one feature a sample.

    Attributes:
        violation: What is missing of the margin, shape (L,); infinite where it is not a number.
        reached: Whether the label wins by the margin, up to the slack, shape (L,).
    """

    def __init__(
        self,
        constraint: MarginConstraint,
        leaf: Tensor,
        rows: Tensor,
        logits: Tensor,
        surplus: Tensor,
        violation: Tensor,
        finite: Tensor,
        largest: Tensor,
    ) -> None:
        self._constraint, self._leaf, self._rows, self._logits = constraint, leaf, rows, logits
        self.violation = torch.where(finite, violation, torch.inf)
        self.reached = finite & (violation <= constraint.slack)
        # The set is chosen anew at every step: what a step brings into the way is seen at the next.
        self._surplus, self._rivals = surplus.topk(
            min(constraint.classes, max(1, surplus.shape[1] - 1)), largest=False
        )
        window = (_WINDOW * largest).clamp(min=constraint.margin)
        self._in_way = self._surplus < window[:, None]
        self._in_way[:, 0] = True
        self._in_way &= finite[:, None]

    def correct(
        self, offset: Tensor, weight: Tensor, cut: Tensor, behind: Tensor, use_cut: Tensor
    ) -> Tensor:
        """Return the least correction d with which `weight * offset + d` meets the linearisation.

        Args:
            offset: From here to the forward feature, shape (L, n).
            weight: How much of it is gone back, shape (L,).
            cut: The correction before this one, shape (L, n).
            behind: The step may not fall back behind that one: its product with the cut is this at
                least, shape (L,).
            use_cut: Where that is asked for, shape (L,), bool.
        """
        with torch.enable_grad():
            gap = self._gap(self._logits, self._rows, self._rivals[:, 0])
            (first,) = torch.autograd.grad(gap.sum(), self._leaf)
        first = first.flatten(1)
        correction = torch.zeros_like(first)
        for part in self._parts(first.shape[1]):
            others = self._other_rows(part)
            for chosen, width in self._groups(part):
                group = part[chosen]
                in_way = self._in_way[group, :width]
                matrix = first.new_zeros(len(group), width + 1, first.shape[1]).double()
                matrix[:, 0] = first[group]
                entry, place = in_way[:, 1:].nonzero(as_tuple=True)
                matrix[entry, place + 1] = others.of(chosen).double()
                matrix[:, width] = cut[group]
                back = (weight[group, None] * offset[group]).double()
                surplus = self._surplus[group, :width]
                # What is missing within the slack may cost far more to win back than it is.
                surplus = torch.where(self.reached[group, None], surplus.clamp(min=0), surplus)
                bound = torch.cat([-surplus, behind[group, None]], 1).double()
                bound = bound - (matrix @ back[..., None])[..., 0]
                active = torch.cat([in_way, use_cut[group, None]], 1)
                multipliers = nearest_point_multipliers(matrix @ matrix.mT, bound, active)
                found = (matrix.mT @ multipliers[..., None])[..., 0]
                correction[group] = found.to(correction.dtype)
        return correction

    def _parts(self, size: int) -> Iterator[Tensor]:
        """Yield samples whose rows fit into memory together; those with no class in the way never.

        Those are the samples that are not numbers.
        """
        count = self._in_way.sum(1)
        index = count.nonzero()[:, 0]
        widest = int(count.max()) + 1 if len(count) else 1
        yield from (p for p in index.split(max(1, _ROW_MEMORY // (widest * size))) if len(p))

    def _groups(self, part: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Yield which samples of a part have about as many classes in the way, and how many."""
        count = self._in_way[part].sum(1)
        low, most = 0, int(count.max())
        while low < most:
            high = max(2, 2 * low)
            chosen = ((count > low) & (count <= high)).nonzero()[:, 0]
            if len(chosen):
                yield chosen, min(high, most)
            low = high

    def _other_rows(self, part: Tensor) -> _Rows:
        """Return the rows of all rivals but the first: one sample and class an entry of a batch."""
        entry, place = self._in_way[part, 1:].nonzero(as_tuple=True)
        width = len(self._rows)
        gradients = [self._leaf.new_zeros(0, self._leaf[0].numel())]
        for start in range(0, len(entry), width):
            sample, rank = part[entry[start : start + width]], place[start : start + width] + 1
            rows = self._rows[sample]
            with torch.enable_grad():
                leaf = self._leaf.detach()[sample].requires_grad_()
                logits = self._constraint.region(leaf, rows)
                gap = self._gap(logits, rows, self._rivals[sample, rank])
                (gradient,) = torch.autograd.grad(gap.sum(), leaf)
            gradients.append(gradient.flatten(1))
        return _Rows(entry, torch.cat(gradients))

    def _gap(self, logits: Tensor, rows: Tensor, rivals: Tensor) -> Tensor:
        """Return `g_y - g_i` for one rival a row."""
        labels = self._constraint.labels[rows, None]
        return logits.gather(1, labels) - logits.gather(1, rivals[:, None])


@dataclass(frozen=True)
class _Rows:
    """Rows of the Jacobian, one sample after the other.

    Attributes:
        sample: To which sample of the part a row belongs, ascending.
        gradients: The rows.
    """

    sample: Tensor
    gradients: Tensor

    def of(self, chosen: Tensor) -> Tensor:
        """Return the rows of some samples, given in ascending order."""
        wanted = torch.isin(self.sample, chosen)
        return self.gradients if bool(wanted.all()) else self.gradients[wanted]
