"""Max pooling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from frfx import vocabulary
from frfx.ops import Op
from frfx.registry import register_rule
from frfx.rules.base import Inversion, Rule
from frfx.rules.windows import TiledInversion, spatial_dims, tiling

_MAX_POOL = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


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
        return tiling(op)

    def build(self, op: Op) -> Inversion:
        return CopyToWindow(op.sizes("kernel_size", spatial_dims(op)))


@register_rule(vocabulary.max_pool, principle="minimal")
@dataclass(frozen=True)
class MaxPoolMinimalRule(Rule):
    """The nearest image whose windows have the target as their maximum.

    `min(x^, t)`, and `t` at the forward argmax: raising any other entry, or leaving one above t,
    would deviate more or miss the target.
    """

    equation = "Eq. 4 for max pooling"

    def supports(self, op: Op) -> str | None:
        return tiling(op)

    def build(self, op: Op) -> Inversion:
        return MinimalMaxUnpool(op.sizes("kernel_size", spatial_dims(op)))
