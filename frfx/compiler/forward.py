"""Parts of the forward pass as graphs and modules of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import networkx as nx
from torch import Tensor, fx, nn

from frfx.compiler.tail import Network
from frfx.compiler.trace import Traced

_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
"""Where torch keeps the hooks of all modules."""


def copy_nodes(
    graph: fx.Graph, known: dict[fx.Node, fx.Node], nodes: Iterable[fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Copy nodes of the forward pass into a graph, whose attributes are then below `model`.

    Args:
        graph: Where they are copied to.
        known: The copies that are there.
        nodes: What is copied, in forward order; what they read is among them, or known.

    Returns:
        All copies by their nodes, the known ones among them.
    """
    copies = dict(known)
    for node in nodes:
        if node.op == "output" or node in copies:
            continue
        copy = copies[node] = graph.node_copy(node, lambda source: copies[source])
        if node.op in ("call_module", "get_attr"):
            copy.target = f"model.{node.target}"
    return copies


def add_child(parent: nn.Module, name: str, child: nn.Module) -> str:
    """Register a module under the name of a node, or one like it, and return that."""
    while hasattr(parent, name):  # a node may be called like an attribute of modules
        name += "_"
    parent.add_module(name, child)
    return name


def forget_unused(graph: fx.Graph) -> None:
    """Erase nodes that nothing reads, such as a softmax in front of an argmax."""
    for node in reversed(graph.nodes):
        if node.op not in ("placeholder", "output") and not node.users:
            graph.erase_node(node)


def call_of(node: fx.Node, root: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what a node calls, as a function of its one activation."""
    if node.op == "call_module":
        return root.get_submodule(str(node.target))

    def call(x: Tensor) -> Tensor:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda _: x)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    return call


def calls_plainly(node: fx.Node) -> bool:
    """Tell whether what `call_of` returns is called as the node is: hooks of modules may look."""
    return node.op != "call_module" or (len(node.args) == 1 and not node.kwargs)


def without_hooks(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return what a call computes, for a value that hooks have seen: these only look."""
    return call.forward if isinstance(call, nn.Module) else call


def is_hooked(call: Callable | None) -> bool:
    """Tell whether hooks wait for a module to be called, or it has a forward of its own."""
    return isinstance(call, nn.Module) and bool(
        call._forward_hooks
        or call._forward_pre_hooks
        or call._backward_hooks
        or call._backward_pre_hooks
        or "forward" in call.__dict__
        or any(getattr(nn.modules.module, name) for name in _GLOBAL_HOOKS)
    )


def forward_module(traced: Traced, outputs: tuple[fx.Node, ...]) -> fx.GraphModule:
    """Return a module that computes some values of the forward pass.

    Args:
        traced: The network.
        outputs: The nodes whose values are returned, as a tuple.
    """
    graph = fx.Graph()
    copies = copy_nodes(graph, {traced.input: graph.placeholder("x")}, traced.graph.nodes)
    graph.output(tuple(copies[node] for node in outputs))
    forget_unused(graph)
    return _module(traced, graph, "Forward")


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
    nodes, held = _needed(network, start, end)
    graph = fx.Graph()
    known = {start: graph.placeholder("feature")}
    known |= {node: graph.placeholder(f"held_{i}") for i, node in enumerate(held)}
    graph.output(copy_nodes(graph, known, nodes)[end])
    return _module(network.traced, graph, "Region"), held


def _needed(
    network: Network, start: fx.Node, end: fx.Node
) -> tuple[Sequence[fx.Node], tuple[fx.Node, ...]]:
    """Return what the module computes and what it is given.

    Sizes are computed anew, even those of what is given: the module runs on parts of a batch.
    """
    reached = nx.descendants(network.flow, start)
    found, given, waiting = set(), set(), [end]
    while waiting:
        node = waiting.pop()
        if node is start or node in found or node in given:
            continue
        if node in network.live and node not in reached:
            given.add(node)
        else:
            found.add(node)
            waiting += node.all_input_nodes
    nodes = network.traced.graph.nodes
    return [n for n in nodes if n in found], tuple(n for n in nodes if n in given)


def _module(traced: Traced, graph: fx.Graph, name: str) -> fx.GraphModule:
    root = nn.Module()
    root.add_module("model", traced.root)
    module = fx.GraphModule(root, graph, class_name=name)
    module.add_module("model", traced.root)  # whole: GraphModule copies only what it needs
    return module
