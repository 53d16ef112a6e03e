"""The CUDA kernels, run on the CPU, against independent oracles and against the rules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import embedding_by_quadprog, integers, normal, relative
from torch import nn

import frfx
from frfx import networks
from frfx.linalg import Convolution, Solver, fourier
from frfx.linalg.backend import TorchBackend, torch_backend
from frfx.linalg.fourier import Grid
from frfx.rules import activation
from tests.kernels.emulator import FUNCTORS, EmulatedLauncher, library
from tests.linalg.test_fourier import dense_product, image_for, make, matrices_of
from tests.rules.test_max_pool import pools

from frfx.kernels import CircularMap, Kernels  # isort: skip

pytestmark = pytest.mark.skipif(library() is None, reason="needs g++ to run CUDA kernels on a CPU")
few = settings(max_examples=12, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**31)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture
def launcher():
    return EmulatedLauncher()


@pytest.fixture
def backend(launcher):
    return TorchBackend(Kernels(launcher))


@DTYPES
@few
@given(
    seed=seeds, classes=st.integers(1, 70), margin=st.sampled_from([0.0, 0.3]), ties=st.booleans()
)
def test_nearest_embedding(dtype, seed, classes, margin, ties):
    logits = (integers if ties else normal)(seed, 5, classes).to(dtype)
    labels = torch.arange(5) % classes
    found = Kernels(EmulatedLauncher()).nearest_embedding(logits, labels, margin)
    for row, label, z in zip(found, labels, logits, strict=True):
        expected = embedding_by_quadprog(z.double().numpy(), int(label), margin)
        assert np.abs(row.numpy() - expected).max() < (1e-5 if dtype == torch.float32 else 1e-9)


@st.composite
def planes(draw):
    """Draw a grid of one or two dimensions with its corners, matrices and a few taps."""
    dims = draw(st.integers(1, 2))
    size = tuple(draw(st.integers(1, 9)) for _ in range(dims))
    grid = Grid(size, *(tuple(draw(st.integers(1, n)) for n in size) for _ in range(2)))
    groups, rows, columns = (draw(st.integers(1, 6)) for _ in range(3))
    taps = draw(st.lists(st.tuples(*[st.integers(-2, 9)] * dims), min_size=1, max_size=4))
    return grid, taps, normal(draw(seeds), len(taps), groups, rows, columns)


@DTYPES
@few
@given(problem=planes(), seed=seeds)
def test_a_map_in_one_is_the_dense_map(dtype, problem, seed):
    launcher = EmulatedLauncher()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fourier, "_IN_ONE", range(1 << 30))  # whatever is the fastest
        made = make(problem, dtype=dtype, backend=TorchBackend(Kernels(launcher)))
    source, minus = (image_for(problem, seed + i, 2, dtype) for i in range(2))
    expected = dense_product(problem, (source.double() - minus.double()).numpy())
    plus = normal(seed + 2, *expected.shape).to(dtype)
    expected = expected + plus.double().numpy()
    found = made(source, minus, plus)
    scale = 1 + np.abs(expected).max()
    bound = 2e-5 if dtype == torch.float32 else 1e-12
    assert np.abs(found.numpy() - expected).max() < bound * scale
    alone = made(source)
    expected = dense_product(problem, source.double().numpy())
    assert np.abs(alone.numpy() - expected).max() < bound * scale
    assert all(name.startswith("circular_map") for name in launcher.launched)
    assert len(launcher.launched) == 2


def test_a_map_tells_what_a_block_needs():
    """The buffers hold every step's values: an image that is wide there and tall back."""
    grid = Grid((6, 9), (2, 9), (6, 1))
    matrices = matrices_of([(0, 0)], normal(0, 1, 1, 5, 2))(grid.frequencies("fft"))
    made = CircularMap.of(*vars(grid).values(), matrices)
    half = 9 // 2 + 1
    even, odd = made.buffers
    assert even >= max(2 * 2 * half, 5 * 6 * half)
    assert odd >= max(math.ceil(2 * 2 * 9 / 2), 2 * 6 * half, 5 * 6 * half)
    assert even % 2 == odd % 2 == 0
    assert made.shared == 16 * (even + odd)
    assert made.nbytes == 16 * (made.matrices.numel() + made.tables.numel())


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


@pytest.mark.parametrize("policy", ["paper", "minimal"])
@pytest.mark.parametrize("values", [normal, integers], ids=["distinct", "ties"])
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(drawn=pools(), seed=seeds)
def test_max_unpool(policy, values, drawn, seed):
    pool, size = drawn
    launcher = EmulatedLauncher()
    x = values(seed, 2, 3, *size)
    output = pool(x)
    for target in (output + values(seed + 1, *output.shape), pool(values(seed + 2, *x.shape))):
        expected = inversion_of(pool, policy, torch_backend)(target, output, x)
        found = inversion_of(pool, policy, TorchBackend(Kernels(launcher)))(target, output, x)
        assert torch.equal(found, expected)
    assert bool(launcher.launched) == (len(size) <= 2)


def test_what_they_do_not_serve(backend):
    kernels = backend.kernels
    x = normal(0, 3, 4)
    assert kernels.serve(x, x.clone())
    assert not kernels.serve(x, x.float())
    assert not kernels.serve(x.half())
    assert not kernels.serve(x, torch.empty(3, 4, device="meta", dtype=x.dtype))
    assert not kernels.serve(x.requires_grad_())
    with torch.no_grad():
        assert kernels.serve(x)


@pytest.mark.parametrize("policy", ["paper", "minimal"])
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_network(name, policy, backend, launcher):
    torch.manual_seed(0)
    model = networks.build(name).eval()
    x, y = torch.randn(2, *networks.NETWORKS[name].input_shape), torch.tensor([3, 1])
    expected = frfx.invert(model, 0, policy=policy)(x, y)
    inverse = frfx.invert(model, 0, policy=policy)
    for inversion in inverse.inverse.children():
        inversion.backend = backend
    with torch.no_grad():
        assert relative(inverse(x, y), expected) < 1e-4
    used = {name.partition("<")[0] for name in launcher.launched}
    assert used == {"nearest_embedding", "preimage", "unpool_tiles", "circular_map"}
    launcher.launched.clear()
    gradient = inverse(x.requires_grad_(), y)
    assert gradient.requires_grad
    assert not {name.partition("<")[0] for name in launcher.launched} & {"circular_map", "preimage"}


def test_the_transforms_of_large_images(backend, launcher):
    operator = Convolution(normal(0, 20, 30, 3, 3).float(), (21, 20))
    shapes = (operator.in_shape, operator.out_shape, operator.out_shape)
    x, target, output = (normal(i, 3, *shape).float() for i, shape in enumerate(shapes))
    expected = Solver("spectral").prepare(operator).correct(x, target, output)
    prepared = Solver("spectral").prepare(operator, backend)
    assert prepared.factor.map.form == "fft"
    assert relative(prepared.correct(x, target, output), expected) < 1e-5
    assert [n.partition("<")[0] for n in launcher.launched] == [
        "residual_on_grid", "transpose", "transpose"
    ]  # fmt: skip


def test_where_one_kernel_is_not_the_fastest(backend):
    tiny, large = (
        Convolution(normal(0, 4, 1, 3, 3), (6, 6), groups=4),
        Convolution(normal(1, 20, 30, 3, 3), (40, 40)),
    )
    for operator in (tiny, large):
        assert Solver("spectral").prepare(operator, backend).factor.map.in_one is None


def test_registered_functions_have_no_kernel():
    assert activation.Elementwise("tanh", torch.atanh, lambda: (-1, 1)).functor is None
