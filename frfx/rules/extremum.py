"""The largest or smallest entry along dimensions: one window of max pooling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from frfx import vocabulary
from frfx.ops import Op
from frfx.registry import register_rule
from frfx.rules.base import Inversion, Rule, one_input, spans_batch


class ExtremumInversion(Inversion):
    """The nearest tensor with these extreme entries.

    Args:
        dims: What each entry is extreme along.
        keepdim: Whether these dimensions are kept, of size 1.
        sign: 1 for the largest entry, -1 for the smallest.
    """

    def __init__(self, dims: tuple[int, ...], keepdim: bool, sign: int) -> None:
        super().__init__()
        self.dims, self.keepdim, self.sign = dims, keepdim, sign

    def forward(  # type: ignore[override]
        self, target: Tensor | tuple[Tensor, ...], output: Tensor, *inputs: Tensor
    ) -> Tensor:
        """Return `x*`; of a target with indices, only the values count."""
        (x,) = inputs
        wanted = target if isinstance(target, Tensor) else target[0]
        dims = sorted(dim % x.ndim for dim in self.dims)
        if not self.keepdim:
            for dim in dims:
                wanted = wanted.unsqueeze(dim)
        last = tuple(range(-len(dims), 0))
        rows = (self.sign * x).movedim(dims, last)
        limits = (self.sign * wanted).movedim(dims, last).flatten(-len(dims))
        flat = rows.flatten(-len(dims))
        flat = torch.minimum(flat, limits).scatter(-1, flat.argmax(-1, keepdim=True), limits)
        return self.sign * flat.view(rows.shape).movedim(last, dims)


@register_rule(vocabulary.max_over)
@register_rule(vocabulary.min_over)
@register_rule(vocabulary.amax)
@register_rule(vocabulary.amin)
@dataclass(frozen=True)
class ExtremumRule(Rule):
    """`min(x^, y*)` with y* at the (first) largest entry; mirrored for the smallest."""

    equation = "the minimal deviation principle (Sec. 3.2)"
    accuracy = "exact"

    def supports(self, op: Op) -> str | None:
        reason = one_input(op, "dim", "keepdim")
        if reason is not None:
            return reason
        dims = _dims(op)
        if not dims or spans_batch(op, dims):
            return "it takes the extreme over the batch, so samples are not apart"
        return None

    def build(self, op: Op) -> Inversion:
        sign = 1 if op.type in (vocabulary.max_over, vocabulary.amax) else -1
        return ExtremumInversion(_dims(op), op.arguments["keepdim"], sign)


def _dims(op: Op) -> tuple[int, ...]:
    dim = op.arguments["dim"]
    if dim is None:
        return ()
    return (dim,) if isinstance(dim, int) else tuple(dim)
