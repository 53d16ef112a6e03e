"""One rule per op, by policy; every op that has none is named, then the plan fails once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from frfx import vocabulary
from frfx.compiler.bind import bind, op_type
from frfx.compiler.regions import regions, top
from frfx.compiler.tail import Network, Tail
from frfx.errors import UnsupportedOp, UnsupportedOpsError
from frfx.joint import REGION
from frfx.ops import Op, Shape, describe
from frfx.policy import Policy
from frfx.rules.base import Rule
from frfx.rules.sized import wait_for_sizes


@dataclass(frozen=True)
class Step:
    """The inversion of one op.

    Attributes:
        op: The op.
        rule: The rule that inverts it.
        node: The forward node, or None for the argmax that a network of logits ends in unsaid.
        inputs: The forward nodes that are reconstructed.
    """

    op: Op
    rule: Rule
    node: fx.Node | None
    inputs: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Plan:
    """What the reconstruction graph does, from the output back to the cut.

    Attributes:
        steps: The inversions in the order of the walk back.
        tail: What they invert.
        takes_scores: Whether a float target is meaningful: the network does not end in argmax.
        class_dim: The dimension of the logits that holds the classes.
    """

    steps: tuple[Step, ...]
    tail: Tail
    takes_scores: bool
    class_dim: int

    def check(
        self,
        shapes: Mapping[fx.Node, Shape],
        hooked: Collection[fx.Node],
        sizes: Mapping[str, Any],
    ) -> None:
        """Ask every rule again, now that the forward pass has run.

        Args:
            shapes: The activations' shapes without the batch.
            hooked: The nodes whose modules compute something else because of a hook.
            sizes: What the nodes that compute with sizes have given, by name.

        Raises:
            UnsupportedOpsError: If some rules cannot invert their ops as they are.
        """
        problems = []
        for step in self.steps:
            op = _with_shapes(step.op, step.node, step.inputs, shapes).with_sizes(sizes)
            reason = step.rule.supports(op)
            if step.node in hooked and op.type is not REGION:  # that runs its hooks
                reason = "a hook of the module changes its value, which no rule can see"
                remedy = "remove the hook, or write what it does in the forward of the model"
                problems.append(_problem(op, reason, step.rule, remedy))
            elif reason is not None:
                problems.append(_problem(op, reason, step.rule))
        if problems:
            raise UnsupportedOpsError(problems)


def make_plan(
    network: Network, tail: Tail, policy: Policy, shapes: Mapping[fx.Node, Shape] | None = None
) -> Plan:
    """Choose a rule for every op of a tail.

    Args:
        network: The data flow of the forward graph.
        tail: What is inverted.
        policy: Chooses the rules.
        shapes: The activations' shapes without the batch, if they are known already.

    Raises:
        UnsupportedOpsError: If some ops cannot be inverted; names all of them.
        PolicyError: If the policy overrides a node that is not there.
        LayerError: If the policy cuts the tail where a path goes past the cut.
    """
    joint = [] if policy.joint is None else regions(network, tail, policy.joint)
    below = tail
    if joint and policy.joint is not None:
        tail = network.tail(top(network, tail, policy.joint))  # above it, every op has its rule
    traced, flow = network.traced, network.flow
    beyond = [node for node in tail.nodes if node in network.heads]
    ends_in_argmax = any(op_type(node, traced.root) is vocabulary.argmax for node in beyond)
    problems = []
    for branch in tail.branches:
        inputs = tuple(flow.predecessors(branch.node))
        op = _with_shapes(bind(branch.node, traced, network.live), branch.node, inputs, shapes)
        problems.append(_problem(op, branch.reason, None, _way_round(network, tail)))
    branching = {branch.node for branch in tail.branches}
    steps: list[Step] = []

    def add(op: Op, node: fx.Node | None, inputs: tuple[fx.Node, ...]) -> None:
        rule = policy.rule_for(op)
        if rule is not None and node not in network.heads:
            rule = wait_for_sizes(rule, op)
        seen = _with_shapes(op, node, inputs, shapes)
        reason = "no rule is registered for it" if rule is None else rule.supports(seen)
        if reason is not None:
            problems.append(_problem(seen, reason, rule))
        elif rule is not None:
            steps.append(Step(op, rule, node, inputs))

    # Labels pass through softmax, and are embedded at the logits.
    embedding: tuple[Op, fx.Node | None] = (_unsaid_argmax(tail.logits, network.class_dim()), None)
    for node in reversed(beyond):
        op = bind(node, traced, network.live)
        if op.type is vocabulary.argmax:
            embedding = (op, node)
        else:
            add(op, node, tuple(flow.predecessors(node)))
    if not joint or tail.cut is not tail.logits:  # else the first region takes the labels
        add(*embedding, (tail.logits,))
    for node in reversed(tail.nodes):
        if node not in network.heads and node not in branching:
            op = bind(node, traced, network.live)
            add(op, node, tuple(flow.predecessors(node)))
    if problems:
        order = {traced.paths[node]: i for i, node in enumerate(traced.graph.nodes)}
        raise UnsupportedOpsError(sorted(problems, key=lambda p: order.get(p.path, len(order))))
    policy.check_nodes({s.op.path for s in steps} | {s.op.name for s in steps})
    steps += [Step(op, rule, end, inputs) for op, rule, end, inputs in joint]
    return Plan(tuple(steps), below, not ends_in_argmax, network.class_dim())


def _unsaid_argmax(logits: fx.Node, dim: int) -> Op:
    return Op(
        type=vocabulary.argmax,
        name="argmax",
        path="argmax",
        spelling=torch.argmax,
        inputs={"input": logits.name},
        arguments={"dim": dim, "keepdim": False},
    )


def _with_shapes(
    op: Op,
    node: fx.Node | None,
    inputs: tuple[fx.Node, ...],
    shapes: Mapping[fx.Node, Shape] | None,
) -> Op:
    """Return the op with its shapes, as far as they are known."""
    if node is None or shapes is None or not shapes.keys() >= {node, *inputs}:
        return op
    return op.with_shapes(tuple(shapes[source] for source in inputs), shapes[node])


def _way_round(network: Network, tail: Tail) -> str:
    """Return the line that inverts as far as there is no branch."""
    straight = (n for n in tail.chain if n not in network.heads and not network.tail(n).branches)
    name = network.traced.paths[next(straight)]
    return f"frfx.invert(model, upto_layer={name!r}), the first layer behind the branches"


def _problem(op: Op, reason: str, rule: Rule | None, remedy: str | None = None) -> UnsupportedOp:
    spelling = describe(op.spelling)
    kind = spelling if op.type is None else f"{op.type.name} ({spelling})"
    if remedy is None and rule is None:
        remedy = f"@frfx.register_rule({spelling}) on a subclass of frfx.rules.Rule"
    elif remedy is None:
        remedy = (
            f"policy.override(node={op.path!r}, rule=MyRule()), or "
            f"@frfx.register_rule({spelling}, overwrite=True) on a subclass of frfx.rules.Rule"
        )
    return UnsupportedOp(op.path, kind, op.show_shapes(), reason, remedy)
