"""One inversion in the reconstruction graph."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from frfx.compiler.plan import Step


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
