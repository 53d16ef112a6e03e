"""Padding, cropping and shuffles against the pseudo-inverse of their Jacobians."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import frfx
from tests.oracles import (
    Apply,
    damped_least_squares,
    jacobian,
    minimal_affine_preimage,
    normal,
    reconstruct,
    relative,
)

seeds = st.integers(0, 2**31)
aten = torch.ops.aten


@st.composite
def pads(draw):
    """Draw arguments of `F.pad`, and the shape of images that they fit."""
    dims = draw(st.integers(1, 3))
    size = [draw(st.integers(1, 5 if dims < 3 else 3)) for _ in range(dims)]
    mode = draw(st.sampled_from(["constant", "reflect", "replicate", "circular"]))
    least = {"constant": -1, "reflect": 0, "replicate": 0, "circular": 0}[mode]
    margins = []
    for n in reversed(size):
        most = {"reflect": n - 1, "circular": n}.get(mode, 3)
        pair = [draw(st.integers(least, most)) for _ in range(2)]
        if n + sum(pair) < 1:
            pair = [0, 0]
        margins += pair
    options = {"mode": mode}
    if mode == "constant":
        options["value"] = draw(st.sampled_from([None, 0, 2.5]))
        margins = margins[: 2 * draw(st.integers(1, dims))]
    return (tuple(margins), options), (1, 2, *size)


@given(drawn=pads(), seed=seeds, damping=st.sampled_from([0.0, 0.3]))
def test_pad(drawn, seed, damping):
    (margins, options), shape = drawn

    def function(x):
        return F.pad(x, margins, **options)

    x = normal(seed, *shape)
    target = normal(seed + 1, *function(x).shape)
    found = reconstruct(function, x, target, frfx.policy.minimal(damping=damping))
    residual = (target - function(x)).numpy().ravel()
    step = damped_least_squares(jacobian(function, x), residual, damping)
    assert relative(found, x.numpy() + step.reshape(x.shape)) < 1e-10
    assert torch.equal(reconstruct(function, x, function(x)), x)


SPELLINGS = {
    "nn.ZeroPad2d": nn.ZeroPad2d((1, 0, 2, 1)),
    "nn.ZeroPad2d, one margin": nn.ZeroPad2d(2),
    "nn.ConstantPad2d": nn.ConstantPad2d((1, -1, 0, 2), 3.5),
    "nn.ReflectionPad2d": nn.ReflectionPad2d((1, 0, 2, 1)),
    "nn.ReplicationPad2d": nn.ReplicationPad2d(1),
    "nn.CircularPad2d": nn.CircularPad2d((1, 2, 3, 0)),
    "F.pad, last dimension": lambda x: F.pad(x, (1, 2)),
    "F.pad, channels": lambda x: F.pad(x, (1, 0, 0, 0, 1, 2)),
    "F.pad, nothing of the batch": lambda x: F.pad(x, (1, 0, 0, 0, 1, 2, 0, 0)),
    "F.pad, keywords": lambda x: F.pad(input=x, pad=[1, 1], value=2.0),
    "torch.constant_pad_nd": lambda x: torch.constant_pad_nd(x, (1, 1), 2),
    "aten.constant_pad_nd": lambda x: aten.constant_pad_nd.default(x, [1, 1], 2),
    "aten.pad": lambda x: aten.pad.default(x, [1, 1, 2, 0], "reflect"),
    "nn.PixelShuffle": nn.PixelShuffle(2),
    "F.pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "aten.pixel_shuffle": lambda x: aten.pixel_shuffle.default(x, 2),
    "nn.PixelUnshuffle": nn.PixelUnshuffle(2),
    "F.pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "aten.pixel_unshuffle": lambda x: aten.pixel_unshuffle.default(x, 2),
    "nn.ChannelShuffle": nn.ChannelShuffle(2),
    "F.channel_shuffle": lambda x: F.channel_shuffle(x, 4),
    "aten.channel_shuffle": lambda x: aten.channel_shuffle.default(x, 4),
}


@pytest.mark.filterwarnings("error::frfx.ConditionWarning")
@pytest.mark.parametrize("function", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings(function):
    x = normal(0, 2, 8, 4, 6)
    target = normal(1, *function(x).shape)
    found = reconstruct(function, x, target)
    assert relative(found, minimal_affine_preimage(function, x, target)) < 1e-12


@pytest.mark.parametrize(
    "function",
    [nn.ConstantPad1d((2, -1), 1.0), nn.ReflectionPad1d(1), nn.CircularPad3d(1)],
    ids=repr,
)
def test_other_dimensions(function):
    dims = 3 if "3d" in repr(function) else 1
    x = normal(0, 2, 1, *[3, 2, 2][:dims])
    target = normal(1, *function(x).shape)
    found = reconstruct(function, x, target)
    assert relative(found, minimal_affine_preimage(function, x, target)) < 1e-12


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_in_exported_networks(mode):
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, x):
            if min(x.shape) == 0:
                return x
            return F.pad(self.conv(x).tanh(), (1, 1, 0, 1), mode)

    torch.manual_seed(0)
    model = Sized().double().eval().requires_grad_(False)
    x = normal(0, 2, 1, 6, 5)
    try:
        inverse = frfx.invert(model, "tanh", example_input=x)
    except frfx.UnsupportedOpsError:
        assert mode == "circular"  # some versions of torch export it in pieces
        return
    target = normal(1, *model(x).shape)
    feature = model.conv(x).tanh()
    expected = minimal_affine_preimage(lambda z: F.pad(z, (1, 1, 0, 1), mode), feature, target)
    assert inverse.traced.front_end == "torch.export"
    assert relative(inverse(x, target), expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["constant", "replicate"])
def test_precisions(mode, dtype):
    def function(x):
        return F.pad(x, (1, 2), mode)

    x, target = normal(0, 2, 3, 5, dtype=dtype), normal(1, 2, 3, 8, dtype=dtype)
    inverse = frfx.invert(nn.Sequential(nn.Identity(), Apply(function)).eval(), "input")
    found = inverse.reconstruct(x, target)["0"].target
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert (
        relative(found, minimal_affine_preimage(function, x, target)) < 5 * torch.finfo(dtype).eps
    )
