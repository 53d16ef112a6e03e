"""Average pooling and means against their pseudo-inverse."""

from __future__ import annotations

import itertools

import numpy as np
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
def pools(draw):
    """Draw average pooling as torch allows it, and the size of an image that it can take."""
    dims = draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(dims))
    pool = AVG_POOL[dims](
        kernel,
        stride=tuple(draw(st.integers(1, 4)) for _ in range(dims)),
        padding=tuple(draw(st.integers(0, k // 2)) for k in kernel),
        ceil_mode=draw(st.booleans()),
        count_include_pad=draw(st.booleans()),
        **({"divisor_override": draw(st.sampled_from([None, 3, -2]))} if dims > 1 else {}),
    )
    return pool, [draw(st.integers(k, k + (6 if dims < 3 else 2))) for k in kernel]


@given(drawn=pools(), seed=seeds)
@pytest.mark.filterwarnings("ignore::frfx.ConditionWarning")
def test_avg_pool_of_any_geometry(drawn, seed):
    pool, size = drawn
    x = normal(seed, 1, 2, *size)
    target = normal(seed + 1, *pool(x).shape)
    found = reconstruct(pool, x, target)
    assert relative(found, minimal_affine_preimage(pool, x, target, rcond=1e-10)) < 1e-8
    assert torch.equal(reconstruct(pool, x, pool(x)), x)


@given(drawn=pools(), seed=seeds, damping=st.floats(1e-3, 1))
@pytest.mark.filterwarnings("ignore::frfx.ConditionWarning")
def test_damped_avg_pool(drawn, seed, damping):
    pool, size = drawn
    x = normal(seed, 1, 1, *size)
    target = normal(seed + 1, *pool(x).shape)
    found = reconstruct(pool, x, target, frfx.policy.minimal(damping=damping))
    step = damped_least_squares(jacobian(pool, x), (target - pool(x)).numpy().ravel(), damping)
    assert relative(found, x.numpy() + step.reshape(x.shape)) < 1e-9


@pytest.mark.filterwarnings("ignore::frfx.ConditionWarning")
@pytest.mark.parametrize("rcond", [0.02, 0.3, 0.99])
def test_cutoff_of_avg_pool(rcond):
    pool = nn.AvgPool2d((3, 2), 1, (1, 0))
    x, target = normal(0, 1, 1, 5, 6), normal(1, 1, 1, 5, 5)
    singular = np.linalg.svd(jacobian(pool, x), compute_uv=False)
    assert (singular < rcond * singular[0]).any()
    found = reconstruct(pool, x, target, frfx.policy.minimal(rcond=rcond))
    assert relative(found, minimal_affine_preimage(pool, x, target, rcond=rcond)) < 1e-10


def test_windows_that_overlap_reach_what_they_can():
    pool = nn.AvgPool2d(3, 2)
    x, target = normal(0, 2, 3, 9, 9), normal(1, 2, 3, 4, 4)
    assert relative(pool(reconstruct(pool, x, target)), target) < 1e-13


@pytest.mark.parametrize("policy", ["paper", "minimal"])
def test_a_deficient_pool_is_told(policy):
    pool = nn.AvgPool1d(3, 1, 1)  # of size 5, the third singular value is 0
    x, target = normal(0, 1, 1, 5), normal(1, 1, 1, 5)
    assert np.linalg.matrix_rank(jacobian(pool, x)) == 4
    with pytest.warns(frfx.ConditionWarning, match="rank-deficient"):
        found = reconstruct(pool, x, target, policy)
    assert relative(found, minimal_affine_preimage(pool, x, target, rcond=1e-10)) < 1e-12


SIZES = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(4)], ids=repr
)
def test_precisions(pool, dtype):
    x = normal(0, 2, 3, 6, 7, dtype=dtype)
    target = normal(1, *pool(x).shape, dtype=dtype)
    # In front of another node the preimage is in what it was solved in.
    inverse = frfx.invert(nn.Sequential(nn.Identity(), pool).eval(), "input")
    found = inverse.reconstruct(x, target)["0"].target
    assert found.dtype == SIZES[dtype]
    assert inverse(x, target).dtype == dtype
    expected = minimal_affine_preimage(pool, x, target.double(), rcond=1e-10)
    # y^ itself is rounded to the dtype
    assert relative(found, expected) < 10 * torch.finfo(dtype).eps


def test_an_inverse_follows_the_dtype_and_the_size_of_what_it_is_called_with():
    pool = nn.AvgPool2d(3, 2, 1)
    inverse = frfx.invert(Apply(pool), "x")
    for size, dtype in [(8, torch.float32), (8, torch.float64), (5, torch.float64)] * 2:
        x = normal(0, 1, 1, size, size, dtype=dtype)
        target = normal(1, *pool(x).shape, dtype=dtype)
        expected = minimal_affine_preimage(pool, x, target, rcond=1e-10)
        assert relative(inverse(x, target), expected) < 50 * torch.finfo(dtype).eps


class Sized(nn.Module):
    """Looks at the sizes, as torch.export can follow and symbolic tracing cannot."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) if min(x.shape) > 0 else x


NETWORKS = {
    "overlapping": lambda: nn.AvgPool2d(3, 2, 1),
    "ceil_mode": lambda: nn.AvgPool2d(3, 2, ceil_mode=True),
    "tiles": lambda: nn.AvgPool2d((2, 3)),
    "onto a size that divides none": lambda: nn.AdaptiveAvgPool2d((3, 5)),
    "onto a larger one": lambda: nn.AdaptiveAvgPool2d((11, 9)),
    "one size kept": lambda: nn.AdaptiveAvgPool2d((None, 3)),
}


@pytest.mark.filterwarnings("ignore::frfx.ConditionWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_in_networks_by_both_tracers(name):
    """Targets of the pooling, carried to its input: by module, by function, by exported graph."""
    torch.manual_seed(0)
    pool = NETWORKS[name]()
    x, y = normal(0, 4, 1, 10, 9), torch.arange(4) % 3
    width = nn.Sequential(nn.Conv2d(1, 2, 3), pool).double()(x)[0].numel()
    layers = [nn.Conv2d(1, 2, 3), nn.Tanh(), pool, nn.Flatten(), nn.Linear(width, 3)]
    model = nn.Sequential(*layers).double().eval().requires_grad_(False)
    plain = frfx.invert(model, "1").reconstruct(x, y)
    feature, wanted = plain["1"].forward, plain["2"].target
    assert relative(plain.feature, minimal_affine_preimage(pool, feature, wanted)) < 1e-10
    exported = frfx.invert(Sized(model).eval(), "model.1", example_input=x)
    assert exported.traced.front_end == "torch.export"
    assert relative(exported(x, y), plain.feature) < 1e-12


def test_compiled():
    model = nn.Sequential(nn.Identity(), nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(3)).eval()
    inverse = frfx.invert(model, "0")
    fast = torch.compile(inverse, backend="aot_eager")
    for size in (9, 10, 9):
        x = normal(0, 2, 3, size, size)
        target = normal(1, 2, 3, 3, 3)
        torch.testing.assert_close(fast(x, target), inverse(x, target))


def test_large_images_that_are_tiled_need_no_matrix():
    pool = nn.AvgPool1d(4)
    inverse = frfx.invert(Apply(pool), "x")
    x = torch.zeros(1, 1, 1 << 20)
    assert torch.equal(inverse(x, torch.ones(1, 1, 1 << 18)), torch.ones_like(x))
    assert inverse.prepare.nbytes == 0
    assert inverse.summary()[1].condition == 1


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


@given(
    sizes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=2),
    seed=seeds,
)
@pytest.mark.filterwarnings("ignore::frfx.ConditionWarning")
def test_adaptive_avg_pool_onto_any_size(sizes, seed):
    size, pooled = zip(*sizes, strict=True)
    pool = ADAPTIVE[len(size)](pooled)
    x, target = normal(seed, 1, 2, *size), normal(seed + 1, 1, 2, *pooled)
    found = reconstruct(pool, x, target)
    assert relative(found, minimal_affine_preimage(pool, x, target, rcond=1e-10)) < 1e-9
    assert torch.equal(reconstruct(pool, x, pool(x)), x)


UNBATCHED = {
    "F.avg_pool1d": (lambda x: F.avg_pool1d(x, 2), (5,)),
    "overlapping": (lambda x: F.avg_pool2d(x, 3, 1, 1), (4, 5)),
    "F.adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x, 3), (7,)),
}


@pytest.mark.filterwarnings("ignore::frfx.ConditionWarning")
@pytest.mark.parametrize(("function", "size"), UNBATCHED.values(), ids=UNBATCHED)
def test_what_torch_takes_for_channels_may_be_the_batch(function, size):
    x = normal(0, 3, *size)
    target = normal(1, *function(x).shape)
    found = reconstruct(function, x, target)
    assert relative(found, minimal_affine_preimage(function, x, target, rcond=1e-10)) < 1e-10


DAMPED = {
    "tiles": nn.AvgPool2d(2),
    "tiles, divisor": nn.AvgPool2d(2, divisor_override=7),
    "global": nn.AdaptiveAvgPool2d(1),
    "unequal": nn.AdaptiveAvgPool2d((3, 2)),
    "mean": lambda x: x.mean((2, 3)),
    "mean, kept": lambda x: x.mean(-1, keepdim=True),
}


@pytest.mark.filterwarnings("ignore::frfx.ConditionWarning")
@pytest.mark.parametrize("function", DAMPED.values(), ids=DAMPED)
def test_damping_and_cutoff(function):
    x = normal(0, 1, 2, 4, 4)
    target = normal(1, *function(x).shape)
    dense, residual = jacobian(function, x), (target - function(x)).numpy().ravel()
    found = reconstruct(function, x, target, frfx.policy.minimal(damping=0.3))
    step = damped_least_squares(dense, residual, 0.3).reshape(x.shape)
    assert relative(found, x.numpy() + step) < 1e-12
    found = reconstruct(function, x, target, frfx.policy.minimal(rcond=0.5))
    expected = minimal_affine_preimage(function, x, target, rcond=0.5)
    assert relative(found, expected) < 1e-12


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
