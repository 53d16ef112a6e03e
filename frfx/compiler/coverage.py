"""How every op between a layer and the output is inverted, before anything is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, fx

from frfx import vocabulary
from frfx.compiler.bind import op_type
from frfx.compiler.plan import Plan, Step, draft_plan
from frfx.compiler.prepare import Preparation
from frfx.compiler.probe import run_forward
from frfx.compiler.regions import between
from frfx.compiler.tail import LayerInfo, Layers, Network, Tail
from frfx.errors import UnsupportedOp, UnsupportedOpsError
from frfx.joint import JointRule
from frfx.policy import Policy
from frfx.rules.region import RegionRule

_UNSUPPORTED = "not supported"


def coverage(network: Network, cut: fx.Node, policy: Policy, x: Tensor | None = None) -> Layers:
    """Return the nodes from a layer to the output, each with how a policy inverts it.

    Args:
        network: The data flow of the forward graph.
        cut: The layer's node.
        policy: Chooses the rules.
        x: A batch, at whose shapes the rules are asked, too.

    Raises:
        LayerError: If nothing can be inverted from there.
        PolicyError: If the policy overrides a node that is not there.
        InputError: If the network cannot take the batch.
    """
    tail = network.tail(cut)
    shapes = None if x is None else run_forward(network.traced, x).shapes
    plan, problems = draft_plan(network, tail, policy, shapes)
    found = {problem.path: problem for problem in problems}
    if x is not None:
        found |= {problem.path: problem for problem in _at_sizes(network, plan, x)}
    known = {row.name: row for row in network.layers()}
    how = dict(_inversions(network, tail, plan))
    paths = network.traced.paths
    rows = [replace(known[paths[cut]], inversion="reconstructed")]
    for node in tail.nodes:
        inversion = _UNSUPPORTED if paths[node] in found else how.get(node, "held")
        rows.append(replace(known[paths[node]], inversion=inversion))
    rows += [
        LayerInfo(None, step.op.path, vocabulary.argmax.name, 0, str(step.rule))
        for step in plan.steps
        if step.node is None  # the argmax that goes unsaid
    ]
    if found:
        note = str(UnsupportedOpsError(tuple(found.values())))
    elif x is None:
        note = "Without example_input, what depends on the size of the image is not checked."
    else:
        note = ""
    return Layers(rows, note, tuple(found.values()))


def _at_sizes(network: Network, plan: Plan, x: Tensor) -> tuple[UnsupportedOp, ...]:
    """Return what of a plan cannot be inverted once the forward pass has run."""
    try:
        Preparation(network.traced, plan, {}).probe(x)
    except UnsupportedOpsError as error:
        return error.ops
    return ()


def _inversions(network: Network, tail: Tail, plan: Plan) -> Iterator[tuple[fx.Node, str]]:
    """Yield how nodes are inverted; those that are left out are held."""
    steps = {step.node: step for step in plan.steps}
    for node in tail.nodes:
        if node in steps:
            yield node, _show(network, steps[node])
        elif op_type(node, network.traced.root) in vocabulary.HEADS and node in network.heads:
            yield node, "labels pass"
        elif op_type(node, network.traced.root) is vocabulary.getitem:
            source = node.all_input_nodes[0]
            if source in steps and network.returns_several(source):
                yield node, f"a part of {network.traced.paths[source]!r}"
    for step in plan.steps:
        if step.node is not None and _is_region(step):
            ends = f"in the region that ends in {step.op.path!r}"
            for node in between(network, step.inputs[0], step.node):
                yield node, ends


def _show(network: Network, step: Step) -> str:
    """Return the rule of a step, what it starts from if it is a region, and what it holds."""
    paths = network.traced.paths
    if _is_region(step):
        held = [repr(paths[node]) for node in step.inputs[1:]]
        shown = f"{step.rule}, a region from {paths[step.inputs[0]]!r}"
    else:
        held = [name for name in step.op.inputs if name not in step.rule.reconstructs(step.op)]
        shown = str(step.rule)
    return f"{shown}; holds {', '.join(held)}" if held else shown


def _is_region(step: Step) -> bool:
    return isinstance(step.rule, (RegionRule, JointRule))
