"""Nearest preimages under the functions that fall to one minimum and rise from it on.

Either branch of the inverse is smooth in a coordinate of its own: in `sqrt(y - min)` to the right
of the minimum, in `sqrt(log(min / y))` to the left of it, down to the smallest y. So tables give
its first digits, and few of Newton's steps the others, the same number for all entries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from frfx.recording import is_recorded
from frfx.rules.where import where

_CELLS = 1 << 12
"""Intervals of a table."""

_RIGHT_END = 40.0
"""The y from which on they are their own preimages, in double precision."""

_LEFT_END = -torch.finfo(torch.float64).tiny
"""The y behind which they are zero, in double precision."""


@dataclass(frozen=True)
class Dip:
    """A function that falls to one minimum and rises from there: SiLU, GELU, Mish.

    Attributes:
        at: Gives its values and its derivatives, both to the precision of the type.
        argmin: Where the minimum lies.
        minimum: Its value.
    """

    at: Callable[[Tensor], tuple[Tensor, Tensor]]
    argmin: float
    minimum: float

    def nearest(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the nearest preimage; two exist for negative y, one otherwise.

        Its derivatives by y, up to the third, are those of the inverse function, 0 at the minimum.
        """
        recorded = is_recorded(y)
        with torch.no_grad():
            found = self._nearest(y.detach(), x.detach())
            if not recorded:
                return found
            _, slope = self.at(found)
            flat = slope == 0
        v = found + (y - y.detach()) / torch.where(flat, math.inf, slope)
        # One of Newton's steps, of which only the derivatives count: it doubles their order.
        value, slope = self.at(v)
        step = (y - value) / torch.where(flat, math.inf, slope)
        return v + (step - step.detach())

    def _nearest(self, y: Tensor, x: Tensor) -> Tensor:
        right, left = _tables(self, y.dtype, y.device)
        right, left = y + _read(right, self._right(y)), _read(left, self._left(y))
        v = where((y < 0) & (x < (left + right) / 2), left, right)
        for _ in range(1 if y.dtype == torch.float32 else 3):
            v = self._improved(v, y)
        return v

    def _right(self, y: Tensor) -> Tensor:
        """Return the coordinate of the right branch, in cells of its table."""
        return ((y - self.minimum).clamp(min=0) * (_CELLS**2 / (_RIGHT_END - self.minimum))).sqrt()

    def _left(self, y: Tensor) -> Tensor:
        """Return that of the left branch, for positive y its end."""
        y = y.clamp(max=-torch.finfo(y.dtype).tiny)  # square roots of what is none take long
        scale = _CELLS**2 / math.log(self.minimum / _LEFT_END)
        return (((self.minimum - y) / y).log1p() * scale).sqrt()

    def _improved(self, v: Tensor, y: Tensor) -> Tensor:
        """Take one of Newton's steps, no longer than any has to be.

        At the minimum, where there is no derivative, and where it is lost to rounding, it would be
        any number, or none.
        """
        value, slope = self.at(v)
        longest = ((v - self.argmin).abs() / 8).clamp(max=1e-3)
        return v - ((value - y) / slope).nan_to_num().clamp(-longest, longest)

    def _branch(self, side: float, y: Tensor, coordinate: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the preimages of y on one side of the minimum, from there on."""
        v = self.argmin + side * torch.logspace(-4, 3, 1 << 15, dtype=y.dtype, device="cpu")
        known, wanted = coordinate(self.at(v)[0]), coordinate(y)
        i = torch.searchsorted(known, wanted).clamp(1)
        share = (wanted - known[i - 1]) / (known[i] - known[i - 1])
        v = torch.lerp(v[i - 1], v[i], share)
        for _ in range(4):
            v = self._improved(v, y)
        v[0] = self.argmin
        return v


@torch.compiler.assume_constant_result
def _tables(dip: Dip, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _made_tables(dip, dtype, device)  # which no compiler takes apart


@functools.cache
def _made_tables(dip: Dip, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the branches, as tables; of the right one, what is added to y.

    Returns:
        Shape (2, 2, cells): where a cell begins, and the way to where it ends.
    """
    with torch.inference_mode(False), torch.no_grad():
        square = torch.linspace(0, 1, _CELLS + 1, dtype=torch.float64, device="cpu").square()
        y = dip.minimum + square * (_RIGHT_END - dip.minimum)
        right = dip._branch(1, y, dip._right) - y
        y = dip.minimum * (square * math.log(_LEFT_END / dip.minimum)).exp()
        both = torch.stack((right, dip._branch(-1, y, dip._left)))
        return torch.stack((both[:, :-1], both.diff()), 1).to(device, dtype)


def _read(table: Tensor, coordinate: Tensor) -> Tensor:
    """Return what a table says, linearly between its entries, and at its ends of all beyond."""
    place = coordinate.nan_to_num().clamp(0, _CELLS - 1 / 8).flatten()
    cell = place.to(torch.int64 if is_recorded(place) else torch.int32)  # as vmap of 2.7 asks
    start, way = (entries.index_select(0, cell) for entries in table)
    return torch.addcmul(start, way, place.frac()).view(coordinate.shape)


def _silu(v: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(v)
    value = v * s
    return value, torch.addcmul(s, value, 1 - s)


def _gelu(v: Tensor) -> tuple[Tensor, Tensor]:
    below = torch.erfc(v * -math.sqrt(1 / 2)) / 2
    density = (v.square() / -2).exp() / math.sqrt(2 * math.pi)
    return v * below, torch.addcmul(below, v, density)


def _gelu_tanh(v: Tensor) -> tuple[Tensor, Tensor]:
    square, scale = v.clamp(-40, 40).square(), math.sqrt(8 / math.pi)  # finite, once squared
    s = torch.sigmoid(v * (scale + scale * 0.044715 * square))
    value = v * s
    return value, s + value * (1 - s) * (scale + scale * 3 * 0.044715 * square)


def _mish(v: Tensor) -> tuple[Tensor, Tensor]:
    t = torch.tanh(F.softplus(v))
    return v * t, torch.addcmul(t, v * torch.sigmoid(v), 1 - t.square())


# The minima, to the last digit of a double.
SILU = Dip(_silu, -1.2784645427610738, -0.27846454276107380)
GELU = Dip(_gelu, -0.7517915246935645, -0.16997120747990369)
GELU_TANH = Dip(_gelu_tanh, -0.7524614220710162, -0.17004075057125413)
MISH = Dip(_mish, -1.1924312145154237, -0.30884341301725043)

silu, mish = SILU.nearest, MISH.nearest


def gelu(y: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    """The nearest preimage under either form of GELU."""
    return (GELU_TANH if approximate == "tanh" else GELU).nearest(y, x)


def gelu_range(approximate: str = "none") -> tuple[float, float]:
    """The range of either form of GELU."""
    return (GELU_TANH if approximate == "tanh" else GELU).minimum, math.inf
