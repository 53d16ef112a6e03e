"""Neighbours in a reconstruction graph that take less time together than one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx, nn

from frfx.compiler import enlarge, swap
from frfx.compiler.forward import forget_unused
from frfx.compiler.stage import Shorter, Stage, Walk


def merge(
    graph: fx.Graph,
    copies: Mapping[fx.Node, fx.Node],
    stages: Sequence[Stage],
    inversions: nn.Module,
    root: nn.Module,
) -> tuple[fx.Graph, nn.Module]:
    """Merge what can be merged in a reconstruction graph.

    Args:
        graph: The reconstruction graph, which stays as it is.
        copies: The forward nodes in that graph.
        stages: Its walk back.
        inversions: The children of `inverse`, to which those of the merged ops are added.
        root: The network.

    Returns:
        A graph that computes the same, or the graph itself; and the children of `merged`, which
        compute the merged ops in its forward part.
    """
    nodes = {node.name: node for node in graph.nodes}
    walk = Walk(nodes, copies, {stage.module: stage for stage in stages}, inversions, root)
    merged = nn.Module()
    found = [
        (write, chain)
        for find, write in ((enlarge.find, enlarge.write), (swap.find, swap.write))
        for stage in stages
        if (chain := find(walk, stage))
    ]
    if not found:
        return graph, merged
    shorter = Shorter(graph, inversions, merged)
    for write, chain in found:
        write(chain, walk, shorter)
    forget_unused(shorter.graph)
    return shorter.graph, merged
