"""What is inverted as one op: the regions of a tail between nodes that all paths lead through."""

from __future__ import annotations

import itertools

import networkx as nx
from torch import fx

from frfx import vocabulary
from frfx.compiler.bind import bind
from frfx.compiler.forward import region_module
from frfx.compiler.tail import Network, Tail
from frfx.errors import LayerError, nearest
from frfx.joint.options import JointOptions
from frfx.ops import Op


def region(network: Network, start: fx.Node, end: fx.Node) -> Op:
    """Return the part of a network between two nodes as one op; the feature is its first input.

    Args:
        network: The data flow of the forward graph.
        start: The feature that is reconstructed.
        end: The node that has a target.
    """
    module, held = region_module(network, start, end)
    names = [f"held[{i}]" for i in range(len(held))]
    return Op(
        type=vocabulary.region,
        name=end.name,
        path=network.traced.paths[end],
        spelling=fx.GraphModule,
        inputs={"input": start.name, **dict(zip(names, (n.name for n in held), strict=True))},
        arguments={"dim": network.class_dim()},  # where the region ends in the logits
        module=module,
        held=frozenset(names),
    )


def between(network: Network, start: fx.Node, end: fx.Node) -> set[fx.Node]:
    """Return the nodes on the paths from one node to another, without the two."""
    flow = network.flow
    return nx.descendants(flow, start) & nx.ancestors(flow, end)


def branches(network: Network, start: fx.Node, end: fx.Node) -> bool:
    """Tell whether several paths lead from one node to another, or one op reads one value twice."""
    inside = between(network, start, end)
    names = {node.name for node in (start, *inside)}
    ops = (bind(node, network.traced, network.live) for node in (end, *inside))
    return any(sum(source in names for source in op.inputs.values()) > 1 for op in ops)


def links(network: Network, tail: Tail) -> list[tuple[fx.Node, fx.Node]]:
    """Return the pairs of neighbours among the nodes that all paths lead through, in forward order.

    Ops that return a tuple are passed over: a region between two of these pairs ends in a tensor.
    """
    chain = [node for node in tail.chain if not network.returns_several(node)]
    return list(itertools.pairwise(chain))


def joint_links(
    network: Network, tail: Tail, options: JointOptions
) -> list[tuple[fx.Node, fx.Node]]:
    """Return where the regions that are inverted jointly start and end, in forward order.

    Args:
        network: The data flow of the forward graph.
        tail: What is inverted.
        options: Where it is cut.

    Raises:
        LayerError: If a place to cut at is not on every path from the layer to the output.
    """
    places = [tail.cut, top(network, tail, options)]
    places += [_place(network, tail, name, "regions") for name in options.regions]
    order = {node: i for i, node in enumerate(tail.chain)}
    last = order[places[1]]
    for node in places:
        if order[node] > last:
            raise LayerError(
                f"regions: {network.traced.paths[node]!r} lies behind "
                f"{network.traced.paths[places[1]]!r}, where joint inversion starts"
            )
    return list(itertools.pairwise(sorted(set(places), key=order.__getitem__)))


def top(network: Network, tail: Tail, options: JointOptions) -> fx.Node:
    """Return the node that joint inversion starts from: above it, every op has its rule."""
    if options.start is None:
        return tail.logits
    return _place(network, tail, options.start, "start")


def _place(network: Network, tail: Tail, name: str | int, what: str) -> fx.Node:
    node = network.find(name)
    paths = network.traced.paths
    usable = [n for n in tail.chain if n not in network.heads and not network.returns_several(n)]
    if node not in usable:
        known = [paths[n] for n in usable]
        raise LayerError(
            f"{what}: {paths[node]!r} is not on every path from {paths[tail.cut]!r} to the logits."
            f"{nearest(paths[node], known)} These are: {', '.join(map(repr, known))}"
        )
    return node
