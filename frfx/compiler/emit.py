"""plan -> reconstruction graph: one fx graph that runs forward, then back; linted and readable."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from frfx.compiler.plan import Plan, Step
from frfx.compiler.trace import Traced
from frfx.linalg.backend import Backend
from frfx.rules.base import AffineInversion, Inversion
from frfx.rules.label import predicted_labels
from frfx.rules.sized import SizedInversion


@dataclass(frozen=True)
class Stage:
    """One inversion in the emitted graph, by the names of its nodes.

    Attributes:
        step: What is inverted.
        module: The path of the inversion's module.
        target: The node whose value is `y*`.
        output: The node whose value is `y^`.
        result: The node whose value is `x*`.
    """

    step: Step
    module: str
    target: str
    output: str
    result: str


@dataclass(frozen=True)
class Emitted:
    """A reconstruction graph and what its module paths stand for.

    Attributes:
        graph: Reads `x` and `target`, returns `a*`. Its call_module nodes name `model.<path>`
            (the forward pass), `inverse.<node>` (the inversions), `prepare` and `finish`.
        inversions: The children of `inverse`.
        stages: The walk back, in order.
        cut: The name of the forward node that is reconstructed.
    """

    graph: fx.Graph
    inversions: nn.Module
    stages: tuple[Stage, ...]
    cut: str


def emit(traced: Traced, plan: Plan, backend: Backend) -> Emitted:
    """Write the reconstruction graph of a plan, whose solvers a backend applies."""
    graph = fx.Graph()
    inversions = nn.Module()
    x = graph.placeholder("x")
    target = graph.placeholder("target")
    value = graph.call_module("prepare", (x, target))
    copies = _copy_forward(traced, graph, {traced.input: x})

    stages = []
    for step in plan.steps:
        inputs = tuple(copies[node] for node in step.inputs)
        output = (
            graph.call_function(predicted_labels, (*inputs, plan.class_dim))
            if step.node is None
            else copies[step.node]
        )
        inversion = step.rule.build(step.op)
        if isinstance(inversion, (AffineInversion, SizedInversion)):
            inversion.backend = backend
        path = f"inverse.{_add(inversions, step.op.name, inversion)}"
        result = graph.create_node(
            "call_module", path, (value, output, *inputs), name=f"{step.op.name}_inverse"
        )
        stages.append(Stage(step, path, value.name, output.name, result.name))
        value = result
    cut = copies[plan.tail.cut]
    graph.output(graph.call_module("finish", (value, cut)))
    _forget_unused(graph)
    return Emitted(graph, inversions, tuple(stages), cut.name)


def forward_module(traced: Traced, outputs: tuple[fx.Node, ...]) -> fx.GraphModule:
    """Return a module that computes some values of the forward pass.

    Args:
        traced: The network.
        outputs: The nodes whose values are returned, as a tuple.
    """
    graph = fx.Graph()
    copies = _copy_forward(traced, graph, {traced.input: graph.placeholder("x")})
    graph.output(tuple(copies[node] for node in outputs))
    _forget_unused(graph)
    root = nn.Module()
    root.add_module("model", traced.root)
    module = fx.GraphModule(root, graph, class_name="Forward")
    module.add_module("model", traced.root)  # whole: GraphModule copies only what it needs
    return module


def _copy_forward(
    traced: Traced, graph: fx.Graph, known: dict[fx.Node, fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Copy the forward pass into a graph, but for the nodes that are known in it."""
    copies = dict(known)
    for node in traced.graph.nodes:
        if node.op == "output" or node in copies:
            continue
        copy = copies[node] = graph.node_copy(node, lambda source: copies[source])
        if node.op in ("call_module", "get_attr"):
            copy.target = f"model.{node.target}"
    return copies


def _add(inversions: nn.Module, name: str, inversion: Inversion) -> str:
    while hasattr(inversions, name):  # a node may be called like an attribute of modules
        name += "_"
    inversions.add_module(name, inversion)
    return name


def _forget_unused(graph: fx.Graph) -> None:
    """Erase forward nodes that nothing reads, such as a softmax in front of an argmax."""
    for node in reversed(graph.nodes):
        if node.op not in ("placeholder", "output") and not node.users:
            graph.erase_node(node)
