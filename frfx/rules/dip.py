"""Nearest preimages under the functions that fall to one minimum and rise from it on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from frfx.recording import is_recorded
from frfx.rules.where import where


@dataclass(frozen=True)
class Dip:
    """A function that falls to one minimum and rises from there: SiLU, GELU, Mish.

    Attributes:
        function: The function.
        derivative: Its derivative.
        argmin: Where the minimum lies.
        minimum: Its value.
        curvature: The second derivative there.
    """

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    argmin: float
    minimum: float
    curvature: float

    def nearest(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the nearest preimage; two exist for negative y, one otherwise.

        Its derivative by y is that of the inverse function, 0 at the minimum.
        """
        recorded = is_recorded(y)
        with torch.no_grad():
            found = self._nearest(y.detach(), x.detach())
            if not recorded:
                return found
            slope = self.derivative(found)
            slope = torch.where(slope == 0, math.inf, slope)
        return found + (y - y.detach()) / slope

    def _nearest(self, y: Tensor, x: Tensor) -> Tensor:
        on_cpu = y.is_cpu and not is_recorded(y, x)
        root = self._root_of_each if on_cpu else self._root
        floor = torch.full_like(y, self.argmin)
        # f(v) > v - 0.5 for v > 0, and f(0) = 0.
        right = root(y, floor, y.clamp(min=0) + 0.5)
        far_left = torch.full_like(y, self._far_left(y.dtype))
        if not on_cpu:
            left = root(y, far_left, floor)
            closer = (left - x).abs() < (right - x).abs()
            return torch.where((y < 0) & closer, left, right)
        # From the right root on, none to its left is nearer.
        two = ((y < 0) & (x < right)).flatten().nonzero().squeeze(1)
        parts = (t.flatten()[two] for t in (y, x, right, far_left, floor))
        y, x, nearest, far_left, floor = parts
        left = root(y, far_left, floor)
        nearest = where((left - x).abs() < (nearest - x).abs(), left, nearest)
        return right.flatten().index_copy_(0, two, nearest).view(right.shape)

    def _far_left(self, dtype: torch.dtype) -> float:
        """Return a point left of which the function is zero to the precision of the type."""
        return -750.0 if dtype == torch.float64 else -105.0

    def _root(self, y: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Find f(v) = y between two points.

        A fixed count of steps: nothing is read back from the device.
        """
        rises = self.function(high) > self.function(low)
        v = (low + high) / 2
        for _ in range(_steps(y.dtype)):
            v, low, high, _ = self._step(y, v, low, high, rises)
        return v

    def _root_of_each(self, y: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Find the same, every entry in as many steps as it takes."""
        shape, found = y.shape, torch.full_like(y, self.argmin).flatten()
        index = (y <= self.minimum).logical_not_().flatten()  # with what is not a number
        index = index.nonzero().squeeze(1)
        y, low, high = (t.flatten()[index] for t in (y, low, high))
        rises = self.function(high) > self.function(low)
        # The parabola at the minimum is met to the side that the bounds are on.
        aside = ((y - self.minimum) * (2 / self.curvature)).sqrt()
        v = where(rises, torch.maximum(self.argmin + aside, y), self.argmin - aside)
        v = v.clamp(low, high)
        for _ in range(_steps(y.dtype)):
            following, low, high, error = self._step(y, v, low, high, rises)
            going = (error != 0) & (following != v)
            v = where(error == 0, v, following)
            if int(going.sum()) <= len(index) // 2:
                found[index] = v
                going = going.nonzero().squeeze(1)
                index, y, v, low, high, rises = (t[going] for t in (index, y, v, low, high, rises))
            if not len(index):
                break
        found[index] = v
        return found.view(shape)

    def _step(
        self, y: Tensor, v: Tensor, low: Tensor, high: Tensor, rises: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Take one of Newton's steps, bisecting where it leaves the bounds."""
        error = self.function(v) - y
        above = (error > 0) == rises
        low, high = where(above, low, v), where(above, v, high)
        newton = v - error / self.derivative(v)
        middle = low + (high - low) / 2  # the sum of both may exceed the type
        following = where((newton > low) & (newton < high), newton, middle)
        return following, low, high, error


def _steps(dtype: torch.dtype) -> int:
    """Return how many steps a root takes at most."""
    return 64 if dtype == torch.float64 else 40


def _silu_derivative(v: Tensor) -> Tensor:
    s = torch.sigmoid(v)
    return s * (1 + v * (1 - s))


def _gelu_derivative(v: Tensor) -> Tensor:
    density = torch.exp(-v.square() / 2) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(v) + v * density


def _gelu_tanh(v: Tensor) -> Tensor:
    return F.gelu(v, approximate="tanh")


def _gelu_tanh_derivative(v: Tensor) -> Tensor:
    scale = math.sqrt(2 / math.pi)
    t = torch.tanh(scale * (v + 0.044715 * v**3))
    return (1 + t) / 2 + v / 2 * (1 - t.square()) * scale * (1 + 3 * 0.044715 * v.square())


def _mish_derivative(v: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(v))
    return t + v * (1 - t.square()) * torch.sigmoid(v)


# The minima, to the last digit of a double.
SILU = Dip(F.silu, _silu_derivative, -1.2784645427610738, -0.27846454276107380, 0.21781170571980007)
GELU = Dip(F.gelu, _gelu_derivative, -0.7517915246935645, -0.16997120747990369, 0.43149399231404691)
GELU_TANH = Dip(
    _gelu_tanh,
    _gelu_tanh_derivative,
    -0.7524614220710162,
    -0.17004075057125413,
    0.43040009102485857,
)
MISH = Dip(F.mish, _mish_derivative, -1.1924312145154237, -0.30884341301725043, 0.26694791404956381)

silu, mish = SILU.nearest, MISH.nearest


def gelu(y: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    """The nearest preimage under either form of GELU."""
    return (GELU_TANH if approximate == "tanh" else GELU).nearest(y, x)


def gelu_range(approximate: str = "none") -> tuple[float, float]:
    """The range of either form of GELU."""
    return (GELU_TANH if approximate == "tanh" else GELU).minimum, math.inf
