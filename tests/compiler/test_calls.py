"""Modules that are called more than once, shared parameters, and parameters read by functions."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo_models
from torch import nn
from torch.nn import functional as F

import frfx
from tests.oracles import invert, normal, relative


class Reused(nn.Module):
    """Calls one convolution, one normalisation and one activation at three image sizes."""

    def __init__(self, copies: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.act = nn.Conv2d(2, 2, 2), nn.BatchNorm2d(2), nn.Tanh()
        with torch.no_grad():
            self.norm.running_mean.uniform_(-0.5, 0.5)
            self.norm.running_var.uniform_(0.5, 2.0)
        self.fc = nn.Linear(2 * 2 * 2, 3)
        self.convs = nn.ModuleList(copy.deepcopy(self.conv) for _ in range(3)) if copies else None
        self.norms = nn.ModuleList(copy.deepcopy(self.norm) for _ in range(3)) if copies else None
        self.double().eval()

    def forward(self, x):
        """Return logits."""
        for i in range(3):
            conv = self.conv if self.convs is None else self.convs[i]
            norm = self.norm if self.norms is None else self.norms[i]
            x = self.act(norm(conv(x)))
        return self.fc(x.flatten(1))


def test_every_call_is_a_node_with_a_factor():
    inverse, expected = (frfx.invert(Reused(copies), "act") for copies in (False, True))
    x, y = normal(0, 4, 2, 5, 5), torch.arange(4) % 3
    assert torch.equal(inverse(x, y), expected(x, y))
    rows = [(row.node, row.op) for row in inverse.summary()]
    assert rows[3:] == [
        ("act_2", "tanh"),
        ("norm_2", "batch_norm"),
        ("conv_2", "conv"),
        ("act_1", "tanh"),
        ("norm_1", "batch_norm"),
        ("conv_1", "conv"),
    ]
    factored = inverse.prepare.factored
    assert {"conv_1", "conv_2"} <= set(factored)
    sizes = [next(iter(factored[name].factors)) for name in ("conv_1", "conv_2")]
    assert sizes[0] != sizes[1]
    targets = inverse.reconstruct(x, y)
    for name, node in expected.reconstruct(x, y).items():
        twin = name if name.startswith(("act", "fc", "flatten", "argmax")) else None
        if twin is not None:
            assert torch.equal(targets[twin].target, node.target)


def test_changed_weight_is_noticed_at_every_call_of_its_module():
    model = Reused(False)
    inverse = frfx.invert(model, "act")
    x, y = normal(0, 4, 2, 5, 5), torch.arange(4) % 3
    before = inverse(x, y)
    with torch.no_grad():
        model.conv.weight.mul_(1.5)
        model.norm.running_mean.add_(0.1)
    after = inverse(x, y)
    assert not torch.allclose(after, before)
    assert torch.equal(after, frfx.invert(model, "act")(x, y))


def test_policy_of_one_call():
    x, y = normal(0, 4, 2, 5, 5), torch.arange(4) % 3
    policy = frfx.policy.paper().override(node="conv_1", damping=0.3)
    inverse = frfx.invert(Reused(False), "act", policy=policy)
    apart = frfx.policy.paper().override(node="convs.1", damping=0.3)
    assert torch.equal(inverse(x, y), frfx.invert(Reused(True), "act", policy=apart)(x, y))


def test_hook_of_a_module_that_is_called_twice():
    model = Reused(False)
    model.act.register_forward_hook(lambda module, args, output: 2 * output)
    inverse = frfx.invert(model, "norm")
    with pytest.raises(frfx.UnsupportedOpsError) as caught:
        inverse(normal(0, 4, 2, 5, 5), torch.arange(4) % 3)
    assert [op.path for op in caught.value.ops] == ["act_2", "act_1", "act"]
    assert "a hook of the module changes its value" in caught.value.ops[0].reason


class Tied(nn.Module):
    """Two layers of one weight, and the weight's transpose read by a function."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.double().eval()

    def forward(self, x):
        """Return what three layers make of it."""
        x = self.second(torch.tanh(self.first(x)))
        return F.linear(x, self.first.weight, self.second.bias)


def test_shared_parameters():
    model, x, target = Tied(), normal(0, 5, 4), normal(1, 5, 4)
    inverse = frfx.invert(model, "tanh")
    weight = model.first.weight.detach()
    with torch.no_grad():
        for _ in range(2):
            # Square and regular: the preimage is the solution itself.
            hidden = torch.linalg.solve(weight, (target - model.second.bias).mT).mT
            expected = torch.linalg.solve(weight, (hidden - model.second.bias).mT).mT
            torch.testing.assert_close(inverse(x, target), expected)
            weight.mul_(1.3)  # of all three at once
    assert {"second", "linear"} <= set(inverse.prepare.factored)


class FunctionalNorm(nn.Module):
    """Batch norm as a function of parameters and buffers that the module reads."""

    def __init__(self, affine: bool, style: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.style = style
        self.conv = nn.Conv2d(1, 3, 3)
        self.weight = nn.Parameter(torch.rand(3) + 0.5) if affine else None
        self.bias = nn.Parameter(torch.randn(3)) if affine else None
        self.register_buffer("running_mean", torch.randn(3))
        self.register_buffer("running_var", torch.rand(3) + 0.5)
        self.double().eval()

    def forward(self, x):
        """Return the normalised convolution."""
        x = self.conv(x)
        if self.style == "positional":
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.training
            )
        return F.batch_norm(
            x,
            running_var=self.running_var,
            running_mean=self.running_mean,
            bias=self.bias,
            weight=self.weight,
            training=False,
            eps=1e-5,
        )


@pytest.mark.parametrize("style", ["positional", "keywords"])
@pytest.mark.parametrize("affine", [True, False])
def test_functional_batch_norm(affine, style):
    model = FunctionalNorm(affine, style)
    inverse = frfx.invert(model, "conv")
    x = normal(0, 2, 1, 5, 5)
    for _ in range(2):
        with torch.no_grad():
            feature, target = model.conv(x), normal(1, 2, 3, 3, 3)
            slope = (model.running_var + 1e-5).rsqrt()
            shift = -model.running_mean * slope
            if affine:
                slope, shift = slope * model.weight, shift * model.weight + model.bias
        expected = (target - shift[:, None, None]) / slope[:, None, None]
        torch.testing.assert_close(inverse(x, target), expected, rtol=1e-11, atol=1e-11)
        assert torch.allclose(inverse(x, model(x).detach()), feature)
        model.running_var.mul_(2.0)
        model.running_mean.add_(1.0)
    assert inverse.summary()[-1].op == "batch_norm"


def transform_input(x):
    """Rescale every channel, as torchvision's Inception and GoogLeNet do in front of the stem."""
    first = torch.unsqueeze(x[:, 0], 1) * (0.229 / 0.5) + (0.485 - 0.5) / 0.5
    second = torch.unsqueeze(x[:, 1], 1) * (0.224 / 0.5) + (0.456 - 0.5) / 0.5
    third = torch.unsqueeze(x[:, 2], 1) * (0.225 / 0.5) + (0.406 - 0.5) / 0.5
    return torch.cat((first, second, third), 1)


def test_input_transformed_channel_by_channel():
    policy = frfx.policy.minimal().override(node="cat", damping=0.0, tolerance=1e-12)
    inverse = invert(transform_input, policy)
    x, wanted = normal(0, 2, 3, 4, 5), normal(1, 2, 3, 4, 5)
    torch.testing.assert_close(inverse(x, transform_input(wanted)), wanted, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(inverse(x, transform_input(x)), x)


@pytest.mark.parametrize(("name", "size"), [("googlenet", 32), ("inception_v3", 75)])
def test_inceptions_down_to_the_input(name, size):
    """`transform_input` is what their pretrained weights switch on: a diagonal, undone exactly."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.get_model(name, weights=None, init_weights=False, transform_input=True)
    x = zoo_models.images(16, size)
    zoo_models.calibrate(model, x)
    policy = frfx.policy.minimal().override(node="cat", damping=0.0, tolerance=1e-6)
    inverse = frfx.invert(model, "x", policy=policy)
    assert not any("aux" in row.node for row in inverse.summary())
    nodes = inverse.reconstruct(x[:2], torch.tensor([3, 5]))
    cat, scale = nodes["cat"], torch.tensor([0.229, 0.224, 0.225])[:, None, None] / 0.5
    torch.testing.assert_close(cat.forward, transform_input(x[:2]), rtol=1e-5, atol=1e-5)
    moved = (cat.target - cat.forward) / scale
    assert float(moved.norm()) > 0.1 * float(cat.forward.norm())
    assert relative(nodes.feature - x[:2], moved) < 1e-5
