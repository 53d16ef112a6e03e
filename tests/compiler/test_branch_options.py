"""Options of regions, a region rule for an op of its own, and the trust region."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import frfx
from frfx import ops, registry, rules, vocabulary
from tests.branch_walks import A, B, Blocks, by_sample, exact, near, residual_block, steps
from tests.oracles import (
    invert,
    jacobian,
    normal,
    reconstruct,
    relative,
)

# --- options ---


def twice(x: Tensor, a: Tensor) -> Tensor:
    """Two residual blocks, `add` and `add_1`."""
    return residual_block(residual_block(x, a), a)


def test_branches_by_node():
    default = {"add": "region", "add_1": "region"}
    for chosen in ("add", "add_1"):
        policy = frfx.policy.minimal().override(node=chosen, branches="rules")
        found = dict(steps(invert(twice, policy, a=A)))
        assert {name: found[name] for name in default} == {**default, chosen: "add"}
        policy = frfx.policy.minimal(branches="rules").override(node=chosen, branches="region")
        found = dict(steps(invert(twice, policy, a=A)))
        assert {name: found[name] for name in default} == {"add": "add", "add_1": "add"} | {
            chosen: "region"
        }


def test_branches_by_op():
    policy = frfx.policy.minimal().override(op=torch.add, branches="rules")
    assert "region" not in dict(steps(invert(twice, policy, a=A))).values()
    policy = policy.override(node="add", branches="region")
    assert dict(steps(invert(twice, policy, a=A)))["add"] == "region"


OPTIONS = {
    "policy": lambda **options: frfx.policy.minimal(**options),
    "op": lambda **options: frfx.policy.minimal().override(op=vocabulary.region, **options),
    "node": lambda **options: frfx.policy.minimal().override(node="add", **options),
    "rule": lambda **options: frfx.policy.minimal().override(
        node="add", rule=rules.RegionRule(**options)
    ),
}


def rule_of(inverse: frfx.Inverse, node: str) -> rules.Rule:
    """Return the rule of a step."""
    return next(step.rule for step in inverse.plan.steps if step.op.path == node)


@pytest.mark.parametrize("way", OPTIONS)
def test_damping_reaches_the_region(way):
    inverse = invert(twice, OPTIONS[way](damping=0.3), a=A)
    assert rule_of(inverse, "add").damping == 0.3
    assert rule_of(inverse, "add_1").damping == (0.3 if way in ("policy", "op") else None)


@pytest.mark.parametrize("way", ["op", "node", "rule"])
def test_iteration_reaches_the_region(way):
    options = {"tolerance": 1e-9, "max_steps": 77, "unconverged": "ignore"}
    rule = rule_of(invert(twice, OPTIONS[way](**options), a=A), "add")
    assert rule == rules.RegionRule(**options)


def test_damping_is_relative_to_the_largest_singular_value():
    x, target = normal(0, 4, 6), near(residual_block, normal(0, 4, 6), a=A)
    policy = exact().override(op=vocabulary.region, damping=0.1)
    found = reconstruct(residual_block, x, target, policy, a=A)
    for k in range(4):
        one = slice(k, k + 1)
        matrix = jacobian(lambda v: residual_block(v, A), x[one])
        asked = (target - residual_block(x, A))[k].numpy()
        step = (found - x)[k].numpy()
        left, values, right = np.linalg.svd(matrix)
        # Each component is shrunk by s^2 / (s^2 + shift): what the shift is, every one tells.
        seen, moved = left.T @ asked, right @ step
        shifts = values * seen / moved - values**2
        assert np.ptp(shifts) < 1e-6 * values[0] ** 2
        assert 0.8 * 0.1 <= shifts.mean() / values[0] ** 2 <= 0.1 * (1 + 1e-6)


def stiff(x: Tensor, a: Tensor) -> Tensor:
    """A residual block whose Jacobian is badly conditioned."""
    return 1e-3 * x + F.linear(x, a)


def test_what_has_not_converged():
    x, target = normal(0, 4, 6), near(stiff, normal(0, 4, 6), a=A)
    hard = frfx.policy.minimal().override(
        op=vocabulary.region, damping=0.0, tolerance=1e-12, max_steps=2
    )

    def found(unconverged: str) -> Tensor:
        policy = hard.override(op=vocabulary.region, unconverged=unconverged)
        return reconstruct(stiff, x, target, policy, a=A)

    with pytest.warns(frfx.ConvergenceWarning, match=r"add .*left 4 of 4 samples .* 2 steps"):
        warned = found("warn")
    with pytest.raises(frfx.ConvergenceError, match="left 4 of 4 samples above its tolerance"):
        found("raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(found("ignore"), warned)
    before = (stiff(x, A) - target).norm(dim=1)
    assert bool(((stiff(warned, A) - target).norm(dim=1) < before).all())


@pytest.mark.parametrize(
    "options", [{"tolerance": 0.0}, {"tolerance": 1.5}, {"max_steps": 0}, {"unconverged": "hide"}]
)
def test_options_that_no_region_can_keep_to(options):
    with pytest.raises(frfx.PolicyError):
        rules.RegionRule(**options)
    with pytest.raises(frfx.PolicyError):
        invert(twice, frfx.policy.minimal().override(op=vocabulary.region, **options), a=A)


def test_overrides_that_meet_nothing():
    with pytest.raises(frfx.PolicyError, match="'tanh', which has no step of its own: it lies"):
        invert(twice, frfx.policy.minimal().override(node="tanh", clamp_margin=0.1), a=A)
    policy = frfx.policy.minimal(branches="rules").override(node="tanh", clamp_margin=0.1)
    assert rule_of(invert(twice, policy, a=A), "tanh").clamp_margin == 0.1
    with pytest.raises(frfx.PolicyError, match=r"'tahn', which is no node between .* 'tanh'"):
        invert(twice, policy.override(node="tahn", clamp_margin=0.1), a=A)


def test_a_rule_for_the_op_that_a_region_ends_in():
    """It would not be asked, or be asked about more than it knows: say which."""
    policy = frfx.policy.minimal().override(node="add", rule=rules.SumRule())
    with pytest.raises(frfx.UnsupportedOpsError, match="rule for the op alone") as caught:
        invert(twice, policy, a=A)
    assert caught.value.ops[0].remedy == (
        "policy.override(node='add', rule=..., branches=\"rules\")"
    )
    both = policy.override(node="add_1", rule=rules.SumRule())
    with pytest.raises(frfx.UnsupportedOpsError) as caught:
        invert(twice, both, a=A)
    assert [op.path for op in caught.value.ops] == ["add", "add_1"]
    policy = policy.override(node="add", rule=rules.SumRule(), branches="rules")
    assert dict(steps(invert(twice, policy, a=A)))["add"] == "add"


# --- RegionRule for an op of its own ---


@pytest.fixture
def _as_found():
    """Give registry and vocabulary back as they were."""
    kept, spellings = dict(registry.default._rules), dict(ops._SPELLINGS)
    yield
    registry.default._rules = kept
    ops._SPELLINGS.clear()
    ops._SPELLINGS.update(spellings)


def odd(x: Tensor, shift: float = 0.5) -> Tensor:
    """A function of a user's own."""
    return torch.erf(x).cumsum(1) + shift


@pytest.mark.usefixtures("_as_found")
def test_a_function_registered_as_a_region():
    def function(x, a):
        return odd(F.linear(x, a), shift=2.0)

    frfx.register_rule(odd)(rules.RegionRule)
    x = normal(0, 4, 6) / 3
    for branches in ("rules", "region"):
        policy = exact(branches).override(op=odd, damping=0.0, tolerance=1e-13, max_steps=500)
        inverse = invert(function, policy, a=A)
        nodes = inverse.reconstruct(x, near(function, x, a=A))
        assert [name for name, _ in steps(inverse)] == ["argmax", "odd", "linear"]
        start = nodes["linear"]
        expected = by_sample(lambda h: odd(h, 2.0), start.forward, nodes["odd"].target)
        assert relative(start.target, expected) < 1e-8


def test_an_affine_op_as_a_region_is_what_its_rule_makes_of_it():
    def function(x, a, b):
        return F.linear(F.linear(x, a), b)

    x, target = normal(0, 4, 6), normal(1, 4, 3)
    tensors = {"a": A, "b": B[:3]}
    expected = reconstruct(function, x, target, **tensors)
    options = {"damping": 0.0, "tolerance": 1e-13}
    for where in ({"op": nn.Linear}, {"node": "linear"}, {"node": "linear_1"}):
        policy = frfx.policy.minimal().override(**where, rule=rules.RegionRule(**options))
        assert relative(reconstruct(function, x, target, policy, **tensors), expected) < 1e-9


def test_what_a_region_rule_is_not_for():
    def function(x, a):
        left, right = x.chunk(2, 1)
        return left * F.linear(right, a)

    policy = frfx.policy.minimal(branches="rules")
    chosen = {
        torch.chunk: (
            "chunk",
            "it returns several tensors, and a region ends in one: name what takes a part",
        ),
        torch.mul: ("mul", "it is applied to getitem, linear, and a region begins at one value"),
    }
    for op, (path, reason) in chosen.items():
        with pytest.raises(frfx.UnsupportedOpsError) as caught:
            invert(function, policy.override(op=op, rule=rules.RegionRule()), a=A[:3, :3])
        assert [(problem.path, problem.reason) for problem in caught.value.ops] == [(path, reason)]


def test_a_region_that_nothing_flows_back_through():
    with pytest.raises(frfx.UnsupportedOpsError, match="nothing flows back") as caught:
        reconstruct(lambda x: x.detach() * x.detach(), normal(0, 4, 6), normal(1, 4, 6))
    assert caught.value.ops[0].remedy.endswith("branches='rules', or cut behind it")


def test_ops_of_several_values_that_have_no_rule():
    """One cell after the other: each reads what comes in, and what the one before it has left."""

    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.cell, self.last = nn.Linear(4, 6), nn.GRUCell(3, 5), nn.Linear(5, 2)

        def forward(self, x):
            x = self.first(x)
            return self.last(self.cell(x[:, 3:], self.cell(x[:, :3])))

    model, x, y = Cells().eval(), torch.randn(3, 4), torch.tensor([0, 1, 0])
    with pytest.raises(frfx.UnsupportedOpsError) as caught:
        frfx.invert(model, "first", policy=frfx.policy.minimal(branches="rules"))
    assert any(
        p.remedy.endswith('; or solve the branches as a region: branches="region"')
        for p in caught.value.ops
    )
    assert frfx.invert(model, "first", policy="minimal")(x, y).shape == (3, 6)


# --- the trust region ---


@pytest.mark.parametrize("branches", ["region", "rules"])
@pytest.mark.parametrize("radius", [1e-3, 0.1])
def test_the_trust_region_bounds_every_node(branches, radius):
    model, x = Blocks(), normal(0, 4, 6)
    target = model(x) + 5 * normal(7, 4, 6)
    nodes = frfx.invert(model, "stem", policy=exact(branches, trust_region=radius)).reconstruct(
        x, target
    )
    free = frfx.invert(model, "stem", policy=exact(branches)).reconstruct(x, target)
    assert list(nodes) == list(free)
    reached = []
    for name, node in nodes.items():
        moved = (node.target - node.forward).norm(dim=1) / node.forward.norm(dim=1)
        if name == "fc":  # what the user asks for
            assert torch.equal(node.target, target)
        else:
            assert bool((moved <= radius * (1 + 1e-9)).all()), name
            reached.append(bool((moved > radius * (1 - 1e-9)).any()))
    assert any(reached)


def test_a_trust_region_that_nothing_reaches_changes_nothing():
    model, x, labels = Blocks(), normal(0, 4, 6), torch.arange(4)
    for branches in ("region", "rules"):
        free = frfx.invert(model, "stem", policy=exact(branches))(x, labels)
        bound = frfx.invert(model, "stem", policy=exact(branches, trust_region=1e6))(x, labels)
        assert relative(bound, free) < 1e-14


def test_the_trust_region_keeps_the_direction_and_leaves_labels_alone():
    x, labels = normal(0, 4, 6), torch.arange(4)
    free = invert(residual_block, exact(), a=A).reconstruct(x, labels)
    bound = invert(residual_block, exact(trust_region=1e-3), a=A).reconstruct(x, labels)
    assert torch.equal(free["add"].target, bound["add"].target)
    step, short = free.feature - x, bound.feature - x
    torch.testing.assert_close(short.norm(dim=1), 1e-3 * x.norm(dim=1))
    torch.testing.assert_close((step * short).sum(1), step.norm(dim=1) * short.norm(dim=1))


@pytest.mark.parametrize("branches", ["region", "rules"])
def test_the_trust_region_of_a_feature_of_zeros_is_a_point(branches):
    x = normal(0, 4, 6)
    x[1] = 0
    found = reconstruct(residual_block, x, normal(1, 4, 6), exact(branches, trust_region=0.1), a=A)
    assert bool(found.isfinite().all())
    assert torch.equal(found[1], x[1])
    assert bool((found[0] != x[0]).any())


def test_the_trust_region_of_one_number_a_sample():
    def function(x, a):
        return F.linear(x, a).squeeze(1) * 2 + 1

    x = normal(0, 4, 6)
    nodes = invert(function, exact(trust_region=0.01), a=A[:1]).reconstruct(x, normal(1, 4))
    moved = nodes["squeeze"].target - nodes["squeeze"].forward
    assert bool((moved.abs() <= 0.01 * nodes["squeeze"].forward.abs() * (1 + 1e-9)).all())


@pytest.mark.parametrize("radius", [0, -1.0, float("nan"), float("inf"), "wide"])
def test_radii_that_bound_nothing(radius):
    with pytest.raises(frfx.PolicyError, match="trust_region is a finite number above 0"):
        frfx.policy.minimal(trust_region=radius)
