"""Ops that copy their input: it moves by the mean of what is asked of its copies."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from frfx import vocabulary
from frfx.ops import Op
from frfx.registry import register_rule
from frfx.rules.base import AffineRule, Inversion, one_input
from frfx.rules.separable import equal_singular_values
from frfx.rules.sum import copied_dims


class RepeatInversion(Inversion):
    """`x* = x^ + A+ (y* - y^)` for m copies of every entry, `A A^T = m` on what they agree in.

    Args:
        factor: What the mean is multiplied by.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        x = inputs[0]
        return x + self.factor * self.mean(target - output, x)

    def mean(self, residual: Tensor, x: Tensor) -> Tensor:
        """Return the mean over the copies of every entry of x: whole images, one after another."""
        new = residual.ndim - x.ndim
        sizes = zip(residual.shape[new:], x.shape, strict=True)
        split = [n for onto, size in sizes for n in (onto // size, size)]
        residual = residual.reshape(*residual.shape[:new], *split)
        return residual.mean([*range(new), *range(new, residual.ndim, 2)])


class ExpandInversion(RepeatInversion):
    """The same for dimensions that are broadcast."""

    def mean(self, residual: Tensor, x: Tensor) -> Tensor:
        """Return the mean over the dimensions that are broadcast."""
        dims = copied_dims(x, residual)
        return (residual.mean(dims, keepdim=True) if dims else residual).reshape(x.shape)


class InterleaveInversion(RepeatInversion):
    """The same for copies that lie side by side.

    Args:
        factor: What the mean is multiplied by.
        dim: Along which they lie; None for the flattened input.
    """

    def __init__(self, factor: float, dim: int | None) -> None:
        super().__init__(factor)
        self.dim = dim

    def mean(self, residual: Tensor, x: Tensor) -> Tensor:
        """Return the mean over the copies, which lie side by side."""
        if self.dim is None:
            return residual.reshape(*x.shape, -1).mean(-1)
        dim = self.dim % x.ndim
        return residual.unflatten(dim, (x.shape[dim], -1)).mean(dim + 1)


@register_rule(vocabulary.expand)
@register_rule(vocabulary.repeat)
@register_rule(vocabulary.repeat_interleave)
@dataclass(frozen=True)
class RepeatRule(AffineRule):
    """Expanding, repeating and tiling: an entry moves by the mean of what is asked of its copies.

    The options are those of `AffineRule`; as all singular values are the same, damping scales.
    """

    equation = "Eq. 7"
    accuracy = "exact"

    def supports(self, op: Op) -> str | None:
        if op.type is vocabulary.repeat_interleave:
            if "repeats" in op.tensor_of or "repeats" in op.inputs:
                return "its repeats are a tensor, not one number"
            return one_input(op, "repeats", "dim")
        if "input" not in op.free:
            return "its input is not reached from the layer, only the shape that it takes"
        return None

    def reconstructs(self, op: Op) -> tuple[str, ...]:
        return ("input",)

    def build(self, op: Op) -> Inversion:
        factor = equal_singular_values(self.dense)
        if op.type is vocabulary.expand:
            return ExpandInversion(factor)
        if op.type is vocabulary.repeat:
            return RepeatInversion(factor)
        return InterleaveInversion(factor, op.arguments["dim"])
