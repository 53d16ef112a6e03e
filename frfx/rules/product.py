"""Products and quotients: affine if one operand stays, else the nearest point that meets it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from frfx import vocabulary
from frfx.errors import InputError
from frfx.linalg import Dense, Diagonal, Factor
from frfx.linalg.pseudo_inverse import (
    Spectrum,
    default_rcond,
    resolve_cutoff,
    solve_dtype,
)
from frfx.ops import Op, Shape
from frfx.registry import register_rule
from frfx.rules.base import AffineInversion, AffineRule, Inversion, check_choice
from frfx.rules.nearest_product import nearest_product, nearest_quotient

Gate = Literal["free", "held"]


@dataclass(frozen=True)
class BroadcastFactor(Factor):
    """The pseudo-inverse of a multiplication that also copies its operand.

    An entry x whose copies are multiplied by `s_j` moves by `sum_j s_j r_j / sum_j s_j^2`.

    Attributes:
        scale: Broadcasts to the result.
        inverse: Of the sums of squares, in the shape (1, *operand).
        spectrum: Their roots in short.
    """

    scale: Tensor
    inverse: Tensor
    spectrum: Spectrum

    def solve(self, residual: Tensor) -> Tensor:
        """Map residuals (N, *out_shape) to deviations (N, *in_shape)."""
        dtype = solve_dtype(residual.dtype)
        scaled = residual.to(dtype) * self.scale.to(dtype)
        return scaled.sum_to_size(len(residual), *self.inverse.shape[1:]) * self.inverse.to(dtype)

    @property
    def nbytes(self) -> int:
        """The memory that the factor holds, in bytes."""
        return self.scale.nbytes + self.inverse.nbytes


class ScaleInversion(AffineInversion):
    """`x* = x^ + A+ (y* - y^)` for a factor that is a number or one of the model's tensors."""

    def __init__(self, op: Op, solver: Dense) -> None:
        super().__init__(op, _diagonal, solver)
        self.options = solver

    def key(self, input_shape: Shape, output_shape: Shape) -> Shape:
        """Return both shapes where the operand is broadcast; else the factor fits all."""
        return () if input_shape == output_shape else (*input_shape, *output_shape)

    def factorize(self, key: Shape) -> Factor:
        """Invert the scale, or the sums of squares over the copies of an entry."""
        if not key:
            return super().factorize(key)
        scale = _diagonal(self.op, key).diagonal
        shape, onto = key[: len(key) // 2], key[len(key) // 2 :]
        squares = scale.double().square().expand(1, *onto).sum_to_size(1, *shape)
        inverse = _inverse_of_squares(squares, squares.amax(), self.options, scale.dtype)
        singular = squares.sqrt()
        spectrum = Spectrum(
            float(singular.amax()), float(singular.amin()), not bool((inverse != 0).all())
        )
        return BroadcastFactor(scale.double(), inverse, spectrum)


def _diagonal(op: Op, key: Shape) -> Diagonal:
    del key
    name = "other" if "input" in op.inputs else "input"
    scale = op.tensor(name)
    if scale is None:
        scale = torch.tensor(op.arguments[name], dtype=torch.float64, device="cpu")
    return Diagonal(scale if op.type is vocabulary.mul else scale.double().reciprocal())


def _inverse_of_squares(
    squares: Tensor, largest: Tensor, solver: Dense, dtype: torch.dtype
) -> Tensor:
    """Return `1 / (s^2 + damping max s^2)`, zero where s is cut off."""
    rcond = max(resolve_cutoff(solver.rcond, solver.damping, default_rcond(dtype, 1)), 0.0)
    kept = squares > rcond**2 * largest
    return torch.where(kept, 1 / torch.where(kept, squares + solver.damping * largest, 1), 0)


class HeldScaleInversion(Inversion):
    """The same for a factor that is an activation and stays: every sample has a scale of its own.

    Args:
        op: A product or quotient, one of whose operands is held.
        solver: Has the cutoff and the damping, both relative to the sample's largest scale.
    """

    def __init__(self, op: Op, solver: Dense) -> None:
        super().__init__()
        self.free = next(i for i, name in enumerate(op.inputs) if name not in op.held)
        self.divides = op.type is vocabulary.div
        self.options = solver

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        x, scale = inputs[self.free], inputs[1 - self.free].double()
        scale = scale.reciprocal() if self.divides else scale
        return rescaled(target, output, x, scale, self.options)


def rescaled(target: Tensor, output: Tensor, x: Tensor, scale: Tensor, solver: Dense) -> Tensor:
    """Return the nearest x whose product with a scale is nearest to the target."""
    dtype = solve_dtype(torch.promote_types(target.dtype, x.dtype))
    residual = (target - output).double()
    squares = scale.square().expand_as(residual).sum_to_size(x.shape)
    largest = squares.amax(tuple(range(1, squares.ndim)), keepdim=True)
    inverse = _inverse_of_squares(squares, largest, solver, dtype)
    return x.to(dtype) + ((scale * residual).sum_to_size(x.shape) * inverse).to(dtype)


class ProductInversion(Inversion):
    """The nearest point of `{s x = t}` for two free factors; the smaller one is s.

    Args:
        gate: ``"free"``, or ``"held"`` to leave a factor that is broadcast over the other as it is.
        solver: Has the cutoff and the damping, for a gate that is held.
    """

    def __init__(self, gate: Gate, solver: Dense) -> None:
        super().__init__()
        self.gate, self.options = gate, solver
        self.solver = "Newton" if gate == "free" else "closed form"

    def forward(  # type: ignore[override]
        self, target: Tensor, output: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        swapped = inputs[0].shape != output.shape
        x, s = reversed(inputs) if swapped else inputs
        if x.shape != output.shape:
            raise InputError(
                f"a product of factors of shapes {tuple(s.shape)} and {tuple(x.shape)}, which are "
                "both broadcast, cannot be inverted: give the policy's node a rule of its own"
            )
        if self.gate == "held" and s.shape != x.shape:
            found = s, rescaled(target, output, x, s.double(), self.options)
        else:
            found = nearest_product(target, output, s, x)
        return found[::-1] if not swapped else found


class QuotientInversion(Inversion):
    """The nearest point of `{a = t b}` for a free numerator a and denominator b."""

    def forward(  # type: ignore[override]
        self, target: Tensor, output: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        return nearest_quotient(target, output, *inputs)


def _supports(op: Op, *alone: str) -> str | None:
    """Return why a product or quotient cannot be inverted, or None.

    Args:
        op: The op.
        *alone: Operands that must not be broadcast over the other.
    """
    if not op.inputs.keys() <= {"input", "other"}:
        return f"it is applied to {' and '.join(op.inputs.values())}, not to two operands"
    if op.computed:
        return "its other operand is computed in the graph, not read from the model"
    if op.input_shapes is None or op.output_shape is None:
        return None
    if any(len(shape) != len(op.output_shape) for shape in op.input_shapes):
        return "it broadcasts an activation to more dimensions, so its samples are not the result's"
    shapes = dict(zip(op.inputs, op.input_shapes, strict=True))
    copied = [name for name in op.free if shapes[name] != op.output_shape]
    if len(op.free) == 2 and len(copied) == 2:
        return "both of its operands are broadcast over the other"
    if len(op.free) == 2 and set(alone) & set(copied):
        return "its numerator is broadcast, so one numerator would have to give several quotients"
    return None


@register_rule(vocabulary.mul)
@dataclass(frozen=True)
class ProductRule(AffineRule):
    """The nearest operands whose product is the target.

    With a number, a parameter or a held activation, `x* = x^ + A+ (y* - y^)` for a diagonal A. Two
    free factors s and x move to the nearest point of `{s x = t}`: all of it is a constraint
    that can be met, at no more cost than with one of them held, and without dividing by a gate that
    is nearly closed.

    Attributes:
        rcond: Of a factor that stays: scales up to this share of the largest count as zero.
        damping: Likewise: Tikhonov's parameter relative to the squared largest scale.
        gate: Of two free factors: ``"held"`` leaves one that is broadcast over the other, such as
            a squeeze-excite gate, as it is; ``"free"`` moves it, too.
    """

    equation = "Eq. 4 for a diagonal; min |ds|^2 + |dx|^2 on {s x = t}"
    accuracy = 'exact; with `gate="held"`, a gate is held'
    solvers = ("dense", "closed form", "Newton")
    gate: Gate = "free"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("gate", self.gate, ("free", "held"))

    def supports(self, op: Op) -> str | None:
        return _supports(op)

    def build(self, op: Op) -> Inversion:
        if len(op.inputs) == 1:
            return ScaleInversion(op, self.dense)
        if len(op.free) == 1:
            return HeldScaleInversion(op, self.dense)
        return ProductInversion(self.gate, self.dense)


@register_rule(vocabulary.div)
@dataclass(frozen=True)
class QuotientRule(AffineRule):
    """The nearest operands whose quotient is the target.

    With a denominator that stays, a product with its reciprocal. A free numerator and denominator
    move to the nearest point of `{a = t b}`.

    Attributes:
        rcond: Of a denominator that stays: reciprocals up to this share of the largest count as
            zero.
        damping: Likewise: Tikhonov's parameter relative to the squared largest reciprocal.
    """

    equation = "Eq. 4 for a diagonal; min |da|^2 + |db|^2 on {a = t b}"
    accuracy = "exact"
    solvers = ("dense", "closed form")

    def supports(self, op: Op) -> str | None:
        if op.arguments.get("rounding_mode") is not None:
            return "it rounds, so nothing can be told from its result"
        if "input" not in op.free:
            return "it divides by the activation, which is not affine"
        return _supports(op, "input")

    def build(self, op: Op) -> Inversion:
        if len(op.inputs) == 1:
            return ScaleInversion(op, self.dense)
        if len(op.free) == 1:
            return HeldScaleInversion(op, self.dense)
        return QuotientInversion()
