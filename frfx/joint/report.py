"""What became of every sample of a joint inversion."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Report:
    """How a joint inversion went, sample by sample; prints as a line.

    Attributes:
        reached: Whether the reconstruction meets its target, shape (N,), bool.
        steps: How many times the network was linearised, shape (N,), int64; 0 where the forward
            feature meets the target already.
        deviation: `||a* - a^||`, shape (N,).
        violation: What is missing still, shape (N,): of the margin, in units of the logits, or
            `||g(a*) - y*||` of a float target.
    """

    reached: Tensor
    steps: Tensor
    deviation: Tensor
    violation: Tensor

    def __str__(self) -> str:
        count = len(self.reached)
        steps = self.steps.double()
        return (
            f"{int(self.reached.sum())} of {count} reached, "
            f"{float(steps.mean()):.2g} steps on average and {int(steps.max())} at most, "
            f"mean deviation {float(self.deviation.mean()):.4g}"
        )

    __repr__ = __str__
