"""The convolution rule, compiled by `frfx.invert`, against the paper's Eq. 19 and 20."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import (
    circulant,
    damped_least_squares,
    invert,
    normal,
    pad_left,
    paper_convolution,
    reconstruct,
    relative,
)
from torch import nn
from torch.nn import functional as F

import frfx

pytestmark = pytest.mark.filterwarnings("error::frfx.ConditionWarning")

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
seeds = st.integers(0, 2**31)

# Channels in and out, window, size: case (a) of the paper is C_in >= C_out, case (b) the other.
GEOMETRIES = {
    "1d-a": (4, 2, (3,), (9,)),
    "1d-square": (3, 3, (4,), (8,)),
    "1d-b": (2, 5, (2,), (7,)),
    "2d-a": (3, 2, (3, 3), (6, 7)),
    "2d-square": (2, 2, (2, 3), (5, 6)),
    "2d-b": (2, 4, (3, 2), (7, 5)),
    "2d-one-by-one": (4, 3, (1, 1), (3, 2)),
    "2d-whole-image": (3, 2, (4, 5), (4, 5)),
    "3d-a": (3, 2, (2, 1, 2), (3, 2, 4)),
    "3d-b": (1, 3, (2, 2, 2), (3, 3, 3)),
}


def conv(seed, n_in, n_out, window, dtype=torch.float64, dominant=3.0, bias=True):
    """Return a random convolution; a dominant entry keeps its spectrum away from zero."""
    layer = CONV[len(window)](n_in, n_out, window, bias=bias, dtype=dtype)
    kernel = 0.3 * normal(seed, n_out, n_in, *window)
    kernel[(slice(None), slice(None), *(0 for _ in window))] += dominant * torch.eye(n_out, n_in)
    with torch.no_grad():
        layer.weight.copy_(kernel)
        if bias:
            layer.bias.copy_(normal(seed + 1, n_out))
    return layer.requires_grad_(False)


def by_the_paper(layer, x, target):
    """Return Eq. 19 or 20, built literally, in complex128."""
    bias = layer.bias if layer.bias is not None else torch.zeros(len(layer.weight))
    values = (layer.weight, bias, x, target)
    return paper_convolution(*(v.double().numpy() for v in values))


def valid(size, window):
    """Return the spatial shape of the output."""
    return [n - k + 1 for n, k in zip(size, window, strict=True)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("policy", ["paper", "minimal"])
def test_equals_the_papers_equations(policy, geometry, dtype, tolerance):
    n_in, n_out, window, size = geometry
    layer = conv(0, n_in, n_out, window, dtype)
    x, target = normal(2, 3, n_in, *size), 3 * normal(3, 3, n_out, *valid(size, window))
    found = reconstruct(layer, x.to(dtype), target.to(dtype), policy)
    assert found.dtype == dtype
    assert relative(found, by_the_paper(layer, x.to(dtype), target.to(dtype))) < tolerance


@st.composite
def geometries(draw):
    """Draw channels in and out, window and size of a small convolution in 1 to 3 dimensions."""
    dims = draw(st.integers(1, 3))
    most = {1: 9, 2: 6, 3: 3}[dims]
    window = tuple(draw(st.integers(1, min(3, most))) for _ in range(dims))
    size = tuple(draw(st.integers(k, most)) for k in window)
    return draw(st.integers(1, 4)), draw(st.integers(1, 4)), window, size


@given(seed=seeds, geometry=geometries(), bias=st.booleans())
def test_equals_the_papers_equations_for_any_geometry(seed, geometry, bias):
    n_in, n_out, window, size = geometry
    layer = conv(seed, n_in, n_out, window, bias=bias)
    x, target = normal(seed + 2, 2, n_in, *size), normal(seed + 3, 2, n_out, *valid(size, window))
    assert relative(reconstruct(layer, x, target), by_the_paper(layer, x, target)) < 1e-10


@pytest.mark.parametrize(("n_in", "n_out"), [(4, 2), (2, 4), (3, 5)])
@given(seed=seeds)
def test_kernels_as_training_leaves_them(n_in, n_out, seed):
    layer = conv(seed, n_in, n_out, (3, 3), dominant=0.0)
    x, target = normal(seed + 2, 1, n_in, 6, 7), normal(seed + 3, 1, n_out, 4, 5)
    assert relative(reconstruct(layer, x, target), by_the_paper(layer, x, target)) < 1e-10


@given(seed=seeds, geometry=geometries())
def test_case_a_gives_the_target_exactly(seed, geometry):
    n_in, n_out, window, size = geometry
    n_in, n_out = max(n_in, n_out), min(n_in, n_out)
    layer = conv(seed, n_in, n_out, window)
    x, target = normal(seed + 2, 2, n_in, *size), normal(seed + 3, 2, n_out, *valid(size, window))
    found = reconstruct(layer, x, target)
    assert (layer(found) - target).abs().max() < 1e-9


@given(seed=seeds, geometry=geometries())
def test_fixed_point(seed, geometry):
    n_in, n_out, window, size = geometry
    layer, x = conv(seed, n_in, n_out, window), normal(seed + 2, 2, n_in, *size)
    assert torch.equal(reconstruct(layer, x, layer(x)), x)


@given(seed=seeds, geometry=geometries(), damping=st.floats(1e-4, 1))
def test_damping(seed, geometry, damping):
    n_in, n_out, window, size = geometry
    layer = conv(seed, n_in, n_out, window)
    x, target = normal(seed + 2, 2, n_in, *size), normal(seed + 3, 2, n_out, *valid(size, window))
    found = reconstruct(layer, x, target, frfx.policy.minimal(damping=damping))
    residual = pad_left((target - layer(x)).numpy(), size).reshape(2, -1)
    step = damped_least_squares(circulant(layer.weight.numpy(), size), residual.T, damping).T
    assert relative(found, x.numpy() + step.reshape(x.shape)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("geometry", [GEOMETRIES["2d-a"], GEOMETRIES["2d-b"]], ids=["a", "b"])
def test_zero_kernels_leave_the_input(geometry, dtype):
    n_in, n_out, window, size = geometry
    layer = conv(0, n_in, n_out, window, dtype)
    layer.weight.zero_()
    x = normal(2, 2, n_in, *size, dtype=dtype)
    target = normal(3, 2, n_out, *valid(size, window), dtype=dtype)
    with pytest.warns(frfx.ConditionWarning, match="condition number inf"):
        assert torch.equal(reconstruct(layer, x, target), x)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("geometry", [GEOMETRIES["2d-a"], GEOMETRIES["2d-b"]], ids=["a", "b"])
def test_scaled_kernels(geometry, dtype, tolerance, scale):
    n_in, n_out, window, size = geometry
    layer = conv(0, n_in, n_out, window, dtype, bias=False)
    layer.weight.mul_(scale)
    x = normal(2, 2, n_in, *size, dtype=dtype)
    target = layer(x) + scale * normal(3, 2, n_out, *valid(size, window), dtype=dtype)
    # Unscaled, for the system of Eq. 19 mixes the scale with ones.
    plain = conv(0, n_in, n_out, window, dtype, bias=False)
    expected = by_the_paper(plain, x, plain(x) + (target - layer(x)) / scale)
    assert relative(reconstruct(layer, x, target), expected) < tolerance


def test_dead_output_channel():
    layer = conv(0, 3, 3, (3, 3))
    layer.weight[1] = 0
    x, target = normal(2, 2, 3, 6, 5), normal(3, 2, 3, 4, 3)
    with pytest.warns(frfx.ConditionWarning):
        found = reconstruct(layer, x, target)
    residual = pad_left((target - layer(x)).numpy(), (6, 5)).reshape(2, -1)
    step = residual @ np.linalg.pinv(circulant(layer.weight.numpy(), (6, 5)), rcond=1e-12).T
    assert relative(found, x.numpy() + step.reshape(x.shape)) < 1e-12


def test_every_image_size_has_its_own_factor():
    layer = conv(0, 3, 2, (3, 2))
    inverse = invert(layer)
    for size in [(5, 6), (8, 4), (5, 6)]:
        x, target = normal(2, 2, 3, *size), normal(3, 2, 2, *valid(size, (3, 2)))
        assert relative(inverse(x, target), by_the_paper(layer, x, target)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_networks_are_solved_in_single(dtype):
    n_in, n_out, window, size = GEOMETRIES["2d-a"]
    layer = conv(0, n_in, n_out, window, dtype)
    x, target = normal(2, 2, n_in, *size), normal(3, 2, n_out, *valid(size, window))
    found = reconstruct(layer, x.to(dtype), target.to(dtype))
    assert found.dtype == dtype
    # The rounding of the forward output and of the result to the half type is seen, no more.
    expected = by_the_paper(layer, x.to(dtype), target.to(dtype))
    assert relative(found.double(), expected) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "spelling",
    [
        lambda x, w, b: F.conv2d(x, w, b),
        lambda x, w, b: F.conv2d(x, w, b, stride=(1, 1), padding="valid", dilation=1),
        lambda x, w, b: torch.conv2d(x, w, b),
        lambda x, w, b: torch.ops.aten.conv2d.default(x, w, b, [1, 1], [0, 0]),
        lambda x, w, b: torch.ops.aten.conv2d.padding(x, w, b, [1, 1], "valid"),
    ],
    ids=["F.conv2d", "keywords", "torch.conv2d", "aten", "aten padding"],
)
def test_spellings(spelling):
    layer = conv(0, 3, 2, (3, 2))
    x, target = normal(2, 2, 3, 5, 6), normal(3, 2, 2, 3, 5)
    found = reconstruct(spelling, x, target, w=layer.weight, b=layer.bias)
    assert relative(found, by_the_paper(layer, x, target)) < 1e-10


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 2, 1, padding="same"),
        nn.Conv2d(3, 2, 3, padding="valid"),
        nn.Conv2d(3, 2, 3, padding_mode="reflect"),  # pads by nothing
    ],
    ids=["same, one by one", "valid", "padding mode"],
)
def test_paddings_that_pad_nothing(layer):
    layer = layer.double().requires_grad_(False)
    x = normal(2, 2, 3, 5, 6)
    target = layer(x) + normal(3, 2, 2, *layer(x).shape[2:])
    assert relative(reconstruct(layer, x, target), by_the_paper(layer, x, target)) < 1e-10
