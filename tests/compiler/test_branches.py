"""The walk back over any graph: fan-out, what is held, parts of tuples, regions, trust region."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import frfx
from frfx import ops, registry, rules, vocabulary
from tests.networks_zoo import snapshot
from tests.oracles import (
    Apply,
    Array,
    embedding_by_quadprog,
    invert,
    jacobian,
    minimal_affine_preimage,
    normal,
    reconstruct,
    relative,
)

A, B, C = (normal(seed, 6, 6) for seed in (101, 102, 103))


def exact(branches: Any = "region", **options: Any) -> frfx.policy.Policy:
    """Return the minimal policy with regions solved down to rounding, without damping."""
    policy = frfx.policy.minimal(branches=branches, **options)
    return policy.override(op=vocabulary.region, damping=0.0, tolerance=1e-13, max_steps=2000)


def by_sample(function: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> Array:
    """Return `x + J+ (y* - f(x))` of every sample by NumPy's pseudo-inverse of its Jacobian."""
    rows = zip(x, target, strict=True)
    found = [minimal_affine_preimage(function, one[None], y[None], 1e-11) for one, y in rows]
    return np.concatenate(found)


def near(function: Callable[..., Tensor], x: Tensor, **tensors: Tensor) -> Tensor:
    """Return a target near to what the function gives."""
    output = function(x, **tensors)
    return output + 0.2 * normal(7, *output.shape)


def steps(inverse: frfx.Inverse) -> list[tuple[str, str]]:
    """Return the steps of a walk, by node and op."""
    return [(row.node, row.op) for row in inverse.summary()]


# --- what is one step ---


class Blocks(nn.Module):
    """A line, a residual block with another inside, a line, a gate, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("stem", "a", "b", "c", "mid", "gate", "fc"):
            self.add_module(name, nn.Linear(6, 6))
        self.double().requires_grad_(False)

    def block(self, x: Tensor) -> Tensor:
        """A residual block in a residual block."""
        h = torch.tanh(self.a(x))
        h = h + self.b(torch.tanh(h))
        return x + self.c(h)

    def gated(self, x: Tensor) -> Tensor:
        """A gate."""
        return x * torch.sigmoid(self.gate(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        return self.fc(self.gated(torch.tanh(self.mid(x))))


BLOCKS = [("mul", "region"), ("tanh_2", "tanh"), ("mid", "linear"), ("add_1", "region")]


def test_lines_by_rules_and_blocks_as_regions():
    model, x = Blocks(), normal(0, 4, 6)
    target = near(model, x)
    inverse = frfx.invert(model, "stem", policy=exact())
    assert steps(inverse) == [("argmax", "argmax"), ("fc", "linear"), *BLOCKS]
    nodes = inverse.reconstruct(x, target)
    pairs = {"mul": ("tanh_2", model.gated), "add_1": ("stem", model.block)}
    for end, (start, function) in pairs.items():
        expected = by_sample(function, nodes[start].forward, nodes[end].target)
        assert relative(nodes[start].target, expected) < 1e-8
    assert relative(inverse(x, target), nodes.feature) == 0


def test_a_cut_inside_of_a_block():
    """Of the region that is left, what the layer does not reach is held."""
    model, x = Blocks(), normal(0, 4, 6)
    labels = torch.arange(4)
    inverse = frfx.invert(model, "tanh", policy=exact())
    assert steps(inverse)[2:] == [*BLOCKS[:3], ("add_1", "add"), ("c", "linear"), ("add", "region")]
    nodes = inverse.reconstruct(x, labels)
    held = model.stem(x)
    torch.testing.assert_close(held + nodes["c"].target, nodes["add_1"].target)
    expected = by_sample(
        lambda h: h + model.b(torch.tanh(h)), nodes["tanh"].forward, nodes["add"].target
    )
    assert relative(nodes.feature, expected) < 1e-8


def test_a_region_that_begins_at_the_input_and_ends_in_the_logits():
    def function(x, a):
        return x + torch.tanh(F.linear(x, a))

    x, labels = normal(0, 4, 6), torch.arange(4)
    inverse = invert(function, exact(), a=A)
    assert steps(inverse) == [("argmax", "argmax"), ("add", "region")]
    nodes, logits = inverse.reconstruct(x, labels), function(x, A)
    wanted = [embedding_by_quadprog(row.numpy(), int(y), 0.5) for row, y in zip(logits, labels)]  # noqa: B905
    assert relative(nodes["add"].target, np.stack(wanted)) < 1e-9
    assert (
        relative(nodes.feature, by_sample(lambda v: function(v, A), x, nodes["add"].target)) < 1e-9
    )


HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: torch.softmax(z, 1),
    "log_softmax": lambda z: F.log_softmax(z, -1),
    "argmax": lambda z: z.argmax(1),
    "both": lambda z: torch.softmax(z, 1).argmax(1),
}


@pytest.mark.parametrize("head", HEADS)
def test_labels_pass_the_heads_behind_a_region(head):
    def function(x, a):
        return x + torch.tanh(F.linear(x, a))

    def headed(x, a):
        return HEADS[head](function(x, a))

    x, labels = normal(0, 4, 6), torch.arange(4)
    expected = reconstruct(function, x, labels, exact(), a=A)
    assert relative(reconstruct(headed, x, labels, exact(), a=A), expected) < 1e-12


def test_a_float_target_behind_softmax_and_a_region():
    def function(x, a):
        return x + torch.tanh(F.linear(x, a))

    x, target = normal(0, 4, 6), torch.softmax(normal(1, 4, 6), 1)
    inverse = invert(lambda x, a: torch.softmax(function(x, a), 1), exact(), a=A)
    nodes = inverse.reconstruct(x, target)
    logits = function(x, A)
    error = target.log() - torch.softmax(logits, 1).log()
    torch.testing.assert_close(nodes["add"].target, logits + error - error.mean(1, keepdim=True))
    expected = by_sample(lambda v: function(v, A), x, nodes["add"].target)
    assert relative(nodes.feature, expected) < 1e-9


def test_a_head_that_leads_nowhere_tells_nothing_of_the_classes():
    class Side(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x):
            x = self.fc(x)
            self.seen = torch.softmax(x, 0)
            return x

    x, labels = normal(0, 5, 6).float(), torch.arange(5) % 4
    model = Side().eval()
    found = frfx.invert(model, "x", policy="minimal")(x, labels)
    assert bool((model.fc(found).argmax(1) == labels).all())


# --- fan-out, one value under two names, one module twice ---


def test_answers_of_nested_fan_outs_are_averaged_by_their_readers():
    def function(x, a, b, c):
        return torch.cat([F.linear(x, a), F.linear(x, b), F.linear(x, c)], 1)

    x = normal(0, 4, 6)
    target = near(function, x, a=A, b=B, c=C)
    asked = (target - function(x, A, B, C)).numpy().reshape(4, 3, 6)
    answers = [asked[:, i] @ np.linalg.pinv(m.numpy()).T for i, m in enumerate((A, B, C))]
    found = reconstruct(function, x, target, exact("rules"), a=A, b=B, c=C)
    assert relative(found - x, np.mean(answers, 0)) < 1e-9


TWICE: dict[str, Callable[[Tensor], Tensor]] = {
    "x + x": lambda x: x + x,
    "x * x": lambda x: x * x,
    "cat of one": lambda x: torch.cat([x, x], 1),
    "stack of one": lambda x: torch.stack([x, x, x], 1),
    "x - x / 3": lambda x: x - x / 3,
    "matmul": lambda x: x[:, None] @ x[:, :, None],
}


@pytest.mark.parametrize("name", TWICE)
def test_one_value_under_two_names(name):
    function, x = TWICE[name], normal(0, 4, 6)
    target = near(function, x)
    inverse = invert(function, exact())
    assert steps(inverse)[1][1] == "region"
    assert relative(inverse(x, target), by_sample(function, x, target)) < 1e-9


@pytest.mark.parametrize("name", ["x + x", "cat of one", "stack of one"])
def test_readers_that_agree_are_met_by_rules_too(name):
    function, x, wanted = TWICE[name], normal(0, 4, 6), normal(1, 4, 6)
    assert relative(reconstruct(function, x, function(wanted), exact("rules")), wanted) < 1e-9


class Reused(nn.Module):
    """Calls one module twice in a row, and once more beside."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(6, 6).double().requires_grad_(False), nn.Tanh()
        self.fc.weight.data = A / 3

    def forward(self, x):
        x = self.act(self.fc(x))
        x = self.act(self.fc(x))
        return x + self.fc(x)


def test_a_module_that_is_called_several_times():
    model, x, wanted = Reused().eval(), 0.3 * normal(0, 4, 6), 0.3 * normal(1, 4, 6)
    inverse = frfx.invert(model, "x", policy=exact(clamp_margin=1e-9))
    assert [name for name, _ in steps(inverse)[1:]] == ["add", "act_1", "fc_1", "act", "fc"]
    nodes = inverse.reconstruct(x, model(wanted))
    assert relative(nodes.feature, wanted) < 1e-6  # the region is linear, and every op can be met
    by_rules = frfx.invert(model, "x", policy=exact("rules"))
    assert len(by_rules.plan.steps) == 7
    assert relative(by_rules(x, model(x)), x) < 1e-9


# --- parts of a tuple ---


def test_parts_take_different_ways():
    def function(x, a, b):
        left, right = x.chunk(2, 1)
        return torch.cat([F.linear(right, a), torch.tanh(F.linear(left, b))], 1)

    a, b = A[:3, :3], B[:3, :3] / 4
    x, wanted = 0.3 * normal(0, 4, 6), 0.3 * normal(1, 4, 6)
    for branches in ("rules", "region"):
        inverse = invert(function, exact(branches, clamp_margin=1e-9), a=a, b=b)
        assert relative(inverse(x, function(x, a, b)), x) < 1e-12
        if branches == "rules":
            assert relative(inverse(x, function(wanted, a, b)), wanted) < 1e-9
            assert steps(inverse)[-1] == ("chunk", "chunk")


def test_a_part_that_nobody_reads_stays():
    def function(x, a):
        first, _, last = x.split([1, 2, 3], 1)
        return torch.cat([F.linear(last, a), first], 1)

    x = normal(0, 4, 6)
    target = near(function, x, a=A[:3, :3])
    for branches in ("rules", "region"):
        found = reconstruct(function, x, target, exact(branches), a=A[:3, :3])
        assert torch.equal(found[:, 1:3], x[:, 1:3])
        assert relative(function(found, A[:3, :3]), target) < 1e-9


@pytest.mark.parametrize("second", [0, -2])
def test_a_part_that_is_taken_twice_has_the_mean_of_both_answers(second):
    def function(x, a, b):
        parts = x.chunk(2, 1)
        return torch.cat([F.linear(parts[0], a), F.linear(parts[second], b), parts[1]], 1)

    a, b, x = A[:3, :3], B[:3, :3], normal(0, 4, 6)
    target = near(function, x, a=a, b=b)
    asked = (target - function(x, a, b)).numpy().reshape(4, 3, 3)
    answers = [asked[:, i] @ np.linalg.pinv(m.numpy()).T for i, m in enumerate((a, b))]
    expected = np.concatenate([np.mean(answers, 0), asked[:, 2]], 1)
    assert relative(reconstruct(function, x, target, exact("rules"), a=a, b=b) - x, expected) < 1e-9


def test_several_parts_at_once():
    """As a region, whatever is done with a tuple; by rules, its parts are taken one by one."""

    def function(x, a):
        parts = x.chunk(3, 1)
        return torch.cat([F.linear(parts[0], a), torch.cat(parts[1:], 1)], 1)

    a, x = A[:2, :2], normal(0, 4, 6)
    target = near(function, x, a=a)
    found = reconstruct(function, x, target, exact(), a=a)
    assert relative(found, by_sample(lambda v: function(v, a), x, target)) < 1e-9
    with pytest.raises(
        frfx.UnsupportedOpsError, match="several parts of a tuple at once"
    ) as caught:
        invert(function, exact("rules"), a=a)
    assert 'branches="region"' in caught.value.ops[0].remedy


def test_a_line_through_a_part_is_no_branch():
    def function(x, a):
        return F.linear(x.chunk(2, 1)[1], a)

    x, a = normal(0, 4, 6), A[:3, :3]
    inverse = invert(function, frfx.policy.minimal(), a=a)
    assert steps(inverse) == [("argmax", "argmax"), ("linear", "linear"), ("chunk", "chunk")]
    target = near(function, x, a=a)
    found = inverse(x, target)
    assert relative(found, by_sample(lambda v: function(v, a), x, target)) < 1e-9
    assert "6 -> tuple" in str(inverse.summary())


def test_a_region_whose_paths_all_lead_through_a_tuple():
    """Nothing begins or ends in a tuple: the region goes on to the next tensor."""

    def function(x, a):
        left, right = torch.tanh(F.linear(x, a)).chunk(2, 1)
        return left * torch.sigmoid(right)

    x = normal(0, 4, 6)
    inverse = invert(function, exact(), a=A)
    assert steps(inverse)[1:] == [("mul", "region"), ("tanh", "tanh"), ("linear", "linear")]
    nodes = inverse.reconstruct(x, near(function, x, a=A))

    def gate(h: Tensor) -> Tensor:
        return h[:, :3] * torch.sigmoid(h[:, 3:])

    expected = by_sample(gate, nodes["tanh"].forward, nodes["mul"].target)
    assert relative(nodes["tanh"].target, expected) < 1e-9


def test_what_cannot_be_reconstructed():
    def halves(x):
        return x.chunk(2, 1)[0] + 1

    with pytest.raises(
        frfx.LayerError, match="'chunk' is a tuple of tensors: name what it is made"
    ):
        frfx.invert(Apply(halves).eval(), "chunk")

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.fc = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x):
            return self.fc(self.lstm(x)[0][:, -1])

    inverse = frfx.invert(Recurrent().eval(), "lstm")
    with pytest.raises(frfx.LayerError, match="'lstm' is no tensor: name what it is made of"):
        inverse(normal(0, 2, 4, 6).float(), torch.arange(2))


class HoldAll(rules.ProductRule):
    """Answers for none of its inputs."""

    def reconstructs(self, op):
        return ()


def test_a_cut_that_no_rule_answers_for():
    def function(x, a):
        return F.linear(x, a) * torch.tanh(x)

    policy = exact("rules").override(node="mul", rule=HoldAll())
    with pytest.raises(frfx.LayerError, match="no rule answers for 'x'") as caught:
        invert(function, policy, a=A)
    assert 'branches="region"' in str(caught.value)
    assert steps(invert(function, exact(), a=A))[-1] == ("mul", "region")


# --- options ---


def residual_block(x: Tensor, a: Tensor) -> Tensor:
    """A residual block."""
    return x + torch.tanh(F.linear(x, a))


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
        torch.chunk: ("chunk", "it returns a tuple, and a region ends in one tensor"),
        torch.mul: ("mul", "it is applied to getitem, linear, and a region begins at one value"),
    }
    for op, (path, reason) in chosen.items():
        with pytest.raises(frfx.UnsupportedOpsError) as caught:
            invert(function, policy.override(op=op, rule=rules.RegionRule()), a=A[:3, :3])
        assert [(problem.path, problem.reason) for problem in caught.value.ops] == [(path, reason)]


def test_a_region_that_nothing_flows_back_through():
    with pytest.raises(frfx.UnsupportedOpsError, match="nothing flows back") as caught:
        reconstruct(lambda x: x.detach() * x.detach(), normal(0, 4, 6), normal(1, 4, 6))
    assert caught.value.ops[0].remedy == "policy.override(node='mul', branches='rules')"


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
