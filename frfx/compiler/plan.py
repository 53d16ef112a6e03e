"""One rule per op, by policy; every op that has none is named, then the plan fails once."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import fx

from frfx import registry, vocabulary
from frfx.compiler.bind import bind, op_type
from frfx.compiler.regions import (
    between,
    branches,
    joint_links,
    links,
    region,
    top,
)
from frfx.compiler.tail import Network, Tail, parts_of
from frfx.errors import LayerError, PolicyError, UnsupportedOp, UnsupportedOpsError
from frfx.joint import JointRule
from frfx.ops import Op, Shape, describe
from frfx.policy import Policy
from frfx.rules.base import Rule
from frfx.rules.region import RegionRule
from frfx.rules.sized import wait_for_sizes


@dataclass(frozen=True)
class Step:
    """The inversion of one op.

    Attributes:
        op: The op.
        rule: The rule that inverts it.
        node: The forward node, or None for the argmax that a network of logits ends in unsaid.
        inputs: The forward nodes that the op reads, in the order of `op.inputs`.
        reconstructed: Those of them that the rule answers for, in its order.
        passes_labels: Whether a label may pass through it: at the logits, and behind them.
    """

    op: Op
    rule: Rule
    node: fx.Node | None
    inputs: tuple[fx.Node, ...]
    reconstructed: tuple[fx.Node, ...]
    passes_labels: bool = False


@dataclass(frozen=True)
class Plan:
    """What the reconstruction graph does, from the output back to the cut.

    Attributes:
        steps: The inversions in the order of the walk back.
        tail: What they invert.
        takes_scores: Whether a float target is meaningful: the network does not end in argmax.
        class_dim: The dimension of the logits that holds the classes.
        trust_region: Bound on the relative deviation of every step; None for none.
    """

    steps: tuple[Step, ...]
    tail: Tail
    takes_scores: bool
    class_dim: int
    trust_region: float | None = None

    def check(
        self,
        shapes: Mapping[fx.Node, Shape],
        hooked: Collection[fx.Node],
        sizes: Mapping[str, Any],
        complex_values: Collection[fx.Node] = (),
    ) -> None:
        """Ask every rule again, now that the forward pass has run.

        Args:
            shapes: The activations' shapes without the batch.
            hooked: The nodes whose modules compute something else because of a hook.
            sizes: What the nodes that compute with sizes have given, by name.
            complex_values: The nodes whose values are complex numbers.

        Raises:
            LayerError: If the layer is no tensor.
            UnsupportedOpsError: If some rules cannot invert their ops as they are.
        """
        if self.tail.cut not in shapes:
            raise LayerError(
                f"layer {self.tail.cut.name!r} is no tensor: name what it is made of, or what is "
                "made of it"
            )
        problems = []
        for step in self.steps:
            op = _with_shapes(step.op, step.node, step.inputs, shapes).with_sizes(sizes)
            reason = step.rule.supports(op)
            if step.node in hooked and op.type is not vocabulary.region:  # that runs its hooks
                reason = "a hook of the module changes its value, which no rule can see"
                remedy = "remove the hook, or write what it does in the forward of the model"
                problems.append(_problem(op, reason, step.rule, remedy))
            elif not {step.node, *step.inputs}.isdisjoint(complex_values):
                reason = "its values are complex numbers, and no rule is for these"
                remedy = "cut behind it, or in front of where the numbers become complex and solve "
                remedy += 'all between as one: policy="joint", or a RegionRule where they are real'
                problems.append(_problem(op, reason, step.rule, remedy))
            elif reason is not None:
                end = _end_of_region(op, step.node, step.rule)
                problems.append(_problem(op, reason, step.rule, region_at=end))
        if problems:
            raise UnsupportedOpsError(problems)


def make_plan(
    network: Network, tail: Tail, policy: Policy, shapes: Mapping[fx.Node, Shape] | None = None
) -> Plan:
    """Choose a rule for every op of a tail, and for every region that is solved as one.

    Args:
        network: The data flow of the forward graph.
        tail: What is inverted.
        policy: Chooses the rules.
        shapes: The activations' shapes without the batch, if they are known already.

    Raises:
        UnsupportedOpsError: If some ops cannot be inverted; names all of them.
        PolicyError: If the policy overrides a node that is not there, or gives one options that its
            rule does not have.
        LayerError: If the policy cuts the tail where a path goes past the cut, or no rule answers
            for the cut.
    """
    plan, problems = draft_plan(network, tail, policy, shapes)
    if problems:
        raise UnsupportedOpsError(problems)
    return plan


def draft_plan(
    network: Network, tail: Tail, policy: Policy, shapes: Mapping[fx.Node, Shape] | None = None
) -> tuple[Plan, tuple[UnsupportedOp, ...]]:
    """Return a plan of what can be inverted, and in forward order the ops that cannot.

    Args:
        network: The data flow of the forward graph.
        tail: What is inverted.
        policy: Chooses the rules.
        shapes: The activations' shapes without the batch, if they are known already.

    Raises:
        PolicyError: If the policy overrides a node that is not there, or gives one options that its
            rule does not have; not told where problems leave open which nodes have a rule.
        LayerError: If the policy cuts the tail where a path goes past the cut; or no rule answers
            for the cut, though all ops can be inverted.
    """
    planner = _Planner(network, policy, shapes)
    joint: list[tuple[fx.Node, fx.Node]] = []
    above = tail
    if policy.joint is not None:
        joint = joint_links(network, tail, policy.joint)
        above = network.tail(top(network, tail, policy.joint))  # above it, every op has its rule
    planner.heads(above, embeds=not joint or above.cut is not above.logits)
    for start, end in reversed(links(network, above)):
        if end not in network.heads:
            planner.link(start, end)
    problems = planner.problems()
    names = {name for step in planner.steps for name in (step.op.path, step.op.name)}
    for start, end in reversed(joint):
        planner.joint(start, end)
    if not problems and tail.cut not in planner.answered and planner.steps:
        raise LayerError(
            f"no rule answers for {network.traced.paths[tail.cut]!r}: whatever reads it holds it "
            'at its forward value. Cut elsewhere, or take branches="region"'
        )
    if not problems:
        if planner.unread:
            listed = "; ".join(reversed(planner.unread))
            raise PolicyError(
                f"the policy gives options that a node's rule does not have: {listed}"
            )
        policy.check_nodes(names, {network.traced.paths[node] for node in tail.nodes})
    beyond = [op_type(node, network.traced.root) for node in above.nodes if node in network.heads]
    plan = Plan(
        tuple(planner.steps),
        tail,
        takes_scores=vocabulary.argmax not in beyond,
        class_dim=network.class_dim(),
        trust_region=policy.trust_region,
    )
    return plan, problems


class _Planner:
    """Walks back through a tail and collects its steps, and what has no rule.

    Attributes:
        steps: The inversions, in the order of the walk back.
        answered: The nodes that have a target.
        unread: What is said of options that the policy gives a node whose rule does not have them.
    """

    def __init__(
        self, network: Network, policy: Policy, shapes: Mapping[fx.Node, Shape] | None
    ) -> None:
        self._network, self._policy, self._shapes = network, policy, shapes
        self._problems: list[UnsupportedOp] = []
        self._by_name = {node.name: node for node in network.traced.graph.nodes}
        self.steps: list[Step] = []
        self.answered = {network.output}
        self.unread: list[str] = []

    def heads(self, tail: Tail, *, embeds: bool) -> None:
        """Take labels through softmax, and embed them at the logits."""
        network = self._network
        self.answered.add(tail.logits)
        embedding: tuple[Op, fx.Node | None] = (
            _unsaid_argmax(tail.logits, network.class_dim()),
            None,
        )
        for node in reversed(tail.nodes):
            if node in network.heads:
                op = bind(node, network.traced, network.live)
                if op.type is vocabulary.argmax:  # of what reads the logits; they are embedded
                    embedding = (replace(op, inputs={"input": tail.logits.name}), node)
                else:
                    self._add(op, node, self._policy.rule_for(op), passes_labels=True)
        if embeds:  # else a joint region takes the labels
            self._add(*embedding, self._policy.rule_for(embedding[0]), passes_labels=True)

    def link(self, start: fx.Node, end: fx.Node) -> None:
        """Invert what lies between two neighbours that all paths lead through."""
        inside = between(self._network, start, end)
        op = self._bind(end, {start, *inside})
        asked = isinstance(self._policy.rule_at(op), RegionRule)
        branching = branches(self._network, start, end)
        if asked or (branching and self._policy.branches_at(op) == "region"):
            self._region(op, start, end)
        else:
            nodes = (node for node in self._network.traced.graph.nodes if node in inside)
            for node in (end, *reversed(tuple(nodes))):
                self._op(node, {start, *inside})

    def _region(self, op: Op, start: fx.Node, end: fx.Node) -> None:
        """Invert all between two neighbours on the chain at once."""
        rule = self._policy.rule_at(op)
        if rule is not None and not isinstance(rule, RegionRule):
            reason = "a region ends in it, and the policy gives it a rule for the op alone"
            remedy = f'policy.override(node={op.path!r}, rule=..., branches="rules")'
            self._problems.append(_problem(op, reason, rule, remedy))
            self.answered.add(start)  # so that every problem is found
        else:
            op = region(self._network, start, end)
            self._add(op, end, self._policy.rule_for(op))

    def joint(self, start: fx.Node, end: fx.Node) -> None:
        """Invert all between two nodes that all paths lead through jointly."""
        assert self._policy.joint is not None
        op = region(self._network, start, end)
        rule = JointRule(self._policy.joint, self._network.traced.batch)
        inputs = self._inputs(op)
        self.steps.append(Step(op, rule, end, inputs, inputs[:1]))
        self.answered.add(start)

    def _op(self, node: fx.Node, reached: set[fx.Node]) -> None:
        """Invert one op by its rule, if there is a target for it."""
        is_part = node.target is operator.getitem and any(
            self._network.returns_several(source) for source in node.all_input_nodes
        )
        if node not in self.answered:
            return
        op = self._bind(node, reached)
        if is_part:  # the walk puts the parts of a tuple together itself
            self.answered.add(node.all_input_nodes[0])
            if not isinstance(node.args[1], int):
                reason = "it takes several parts of a tuple at once"
                remedy = "take them one by one"
                if self._policy.branches != "region":
                    remedy += ', or solve the branches as a region: branches="region"'
                self._problems.append(_problem(op, reason, None, remedy))
            return
        sources = {op.inputs[name] for name in op.free}
        one = len(sources) == 1 and not self._network.returns_several(node)
        rule = self._policy.rule_for(op)
        if one and isinstance(rule, RegionRule):
            op = region(self._network, self._by_name[sources.pop()], node)
        self._add(op, node, rule)

    def _inputs(self, op: Op) -> tuple[fx.Node, ...]:
        return tuple(self._by_name[name] for name in op.inputs.values())

    def _bind(self, node: fx.Node, reached: set[fx.Node]) -> Op:
        op = bind(node, self._network.traced, self._network.live)
        held = {name for name, source in op.inputs.items() if self._by_name[source] not in reached}
        return replace(op, held=frozenset(held))

    def _add(
        self, op: Op, node: fx.Node | None, rule: Rule | None, *, passes_labels: bool = False
    ) -> None:
        reason = "no rule is registered for it" if rule is None else _misplaced(rule, op)
        inputs = self._inputs(op)
        seen = _with_shapes(op, node, inputs, self._shapes)
        if rule is not None and reason is None:
            unread = self._policy.unread_options(op, rule)
            if unread:
                known = ", ".join(field.name for field in fields(rule)) or "none"
                self.unread.append(
                    f"{op.path!r}: {rule} has no {', no '.join(unread)}, but {known}"
                )
            if not passes_labels:
                rule = wait_for_sizes(rule, op)
            reason = rule.supports(seen)
        if reason is not None:
            problem = _problem(seen, reason, rule, region_at=_end_of_region(op, node, rule))
            if self._policy.branches == "rules" and len({op.inputs[n] for n in op.free}) > 1:
                whole = f'{problem.remedy}; or solve the branches as a region: branches="region"'
                problem = replace(problem, remedy=whole)
            self._problems.append(problem)
        names = op.free if rule is None or reason is not None else rule.reconstructs(op)
        reconstructed = tuple(self._by_name[op.inputs[name]] for name in names)
        self.answered.update(reconstructed)  # so that every problem is found
        if rule is not None and reason is None and reconstructed:
            self.steps.append(Step(op, rule, node, inputs, reconstructed, passes_labels))

    def problems(self) -> tuple[UnsupportedOp, ...]:
        """Return the ops that cannot be inverted, in forward order."""
        traced = self._network.traced
        order = {traced.paths[node]: i for i, node in enumerate(traced.graph.nodes)}
        return tuple(sorted(self._problems, key=lambda p: order.get(p.path, len(order))))


def _misplaced(rule: Rule, op: Op) -> str | None:
    """Return why a rule is not for an op, if it is for others."""
    known = registry.default.op_types(type(rule))
    if not known or op.type in known or rule.anywhere:
        return None
    return f"{type(rule).__name__} is for {', '.join(op_type.name for op_type in known)}"


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
    if node is None or shapes is None or not shapes.keys() >= set(inputs):
        return op
    return op.with_shapes(tuple(shapes[source] for source in inputs), shapes.get(node))


def _end_of_region(op: Op, node: fx.Node | None, rule: Rule | None) -> str | None:
    """Return where a region that solves an op could end: in it, or in what takes its one part."""
    if node is None or isinstance(rule, RegionRule) or op.type in vocabulary.HEADS:
        return None
    if len({op.inputs[name] for name in op.free}) != 1:
        return None
    parts = parts_of(node) if op.type is None or op.type.several else []
    if not parts:
        return op.path
    return parts[0].name if len(parts) == 1 else None


def _problem(
    op: Op,
    reason: str,
    rule: Rule | None,
    remedy: str | None = None,
    region_at: str | None = None,
) -> UnsupportedOp:
    spelling = describe(op.spelling)
    kind = spelling if op.type is None else f"{op.type.name} ({spelling})"
    if remedy is None:
        remedy = f"@frfx.register_rule({spelling}) on a subclass of frfx.rules.Rule"
        if rule is not None:
            remedy = (
                f"policy.override(node={op.path!r}, rule=MyRule()), or "
                f"@frfx.register_rule({spelling}, overwrite=True) on a subclass of frfx.rules.Rule"
            )
        if region_at is not None:
            region = f"policy.override(node={region_at!r}, rule=frfx.rules.RegionRule())"
            remedy = f"{remedy}; or {region}, if it has a derivative"
    return UnsupportedOp(op.path, kind, op.show_shapes(), reason, remedy)
