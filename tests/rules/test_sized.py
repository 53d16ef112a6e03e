"""Arguments that the graph computes from sizes: what is given as numbers gives the same inverse."""

from __future__ import annotations

import copy
import logging
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import frfx
from frfx.rules import AvgPoolRule
from tests.oracles import Apply, invert, minimal_affine_preimage, normal, relative


def by_hand(x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, -1, h, w)


W = {"w": torch.linspace(-1, 1, 4).double()[:, None, None]}
BLUR = {"w": normal(3, 4, 1, 3, 3)}
NORM = {"mean": normal(4, 4), "var": normal(5, 4).square() + 0.1}

CASES = {
    "global average": (
        lambda x: F.avg_pool2d(x, x.shape[2:]),
        lambda c, h, w: lambda x: F.avg_pool2d(x, (h, w)),
    ),
    "global average by size()": (
        lambda x: F.avg_pool2d(x, kernel_size=x.size()[2:]),
        lambda c, h, w: lambda x: F.avg_pool2d(x, (h, w)),
    ),
    "a window of one size": (
        lambda x: F.avg_pool2d(x, x.shape[2] // 2),
        lambda c, h, w: lambda x: F.avg_pool2d(x, h // 2),
    ),
    "a window in a list": (
        lambda x: F.avg_pool2d(x, [x.shape[2] - 1, 2], stride=[1, 2]),
        lambda c, h, w: lambda x: F.avg_pool2d(x, [h - 1, 2], stride=[1, 2]),
    ),
    "max pooling": (
        lambda x: F.max_pool2d(x, x.shape[2:]),
        lambda c, h, w: lambda x: F.max_pool2d(x, (h, w)),
    ),
    "max pooling, a stride of a size": (
        lambda x: F.max_pool2d(x, 2, stride=x.size(2) // 3),
        lambda c, h, w: lambda x: F.max_pool2d(x, 2, stride=h // 3),
    ),
    "adaptive onto a size": (
        lambda x: F.adaptive_avg_pool2d(x, x.shape[3] // 2),
        lambda c, h, w: lambda x: F.adaptive_avg_pool2d(x, w // 2),
    ),
    "interpolation onto a size": (
        lambda x: F.interpolate(x, size=(x.shape[3], x.shape[2] + 1), mode="bilinear"),
        lambda c, h, w: lambda x: F.interpolate(x, size=(w, h + 1), mode="bilinear"),
    ),
    "a scale": (
        lambda x: F.interpolate(x, scale_factor=float(2) * x.size(1)),
        lambda c, h, w: lambda x: F.interpolate(x, scale_factor=2.0 * c),
    ),
    "padding to even sizes": (
        lambda x: F.pad(x, (0, x.size(3) % 2, 0, x.size(2) % 2)),
        lambda c, h, w: lambda x: F.pad(x, (0, w % 2, 0, h % 2)),
    ),
    "reflecting": (
        lambda x: F.pad(x, (x.size(3) // 2, 1, 0, 1), mode="reflect"),
        lambda c, h, w: lambda x: F.pad(x, (w // 2, 1, 0, 1), mode="reflect"),
    ),
    "channel shuffle": (
        lambda x: F.channel_shuffle(x, x.size(1) // 2),
        lambda c, h, w: lambda x: F.channel_shuffle(x, c // 2),
    ),
    "mean over the last": (
        lambda x: x.mean(x.dim() - 1),
        lambda c, h, w: lambda x: x.mean(3),
    ),
    "layer norm of a shape": (
        lambda x: F.layer_norm(x, x.shape[1:]),
        lambda c, h, w: lambda x: F.layer_norm(x, (c, h, w)),
    ),
    "leaky slope": (
        lambda x: F.leaky_relu(x, x.size(1) * 0.1),
        lambda c, h, w: lambda x: F.leaky_relu(x, c * 0.1),
    ),
    "a channelwise convolution": (
        lambda x, w: F.conv2d(x, w, stride=x.size(1) // 2, padding=1, groups=x.shape[1]),
        lambda c, h, w: lambda x, w: F.conv2d(x, w, stride=c // 2, padding=1, groups=c),
        BLUR,
    ),
    "a transposed convolution": (
        lambda x, w: F.conv_transpose2d(x, w, None, x.size(1) // 2, 1, 1, x.shape[1]),
        lambda c, h, w: lambda x, w: F.conv_transpose2d(x, w, None, c // 2, 1, 1, c),
        BLUR,
    ),
    "batch norm": (
        lambda x, mean, var: F.batch_norm(x, mean, var, eps=1 / x.size(1)),
        lambda c, h, w: lambda x, mean, var: F.batch_norm(x, mean, var, eps=1 / c),
        NORM,
    ),
    "joined": (
        lambda x: torch.cat((x, x.mul(2)), x.dim() - 1),
        lambda c, h, w: lambda x: torch.cat((x, x.mul(2)), 3),
    ),
    "parts joined": (
        lambda x: torch.stack(x.chunk(2, 1), x.dim() - 1),
        lambda c, h, w: lambda x: torch.stack(x.chunk(2, 1), 3),
    ),
    "alpha of two": (
        lambda x: torch.sub(x, x.mul(2), alpha=x.size(1)),
        lambda c, h, w: lambda x: torch.sub(x, x.mul(2), alpha=c),
    ),
    "alpha": (
        lambda x, w: torch.add(x, w, alpha=x.size(1)),
        lambda c, h, w: lambda x, w: torch.add(x, w, alpha=c),
        W,
    ),
    "division by a size": (
        lambda x: x / x.size(1) ** 0.5,
        lambda c, h, w: lambda x: x / c**0.5,
    ),
    "permutation": (
        lambda x: x.permute(0, x.dim() - 1, 1, 2),
        lambda c, h, w: lambda x: x.permute(0, 3, 1, 2),
    ),
    "transposition": (
        lambda x: x.transpose(1, x.dim() - 1),
        lambda c, h, w: lambda x: x.transpose(1, 3),
    ),
    "shuffled by hand": (
        by_hand,
        lambda c, h, w: lambda x: F.channel_shuffle(x, 2),
    ),
    "flattened by hand": (
        lambda x: x.reshape(x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]),
        lambda c, h, w: lambda x: x.flatten(1),
    ),
}


@pytest.mark.parametrize("policy", ["paper", "minimal"])
@pytest.mark.parametrize("case", CASES)
def test_same_inverse_as_with_numbers(case, policy):
    computed, fixed, *rest = CASES[case]
    tensors = rest[0] if rest else {}
    policy = replace(frfx.policy.resolve(policy), branches="rules")
    inverse = invert(computed, policy, **tensors)
    for count, h, w in ((2, 6, 6), (3, 7, 5), (1, 6, 9), (4, 6, 6)):
        x = normal(h * w, count, 4, h, w)
        same = fixed(4, h, w)
        target = normal(1, *same(x, **tensors).shape)
        found, expected = inverse(x, target), invert(same, policy, **tensors)(x, target)
        assert torch.equal(found, expected)


@given(h=st.integers(2, 7), w=st.integers(2, 7), count=st.integers(1, 3))
def test_global_average_by_sizes_is_the_minimal_preimage(h, w, count):
    def function(x):
        return F.avg_pool2d(x, x.shape[2:]) * x.shape[1]

    x, target = normal(0, count, 2, h, w), normal(1, count, 2, 1, 1)
    expected = minimal_affine_preimage(function, x, target)
    assert relative(invert(function)(x, target), expected) < 1e-10


def test_the_batch_may_be_any():
    """A kernel that happens to be as long as the batch is no kernel of the batch's length."""
    inverse = invert(lambda x: F.avg_pool1d(x, x.size(2)))
    for count in (4, 1, 2, 4):
        x = normal(0, count, 3, 4)
        assert torch.allclose(inverse(x, torch.zeros(count, 3, 1)), x - x.mean(2, keepdim=True))


def test_factors_are_kept_by_size_and_made_anew_for_another_dtype():
    inverse = invert(lambda x: F.avg_pool2d(x, x.shape[2] - 1, 1))
    (sized,) = inverse.prepare.factored.values()
    inverse(normal(0, 2, 1, 5, 5), normal(1, 2, 1, 2, 2))
    inverse(normal(0, 2, 1, 4, 4), normal(1, 2, 1, 2, 2))
    assert list(sized.factors) == [(1, 5, 5), (1, 4, 4)]
    assert inverse.prepare.nbytes == sum(f.nbytes for f in sized.factors.values()) > 0
    row = inverse.summary()[1]
    assert (row.op, row.rule, row.solver) == ("avg_pool", "AvgPoolRule", "separable")
    assert row.condition > 1
    kept = dict(sized.factors)
    inverse(normal(0, 3, 1, 5, 5), normal(1, 3, 1, 2, 2))
    assert all(sized.factors[key] is kept[key] for key in kept)
    single = inverse(normal(0, 2, 1, 5, 5).float(), normal(1, 2, 1, 2, 2).float())
    assert single.dtype == torch.float32
    inverse.refresh()
    assert not sized.factors


class Other(nn.Module):
    """Pools by a size that the pooled image does not tell."""

    def forward(self, x):
        """Return the mean of windows as long as what is left of the input."""
        short = F.adaptive_avg_pool1d(x, 4)
        return F.avg_pool1d(short, x.size(2) // 4, 1)


def test_same_shape_with_other_arguments():
    inverse = frfx.invert(Other(), "adaptive_avg_pool1d")
    for length in (8, 12, 8, 12):
        x = normal(0, 2, 3, length)
        short = F.adaptive_avg_pool1d(x, 4)
        target = normal(1, 2, 3, 5 - length // 4)
        fixed = invert(lambda x, kernel=length // 4: F.avg_pool1d(x, kernel, 1))
        assert torch.equal(inverse(x, target), fixed(short, target))


class Network(nn.Module):
    """A convolutional network that writes its global pooling by sizes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4, 3)
        self.double().eval()

    def forward(self, x):
        """Return logits."""
        x = torch.tanh(self.conv(x))
        x = F.avg_pool2d(x, x.size()[2:])
        return self.fc(x.view(x.size(0), -1))


class Padded(Network):
    """Pads by sizes, which torch.export keeps as such."""

    def __init__(self, check):
        super().__init__()
        self.check = check

    def forward(self, x):
        """Return logits."""
        if self.check and x.ndim != 4:
            raise ValueError("rank")
        x = torch.tanh(self.conv(x))
        x = F.pad(x, (x.size(3) // 2, 1, 1, x.size(2) - 1), mode="replicate")
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("example", [None, normal(0, 2, 1, 6, 6)], ids=["symbolic", "example"])
def test_in_a_network(example):
    inverse = frfx.invert(Network(), "conv", example_input=example)
    twins = [copy.deepcopy(inverse), pickle.loads(pickle.dumps(inverse))]
    model = Network()
    same = nn.Sequential(model.conv, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.fc)
    expected = frfx.invert(same, "0")
    for size in (6, 9):
        x, y = normal(size, 3, 1, size, size), torch.tensor([0, 1, 2])
        for each in (inverse, *twins):
            torch.testing.assert_close(each(x, y), expected(x, y), rtol=1e-12, atol=1e-12)


def test_exported_sizes(caplog):
    caplog.set_level(logging.CRITICAL, logger="torch.__trace")
    x, y = normal(0, 3, 1, 6, 6), torch.tensor([0, 1, 2])
    inverse = frfx.invert(Padded(True), "conv", example_input=x)
    assert inverse.traced.front_end == "torch.export"
    plain = frfx.invert(Padded(False), "conv")
    assert plain.traced.front_end == "torch.fx"
    for size in (6, 9):
        x = normal(size, 3, 1, size, size)
        torch.testing.assert_close(inverse(x, y), plain(x, y), rtol=1e-12, atol=1e-12)


def test_options_of_the_policy_reach_the_rule():
    policy = frfx.policy.minimal().override(op=F.avg_pool2d, damping=1.0)
    x, target = normal(0, 2, 3, 4, 4), normal(1, 2, 3, 1, 1)
    found = invert(lambda x: F.avg_pool2d(x, x.shape[2:]), policy)(x, target)
    moved = (target - x.mean((2, 3), keepdim=True)) / 2
    torch.testing.assert_close(found, x + moved)
    override = frfx.policy.minimal().override(op=F.avg_pool2d, rule=AvgPoolRule(rcond=1.0))
    inverse = invert(lambda x: F.avg_pool2d(x, x.shape[2:]), override)
    with pytest.warns(frfx.ConditionWarning, match="avg_pool2d"):
        assert torch.equal(inverse(x, target), x)


def test_all_problems_at_the_first_call_are_told_at_once():
    def function(x):
        x = F.avg_pool1d(x, x.size(0), 1)
        return F.leaky_relu(x, x.size(0) * 0.5)

    inverse = frfx.invert(Apply(function), "x")
    with pytest.raises(frfx.UnsupportedOpsError) as caught:
        inverse(normal(0, 2, 3, 5), normal(1, 2, 3, 4))
    assert [op.path for op in caught.value.ops] == ["leaky_relu", "avg_pool1d"]
    assert "way out: policy.override(node='leaky_relu'" in str(caught.value)
