"""Max pooling of any geometry, window by window: integer programs, brute force and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import frfx
from frfx.rules import max_pool
from tests.oracles import (
    Apply,
    bounds_of,
    integers,
    invert,
    least_pooling_residual,
    nearest_max_unpool,
    normal,
    pooled,
    reconstruct,
    window_distance,
    windows_of,
)

seeds = st.integers(0, 2**31)
MAX_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
ADAPTIVE = {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d}
LARGEST = {1: 12, 2: 6, 3: 4}
VALUES = pytest.mark.parametrize("values", [normal, integers], ids=["distinct", "ties"])


def readable(pool, size):
    """Return whether every window reads an entry: dilated ones may read padding alone."""
    return bool(pool(torch.zeros(1, 1, *size, dtype=torch.float64)).isfinite().all())


@st.composite
def pools(draw, largest=LARGEST):
    """Draw max pooling and an image size that it fits, in 1 to 3 dimensions."""
    dims = draw(st.integers(1, 3))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    kernel, dilation = each(1, 4 if dims < 3 else 2), each(1, 2)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = tuple(
        draw(st.integers(max(e - 2 * p, 1), max(e, largest[dims])))
        for e, p in zip(extent, padding, strict=True)
    )
    stride = draw(st.one_of(st.none(), st.just(each(1, 3))))
    pool = MAX_POOL[dims](kernel, stride, padding, dilation, ceil_mode=draw(st.booleans()))
    assume(readable(pool, size))
    return pool, size


@st.composite
def adaptive(draw):
    """Draw adaptive max pooling and an image size, in 1 to 3 dimensions."""
    dims = draw(st.integers(1, 3))
    size = tuple(draw(st.integers(1, LARGEST[dims])) for _ in range(dims))
    count = tuple(draw(st.integers(1, LARGEST[dims] + 1)) for _ in range(dims))
    return ADAPTIVE[dims](count), size


@st.composite
def tiles(draw):
    """Draw max pooling whose windows have no entry in common, and an image size."""
    dims = draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 4 if dims < 3 else 3)) for _ in range(dims))
    stride = tuple(k + draw(st.integers(0, 1)) for k in kernel)
    padding = tuple(draw(st.sampled_from((0, 0, k // 2))) for k in kernel)
    size = tuple(k * draw(st.integers(1, 2)) + draw(st.integers(0, k - 1)) for k in kernel)
    pool = MAX_POOL[dims](kernel, stride, padding, ceil_mode=draw(st.booleans()))
    return pool, size


drawn = st.one_of(pools(), adaptive(), tiles())


def images(*tensors):
    """Yield the flat images of each sample and channel, as arrays in float64."""
    flat = [tensor.detach().double().flatten(2).flatten(0, 1).numpy() for tensor in tensors]
    yield from zip(*flat, strict=True)


# --- targets that some image has ---


@VALUES
@given(drawn=drawn, seed=seeds)
def test_reachable_targets_are_met_at_the_least_cost(values, drawn, seed):
    """Exactly, where windows of one target have no entry in common; else within the bound."""
    pool, size = drawn
    windows = windows_of(pool, size)
    x, target = values(seed, 2, 2, *size), pool(values(seed + 1, 2, 2, *size))
    found = reconstruct(pool, x, target)
    assert torch.equal(pool(found), target)
    for image, wanted, got in images(x, target, found):
        least, cost = nearest_max_unpool(windows, image, wanted), ((got - image) ** 2).sum()
        together = windows.astype(int) @ windows.T > 0
        tied = (wanted[:, None] == wanted) & together
        factor = windows.sum(0).max() if tied.sum() > len(wanted) else 1
        assert least - 1e-9 <= cost <= factor * least + 1e-9
        assert (got[~windows.any(0)] == image[~windows.any(0)]).all()


@given(drawn=pools(), seed=seeds, shift=st.floats(-2, 2))
def test_all_targets_shifted_alike_are_met_at_the_least_cost(drawn, seed, shift):
    """Windows that share their maximum share the entry that is raised."""
    pool, size = drawn
    windows = windows_of(pool, size)
    x = normal(seed, 2, 1, *size)
    target = pool(x) + shift
    found = reconstruct(pool, x, target)
    assert torch.equal(pool(found), target)
    for image, wanted, got in images(x, target, found):
        least = nearest_max_unpool(windows, image, wanted)
        assert ((got - image) ** 2).sum() == pytest.approx(least, rel=1e-9, abs=1e-12)


STEMS = {
    "ResNet": (nn.MaxPool2d(3, 2, 1), (8, 7)),
    "AlexNet": (nn.MaxPool2d(3, 2), (9, 7)),
    "SqueezeNet": (nn.MaxPool2d(3, 2, ceil_mode=True), (8, 7)),
    "3 of 5": (nn.MaxPool1d(5, 3, 2), (14,)),
    "3d": (nn.MaxPool3d(3, 2, 1), (4, 4, 3)),
    "onto fewer": (nn.AdaptiveMaxPool2d((2, 3)), (5, 7)),
}


@pytest.mark.parametrize(("pool", "size"), STEMS.values(), ids=STEMS)
@given(seed=seeds)
def test_every_target_is_met_where_windows_read_entries_alone(pool, size, seed):
    windows = windows_of(pool, size)
    x = normal(seed, 2, 1, *size)
    target = 2 * normal(seed + 1, *pool(x).shape)
    found = reconstruct(pool, x, target)
    assert torch.equal(pool(found), target)
    for image, wanted, got in images(x, target, found):
        least = nearest_max_unpool(windows, image, wanted)
        assert ((got - image) ** 2).sum() == pytest.approx(least, rel=1e-9)


@VALUES
@given(drawn=tiles(), seed=seeds)
def test_disjoint_windows_are_inverted_one_by_one(values, drawn, seed):
    pool, size = drawn
    windows = windows_of(pool, size)
    x = values(seed, 2, 2, *size)
    target = 1.5 * values(seed + 1, *pool(x).shape)
    found = reconstruct(pool, x, target)
    assert torch.equal(pool(found), target)
    for image, wanted, got in images(x, target, found):
        for window, value in zip(windows, wanted, strict=True):
            moved = np.linalg.norm(got[window] - image[window])
            assert moved == pytest.approx(window_distance(image[window], value), abs=1e-12)
            assert (got[window] > image[window]).sum() <= 1
            first = np.argmax(image[window])  # of equal maxima, the first takes the target
            assert got[window][first] == value


@VALUES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@given(drawn=drawn, seed=seeds)
def test_fixed_point(dtype, values, drawn, seed):
    pool, size = drawn
    x = values(seed, 2, 2, *size).to(dtype)
    x = torch.where(x < 0, 0.0, x)  # as after a ReLU: whole windows of one value
    found = reconstruct(pool, x, pool(x))
    assert found.dtype == dtype
    assert torch.equal(found, x)


# --- targets that no image has ---


def stand_in(windows, image, target):
    """Return the pooled values that the rule aims at, and those of the largest image below.

    Plain loops over what `MaxPoolMinimalRule` says.
    """
    bound = bounds_of(windows, target)
    below = pooled(windows, bound)
    demands: dict[int, list[int]] = {}
    for j, window in enumerate(windows):
        if target[j] > below[j]:
            held = [i for i in np.flatnonzero(window) if bound[i] == below[j]]
            demands.setdefault(max(held, key=lambda i: image[i]), []).append(j)
    values = bound.copy()
    for i, mine in demands.items():
        mean = target[mine].mean()
        others = [k for k in np.flatnonzero(windows[:, i]) if k not in mine]
        shares = [max(mean - target[k], 0) / (mean - bound[i]) for k in others]
        values[i] += (target[mine] - bound[i]).sum() / (len(mine) + np.square(shares).sum())
    return pooled(windows, values), below


@VALUES
@given(drawn=st.one_of(pools(), adaptive()), seed=seeds)
def test_unreachable_targets_share_the_error(values, drawn, seed):
    pool, size = drawn
    windows = windows_of(pool, size)
    x = values(seed, 2, 2, *size)
    target = pool(x) + values(seed + 1, *pool(x).shape)
    found = reconstruct(pool, x, target)
    for image, wanted, got in images(x, target, found):
        expected, below = stand_in(windows, image, wanted)
        reached = pooled(windows, got)
        np.testing.assert_allclose(reached, expected, rtol=1e-12, atol=1e-12)
        error, plain = (((y - wanted) ** 2).sum() for y in (reached, below))
        if (below == wanted).all():
            assert error == 0
        else:
            assert error < plain
        # And the image is one of those that come nearest, for the values that it reaches.
        least, cost = nearest_max_unpool(windows, image, reached), ((got - image) ** 2).sum()
        assert least - 1e-9 <= cost <= windows.sum(0).max() * least + 1e-9


CONFLICTS = {
    "pairs": (nn.MaxPool1d(2, 1), (7,)),
    "triples": (nn.MaxPool1d(3, 1, 1), (6,)),
    "4 by 2": (nn.MaxPool1d(4, 2), (10,)),
    "dilated": (nn.MaxPool1d(2, 1, dilation=2), (7,)),
    "squares": (nn.MaxPool2d(2, 1), (3, 4)),
    "onto more": (nn.AdaptiveMaxPool1d(5), (3,)),
}


@pytest.mark.parametrize(("pool", "size"), CONFLICTS.values(), ids=CONFLICTS)
@given(seed=seeds, scale=st.sampled_from((0.05, 1.0, 20.0)))
def test_error_is_near_the_least(pool, size, seed, scale):
    windows = windows_of(pool, size)
    x = normal(seed, 1, 1, *size)
    target = pool(x) + scale * normal(seed + 1, *pool(x).shape)
    found = reconstruct(pool, x, target)
    ((wanted, got),) = images(target, found)
    least = least_pooling_residual(windows, wanted)
    error = ((pooled(windows, got) - wanted) ** 2).sum()
    assert least * (1 - 1e-9) <= error <= 2 * least + 1e-18


def test_a_lone_peak_gives_way_to_its_surroundings():
    """Nine windows read the entry, one of them wants 9 more: a ninth of it is the least squares."""
    pool, x = nn.MaxPool2d(3, 1, 1), torch.zeros(1, 1, 7, 7, dtype=torch.float64)
    target = torch.zeros_like(x)
    target[..., 3, 3] = 9
    found = pool(reconstruct(pool, x, target))
    assert found.sum() == 9
    assert found.max() == 1


def test_windows_that_share_a_maximum_take_the_mean_of_their_targets():
    """For small differences that is the least squares: no other entry comes into question."""
    pool, x = nn.MaxPool2d(3, 1, 1), torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    x[..., 2, 2] = 1
    noise = 1e-3 * normal(0, 1, 1, 3, 3)
    noise[..., 0, 0] = noise.amin() - 1e-3  # all others want more than the least
    noise[noise > noise.amin()] = noise[noise > noise.amin()].mean()
    target = pool(x)
    target[..., 1:4, 1:4] += noise
    found = reconstruct(pool, x, target)
    torch.testing.assert_close(found[..., 2, 2], 1 + noise.mean((2, 3)), rtol=1e-12, atol=0)


# --- the paper's rule ---


@VALUES
@given(drawn=drawn, seed=seeds)
def test_the_papers_rule_copies_the_least(values, drawn, seed):
    pool, size = drawn
    windows = windows_of(pool, size)
    x = values(seed, 2, 2, *size)
    target = pool(values(seed + 1, 2, 2, *size))
    found = reconstruct(pool, x, target, "paper")
    assert torch.equal(pool(found), target)
    other = values(seed + 2, *target.shape)
    for wanted, result in ((target, found), (other, reconstruct(pool, x, other, "paper"))):
        for image, values_, got in images(x, wanted, result):
            bound = bounds_of(windows, values_)
            assert (got == np.where(windows.any(0), bound, image)).all()


# --- precision, compilation, gradients ---

GEOMETRIES = {
    "tiles": (nn.MaxPool2d(2), (5, 4)),
    "large tiles": (nn.MaxPool2d(4), (5, 9)),
    "padded tiles": (nn.MaxPool2d(2, padding=1), (5, 4)),
    "overlapping": (nn.MaxPool2d(3, 2, 1), (6, 5)),
    "conflicts": (nn.MaxPool2d(3, 1, 1), (4, 5)),
    "dilated": (nn.MaxPool1d(2, 1, dilation=2), (6,)),
    "adaptive": (nn.AdaptiveMaxPool2d((2, 3)), (5, 4)),
}
GEOMETRY = pytest.mark.parametrize(("pool", "size"), GEOMETRIES.values(), ids=GEOMETRIES)


def inversion(pool, policy="minimal"):
    """Return the module that inverts max pooling."""
    (child,) = (m for n, m in invert(pool, policy).inverse.named_children() if n != "argmax")
    return child


@GEOMETRY
@pytest.mark.parametrize("chunk", [1, 50])
def test_large_images_are_inverted_in_pieces(pool, size, chunk, monkeypatch):
    x = normal(0, 3, 4, *size)
    target = normal(1, *pool(x).shape)
    expected = inversion(pool)(target, pool(x), x)
    monkeypatch.setattr(max_pool, "_CHUNK", chunk)
    assert torch.equal(inversion(pool)(target, pool(x), x), expected)
    assert torch.equal(inversion(pool)(pool(x), pool(x), x), x)


@GEOMETRY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_inverted_in_single(pool, size, dtype):
    x = normal(0, 3, 2, *size).to(dtype)
    y = pool(x)
    target = (y + normal(1, *y.shape)).float()
    found = inversion(pool)(target, y, x)
    assert found.dtype == torch.float32
    expected = inversion(pool)(target.double(), pool(x.double()), x.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@GEOMETRY
@pytest.mark.parametrize("policy", ["paper", "minimal"])
@pytest.mark.parametrize("scale", [1e-38, 1e36])
def test_extreme_values_stay_finite(pool, size, policy, scale):
    x = (scale * normal(0, 3, 2, *size)).float()
    target = (scale * normal(1, *pool(x).shape)).float()
    found = inversion(pool, policy)(target, pool(x), x)
    assert found.isfinite().all()
    if scale > 1:
        expected = inversion(pool, policy)(*(v.double() for v in (target, pool(x), x)))
        torch.testing.assert_close(found / scale, (expected / scale).float(), rtol=1e-5, atol=1e-5)


@GEOMETRY
@pytest.mark.parametrize("policy", ["paper", "minimal"])
def test_nothing_depends_on_the_values_but_through_tensors(pool, size, policy):
    """Tensors without values would raise where the host reads one."""
    module = inversion(pool, policy)
    with FakeTensorMode():
        x = torch.empty(2, 3, *size)
        assert module(torch.empty_like(pool(x)), pool(x), x).shape == x.shape


@GEOMETRY
@pytest.mark.parametrize("policy", ["paper", "minimal"])
def test_compiles_into_one_graph(pool, size, policy):
    torch.compiler.reset()
    module = inversion(pool, policy)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    x = normal(0, 2, 3, *size)
    target = normal(1, *pool(x).shape)
    assert torch.equal(compiled(target, pool(x), x), module(target, pool(x), x))


@GEOMETRY
@pytest.mark.parametrize("policy", ["paper", "minimal"])
def test_gradients(pool, size, policy):
    """Against finite differences: values far enough apart keep their order."""
    module = inversion(pool, policy)
    count = math.prod(size)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    x = order.double().view(1, 1, *size).requires_grad_()
    y = pool(x).detach()
    target = (y + 0.3 * normal(1, *y.shape)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda t, x: module(t, pool(x), x), (target, x), eps=1e-5, check_forward_ad=True
    )


# --- spellings ---

MAX_SPELLINGS = {
    "nn.MaxPool2d": nn.MaxPool2d((3, 2), (2, 1), 1),
    "F.max_pool2d": lambda x: F.max_pool2d(x, (3, 2), (2, 1), 1),
    "keywords": lambda x: F.max_pool2d(x, kernel_size=(3, 2), stride=[2, 1], padding=(1, 1)),
    "torch.max_pool2d": lambda x: torch.max_pool2d(x, (3, 2), (2, 1), 1),
    "aten": lambda x: torch.ops.aten.max_pool2d.default(x, [3, 2], [2, 1], [1, 1]),
    "aten, one number": lambda x: torch.ops.aten.max_pool2d.default(x, [3, 2], [2, 1], [1]),
}


@pytest.mark.parametrize("policy", ["paper", "minimal"])
@pytest.mark.parametrize("spelling", MAX_SPELLINGS.values(), ids=MAX_SPELLINGS)
def test_spellings(spelling, policy):
    pool = nn.MaxPool2d((3, 2), (2, 1), 1)
    x, target = normal(0, 2, 3, 4, 6), normal(1, 2, 3, 2, 7)
    expected = reconstruct(pool, x, target, policy)
    assert torch.equal(reconstruct(spelling, x, target, policy), expected)


ARGUMENTS = {
    "stride": (nn.MaxPool2d((2, 3)), lambda x: F.max_pool2d(x, (2, 3))),
    "aten stride": (nn.MaxPool2d(2), lambda x: torch.ops.aten.max_pool2d.default(x, [2, 2], [])),
    "dilation": (nn.MaxPool2d(2, 1, 0, 2), lambda x: F.max_pool2d(x, 2, 1, dilation=2)),
    "ceil_mode": (
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    ),
    "1d": (nn.MaxPool1d(3, 2), lambda x: F.max_pool1d(x.flatten(2), 3, 2)),
    "3d": (nn.MaxPool3d(2), lambda x: F.max_pool3d(x.unsqueeze(2).repeat(1, 1, 2, 1, 1), 2)),
    "adaptive": (nn.AdaptiveMaxPool2d((2, 4)), lambda x: F.adaptive_max_pool2d(x, (2, 4))),
    "one size kept": (
        nn.AdaptiveMaxPool2d((None, 4)),
        lambda x: F.adaptive_max_pool2d(x, (None, 4)),
    ),
}


class Untraceable(Apply):
    """A network that symbolic tracing cannot follow."""

    def forward(self, x):
        return super().forward(x) if x.shape[1] > 0 else x


@pytest.mark.parametrize("policy", ["paper", "minimal"])
@pytest.mark.parametrize("case", ["module", "function", "indices"])
@pytest.mark.parametrize("name", ["stride", "dilation", "ceil_mode", "adaptive", "one size kept"])
def test_exported(name, case, policy):
    """What torch.export leaves of a call, also of one whose indices nobody reads."""
    pool, function = ARGUMENTS[name]
    x = normal(0, 2, 3, 5, 6)
    target = normal(1, *pool(x).shape)
    expected = reconstruct(pool, x, target, policy)
    if case == "indices" and name == "stride":
        function = lambda x: F.max_pool2d(x, (2, 3), return_indices=True)[0]  # noqa: E731
    elif case == "indices" and name == "adaptive":
        function = lambda x: F.adaptive_max_pool2d(x, (2, 4), return_indices=True)[0]  # noqa: E731
    elif case == "module":
        function = pool
    model = Untraceable(function).eval()
    inverse = frfx.invert(model, "x", policy=policy, example_input=x)
    assert "torch.export" in str(inverse.summary())
    assert torch.equal(inverse(x, target), expected)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_exported_in_every_dimension(dims):
    x = normal(0, 2, 2, *(5, 4, 4)[:dims])
    for pool in (MAX_POOL[dims](3, 2, 1), ADAPTIVE[dims](3)):
        target = normal(1, *pool(x).shape)
        inverse = frfx.invert(Untraceable(pool).eval(), "x", policy="minimal", example_input=x)
        assert torch.equal(inverse(x, target), reconstruct(pool, x, target))


@pytest.mark.parametrize("layer", ["input", "0", "1"])
@pytest.mark.parametrize("policy", ["paper", "minimal"])
def test_in_a_network(layer, policy):
    """The walk back meets the target of every max pooling whose windows leave it a way."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.Tanh(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 8, 2),
        nn.AdaptiveMaxPool2d((2, 1)),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    model = model.double().eval()
    x, y = normal(0, 6, 2, 10, 10), torch.arange(6) % 4
    found = frfx.invert(model, layer, policy=policy).reconstruct(x, y)
    assert found.feature.shape == found[layer].forward.shape
    for name in ("2", "4"):
        before = str(int(name) - 1)
        reached = model[int(name)](found[before].target)
        if policy == "minimal":
            assert torch.equal(reached, found[name].target)
        assert (reached <= found[name].target).all()
