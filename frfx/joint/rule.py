"""Joint inversion as a rule: a whole region of the network is one op."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from frfx.errors import InputError, TargetError, UnreachedError, UnreachedWarning, first_line
from frfx.joint.margin import MarginConstraint
from frfx.joint.options import JointOptions
from frfx.joint.output import OutputConstraint
from frfx.joint.region import Region
from frfx.joint.report import Report
from frfx.joint.sqp import nearest_feature
from frfx.linalg.pseudo_inverse import solve_dtype
from frfx.ops import Op, Shape
from frfx.rules.base import Inversion, Rule
from frfx.rules.label import nearest_embedding
from frfx.rules.region import derivatives, ordinary
from frfx.view import in_precision
from frfx.weights import Weights

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
        self._apart: tuple[Shape, Weights] | None = None
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
        self._check_apart(region, feature, None if rounded else output)
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
        with derivatives(self.op, "cut behind it, or invert layer by layer"):
            found, self.report = nearest_feature(
                constraint, feature, options.steps, options.tolerance, known
            )
        self._tell(self.report)
        return found

    def _check_apart(self, region: Region, feature: Tensor, output: Tensor | None) -> None:
        """Raise `InputError` if samples depend on each other; asked anew for other sizes, weights.

        They do if the output of some is another one where the others are not there. Of any two
        samples there is a half of the batch that has the one, not the other.
        """
        shape, tensors, known = tuple(feature.shape), self.op.tensors(), self._apart
        if known is not None and known[0] == shape and known[1].match(tensors):
            return
        index = torch.arange(len(feature), device=feature.device)
        output = region(feature, index) if output is None else output
        rounding = 10 * torch.finfo(output.dtype).eps ** 0.5 * output.abs().amax()
        for bit in range((len(feature) - 1).bit_length()):
            rows = index[(index >> bit) % 2 == 1]
            reason = "the output of some samples depends on others"
            try:
                off = (region(feature[rows], rows) - output[rows]).abs().amax()
                apart = bool(off <= rounding)
            except (RuntimeError, ValueError) as error:  # as of statistics of one sample
                apart, reason = False, f"a part of the batch cannot go alone: {first_line(error)}"
            if not apart:
                raise InputError(
                    f"{self.op.path!r}: joint inversion takes samples one by one, but {reason}. "
                    "Cut behind what mixes them, or invert layer by layer"
                )
        self._apart = shape, Weights(tensors)

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
