"""Layers in the forward part of a reconstruction graph that there is a faster way to compute."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from frfx.compiler.bind import bind, live_nodes
from frfx.compiler.forward import add_child, calls_plainly
from frfx.compiler.linear import Product
from frfx.compiler.rows import InRows
from frfx.compiler.trace import Traced


def replace_layers(
    traced: Traced, graph: fx.Graph, copies: Mapping[fx.Node, fx.Node], replaced: nn.Module
) -> None:
    """Rewrite convolutions of few channels and large linear layers.

    Args:
        traced: The network.
        graph: The reconstruction graph; these nodes call `replaced.<name>` afterwards.
        copies: The forward nodes in that graph.
        replaced: The children of `replaced`, to which those for layers are added.
    """
    live, there = live_nodes(traced.graph), set(graph.nodes)
    for node, copy in copies.items():
        if copy not in there or node not in live:
            continue
        if node.op != "call_module" or not calls_plainly(node):
            continue
        op = bind(node, traced, live)
        layer = InRows.of(op) or Product.of(op)
        if layer is not None:
            copy.target = f"replaced.{add_child(replaced, copy.name, layer)}"
