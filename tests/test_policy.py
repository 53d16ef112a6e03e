"""Policies are values: they choose rules and options, and complain of what does not exist."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import pickle
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import frfx
from frfx import policy
from frfx.rules import LinearRule, MaxPoolCopyRule, MaxPoolMinimalRule, OneHotRule, ReluIdentityRule


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2, 3, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(27, 6),
        nn.Tanh(),
        nn.Linear(6, 4),
    ).requires_grad_(False)


def batch():
    torch.manual_seed(1)
    return torch.randn(5, 1, 10, 10), torch.arange(5) % 4


def rules(chosen, layer="input") -> dict:
    """Return the rule at every node."""
    steps = frfx.invert(network(), layer, policy=chosen).plan.steps
    return {step.op.path: step.rule for step in steps}


# --- the named policies ---


def test_named_policies_differ_where_they_should():
    paper, minimal = rules("paper"), rules("minimal")
    assert type(paper["2"]) is MaxPoolCopyRule
    assert type(minimal["2"]) is MaxPoolMinimalRule
    assert type(paper["1"]) is ReluIdentityRule
    assert str(minimal["1"]) == "ElementwiseRule(relu)"
    assert paper["argmax"].label_margin == 0
    assert minimal["argmax"].label_margin == 0.5
    for node in ("8", "7", "6", "5", "4", "3", "0"):
        assert paper[node] == minimal[node]


@pytest.mark.parametrize("name", ["paper", "minimal"])
def test_strings_are_short_for_the_values(name):
    value = getattr(frfx.policy, name)()
    assert policy.resolve(name) == value
    assert policy.resolve(value) is value
    x, y = batch()
    expected = frfx.invert(network(), 0, policy=value)(x, y)
    torch.testing.assert_close(frfx.invert(network(), 0, policy=name)(x, y), expected)


def test_paper_is_the_default():
    x, y = batch()
    torch.testing.assert_close(
        frfx.invert(network(), 0)(x, y), frfx.invert(network(), 0, policy="paper")(x, y)
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("papre", "no policy 'papre'. Did you mean 'paper'? Known: 'paper', 'minimal'"),
        ("", "no policy ''. Known: 'paper', 'minimal'"),
        (3, "no policy 3. Known: 'paper', 'minimal'"),
        (None, "no policy None. Known: 'paper', 'minimal'"),
        (policy.paper, "no policy <function paper"),
    ],
)
def test_unknown_policies(name, text):
    with pytest.raises(frfx.PolicyError) as caught:
        frfx.invert(network(), 0, policy=name)
    assert str(caught.value).startswith(text)


# --- options ---


def test_options_reach_the_rules_that_take_them():
    found = rules(policy.paper(label_margin=0.25, clamp_margin=0.01, rcond=1e-3, damping=1e-2))
    assert found["argmax"].label_margin == 0.25
    assert found["7"].clamp_margin == found["4"].clamp_margin == 0.01
    for node in ("8", "6", "3", "0"):
        assert (found[node].rcond, found[node].damping) == (1e-3, 1e-2)


def test_minimal_takes_its_margin():
    assert rules(policy.minimal(margin=2.0))["argmax"].label_margin == 2.0


def test_damping_bounds_the_deviation():
    """Behaviour, not just values: more damping, less deviation."""
    x, y = batch()
    feature = frfx.invert(network(), "3").reconstruct(x, y)["3"].forward
    deviations = [
        (frfx.invert(network(), "3", policy=policy.paper(damping=d))(x, y) - feature).norm()
        for d in (0.0, 1e-2, 1.0, 1e4)
    ]
    assert deviations == sorted(deviations, reverse=True)
    assert deviations[-1] < 1e-3 * deviations[0]


def test_label_margin_lets_the_label_win():
    x, y = batch()
    for margin in (0.1, 1.0):
        result = frfx.invert(network(), "8", policy=policy.minimal(margin=margin))(x, y)
        own = result.gather(1, y[:, None])
        others = result.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True)
        assert (own - others >= margin - 1e-5).all()


def test_unknown_option_gets_the_nearest():
    with pytest.raises(frfx.PolicyError) as caught:
        policy.paper().override(node="8", dampening=1.0)
    text = str(caught.value)
    assert text.startswith("no rule takes an option 'dampening'. Did you mean 'damping'")
    assert "Options: " in text
    assert all(name in text for name in ("clamp_margin", "damping", "label_margin", "rcond"))
    with pytest.raises(frfx.PolicyError, match="no rule takes an option 'speed'"):
        policy.Policy("paper", {"speed": 1})


@pytest.mark.parametrize("name", ["label_margin", "clamp_margin", "rcond", "damping"])
@pytest.mark.parametrize("value", [-1e-9, -1, math.nan, math.inf, "large", [1.0]])
def test_values_that_make_no_sense(name, value):
    text = f"{name} is a finite number from 0 on, not"
    with pytest.raises(frfx.PolicyError, match=text):
        policy.paper(**{name: value})
    with pytest.raises(frfx.PolicyError, match=text):
        policy.minimal().override(op=nn.Linear, **{name: value})


@pytest.mark.parametrize("value", [1, 1.5])
def test_a_clamp_margin_leaves_something_of_the_range(value):
    override = functools.partial(policy.minimal().override, op=nn.Tanh)
    for choose in (policy.paper, policy.minimal, override):
        with pytest.raises(frfx.PolicyError, match=f"clamp_margin={value} .* less than 1"):
            choose(clamp_margin=value)


def test_rcond_and_damping_may_be_none():
    assert policy.paper(rcond=None).options["rcond"] is None
    assert rules(policy.paper(damping=None))["6"] == LinearRule()
    model = nn.Sequential(
        nn.BatchNorm2d(1), nn.AvgPool2d(2), nn.ZeroPad2d(1), nn.LayerNorm(4), nn.Flatten()
    ).eval()
    x, target = torch.randn(2, 1, 4, 4), torch.randn(2, 16)
    free = policy.paper()
    for op in model[:4]:
        free = free.override(op=type(op), damping=None)
    assert torch.equal(
        frfx.invert(model, "input", policy=free)(x, target), frfx.invert(model, "input")(x, target)
    )
    with pytest.raises(frfx.PolicyError, match="label_margin is a finite number"):
        policy.paper(label_margin=None)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"solver": "fft"}, "solver='fft' is none of 'auto', 'dense', 'spectral', 'iterative'"),
        ({"unconverged": "stop"}, "unconverged='stop' is none of 'warn', 'raise', 'ignore'"),
        ({"tolerance": 0.0}, "tolerance=0.0 does not lie between 0 and 1"),
        ({"tolerance": 1}, "tolerance=1 does not lie between 0 and 1"),
        ({"max_steps": 0}, "max_steps=0 is less than one step"),
        ({"max_steps": "a"}, "max_steps='a' is less than one step, or no whole number"),
        ({"tolerance": "a"}, "tolerance='a' does not lie between 0 and 1"),
        ({"memory": "big"}, "memory is a number of bytes, not 'big'"),
        ({"memory": -1}, "memory is a number of bytes, not -1"),
        ({"memory": math.nan}, "memory is a number of bytes, not nan"),
    ],
)
def test_solver_options_that_make_no_sense(option, text):
    with pytest.raises(frfx.PolicyError, match=re.escape(text)):
        rules(policy.paper().override(op=nn.Linear, **option))


@pytest.mark.parametrize("option", [{"memory": -1}, {"damping": True}, {"rcond": -0.1}])
def test_sizes_are_looked_at_at_once(option):
    with pytest.raises(frfx.PolicyError, match=next(iter(option))):
        policy.paper().override(op=nn.Linear, **option)


# --- overrides ---


@pytest.mark.parametrize("op", [nn.Linear, nn.functional.linear, torch.ops.aten.linear.default])
def test_override_by_op(op):
    found = rules(policy.paper(rcond=1e-4).override(op=op, damping=0.5))
    for node in ("8", "6"):
        assert (found[node].damping, found[node].rcond) == (0.5, 1e-4)
    assert found["3"].damping is None


def test_override_by_node():
    found = rules(policy.paper().override(node="6", damping=0.5))
    assert found["6"].damping == 0.5
    assert found["8"].damping is None


def test_node_wins_over_op():
    chosen = policy.paper().override(node="6", damping=0.1).override(op=nn.Linear, damping=0.2)
    found = rules(chosen.override(op=nn.Linear, rcond=1e-2))
    assert (found["6"].damping, found["6"].rcond) == (0.1, 1e-2)
    assert (found["8"].damping, found["8"].rcond) == (0.2, 1e-2)


def test_later_overrides_add_to_earlier_ones():
    chosen = policy.paper().override(node="6", damping=0.1).override(node="6", rcond=1e-2)
    assert rules(chosen)["6"] == LinearRule(rcond=1e-2, damping=0.1)
    assert rules(chosen.override(node="6", damping=0.3))["6"].damping == 0.3


def test_a_node_may_be_named_in_two_ways():
    model = nn.Sequential(OrderedDict(a=nn.Sequential(nn.Linear(4, 3)), b=nn.Linear(3, 2)))
    for first, second in (("a.0", "a_0"), ("a_0", "a.0")):
        chosen = policy.paper().override(node=first, damping=0.1, tolerance=0.1)
        chosen = chosen.override(node=second, tolerance=0.2)
        steps = frfx.invert(model.eval(), 0, policy=chosen).plan.steps
        assert steps[-1].rule == LinearRule(damping=0.1, tolerance=0.2)


def test_numbers_of_numpy():
    assert policy.paper(damping=np.float32(0.5)).options["damping"] == 0.5


def test_override_with_a_rule():
    chosen = policy.paper().override(op=torch.argmax, rule=OneHotRule())
    assert rules(chosen)["argmax"] == OneHotRule()
    x, y = batch()
    result = frfx.invert(network(), "8", policy=chosen)(x, y)
    torch.testing.assert_close(result, nn.functional.one_hot(y, 4).float())


def test_override_of_the_unsaid_argmax_by_name():
    chosen = policy.minimal().override(node="argmax", label_margin=3.0)
    assert rules(chosen)["argmax"].label_margin == 3.0


def test_rule_by_op_and_options_by_node():
    rule = LinearRule(rcond=1e-2)
    chosen = policy.paper(damping=0.7).override(op=nn.Linear, rule=rule)
    assert rules(chosen)["8"] == rule  # the policy's own options are none of a given rule
    chosen = chosen.override(node="6", damping=0.3)
    assert rules(chosen)["6"] == LinearRule(rcond=1e-2, damping=0.3)
    assert rules(chosen)["8"] == rule


def test_nodes_are_named_as_layers_lists_them():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

        def forward(self, x):
            return self.body(self.body(x))

    chosen = policy.paper().override(node="body.0_1", damping=0.5)
    steps = frfx.invert(Twice(), "x", policy=chosen).plan.steps
    damping = {step.op.path: getattr(step.rule, "damping", None) for step in steps}
    assert (damping["body.0_1"], damping["body.0"]) == (0.5, None)


def test_unknown_node_gets_the_nearest():
    model = nn.Sequential()
    for name in ("first", "second", "third"):
        model.add_module(name, nn.Linear(4, 4))
    chosen = policy.paper().override(node="thirt", damping=1.0)
    with pytest.raises(frfx.PolicyError) as caught:
        frfx.invert(model, "first", policy=chosen)
    assert str(caught.value) == (
        "the policy overrides 'thirt', which is no node between the layer and the output. "
        "Did you mean 'third'?"
    )
    with pytest.raises(frfx.PolicyError, match="overrides 'first', which is no node between"):
        frfx.invert(model, "first", policy=policy.paper().override(node="first", damping=1.0))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (LinearRule, {"damping": -1.0}),
        (LinearRule, {"rcond": float("nan")}),
        (frfx.rules.NearestEmbeddingRule, {"label_margin": -1.0}),
        (frfx.rules.RegionRule, {"damping": float("inf")}),
        (frfx.rules.BatchNormRule, {"damping": "a"}),
    ],
)
def test_rules_refuse_what_policies_do(make, options):
    ((name, _),) = options.items()
    for setting in (make, frfx.policy.paper):
        with pytest.raises(frfx.PolicyError, match=f"{name} is a finite number from 0 on"):
            setting(**options)


def test_a_rule_leaves_what_is_done_about_branches():
    """In either order."""
    by_rule = {"node": "6", "rule": LinearRule()}
    by_choice = {"node": "6", "branches": "rules"}
    for one, other in ((by_choice, by_rule), (by_rule, by_choice)):
        (change,) = policy.paper().override(**one).override(**other).by_node.values()
        assert (change.rule, change.branches) == (LinearRule(), "rules")


def test_options_that_the_rule_of_a_node_does_not_have():
    """All of them at once; of an op, whose rules differ by policy, they are none of a mistake."""
    model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3))
    chosen = policy.minimal().override(node="1", solver="iterative", max_steps=3)
    chosen = chosen.override(node="3", damping=0.1, clamp_margin=0.1)
    with pytest.raises(frfx.PolicyError) as caught:
        frfx.invert(model, "0", policy=chosen)
    text = str(caught.value)
    assert "'1': ElementwiseRule(tanh) has no solver, no max_steps, but function, clamp_m" in text
    assert "; '3': LinearRule(damping=0.1) has no clamp_margin, but " in text
    frfx.invert(model, "0", policy=policy.minimal().override(op=nn.Tanh, damping=0.1))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"damping": 1.0}, "name either an op or a node"),
        ({"op": nn.Linear, "node": "6", "damping": 1.0}, "name either an op or a node"),
        ({"node": "6", "rule": LinearRule}, "a rule is an instance of frfx.rules.Rule, not <class"),
        ({"node": "6", "rule": "dense"}, "a rule is an instance of frfx.rules.Rule, not 'dense'"),
        (
            {"node": "6", "rule": LinearRule(), "damping": 1.0},
            r"give the options to the rule itself, as in LinearRule\(damping=1e-2\)",
        ),
    ],
)
def test_bad_overrides(arguments, text):
    with pytest.raises(frfx.PolicyError, match=text):
        policy.paper().override(**arguments)


def test_rule_that_does_not_fit_is_a_reason():
    """A rule of another op says so instead of computing nonsense, or is asked in vain."""
    chosen = policy.paper().override(node="2", rule=frfx.rules.ConvolutionRule())
    with pytest.raises(frfx.UnsupportedOpsError) as caught:
        frfx.invert(network(), "1", policy=chosen)
    assert [op.path for op in caught.value.ops] == ["2"]


@pytest.mark.parametrize(
    ("module", "rule"),
    [
        (nn.Tanh(), frfx.rules.LinearRule()),
        (nn.Tanh(), frfx.rules.PadRule()),
        (nn.Linear(4, 4), frfx.rules.MaxPoolMinimalRule()),
        (nn.Linear(4, 4), frfx.rules.AvgPoolRule()),
        (nn.Linear(4, 4), frfx.rules.NormalizationRule()),
        (nn.Linear(4, 4), frfx.rules.SoftmaxRule()),
        (nn.Linear(4, 4), frfx.rules.OneHotRule()),
        (nn.Linear(4, 3), frfx.rules.IdentityRule()),
        (nn.Linear(4, 3), ReluIdentityRule()),
    ],
    ids=str,
)
def test_every_rule_says_what_it_is_for(module, rule):
    x = torch.randn(2, 1, 4, 4)
    model, chosen = nn.Sequential(module), policy.minimal().override(node="0", rule=rule)
    with pytest.raises(frfx.UnsupportedOpsError, match=r"is for |it changes the shape"):
        frfx.invert(model, 0, policy=chosen)(x, model(x).detach())


@pytest.mark.parametrize("rule", [frfx.rules.IdentityRule(), frfx.rules.RegionRule()], ids=str)
def test_some_rules_go_anywhere(rule):
    x = torch.randn(2, 4)
    chosen = policy.minimal().override(node="0", rule=rule)
    found = frfx.invert(nn.Sequential(nn.Tanh()), 0, policy=chosen)(x, torch.tanh(x))
    expected = torch.tanh(x) if isinstance(rule, frfx.rules.IdentityRule) else x
    torch.testing.assert_close(found, expected)


# --- values ---


@pytest.fixture(params=["paper", "minimal", "overridden"])
def value(request) -> policy.Policy:
    if request.param != "overridden":
        return policy.resolve(request.param)
    chosen = policy.minimal(damping=0.1).override(node="6", rcond=0.2)
    return chosen.override(op=nn.Conv2d, rule=frfx.rules.ConvolutionRule(damping=0.3))


def test_overriding_leaves_the_original_alone(value):
    before = copy.deepcopy(value)
    value.override(node="6", damping=0.9)
    value.override(op=nn.Conv2d, damping=0.9)
    assert value == before


def test_values_cannot_be_assigned_to(value):
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.principle = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.options = {}


def test_values_compare_by_content(value):
    assert value == copy.deepcopy(value)
    assert value != value.override(node="8", damping=0.9)
    assert policy.paper() == policy.paper()
    assert policy.paper() != policy.minimal()


def test_values_survive_pickling(value):
    twin = pickle.loads(pickle.dumps(value))
    assert twin == value
    x, y = batch()
    expected = frfx.invert(network(), 0, policy=value)(x, y)
    torch.testing.assert_close(frfx.invert(network(), 0, policy=twin)(x, y), expected)


def test_rules_are_values():
    assert LinearRule(damping=0.1) == LinearRule(damping=0.1)
    assert len({LinearRule(), LinearRule(), LinearRule(rcond=1.0)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        LinearRule().damping = 1.0


def test_policy_may_serve_several_networks():
    chosen = policy.minimal().override(op=nn.Linear, damping=1e-3)
    x, y = batch()
    for layer in ("input", 1, 2, 3, "8"):
        assert frfx.invert(network(), layer, policy=chosen)(x, y).isfinite().all()
