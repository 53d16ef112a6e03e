"""Average pooling and means against their pseudo-inverse."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import minimal_affine_preimage, normal, reconstruct, relative
from torch import nn
from torch.nn import functional as F

seeds = st.integers(0, 2**31)
AVG_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
ADAPTIVE = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


@st.composite
def windows(draw):
    """Draw a kernel and an image that it tiles or does not tile, in 1 to 3 dimensions."""
    dims = draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    count = [draw(st.integers(1, 2)) for _ in kernel]
    rest = [draw(st.integers(0, k - 1)) for k in kernel]
    size = [k * c + r for k, c, r in zip(kernel, count, rest, strict=True)]
    return kernel, size, count


@given(windows=windows(), seed=seeds)
def test_avg_pool(windows, seed):
    kernel, size, count = windows
    pool = AVG_POOL[len(kernel)](kernel)
    x, target = normal(seed, 1, 2, *size), normal(seed + 1, 1, 2, *count)
    found = reconstruct(pool, x, target)
    assert relative(found, minimal_affine_preimage(pool, x, target)) < 1e-13
    assert relative(pool(found), target) < 1e-13
    assert torch.equal(reconstruct(pool, x, pool(x)), x)


AVERAGES = {
    "divisor 3": (nn.AvgPool2d((2, 3), divisor_override=3), (5, 6), (2, 2)),
    "divisor 7, 3d": (nn.AvgPool3d(2, divisor_override=7), (2, 4, 3), (1, 2, 1)),
    "divisor -2": (nn.AvgPool2d(2, divisor_override=-2), (4, 4), (2, 2)),
    "count_include_pad": (nn.AvgPool2d(2, count_include_pad=False), (4, 5), (2, 2)),
    "ceil_mode that changes nothing": (nn.AvgPool2d(2, ceil_mode=True), (4, 2), (2, 1)),
    "F.avg_pool1d": (lambda x: F.avg_pool1d(x, 3), (7,), (2,)),
    "F.avg_pool2d": (lambda x: F.avg_pool2d(x, (1, 2)), (3, 4), (3, 2)),
    "F.avg_pool2d, divisor": (lambda x: F.avg_pool2d(x, 2, divisor_override=5), (2, 4), (1, 2)),
    "F.avg_pool3d": (lambda x: F.avg_pool3d(x, 2), (2, 2, 4), (1, 1, 2)),
    "aten.avg_pool2d": (lambda x: torch.ops.aten.avg_pool2d.default(x, [2, 2]), (4, 4), (2, 2)),
    "global, 1d": (nn.AdaptiveAvgPool1d(1), (5,), (1,)),
    "global, 2d": (nn.AdaptiveAvgPool2d(1), (3, 4), (1, 1)),
    "global, 3d": (nn.AdaptiveAvgPool3d(1), (2, 3, 2), (1, 1, 1)),
    "F.adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x, 2), (6,), (2,)),
    "F.adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (2, 1)), (4, 3), (2, 1)),
    "F.adaptive_avg_pool3d": (lambda x: F.adaptive_avg_pool3d(x, 1), (2, 1, 3), (1, 1, 1)),
    "one size kept": (nn.AdaptiveAvgPool2d((None, 2)), (3, 4), (3, 2)),
    "aten.adaptive_avg_pool2d": (
        lambda x: torch.ops.aten.adaptive_avg_pool2d.default(x, [2, 2]),
        (4, 2),
        (2, 2),
    ),
}


@pytest.mark.parametrize(("pool", "size", "pooled"), AVERAGES.values(), ids=AVERAGES)
def test_averages(pool, size, pooled):
    x, target = normal(0, 2, 3, *size), normal(1, 2, 3, *pooled)
    found = reconstruct(pool, x, target)
    assert relative(found, minimal_affine_preimage(pool, x, target)) < 1e-13
    assert relative(pool(found), target) < 1e-13


@st.composite
def divisions(draw):
    """Draw an image and a size that divides it, in 1 to 3 dimensions."""
    dims = draw(st.integers(1, 3))
    pooled = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    return pooled, [p * draw(st.integers(1, 2)) for p in pooled]


@given(division=divisions(), seed=seeds)
def test_adaptive_avg_pool(division, seed):
    pooled, size = division
    pool = ADAPTIVE[len(size)](pooled)
    x, target = normal(seed, 1, 2, *size), normal(seed + 1, 1, 2, *pooled)
    found = reconstruct(pool, x, target)
    assert relative(found, minimal_affine_preimage(pool, x, target)) < 1e-13


DIMS = [d for n in (1, 2, 3) for d in itertools.permutations((1, 2, 3), n)] + [
    -1,
    2,
    (-1, 1),
    [2, 3],
]


@pytest.mark.parametrize("keepdim", [True, False])
@pytest.mark.parametrize("dim", DIMS, ids=str)
def test_mean(dim, keepdim):
    x = normal(0, 2, 3, 2, 4)
    target = normal(1, *x.mean(dim, keepdim).shape)
    expected = minimal_affine_preimage(lambda x: x.mean(dim, keepdim), x, target)
    for spelling in (
        lambda x: x.mean(dim, keepdim),
        lambda x: torch.mean(x, dim, keepdim=keepdim),
        lambda x: x.mean(dim=dim, keepdim=keepdim),
        lambda x: torch.mean(x, axis=dim, keepdim=keepdim),
    ):
        assert relative(reconstruct(spelling, x, target), expected) < 1e-13
