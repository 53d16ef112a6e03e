"""Large linear layers in the forward part of a reconstruction graph, by the faster of two ways."""

from __future__ import annotations

from torch import Tensor, nn

from frfx.compiler.forward import is_hooked
from frfx.linalg.products import linear
from frfx.ops import Op

_LARGE = 1 << 20
"""Entries of a weight from which it is worth a look."""


class Product(nn.Module):
    """A linear layer of the model.

    Where autograd records or a module has hooks, it is called itself.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple: it is a module of the model

    @classmethod
    def of(cls, op: Op) -> Product | None:
        """Return one for a large linear layer; None for anything else."""
        if op.spelling is not nn.Linear or not isinstance(op.module, nn.Linear):
            return None
        large = op.module.weight.numel() >= _LARGE and set(op.inputs) == {"input"}
        return cls(op.module) if large else None

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer gives, to rounding."""
        (layer,) = self._layer
        if is_hooked(layer):
            result: Tensor = layer(x)
            return result
        return linear(x, layer.weight, layer.bias)
