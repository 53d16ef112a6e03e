"""The CUDA kernels, run on the CPU, against independent oracles and against the rules."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import frfx
from frfx import networks
from frfx.compiler.swap import SwappedInversion
from frfx.linalg import Convolution, Solver, fourier, kernel_map
from frfx.linalg.backend import TorchBackend, torch_backend
from frfx.linalg.conjugate_gradients import conjugate_gradients
from frfx.linalg.copies import Copies
from frfx.linalg.fourier import Grid
from frfx.rules import activation
from frfx.rules.label import NearestEmbedding
from tests.kernels.emulator import FUNCTORS, EmulatedLauncher, library
from tests.linalg.test_fourier import dense_product, image_for, make
from tests.oracles import embedding_by_quadprog, integers, normal, relative
from tests.rules.test_max_pool import pools

from frfx.kernels import CupyLauncher, Device, Kernels, Sizes, arrangement  # isort: skip
from frfx.kernels import kernels as kernels_module  # isort: skip

pytestmark = pytest.mark.skipif(library() is None, reason="needs g++ to run CUDA kernels on a CPU")
few = settings(max_examples=12, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**31)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture
def launcher():
    return EmulatedLauncher()


@pytest.fixture
def kernels(launcher):
    return Kernels(launcher)


@pytest.fixture
def backend(kernels):
    return TorchBackend(kernels)


@DTYPES
@few
@given(
    seed=seeds, classes=st.integers(1, 70), margin=st.sampled_from([0.0, 0.3]), ties=st.booleans()
)
def test_nearest_embedding(dtype, seed, classes, margin, ties):
    logits = (integers if ties else normal)(seed, 5, classes).to(dtype)
    labels = (torch.arange(5) % classes).to(torch.uint8)
    found = Kernels(EmulatedLauncher()).nearest_embedding(logits, labels, margin)
    for row, label, z in zip(found, labels, logits, strict=True):
        expected = embedding_by_quadprog(z.double().numpy(), int(label), margin)
        assert np.abs(row.numpy() - expected).max() < (1e-5 if dtype == torch.float32 else 1e-9)


def test_near_ties_end(kernels):
    """Rounding takes such a competitor out of the active ones and would bring it back, for ever."""
    z = torch.tensor([[0, 1.6369617, 0.8184809], [0, 2, 1 + 2**-23], [0, 2, 1 - 2**-24]])
    found = kernels.nearest_embedding(z, torch.zeros(3, dtype=torch.long), 0.0)
    expected = frfx.nearest_embedding(z.double(), torch.zeros(3, dtype=torch.long))
    assert (found - expected).abs().max() < 1e-6


def test_logits_that_are_not_finite_are_seen(kernels):
    z = torch.zeros(5, 40)
    z[0, 3], z[1, 0], z[2, 5], z[3, 7:9] = math.inf, -math.inf, math.nan, 3e38
    labels = torch.tensor([0, 0, 0, 0, 40])  # the last is no class
    found = kernels.nearest_embedding(z, labels, 0.0)
    assert [bool(row.isfinite().all()) for row in found] == [False] * 5


def test_a_negative_margin_is_refused_as_without_them(backend):
    embedding = NearestEmbedding(-1, -1.0)
    embedding.backend = backend
    logits, labels = torch.randn(2, 4), torch.tensor([0, 1])
    with pytest.raises(frfx.TargetError, match="must not be negative"):
        embedding(labels, labels, logits)


@st.composite
def planes(draw):
    """Draw a grid of one or two dimensions with its corners, matrices and a few taps."""
    dims = draw(st.integers(1, 2))
    size = tuple(draw(st.integers(1, 9)) for _ in range(dims))
    grid = Grid(size, *(tuple(draw(st.integers(1, n)) for n in size) for _ in range(2)))
    groups, rows, columns = (draw(st.integers(1, 6)) for _ in range(3))
    taps = draw(st.lists(st.tuples(*[st.integers(-2, 9)] * dims), min_size=1, max_size=4))
    return grid, taps, normal(draw(seeds), len(taps), groups, rows, columns)


WAYS = {
    "one kernel": ({"_IN_ONE": range(1 << 30)}, {"circular_map"}),
    "transforms": ({"_IN_ONE": range(0)}, {"spectra", "images_of"}),
    "around torch's transforms": ({"_IN_ONE": range(0), "_PLANE_UP_TO": 0}, {"transpose"}),
}
"""Ways to apply a map, what has to be patched for them to be taken, and what they launch."""


@DTYPES
@pytest.mark.parametrize("memory", [math.inf, 0], ids=["kept", "streamed"])
@pytest.mark.parametrize("way", WAYS)
@few
@given(problem=planes(), tile=st.sampled_from([1, 2, 4]), seed=seeds)
def test_maps(way, memory, dtype, problem, tile, seed):
    patches, launches = WAYS[way]
    grouped = problem[2].shape[1] > 1
    pointwise = problem[2].shape[2] == problem[2].shape[3] == 1
    launcher = EmulatedLauncher()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in patches.items():  # whatever is the fastest
            patch.setattr(kernel_map, name, value)
        patch.setattr(arrangement, "_TILES", {min(tile, 16 // dtype.itemsize): 1.0})
        arrangement.arrange.cache_clear()
        arrangement.arrange_map.cache_clear()
        patch.setattr(fourier, "_TEMPORARY", 1)  # a sample at a time, on GPUs
        options = {"form": "fft", "dtype": dtype, "memory": memory}
        made = make(problem, backend=TorchBackend(Kernels(launcher)), **options)
        source, minus = (image_for(problem, seed + i, 2, dtype) for i in range(2))
        expected = dense_product(problem, (source.double() - minus.double()).numpy())
        plus = normal(seed + 2, *expected.shape).to(dtype)
        found = made(source, minus, plus)
        alone = made(source)
    expected = expected + plus.double().numpy()
    bound = (2e-5 if dtype == torch.float32 else 1e-12) * (1 + np.abs(expected).max())
    assert np.abs(found.numpy() - expected).max() < bound
    expected = dense_product(problem, source.double().numpy())
    assert np.abs(alone.numpy() - expected).max() < bound
    in_torch = grouped and (way.startswith("around") or not pointwise)
    if (way == "one kernel" and memory) or (way != "one kernel" and not in_torch):
        assert {name.partition("<")[0] for name in launcher.launched} >= launches


@DTYPES
@pytest.mark.parametrize("way", WAYS)
@few
@given(problem=planes(), seed=seeds)
def test_maps_of_copies(way, dtype, problem, seed):
    """They are those of the image that is written out, whatever the tiles."""
    patches, _ = WAYS[way]
    launcher = EmulatedLauncher()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in patches.items():
            patch.setattr(kernel_map, name, value)
        patch.setattr(fourier, "_TEMPORARY", 1)
        made = make(problem, backend=TorchBackend(Kernels(launcher)), form="fft", dtype=dtype)
        minus = image_for(problem, seed, 2, dtype)
        sides = [[d for d in range(1, n + 1) if n % d == 0] for n in minus.shape[3:]]
        tile = tuple(divisors[seed % len(divisors)] for divisors in sides)
        copies = Copies(minus[(..., *(slice(None, None, n) for n in tile))].flip(0), tile)
        found, expected = made(copies, minus), made(copies.written_out(), minus)
    assert copies.written_out().shape == minus.shape
    rounding = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


def test_copies_are_written_out_as_nearest_interpolation_does():
    values = normal(0, 2, 3, 4, 5)
    found = Copies(values, (2, 3)).written_out()
    assert torch.equal(found, F.interpolate(values, scale_factor=(2, 3)))


H200 = Device(132, 227 << 10, 228 << 10)
BYTES = pytest.mark.parametrize("real_bytes", [4, 8])


@BYTES
@given(sizes=st.tuples(*[st.integers(1, 40)] * 6).map(lambda n: Sizes(*n)), images=st.integers(1))
def test_what_a_block_gets(real_bytes, sizes, images):
    """The buffers hold every step's values, and what all resident blocks need is there."""
    for back in (False, True):
        way = arrangement.arrange(sizes, images, real_bytes, H200, back=back)
        if way is None:
            assert back or sizes.height * sizes.width > 500
            continue
        assert way.even % 2 == way.odd % 2 == 0
        assert 2 * real_bytes * (way.even + way.odd) <= H200.a_block
        assert way.threads % 32 == way.threads % way.images == 0
        assert way.tile < 4 or real_bytes == 4
        lines, spectra = way.images * sizes.source_h, way.images * sizes.height * sizes.pitch
        if back:
            assert way.even >= spectra
            assert way.odd >= way.images * sizes.result_h * sizes.pitch
        else:
            assert way.even >= lines * sizes.pitch
            assert way.odd >= max(math.ceil(lines * sizes.source_w / 2), spectra)


@BYTES
def test_what_a_block_gets_of_a_whole_map(real_bytes):
    """An image that is wide there and tall back."""
    sizes, half = Sizes(6, 9, 2, 9, 6, 1), 9 // 2 + 1
    way = arrangement.arrange_map(sizes, 5, 2, 100, real_bytes, H200)
    assert way.even >= max(2 * 2 * half, 5 * 6 * half)
    assert way.odd >= max(math.ceil(2 * 2 * 9 / 2), 2 * 6 * half, 5 * 6 * half)
    bytes_a_block = 2 * real_bytes * (way.even + way.odd)
    tight = H200._replace(a_block=bytes_a_block - 1)
    assert arrangement.arrange_map(sizes, 5, 2, 100, real_bytes, tight) is None


def test_a_block_that_fills_a_multiprocessor_is_not_free():
    tight = Device(40, 64 << 10, 64 << 10)  # as little as a block may have
    way = arrangement.arrange(Sizes(31, 29, 1, 20, 11, 15), 4096, 4, tight, back=False)
    assert 8 * (way.even + way.odd) <= 32 << 10  # two, at least, take turns


def test_the_wider_the_image_the_wider_the_tile():
    """Small images would leave threads without anything to do, or tiles half empty."""
    tiles = [
        arrangement.arrange(Sizes(n, n, n - 2, n - 2, n, n), 4096, 4, H200, back=False).tile
        for n in (6, 18, 34)
    ]
    assert tiles == sorted(tiles)
    assert tiles[0] < tiles[-1]


@DTYPES
@few
@given(seed=seeds, shape=st.tuples(st.integers(1, 70), st.integers(1, 70)))
def test_transpose(dtype, seed, shape):
    matrix = torch.complex(normal(seed, *shape), normal(seed + 1, *shape)).to(dtype.to_complex())
    found = Kernels(EmulatedLauncher()).transpose(matrix)
    assert found.is_contiguous()
    assert torch.equal(found, matrix.T)


@DTYPES
def test_residual_on_grid(dtype):
    target, output = normal(0, 2, 1, 3, 4, 5).to(dtype), normal(1, 2, 1, 3, 4, 5).to(dtype)
    found = Kernels(EmulatedLauncher()).residual_on_grid(target, output, (7, 6))
    expected = torch.zeros(2, 1, 3, 7, 6, dtype=dtype)
    expected[..., :4, :5] = target - output
    assert torch.equal(found, expected)


@st.composite
def systems(draw):
    """Draw a symmetric positive definite matrix and a batch, perhaps with a sample of zero."""
    size, samples = draw(st.sampled_from([1, 5, 31, 300])), draw(st.integers(1, 3))
    factor = normal(draw(seeds), size, size)
    right = normal(draw(seeds), samples, size)
    right[draw(st.integers(0, samples - 1))] *= draw(st.sampled_from([0, 1]))
    return factor @ factor.mT / size + 0.3 * torch.eye(size), right


@DTYPES
@few
@given(system=systems(), share=st.sampled_from([60, 400]), most=st.sampled_from([2, 32]))
def test_conjugate_gradients(dtype, system, share, most):
    """They solve to the tolerance, and every step is that of torch."""
    matrix, right = (t.to(dtype) for t in system)
    launcher = EmulatedLauncher()

    def operator(p):
        return p @ matrix

    def solve(**options):
        return conjugate_gradients(operator, right, lambda r: 2 * r, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels_module, "_A_SHARE", share)  # some blocks a sample, or one
        patch.setattr(kernels_module, "_MOST_SHARES", most)
        patch.setattr(kernels_module, "_THREADS", 32)
        for steps, tolerance in ((2, 1e-4), (12, 1e-2)):
            options = {"tolerance": tolerance, "max_steps": steps}
            found, went = solve(**options, kernels=Kernels(launcher))
            expected, there = solve(**options)
            assert relative(found, expected) < (1e-3 if dtype == torch.float32 else 1e-9)
            assert (went.steps - there.steps).abs().max() <= 1  # rounding may tip a last step
            torch.testing.assert_close(went.residual, there.residual, rtol=1e-2, atol=1e-5)
    assert torch.equal(went.converged, there.converged)
    left = (operator(found) - right).norm(dim=1)
    assert (left[went.converged] <= 1.1e-2 * right.norm(dim=1)[went.converged]).all()
    assert {n.partition("<")[0] for n in launcher.launched} <= {"dots", "turn", "advance", "keep"}
    assert bool(launcher.launched) == bool(right.any())


def test_what_breaks_down_stays_where_it_stood(kernels):
    """No curvature along one direction, and a residual that is not finite: others do not notice."""
    diagonal = torch.tensor([[1.0, 2], [0, 0], [1, 2], [1, math.nan]])
    right = torch.tensor([[1.0, 1], [1, 1], [math.inf, 1], [1, 1]])
    found, convergence = conjugate_gradients(
        lambda p: diagonal * p, right, lambda r: r, tolerance=1e-5, max_steps=5, kernels=kernels
    )
    assert relative(found[0], torch.tensor([1, 0.5])) < 1e-5
    assert not found[[1, 3]].any()
    assert convergence.converged.tolist()[:2] == [True, False]
    assert convergence.steps.tolist()[:2] == [2, 0]


@pytest.mark.parametrize("kind", [torch.tensor, np.float32], ids=["tensor", "numpy"])
def test_a_tolerance_of_any_type(kind, kernels):
    diagonal, right = torch.arange(1.0, 7), normal(0, 2, 6).float()
    options = {"tolerance": kind(0.1), "max_steps": 6}
    steps = [
        conjugate_gradients(lambda p: diagonal * p, right, lambda r: r, kernels=k, **options)[1]
        for k in (kernels, None)
    ]
    assert torch.equal(steps[0].steps, steps[1].steps)
    assert steps[0].steps.max() < 6


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_kernels_iterate_where_autograd_records(backend, launcher):
    """It records the solution as a map of the residual; the operator is a constant."""
    kernel, residual = 0.1 * normal(0, 3, 3, 3, 3), normal(1, 2, 3, 6, 6).requires_grad_()
    kernel[..., 1, 1] += 2 * torch.eye(3)
    operator = Convolution(kernel.requires_grad_(), (6, 6), padding=((1, 1), (1, 1)))
    gradients = []
    for solver, by in (("dense", torch_backend), ("iterative", backend)):
        factor = Solver(solver, tolerance=1e-9).prepare(operator, by)
        gradients += torch.autograd.grad(factor.solve(residual).square().sum(), residual)
    assert relative(gradients[1], gradients[0]) < 1e-5
    assert {n.partition("<")[0] for n in launcher.launched} >= {"turn", "advance", "keep"}
    found = Solver("iterative").prepare(operator, backend).solve(residual.detach())
    assert not found.requires_grad


def test_a_refined_layer(backend, launcher):
    kernel = 0.1 * normal(0, 4, 4, 3, 3)
    kernel[..., 1, 1] += 2 * torch.eye(4)
    operator = Convolution(kernel.float(), (12, 12), padding=((1, 1), (1, 1)))
    residual = normal(1, 2, *operator.out_shape).float()
    solver = Solver("iterative", tolerance=1e-4)
    expected = solver.prepare(operator).solve(residual)
    assert relative(solver.prepare(operator, backend).solve(residual), expected) < 1e-3
    assert {n.partition("<")[0] for n in launcher.launched} >= {"dots", "turn", "advance", "keep"}


ACTIVATIONS = {
    "Tanh": nn.Tanh(),
    "Sigmoid": nn.Sigmoid(),
    "Identity": nn.ReLU6(),
    "Dip<Silu>": nn.SiLU(),
    "Dip<Gelu>": nn.GELU(),
    "Dip<GeluTanh>": nn.GELU(approximate="tanh"),
    "Dip<Mish>": nn.Mish(),
}


def inversion_of(module, policy, backend):
    """Return the inversion of a module alone, run by a backend."""
    inverse = frfx.invert(nn.Sequential(nn.Identity(), module), "0", policy=policy).inverse
    inversion = inverse.get_submodule("_1")
    inversion.backend = backend
    return inversion


def test_every_functor_is_tested():
    assert set(FUNCTORS) == set(ACTIVATIONS)


@DTYPES
@pytest.mark.parametrize("functor", ACTIVATIONS)
def test_preimage(functor, dtype, backend, launcher):
    function = ACTIVATIONS[functor].to(dtype)
    x = 2 * normal(0, 40, 25).to(dtype)
    output = function(x)
    target = torch.where(
        torch.arange(25) % 5 == 0, output, function(2 * normal(1, 40, 25).to(dtype))
    )
    target[0, :4] = torch.tensor([-3, 3, -0.2, 0])
    found = inversion_of(function, "minimal", backend)(target, output, x)
    expected = inversion_of(function, "minimal", torch_backend)(target, output, x)
    assert launcher.launched == [
        f"preimage<{'float' if dtype == torch.float32 else 'double'}, {functor}>"
    ]
    assert torch.equal(found[:, ::5][1:], x[:, ::5][1:])  # what has its target stays
    rounding = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(function(found), function(expected), rtol=rounding, atol=rounding)
    # At the bottom of a dip the preimage is known to the root of the precision only.
    torch.testing.assert_close(found, expected, rtol=rounding**0.5, atol=rounding**0.5)


@pytest.mark.parametrize("functor", ACTIVATIONS)
def test_targets_that_are_not_finite_are_seen(functor, backend):
    function, x = ACTIVATIONS[functor].double(), normal(0, 6)
    target = torch.tensor([math.nan, math.inf, -math.inf, 0.1, 0.2, 0.3], dtype=torch.float64)
    found = inversion_of(function, "minimal", backend)(target, function(x), x)
    expected = inversion_of(function, "minimal", torch_backend)(target, function(x), x)
    assert torch.equal(found[:3].isfinite(), expected[:3].isfinite())


@pytest.mark.parametrize("layout", ["channels last", "expanded", "strided"])
def test_images_of_any_layout(layout, backend):
    x = normal(0, 4, 3, 6, 6)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "expanded":
        x = x[:1].expand(4, -1, -1, -1)
    else:
        x = normal(0, 8, 3, 6, 6)[::2]
    for module in (nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.Tanh()):
        target = module(normal(1, *x.shape))
        for policy in ("paper", "minimal"):
            found, expected = (
                inversion_of(module, policy, b)(target, module(x), x)
                for b in (backend, torch_backend)
            )
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@DTYPES
@pytest.mark.parametrize("policy", ["paper", "minimal"])
@pytest.mark.parametrize("values", [normal, integers], ids=["distinct", "ties"])
@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(drawn=pools(), seed=seeds)
def test_max_unpool(policy, values, dtype, drawn, seed):
    pool, size = drawn
    launcher = EmulatedLauncher()
    x = values(seed, 2, 3, *size).to(dtype)
    output = pool(x)
    others = values(seed + 1, *output.shape).to(dtype), values(seed + 2, *x.shape).to(dtype)
    for target in (output + others[0], pool(others[1])):
        expected = inversion_of(pool, policy, torch_backend)(target, output, x)
        found = inversion_of(pool, policy, TorchBackend(Kernels(launcher)))(target, output, x)
        assert torch.equal(found, expected)
    assert bool(launcher.launched) == (len(size) <= 2)


@DTYPES
@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(drawn=pools(), nan=st.booleans(), seed=seeds)
def test_max_pool(dtype, drawn, nan, seed):
    pool, size = drawn
    launcher = EmulatedLauncher()
    model = nn.Sequential(nn.Identity(), nn.Tanh(), pool, nn.Flatten(), nn.LazyLinear(3))
    x = normal(seed, 2, 3, *size)
    model.double()(x)
    pooling = frfx.invert(model, "4").replaced._2  # the forward part alone
    pooling.backend = TorchBackend(Kernels(launcher))
    x = x.to(dtype)
    if nan:
        x.view(-1)[seed % x.numel()] = math.nan
    with torch.no_grad():
        torch.testing.assert_close(pooling(x), torch.tanh(pool(x)), equal_nan=True)
    assert bool(launcher.launched) == (len(size) <= 2)


@DTYPES
@pytest.mark.parametrize("name", ["Tanh", "Sigmoid"])
@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(drawn=pools(), seed=seeds, spread=st.sampled_from([0.5, 12.0]))
def test_pooled_preimages_are_those_in_turn(name, dtype, drawn, seed, spread):
    """Targets lie beyond either end of the range, at it, at the forward value and between."""
    pool, size = drawn
    function, launcher = getattr(nn, name)(), EmulatedLauncher()
    model = nn.Sequential(nn.Identity(), function, pool, nn.Flatten(), nn.LazyLinear(3))
    x = spread * normal(seed, 2, 3, *size)
    model.double()(x)
    inverse = frfx.invert(model, "0").inverse
    swap = next(m for m in inverse.children() if isinstance(m, SwappedInversion))
    for inversion in swap._parts:
        inversion.backend = TorchBackend(Kernels(launcher))
    x = x.to(dtype)
    pooled = pool(x)
    output, wanted = function(pooled), 2 * normal(seed + 1, *pooled.shape).to(dtype)
    wanted = torch.where(torch.arange(wanted.numel()).view(wanted.shape) % 5 == 0, output, wanted)
    ends = torch.tensor(swap._parts[1].limits, dtype=dtype)
    wanted.view(-1)[: 2 * (seed % 2) : 1] = ends[: 2 * (seed % 2)][: wanted.numel()]
    found = swap(wanted, output, x, pooled, None)
    launched = {name.partition("<")[0] for name in launcher.launched}
    for inversion in swap._parts:
        inversion.backend = torch_backend
    in_turn = swap(wanted, output, x, None, function(x))
    rounding = 2e-3 if dtype == torch.float32 else 1e-9  # of the preimage of what is near an end
    torch.testing.assert_close(found, in_turn, rtol=rounding, atol=rounding)
    extents = zip(*(_several(getattr(pool, n), len(size)) for n in GEOMETRY), strict=True)
    if len(size) <= 2 and all(d * (k - 1) < s for k, d, s in extents):
        assert launched == {"unpool_preimages"}


GEOMETRY = ("kernel_size", "dilation", "stride")


def _several(value, dims: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * dims


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1)], ids=str)
def test_pooled_values_that_are_not_numbers_are_seen(pool, backend):
    x = normal(0, 1, 1, 6, 6)
    target = pool(x)
    target[0, 0, 1, 1] = math.nan
    found = inversion_of(pool, "minimal", backend)(target, pool(x), x)
    assert found.isnan().any()
    x[0, 0, 3, 3] = math.nan
    found = inversion_of(pool, "minimal", backend)(pool(normal(1, 1, 1, 6, 6)), pool(x), x)
    assert found.isnan().any()


def test_what_they_do_not_serve(kernels):
    x = normal(0, 3, 4)
    assert kernels.serve(x, x.clone())
    assert not kernels.serve(x, x.float())
    assert not kernels.serve(x.half())
    assert not kernels.serve(x, torch.empty(3, 4, device="meta", dtype=x.dtype))
    assert not kernels.serve(x.requires_grad_())
    with torch.no_grad():
        assert kernels.serve(x)
    x = normal(0, 3, 4)
    with forward_ad.dual_level():
        assert not kernels.serve(forward_ad.make_dual(x, x))
    seen = []
    torch.func.vmap(lambda row: seen.append(kernels.serve(row)) or row)(x)
    make_fx(lambda x: seen.append(kernels.serve(x)) or x)(x)
    assert seen == [False, False]


def test_a_compiler_that_does_not_work_is_told_of_once():
    class Broken:
        RawModule = property(lambda self: 1 / 0)

    kernels = Kernels(launcher := CupyLauncher(Broken()))
    launcher.device_type = "cpu"
    with pytest.warns(RuntimeWarning, match="torch computes in their place: division by zero"):
        assert not kernels.serve(normal(0, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels.serve(normal(0, 3))


@pytest.mark.parametrize("policy", ["paper", "minimal"])
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_network(name, policy, backend, launcher):
    torch.manual_seed(0)
    model = networks.build(name).eval()
    x, y = torch.randn(2, *networks.NETWORKS[name].input_shape), torch.tensor([3, 1])
    expected = frfx.invert(model, 0, policy=policy)(x, y)
    inverse = frfx.invert(model, 0, policy=policy)
    for part in (inverse.inverse, inverse.merged, inverse.replaced):
        for child in part.children():
            child.backend = backend
    with torch.no_grad():
        assert relative(inverse(x, y), expected) < 1e-4
    used = {name.partition("<")[0] for name in launcher.launched}
    unpool = "unpool_preimages" if policy == "paper" else "unpool_tiles"
    assert used == {"nearest_embedding", "preimage", "max_pool", unpool, "circular_map"}
    launcher.launched.clear()
    gradient = inverse(x.requires_grad_(), y)
    assert gradient.requires_grad
    assert not {name.partition("<")[0] for name in launcher.launched} & {"circular_map", "preimage"}


@pytest.mark.parametrize("solver", ["spectral", "iterative", "dense"])
@pytest.mark.parametrize("size", [14, 15], ids=["tiles", "an entry that no window reads"])
def test_only_kernels_read_copies(size, solver, backend, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 20, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 4, 3),
        nn.Flatten(), nn.LazyLinear(4),
    )  # fmt: skip
    x, y = torch.randn(2, 3, size, size), torch.tensor([3, 1])
    model(x)
    policy = frfx.policy.paper().override(node="0", solver=solver, damping=1e-2)
    written = []
    own = Copies.written_out
    monkeypatch.setattr(Copies, "written_out", lambda self: written.append(self) or own(self))
    with torch.no_grad():
        inverse = frfx.invert(model, 0, policy=policy)
        expected = inverse(x, y)
        assert not written
        inverse.refresh()
        for part in (inverse.inverse, inverse.merged):
            for child in part.children():
                child.backend = backend
        found = inverse(x, y)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert bool(written) == (size == 14 and solver != "spectral")


@pytest.mark.parametrize("size", [21, 50])
def test_many_channels(size, backend, launcher, monkeypatch):
    operator = Convolution(normal(0, 40, 42, 3, 3).float(), (size, 20))
    shapes = (operator.in_shape, operator.out_shape, operator.out_shape)
    x, target, output = (normal(i, 3, *shape).float() for i, shape in enumerate(shapes))
    expected = Solver("spectral").prepare(operator).correct(x, target, output)
    monkeypatch.setattr(fourier, "choose_form", fourier.choose_form_on_gpu)
    prepared = Solver("spectral").prepare(operator, backend)
    assert relative(prepared.correct(x, target, output), expected) < 1e-5
    small = ["spectra", "images_of"]
    expected = small if size == 21 else ["residual_on_grid", "transpose", "transpose"]
    assert [n.partition("<")[0] for n in launcher.launched] == expected


def test_where_one_kernel_is_not_the_fastest(backend):
    tiny = Convolution(normal(0, 4, 1, 3, 3), (6, 6), groups=4)
    wide = Convolution(normal(1, 20, 30, 3, 3), (40, 40))
    hungry = Convolution(normal(2, 10, 10, 3, 3).float(), (32, 32))
    for operator in (tiny, wide, hungry):
        made = Solver("spectral").prepare(operator, backend).factor.map.by_kernels
        assert made is None or made.in_one is None


def test_registered_functions_have_no_kernel():
    assert activation.Elementwise("tanh", torch.atanh, lambda: (-1, 1)).functor is None
