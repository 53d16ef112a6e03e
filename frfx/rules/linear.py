"""Linear layers (Eq. 4-7)."""

from __future__ import annotations

from dataclasses import dataclass

from frfx import vocabulary
from frfx.linalg import Matrix
from frfx.ops import Op, Shape
from frfx.registry import register_rule
from frfx.rules.base import Inversion, SolverRule, one_input


@register_rule(vocabulary.linear)
@dataclass(frozen=True)
class LinearRule(SolverRule):
    """`x* = x^ + W+ (z* - z^)` with the pseudo-inverse of the weight, whatever its rank.

    It is Eq. 6 for a weight of full row rank and Eq. 7 for one of full column rank. The options are
    those of `SolverRule`.
    """

    equation = "Eq. 4-7"
    accuracy = "exact"
    solvers = ("dense", "iterative")

    def supports(self, op: Op) -> str | None:
        reason = one_input(op, "weight")
        weight = op.tensor("weight")
        if reason is None and weight is not None and weight.ndim != 2:
            return f"its weight is no matrix, but has the shape {tuple(weight.shape)}"
        if reason is None and self.solver == "spectral":
            return "a linear layer has no spectrum over frequencies: solver='spectral' cannot be"
        return reason

    def build(self, op: Op) -> Inversion:
        return self.affine(op, _matrix)


def _matrix(op: Op, key: Shape) -> Matrix:
    del key
    weight = op.tensor("weight")
    assert weight is not None  # `supports` has seen to it
    return Matrix(weight)
