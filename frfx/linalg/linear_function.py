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

    Derivatives of any order and in either mode cost a product each; vectorised ones (`torch.vmap`
    of them) one product in all.

    Args:
        mv: A linear map of every sample for itself, of tensors that count as constants.
        rmv: Its transpose.
        x: What it is applied to, samples first.
        value: Computes `mv(x)` and a constant that is added; None for `mv` itself.
    """
    value = mv if value is None else value
    if torch._C._functorch.is_legacy_batchedtensor(x):
        return _without_batch(lambda x: linear_function(mv, rmv, x, value), x)
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

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[None, None, None, int], mv: Map, rmv: Map, value: Map, x: Tensor
    ) -> tuple[Tensor, int]:
        del info
        fold = _as_samples(lambda x: linear_function(mv, rmv, x, value))
        return fold(x.movedim(in_dims[-1], 0)), 0


def _as_samples(function: Map) -> Map:
    """Return what a function of (N, ...) does to (B, N, ...)."""
    return lambda x: function(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _without_batch(function: Map, x: Tensor) -> Tensor:
    """Apply a function to what `torch.autograd.grad` has batched (`is_grads_batched`)."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    y = _as_samples(function)(torch._remove_batch_dim(x, level, 1, 0))
    return torch._add_batch_dim(y, 0, level)
