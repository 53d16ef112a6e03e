"""Pooling with stride = kernel, and global pooling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from frfx import vocabulary
from frfx.ops import Op, describe
from frfx.registry import register_rule
from frfx.rules.base import Inversion, Rule, one_input, spans_batch

_MAX_POOL = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


def _windows(op: Op) -> str | None:
    """Return why the windows of a pooling op do not tile the image, or None."""
    reason = one_input(op)
    if reason:
        return reason
    dims = _dims(op)
    if _unbatched(op, dims):
        return f"its input has no batch dimension: {op.show_shapes()}"
    kernel = op.sizes("kernel_size", dims)
    stride = kernel if op.arguments["stride"] in (None, (), []) else op.sizes("stride", dims)
    if stride != kernel:
        return f"kernel {kernel} with stride {stride}: only stride = kernel is covered"
    if any(op.sizes("padding", dims)):
        return f"padding {op.arguments['padding']}: only pooling without padding is covered"
    if "dilation" in op.arguments and any(size != 1 for size in op.sizes("dilation", dims)):
        return f"dilation {op.arguments['dilation']}: only dilation 1 is covered"
    if op.arguments.get("return_indices"):
        return "it returns the indices beside the values"
    if op.arguments["ceil_mode"]:
        shapes = op.input_shapes
        if shapes is None:
            return None
        size = shapes[0][1:]
        if any(s % k for s, k in zip(size, kernel, strict=True)):
            return f"ceil_mode with windows of {kernel} that reach beyond the image {size}"
    return None


def _unbatched(op: Op, dims: int) -> bool:
    return op.input_shapes is not None and len(op.input_shapes[0]) != dims + 1


def _dims(op: Op) -> int:
    """Return how many spatial dimensions a pooling op has: every spelling of it says so."""
    spelling = describe(op.spelling).lower()
    return next(dims for dims in (1, 2, 3) if f"{dims}d" in spelling)


class TiledInversion(Inversion):
    """Inverse of an op over windows that tile the image; entries beyond the last window stay.

    Args:
        kernel: The size of a window.
    """

    def __init__(self, kernel: tuple[int, ...]) -> None:
        super().__init__()
        self.kernel = kernel

    def spread(self, pooled: Tensor) -> Tensor:
        """Copy every pooled value to all of its window."""
        for dim, size in enumerate(self.kernel, start=2):
            pooled = pooled.repeat_interleave(size, dim)
        return pooled

    def covered(self, x: Tensor, spread: Tensor) -> Tensor:
        """Return the part of an image that the windows cover, as a view."""
        for dim in range(2, x.ndim):
            x = x.narrow(dim, 0, spread.shape[dim])
        return x

    def place(self, values: Tensor, x: Tensor) -> Tensor:
        """Return the image with its covered part replaced."""
        if values.shape == x.shape:
            return values
        image = x.to(values.dtype).clone()
        self.covered(image, values).copy_(values)
        return image


class CopyToWindow(TiledInversion):
    """Every entry of a window takes the window's target."""

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        return self.place(self.spread(target), inputs[0])


class MinimalMaxUnpool(TiledInversion):
    """The forward maximum takes the target, and what would exceed it is clipped to it."""

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        pool = _MAX_POOL[len(self.kernel) - 1]
        _, argmax = pool(x, self.kernel, return_indices=True)
        clipped = torch.minimum(
            self.covered(x, spread := self.spread(target)).to(target.dtype), spread
        )
        image = self.place(clipped, x).contiguous()
        return (
            image.flatten(2)
            .scatter(2, argmax.flatten(2), target.flatten(2).to(image.dtype))
            .view(image.shape)
        )


@register_rule(vocabulary.max_pool, principle="paper")
@dataclass(frozen=True)
class MaxPoolCopyRule(Rule):
    """Copy every value to its whole window."""

    equation = "Sec. 3.4 (b)"

    def supports(self, op: Op) -> str | None:
        return _windows(op)

    def build(self, op: Op) -> Inversion:
        return CopyToWindow(op.sizes("kernel_size", _dims(op)))


@register_rule(vocabulary.max_pool, principle="minimal")
@dataclass(frozen=True)
class MaxPoolMinimalRule(Rule):
    """The nearest image whose windows have the target as their maximum.

    `min(x^, t)`, and `t` at the forward argmax: raising any other entry, or leaving one above t,
    would deviate more or miss the target.
    """

    equation = "Eq. 4 for max pooling"

    def supports(self, op: Op) -> str | None:
        return _windows(op)

    def build(self, op: Op) -> Inversion:
        return MinimalMaxUnpool(op.sizes("kernel_size", _dims(op)))


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
        return _windows(op)

    def build(self, op: Op) -> Inversion:
        kernel = op.sizes("kernel_size", _dims(op))
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
        if _unbatched(op, _dims(op)):
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
        dims = _mean_dims(op)
        if not dims or spans_batch(op, dims):
            return "it averages over the batch, so samples depend on each other"
        return None

    def build(self, op: Op) -> Inversion:
        return SpreadMean(_mean_dims(op), op.arguments["keepdim"])


def _mean_dims(op: Op) -> tuple[int, ...]:
    """Return the dimensions that a mean is taken over; none stand for all of them."""
    dims = op.arguments["dim"]
    return (dims,) if isinstance(dims, int) else tuple(dims or ())
