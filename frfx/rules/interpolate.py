"""Interpolation in all of torch's modes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from frfx import vocabulary
from frfx.linalg import Dense
from frfx.ops import Op
from frfx.registry import register_rule
from frfx.rules.base import AffineRule, Inversion, one_input
from frfx.rules.pool import adaptive_averages
from frfx.rules.separable import Dimension, SeparableInversion

_OPTIONS = ("scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")


class InterpolationInversion(SeparableInversion):
    """Inverse of an interpolation, whose matrices are what torch makes of unit vectors."""

    def __init__(self, op: Op, solver: Dense) -> None:
        super().__init__(op, None, self._weights, solver)
        self.arguments = {name: op.arguments.get(name) for name in _OPTIONS}

    def _weights(self, dim: Dimension) -> Tensor:
        mode, scale = str(self.arguments["mode"]), self.arguments["scale_factor"]
        if mode == "area":
            return adaptive_averages(dim)
        antialias = bool(self.arguments["antialias"])
        # Onto a single column, torch filters the rows wrongly: `supports` refuses that.
        others = 2 if antialias else 1
        size: dict[str, Any] = {"size": dim.place(dim.onto, others)}
        if scale is not None and not self.arguments["recompute_scale_factor"]:
            # The weights follow from the factor as it is given, not from the sizes.
            factor = scale[dim.index] if isinstance(scale, (tuple, list)) else scale
            size = {"scale_factor": dim.place(float(factor), 1.0)}
        # The dtype and the count of dimensions decide, too, which neighbour torch takes for the
        # nearest: it computes that in the image's precision.
        dtype = dim.like.dtype if mode.startswith("nearest") else torch.float64
        images = F.interpolate(
            dim.impulses(dtype, others),
            mode=mode,
            align_corners=self.arguments["align_corners"],
            antialias=antialias,
            **size,
        )
        return dim.response(images)


@register_rule(vocabulary.interpolate)
@dataclass(frozen=True)
class InterpolateRule(AffineRule):
    """`x* = x^ + A+ (y* - y^)`, where A interpolates dimension by dimension.

    The options are those of `AffineRule`.
    """

    equation = "Eq. 4-7"
    accuracy = "exact"
    solvers = ("separable",)

    def supports(self, op: Op) -> str | None:
        reason = one_input(op, *_OPTIONS)  # the size is read off the output
        if reason is not None or not op.arguments["antialias"] or op.output_shape is None:
            return reason
        if op.output_shape[-1] == 1 != op.output_shape[-2]:
            return "antialias onto a single column, where torch does not filter the rows right"
        return None

    def build(self, op: Op) -> Inversion:
        return InterpolationInversion(op, self.dense)
