"""Average pooling that enlarges and the linear layer behind it, merged, against both in turn."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import frfx
from frfx.compiler.enlarge import Apart, Maps
from frfx.linalg.dense import GramFactor
from frfx.rules.base import AffineInversion
from frfx.rules.linear import LinearRule

POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


def network(onto: tuple[Any, ...], wide: int, channels: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    entries = channels
    for size in onto:
        entries *= size or 4
    return nn.Sequential(
        nn.Tanh(), POOLS[len(onto) - 1](onto), nn.Flatten(), nn.Dropout(),
        nn.Linear(entries, wide), nn.ReLU(), nn.Linear(wide, 4),
    ).double().eval()  # fmt: skip


def batch(*size: int, channels: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, channels, *size, generator=generator, dtype=dtype)
    return x, torch.arange(5) % 4


def maps_of(inverse: frfx.Inverse) -> list[type]:
    """Return what has been merged, by the sizes seen."""
    made = [m.factors for name, m in inverse.inverse.named_children() if name.endswith("_merged")]
    return [type(maps) for factors in made for maps in factors.values()]


def in_turn(inverse: frfx.Inverse, x: Tensor, y: Tensor) -> Tensor:
    """Return what the same inversions give layer by layer."""
    return inverse.reconstruct(x, y).feature


@given(
    onto=st.one_of(
        st.lists(st.integers(1, 5), min_size=1, max_size=1),
        st.lists(st.one_of(st.none(), st.integers(1, 5)), min_size=2, max_size=3),
    ),
    size=st.tuples(*[st.integers(1, 6)] * 3),
    wide=st.sampled_from([3, 24]),
    damping=st.sampled_from([0.0, 0.1]),
)
def test_merged_is_layer_by_layer(onto, size, wide, damping):
    size = tuple(4 if asked is None else n for n, asked in zip(size, onto, strict=False))
    model = network(tuple(onto), wide)
    policy = frfx.policy.paper(damping=damping)
    x, y = batch(*size)
    with torch.no_grad():
        inverse = frfx.invert(model, "0", policy=policy)
        found = inverse(x, y)
        torch.testing.assert_close(found, in_turn(inverse, x, y), rtol=1e-9, atol=1e-9)
    sizes = [(n, n if asked is None else asked) for n, asked in zip(size, onto, strict=True)]
    before, after = (torch.tensor(each).prod() for each in zip(*sizes, strict=True))
    expected = [Maps if before < after else Apart]
    may = any(asked is not None and asked > 1 for asked in onto)
    assert maps_of(inverse) == (expected if may else [])


def test_merged_is_two_dense_pseudo_inverses():
    model, (x, y) = network((3, 3), 7), batch(2, 1)
    with torch.no_grad():
        inverse = frfx.invert(model, "0")
        found, nodes = inverse(x, y), inverse.reconstruct(x, y)
        deviation = nodes["4"].target - nodes["4"].forward
        a = model[0](x)
        basis = torch.eye(4, dtype=torch.float64).unflatten(1, (2, 2, 1))
        average = model[1](basis).flatten(1).T
        step = torch.linalg.pinv(average) @ torch.linalg.pinv(model[4].weight) @ deviation.T
    assert maps_of(inverse) == [Maps]
    torch.testing.assert_close(found, a + step.T.unflatten(1, a.shape[1:]), rtol=1e-9, atol=1e-9)


def test_a_large_layer_is_merged_from_its_two_parts():
    model = network((7, 7), 512, channels=32).float()
    x, y = batch(2, 2, channels=32, dtype=torch.float32)
    with torch.no_grad():
        inverse = frfx.invert(model, "0")
        found = inverse(x, y)
        (factor,) = inverse.inverse._4.factors.values()
        assert isinstance(factor.factor, GramFactor)
        assert maps_of(inverse) == [Maps]
        torch.testing.assert_close(found, in_turn(inverse, x, y), rtol=1e-4, atol=1e-5)
        merged = inverse.inverse._4_merged.factors[1, 32, 2, 2]
        assert merged.nbytes == 4 * 2 * 512 * 32 * 4
        assert inverse.prepare.nbytes >= merged.nbytes + factor.nbytes


def test_every_node_of_the_walk_is_there():
    model, (x, y) = network((3, 3), 7), batch(2, 2)
    inverse = frfx.invert(model, "0")
    assert "self.merged._4(" in inverse.code
    walk = ["argmax", "6", "5", "4", "3", "2", "1"]
    assert list(inverse.reconstruct(x, y)) == [*walk, "0"]
    assert [row.node for row in inverse.summary()] == walk


def test_a_weight_that_changes_is_noticed():
    model, (x, y) = network((3, 3), 7), batch(2, 2)
    inverse = frfx.invert(model, "0")
    with torch.no_grad():
        first = inverse(x, y)
        model[4].weight.mul_(2).sin_()
        model[4].bias.add_(1)
        second = inverse(x, y)
        assert not torch.allclose(first, second)
        torch.testing.assert_close(second, frfx.invert(model, "0")(x, y))
        torch.testing.assert_close(second, in_turn(inverse, x, y))


@pytest.mark.parametrize("size", [2, 4], ids=["merged", "in turn"])
@pytest.mark.parametrize("where", ["1", "3", "4"])
def test_hooks_run_in_their_place(where, size):
    model, (x, y) = network((3, 3), 7), batch(size, size)
    inverse = frfx.invert(model, "0")
    with torch.no_grad():
        expected, shapes = inverse(x, y), []
        model.get_submodule(where).register_forward_hook(lambda m, a, out: shapes.append(out.shape))
        torch.testing.assert_close(inverse(x, y), expected)
    assert len(shapes) == 1


def test_gradients_are_those_of_the_layers():
    """With respect to the input and to the weights, which are constants to the factors."""
    model, (x, y) = network((3, 3), 7), batch(2, 2)
    x.requires_grad_()
    wanted = [x, *model.parameters()]
    inverse = frfx.invert(model, "0")
    found = torch.autograd.grad(inverse(x, y).square().sum(), wanted)
    merged, inverse.graph = inverse.graph, inverse._walk
    inverse.recompile()
    assert merged is not inverse.graph
    torch.testing.assert_close(
        found, torch.autograd.grad(inverse(x, y).square().sum(), wanted), rtol=1e-9, atol=1e-12
    )


def test_hooks_of_all_modules_run():
    model, (x, y) = network((3, 3), 7), batch(2, 2)
    inverse, seen = frfx.invert(model, "0"), []
    with torch.no_grad():
        inverse(x, y)
        hook = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
        try:
            inverse(x, y)
        finally:
            hook.remove()
    assert {nn.AdaptiveAvgPool2d, nn.Flatten, nn.Dropout, nn.Linear} <= set(seen)


def test_hooks_of_gradients_run():
    model, (x, y) = network((3, 3), 7).requires_grad_(False), batch(2, 2)
    seen = []
    model[4].register_full_backward_hook(lambda *args: seen.append(args))
    frfx.invert(model, "0")(x.requires_grad_(), y).sum().backward()
    assert len(seen) == 1


@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_may_come_and_go(bias):
    model, (x, y) = network((3, 3), 7), batch(2, 2)
    if not bias:
        model[4].bias = None
    inverse = frfx.invert(model, "0")
    with torch.no_grad():
        inverse(x, y)
        model[4].bias = None if bias else nn.Parameter(torch.full((7,), 3.0).double())
        torch.testing.assert_close(inverse(x, y), frfx.invert(model, "0")(x, y))


@pytest.mark.parametrize(
    "layers",
    [
        (nn.AdaptiveAvgPool2d((1, 7)), nn.Flatten(1, 2), nn.Linear(7, 4), nn.Flatten(1)),
        (nn.AdaptiveAvgPool1d(7), nn.Linear(7, 4), nn.Flatten(1)),
        (nn.AdaptiveAvgPool2d(3), nn.Flatten(1), nn.Unflatten(1, (1, 9)), nn.Linear(9, 4))
        + (nn.Flatten(1),),
    ],
    ids=["flattened", "one channel", "a dimension of one"],
)
def test_a_layer_of_rows_is_inverted_in_turn(layers):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Tanh(), *layers).double()
    x, y = batch(*[2] * (1 if isinstance(layers[0], nn.AdaptiveAvgPool1d) else 2), channels=1)
    with torch.no_grad():
        inverse = frfx.invert(model, "0")
        torch.testing.assert_close(inverse(x, y), in_turn(inverse, x, y))
    assert maps_of(inverse) == [Apart]


class Halved(AffineInversion):
    """Goes half of the way."""

    def forward(self, target, output, *inputs):
        return (super().forward(target, output, *inputs) + inputs[0]) / 2


@dataclass(frozen=True)
class HalvedRule(LinearRule):
    """A rule of a user, which builds an inversion of its own."""

    def build(self, op):
        own = super().build(op)
        return Halved(op, own._operator, own._solver)


def test_a_rule_of_ones_own_is_asked():
    model, (x, y) = network((3, 3), 7), batch(2, 2)
    policy = frfx.policy.paper().override(node="4", rule=HalvedRule())
    inverse = frfx.invert(model, "0", policy=policy)
    with torch.no_grad():
        found = inverse(x, y)
        torch.testing.assert_close(found, in_turn(inverse, x, y))
        assert not torch.allclose(found, frfx.invert(model, "0")(x, y))


@pytest.mark.parametrize(
    "policy",
    [
        frfx.policy.paper(),  # whose rule of ReLU is the identity
        frfx.policy.minimal().override(node="2", rule=frfx.rules.IdentityRule()),
    ],
    ids=["paper", "override"],
)
def test_what_lets_the_target_through_may_still_compute_something(policy):
    """Only ops that leave all values as they are may lie between the two."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Tanh(), nn.AdaptiveAvgPool2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 4)
    ).double()
    x, y = batch(2, 2)
    with torch.no_grad():
        inverse = frfx.invert(model, "0", policy=policy)
        torch.testing.assert_close(inverse(x, y), in_turn(inverse, x, y))
    assert not maps_of(inverse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rounded_once(dtype):
    model = network((3, 3), 7).to(dtype)
    x, y = batch(2, 2, dtype=dtype)
    with torch.no_grad():
        inverse = frfx.invert(model, "0")
        found = inverse(x, y)
        assert maps_of(inverse) == [Maps]
        assert found.dtype == dtype
        close = {"rtol": 0.05, "atol": 4 * torch.finfo(dtype).eps}
        torch.testing.assert_close(found, in_turn(inverse, x, y), **close)


class Reader(nn.Module):
    """Reads what is between the two once more, and takes sizes from the graph."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.pool, self.fc, self.twice = nn.AdaptiveAvgPool2d(3), nn.Linear(18, 4), twice

    def forward(self, x):
        x = self.pool(x.tanh())
        flat = x.flatten(1) if self.twice else x.view(x.size(0), -1)
        return self.fc(flat) + (x.mean((1, 2, 3))[:, None] if self.twice else 0)


@pytest.mark.parametrize("twice", [True, False])
@pytest.mark.parametrize("branches", ["rules", "region"])
def test_what_others_read_stays(twice, branches):
    torch.manual_seed(0)
    model, (x, y) = Reader(twice).double(), batch(2, 2)
    inverse = frfx.invert(model, "tanh", policy=frfx.policy.paper(branches=branches))
    assert not maps_of(inverse)
    assert not list(inverse.merged.children())
    with torch.no_grad():
        torch.testing.assert_close(inverse(x, y), in_turn(inverse, x, y))


def test_a_trust_region_bounds_every_step():
    model, (x, y) = network((3, 3), 7), batch(2, 2)
    inverse = frfx.invert(model, "0", policy=frfx.policy.paper(trust_region=0.1))
    assert not list(inverse.merged.children())
    with torch.no_grad():
        torch.testing.assert_close(inverse(x, y), in_turn(inverse, x, y))


def test_a_layer_that_is_solved_in_steps_stays():
    model, (x, y) = network((3, 3), 7), batch(2, 2)
    policy = frfx.policy.paper().override(op=nn.Linear, solver="iterative", tolerance=1e-9)
    inverse = frfx.invert(model, "0", policy=policy)
    with torch.no_grad():
        torch.testing.assert_close(inverse(x, y), in_turn(inverse, x, y), rtol=1e-6, atol=1e-6)
    assert maps_of(inverse) == [Apart]


def test_a_merged_inverse_pickles_and_moves():
    model, (x, y) = network((3, 3), 7), batch(2, 2)
    inverse = frfx.invert(model, "0")
    with torch.no_grad():
        expected = inverse(x, y)
        torch.testing.assert_close(pickle.loads(pickle.dumps(inverse))(x, y), expected)
        single = inverse.float()(x.float(), y)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), expected, rtol=1e-3, atol=1e-4)
    assert len(list(inverse.merged.parameters())) == 0
