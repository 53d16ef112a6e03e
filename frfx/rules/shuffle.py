"""Ops that exchange channels with pixels, or channels among themselves: exact inverses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from frfx import vocabulary
from frfx.ops import Op
from frfx.registry import register_rule
from frfx.rules.base import Inversion, Rule, one_input


class PixelUnshuffle(Inversion):
    """Pixels back into channels.

    Args:
        factor: By how much each spatial dimension shrinks.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        return F.pixel_unshuffle(target, self.factor)


@register_rule(vocabulary.pixel_shuffle)
@dataclass(frozen=True)
class PixelShuffleRule(Rule):
    """The same entries, as channels again."""

    equation = "Eq. 4"
    accuracy = "exact"

    def supports(self, op: Op) -> str | None:
        return one_input(op, "upscale_factor")

    def build(self, op: Op) -> Inversion:
        return PixelUnshuffle(op.arguments["upscale_factor"])


class PixelShuffle(Inversion):
    """Channels back into pixels.

    Args:
        factor: By how much each spatial dimension grows.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        return F.pixel_shuffle(target, self.factor)


@register_rule(vocabulary.pixel_unshuffle)
@dataclass(frozen=True)
class PixelUnshuffleRule(Rule):
    """The same entries, as pixels again."""

    equation = "Eq. 4"
    accuracy = "exact"

    def supports(self, op: Op) -> str | None:
        return one_input(op, "downscale_factor")

    def build(self, op: Op) -> Inversion:
        return PixelShuffle(op.arguments["downscale_factor"])


class ChannelUnshuffle(Inversion):
    """Channels in their old order: a shuffle by the other divisor of their count.

    Args:
        groups: The groups of the op.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        return target.unflatten(1, (-1, self.groups)).transpose(1, 2).flatten(1, 2)


@register_rule(vocabulary.channel_shuffle)
@dataclass(frozen=True)
class ChannelShuffleRule(Rule):
    """The same entries, in the order that the channels had."""

    equation = "Eq. 4"
    accuracy = "exact"

    def supports(self, op: Op) -> str | None:
        return one_input(op, "groups")

    def build(self, op: Op) -> Inversion:
        return ChannelUnshuffle(op.arguments["groups"])
