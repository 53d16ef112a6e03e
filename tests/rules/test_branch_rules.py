"""Networks that branch, inverted op by op: against the rules' own formulas, in plain algebra."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import frfx
from frfx.rules.nearest_product import nearest_product
from tests.oracles import invert, minimal_affine_preimage, normal, relative

RULES = frfx.policy.minimal(branches="rules")


def back(function, x, target, **tensors):
    """Return the input that a network of one function should have had, op by op."""
    inverse = invert(function, RULES, **tensors)
    assert relative(inverse(x, function(x, **tensors)), x) < 1e-15
    return inverse(x, target)


def pinv(matrix, residual):
    """Return the least-norm step of `d A^T`."""
    return residual @ torch.linalg.pinv(matrix).T


def test_a_residual_connection_shares_its_residual():
    w, x, target = normal(0, 5, 5), normal(1, 3, 5), normal(2, 3, 5)
    found = back(lambda x, w: x + nn.functional.linear(x, w), x, target, w=w)
    residual = target - x - x @ w.T
    expected = x + (residual / 2 + pinv(w, residual / 2)) / 2  # the mean of both answers
    assert relative(found, expected) < 1e-12


def test_a_sum_of_two_layers():
    v, w, x, target = normal(0, 4, 5), normal(1, 4, 5), normal(2, 3, 5), normal(3, 3, 4)
    linear = nn.functional.linear
    found = back(lambda x, v, w: linear(x, v) - linear(x, w), x, target, v=v, w=w)
    residual = target - x @ v.T + x @ w.T
    expected = x + (pinv(v, residual / 2) - pinv(w, residual / 2)) / 2
    assert relative(found, expected) < 1e-12


def test_twice_the_same_operand():
    x, target = normal(0, 3, 5), normal(1, 3, 5)
    for function in (lambda x: x + x, lambda x: torch.cat([x, x, x], 1)):
        wanted = target if function(x).shape == x.shape else normal(2, 3, 15)
        expected = minimal_affine_preimage(function, x, wanted)
        assert relative(back(function, x, wanted), expected) < 1e-13


def test_concatenated_layers():
    v, w, x = normal(0, 4, 5), normal(1, 2, 5), normal(2, 3, 5)
    target = normal(3, 3, 6)

    def function(x, v, w):
        linear = nn.functional.linear
        return torch.cat((linear(x, v), linear(x, w)), dim=1)

    found = back(function, x, target, v=v, w=w)
    steps = [pinv(m, t - x @ m.T) for m, t in ((v, target[:, :4]), (w, target[:, 4:]))]
    assert relative(found, x + sum(steps) / 2) < 1e-12


def exchanged(x):
    """Exchange two halves and scale one."""
    first, second = x.chunk(2, 1)
    return torch.cat([second * 2, first], 1)


def reordered(x):
    """Take a tensor apart in single channels and put them together in another order."""
    a, b, c, d = x.unbind(1)
    return torch.stack([b, d, a, c], -1) / 3


def rejoined(x):
    """Join what a split returns, as it is."""
    return torch.cat(x.split((1, 3), 1), 1).roll(1, 1) * 2


SHUFFLED = {
    "exchanged": exchanged,
    "reordered": reordered,
    "rejoined": rejoined,
    "interleaved": lambda x: torch.stack(x.chunk(2, dim=1), 2).flatten(1, 2),
    "rolled": lambda x: x.roll(1, 1).flip(2) + 1,
}


@pytest.mark.parametrize("function", SHUFFLED.values(), ids=SHUFFLED)
def test_shuffled_channels_come_back(function):
    x = normal(0, 2, 4, 3)
    target = normal(1, *function(x).shape)
    assert relative(function(back(function, x, target)), target) < 1e-14


def standardized(x):
    """Scale every channel apart, as torchvision's Inception does with its input."""
    channels = [x[:, i].unsqueeze(1) * (i + 1) - 0.5 for i in range(3)]
    return torch.cat(channels, 1)


SLICES = {
    "channels": standardized,
    "computed": lambda x: torch.cat([x[:, : x.size(2)], 2 * x[:, x.size(2) :]], 1),
    "overlapping": lambda x: torch.cat([x[:, :3], x[:, 1:]], 1),
    "indices": lambda x: torch.cat([x[:, [0, 0, 2]], x[:, 1:3]], 1),
    "beside the whole": lambda x: torch.cat([x, x[:, 1:2]], 1),
}


@pytest.mark.parametrize("function", SLICES.values(), ids=SLICES)
def test_slices_do_not_contradict_each_other(function):
    x = normal(0, 2, 4, 2)
    target = normal(1, *function(x).shape)
    expected = minimal_affine_preimage(function, x, target)
    if function is SLICES["computed"]:  # a size that the batch cannot change
        assert relative(function(back(function, x, target)), target) < 1e-14
    assert relative(back(function, x, target), expected) < 1e-13


def test_a_part_that_nobody_reads_stays():
    x, target = normal(0, 2, 4), normal(1, 2, 2)
    found = back(lambda x: x.chunk(2, 1)[1] * 2, x, target)
    assert torch.equal(found[:, :2], x[:, :2])
    assert relative(found[:, 2:], target / 2) < 1e-14


class Gated(nn.Module):
    """A squeeze-excite gate over channels, without nonlinearities that the test would need."""

    def forward(self, x):
        return x.mean((2, 3), keepdim=True) * x


@pytest.mark.parametrize("gate", ["free", "held"])
def test_a_gate(gate):
    x, target = normal(0, 2, 3, 2, 2) + 2, normal(1, 2, 3, 2, 2)
    policy = RULES.override(op=torch.mul, gate=gate)
    found = frfx.invert(Gated(), "x", policy=policy)(x, target)
    s = x.mean((2, 3), keepdim=True)
    s_new, x_new = nearest_product(target, s * x, s, x)
    if gate == "held":
        s_new, x_new = s, target / s
    expected = (x_new + x + (s_new - s)) / 2
    assert relative(found, expected) < 1e-12


class Gates(nn.Module):
    """Gates of the usual shape: squeeze, excite, sigmoid, over what comes from outside, too."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.down, self.up = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        gate = torch.sigmoid(self.up(torch.tanh(self.down(x.mean((2, 3), keepdim=True)))))
        return self.head((gate.expand_as(x) * x + x).mean((2, 3)))


class Twice(nn.Module):
    """A residual block that is called twice, and another module in it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        for _ in range(2):
            x = x + self.block(x)
        first, second = torch.cat([x, self.block(x)], 1).chunk(2, 1)
        return self.head((first - second).mean((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [Gates, Twice])
def test_networks_op_by_op(kind, dtype):
    torch.manual_seed(0)
    model = kind().to(dtype).eval().requires_grad_(False)
    x = normal(0, 3, 3, 6, 6, dtype=dtype)
    inverse = frfx.invert(model, "stem", policy=RULES)
    feature = model.stem(x)
    tolerance = 1e3 * torch.finfo(dtype).eps
    assert relative(inverse(x, model(x)), feature) < tolerance
    found = inverse(x, torch.tensor([0, 1, 2]))
    assert found.dtype == dtype
    assert bool(found.isfinite().all())
    assert not torch.equal(found, feature)
    again = copy.deepcopy(inverse)(x, torch.tensor([0, 1, 2]))
    assert torch.equal(found, again)


def test_a_bypass_is_held():
    """What the cut does not reach keeps its value: the sum is a shift, the product a scale."""

    class Bypass(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            a, b = self.one(x), self.two(x)
            return (a + b) * b.exp()

    torch.manual_seed(0)
    model = Bypass().double().requires_grad_(False)
    x, target = normal(0, 3, 4), normal(1, 3, 4)
    inverse = frfx.invert(model, "one", policy=RULES)
    b = model.two(x)
    assert relative(inverse(x, target), target / b.exp() - b) < 1e-12
