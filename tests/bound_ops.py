"""Ops of several activations as the compiler binds them, for tests of a rule on its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from frfx.compiler.bind import bind, live_nodes, op_type
from frfx.compiler.trace import trace
from frfx.ops import Op, OpType
from frfx.rules import Rule
from frfx.view import evaluation_view
from tests.oracles import Apply


class _OfSeveral(Apply):
    """A function of several activations, read from the one input of a network."""

    def __init__(self, function: Callable[..., Any], count: int, **tensors: Tensor) -> None:
        super().__init__(function, **tensors)
        self.count = count

    def forward(self, x: Tensor) -> Any:
        tensors = {name: getattr(self, name) for name in self.names}
        return self.function(*(x[i] for i in range(self.count)), **tensors)


def bound(
    function: Callable[..., Any],
    kind: OpType,
    count: int = 2,
    held: Iterable[str] = (),
    **tensors: Tensor,
) -> Op:
    """Return the one op of a type in a function of some activations and parameters.

    Args:
        function: Called with the activations, and the parameters by name; or a module.
        kind: The type of the op.
        count: How many activations there are.
        held: Which of the op's inputs the layer does not reach.
        **tensors: The parameters.
    """
    traced = trace(evaluation_view(_OfSeveral(function, count, **tensors).eval()))
    (node,) = (node for node in traced.graph.nodes if op_type(node, traced.root) is kind)
    op = bind(node, traced, live_nodes(traced.graph))
    return dataclasses.replace(op, held=frozenset(held))


@torch.no_grad()
def solve(rule: Rule, op: Op, target: Any, output: Any, *inputs: Tensor) -> Tensor:
    """Return what the rule gives for the one input that it reconstructs."""
    assert rule.supports(op) is None
    assert len(rule.reconstructs(op)) == 1
    return rule.build(op)(target, output, *inputs)
