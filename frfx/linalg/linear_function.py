"""Linear maps as autograd sees them: their derivative is themselves, transposed for gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from frfx.recording import is_recorded

Map = Callable[[Tensor], Tensor]


def linear_function(mv: Map, rmv: Map, x: Tensor, value: Map | None = None) -> Tensor:
    """Return `mv(x)`, of which autograd records nothing but x.

    Derivatives of any order and in either mode cost a product each.

    Args:
        mv: A linear map, of tensors that count as constants.
        rmv: Its transpose.
        x: What it is applied to.
        value: Computes `mv(x)` and a constant that is added; None for `mv` itself.
    """
    value = mv if value is None else value
    if not is_recorded(x):
        return value(x)
    return cast(Tensor, _LinearFunction.apply(mv, rmv, value, x))


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(mv: Map, rmv: Map, value: Map, x: Tensor) -> Tensor:
        del mv, rmv
        return value(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Map, Map, Map, Tensor], output: Tensor) -> None:
        del output
        ctx.mv, ctx.rmv, *_ = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, Tensor]:
        return None, None, None, linear_function(ctx.rmv, ctx.mv, gradient)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return linear_function(ctx.mv, ctx.rmv, tangents[-1])
