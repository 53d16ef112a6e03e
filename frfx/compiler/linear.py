"""Large linear layers in the forward part of a reconstruction graph, by the faster of two ways."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx, nn

from frfx.compiler.bind import bind, live_nodes
from frfx.compiler.forward import add_child, calls_plainly, is_hooked
from frfx.compiler.trace import Traced
from frfx.linalg.products import linear

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

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer gives, to rounding."""
        (layer,) = self._layer
        if is_hooked(layer):
            result: Tensor = layer(x)
            return result
        return linear(x, layer.weight, layer.bias)


def multiply_fast(
    traced: Traced, graph: fx.Graph, copies: Mapping[fx.Node, fx.Node], replaced: nn.Module
) -> None:
    """Rewrite the large linear layers in the forward part of a reconstruction graph.

    Args:
        traced: The network.
        graph: The reconstruction graph; these nodes call `replaced.<name>` afterwards.
        copies: The forward nodes in that graph.
        replaced: The children of `replaced`, to which those for linear layers are added.
    """
    live, there = live_nodes(traced.graph), set(graph.nodes)
    for node, copy in copies.items():
        if copy not in there or node not in live:
            continue
        if node.op != "call_module" or not calls_plainly(node):
            continue
        op = bind(node, traced, live)
        if op.spelling is not nn.Linear or not isinstance(op.module, nn.Linear):
            continue
        if op.module.weight.numel() >= _LARGE and set(op.inputs) == {"input"}:
            name = add_child(replaced, copy.name, Product(op.module))
            copy.target = f"replaced.{name}"
