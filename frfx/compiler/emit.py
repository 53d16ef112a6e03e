"""plan -> reconstruction graph: one fx graph that runs forward, then back; linted and readable."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from frfx import vocabulary
from frfx.compiler.faster import replace_layers
from frfx.compiler.forward import add_child, copy_nodes, forget_unused
from frfx.compiler.merge import merge
from frfx.compiler.plan import Plan, Step
from frfx.compiler.pooling import pool_first
from frfx.compiler.stage import Stage
from frfx.compiler.trace import Traced
from frfx.linalg.backend import Backend
from frfx.rules.combine import Share, fan_out_inverse, limit_deviation, replace_parts
from frfx.rules.label import predicted_labels


@dataclass(frozen=True)
class Emitted:
    """A reconstruction graph and what its module paths stand for.

    Attributes:
        graph: Reads `x` and `target`, returns `a*`. Its call_module nodes name `model.<path>`
            `replaced.<node>` and `merged.<node>` (the forward pass), `inverse.<node>` (the
            inversions), `prepare` and `finish`.
        walk: The same, with every stage; not another one where all of them are in the graph.
        replaced: The children of `replaced`.
        merged: The children of `merged`.
        inversions: The children of `inverse`.
        stages: The walk back, in order.
        cut: The name of the forward node that is reconstructed.
        feature: The name of the node whose value is `a*`.
    """

    graph: fx.Graph
    walk: fx.Graph
    replaced: nn.Module
    merged: nn.Module
    inversions: nn.Module
    stages: tuple[Stage, ...]
    cut: str
    feature: str


def emit(traced: Traced, plan: Plan, backend: Backend) -> Emitted:
    """Write the reconstruction graph of a plan, which a backend runs."""
    graph = fx.Graph()
    x, target = graph.placeholder("x"), graph.placeholder("target")
    start = graph.call_module("prepare", (x, target))
    walk = _Writer(graph, copy_nodes(graph, {traced.input: x}, traced.graph.nodes), start)
    inversions = nn.Module()
    stages = []
    for step in plan.steps:
        inversion = step.rule.build(step.op)
        inversion.backend = backend
        path = f"inverse.{add_child(inversions, step.op.name, inversion)}"
        stages.append(walk.back(step, path, plan.trust_region))
        if inversion.partial:
            share = f"inverse.{add_child(inversions, f'{step.op.name}_share', Share(inversion))}"
            walk.partly(step, share)
    cut = walk.copies[plan.tail.cut]
    feature = walk.target(plan.tail.cut)
    graph.output(graph.call_module("finish", (feature, cut)))
    forget_unused(graph)
    replaced = nn.Module()
    pool_first(traced, graph, walk.copies, backend, replaced)
    forget_unused(graph)  # what is called within
    replace_layers(traced, graph, walk.copies, replaced)
    shorter, merged = merge(graph, walk.copies, stages, inversions, traced.root)
    return Emitted(
        shorter, graph, replaced, merged, inversions, tuple(stages), cut.name, feature.name
    )


class _Writer:
    """Writes the walk back: what has been answered for every forward node, so far.

    Args:
        graph: Where it is written.
        copies: The forward nodes in that graph.
        start: The node that holds the target of the walk.
    """

    def __init__(self, graph: fx.Graph, copies: dict[fx.Node, fx.Node], start: fx.Node) -> None:
        self.graph, self.copies = graph, copies
        self._start: fx.Node | None = start
        self._answers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        self._shares: dict[fx.Node, tuple[str, tuple[fx.Node, ...]]] = {}
        self._parts: list[tuple[fx.Node, str, str]] = []

    def target(self, node: fx.Node) -> fx.Node:
        """Return the node that holds the target of a forward node: all answers for it, as one."""
        answers = self._answers.pop(node, [])
        parts = [
            user
            for user in node.users
            if user.target is operator.getitem and not answers and user in self._answers
        ]
        if parts:
            return self._tuple_target(node, parts)
        if not answers:  # where the walk begins
            assert self._start is not None
            answers, self._start = [self._start], None
        if len(answers) == 1:
            return answers[0]
        arguments: list[Any] = [self.copies[node], tuple(answers)]
        if not self._shares.keys().isdisjoint(answers):
            known = (self._shares.get(answer) for answer in answers)
            arguments.append(tuple(share and self.graph.call_module(*share) for share in known))
        return self.graph.create_node(
            "call_function", fan_out_inverse, tuple(arguments), name=f"{node.name}_fan_out_inverse"
        )

    def _tuple_target(self, node: fx.Node, parts: list[fx.Node]) -> fx.Node:
        targets = [self.target(part) for part in parts]
        self._parts += [
            (part, target.name, self.copies[part].name)
            for part, target in zip(parts, targets, strict=True)
        ]
        answers = tuple((part.args[1], target) for part, target in zip(parts, targets, strict=True))
        return self.graph.call_function(replace_parts, (self.copies[node], answers))

    def partly(self, step: Step, share: str) -> None:
        """Note that the last step has answered for some entries only, as the module tells."""
        (node,) = step.reconstructed
        inputs = tuple(self.copies[source] for source in step.inputs)
        self._shares[self._answers[node][-1]] = (share, inputs)

    def back(self, step: Step, path: str, trust_region: float | None) -> Stage:
        """Write one step, by the module at a path."""
        graph = self.graph
        inputs = tuple(self.copies[node] for node in step.inputs)
        embeds = step.op.type is vocabulary.argmax  # labels, which heads have let pass
        asked = step.inputs[0] if step.node is None or embeds else step.node
        target = self.target(asked)
        if step.node is None:  # the argmax that goes unsaid
            output = graph.call_function(predicted_labels, (*inputs, step.op.arguments["dim"]))
        else:
            output = self.copies[step.node]
        result = graph.create_node(
            "call_module", path, (target, output, *inputs), name=f"{step.op.name}_inverse"
        )
        results = [result]
        if len(step.reconstructed) > 1:
            count = len(step.reconstructed)
            results = [graph.call_function(operator.getitem, (result, i)) for i in range(count)]
        if trust_region is not None and not step.passes_labels:
            results = [
                graph.call_function(limit_deviation, (answer, self.copies[node], trust_region))
                for answer, node in zip(results, step.reconstructed, strict=True)
            ]
        for answer, node in zip(results, step.reconstructed, strict=True):
            self._answers[node].append(answer)
        names = tuple(answer.name for answer in results)
        parts, self._parts = tuple(self._parts), []
        return Stage(step, path, target.name, output.name, names, parts)
