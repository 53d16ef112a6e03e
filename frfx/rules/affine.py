"""Scalar arithmetic: affine ops that act entry by entry."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from frfx import vocabulary
from frfx.linalg import Diagonal
from frfx.ops import Op, Shape
from frfx.registry import register_rule
from frfx.rules.base import AffineInversion, AffineRule, Inversion


@register_rule(vocabulary.add)
@register_rule(vocabulary.sub)
@register_rule(vocabulary.mul)
@register_rule(vocabulary.div)
@register_rule(vocabulary.neg)
@dataclass(frozen=True)
class ScaleRule(AffineRule):
    """Arithmetic of an activation with a number or one of the model's tensors.

    The shift drops out of `x* = x^ + (y* - y^) / scale`.

    Attributes:
        rcond: Scales up to this share of the largest count as zero.
        damping: Tikhonov's parameter relative to the squared largest scale.
    """

    equation = "Eq. 4 for a diagonal"

    def supports(self, op: Op) -> str | None:
        if len(op.inputs) != 1:
            return f"it combines {' and '.join(op.inputs.values())}: a branch"
        if op.computed:
            return "its other operand is computed in the graph, not read from the model"
        if op.type is vocabulary.div and "other" in op.inputs:
            return "it divides by the activation, which is not affine"
        if op.arguments.get("rounding_mode") is not None:
            return "it rounds, so nothing can be told from its result"
        if op.input_shapes is not None and op.input_shapes[0] != op.output_shape:
            return "it broadcasts the activation to a larger shape"
        return None

    def build(self, op: Op) -> Inversion:
        return AffineInversion(op, _scale, self.dense)


def _scale(op: Op, key: Shape) -> Diagonal:
    del key
    live = next(iter(op.inputs))
    alpha = float(op.arguments.get("alpha", 1))
    if op.type is vocabulary.add:
        return Diagonal(_tensor(alpha if live == "other" else 1.0))
    if op.type is vocabulary.sub:
        return Diagonal(_tensor(-alpha if live == "other" else 1.0))
    if op.type is vocabulary.neg:
        return Diagonal(_tensor(-1.0))
    name = "input" if live == "other" else "other"
    read = op.tensor(name)
    scale = _tensor(op.arguments[name]) if read is None else read
    if op.type is vocabulary.mul:
        return Diagonal(scale)
    return Diagonal(scale.double().reciprocal())


def _tensor(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
