"""Nearest preimages under the activation functions: `(y, x^) -> x*`, entry by entry."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frfx.rules.where import where


def identity(y: Tensor, x: Tensor, **_: Any) -> Tensor:
    """The target itself."""
    return y


def absolute(y: Tensor, x: Tensor) -> Tensor:
    """y or -y, whichever has the sign of x; y for neither."""
    return where(x < 0, -y, y)


def softsign(y: Tensor) -> Tensor:
    """`y / (1 - |y|)`."""
    return y / (1 - y.abs())


def logsigmoid(y: Tensor) -> Tensor:
    """`y - log(1 - e^y)`."""
    return y - torch.log(-torch.expm1(y))


def softplus(y: Tensor, x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """`y + log(1 - e^(-beta y)) / beta`, or y itself on the line that torch ends the curve in.

    The line begins below the curve's end, so that some y have a preimage on each.
    """
    curve = y + torch.log(-torch.expm1(-beta * y)) / beta
    on_curve, on_line = beta * curve <= threshold, beta * y > threshold
    nearer = (curve - x).abs() < (y - x).abs()
    return torch.where(on_curve & (~on_line | nearer), curve, y)


def softplus_range(beta: float = 1.0, threshold: float = 20.0) -> tuple[float, float]:
    """The range of softplus; empty for a negative beta, which turns it upside down."""
    return (0, math.inf) if beta > 0 else (0, 0)


def elu(y: Tensor, alpha: float = 1.0) -> Tensor:
    """`log(1 + y / alpha)` for negative y."""
    return y.clamp(min=0) + torch.log1p(y.clamp(max=0) / alpha)


def elu_range(alpha: float = 1.0) -> tuple[float, float]:
    """The range of ELU and CELU; empty for an alpha that flattens, folds or reverses them."""
    return (-alpha, math.inf) if alpha > 0 else (0, 0)


_SELU_SCALE = 1.0507009873554804934193349852946
_SELU_ALPHA = 1.6732632423543772848170429916717


def selu(y: Tensor) -> Tensor:
    """ELU's inverse with SELU's constants."""
    return elu(y / _SELU_SCALE, _SELU_ALPHA)


def selu_range() -> tuple[float, float]:
    """The range of SELU."""
    return -_SELU_SCALE * _SELU_ALPHA, math.inf


def celu(y: Tensor, alpha: float = 1.0) -> Tensor:
    """`alpha log(1 + y / alpha)` for negative y."""
    return y.clamp(min=0) + alpha * torch.log1p(y.clamp(max=0) / alpha)


def hardtanh_range(min_val: float = -1.0, max_val: float = 1.0) -> tuple[float, float]:
    """The range of hardtanh."""
    return min_val, max_val


def clamp_range(min: float | None = None, max: float | None = None) -> tuple[float, float]:
    """The range of clamp."""
    return -math.inf if min is None else min, math.inf if max is None else max


def hardsigmoid(y: Tensor, x: Tensor) -> Tensor:
    """`6 y - 3` on the slope."""
    return 6 * y - 3


@dataclass(frozen=True)
class Slope:
    """A slope read from the model, kept as factors are."""

    slope: Tensor

    @property
    def nbytes(self) -> int:
        """No memory of its own: the model holds it."""
        return 0


def leaky_relu(y: Tensor, x: Tensor, negative_slope: float | Tensor = 0.01) -> Tensor:
    """The nearest preimage for any slope a of the negative side.

    Of the best approximations of y from either side (`max(y, 0)` from the positive one), the one
    that is nearer to y under the function, and of two that are equally near, the nearer to x.
    """
    if not isinstance(negative_slope, Tensor) and negative_slope > 0:  # a bijection
        return y.clamp(min=0) + y.clamp(max=0) / negative_slope
    a = torch.as_tensor(negative_slope, dtype=y.dtype, device=y.device)
    right = y.clamp(min=0)
    ratio = y / torch.where(a == 0, 1, a)
    left = torch.where(a == 0, x.clamp(max=0).to(y.dtype), ratio.clamp(max=0))
    miss_right = (right - y).abs()
    miss_left = torch.where((a != 0) & (ratio <= 0), 0, y.abs())
    nearer = (left - x).abs() < (right - x).abs()
    return where((miss_left < miss_right) | ((miss_left == miss_right) & nearer), left, right)


def sin(y: Tensor, x: Tensor) -> Tensor:
    """The nearest of `asin(y) + 2 pi k` and `pi - asin(y) + 2 pi k`."""
    turn = 2 * math.pi
    rising = torch.asin(y)
    rising = rising + turn * torch.round((x - rising) / turn)
    falling = math.pi - torch.asin(y)
    falling = falling + turn * torch.round((x - falling) / turn)
    return where((rising - x).abs() <= (falling - x).abs(), rising, falling)


def hardswish(y: Tensor, x: Tensor) -> Tensor:
    """The roots of `x (x + 3) / 6 = y` around -1.5, the identity above 3, all of x <= -3 for 0."""
    root = torch.sqrt((9 + 24 * y).clamp(min=0))
    right = torch.where(y >= 3, y, (root - 3) / 2)
    left = torch.where(y == 0, x.clamp(max=-3), (-root - 3) / 2)
    closer = (left - x).abs() < (right - x).abs()
    return where((y <= 0) & closer, left, right)
