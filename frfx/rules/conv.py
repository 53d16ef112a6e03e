"""Convolutions of any geometry and their transposes (Eq. 8-20); 1d, 2d and 3d are one code."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from frfx import vocabulary
from frfx.linalg import Convolution, Transposed
from frfx.ops import Op, Shape
from frfx.registry import register_rule
from frfx.rules.base import Inversion, SolverRule, one_input

Padding = tuple[tuple[int, int], ...]

_ACCURACY = (
    "exact where dense or iterative, to its tolerance, but damped where padding makes it "
    "ill-conditioned; spectral: the circular model's"
)

_GEOMETRY = ("stride", "padding", "output_padding", "dilation", "groups")


@register_rule(vocabulary.conv)
@dataclass(frozen=True)
class ConvolutionRule(SolverRule):
    """`a* = a^ + A+ (z* - z^)`; without padding, Eq. 19 and 20 in residual form.

    There it is `a^ + F^-1[ K^F(u, v)+ F(pad(z* - z^)) ]`, for any stride, dilation and groups. With
    padding the circular model is refined on the convolution itself, where its conditioning allows;
    `frfx.linalg.auto` has the choice. The options are those of `SolverRule`.
    """

    equation = "Eq. 8-20"
    accuracy = _ACCURACY
    solvers = ("dense", "spectral", "iterative")

    def supports(self, op: Op) -> str | None:
        reason = _one_kernel(op)
        if reason is None and op.output_shape is not None and 0 in op.output_shape:
            return f"it gives nothing: {op.show_shapes()}"
        return reason

    def build(self, op: Op) -> Inversion:
        return self.affine(op, _convolution, key=lambda before, after: before[1:])


@register_rule(vocabulary.conv_transpose)
@dataclass(frozen=True)
class TransposedConvolutionRule(SolverRule):
    """`x* = x^ + A+ (y* - y^)` for the transpose of a convolution.

    The circular model is the adjoint of the convolution's, and as approximate as with padding. The
    options are those of `SolverRule`.
    """

    equation = "Eq. 4 with the transpose of Eq. 8"
    accuracy = _ACCURACY
    solvers = ("dense", "spectral", "iterative")

    def supports(self, op: Op) -> str | None:
        return _one_kernel(op)

    def build(self, op: Op) -> Inversion:
        return self.affine(op, _transposed, key=lambda before, after: (*before[1:], *after[1:]))


def _one_kernel(op: Op) -> str | None:
    """Return why an op is no convolution of one activation with a kernel of the model, or None."""
    reason = one_input(op, "weight", *_GEOMETRY)
    weight = op.tensor("weight")
    if reason or weight is None:
        return reason or "its weight is not one of the model's tensors"
    if op.input_shapes is not None and len(op.input_shapes[0]) != weight.ndim - 1:
        return f"its input has no batch dimension: {op.show_shapes()}"
    return None


def _convolution(op: Op, key: Shape) -> Convolution:
    weight = _weight(op)
    dims = len(key)
    return Convolution(
        weight,
        key,
        stride=op.sizes("stride", dims),
        padding=_padding(op, weight, dims),
        dilation=op.sizes("dilation", dims),
        groups=op.arguments["groups"],
        padding_mode=op.arguments["padding_mode"],
    )


def _padding(op: Op, weight: Tensor, dims: int) -> Padding:
    padding = op.arguments["padding"]
    if padding == "valid":
        return ((0, 0),) * dims
    if padding == "same":  # the odd entry goes behind, as in torch
        reach = zip(op.sizes("dilation", dims), weight.shape[2:], strict=True)
        totals = [d * (k - 1) for d, k in reach]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in op.sizes("padding", dims))


def _transposed(op: Op, key: Shape) -> Transposed:
    weight = _weight(op)
    dims = len(key) // 2
    stride = op.sizes("stride", dims)
    conv = Convolution(
        weight,
        key[dims:],
        stride=stride,
        padding=tuple((p, p) for p in op.sizes("padding", dims)),
        dilation=op.sizes("dilation", dims),
        groups=op.arguments["groups"],
    )
    # An output padding of a stride and more makes room for windows that no entry of the input is.
    excess = [
        (count - n) * s for count, n, s in zip(conv.out_size, key[:dims], stride, strict=True)
    ]
    padding = zip(conv.padding, excess, strict=True)
    return Transposed(replace(conv, padding=tuple((p, q - e) for (p, q), e in padding)))


def _weight(op: Op) -> Tensor:
    weight = op.tensor("weight")
    assert weight is not None  # `supports` has seen to it
    return weight
