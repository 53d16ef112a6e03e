"""The policy: its options, where it cuts, what it says."""

from __future__ import annotations

import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

import frfx
from frfx import networks
from tests.joint.test_joint_networks import Residual, batch, fresh


def network() -> nn.Module:
    torch.manual_seed(0)
    return networks.build("digits").eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(24, 1, 8, 8)
    return x, network()(x).topk(2).indices[:, 1]


def test_by_name_and_by_value():
    x, y = inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = frfx.invert(network(), 0, policy="joint")(x, y)
    assert torch.equal(named, frfx.invert(network(), 0, policy=frfx.policy.joint())(x, y))
    value = frfx.policy.joint(steps=3, regions=["pool1"])
    assert pickle.loads(pickle.dumps(value)) == value


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"steps": 0}, "steps is a whole number from 1 on, not 0"),
        ({"classes": 1.5}, "classes is a whole number from 1 on, not 1.5"),
        ({"iterations": 0}, "iterations is a whole number from 1 on, not 0"),
        ({"margin": 0}, "margin is a finite number above 0, not 0"),
        ({"margin": float("nan")}, "margin is a finite number above 0, not nan"),
        ({"tolerance": -1}, "tolerance is a finite number above 0, not -1"),
        ({"constraint": "both"}, "constraint='both' is none of 'inequality', 'equality'"),
        ({"unreached": None}, "unreached=None is none of 'warn', 'raise', 'ignore'"),
        ({"regions": [3]}, "regions are names of nodes, not (3,)"),
    ],
)
def test_options_out_of_range(options, text):
    with pytest.raises(frfx.PolicyError) as caught:
        frfx.policy.joint(**options)
    assert str(caught.value).startswith(text)


def narrow() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Return a network whose layers become narrower: a region can give what it is asked for."""
    torch.manual_seed(0)
    layers = OrderedDict(
        fc1=nn.Linear(30, 20), tanh1=nn.Tanh(), fc2=nn.Linear(20, 12), tanh2=nn.Tanh(),
        fc3=nn.Linear(12, 6),
    )  # fmt: skip
    model, x = nn.Sequential(layers).double().eval(), torch.randn(24, 30).double()
    return model, x, model(x).argmax(1)


def test_layerwise_down_to_a_node():
    """The rules bring the target to `start`; from there on down it is met as it is."""
    model, x, y = narrow()
    policy = frfx.policy.joint(start="fc2", margin=0.2, steps=30)
    inverse = frfx.invert(model, 0, policy=policy)
    assert [row.op for row in inverse.summary()] == ["argmax", "linear", "tanh", "region"]
    nodes = inverse.reconstruct(x, y)
    above = frfx.invert(model, "fc2", policy=frfx.policy.minimal(margin=0.2))
    torch.testing.assert_close(nodes["fc2"].target, above(x, y))
    assert bool(inverse.report["input"].reached.all())
    measured = frfx.measure(inverse, x, y)
    assert measured.label_consistency == 1
    assert measured.residuals[-1].node == "fc2"
    assert measured.residuals[-1].relative < 1e-3


def test_a_trust_region_above_is_refused():
    with pytest.raises(frfx.PolicyError, match=r"layerwise has trust_region=0\.3"):
        frfx.policy.joint(layerwise=frfx.policy.minimal(trust_region=0.3))


def test_layerwise_rules_may_be_chosen():
    policy = frfx.policy.joint(start="flatten", layerwise=frfx.policy.paper(damping=0.1))
    rows = frfx.invert(network(), 0, policy=policy).summary()
    assert rows[1].rule == "LinearRule(damping=0.1)"
    policy = frfx.policy.joint(start="flatten").override(op=nn.Linear, damping=0.2)
    assert frfx.invert(network(), 0, policy=policy).summary()[1].rule == "LinearRule(damping=0.2)"


def test_region_by_region():
    model, x, y = narrow()
    policy = frfx.policy.joint(regions=["fc1", "fc2"], margin=0.2)
    inverse = frfx.invert(model, 0, policy=policy)
    assert [row.node for row in inverse.summary()] == ["fc3", "fc2", "fc1"]
    nodes = inverse.reconstruct(x, y)
    assert list(inverse.report) == ["fc2", "fc1", "input"]
    alone = frfx.invert(model, "fc2", policy=frfx.policy.joint(margin=0.2))
    torch.testing.assert_close(nodes["fc2"].target, alone(x, y))
    assert frfx.measure(inverse, x, y).label_consistency == 1
    whole = frfx.invert(model, 0, policy=frfx.policy.joint(margin=0.2))
    whole(x, y)
    parts = inverse.report["input"]
    assert bool(parts.reached.all())
    assert bool((parts.steps > 0).any())
    assert float(whole.report["input"].deviation.mean()) < float(parts.deviation.mean())


def test_regions_of_a_network_that_branches():
    model = fresh(Residual)
    x, y = batch(model, 8)
    policy = frfx.policy.joint(regions="add", steps=20, unreached="ignore")
    inverse = frfx.invert(model, "block1", policy=policy)
    inverse(x, y)
    assert len(inverse.report) == 2
    assert bool(inverse.report["add"].reached.all())
    text = r"'block1.conv2' is not on every path from 'pool' to .*: 'pool', 'add', 'mean', 'drop'"
    with pytest.raises(frfx.LayerError, match=text):
        frfx.invert(model, "pool", policy=frfx.policy.joint(regions="block1.conv2"))


def test_places_that_do_not_exist_or_lie_behind():
    with pytest.raises(frfx.LayerError, match=r"no layer 'pool3'.*Did you mean 'pool1'"):
        frfx.invert(network(), 0, policy=frfx.policy.joint(start="pool3"))
    with pytest.raises(frfx.LayerError, match="'fc1' lies behind 'pool1', where joint inversion"):
        frfx.invert(network(), 0, policy=frfx.policy.joint(start="pool1", regions="fc1"))
    with pytest.raises(frfx.LayerError, match="start: 'conv1' is not on every path from 'pool1'"):
        frfx.invert(network(), "pool1", policy=frfx.policy.joint(start="conv1"))


def test_overrides_inside_a_region_are_refused():
    policy = frfx.policy.joint().override(node="conv2", damping=0.1)
    with pytest.raises(frfx.PolicyError, match="overrides 'conv2', which has no step of its own"):
        frfx.invert(network(), 0, policy=policy)


def test_the_logits_themselves_are_embedded():
    x, y = inputs()
    model = network()
    inverse = frfx.invert(model, "fc1", policy=frfx.policy.joint(margin=0.2))
    expected = frfx.nearest_embedding(model(x).detach(), y, 0.2)
    torch.testing.assert_close(inverse(x, y), expected)
    assert inverse.report == {}


def test_post_training_takes_it():
    x, y = inputs()
    model = network()
    with frfx.PostTraining(model, upto_layer=1, alpha=0.5, policy="joint") as step:
        losses = step(x, y)
        losses.total.backward()
        expected = frfx.invert(model, 1, policy="joint")(x, y)
        torch.testing.assert_close(step.targets(x, y), expected)
    assert float(losses.reconstruction.detach()) > 0
    assert model.conv1.weight.grad is not None
    assert model.fc1.weight.grad is None
