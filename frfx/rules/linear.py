"""Linear layers (Eq. 4-7)."""

from __future__ import annotations

from dataclasses import dataclass

from frfx import vocabulary
from frfx.linalg import Dense, Matrix
from frfx.ops import Op, Shape
from frfx.registry import register_rule
from frfx.rules.base import AffineInversion, Inversion, Rule, one_input


@register_rule(vocabulary.linear)
@dataclass(frozen=True)
class LinearRule(Rule):
    """`x* = x^ + W+ (z* - z^)` with the pseudo-inverse of the weight, whatever its rank.

    It is Eq. 6 for a weight of full row rank and Eq. 7 for one of full column rank.

    Attributes:
        rcond: Singular values up to this share of the largest count as zero; None for the
            machine epsilon times the larger dimension.
        damping: Tikhonov's parameter relative to the squared largest singular value.
    """

    equation = "Eq. 4-7"
    rcond: float | None = None
    damping: float = 0.0

    def supports(self, op: Op) -> str | None:
        reason = one_input(op, "weight")
        weight = op.tensor("weight")
        if reason is None and weight is not None and weight.ndim != 2:
            return f"its weight is no matrix, but has the shape {tuple(weight.shape)}"
        return reason

    def build(self, op: Op) -> Inversion:
        return AffineInversion(op, _matrix, Dense(self.rcond, self.damping))


def _matrix(op: Op, key: Shape) -> Matrix:
    del key
    weight = op.tensor("weight")
    assert weight is not None  # `supports` has seen to it
    return Matrix(weight)
