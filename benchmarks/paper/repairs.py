"""Mending a handful of mistakes: which way to train costs the least of everything else?

A user reports some images that the network gets wrong. A module of it is trained until all of them
are right, from their reconstructed features or by backpropagation, with or without other images
beside them. What counts is how many other test images change their class meanwhile.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import frfx
from frfx import data
from paper import statistics
from paper.layout import Grid, spread
from paper.settings import LEARNING_RATE
from paper.study import CHUNK, Study

MARGIN = 1.0
"""By how much the label of a mistake is to win, in units of the logits: between the boundary and
the target lies the room in which training may stop."""


@dataclass(frozen=True)
class Strategy:
    """A way to mend.

    Attributes:
        mistakes: The loss of the images to mend: ``"entropy"``, or the policy of `frfx.invert` that
            reconstructs the feature that they should have.
        others: The loss of training images drawn at every step: ``"entropy"``, ``"hold"`` for the
            distance to their own feature before, or None for no such images.
    """

    mistakes: str
    others: str | None

    @property
    def local(self) -> bool:
        """Whether nothing is propagated back through the frozen tail."""
        return self.mistakes != "entropy" and self.others != "entropy"


STRATEGIES = {
    "BP": Strategy("entropy", None),
    "BP, with others": Strategy("entropy", "entropy"),
    "BP, others held": Strategy("entropy", "hold"),
    "minimal, others held": Strategy("minimal", "hold"),
    "joint": Strategy("joint", None),
    "joint, others held": Strategy("joint", "hold"),
}


@dataclass(frozen=True)
class Outcome:
    """What mending came to.

    Attributes:
        pair: (l_S, l_R).
        strategy: A key of `STRATEGIES`.
        seed: Of the choice of mistakes.
        steps: How many it took.
        mended: The share of the mistakes that are right in the end.
        changed: The share of the other test images whose class has changed, in %.
        accuracy: By how much the accuracy on them has changed, in points of %.
    """

    pair: tuple[int, int]
    strategy: str
    seed: int
    steps: int
    mended: float
    changed: float
    accuracy: float


class Repair:
    """The mistakes of a baseline, and what its layers read.

    Args:
        study: The baseline and its data.
        pair: (l_S, l_R).
    """

    def __init__(self, study: Study, pair: tuple[int, int]) -> None:
        self.study, self.pair = study, pair
        self.trained, self.tail = study.parts(*pair)
        self.inputs, self.test = study.inputs(pair[0])
        self.held = study.targets(pair[1], "forward")
        self.inverses = {
            policy.__name__: frfx.invert(study.model, pair[1], policy=policy(margin=MARGIN))
            for policy in (frfx.policy.minimal, frfx.policy.joint)
        }
        self.before = self._classes(self.trained)
        self.wrong = (self.before != self.test.labels).nonzero().flatten()

    def _classes(self, trained: nn.Module) -> Tensor:
        """Return the class of every test image."""
        starts = range(0, len(self.test), CHUNK)
        with torch.no_grad():
            chunks = (self.test.rows(slice(start, start + CHUNK)) for start in starts)
            return torch.cat([self.tail(trained(chunk)).argmax(-1) for chunk in chunks])

    def target(self, chosen: Tensor, policy: str) -> Tensor:
        """Return the feature that some test images should have."""
        images = self.study.test
        where = chosen.to(images.images.device)
        x = data.instance_normalise(images.images[where].to(self.study.device))
        return self.inverses[policy](x, self.test.labels[chosen]).detach()

    def mend(self, name: str, seed: int, count: int, most: int, batch: int = 256) -> Outcome:
        """Train a copy of the layers until some mistakes are right.

        Args:
            name: A key of `STRATEGIES`.
            seed: Of the choice of mistakes, and of the other images.
            count: How many mistakes.
            most: How many steps at most.
            batch: How many other images a step.
        """
        strategy = STRATEGIES[name]
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(self.wrong), generator=generator)[:count]
        chosen = self.wrong[drawn.to(self.wrong.device)]
        x, y = self.test.rows(chosen), self.test.labels[chosen]
        trained = copy.deepcopy(self.trained).requires_grad_(True)
        optimizer = torch.optim.Adam(trained.parameters(), lr=LEARNING_RATE)
        with torch.no_grad():
            first = trained(x)
        asked = "joint" if strategy.mistakes == "entropy" else strategy.mistakes
        target = self.target(chosen, asked)
        scale = F.mse_loss(first, target)  # of all losses of features: 1 for the mistakes at first
        step = 0
        for step in range(most + 1):
            features = trained(x)
            with torch.set_grad_enabled(not strategy.local):
                logits = self.tail(features)
            right = logits.argmax(-1) == y
            if right.all() or step == most:
                break
            loss = (
                F.cross_entropy(logits, y)
                if strategy.mistakes == "entropy"
                else F.mse_loss(features, target) / scale
            )
            if strategy.others is not None:
                index = torch.randint(len(self.inputs), (batch,), generator=generator)
                loss = loss + self._others(trained, index.to(self.study.device), strategy, scale)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        after = self._classes(trained)
        others = torch.ones_like(after, dtype=torch.bool)
        others[chosen] = False
        labels = self.test.labels[others]
        return Outcome(
            self.pair,
            name,
            seed,
            step,
            float(right.double().mean()),
            100 * float((after != self.before)[others].double().mean()),
            100
            * float(
                (after[others] == labels).double().mean()
                - (self.before[others] == labels).double().mean()
            ),
        )

    def _others(
        self, trained: nn.Module, index: Tensor, strategy: Strategy, scale: Tensor
    ) -> Tensor:
        features = trained(self.inputs.rows(index))
        if strategy.others == "hold":
            return F.mse_loss(features, self.held[index]) / scale
        return F.cross_entropy(self.tail(features), self.inputs.labels[index])


def table(outcomes: Sequence[Outcome]) -> Grid:
    """Return means and standard deviations, and how changes compare with `BP, others held`."""
    header = (
        *("(l_S, l_R)", "strategy", "handfuls", "mended, %", "steps"),
        *("other classes changed, %", "accuracy on others, points", "changed − BP, others held"),
        "p (t)",
    )
    rows = []
    for pair in dict.fromkeys(outcome.pair for outcome in outcomes):
        here = [outcome for outcome in outcomes if outcome.pair == pair]
        by_name = {name: [o for o in here if o.strategy == name] for name in STRATEGIES}
        control = {o.seed: o.changed for o in by_name["BP, others held"]}
        for name, found in by_name.items():
            compared = None
            if name != "BP, others held":
                compared = statistics.paired(
                    [o.changed for o in found], [control[o.seed] for o in found]
                )
            rows.append(
                (
                    f"({pair[0]}, {pair[1]})",
                    name,
                    str(len(found)),
                    f"{100 * statistics.mean_and_deviation([o.mended for o in found])[0]:.1f}",
                    f"{statistics.mean_and_deviation([o.steps for o in found])[0]:.1f}",
                    spread([o.changed for o in found]),
                    spread([o.accuracy for o in found]),
                    "" if compared is None else f"{compared.mean:+.3f}",
                    "" if compared is None else f"{compared.t:.3f}",
                )
            )
    return Grid(header, tuple(rows))
