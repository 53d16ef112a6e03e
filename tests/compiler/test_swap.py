"""Activations that are inverted before the pooling behind them, against both in turn."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import frfx
from frfx.compiler.pooling import Pooling
from frfx.compiler.swap import SwappedForward, SwappedInversion
from frfx.rules.activation import Elementwise, ElementwiseRule

FUNCTIONS = (
    torch.tanh, torch.sigmoid, F.selu, F.softsign, torch.atan, torch.asinh, torch.sinh,
    F.logsigmoid, F.relu,
)  # fmt: skip


class Network(nn.Module):
    """A linear map of the pixels, an activation, pooling and logits."""

    def __init__(self, function, pool: nn.Module, size: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.function, self.pool, self.dims = function, pool, len(size)
        pooled = pool(torch.zeros(1, 2, *size)).flatten(1).shape[1]
        self.fc = nn.Linear(pooled, 3)
        with torch.no_grad():
            self.fc.weight.copy_(torch.randn(3, pooled, generator=generator))

    def forward(self, x):
        return self.fc(self.pool(self.function(self.scale * x)).flatten(1))


@st.composite
def poolings(draw):
    """Draw pooling in one or two dimensions and a size that it takes."""
    dims = draw(st.integers(1, 2))
    several = st.tuples(*[st.integers(1, 3)] * dims)
    kernel, stride, dilation = draw(several), draw(several), draw(several)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    least = [
        max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    size = tuple(draw(st.integers(n, 8)) for n in least)
    module = (nn.MaxPool1d, nn.MaxPool2d)[dims - 1]
    return module(kernel, stride, padding, dilation), size


def batch(size: tuple[int, ...], spread: float, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = spread * torch.randn(4, 2, *size, generator=generator, dtype=dtype)
    return x, torch.arange(4) % 3


def swapped(inverse: frfx.Inverse) -> int:
    """Return how many pairs have been swapped."""
    return sum(isinstance(m, SwappedForward) for m in inverse.merged.children())


@pytest.mark.parametrize("policy", ["paper", "minimal"])
@given(
    function=st.sampled_from(FUNCTIONS),
    drawn=poolings(),
    spread=st.sampled_from([0.3, 2.0]),
    wanted=st.sampled_from(["labels", "far", "own"]),
)
def test_swapped_is_in_turn(policy, function, drawn, spread, wanted):
    pool, size = drawn
    x, y = batch(size, spread)
    assume(torch.isfinite(pool(x)).all())  # else a window reads nothing, and nothing is inverted
    model = Network(function, pool, size).double()
    with torch.no_grad():
        inverse = frfx.invert(model, "mul", policy=policy)
        if wanted != "labels":  # far beyond the range, or where the forward pass comes to
            y = model(x) + (30.0 if wanted == "far" else 0.0)
        found = inverse(x, y)
        torch.testing.assert_close(found, inverse.reconstruct(x, y).feature, rtol=1e-9, atol=1e-9)
    extents = zip(pool.kernel_size, pool.dilation, pool.stride, strict=True)
    apart = all(d * (k - 1) < s for k, d, s in extents)
    assert swapped(inverse) == (policy == "paper" or (apart and function is not F.relu))


@pytest.mark.parametrize("policy", ["paper", "minimal"])
@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_entries_that_the_activation_rounds_to_one_value(policy, spread):
    """In single precision tanh is 1 from 9.01 on; targets lie at both ends and between them."""
    model = Network(torch.tanh, nn.MaxPool2d(2), (6, 6))
    x, _ = batch((6, 6), spread, torch.float32)
    inverse = frfx.invert(model, "mul", policy=policy)
    (swap,) = (m for m in inverse.inverse.children() if isinstance(m, SwappedInversion))
    target = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]).repeat(30)[:72].view(4, 2, 3, 3)
    pooled = F.max_pool2d(x, 2)
    with torch.no_grad():
        y = torch.tanh(pooled)
        found = swap(target, y, x, pooled, None)
        in_turn = swap(target, y, x, None, torch.tanh(x))
        tie = (torch.tanh(x) == 1) & (found != in_turn)
        assert policy == "minimal" or not tie.any()  # copies ask for no largest entry
        torch.testing.assert_close(found[~tie], in_turn[~tie], rtol=1e-4, atol=1e-4)
        assert (found - x).square().sum() <= 1.0001 * (in_turn - x).square().sum()
        if policy == "minimal":  # where the forward pass comes to, all stays
            assert torch.equal(swap(y, y, x, pooled, None), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("module", "margin"), [(nn.Tanh, 0.1), (nn.Tanh, 0.01), (nn.Sigmoid, 1e-3)]
)
@pytest.mark.parametrize("end", [0, 1])
def test_targets_are_exactly_at_an_end_of_the_range(end, module, margin, dtype):
    """Which is another number in single precision."""
    model = nn.Sequential(nn.Conv1d(1, 1, 1), module(), nn.MaxPool1d(2)).to(dtype)
    policy = frfx.policy.paper().override(node="1", clamp_margin=margin)
    with torch.no_grad():
        inverse = frfx.invert(model, "0", policy=policy)
        (swap,) = (m for m in inverse.inverse.children() if isinstance(m, SwappedInversion))
        x = torch.tensor([[[1.0, 9.0, 0.5, 8.0]]], dtype=dtype) * (1 if end else -1)
        target = x.new_full((1, 1, 2), swap._parts[1].limits[end])
        y, a = model[2](model[1](x)), model[1](x)
        found, expected = swap(target, y, x, F.max_pool1d(x, 2), None), swap(target, y, x, None, a)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [4, 5], ids=["complete", "an entry that no window reads"])
def test_an_end_without_a_margin_is_out_of_reach(size):
    model = nn.Sequential(nn.Conv1d(1, 1, 1), nn.Tanh(), nn.MaxPool1d(2))
    inverse = frfx.invert(model, "0", policy=frfx.policy.paper(clamp_margin=0))
    assert swapped(inverse) == 1
    x, target = torch.linspace(-0.2, 0.5, size).view(1, 1, -1), torch.tensor([[[1.0, 0.4]]])
    with torch.no_grad(), pytest.raises(frfx.NonFiniteError):
        inverse(x, target)


def test_a_rule_of_ones_own_is_asked():
    """Even if it is one for the same function: it may read the forward value of every entry."""
    halfway = Elementwise("tanh", lambda y, x: (torch.atanh(y) + x) / 2, lambda: (-1.0, 1.0))
    model, x, y = small()
    rule = ElementwiseRule(halfway)
    inverse = frfx.invert(model, 0, policy=frfx.policy.paper().override(node="1", rule=rule))
    assert swapped(inverse) == 1
    with torch.no_grad():
        found = inverse(x, y)
        torch.testing.assert_close(found, inverse.reconstruct(x, y).feature, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, frfx.invert(model, 0)(x, y), rtol=1e-2)


class Small(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 5, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(5, 4, 3), nn.Sigmoid(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 4),
        )  # fmt: skip


def small() -> tuple[nn.Module, Tensor, Tensor]:
    x = torch.randn(6, 3, 13, 13, generator=torch.Generator().manual_seed(1))
    return Small().eval(), x, torch.arange(6) % 4


@pytest.mark.parametrize("policy", ["paper", "minimal"])
def test_a_network(policy):
    model, x, y = small()
    with torch.no_grad():
        inverse = frfx.invert(model, 0, policy=policy)
        assert swapped(inverse) == 2
        nodes = inverse.reconstruct(x, y)
        torch.testing.assert_close(inverse(x, y), nodes.feature, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(nodes["1"].forward, model[1](model[0](x)))
    assert list(nodes) == ["argmax", "7", "6", "5", "4", "3", "2", "1", "0", "input"]


@pytest.mark.parametrize("how", ["channels last", "hook", "recorded"])
def test_where_the_models_own_calls_run_so_do_the_inversions(how, monkeypatch):
    model, x, y = small()
    inverse, seen = frfx.invert(model, 0), []
    with torch.no_grad():
        expected = inverse(x, y)
    own = Pooling._commutes
    monkeypatch.setattr(Pooling, "_commutes", lambda s, v: seen.append(own(s, v)) or seen[-1])
    if how == "hook":
        shapes = []
        model[1].register_forward_hook(lambda m, a, out: shapes.append(tuple(out.shape)))
    x = x.contiguous(memory_format=torch.channels_last) if how == "channels last" else x
    with torch.set_grad_enabled(how == "recorded"):
        found = inverse(x, y)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert seen.count(False) >= 1
    assert how != "hook" or shapes == [(6, 5, 11, 11)]


def test_gradients_of_targets_are_those_in_turn():
    model, x, _ = small()
    model.requires_grad_(False).double()
    x = x.double()
    target = (model(x) + 0.1).requires_grad_()
    inverse = frfx.invert(model, 0)
    (found,) = torch.autograd.grad(inverse(x, target).square().sum(), target)
    inverse.graph = inverse._walk
    inverse.recompile()
    (expected,) = torch.autograd.grad(inverse(x, target).square().sum(), target)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_targets_may_be_mapped_over():
    model, x, _ = small()
    with torch.no_grad():
        swap = frfx.invert(model, 0).inverse._2_swapped
        z = model[0](x)
        y = torch.tanh(F.max_pool2d(z, 2))
        targets = y + torch.tensor([0.1, 0.2]).view(2, 1, 1, 1, 1)
        found = torch.vmap(lambda target: swap(target, y, z, F.max_pool2d(z, 2), None))(targets)
        each = torch.stack([swap(target, y, z, F.max_pool2d(z, 2), None) for target in targets])
    torch.testing.assert_close(found, each, rtol=1e-4, atol=1e-4)


class Read(nn.Module):
    """Reads the activation once more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 2, 3), nn.Linear(8, 3)

    def forward(self, x):
        x = self.conv(x).tanh()
        return self.fc(F.max_pool2d(x, 2).flatten(1)) + x.mean((1, 2, 3))[:, None]


@pytest.mark.parametrize("branches", ["rules", "region"])
def test_an_activation_that_others_read_stays(branches):
    torch.manual_seed(0)
    inverse = frfx.invert(Read(), "conv", policy=frfx.policy.paper(branches=branches))
    assert not swapped(inverse)


@pytest.mark.parametrize(
    "layers",
    [
        (nn.ReLU(), nn.MaxPool2d(2)),
        (nn.GELU(), nn.MaxPool2d(2)),
        (nn.Tanh(), nn.AdaptiveMaxPool2d(2)),
        (nn.Tanh(), nn.AvgPool2d(2)),
        (nn.MaxPool2d(2), nn.Tanh()),
    ],
    ids=lambda layers: "-".join(type(layer).__name__ for layer in layers),
)
def test_others_stay(layers):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), *layers, nn.Flatten(), nn.Linear(8, 3))
    inverse = frfx.invert(model, "0", policy="minimal")
    assert not swapped(inverse)
    x, y = torch.randn(3, 1, 6, 6), torch.arange(3)
    with torch.no_grad():
        torch.testing.assert_close(inverse(x, y), inverse.reconstruct(x, y).feature)


def test_a_trust_region_bounds_every_step():
    model, x, y = small()
    inverse = frfx.invert(model, 0, policy=frfx.policy.paper(trust_region=0.1))
    assert not swapped(inverse)
    with torch.no_grad():
        torch.testing.assert_close(inverse(x, y), inverse.reconstruct(x, y).feature)


def test_it_pickles_copies_and_moves():
    model, x, y = small()
    inverse = frfx.invert(model, 0)
    with torch.no_grad():
        expected = inverse(x, y)
        torch.testing.assert_close(pickle.loads(pickle.dumps(inverse))(x, y), expected)
        torch.testing.assert_close(copy.deepcopy(inverse)(x, y), expected)
        double = inverse.double()(x.double(), y)
    torch.testing.assert_close(double.float(), expected, rtol=1e-3, atol=1e-3)
    assert not list(inverse.merged.parameters())
