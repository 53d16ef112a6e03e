"""Average pooling with stride = kernel, global pooling, and means."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from frfx import vocabulary
from frfx.ops import Op
from frfx.registry import register_rule
from frfx.rules.base import Inversion, Rule, one_input, spans_batch
from frfx.rules.windows import TiledInversion, spatial_dims, tiling, unbatched


class SpreadDeviation(TiledInversion):
    """Every entry of a window takes the deviation of the window's mean, times a factor."""

    def __init__(self, kernel: tuple[int, ...], factor: float = 1.0) -> None:
        super().__init__(kernel)
        self.factor = factor

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        deviation = self.spread(self.factor * (target - output))
        return self.place(self.covered(x, deviation) + deviation, x)


@register_rule(vocabulary.avg_pool)
@dataclass(frozen=True)
class AvgPoolRule(Rule):
    """`x* = x^ + A+ (y* - y^)`: each window shifts by the deviation of its mean."""

    equation = "Eq. 4"

    def supports(self, op: Op) -> str | None:
        return tiling(op)

    def build(self, op: Op) -> Inversion:
        kernel = op.sizes("kernel_size", spatial_dims(op))
        count = 1
        for size in kernel:
            count *= size
        divisor = op.arguments["divisor_override"]
        return SpreadDeviation(kernel, 1.0 if divisor is None else divisor / count)


class SpreadToSize(Inversion):
    """Adaptive pooling onto a size that divides the image: the windows follow from the shapes."""

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        deviation = target - output
        for dim in range(2, x.ndim):
            deviation = deviation.repeat_interleave(x.shape[dim] // output.shape[dim], dim)
        return x + deviation


@register_rule(vocabulary.adaptive_avg_pool)
@dataclass(frozen=True)
class AdaptiveAvgPoolRule(Rule):
    """`x* = x^ + A+ (y* - y^)` for global pooling and all outputs whose size divides the image."""

    equation = "Eq. 4"

    def supports(self, op: Op) -> str | None:
        reason = one_input(op)
        if reason or op.input_shapes is None or op.output_shape is None:
            return reason
        if unbatched(op, spatial_dims(op)):
            return f"its input has no batch dimension: {op.show_shapes()}"
        size, pooled = op.input_shapes[0][1:], op.output_shape[1:]
        if any(s % p for s, p in zip(size, pooled, strict=True)):
            return f"windows of unequal size: the output {pooled} does not divide the image {size}"
        return None

    def build(self, op: Op) -> Inversion:
        return SpreadToSize()


class SpreadMean(Inversion):
    """Inverse of a mean over dimensions.

    Args:
        dims: The dimensions that the mean is taken over.
        keepdim: Whether the op keeps them.
    """

    def __init__(self, dims: tuple[int, ...], keepdim: bool) -> None:
        super().__init__()
        self.dims, self.keepdim = dims, keepdim

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        deviation = target - output
        if not self.keepdim:
            for dim in sorted(d % x.ndim for d in self.dims):
                deviation = deviation.unsqueeze(dim)
        return x + deviation


@register_rule(vocabulary.mean)
@dataclass(frozen=True)
class MeanRule(Rule):
    """`x* = x^ + A+ (y* - y^)`: all entries shift by the deviation of their mean."""

    equation = "Eq. 4"

    def supports(self, op: Op) -> str | None:
        reason = one_input(op, "dim", "keepdim")
        if reason:
            return reason
        dims = _meanspatial_dims(op)
        if not dims or spans_batch(op, dims):
            return "it averages over the batch, so samples depend on each other"
        return None

    def build(self, op: Op) -> Inversion:
        return SpreadMean(_meanspatial_dims(op), op.arguments["keepdim"])


def _meanspatial_dims(op: Op) -> tuple[int, ...]:
    """Return the dimensions that a mean is taken over; none stand for all of them."""
    dims = op.arguments["dim"]
    return (dims,) if isinstance(dims, int) else tuple(dims or ())
