"""Activations: the nearest preimage, entry by entry (Sec. 3.4 (a)).

Every activation is a line of a table. What a line says: the inverse, and the range that targets are
limited to first. An end of the range that the function reaches is a limit itself; from one that it
only approaches a margin is kept (`clamp_margin`, relative to half the range, or to the distance of
a single end from zero, or absolute if that end is zero). Where the limited target equals the
limited forward value, the forward input is its own nearest preimage and stays.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frfx import vocabulary
from frfx.errors import RegistryError
from frfx.ops import Op, OpType, Shape
from frfx.registry import register_rule
from frfx.rules import dip, preimage
from frfx.rules.base import FactoredInversion, Inversion, Rule, keeps_shape, one_input
from frfx.rules.parts import by_parts
from frfx.rules.shape import PassThrough
from frfx.rules.where import where_equal

Range = tuple[float, float]


@dataclass(frozen=True)
class Elementwise:
    """How a function of single entries is inverted.

    Attributes:
        name: What the summary calls it.
        nearest: `(y, x, **arguments)` to the preimage of y that is nearest to x.
        range: `(**arguments)` to the ends of the function's range; to an empty one for arguments
            with which it cannot be inverted.
        attained: Whether the function reaches finite ends of its range.
        functor: `(**arguments)` to what computes the same in kernels/activation.cu, if any does.
        increases: Whether it is a bijection that increases, whatever its arguments, and so is what
            inverts it.
        flat: Whether it is constant somewhere.
    """

    name: str
    nearest: Callable[..., Tensor]
    range: Callable[..., Range]
    attained: bool = False
    functor: Callable[..., str] | None = None
    increases: bool = False
    flat: bool = False


class ElementwiseInversion(Inversion):
    """Limits the target to the range and takes the nearest preimage."""

    def __init__(self, function: Elementwise, arguments: dict[str, Any], margin: float) -> None:
        super().__init__()
        self.function, self.arguments = function, arguments
        self.limits = _limits(function, arguments, margin)
        self.functor = function.functor(**arguments) if function.functor else None

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        kernels = self.backend.kernels_for(target, output, x)
        if kernels and self.functor:
            return kernels.preimage(self.functor, target, output, x, self.limits)
        return by_parts(self._nearest, target, output, x)

    def _nearest(self, target: Tensor, output: Tensor, x: Tensor) -> Tensor:
        wanted = target.clamp(*self.limits)
        had = output.to(target.dtype).clamp(*self.limits)
        preimage = self.function.nearest(wanted, x, **self.arguments)
        # There, rounding of the target is no reason to move an entry far.
        rounding = torch.finfo(wanted.dtype).eps ** 0.75 if self.function.flat else 0.0
        return where_equal(wanted, had, x, preimage, rounding)


def _limits(function: Elementwise, arguments: dict[str, Any], margin: float) -> Range:
    low, high = function.range(**arguments)
    if function.attained:
        return low, high
    if math.isfinite(low) and math.isfinite(high):
        margin *= (high - low) / 2
    else:
        margin *= next((abs(end) for end in (low, high) if math.isfinite(end) and end), 1.0)
    return low + margin, high - margin


@dataclass(frozen=True)
class ElementwiseRule(Rule):
    """The nearest preimage of the target, limited to the function's range.

    Attributes:
        function: What is inverted.
        clamp_margin: How far targets stay from an end of the range that the function does not
            reach, relative to half the range.
    """

    equation = "Sec. 3.4 (a)"
    anywhere = True
    function: Elementwise
    clamp_margin: float = 1e-3

    @property
    def accuracy(self) -> str:  # type: ignore[override]
        """Whether every target has a nearest preimage."""
        ends = self.function.range()
        if self.function.attained or not any(map(math.isfinite, ends)):
            return "exact"
        return "exact, but for `clamp_margin` where the range is open"

    def supports(self, op: Op) -> str | None:
        if op.type is not None and op.type.parametric:
            return "it is no function of single entries"
        reason = one_input(op, *op.computed) or keeps_shape(op)
        if reason:
            return reason
        if op.tensor_of and op.module is None:
            return f"its {' and '.join(op.tensor_of)} must be given as a number, not as a tensor"
        low, high = self.function.range(**op.arguments)
        if not low < high:
            given = ", ".join(f"{name}={value}" for name, value in op.arguments.items())
            return f"no range is known to invert it on with {given}"
        return None

    def build(self, op: Op) -> Inversion:
        return ElementwiseInversion(self.function, dict(op.arguments), self.clamp_margin)

    def __str__(self) -> str:
        margin = "" if self.clamp_margin == 1e-3 else f", clamp_margin={self.clamp_margin}"
        return f"ElementwiseRule({self.function.name}{margin})"


def _everywhere(**_: Any) -> Range:
    return -math.inf, math.inf


def _ignoring_input(y: Tensor, x: Tensor, *, inverse: Callable[..., Tensor], **kw: Any) -> Tensor:
    del x
    return inverse(y, **kw)


def _constant(value: Any, /, **_: Any) -> Any:
    return value


def _enter(
    op: OpType | tuple[Hashable, ...],
    nearest: Callable[..., Tensor],
    range: Range | Callable[..., Range] = _everywhere,
    *,
    attained: bool = False,
    principle: str | None = None,
    overwrite: bool = False,
    functor: str | Callable[..., str] | None = None,
    increases: bool = False,
    flat: bool = False,
) -> None:
    spellings = op if isinstance(op, tuple) else (op,)
    limits = range if callable(range) else functools.partial(_constant, range)
    if isinstance(functor, str):
        functor = functools.partial(_constant, functor)
    name = (
        op.name if isinstance(op, OpType) else getattr(spellings[0], "__name__", str(spellings[0]))
    )
    function = Elementwise(name, nearest, limits, attained, functor, increases, flat)
    factory = functools.partial(ElementwiseRule, function)
    register_rule(*spellings, principle=principle, overwrite=overwrite)(factory)


def register_elementwise(
    op: Hashable | tuple[Hashable, ...],
    *,
    inverse: Callable[..., Tensor] | None = None,
    nearest: Callable[..., Tensor] | None = None,
    range: Range = (-math.inf, math.inf),
    attained: bool = False,
    overwrite: bool = False,
) -> None:
    """Register the inverse of a function of single entries.

    Args:
        op: A module class, function, name of a tensor method or ATen overload, or a tuple of
            spellings of the same op.
        inverse: The inverse of a bijection onto its range: a function of the target, of any shape:
            large ones come in parts. It gets the op's further arguments by name, if it has any.
        nearest: Instead of `inverse`, for a function that is not injective: a function of the
            target and the forward input that returns the preimage nearest to the latter.
        range: The ends of the function's range; targets are limited to it first.
        attained: Whether the function reaches the finite ends; if not, targets keep the policy's
            `clamp_margin` from them.
        overwrite: Whether to replace a rule that is there.

    Raises:
        RegistryError: If a rule is there already, or not exactly one of `inverse` and `nearest`
            is given, or the range is empty.

    Example:
        >>> frfx.register_elementwise((torch.exp, "exp"), inverse=torch.log, range=(0, math.inf))
    """
    if (inverse is None) == (nearest is None):
        raise RegistryError("give either `inverse`, a function of the target, or `nearest`")
    if not range[0] < range[1]:
        raise RegistryError(f"the range {range} is empty")
    if inverse is not None:
        nearest = functools.partial(_ignoring_input, inverse=inverse)
    assert nearest is not None
    spellings = op if isinstance(op, tuple) else (op,)
    _enter(spellings, nearest, range, attained=attained, overwrite=overwrite)


def _bijection(
    op: OpType,
    inverse: Callable[..., Tensor],
    range: Range | Callable[..., Range] = _everywhere,
    functor: str | None = None,
    increases: bool = True,
) -> None:
    nearest = functools.partial(_ignoring_input, inverse=inverse)
    _enter(op, nearest, range, functor=functor, increases=increases)


def _gelu_functor(approximate: str = "none") -> str:
    return "Dip<GeluTanh>" if approximate == "tanh" else "Dip<Gelu>"


# Bijections onto the real line, or with an open range.
_bijection(vocabulary.sinh, torch.asinh)
_bijection(vocabulary.asinh, torch.sinh)
_bijection(vocabulary.tanh, torch.atanh, (-1, 1), functor="Tanh")
_bijection(vocabulary.sigmoid, torch.logit, (0, 1), functor="Sigmoid")
_bijection(vocabulary.atan, torch.tan, (-math.pi / 2, math.pi / 2))
_bijection(vocabulary.softsign, preimage.softsign, (-1, 1))
_bijection(vocabulary.logsigmoid, preimage.logsigmoid, (-math.inf, 0))
_bijection(vocabulary.elu, preimage.elu, preimage.elu_range, increases=False)  # not for alpha = 0
_bijection(vocabulary.selu, preimage.selu, preimage.selu_range)
_bijection(vocabulary.celu, preimage.celu, preimage.elu_range, increases=False)

# Ranges whose ends are reached by whole intervals.
_flat = functools.partial(_enter, attained=True, flat=True)
_identity = functools.partial(_flat, nearest=preimage.identity, functor="Identity")
_identity(vocabulary.relu, range=(0, math.inf), principle="minimal")
_identity(vocabulary.relu6, range=(0, 6))
_identity(vocabulary.hardtanh, range=preimage.hardtanh_range)
_identity(vocabulary.clamp, range=preimage.clamp_range)
_flat(vocabulary.hardsigmoid, preimage.hardsigmoid, (0, 1))

# Several preimages.
_enter(vocabulary.absolute, preimage.absolute, (0, math.inf), attained=True)
_enter(vocabulary.softplus, preimage.softplus, preimage.softplus_range)
_enter(vocabulary.leaky_relu, preimage.leaky_relu)
_enter(vocabulary.sin, preimage.sin, (-1, 1), attained=True, principle="minimal")
_dip = functools.partial(_enter, attained=True)
_dip(vocabulary.silu, dip.silu, (dip.SILU.minimum, math.inf), functor="Dip<Silu>")
_dip(vocabulary.gelu, dip.gelu, dip.gelu_range, functor=_gelu_functor)
_dip(vocabulary.mish, dip.mish, (dip.MISH.minimum, math.inf), functor="Dip<Mish>")
_flat(vocabulary.hardswish, preimage.hardswish, (-0.375, math.inf))


@register_rule(vocabulary.relu, principle="paper")
@dataclass(frozen=True)
class ReluIdentityRule(Rule):
    """The paper's choice for ReLU: the identity map."""

    equation = "Sec. 3.4 (a.iii)"
    accuracy = "approximate: the target itself, also where the unit is off"
    anywhere = True

    def supports(self, op: Op) -> str | None:
        return one_input(op) or keeps_shape(op)

    def build(self, op: Op) -> Inversion:
        return PassThrough()


class NormalizedArcsin(Inversion):
    """Divides each sample by its largest magnitude if that exceeds 1, then takes the arcsine."""

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        dims = tuple(range(1, target.ndim))
        largest = target.abs().amax(dims, keepdim=True) if dims else target.abs()
        return torch.asin(target / largest.clamp(min=1))


@register_rule(vocabulary.sin, principle="paper")
@dataclass(frozen=True)
class SinPaperRule(Rule):
    """The paper's choice for sine: normalised into [-1, 1], then the principal arcsine."""

    equation = "Sec. 3.4 (a.iii)"
    accuracy = "approximate: the principal arcsine of the normalised target"

    def supports(self, op: Op) -> str | None:
        return one_input(op)

    def build(self, op: Op) -> Inversion:
        return NormalizedArcsin()


class PReluInversion(FactoredInversion):
    """Nearest preimage under a leaky ReLU whose slope is the model's parameter."""

    def key(self, input_shape: Shape, output_shape: Shape) -> Shape:
        return (len(input_shape),)

    def factorize(self, key: Shape) -> preimage.Slope:
        slope = self.op.tensor("weight")
        assert slope is not None  # `supports` has seen to it
        return preimage.Slope(
            slope if slope.numel() == 1 else slope.reshape(-1, *[1] * (key[0] - 1))
        )

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        x_star = preimage.leaky_relu(target, x, self.factor(x, output).slope)
        return where_equal(target, output, x, x_star)


@register_rule(vocabulary.prelu)
@dataclass(frozen=True)
class PReluRule(Rule):
    """The nearest preimage for every slope: positive, zero (as ReLU) or negative (two branches)."""

    equation = "Sec. 3.4 (a)"
    accuracy = "exact"

    def supports(self, op: Op) -> str | None:
        return one_input(op, "weight")

    def build(self, op: Op) -> Inversion:
        return PReluInversion(op)
