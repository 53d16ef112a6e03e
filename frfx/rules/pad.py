"""Padding and cropping: constant, reflecting, replicating, circular."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from frfx import vocabulary
from frfx.linalg import Dense
from frfx.ops import Op
from frfx.registry import register_rule
from frfx.rules.base import AffineRule, Inversion, one_input
from frfx.rules.separable import Dimension, SeparableInversion, equal_singular_values


def _margins(op: Op) -> tuple[int, ...]:
    """Return what is added before and after, the last dimension first."""
    return tuple(op.arguments["pad" if "pad" in op.arguments else "padding"])


class ConstantPadInversion(Inversion):
    """Every entry takes the deviation of its copy, times a factor; what is cropped off stays.

    Args:
        margins: What the op adds before and after, the last dimension first.
        factor: What the deviation is multiplied by.
    """

    def __init__(self, margins: tuple[int, ...], factor: float) -> None:
        super().__init__()
        self.back = [-margin for margin in margins]
        self.factor = factor

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        return x + F.pad(self.factor * (target - output), self.back)


class CopyPadInversion(SeparableInversion):
    """Every entry takes the mean of the deviations of its copies, as damping leaves it."""

    def __init__(self, op: Op, solver: Dense) -> None:
        super().__init__(op, len(_margins(op)) // 2, self._copies, solver)
        self.margins, self.mode = _margins(op), op.arguments["mode"]

    def _copies(self, dim: Dimension) -> Tensor:
        last = 2 * (dim.count - 1 - dim.index)
        margins = self.margins[last : last + 2]
        alone = dim.alone()
        return alone.response(F.pad(alone.impulses(), margins, self.mode))


@register_rule(vocabulary.pad)
@dataclass(frozen=True)
class PadRule(AffineRule):
    """`x* = x^ + A+ (y* - y^)`: the mean of what is asked of an entry and of its copies.

    Constants that are added drop out, and entries that are cropped off keep their values.

    The options are those of `AffineRule`.
    """

    equation = "Eq. 4-7"
    accuracy = "exact"
    solvers = ("closed form", "separable")

    def supports(self, op: Op) -> str | None:
        reason = one_input(op, "pad", "padding", "mode")
        if reason is None and op.input_shapes is not None:
            beyond = _margins(op)[2 * len(op.input_shapes[0]) :]
            if any(beyond):
                return "it pads the batch, so its samples are not those of the input"
        return reason

    def build(self, op: Op) -> Inversion:
        if op.arguments["mode"] == "constant":
            factor = equal_singular_values(self.dense)
            return ConstantPadInversion(_margins(op), factor)
        return CopyPadInversion(op, self.dense)
