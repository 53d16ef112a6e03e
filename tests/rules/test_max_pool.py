"""Max pooling, window by window by brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import integers, normal, reconstruct
from oracles import window_distance as brute_force
from torch import nn
from torch.nn import functional as F

seeds = st.integers(0, 2**31)
MAX_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


@st.composite
def windows(draw):
    """Draw a kernel and an image that it tiles or does not tile, in 1 to 3 dimensions."""
    dims = draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    count = [draw(st.integers(1, 2)) for _ in kernel]
    rest = [draw(st.integers(0, k - 1)) for k in kernel]
    size = [k * c + r for k, c, r in zip(kernel, count, rest, strict=True)]
    return kernel, size, count


def each_window(image, kernel, count):
    """Yield the index of every pooled value with the window of an image (N, C, *size)."""
    for sample, channel in np.ndindex(*image.shape[:2]):
        for place in np.ndindex(*count):
            cut = tuple(slice(p * k, p * k + k) for p, k in zip(place, kernel, strict=True))
            yield (sample, channel, *place), image[(sample, channel, *cut)].ravel()


def outside(image, kernel, count):
    """Return the entries of an image that no window covers."""
    covered = torch.zeros(image.shape, dtype=torch.bool)
    covered[(..., *(slice(k * c) for k, c in zip(kernel, count, strict=True)))] = True
    return image[~covered]


@pytest.mark.parametrize("values", [normal, integers], ids=["distinct", "ties"])
@given(windows=windows(), seed=seeds)
def test_max_pool_gives_the_target_by_the_shortest_way(values, windows, seed):
    kernel, size, count = windows
    pool = MAX_POOL[len(kernel)](kernel)
    x, target = values(seed, 2, 2, *size), 1.5 * values(seed + 1, 2, 2, *count)
    found = reconstruct(pool, x, target)
    assert torch.equal(pool(found), target)
    assert torch.equal(outside(found, kernel, count), outside(x, kernel, count))
    moved = dict(each_window((found - x).numpy(), kernel, count))
    for at, window in each_window(x.numpy(), kernel, count):
        shortest = brute_force(window, target[at].item())
        assert np.linalg.norm(moved[at]) == pytest.approx(shortest, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("values", [normal, integers], ids=["distinct", "ties"])
@given(windows=windows(), seed=seeds)
def test_max_pool_fixed_point(values, windows, seed):
    kernel, size, _ = windows
    pool, x = MAX_POOL[len(kernel)](kernel), values(seed, 2, 2, *size)
    assert torch.equal(reconstruct(pool, x, pool(x)), x)


@given(windows=windows(), seed=seeds)
def test_the_papers_max_pool_copies(windows, seed):
    kernel, size, count = windows
    x, target = normal(seed, 2, 2, *size), normal(seed + 1, 2, 2, *count)
    found = reconstruct(MAX_POOL[len(kernel)](kernel), x, target, "paper")
    assert torch.equal(outside(found, kernel, count), outside(x, kernel, count))
    for at, window in each_window(found, kernel, count):
        assert torch.equal(window, target[at].expand(len(window)))


@given(windows=windows(), seed=seeds)
def test_max_pool_in_single_precision_touches_nothing_else(windows, seed):
    kernel, size, count = windows
    pool = MAX_POOL[len(kernel)](kernel)
    x, target = normal(seed, 1, 2, *size).float(), normal(seed + 1, 1, 2, *count).float()
    found = reconstruct(pool, x, target)
    assert found.dtype == torch.float32
    assert torch.equal(pool(found), target)
    for at, window in each_window(found, kernel, count):  # nothing was raised but one entry
        before = dict(each_window(x, kernel, count))[at]
        assert (window > before).sum() <= 1


MAX_SPELLINGS = {
    "nn.MaxPool2d": nn.MaxPool2d((2, 3)),
    "stride": nn.MaxPool2d((2, 3), stride=(2, 3)),
    "ceil_mode that changes nothing": nn.MaxPool2d((2, 3), ceil_mode=True),
    "F.max_pool2d": lambda x: F.max_pool2d(x, (2, 3)),
    "F.max_pool2d, keywords": lambda x: F.max_pool2d(x, kernel_size=(2, 3), stride=[2, 3]),
    "torch.max_pool2d": lambda x: torch.max_pool2d(x, (2, 3)),
    "aten": lambda x: torch.ops.aten.max_pool2d.default(x, [2, 3]),
    "aten, strides": lambda x: torch.ops.aten.max_pool2d.default(x, [2, 3], [2, 3]),
}


@pytest.mark.parametrize("policy", ["paper", "minimal"])
@pytest.mark.parametrize("spelling", MAX_SPELLINGS.values(), ids=MAX_SPELLINGS)
def test_max_pool_spellings(spelling, policy):
    x, target = normal(0, 2, 3, 4, 6), normal(1, 2, 3, 2, 2)
    expected = reconstruct(nn.MaxPool2d((2, 3)), x, target, policy)
    assert torch.equal(reconstruct(spelling, x, target, policy), expected)
    assert torch.equal(F.max_pool2d(expected, (2, 3)), target)
