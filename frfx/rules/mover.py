"""Functions that move entries: which entry goes where is read off what they do to numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frfx import vocabulary
from frfx.ops import Op, Shape
from frfx.registry import register_rule
from frfx.rules.base import FactoredInversion, Inversion, Rule, one_input


@dataclass(frozen=True)
class Places:
    """Where the entries of one sample come from.

    Attributes:
        source: Of the output entries that are copies, the input entry, flattened.
        copy: Which output entries these are, flattened; the others are constants.
    """

    source: Tensor
    copy: Tensor

    @property
    def nbytes(self) -> int:
        """The memory of both, in bytes."""
        return self.source.nbytes + self.copy.nbytes


class MoveInversion(FactoredInversion):
    """The inverse of a function that copies every entry once at most, and adds constants.

    Args:
        op: The op that is inverted.
        function: What it does to a batch.
    """

    solver = "moved back"

    def __init__(self, op: Op, function: Callable[[Tensor], Any]) -> None:
        super().__init__(op)
        self.function = function

    def key(self, input_shape: Shape, output_shape: Shape) -> Shape:
        """Return the shape of the input."""
        del output_shape
        return input_shape

    def factorize(self, key: Shape) -> Places:
        """Run the function on the numbers of the entries: what is constant shows no number."""
        count = torch.Size(key).numel()
        numbers = torch.arange(1, count + 1, device=self.like.device).reshape(1, *key)
        moved = self.function(numbers).flatten()
        copy = moved.nonzero()[:, 0]
        return Places(moved[copy] - 1, copy)

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        """Return the target's entries where they come from; what is dropped stays."""
        (x,) = inputs
        places = self.factor(x, output)
        moved = target.flatten(1)[:, places.copy]
        return x.to(target.dtype).flatten(1).index_copy(1, places.source, moved).reshape(x.shape)


@register_rule(vocabulary.patch_merging)
@dataclass(frozen=True)
class PatchMergingRule(Rule):
    """Neighbouring patches as channels: a permutation, once odd sizes are padded by zeros."""

    equation = "Eq. 4"
    accuracy = "exact"
    solvers = ("moved back",)

    def supports(self, op: Op) -> str | None:
        return one_input(op)

    def build(self, op: Op) -> Inversion:
        assert callable(op.spelling)
        return MoveInversion(op, op.spelling)
