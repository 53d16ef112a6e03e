"""Normalisation: batch norm in evaluation mode; layer, group, instance and RMS norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from frfx import vocabulary
from frfx.linalg import Dense, Diagonal
from frfx.linalg.pseudo_inverse import Spectrum, default_rcond, solve_dtype
from frfx.ops import Op, Shape
from frfx.registry import register_rule
from frfx.rules.base import (
    AffineInversion,
    AffineRule,
    FactoredInversion,
    Inversion,
    check_choice,
    one_input,
)


@register_rule(vocabulary.batch_norm)
@dataclass(frozen=True)
class BatchNormRule(AffineRule):
    """`x* = x^ + (y* - y^) / scale` by channel; channels of scale zero keep their value.

    Minimal deviation for the affine map that batch norm is once its statistics are fixed.

    Attributes:
        rcond: Scales up to this share of the largest count as zero.
        damping: Tikhonov's parameter relative to the squared largest scale.
    """

    equation = "Eq. 4 for a diagonal"
    accuracy = "exact"
    solvers = ("dense",)

    def supports(self, op: Op) -> str | None:
        reason = one_input(op, "weight", "running_mean", "running_var", "eps")
        if reason:
            return reason
        if op.arguments.get("training") or "running_var" not in op.tensor_of:
            return "it normalises with the statistics of the batch, so samples depend on each other"
        return None

    def build(self, op: Op) -> Inversion:
        return _with_running_statistics(op, self.dense)


def _with_running_statistics(op: Op, solver: Dense) -> Inversion:
    return AffineInversion(op, _running_scale, solver, key=lambda before, after: (len(before),))


def _running_scale(op: Op, key: Shape) -> Diagonal:
    variance, weight = op.tensor("running_var"), op.tensor("weight")
    assert variance is not None  # `supports` has seen to it
    # Computed in double, kept in single at least: half would round the scale itself.
    scale = (variance.double() + op.arguments["eps"]).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    return Diagonal(scale.to(solve_dtype(variance.dtype)).reshape(-1, *[1] * (key[0] - 1)))


@dataclass(frozen=True)
class Weights:
    """The weights of a normalisation, laid out as `NormalizationInversion.rows` lays out `x`.

    Attributes:
        weight: Broadcasts to the rows.
        largest: The largest absolute weight of each row; broadcasts likewise.
        spectrum: The weights in short; the statistics differ from sample to sample.
    """

    weight: Tensor
    largest: Tensor
    spectrum: Spectrum

    @property
    def nbytes(self) -> int:
        """The memory that they hold, in bytes."""
        return self.weight.nbytes + self.largest.nbytes


class NormalizationInversion(FactoredInversion):
    """Inverse of `y = w (x - mean) / sqrt(variance + eps) + b` over the rows of every sample.

    What is normalised together is called a row, whatever its dimensions.

    Args:
        op: Layer, group, instance or RMS norm.
        solver: Has the cutoff and the damping for scales.
    """

    def __init__(self, op: Op, solver: Dense) -> None:
        super().__init__(op)
        self.rcond, self.damping = solver.rcond, solver.damping
        self.groups = op.arguments.get("num_groups")
        shape = op.arguments.get("normalized_shape")
        self.row_dims = len(shape) if isinstance(shape, (tuple, list)) else 1
        self.by_channel = op.type in (vocabulary.group_norm, vocabulary.instance_norm)
        self.centred = op.type is not vocabulary.rms_norm

    def key(self, input_shape: Shape, output_shape: Shape) -> Shape:
        """Return how many dimensions there are: weights by channel are laid out accordingly."""
        del output_shape
        return (len(input_shape),)

    def factorize(self, key: Shape) -> Weights:
        """Lay out the weights as they are now."""
        dtype = solve_dtype(self.like.dtype)
        read = self.op.tensor("weight")
        weight = torch.ones((), dtype=dtype, device=self.like.device) if read is None else read
        weight = weight.to(dtype)
        if self.by_channel and weight.ndim:
            weight = weight.reshape(-1, *[1] * (key[0] - 1))
            if self.groups is not None:
                weight = weight.unflatten(0, (self.groups, -1))
        size = weight.abs()
        largest = size.amax(self._dims(weight.ndim + 1), keepdim=True) if size.ndim else size
        cutoff = self.cutoff * size.amax()
        spectrum = Spectrum(float(size.amax()), float(size.amin()), bool((size <= cutoff).any()))
        return Weights(weight.contiguous(), largest, spectrum)

    @property
    def cutoff(self) -> float:
        """Scales up to this share of the largest count as zero."""
        return default_rcond(self.like.dtype, 1) if self.rcond is None else self.rcond

    def rows(self, values: Tensor) -> Tensor:
        """Return values with the dimensions that are normalised together at the end."""
        return values if self.groups is None else values.unflatten(1, (self.groups, -1))

    def _dims(self, ndim: int) -> tuple[int, ...]:
        """Return the dimensions that are normalised together, of rows of so many dimensions."""
        return tuple(range(2 - ndim if self.by_channel else -self.row_dims, 0))

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows' means (0 for RMS norm), deviations from them, and standard deviations.

        The latter as the op computes them: without Bessel's correction, and with eps.
        """
        dims = self._dims(x.ndim)
        mean = x.mean(dims, keepdim=True) if self.centred else x.new_zeros(())
        centred = x - mean
        return mean, centred, (centred.square().mean(dims, keepdim=True) + self.eps(x)).sqrt()

    def eps(self, x: Tensor) -> float:
        """Return what the op adds to the variance."""
        eps = self.op.arguments["eps"]
        return torch.finfo(solve_dtype(x.dtype)).eps if eps is None else eps

    def divide(self, residual: Tensor, scale: Tensor, largest: Tensor) -> Tensor:
        """Return `residual / scale`, damped; zero for scales that count as zero."""
        kept = scale.abs() > self.cutoff * largest
        square = scale.square() + self.damping * largest.square()
        return torch.where(kept, residual * scale / torch.where(kept, square, 1), 0)


class HeldStatistics(NormalizationInversion):
    """`x* = x^ + (y* - y^) std^ / w`: the statistics of the forward pass are held."""

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        weights = self.factor(x, output)
        dtype = weights.weight.dtype
        _, _, std = self.statistics(self.rows(x.to(dtype)))
        residual = self.rows((target - output).to(dtype))
        # The largest scale of a sample, in units of each row's own 1 / std.
        sample = tuple(range(1, std.ndim))
        largest = (weights.largest / std).amax(sample, keepdim=True) * std
        deviation = std * self.divide(residual, weights.weight, largest)
        return x + deviation.reshape(x.shape)


class FreeStatistics(NormalizationInversion):
    """The nearest rows whose normalisation is the target's, whatever their statistics.

    `NormalizationRule` derives it.
    """

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        weights = self.factor(x, output)
        dtype, largest = weights.weight.dtype, weights.largest.amax()
        given = self.rows(x.to(dtype))
        dims = self._dims(given.ndim)
        mean, centred, std = self.statistics(given)
        residual = self.rows((target - output).to(dtype))
        wanted = centred / std + self.divide(residual, weights.weight, largest)
        offset = wanted.mean(dims, keepdim=True) if self.centred else torch.zeros_like(std)
        direction = wanted - offset
        square = direction.square().mean(dims, keepdim=True)
        along = (centred * direction).mean(dims, keepdim=True).clamp(min=0)
        length = along / torch.where(square > 0, square, 1)
        known = self.divide(self.rows(output.to(dtype)), weights.weight, largest)
        size = known.square().mean(dims, keepdim=True).sqrt() + square.sqrt()
        noise = _ROUNDINGS * torch.finfo(output.dtype).eps * size
        lost = square <= noise.square()
        eps = self.eps(x)
        if eps > 0:
            low, high = (square + sign * 2 * noise * square.sqrt() for sign in (-1, 1))
            reachable = (offset.abs() <= noise) & (low < 1)
            shortest = (eps / (1 - low.clamp(0, 1))).sqrt()
            longest = (eps / (1 - high.clamp(0, 1))).sqrt()  # infinite from 1 on
            exact = torch.minimum(torch.maximum(length, shortest), longest)
            length = torch.where(reachable, exact, length)
            lost = lost & ~reachable
        asked = residual.abs().amax(dims, keepdim=True) > 0
        found = torch.where(asked & ~lost, mean + length * direction, given)
        return found.reshape(x.shape)


_ROUNDINGS = 16
"""So many units of rounding a target may be off its range and still count as reachable."""


@register_rule(vocabulary.layer_norm)
@register_rule(vocabulary.group_norm)
@register_rule(vocabulary.instance_norm)
@register_rule(vocabulary.rms_norm)
@dataclass(frozen=True)
class NormalizationRule(AffineRule):
    """Layer, group, instance and RMS norm, `y = w n(x) + b` over each row of a sample.

    With statistics ``"forward"``, mean and variance are held at their forward values, so that the
    op is a diagonal and `x* = x^ + (y* - y^) std^ / w`. Entries of weight zero keep their value.

    With ``"free"``, they are those of the result. Let `v = (y* - b) / w`. But for eps, `n(x)` is
    `v` for all `x = mu 1 + sigma v` with any mu and any sigma > 0, if v has mean 0 and mean square
    1; another v is first centred, and only its direction counts, for n reaches no other. The
    nearest such x is the projection of `x^` on these: `mu = mean(x^)`, `sigma = <x^ - mu, v> /
    <v, v>`, or 0, the end of the ray, where that is negative. With eps, n maps `mu 1 + sigma v` to
    `v` if v has mean 0 and a mean square r < 1, and `sigma = sqrt(eps / (1 - r))` alone: these
    targets can be reached, and are. Where 1 - r drowns in rounding, so that many sigma reach the
    target, the one nearest to the projection's is taken. RMS norm is the same without a mean.
    What weights of zero hide keeps its forward direction, and rows that nothing is asked of, or
    of which no direction is asked, stay.

    Instance norm that tracks running statistics is a diagonal of its own, as batch norm is.

    Attributes:
        statistics: ``"forward"`` or ``"free"``.
        rcond: Scales up to this share of the largest of a sample count as zero.
        damping: Tikhonov's parameter relative to the squared largest scale of a sample.
    """

    equation = "Eq. 4"
    accuracy = (
        'approximate: the statistics are held; with `statistics="free"`, only the '
        "direction of what is out of reach counts"
    )
    solvers = ("closed form", "dense")
    statistics: Literal["forward", "free"] = "forward"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("statistics", self.statistics, ("forward", "free"))

    def supports(self, op: Op) -> str | None:
        read = ("weight", "bias", "eps", "normalized_shape", "num_groups", "use_input_stats")
        reason = one_input(op, *read, "running_mean", "running_var")
        if reason is not None or op.input_shapes is None:
            return reason
        shape = op.input_shapes[0]
        if len(op.arguments.get("normalized_shape", ())) > len(shape):
            return "it normalises over the batch, so samples depend on each other"
        if op.type is vocabulary.instance_norm and not _has_batch(op, shape):
            return f"its input has no batch dimension: {op.show_shapes()}"
        return None

    def build(self, op: Op) -> Inversion:
        if op.type is vocabulary.instance_norm and _runs(op):
            return _with_running_statistics(op, self.dense)
        kind = HeldStatistics if self.statistics == "forward" else FreeStatistics
        return kind(op, self.dense)


def _runs(op: Op) -> bool:
    """Return whether an instance norm uses running statistics in evaluation mode."""
    if op.module is not None:
        return bool(op.module.track_running_stats) and "running_var" in op.tensor_of
    return not op.arguments["use_input_stats"]


def _has_batch(op: Op, shape: Shape) -> bool:
    """Return whether an instance norm sees the batch as one: its modules know their dimensions."""
    name = type(op.module).__name__
    return op.module is None or any(f"{d}d" in name and len(shape) == d + 1 for d in (1, 2, 3))
