"""Average pooling of any geometry, adaptive and global pooling, and means."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from frfx import vocabulary
from frfx.linalg import Dense, Factor
from frfx.linalg.pseudo_inverse import Spectrum, solve_dtype
from frfx.ops import Op, Shape
from frfx.registry import register_rule
from frfx.rules.base import AffineRule, Inversion, one_input, spans_batch
from frfx.rules.separable import Dimension, SeparableInversion, equal_singular_values
from frfx.rules.windows import spatial_dims, window_sizes


@dataclass(frozen=True)
class Spread(Factor):
    """The pseudo-inverse of averages over windows that tile the image: copies, times a number.

    Attributes:
        kernel: The size of a window.
        beyond: How many entries lie behind the last window, by dimension.
        share: What the copies are multiplied by.
        spectrum: The operator's singular values in short: they are all the same.
    """

    kernel: tuple[int, ...]
    beyond: tuple[int, ...]
    share: float
    spectrum: Spectrum

    def solve(self, residual: Tensor) -> Tensor:
        """Copy every entry to all of its window."""
        deviation = self.share * residual.to(solve_dtype(residual.dtype))
        for back, size in enumerate(reversed(self.kernel), start=1):  # as memory is read
            if deviation.shape[-back] == 1:
                deviation = deviation.transpose(-back, -1).expand(*[-1] * (residual.ndim - 1), size)
                deviation = deviation.transpose(-back, -1)
            elif size != 1:
                deviation = deviation.repeat_interleave(size, -back)
        if any(self.beyond):
            deviation = F.pad(deviation, [n for rest in self.beyond[::-1] for n in (0, rest)])
        return deviation

    @property
    def nbytes(self) -> int:
        """The memory that the factor holds: none."""
        return 0


def _spread(kernel: tuple[int, ...], divisor: float, key: Shape, solver: Dense) -> Spread:
    """Return the pseudo-inverse of sums over windows that tile an image, divided by a number.

    Args:
        kernel: The size of a window.
        divisor: What the sums are divided by.
        key: The sizes of the dimensions, before and after.
        solver: Has the cutoff and the damping; both see one singular value only.
    """
    count, dims = math.prod(kernel), len(kernel)
    singular = math.sqrt(count) / abs(divisor)
    left = equal_singular_values(solver)
    sizes = zip(key[:dims], key[dims:], kernel, strict=True)
    beyond = tuple(size - onto * window for size, onto, window in sizes)
    return Spread(kernel, beyond, left * divisor / count, Spectrum(singular, singular, left == 0))


class AverageInversion(SeparableInversion):
    """Average pooling; windows that tile the image need no matrices."""

    def __init__(self, op: Op, solver: Dense) -> None:
        super().__init__(op, spatial_dims(op), self._averages, solver)
        names = ("kernel_size", "stride", "padding")
        self.kernel, self.stride, self.padding = (window_sizes(op, name) for name in names)
        self.divisor = op.arguments["divisor_override"]

    def factorize(self, key: Shape) -> Factor:
        """Factor the pooling of one image size."""
        dims = len(self.kernel)
        sizes = zip(key[:dims], key[dims:], self.kernel, strict=True)
        within = all(onto * window <= size for size, onto, window in sizes)
        if self.stride == self.kernel and not any(self.padding) and within:
            divisor = self.divisor or math.prod(self.kernel)
            return _spread(self.kernel, divisor, key, self.options)
        return super().factorize(key)

    def _averages(self, dim: Dimension) -> Tensor:
        """Return what pooling does along one dimension: the divisors are products, too."""
        alone, arguments = dim.alone(), self.op.arguments
        images = F.avg_pool1d(
            alone.impulses(),
            self.kernel[dim.index],
            self.stride[dim.index],
            self.padding[dim.index],
            arguments["ceil_mode"],
            arguments["count_include_pad"],
        )
        matrix = alone.response(images)
        if self.divisor is None:
            return matrix
        windows = (matrix != 0).double()
        return windows / self.divisor if dim.index == 0 else windows


@register_rule(vocabulary.avg_pool)
@dataclass(frozen=True)
class AvgPoolRule(AffineRule):
    """`x* = x^ + A+ (y* - y^)`, whether windows overlap, are padded or reach beyond the image.

    Average pooling is a matrix a spatial dimension, and so is its pseudo-inverse. Where windows
    tile the image, each just shifts by the deviation of its mean.

    The options are those of `AffineRule`.
    """

    equation = "Eq. 4-7"
    accuracy = "exact"
    solvers = ("separable",)

    def supports(self, op: Op) -> str | None:
        windows = ("kernel_size", "stride", "padding")
        return one_input(op, *windows, "ceil_mode", "count_include_pad", "divisor_override")

    def build(self, op: Op) -> Inversion:
        return AverageInversion(op, self.dense)


class AdaptiveInversion(SeparableInversion):
    """Adaptive average pooling; windows that tile the image need no matrices."""

    def __init__(self, op: Op, solver: Dense) -> None:
        super().__init__(op, spatial_dims(op), adaptive_averages, solver)

    @property
    def _onto(self) -> tuple[int | None, ...]:
        size = self.op.arguments["output_size"]
        sizes = tuple(size) if isinstance(size, (list, tuple)) else (size,)
        return sizes * spatial_dims(self.op) if len(sizes) == 1 else sizes

    @property
    def may_enlarge(self) -> bool:
        """Whether a size is given that some images are smaller than."""
        given = "output_size" in self.op.arguments  # else the graph computes it
        return given and any(size is not None and size > 1 for size in self._onto)

    def onto(self, shape: Shape) -> Shape:
        """Return the shape of what an image of a shape is pooled to, both without the batch."""
        leading, sizes = shape[: -len(self._onto)], shape[-len(self._onto) :]
        asked = zip(sizes, self._onto, strict=True)
        return (*leading, *(size if onto is None else onto for size, onto in asked))

    def factorize(self, key: Shape) -> Factor:
        """Factor the pooling from one size onto another."""
        dims = len(key) // 2
        sizes = list(zip(key[:dims], key[dims:], strict=True))
        if any(size % onto for size, onto in sizes):
            return super().factorize(key)
        kernel = tuple(size // onto for size, onto in sizes)
        return _spread(kernel, math.prod(kernel), key, self.options)


def adaptive_averages(dim: Dimension) -> Tensor:
    """Return the matrix of adaptive average pooling along one dimension."""
    alone = dim.alone()
    return alone.response(F.adaptive_avg_pool1d(alone.impulses(), dim.onto))


@register_rule(vocabulary.adaptive_avg_pool)
@dataclass(frozen=True)
class AdaptiveAvgPoolRule(AffineRule):
    """`x* = x^ + A+ (y* - y^)` for outputs of any size, smaller or larger than the image.

    The options are those of `AffineRule`.
    """

    equation = "Eq. 4-7"
    accuracy = "exact"
    solvers = ("separable",)

    def supports(self, op: Op) -> str | None:
        return one_input(op)

    def build(self, op: Op) -> Inversion:
        return AdaptiveInversion(op, self.dense)


class SpreadMean(Inversion):
    """Inverse of a mean over dimensions.

    Args:
        dims: The dimensions that the mean is taken over.
        keepdim: Whether the op keeps them.
        factor: What the deviation is multiplied by.
    """

    def __init__(self, dims: tuple[int, ...], keepdim: bool, factor: float = 1.0) -> None:
        super().__init__()
        self.dims, self.keepdim, self.factor = dims, keepdim, factor

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        deviation = self.factor * (target - output)
        if not self.keepdim:
            for dim in sorted(d % x.ndim for d in self.dims):
                deviation = deviation.unsqueeze(dim)
        return x + deviation


@register_rule(vocabulary.mean)
@dataclass(frozen=True)
class MeanRule(AffineRule):
    """`x* = x^ + A+ (y* - y^)`: all entries shift by the deviation of their mean.

    Attributes:
        rcond: Cuts everything off from 1 on: the singular values are all the same.
        damping: Tikhonov's parameter relative to the squared singular value.
    """

    equation = "Eq. 4"
    accuracy = "exact"

    def supports(self, op: Op) -> str | None:
        reason = one_input(op, "dim", "keepdim")
        if reason:
            return reason
        dims = _mean_dims(op)
        if not dims or spans_batch(op, dims):
            return "it averages over the batch, so samples depend on each other"
        return None

    def build(self, op: Op) -> Inversion:
        factor = equal_singular_values(self.dense)
        return SpreadMean(_mean_dims(op), op.arguments["keepdim"], factor)


def _mean_dims(op: Op) -> tuple[int, ...]:
    """Return the dimensions that a mean is taken over; none stand for all of them."""
    dims = op.arguments["dim"]
    return (dims,) if isinstance(dims, int) else tuple(dims or ())
