"""Convolutions of stride 1 without padding (Eq. 8-20); 1d, 2d and 3d are one code."""

from __future__ import annotations

from dataclasses import dataclass

from frfx import vocabulary
from frfx.linalg import Convolution, Spectral
from frfx.ops import Op, Shape
from frfx.registry import register_rule
from frfx.rules.base import AffineInversion, Inversion, Rule, one_input


@register_rule(vocabulary.conv)
@dataclass(frozen=True)
class ConvolutionRule(Rule):
    """`a* = a^ + F^-1[ K^F(u, v)+ F(pad(z* - z^)) ]`, Eq. 19 and 20 in residual form.

    Attributes:
        rcond: Singular values up to this share of the largest of all frequencies count as zero;
            None for the machine epsilon times the larger channel count.
        damping: Tikhonov's parameter relative to the squared largest singular value.
    """

    equation = "Eq. 8-20"
    rcond: float | None = None
    damping: float = 0.0

    def supports(self, op: Op) -> str | None:
        reason = one_input(op, "weight")
        weight = op.tensor("weight")
        if reason or weight is None:
            return reason or "its weight is not one of the model's tensors"
        dims = weight.ndim - 2
        if op.input_shapes is not None and len(op.input_shapes[0]) != dims + 1:
            return f"its input has no batch dimension: {op.show_shapes()}"
        padding = op.arguments["padding"]
        if padding == "valid":
            padding = 0
        elif padding == "same":
            padding = 0 if max(weight.shape[2:]) == 1 else "same"
        if padding == "same" or any(p != 0 for p in _each(padding)):
            return f"padding {padding}: only convolutions without padding are covered"
        for name in ("stride", "dilation"):
            if any(size != 1 for size in op.sizes(name, dims)):
                return f"{name} {op.arguments[name]}: only {name} 1 is covered"
        if op.arguments["groups"] != 1:
            return f"groups {op.arguments['groups']}: only ungrouped convolutions are covered"
        return None

    def build(self, op: Op) -> Inversion:
        solver = Spectral(self.rcond, self.damping)
        return AffineInversion(op, _convolution, solver, key=lambda shape: shape[1:])


def _each(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _convolution(op: Op, key: Shape) -> Convolution:
    weight = op.tensor("weight")
    assert weight is not None  # `supports` has seen to it
    return Convolution(weight, key)
