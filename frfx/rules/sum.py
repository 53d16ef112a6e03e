"""Sums of activations, numbers and parameters: the residual is shared between what is free."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from frfx import vocabulary
from frfx.linalg import Dense
from frfx.linalg.pseudo_inverse import resolve_cutoff
from frfx.ops import Op
from frfx.registry import register_rule
from frfx.rules.base import AffineRule, Inversion


class SumInversion(Inversion):
    """The least deviations of one or two operands whose sum meets the target.

    With `y = c_a B_a a + c_b B_b b`, where B copies an operand along the dimensions that it is
    broadcast over, m times in all, `B B^T = m P` with P the mean over these dimensions. The means
    of a and b commute, so that the eigenspaces of

        A A^T = c_a^2 m_a P_a + c_b^2 m_b P_b

    are those of `P_a P_b`, with the eigenvalue `c_a^2 m_a + c_b^2 m_b`, of `P_a - P_a P_b`, with
    `c_a^2 m_a`, and so on. The answer `c_a B_a^T (A A^T)^+ r` for the residual r follows: without
    broadcasting `c_a r / (c_a^2 + c_b^2)`, half of the residual for a plain sum.

    Args:
        coefficients: Those of the op's inputs, None for one that is held.
        solver: Has the cutoff and the damping.
    """

    def __init__(self, coefficients: tuple[float | None, ...], solver: Dense) -> None:
        super().__init__()
        self.coefficients = coefficients
        self.rcond = resolve_cutoff(solver.rcond, solver.damping, 0.0)
        self.damping = solver.damping

    def forward(  # type: ignore[override]
        self, target: Tensor, output: Tensor, *inputs: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        residual = target - output
        free = [(x, c) for x, c in zip(inputs, self.coefficients, strict=True) if c is not None]
        dims = [copied_dims(x, residual) for x, _ in free]
        counts = [math.prod([residual.shape[d] for d in copied]) for copied in dims]
        squares = [c * c * count for (_, c), count in zip(free, counts, strict=True)]
        largest = sum(squares)
        shared = sorted({d for copied in dims for d in copied})
        common = _mean(residual, shared)
        found = []
        for (x, c), copied, count, square in zip(free, dims, counts, squares, strict=True):
            step = c * count * self._inverse(largest, largest) * common
            if len(copied) < len(shared):
                own = _mean(residual, copied) - common
                step = step + c * count * self._inverse(square, largest) * own
            found.append(x + step.reshape(x.shape))
        return found[0] if len(found) == 1 else tuple(found)

    def _inverse(self, square: float, largest: float) -> float:
        """Return the damped inverse of an eigenvalue of `A A^T`, or zero if it is cut off."""
        if not square > max(self.rcond, 0.0) ** 2 * largest:
            return 0.0
        return 1 / (square + self.damping * largest)


def copied_dims(operand: Tensor, result: Tensor) -> list[int]:
    """Return the dimensions of a result along which an operand of it is broadcast."""
    new = result.ndim - operand.ndim
    sizes = enumerate(zip(operand.shape, result.shape[new:], strict=True), start=new)
    return [*range(new), *(d for d, (size, onto) in sizes if size != onto)]


def _mean(values: Tensor, dims: list[int]) -> Tensor:
    return values.mean(dims, keepdim=True) if dims else values


@register_rule(vocabulary.add)
@register_rule(vocabulary.sub)
@register_rule(vocabulary.neg)
@dataclass(frozen=True)
class SumRule(AffineRule):
    """`min |da|^2 + |db|^2` so that the sum or difference meets its target.

    Operands that are numbers, parameters or held are shifts and drop out. An operand that is
    broadcast moves by what its copies have in common.

    The options are those of `AffineRule`.
    """

    equation = "Eq. 6 for (c_a B_a, c_b B_b)"
    accuracy = "exact"

    def supports(self, op: Op) -> str | None:
        if not op.inputs.keys() <= {"input", "other"}:
            return f"it is applied to {' and '.join(op.inputs.values())}, not to two operands"
        if "alpha" in op.computed or "alpha" in op.tensor_of:
            return "its alpha is computed in the graph or a tensor, not a number of the program"
        return None

    def build(self, op: Op) -> Inversion:
        alpha = float(op.arguments.get("alpha", 1))
        coefficients = {"input": 1.0, "other": alpha}
        if op.type is vocabulary.sub:
            coefficients["other"] = -alpha
        elif op.type is vocabulary.neg:
            coefficients["input"] = -1.0
        return SumInversion(
            tuple(None if name in op.held else coefficients[name] for name in op.inputs),
            self.dense,
        )
