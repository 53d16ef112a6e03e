"""The inversions in the reconstruction graph, and a shorter one in which some have become one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from frfx.compiler.forward import add_child
from frfx.compiler.plan import Step
from frfx.rules.base import Inversion


@dataclass(frozen=True)
class Stage:
    """One inversion in the emitted graph, by the names of its nodes.

    Attributes:
        step: What is inverted.
        module: The path of the inversion's module.
        target: The node whose value is `y*`.
        output: The node whose value is `y^`.
        results: The nodes whose values are `x*`, in the order of `step.reconstructed`.
        parts: The parts of a tuple that the target is put together from: forward nodes, and the
            nodes whose values are `y*` and `y^` there.
    """

    step: Step
    module: str
    target: str
    output: str
    results: tuple[str, ...]
    parts: tuple[tuple[fx.Node, str, str], ...] = ()


@dataclass(frozen=True)
class Walk:
    """A reconstruction graph and its stages.

    Attributes:
        nodes: The graph's nodes, by name.
        copies: The forward nodes in the graph.
        stages: By the path of the inversion's module.
        inversions: The children of `inverse`.
        root: The network.
    """

    nodes: Mapping[str, fx.Node]
    copies: Mapping[fx.Node, fx.Node]
    stages: Mapping[str, Stage]
    inversions: nn.Module
    root: nn.Module

    def inversion(self, stage: Stage) -> Inversion:
        """Return the module of a stage."""
        inversion = self.inversions.get_submodule(stage.module.partition(".")[2])
        assert isinstance(inversion, Inversion)
        return inversion

    def answers(self, stage: Stage) -> bool:
        """Tell whether what the module returns is the answer: no part, and not limited."""
        return self.nodes[stage.results[0]].target == stage.module

    def before(self, stage: Stage) -> Stage | None:
        """Return the stage whose answer is this one's target as it is, and is read nowhere else."""
        answer = self.nodes[stage.target]
        return self.stages.get(str(answer.target)) if len(answer.users) == 1 else None


class Shorter:
    """A copy of a reconstruction graph, to be rewritten.

    Args:
        graph: That graph.
        inversions: The children of `inverse`, to which those of the copy are added.
        merged: The children of `merged`, likewise.

    Attributes:
        graph: The copy.
    """

    def __init__(self, graph: fx.Graph, inversions: nn.Module, merged: nn.Module) -> None:
        self.graph = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        self._inversions, self._merged = inversions, merged
        self.graph.output(self.graph.graph_copy(graph, self._copies))

    def copy(self, node: fx.Node) -> fx.Node:
        """Return the copy of a node."""
        return self._copies[node]

    def add_forward(self, name: str, module: nn.Module) -> str:
        """Return the path of a new module of the forward part."""
        return f"merged.{add_child(self._merged, name, module)}"

    def replace(self, node: fx.Node, name: str, inversion: Inversion, *args: Any) -> None:
        """Let a new inversion answer in the place of a node."""
        last = self._copies[node]
        path = f"inverse.{add_child(self._inversions, name, inversion)}"
        with self.graph.inserting_before(last):
            last.replace_all_uses_with(self.graph.call_module(path, args))
