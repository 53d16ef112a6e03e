"""Regions of a tail that are inverted as one op: which, and the module that runs each."""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx
import torch
from torch import Tensor, fx, nn

from frfx.compiler.tail import Network, Tail
from frfx.compiler.trace import Traced
from frfx.compiler.view import evaluation_view
from frfx.errors import LayerError, nearest
from frfx.joint.options import JointOptions
from frfx.joint.rule import REGION, JointRule
from frfx.linalg.pseudo_inverse import solve_dtype
from frfx.ops import Op

Joint = tuple[Op, JointRule, fx.Node, tuple[fx.Node, ...]]
"""A region as an op, its rule, the node that it ends in, and what goes into it."""


def regions(network: Network, tail: Tail, options: JointOptions) -> list[Joint]:
    """Cut a tail into the regions that are inverted jointly, from the output back to the cut.

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
    ends = sorted(set(places), key=order.__getitem__, reverse=True)
    pairs = zip(ends[1:], ends[:-1], strict=True)
    return [_region(network, start, end, options) for start, end in pairs]


def top(network: Network, tail: Tail, options: JointOptions) -> fx.Node:
    """Return the node that joint inversion starts from: above it, every op has its rule."""
    if options.start is None:
        return tail.logits
    return _place(network, tail, options.start, "start")


def _place(network: Network, tail: Tail, name: str | int, what: str) -> fx.Node:
    node = network.find(name)
    if node not in tail.chain or node in network.heads:
        paths = network.traced.paths
        known = [paths[n] for n in tail.chain if n not in network.heads]
        raise LayerError(
            f"{what}: {paths[node]!r} is not on every path from {paths[tail.cut]!r} to the logits."
            f"{nearest(paths[node], known)} These are: {', '.join(map(repr, known))}"
        )
    return node


def _region(network: Network, start: fx.Node, end: fx.Node, options: JointOptions) -> Joint:
    traced = network.traced
    module, held = region_module(network, start, end)
    inputs = {"input": start.name} | {f"held[{i}]": node.name for i, node in enumerate(held)}
    op = Op(
        type=REGION,
        name=end.name,
        path=traced.paths[end],
        spelling=fx.GraphModule,
        inputs=inputs,
        arguments={"dim": network.class_dim()},  # where the region ends in the logits
        module=module,
    )
    return op, JointRule(options, traced.batch, in_precision), end, (start, *held)


def region_module(
    network: Network, start: fx.Node, end: fx.Node
) -> tuple[fx.GraphModule, tuple[fx.Node, ...]]:
    """Return a module that computes one node from another, and what else it takes.

    Args:
        network: The data flow of the forward graph.
        start: The first argument of the module.
        end: What it returns; reached from `start`.

    Returns:
        The module, which reads the parameters of the network's view, and the nodes that are its
        other arguments: activations that `start` does not reach, held at their forward values.
    """
    traced, reached = network.traced, nx.descendants(network.flow, start)
    nodes, held = _needed(traced, network.live, reached, start, end)
    graph = fx.Graph()
    copies = {start: graph.placeholder("feature")}
    for i, node in enumerate(held):
        copies[node] = graph.placeholder(f"held_{i}")
    for node in nodes:
        copy = copies[node] = graph.node_copy(node, lambda source: copies[source])
        if node.op in ("call_module", "get_attr"):
            copy.target = f"model.{node.target}"
    graph.output(copies[end])
    root = nn.Module()
    root.add_module("model", traced.root)
    module = fx.GraphModule(root, graph, class_name="Region")
    module.add_module("model", traced.root)  # whole: GraphModule copies only what it needs
    return module, held


def in_precision(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the module, or where it holds half types a view of it with these in another type."""

    def low(tensors: nn.Module) -> list[Tensor]:
        found = (*tensors.parameters(), *tensors.buffers())
        return [t for t in found if t.is_floating_point() and solve_dtype(t.dtype) != t.dtype]

    if not low(module):
        return module
    view = evaluation_view(module, own=low(module))
    for tensor in low(view):
        tensor.data = tensor.data.to(dtype)
    return view


def _needed(
    traced: Traced, live: set[fx.Node], reached: set[fx.Node], start: fx.Node, end: fx.Node
) -> tuple[Sequence[fx.Node], tuple[fx.Node, ...]]:
    """Return what the module computes and what it is given.

    Sizes are computed anew, even those of what is given: the module runs on parts of a batch.
    """
    found, given, waiting = set(), set(), [end]
    while waiting:
        node = waiting.pop()
        if node is start or node in found or node in given:
            continue
        if node in live and node not in reached:
            given.add(node)
        else:
            found.add(node)
            waiting += node.all_input_nodes
    nodes = traced.graph.nodes
    return [n for n in nodes if n in found], tuple(n for n in nodes if n in given)


__all__ = ["Joint", "region_module", "regions", "top"]
