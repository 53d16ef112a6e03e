"""Products with Gram matrices of padded convolutions, once their circular model has been solved.

Away from the edges of an image a convolution is its model. Where `z = (G + d)^-1 r` for the Gram
matrix G of the model, the convolution's own gives `r - d z` there, and nothing has to be convolved;
what the padding changes lies within the length of a window of the edges, and takes strips.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from frfx.linalg.autocorrelation import Side
from frfx.linalg.operators import Convolution

_WORTH = 0.6
"""Which share of the image the strips may take, all together."""


@dataclass(frozen=True)
class Strip:
    """A Gram matrix at one end of one dimension.

    Attributes:
        dim: The dimension, of a batch of images.
        operator: The convolution of the strip.
        side: See `Edges`.
        read: What it is applied to.
        kept: The part of its product that is that of the whole image, as the strip counts it.
        written: The same, as the image does.
    """

    dim: int
    operator: Convolution
    side: Side
    read: slice
    kept: slice
    written: slice

    def write(self, z: Tensor, product: Tensor) -> None:
        """Write `G z` where it depends on the edge."""
        before = (slice(None),) * self.dim
        strip = z[(*before, self.read)].contiguous()
        mv, rmv = self.operator.mv, self.operator.rmv
        part = mv(rmv(strip)) if self.side == "rows" else rmv(mv(strip))
        product[(*before, self.written)] = part[(*before, self.kept)]


@dataclass(frozen=True)
class Edges:
    """The Gram matrix of a convolution, for what its model makes of a vector.

    Attributes:
        strips: What depends on the edges.
        damping: What is added to the model's Gram matrix before it is inverted.
    """

    strips: tuple[Strip, ...]
    damping: float

    @classmethod
    def of(cls, operator: Convolution, side: Side, damping: float) -> Edges | None:
        """Cut a convolution into strips; None where it cannot be, or they would be most of it.

        Args:
            operator: The convolution.
            side: `A A^T` of the rows, or `A^T A` of the columns.
            damping: See `Edges`.
        """
        if operator.padding_mode != "zeros" or min(map(min, operator.padding)) < 0:
            return None
        cut = _of_rows if side == "rows" else _of_columns
        strips = []
        for dim in range(len(operator.size)):
            for strip in cut(operator, dim):
                if strip is None:
                    return None
                strips.append(strip)
        entries = sum(math.prod(strip.operator.size) for strip in strips)
        if entries > _WORTH * math.prod(operator.size):
            return None
        return cls(tuple(strips), damping)

    def product(self, z: Tensor, r: Tensor) -> Tensor:
        """Return `G z` for what the model makes of r."""
        product = r.sub(z, alpha=self.damping)
        for strip in self.strips:
            strip.write(z, product)
        return product


def _of_columns(operator: Convolution, dim: int) -> Iterator[Strip | None]:
    """Yield both ends of `A^T A`: entries whose windows hold padding, or are not all there."""
    n, out, stride, (before, after), extent = _along(operator, dim)
    low = extent - 1
    if low > 0:
        windows = (low - 1 + before) // stride + 1
        length = (windows - 1) * stride + extent - before
        part = _part(operator, dim, length, (before, 0), windows)
        ends = slice(0, length), slice(0, low), slice(0, low)
        yield None if part is None else Strip(dim + 2, part, "columns", *ends)
    high = max(extent - 1, n - 1 - ((out - 1) * stride - before))
    if high > 0:
        first = max(0, -(-(n - high - extent + 1 + before) // stride))
        start = first * stride - before
        part = _part(operator, dim, n - start, (0, after), out - first)
        ends = slice(start, n), slice(n - high - start, None), slice(n - high, n)
        yield None if part is None else Strip(dim + 2, part, "columns", *ends)


def _of_rows(operator: Convolution, dim: int) -> Iterator[Strip | None]:
    """Yield both ends of `A A^T`: windows that hold padding, or would meet more than there are."""
    n, out, stride, (before, after), extent = _along(operator, dim)
    met = (extent - 1) // stride
    low = max(-(-before // stride), met)
    if low > 0:
        windows, length = low + met, (low - 1) * stride - before + extent
        beyond = (windows - 1) * stride + extent - length - before
        part = _part(operator, dim, length, (before, beyond), windows)
        ends = slice(0, windows), slice(0, low), slice(0, low)
        yield None if part is None else Strip(dim + 2, part, "rows", *ends)
    high = out - 1 - min((n - extent + before) // stride, out - 1 - met)
    if high > 0:
        first, start = out - high - met, (out - high) * stride - before
        beyond = start - (first * stride - before)
        part = _part(operator, dim, n - start, (beyond, after), out - first)
        ends = slice(first, out), slice(met, None), slice(out - high, out)
        yield None if part is None else Strip(dim + 2, part, "rows", *ends)


def _along(operator: Convolution, dim: int) -> tuple[int, int, int, tuple[int, int], int]:
    return (
        operator.size[dim],
        operator.out_size[dim],
        operator.stride[dim],
        operator.padding[dim],
        operator.extent[dim],
    )


def _part(
    operator: Convolution, dim: int, size: int, padding: tuple[int, int], windows: int
) -> Convolution | None:
    """Return the convolution of a strip of so many windows; None where the image has no such."""
    if not 0 < size <= operator.size[dim] or not 0 < windows <= operator.out_size[dim]:
        return None
    sizes, paddings = list(operator.size), list(operator.padding)
    sizes[dim], paddings[dim] = size, padding
    part = replace(operator, size=tuple(sizes), padding=tuple(paddings))
    return part if part.out_size[dim] == windows else None
