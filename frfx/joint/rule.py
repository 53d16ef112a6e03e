"""Joint inversion as a rule: a whole region of the network is one op."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from frfx.errors import InputError, TargetError, UnreachedError, UnreachedWarning
from frfx.joint.margin import MarginConstraint
from frfx.joint.options import JointOptions
from frfx.joint.output import OutputConstraint
from frfx.joint.region import Region
from frfx.joint.report import Report
from frfx.joint.sqp import nearest_feature
from frfx.linalg.pseudo_inverse import solve_dtype
from frfx.ops import Op
from frfx.rules.base import Inversion, Rule
from frfx.rules.label import nearest_embedding
from frfx.rules.region import ordinary
from frfx.view import in_precision

_SLACK = 1e-2
"""The share of the margin that may be missing where a label counts as reached."""


class JointInversion(Inversion):
    """The feature nearest to the forward one from which a region of the network meets its target.

    It gives no gradient, and torch.compile leaves it out.

    Args:
        op: The region; its module takes the feature and what is held, returns the output.
        options: As `frfx.policy.joint` takes them.
        batch: The only batch size that the region takes; None for all.

    Attributes:
        report: What became of every sample of the last call; None before the first.
    """

    def __init__(self, op: Op, options: JointOptions, batch: int | None) -> None:
        super().__init__()
        self.op, self.options, self.batch = op, options, batch
        self.report: Report | None = None
        self.solver = f"SQP, {options.steps} steps at most"

    @torch.compiler.disable
    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            target, output, feature, *held = map(ordinary, (target, output, *inputs))
            _check_batch(self.op, output, [feature, *held])
            with torch.autocast(feature.device.type, enabled=False):
                return self._solve(target, output, feature, held)

    def _solve(self, target: Tensor, output: Tensor, feature: Tensor, held: list[Tensor]) -> Tensor:
        options, dtype = self.options, solve_dtype(feature.dtype)
        assert self.op.module is not None
        module = in_precision(self.op.module, dtype)
        region = Region(module, tuple(_raised(value, dtype) for value in held), self.batch)
        rounded = output.dtype != dtype  # then whether it reaches the target is not to be seen
        feature, output = feature.to(dtype), output.to(dtype)
        constraint: MarginConstraint | OutputConstraint
        if target.is_floating_point():
            constraint = OutputConstraint(region, target.to(dtype), output, options.iterations)
        elif options.constraint == "equality":
            embedded = nearest_embedding(output, target, options.margin, self.op.arguments["dim"])
            constraint = OutputConstraint(region, embedded, output, options.iterations)
        elif target.ndim > 1:
            raise TargetError(
                f"{self.op.path!r}: labels of shape {tuple(target.shape)}, but that one label of a "
                "sample wins is the only inequality that is solved for: give "
                'frfx.policy.joint(constraint="equality")'
            )
        else:
            slack = _SLACK * options.margin
            constraint = MarginConstraint(region, target, options.margin, slack, options.classes)
        known = None if rounded else output
        found, self.report = nearest_feature(
            constraint, feature, options.steps, options.tolerance, known
        )
        self._tell(self.report)
        return found

    def _tell(self, report: Report) -> None:
        """Say what has not been reached, as the options ask for."""
        if self.options.unreached == "ignore" or bool(report.reached.all()):
            return
        missing = (~report.reached).nonzero()[:, 0].tolist()
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        text = (
            f"{self.op.path!r}: {len(missing)} of {len(report.reached)} samples ({shown}) have not "
            f"reached their target in {self.options.steps} steps; the largest violation is "
            f"{float(report.violation.max()):.3g}. Give policy.joint more steps, more classes or "
            'a smaller margin; inverse.report tells which they are, and unreached="ignore" is '
            "silent"
        )
        if self.options.unreached == "raise":
            raise UnreachedError(text)
        warnings.warn(text, UnreachedWarning, stacklevel=2)


@dataclass(frozen=True)
class JointRule(Rule):
    """Among the features from which the region meets its target, the nearest to the forward one.

    Attributes:
        options: As `frfx.policy.joint` takes them.
        batch: The only batch size that the region takes; None for all.
    """

    equation = "the minimal deviation principle (Sec. 3.2) for a whole region at once"
    accuracy = "approximate: a local minimum, found by linearising again and again"
    solvers = ("SQP",)
    options: JointOptions = field(default_factory=JointOptions)
    batch: int | None = None

    def build(self, op: Op) -> Inversion:
        return JointInversion(op, self.options, self.batch)

    def __str__(self) -> str:
        return f"JointRule({self.options.constraint}, margin={self.options.margin:g})"


def _check_batch(op: Op, output: Tensor, given: list[Tensor]) -> None:
    """Raise `InputError` if samples cannot be taken out of the batch along the first dimension."""
    for name, value in zip(op.inputs.values(), given, strict=True):
        if value.shape[:1] != output.shape[:1]:
            raise InputError(
                "the batch must be the first dimension of all that goes into a joint inversion, "
                f"but {name!r} has shape {tuple(value.shape)} for an output of shape "
                f"{tuple(output.shape)}: cut elsewhere"
            )


def _raised(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value
