"""Ops that put tensors together and take them apart again: every part gets its slice."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from frfx import vocabulary
from frfx.ops import Op
from frfx.registry import register_rule
from frfx.rules.base import Inversion, Rule, one_input


class CatInversion(Inversion):
    """The slices of the target that belong to the free inputs.

    A slice is counted from the front if the sizes before it are known, those of activations, and
    from the back otherwise.

    Args:
        op: A concatenation of activations and other tensors.
    """

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.dim = op.arguments["dim"]
        self.names, self.places = tuple(op.inputs), _places(op)
        self.free = op.free

    def forward(  # type: ignore[override]
        self, target: Tensor, output: Tensor, *inputs: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        dim = self.dim % target.ndim
        sizes = {name: x.shape[dim] for name, x in zip(self.names, inputs, strict=True)}
        found = []
        for name in self.free:
            place = self.places.index(name)
            before, behind = self.places[:place], self.places[place + 1 :]
            if all(other in sizes for other in before):
                start = sum(sizes[other] for other in before)
            else:
                start = target.shape[dim] - sum(sizes[other] for other in (name, *behind))
            found.append(target.narrow(dim, start, sizes[name]))
        return found[0] if len(found) == 1 else tuple(found)


def _places(op: Op) -> tuple[str, ...]:
    """Return the names of what is joined, in order; what is no activation has one, too."""
    count = len(op.arguments["tensors"])
    return tuple(f"tensors[{i}]" for i in range(count))


def _joins(op: Op) -> str | None:
    """Return why an op is no join of activations with other tensors, or None."""
    if "tensors" not in op.arguments and op.inputs.keys() != {"tensors"}:
        return "what it joins is computed in the graph, not written as a sequence"
    if op.inputs.keys() != {"tensors"} and not op.inputs.keys() <= set(_places(op)):
        return f"it is applied to {', '.join(op.inputs.values())}, not to a sequence of tensors"
    if "dim" in op.computed:
        return "its dim is computed in the graph, not read from the model"
    return None


@register_rule(vocabulary.cat)
@dataclass(frozen=True)
class CatRule(Rule):
    """Concatenation: every free input is its slice of the target; of a tuple, every part."""

    equation = "Eq. 4"
    accuracy = "exact"

    def supports(self, op: Op) -> str | None:
        reason = _joins(op)
        if reason is not None or "tensors" in op.inputs:
            return reason
        places = _places(op)
        for name in op.free:
            place = places.index(name)
            known = [set(others) <= op.inputs.keys() for others in (places[:place], places[place:])]
            if not any(known):
                return (
                    f"where {op.inputs[name]} lies in it cannot be told: tensors of other sizes "
                    "than those of activations come before it and behind it"
                )
        return None

    def build(self, op: Op) -> Inversion:
        return PartsOfCat(op.arguments["dim"]) if "tensors" in op.inputs else CatInversion(op)


class PartsOfCat(Inversion):
    """The slices of the target as a tuple, for the concatenation of a tuple.

    Args:
        dim: Along which it is concatenated.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(  # type: ignore[override]
        self, target: Tensor, output: Tensor, *inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        (parts,) = inputs
        return target.split([part.shape[self.dim] for part in parts], self.dim)


class PartsOfStack(Inversion):
    """The entries of the target as a tuple, for a stacked tuple.

    Args:
        dim: Along which it is stacked.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(  # type: ignore[override]
        self, target: Tensor, output: Tensor, *inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        return target.unbind(self.dim)


class StackInversion(Inversion):
    """The entries of the target that belong to the free inputs.

    Args:
        dim: Along which they are stacked.
        places: Which of the stacked tensors are free, in the order of the op's inputs.
    """

    def __init__(self, dim: int, places: tuple[int, ...]) -> None:
        super().__init__()
        self.dim, self.places = dim, places

    def forward(  # type: ignore[override]
        self, target: Tensor, output: Tensor, *inputs: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        found = tuple(target.select(self.dim, place) for place in self.places)
        return found[0] if len(found) == 1 else found


@register_rule(vocabulary.stack)
@dataclass(frozen=True)
class StackRule(Rule):
    """Stacking along a new dimension: every free input is its entry of the target."""

    equation = "Eq. 4"
    accuracy = "exact"

    def supports(self, op: Op) -> str | None:
        return _joins(op)

    def build(self, op: Op) -> Inversion:
        if "tensors" in op.inputs:
            return PartsOfStack(op.arguments["dim"])
        places = _places(op)
        return StackInversion(op.arguments["dim"], tuple(places.index(name) for name in op.free))


class PartsInversion(Inversion):
    """The parts of a tensor, put together again.

    Args:
        join: Takes the tuple of parts.
    """

    def __init__(self, join: Callable[[tuple[Tensor, ...]], Tensor]) -> None:
        super().__init__()
        self.join = join

    def forward(  # type: ignore[override]
        self, target: tuple[Tensor, ...], output: tuple[Tensor, ...], *inputs: Tensor
    ) -> Tensor:
        return self.join(tuple(target))


@register_rule(vocabulary.chunk)
@register_rule(vocabulary.split)
@register_rule(vocabulary.tensor_split)
@register_rule(vocabulary.unbind)
@dataclass(frozen=True)
class SplitRule(Rule):
    """Chunks, splits and unbinding: the parts joined; one that nobody asks for stays."""

    equation = "Eq. 4"
    accuracy = "exact"

    def supports(self, op: Op) -> str | None:
        indices = op.arguments.get("indices_or_sections")
        if isinstance(indices, (list, tuple)) and list(indices) != sorted(indices):
            return "its parts may overlap: its indices do not rise"
        return one_input(op, "dim", "indices_or_sections")

    def build(self, op: Op) -> Inversion:
        join = torch.stack if op.type is vocabulary.unbind else torch.cat
        return PartsInversion(functools.partial(join, dim=op.arguments["dim"]))
