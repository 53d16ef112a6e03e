"""A region of the network as one op: the minimal-deviation step through its whole Jacobian."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from frfx import vocabulary
from frfx.errors import UnsupportedOp, UnsupportedOpsError, first_line
from frfx.linalg.cgls import damped_cgls
from frfx.linalg.jacobian import Jacobian
from frfx.linalg.pseudo_inverse import solve_dtype
from frfx.ops import Op, Shape
from frfx.registry import register_rule
from frfx.rules.base import CGLSRule, Inversion, report_convergence
from frfx.view import in_precision
from frfx.weights import Weights

_DAMPING = 1e-2
"""Damping unless the policy says otherwise: an undamped step goes so far that the region is nothing
like its linearisation there, and leaves more than no step would (docs/branches.md)."""

_TOLERANCE = 0.1
"""The linearisation itself is off by more."""


class RegionInversion(Inversion):
    """`x* = x^ + J+ (y* - y^)`, J the Jacobian of the region at the forward values.

    It gives no gradient, and torch.compile leaves it out.

    Args:
        op: The region; its module takes the feature and what is held, returns the output.
        rule: The options.
    """

    def __init__(self, op: Op, rule: RegionRule) -> None:
        super().__init__()
        self.op, self.rule = op, rule
        self.solver = f"CGLS, {rule.max_steps} steps at most"
        assert isinstance(op.module, fx.GraphModule)
        count = sum(node.op.startswith("call_") for node in op.module.graph.nodes)
        self.reason = f"a region of {count} ops"
        self._coupling: tuple[Shape, Weights, bool] | None = None

    @torch.compiler.disable
    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        """Return `x^ + J+ (y* - y^)`."""
        with torch.inference_mode(False), torch.no_grad():
            target, output, *given = map(ordinary, (target, output, *inputs))
            with torch.autocast(output.device.type, enabled=False):
                return self._solve(target, output, given)

    def _solve(self, target: Tensor, output: Tensor, given: list[Tensor]) -> Tensor:
        dtype = solve_dtype(output.dtype)
        assert self.op.module is not None
        module = in_precision(self.op.module, dtype)
        feature, *held = (v.to(dtype) if v.is_floating_point() else v for v in given)
        with derivatives(
            self.op, "take its ops by their rules, branches='rules', or cut behind it"
        ):
            jacobian = Jacobian(lambda value: module(value, *held), feature)
            return self._step(jacobian, target.to(dtype) - output.to(dtype), feature)

    def _step(self, jacobian: Jacobian, residual: Tensor, feature: Tensor) -> Tensor:
        shape = tuple(feature.shape)
        if self._couples(jacobian, shape):
            jacobian.systems = 1
        residual = residual.reshape(jacobian.systems, -1)
        deviation, convergence = damped_cgls(
            jacobian.mv,
            jacobian.rmv,
            residual,
            damping=_DAMPING if self.rule.damping is None else self.rule.damping,
            tolerance=self.rule.tolerance,
            max_steps=self.rule.max_steps,
        )
        # At once: a compiled graph asks nobody at its end.
        report_convergence(convergence, self.op, self.rule.unconverged)
        return feature + deviation.reshape(shape)

    def _couples(self, jacobian: Jacobian, shape: Shape) -> bool:
        """Tell whether samples depend on each other: asked anew for other sizes and weights."""
        tensors, known = self.op.tensors(), self._coupling
        if known is None or known[0] != shape or not known[1].match(tensors):
            couples = jacobian.couples_samples()
            if couples is None:  # this batch does not tell
                return False
            known = self._coupling = shape, Weights(tensors), couples
        return known[2]


_NO_DERIVATIVE = (
    "not implemented",
    "does not require grad",
    "not have been used",
    "does not support automatic differentiation",
)
"""What torch says where it cannot differentiate."""


@contextlib.contextmanager
def derivatives(op: Op, remedy: str) -> Iterator[None]:
    """Name the region in which an op cannot be differentiated, and the way out."""
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        if not any(text in str(error) for text in _NO_DERIVATIVE):
            raise
        reason = f"an op inside cannot be differentiated as the solver asks: {first_line(error)}"
        problem = UnsupportedOp(op.path, "region", op.show_shapes(), reason, remedy)
        raise UnsupportedOpsError([problem]) from error


@register_rule(vocabulary.region)
@register_rule(vocabulary.shifted_window_attention)
@dataclass(frozen=True)
class RegionRule(CGLSRule):
    """The step of least norm among those that bring the linearised region nearest to its target.

    Nothing inside of the region needs a rule, only a derivative; what the layer does not reach is
    held at its forward value. The Jacobian is never formed.

    Attributes:
        damping: See `CGLSRule`; None for 1e-2.
        tolerance: See `CGLSRule`.
        max_steps: See `CGLSRule`.
        unconverged: See `CGLSRule`.
    """

    equation = "Eq. 4, 6 and 7 for the Jacobian of a whole region"
    accuracy = "approximate: the region is linearised at its forward values, and damped"
    anywhere = True
    tolerance: float = _TOLERANCE

    def supports(self, op: Op) -> str | None:
        if op.type is vocabulary.region:
            return None
        if len(set(op.inputs.values())) == 1:
            return "it returns several tensors, and a region ends in one: name what takes a part"
        return f"it is applied to {', '.join(op.inputs.values())}, and a region begins at one value"

    def build(self, op: Op) -> Inversion:
        return RegionInversion(op, self)


def ordinary(value: Tensor) -> Tensor:
    """Return a tensor that autograd may save: those of inference mode it may not."""
    return value.clone() if value.is_inference() else value
