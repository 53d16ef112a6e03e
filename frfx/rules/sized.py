"""Ops whose arguments the graph computes from sizes: their rules are asked at every size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from frfx.ops import Op, Shape
from frfx.rules.base import FactoredInversion, Inversion, Rule


@dataclass(frozen=True)
class Built:
    """The inversion that a rule has built for one size.

    Attributes:
        inversion: It.
        factor: What it computes with, if it is factored.
    """

    inversion: Inversion
    factor: Any = None

    @property
    def nbytes(self) -> int:
        """The memory that it holds, in bytes."""
        return 0 if self.factor is None else int(self.factor.nbytes)

    @property
    def spectrum(self) -> Any:
        """The singular values of the factor in short, or None."""
        return getattr(self.factor, "spectrum", None)

    @property
    def solver(self) -> str:
        """What it solves with."""
        return str(getattr(self.factor, "solver", None) or self.inversion.solver)

    @property
    def reason(self) -> str:
        """Why it solves with that, where there was a choice."""
        return str(getattr(self.factor, "reason", ""))


class SizedInversion(FactoredInversion):
    """The inverse of an op some of whose arguments are known with the sizes only.

    Args:
        op: The op that is inverted.
        rule: Builds its inversion once the arguments are known.
    """

    solver = "at every size"

    def __init__(self, op: Op, rule: Rule) -> None:
        super().__init__(op)
        self.rule = rule
        self.partial = len(rule.reconstructs(op)) == 1  # a selection has one input
        self._known: dict[Shape, Op] = {}

    def key(self, input_shape: Shape, output_shape: Shape) -> Shape:
        """Return the shape of the input, which decides on that of the output; a tuple has none."""
        return input_shape or output_shape

    def settle(self, op: Op) -> None:
        """Take the op with its shapes and arguments, as they are for the batch to come."""
        assert op.input_shapes is not None
        key = self.key(op.input_shapes[0], op.output_shape or ())
        before, self._known[key] = self._known.get(key), op
        if before is not None and before.arguments != op.arguments:
            self.factors.pop(key, None)

    def factorize(self, key: Shape) -> Built:
        """Build the inversion for one size, and what it computes with."""
        op = self._known[key]
        assert op.input_shapes is not None
        inversion = self.rule.build(op)
        inversion.backend = self.backend
        if not isinstance(inversion, FactoredInversion):
            return Built(inversion)
        inversion.like = self.like
        inner = inversion.key(op.input_shapes[0], op.output_shape or ())
        inversion.factors[inner] = inversion.factorize(inner)
        return Built(inversion, inversion.factors[inner])

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        """Return what the inversion for this size does."""
        key = self.key(_shape(inputs[0]), _shape(output))
        return self.factors[key].inversion(target, output, *inputs)

    def share(self, *inputs: Tensor) -> Tensor | None:
        """Return which entries the inversion for this size speaks for."""
        key = _shape(inputs[0])
        return self.factors[key].inversion.share(*inputs) if key else None

    def check_convergence(self) -> None:
        """Warn or raise, as asked, if a solver has left samples unsolved.

        Raises:
            ConvergenceError: As `Inversion.check_convergence` does.
        """
        for built in self.factors.values():
            built.inversion.check_convergence()


@dataclass(frozen=True)
class SizedRule(Rule):
    """Another rule, asked once the arguments are known that the graph computes from sizes.

    Attributes:
        rule: That rule.
        names: Those arguments.
    """

    rule: Rule
    names: tuple[str, ...]

    def supports(self, op: Op) -> str | None:
        if op.size_of:
            return None  # not known yet
        varying = [name for name in self.names if name in op.computed]
        if varying:
            return f"its {' and '.join(varying)} is computed from more than the size of the image"
        return self.rule.supports(op)

    def reconstructs(self, op: Op) -> tuple[str, ...]:
        return self.rule.reconstructs(op)

    def build(self, op: Op) -> Inversion:
        return SizedInversion(op, self.rule)

    def __str__(self) -> str:
        return str(self.rule)


def _shape(value: Tensor | tuple[Tensor, ...]) -> Shape:
    """Return the shape of a value without the batch; () of a tuple."""
    return () if isinstance(value, tuple) else tuple(value.shape[1:])


def wait_for_sizes(rule: Rule, op: Op) -> Rule:
    """Return the rule, or where it cannot do without arguments that sizes give, one that waits."""
    if not op.size_of or rule.supports(op) is None:
        return rule
    return SizedRule(rule, tuple(op.size_of))
