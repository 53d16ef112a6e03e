"""Ops that move entries or leave them alone: their inverses are exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frfx import vocabulary
from frfx.ops import Op
from frfx.registry import register_rule
from frfx.rules.base import Inversion, Rule, one_input


class PassThrough(Inversion):
    """`x* = y*`."""

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        return target


_RANDOM = (vocabulary.dropout, vocabulary.stochastic_depth)
"""Op types that are the identity in evaluation mode."""


@register_rule(vocabulary.identity)
@register_rule(vocabulary.dropout)
@register_rule(vocabulary.stochastic_depth)
@dataclass(frozen=True)
class IdentityRule(Rule):
    """`x* = y*`, for identity, and for dropout and stochastic depth in evaluation mode."""

    equation = "exact"

    def supports(self, op: Op) -> str | None:
        if op.type in _RANDOM and op.module is None and op.arguments["training"]:
            return "it drops at random in evaluation mode, too: pass training=self.training"
        return one_input(op)

    def build(self, op: Op) -> Inversion:
        return PassThrough()


class Reshape(Inversion):
    """`y*` in the shape of the input."""

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        return target.reshape(inputs[0].shape)


@register_rule(vocabulary.reshape)
@dataclass(frozen=True)
class ReshapeRule(Rule):
    """Flatten, reshape, view, squeeze and unsqueeze: the same entries in the input's shape."""

    equation = "exact"

    def supports(self, op: Op) -> str | None:
        if any(isinstance(value, torch.dtype) for value in op.arguments.get("shape", ())):
            return "it reinterprets the bits as another dtype"
        return one_input(op)

    def build(self, op: Op) -> Inversion:
        return Reshape()


class Permute(Inversion):
    """`y*` with its dimensions put back.

    Args:
        dims: The permutation that the op makes.
    """

    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        count = len(dims)
        self.dims = tuple(sorted(range(count), key=lambda d: dims[d] % count))

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        return target.permute(self.dims)


@register_rule(vocabulary.permute)
@dataclass(frozen=True)
class PermuteRule(Rule):
    """Permutation of dimensions."""

    equation = "exact"

    def supports(self, op: Op) -> str | None:
        return one_input(op, "dims")

    def build(self, op: Op) -> Inversion:
        return Permute(tuple(_flat(op.arguments["dims"])))


def _flat(dims: Any) -> list[int]:
    """Return the dimensions of `permute(0, 2, 1)` and `permute((0, 2, 1))` alike."""
    return [d for dim in dims for d in _flat(dim)] if isinstance(dims, (tuple, list)) else [dims]


class Transpose(Inversion):
    """`y*` with the two dimensions exchanged again."""

    def __init__(self, dim0: int, dim1: int) -> None:
        super().__init__()
        self.dims = (dim0, dim1)

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        return target.transpose(*self.dims)


@register_rule(vocabulary.transpose)
@dataclass(frozen=True)
class TransposeRule(Rule):
    """Exchange of two dimensions."""

    equation = "exact"

    def supports(self, op: Op) -> str | None:
        return one_input(op, "dim0", "dim1")

    def build(self, op: Op) -> Inversion:
        return Transpose(op.arguments["dim0"], op.arguments["dim1"])
