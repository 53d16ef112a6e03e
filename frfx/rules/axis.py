"""The windows of an op along one dimension of an image.

Windows over several dimensions are products of these, so the least and the largest value over them
are taken one dimension after the other.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from frfx.ops import Shape


@dataclass(frozen=True)
class Axis(abc.ABC):
    """Windows along one dimension; in its frame, window j reads `j * stride + o * dilation`.

    Attributes:
        size: The entries of the image.
        count: The windows.
        kernel: The entries of a window.
        stride: From one window to the next, in the frame.
        dilation: From one entry of a window to the next, in the frame.
    """

    size: int
    count: int
    kernel: int
    stride: int
    dilation: int

    @property
    @abc.abstractmethod
    def disjoint(self) -> bool:
        """Whether no window reaches into the next."""

    @property
    @abc.abstractmethod
    def free(self) -> bool:
        """Whether every window surely reads an entry that no other reads."""

    @property
    @abc.abstractmethod
    def complete(self) -> bool:
        """Whether every entry surely is read by a window."""

    @property
    @abc.abstractmethod
    def inside(self) -> bool:
        """Whether the frame is a part of the image, and no copy of it."""

    @abc.abstractmethod
    def frame(self, image: Tensor, dim: int, fill: float) -> Tensor:
        """Return what the windows read of an image, and `fill` where they read nothing."""

    @abc.abstractmethod
    def fold(self, frame: Tensor, dim: int) -> Tensor:
        """Return the transpose of `frame`: every entry of the image is the sum of its copies."""

    @abc.abstractmethod
    def lowest(self, pooled: Tensor, dim: int) -> Tensor:
        """Return for every entry the least value of the windows that read it, or infinity."""

    def tap(self, frame: Tensor, dim: int, offset: int) -> Tensor:
        """Return the entry at an offset of every window, as a view of the frame."""
        first = offset * self.dilation
        behind = first + (self.count - 1) * self.stride + 1
        return frame[(*[slice(None)] * dim, slice(first, behind, self.stride))]


@dataclass(frozen=True)
class RegularAxis(Axis):
    """Windows of one size at equal distances; the frame is the image with its padding.

    Attributes:
        padding: How far the first window begins in front of the image.
    """

    padding: int

    @property
    def disjoint(self) -> bool:
        return self.count == 1 or self._extent <= self.stride

    @property
    def free(self) -> bool:
        # The outermost windows are the first to lose to the padding what they read alone.
        last = (self.count - 1) * self.stride - self.padding
        within = self.padding < self.stride and last + self.kernel - self.stride < self.size
        return self.disjoint or (self.dilation == 1 and self.kernel < 2 * self.stride and within)

    @property
    def complete(self) -> bool:
        behind = (self.count - 1) * self.stride + self.kernel - self.padding
        return self.dilation == 1 and self.kernel >= self.stride and behind >= self.size

    @property
    def inside(self) -> bool:
        before, after = self._margins
        return before <= 0 and after <= 0

    @property
    def _extent(self) -> int:
        return (self.kernel - 1) * self.dilation + 1

    @property
    def _margins(self) -> tuple[int, int]:
        """How far the frame goes beyond the image on both sides."""
        span = (self.count - 1) * self.stride + self._extent
        return self.padding, span - self.padding - self.size

    def frame(self, image: Tensor, dim: int, fill: float) -> Tensor:
        return _pad(image, dim, *self._margins, fill)

    def fold(self, frame: Tensor, dim: int) -> Tensor:
        before, after = self._margins
        return _pad(frame, dim, -before, -after, 0)

    def lowest(self, pooled: Tensor, dim: int) -> Tensor:
        if self.kernel == self.stride and self.dilation == 1:
            image = pooled.repeat_interleave(self.stride, dim)
        else:
            # The windows m - shift read the entry m * stride + rest of the frame.
            reach = (self._extent - 1) // self.stride
            padded = _pad(pooled, dim, reach, reach, math.inf)
            least: dict[int, Tensor] = {}
            for offset in range(self.kernel):
                shift, rest = divmod(offset * self.dilation, self.stride)
                moved = padded.narrow(dim, reach - shift, self.count + reach)
                least[rest] = torch.minimum(least[rest], moved) if rest in least else moved
            unread = torch.full_like(least[0], math.inf)
            bins = [least.get(rest, unread) for rest in range(self.stride)]
            image = torch.stack(bins, dim + 1).flatten(dim, dim + 1)
        after = self.size + self.padding - image.shape[dim]
        return _pad(image, dim, -self.padding, after, math.inf)


@dataclass(frozen=True)
class AdaptiveAxis(Axis):
    """Windows of adaptive pooling; the frame holds one after the other, all as long as the longest.

    Window j reads from `floor(j * size / count)` up to `ceil((j + 1) * size / count)`.
    """

    @property
    def disjoint(self) -> bool:
        return False

    @property
    def free(self) -> bool:
        return self.size >= 2 * self.count  # neighbours share one entry at most

    @property
    def complete(self) -> bool:
        return True

    @property
    def inside(self) -> bool:
        return False

    def frame(self, image: Tensor, dim: int, fill: float) -> Tensor:
        entries, read = self._table(image, dim)
        return image.index_select(dim, entries).masked_fill(~read, fill)

    def fold(self, frame: Tensor, dim: int) -> Tensor:
        entries, read = self._table(frame, dim)
        shape = list(frame.shape)
        shape[dim] = self.size
        return frame.new_zeros(shape).index_add(dim, entries, frame.masked_fill(~read, 0))

    def lowest(self, pooled: Tensor, dim: int) -> Tensor:
        # Entry i is read by those windows that window i of the opposite pooling reads.
        opposite = adaptive_axis(self.count, self.size)
        frame = opposite.frame(pooled, dim, math.inf)
        return frame.unflatten(dim, (self.size, opposite.kernel)).amin(dim + 1)

    def _table(self, like: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Return which entry is where in the frame, and whether the window there reads it."""
        window = torch.arange(self.count, device=like.device)
        first = window * self.size // self.count
        behind = ((window + 1) * self.size + self.count - 1) // self.count
        entries = first[:, None] + torch.arange(self.kernel, device=like.device)
        read = (entries < behind[:, None]).flatten()
        return (
            entries.clamp(max=self.size - 1).flatten(),
            read.view([-1 if d == dim else 1 for d in range(like.ndim)]),
        )


def regular_axes(
    kernel: Shape, stride: Shape, padding: Shape, dilation: Shape, size: Shape, count: Shape
) -> tuple[Axis, ...]:
    """Return the axes of a pooling op with windows of one size; all shapes are spatial ones."""
    return tuple(
        RegularAxis(n, windows, k, s, d, p)
        for k, s, p, d, n, windows in zip(
            kernel, stride, padding, dilation, size, count, strict=True
        )
    )


def adaptive_axes(size: Shape, count: Shape) -> tuple[Axis, ...]:
    """Return the axes of an adaptive pooling op; all shapes are spatial ones."""
    return tuple(adaptive_axis(n, windows) for n, windows in zip(size, count, strict=True))


def adaptive_axis(size: int, count: int) -> Axis:
    """Return an axis of an adaptive pooling op, which is a regular one if the count divides."""
    if size % count == 0:
        kernel = size // count
        return RegularAxis(size, count, kernel, stride=kernel, dilation=1, padding=0)
    longest = -(-size // count) + 1
    return AdaptiveAxis(size, count, longest, stride=longest, dilation=1)


def frame(image: Tensor, axes: tuple[Axis, ...], fill: float) -> Tensor:
    """Return what windows read of an image (N, C, *size), and `fill` where they read nothing."""
    for dim, axis in enumerate(axes, start=2):
        image = axis.frame(image, dim, fill)
    return image


def fold(frame: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Return the transpose of `frame`."""
    for dim, axis in enumerate(axes, start=2):
        frame = axis.fold(frame, dim)
    return frame


def taps(frame: Tensor, axes: tuple[Axis, ...]) -> Iterator[Tensor]:
    """Yield views (N, C, *count) of a frame, one for every offset in the window."""
    for offsets in itertools.product(*(range(axis.kernel) for axis in axes)):
        view = frame
        for dim, (axis, offset) in enumerate(zip(axes, offsets, strict=True), start=2):
            view = axis.tap(view, dim, offset)
        yield view


def lowest(pooled: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Return for every entry the least value of the windows that read it, or infinity."""
    # The last dimension first: whole rows are then repeated.
    for dim in reversed(range(len(axes))):
        pooled = axes[dim].lowest(pooled, dim + 2)
    return pooled


def highest(image: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Return the largest value that every window reads."""
    for dim, axis in enumerate(axes, start=2):
        framed = axis.frame(image, dim, -math.inf)
        image = axis.tap(framed, dim, 0)
        for offset in range(1, axis.kernel):
            image = torch.maximum(image, axis.tap(framed, dim, offset))
    return image


def _pad(image: Tensor, dim: int, before: int, after: int, fill: float) -> Tensor:
    """Pad one dimension, or cut where the width is negative; a view if it only cuts."""
    image = image.narrow(dim, max(-before, 0), image.shape[dim] + min(before, 0) + min(after, 0))
    if before <= 0 and after <= 0:
        return image
    widths = [0, 0] * (image.ndim - 1 - dim) + [max(before, 0), max(after, 0)]
    return F.pad(image, widths, value=fill)
