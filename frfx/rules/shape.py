"""Ops that move entries or leave them alone: their inverses are exact."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frfx import vocabulary
from frfx.ops import Op
from frfx.registry import register_rule
from frfx.rules.base import Inversion, Rule, keeps_shape, one_input


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

    equation = "Eq. 4"
    accuracy = "exact"
    anywhere = True

    def supports(self, op: Op) -> str | None:
        if op.type in _RANDOM and op.module is None and op.arguments["training"]:
            return "it drops at random in evaluation mode, too: pass training=self.training"
        return one_input(op) or keeps_shape(op)

    def build(self, op: Op) -> Inversion:
        return PassThrough()


class Cast(Inversion):
    """`x* = y*`, but `x^` where that is what the op has rounded."""

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        (x, *_), moved = inputs, target != output
        return torch.where(moved.to(x.device), target.to(x.device), x)


@register_rule(vocabulary.cast)
@dataclass(frozen=True)
class CastRule(Rule):
    """Another floating-point type or device: the target, or what was rounded to it."""

    equation = "Eq. 4"
    accuracy = "exact"

    def supports(self, op: Op) -> str | None:
        values = [v for given in op.arguments.values() for v in _flat(given)]
        if any(isinstance(v, torch.dtype) and not v.is_floating_point for v in values):
            return "it rounds to another kind of number, so nothing can be told from its result"
        return _input_is_free(op)

    def reconstructs(self, op: Op) -> tuple[str, ...]:
        return ("input",)

    def build(self, op: Op) -> Inversion:
        return Cast()


class Reshape(Inversion):
    """`y*` in the shape of the input."""

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        return target.reshape(inputs[0].shape)


@register_rule(vocabulary.reshape)
@dataclass(frozen=True)
class ReshapeRule(Rule):
    """Flatten, reshape, view, squeeze and unsqueeze: the same entries in the input's shape."""

    equation = "Eq. 4"
    accuracy = "exact"

    def supports(self, op: Op) -> str | None:
        if any(isinstance(value, torch.dtype) for value in op.arguments.get("shape", ())):
            return "it reinterprets the bits as another dtype"
        return _input_is_free(op)

    def reconstructs(self, op: Op) -> tuple[str, ...]:
        return ("input",)

    def build(self, op: Op) -> Inversion:
        return Reshape()


def _input_is_free(op: Op) -> str | None:
    """Return why an op that takes no more of other tensors than their shape or type has no input.

    As in `x.view_as(other)`.
    """
    if "input" in op.free:
        return None
    return "its input is not reached from the layer, only the shape or type that it takes"


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

    equation = "Eq. 4"
    accuracy = "exact"

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

    equation = "Eq. 4"
    accuracy = "exact"

    def supports(self, op: Op) -> str | None:
        return one_input(op, "dim0", "dim1")

    def build(self, op: Op) -> Inversion:
        return Transpose(op.arguments["dim0"], op.arguments["dim1"])


class Undo(Inversion):
    """The op that undoes a move of entries.

    Args:
        undo: Takes what the move gave, returns what it was made from.
    """

    def __init__(self, undo: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.undo = undo

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        return self.undo(target)


@register_rule(vocabulary.movedim)
@dataclass(frozen=True)
class MovedimRule(Rule):
    """Moves of dimensions."""

    equation = "Eq. 4"
    accuracy = "exact"

    def supports(self, op: Op) -> str | None:
        return one_input(op, "source", "destination")

    def build(self, op: Op) -> Inversion:
        source, destination = op.arguments["destination"], op.arguments["source"]
        return Undo(functools.partial(torch.movedim, source=source, destination=destination))


@register_rule(vocabulary.roll)
@dataclass(frozen=True)
class RollRule(Rule):
    """Cyclic shifts, such as those of Swin's windows."""

    equation = "Eq. 4"
    accuracy = "exact"

    def supports(self, op: Op) -> str | None:
        return one_input(op, "shifts", "dims")

    def build(self, op: Op) -> Inversion:
        shifts = [-shift for shift in _flat(op.arguments["shifts"])]
        dims = _flat(op.arguments["dims"])
        return Undo(functools.partial(torch.roll, shifts=shifts, dims=dims))


@register_rule(vocabulary.flip)
@dataclass(frozen=True)
class FlipRule(Rule):
    """Reflection of dimensions."""

    equation = "Eq. 4"
    accuracy = "exact"

    def supports(self, op: Op) -> str | None:
        return one_input(op, "dims")

    def build(self, op: Op) -> Inversion:
        return Undo(functools.partial(torch.flip, dims=_flat(op.arguments["dims"])))


@register_rule(vocabulary.rot90)
@dataclass(frozen=True)
class Rot90Rule(Rule):
    """Quarter turns."""

    equation = "Eq. 4"
    accuracy = "exact"

    def supports(self, op: Op) -> str | None:
        return one_input(op, "k", "dims")

    def build(self, op: Op) -> Inversion:
        k, dims = op.arguments["k"], tuple(op.arguments["dims"])
        return Undo(functools.partial(torch.rot90, k=-k, dims=dims))
