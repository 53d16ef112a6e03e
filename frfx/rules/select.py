"""Indexing: the target goes to the entries that were read, the others stay."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from frfx import vocabulary
from frfx.linalg.pseudo_inverse import solve_dtype
from frfx.ops import Op, Shape
from frfx.registry import register_rule
from frfx.rules.base import FactoredInversion, Inversion, Rule, one_input


class ViewInversion(Inversion):
    """`x^` with the target in the places that the op reads: the op is a view of them.

    Args:
        read: The op, applied to a tensor.
    """

    partial = True

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.read = read

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        x = x.to(torch.promote_types(x.dtype, target.dtype), copy=True)
        self.read(x).copy_(target)
        return x

    def share(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        return self.forward(torch.ones((), dtype=x.dtype, device=x.device), x, torch.zeros_like(x))


@dataclass(frozen=True)
class Sources:
    """Which entry of a sample every entry of the result was read from.

    Attributes:
        index: Shape (outputs,), into the sample's entries.
        count: How often each of those is read, shape (*input).
    """

    index: Tensor
    count: Tensor

    @property
    def nbytes(self) -> int:
        """The memory that it holds, in bytes."""
        return self.index.nbytes + self.count.nbytes


class IndexInversion(FactoredInversion):
    """`x* = x^ + A+ (y* - y^)` for indices in tensors: an entry takes the mean of its copies.

    Args:
        op: The op that is inverted.
    """

    partial = True

    def key(self, input_shape: Shape, output_shape: Shape) -> Shape:
        """Return the shape that is indexed."""
        return input_shape

    def factorize(self, key: Shape) -> Sources:
        """Read the indices as they are now."""
        index = _sources(self.op, key)
        assert index is not None  # `supports` has seen to it
        index = index.to(self.like.device)
        count = torch.bincount(index, minlength=math.prod(key))
        return Sources(index, count.reshape(key))

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        dtype = solve_dtype(torch.promote_types(target.dtype, x.dtype))
        sources: Sources = self.factor(x, output)
        residual = (target - output).to(dtype).flatten(1)
        total = x.new_zeros(len(x), sources.count.numel(), dtype=dtype)
        total = total.index_add(1, sources.index, residual).view(x.shape)
        return x.to(dtype) + total / sources.count.clamp(min=1).to(dtype)

    def share(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        return self.factors[tuple(x.shape[1:])].count


def _sources(op: Op, shape: Shape) -> Tensor | None:
    """Return which of a sample's entries the op reads, or None if it is not every sample's own."""
    count = math.prod(shape)
    device = next((tensor.device for tensor in op.tensors()), None)
    numbered = torch.arange(2 * count, device=device).reshape(2, *shape)
    read = _reader(op)(numbered)
    if read.ndim == 0 or len(read) != 2:
        return None
    one, other = read[0].flatten(), read[1].flatten()
    own = bool((one < count).all()) and torch.equal(one + count, other)
    return one if own else None


def _reader(op: Op) -> Callable[[Tensor], Tensor]:
    """Return the op as a function of its input alone."""
    arguments = {name: _value(op, name, value) for name, value in op.arguments.items()}
    arguments |= {name: op.tensor(name) for name in op.tensor_of if "[" not in name}
    if "indices" in arguments:  # where None stands for a whole dimension
        indices = tuple(slice(None) if i is None else i for i in arguments["indices"])
        return lambda x: x[indices]
    if "step" in arguments:
        dim, *ends = (arguments[name] for name in ("dim", "start", "end", "step"))
        return lambda x: x[(slice(None),) * (dim % x.ndim) + (slice(*ends),)]
    if op.type is vocabulary.getitem:
        return lambda x: x[arguments["index"]]
    method = op.type.name if op.type else ""
    return lambda x: getattr(x, method)(**arguments)


def _value(op: Op, name: str, value: Any) -> Any:
    """Return an argument, with the model's tensors in the places of a sequence that name them."""
    if not isinstance(value, (list, tuple)):
        return value
    keys = [f"{name}[{i}]" for i in range(len(value))]
    parts = (op.tensor(k) if k in op.tensor_of else v for k, v in zip(keys, value, strict=True))
    return type(value)(parts)


def _is_view(op: Op) -> bool:
    """Tell whether an op reads its input by numbers and slices alone."""
    if op.type is not vocabulary.getitem:
        return op.type is not vocabulary.index_select
    if "step" in op.arguments:
        return True
    index = op.arguments.get("index")
    parts = index if isinstance(index, tuple) else (index,)
    basic = (int, slice, EllipsisType, type(None))
    named = op.tensor_of or "indices" in op.arguments
    return not named and all(isinstance(i, basic) and not isinstance(i, bool) for i in parts)


@register_rule(vocabulary.getitem)
@register_rule(vocabulary.select)
@register_rule(vocabulary.narrow)
@register_rule(vocabulary.index_select)
@dataclass(frozen=True)
class SelectRule(Rule):
    """Indexing by numbers, slices, and lists or tensors of indices.

    The op is a selection A, and `x* = x^ + A+ (y* - y^)`: entries that are not read stay, one that
    is read several times takes the mean of what is asked of it.
    """

    equation = "Eq. 4-7 for a selection"
    accuracy = "exact"

    def supports(self, op: Op) -> str | None:
        reason = one_input(op, "index", "indices", "dim", "start", "end", "step", "length")
        if reason is not None or op.input_shapes is None or _is_view(op):
            return reason
        if _sources(op, op.input_shapes[0]) is None:
            return "it does not index every sample alike"
        return None

    def build(self, op: Op) -> Inversion:
        return ViewInversion(_reader(op)) if _is_view(op) else IndexInversion(op)
