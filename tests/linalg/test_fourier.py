"""Block-circulant maps in all their forms against the dense matrix, on torch and on NumPy."""

from __future__ import annotations

import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frfx.linalg import form as form_module
from frfx.linalg import fourier
from frfx.linalg.backend import Backend, Namespace, torch_backend
from frfx.linalg.form import fast_length
from frfx.linalg.fourier import FourierMap, Grid, choose_form
from tests.oracles import normal, relative

seeds = st.integers(0, 2**31)
FORMS = ("matrix", "dft", "fft")


class NumpyBackend(Backend):
    """NumPy as the array library: the same lines as on the others, with arrays handed over."""

    name = "numpy"
    namespace = Namespace(
        reshape=np.reshape,
        permute_dims=np.transpose,
        concat=lambda arrays, axis: np.concatenate(arrays, axis),
        rfftn=lambda x, s, axes: np.fft.rfftn(x, s, axes),
        irfftn=lambda x, s, axes: np.fft.irfftn(x, s, axes, norm="forward"),
    )

    def constant(self, tensor):
        return tensor.numpy()

    def run(self, function, *tensors):
        arrays = (None if t is None else np.from_dlpack(t) for t in tensors)
        return torch.tensor(function(*arrays))

    def batch_last(self, x):
        return np.moveaxis(x, (0, 2), (-1, -2))

    def batch_first(self, x):
        return np.moveaxis(x, (-1, -2), (0, 2))


BACKENDS = {"torch": torch_backend, "numpy": NumpyBackend()}


@st.composite
def problems(draw):
    """Draw a grid with its corners, the sizes of the matrices, and a few taps of the map."""
    dims = draw(st.sampled_from([1, 2, 2, 3]))
    size = tuple(draw(st.integers(1, {1: 9, 2: 6, 3: 4}[dims])) for _ in range(dims))
    grid = Grid(size, *(tuple(draw(st.integers(1, n)) for n in size) for _ in range(2)))
    groups, rows, columns = (draw(st.integers(1, 3)) for _ in range(3))
    taps = draw(st.lists(st.tuples(*[st.integers(-2, 9)] * dims), min_size=1, max_size=4))
    return grid, taps, normal(draw(seeds), len(taps), groups, rows, columns)


def matrices_of(taps, weights):
    """Return what makes `sum_m K[m] exp(2 pi i u m)` at frequencies u."""

    def matrices(frequencies):
        angle = 2 * math.pi * frequencies @ torch.tensor(taps).double().T
        waves = torch.complex(angle.cos(), angle.sin())
        return torch.einsum("fm,mgrc->gfrc", waves, weights.to(waves.dtype))

    return matrices


def dense_product(problem, x):
    """Return `sum_m K[m] x(p + m)` on the grid, by moving the image."""
    grid, taps, weights = problem
    image = np.zeros((*x.shape[:3], *grid.size))
    image[(..., *map(slice, grid.source))] = x
    axes = tuple(range(3, image.ndim))
    result = sum(
        np.einsum("grc,ngc...->ngr...", k, np.roll(image, [-m for m in tap], axes))
        for tap, k in zip(taps, weights.numpy(), strict=True)
    )
    return result[(..., *map(slice, grid.result))]


def make(problem, **options):
    grid, taps, weights = problem
    _, groups, rows, columns = weights.shape
    options = {"dtype": torch.float64, "device": torch.device("cpu"), **options}
    return FourierMap(
        matrices_of(taps, weights), grid, groups=groups, rows=rows, columns=columns, **options
    )


def image_for(problem, seed, count, dtype=torch.float64):
    grid, _, weights = problem
    return normal(seed, count, weights.shape[1], weights.shape[3], *grid.source, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("memory", [math.inf, 0], ids=["kept", "streamed"])
@pytest.mark.parametrize("form", [*FORMS, None])
@given(problem=problems(), seed=seeds, count=st.integers(1, 3))
def test_every_form_is_the_dense_map(form, memory, backend, problem, seed, count):
    made = make(problem, form=form, memory=memory, backend=backend)
    x = image_for(problem, seed, count)
    found = made(x)
    expected = dense_product(problem, x.numpy())
    assert found.shape == expected.shape
    assert np.abs(found.numpy() - expected).max() < 1e-12 * (1 + np.abs(expected).max())
    assert made.streams == (memory == 0 and form != "matrix")


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@given(problem=problems(), seed=seeds)
def test_single_precision(form, backend, problem, seed):
    x = image_for(problem, seed, 2, torch.float32)
    found = make(problem, form=form, backend=backend, dtype=torch.float32)(x)
    expected = dense_product(problem, x.double().numpy())
    assert np.abs(found.numpy() - expected).max() < 2e-5 * (1 + np.abs(expected).max())
    if backend is torch_backend:
        assert found.dtype == torch.float32


def in_pieces(patch):
    """Make every piece as small as it gets."""
    patch.setattr(form_module, "_CHUNK", 7)
    for name, value in (("_TEMPORARY", 7), ("_CACHED", 1), ("_LEAST_BATCH", 2)):
        patch.setattr(fourier, name, value)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("memory", [math.inf, 0], ids=["kept", "streamed"])
@pytest.mark.parametrize("form", FORMS)
@given(problem=problems(), seed=seeds)
def test_chunks_change_nothing(form, memory, backend, problem, seed):
    """Chunks so small that every loop over them has several turns, a last shorter one included."""
    with pytest.MonkeyPatch.context() as patch:
        in_pieces(patch)
        made = make(problem, form=form, memory=memory, backend=backend)
        x = image_for(problem, seed, 5)
        found = made(x)
    expected = dense_product(problem, x.numpy())
    assert np.abs(found.numpy() - expected).max() < 1e-12 * (1 + np.abs(expected).max())


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize("form", FORMS)
@given(problem=problems(), seed=seeds)
def test_from_target_and_output_to_the_sum(form, parts, backend, problem, seed):
    made = make(problem, form=form, backend=backend)
    target, output = (image_for(problem, seed + i, 5) for i in range(2))
    expected = dense_product(problem, (target - output).numpy())
    plus = normal(seed + 2, *expected.shape)
    with pytest.MonkeyPatch.context() as patch:
        if parts:
            in_pieces(patch)
        found = made(target, output, plus)
        alone = made(target, output)
    scale = 1 + np.abs(expected).max()
    assert np.abs(found.numpy() - expected - plus.numpy()).max() < 1e-12 * scale
    assert np.abs(alone.numpy() - expected).max() < 1e-12 * scale


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_flow_through_it(form, parts, monkeypatch):
    if parts:
        monkeypatch.setattr(fourier, "_CACHED", 1)
        monkeypatch.setattr(fourier, "_LEAST_BATCH", 2)
    problem = Grid((5, 4), (4, 3), (5, 2)), [(0, 0), (1, 2)], normal(0, 2, 1, 3, 2)
    made = make(problem, form=form)
    given = [image_for(problem, i, 3) for i in range(2)] + [normal(2, 3, 1, 3, 5, 2)]
    given = [t.requires_grad_() for t in given]
    assert torch.autograd.gradcheck(made, given, check_forward_ad=True)


@pytest.mark.parametrize("layout", ["expanded", "channels last", "strided"])
@pytest.mark.parametrize("form", FORMS)
def test_sources_of_any_layout(form, layout):
    taps = [(0, 0), (1, 2)]
    problem = Grid((5, 4), (4, 3), (5, 2)), taps, normal(0, 2, 1, 3, 2)
    x = image_for(problem, 1, 4)
    if layout == "expanded":
        x = x[:1].expand(4, -1, -1, -1, -1)
    elif layout == "channels last":
        x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    else:
        x = image_for(problem, 1, 8)[::2]
    assert relative(make(problem, form=form)(x), dense_product(problem, x.numpy())) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("memory", [math.inf, 0], ids=["kept", "streamed"])
@given(problem=problems(), seed=seeds, count=st.integers(1, 3), with_ends=st.booleans())
def test_three_real_products_are_a_complex_one(memory, backend, problem, seed, count, with_ends):
    with patch.object(fourier, "complex_parts", lambda *sizes: 3):
        made = make(problem, form="dft", memory=memory, backend=backend)
    x, expected = image_for(problem, seed, count), 0.0
    ends = (None, None)
    if with_ends:
        minus = image_for(problem, seed + 1, count)
        ends = (minus, torch.ones(count, made.groups, made.rows, *made.grid.result).double())
        expected = 1 - dense_product(problem, minus.numpy())
    assert relative(made(x, *ends), expected + dense_product(problem, x.numpy())) < 1e-12
    assert made.streams or made._kept.shape[2] == 3  # the sum is kept beside the parts


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("form", ["dft", "fft"])
@given(problem=problems(), seed=seeds, count=st.integers(1, 3))
def test_conjugates_are_made_once(form, parts, problem, seed, count):
    with (
        patch.object(fourier, "complex_parts", lambda *sizes: parts),
        patch.object(fourier, "_LARGE", 1),
    ):
        made = make(problem, form=form)
    x = image_for(problem, seed, count)
    assert relative(made(x), dense_product(problem, x.numpy())) < 1e-12


@given(size=st.lists(st.integers(1, 7), min_size=1, max_size=3), form=st.sampled_from(FORMS))
def test_every_frequency_is_made_or_a_conjugate(size, form):
    grid = Grid(tuple(size), tuple(size), tuple(size))
    runs, others, opposite = grid.conjugates(form)
    frequencies = grid.frequencies(form)
    made = [i for run in runs for i in range(run.start, run.stop)]
    assert sorted([*made, *others.tolist()]) == list(range(len(frequencies)))
    assert set(opposite.tolist()) <= set(made)
    sums = frequencies[others] + frequencies[opposite]
    torch.testing.assert_close(sums, sums.round())  # u and -u
    alone = math.prod(2 - n % 2 for n in size)  # u and -u are the same
    assert len(made) == (math.prod(size) + alone) // 2


@pytest.mark.parametrize("channels", [16, 512])
def test_three_products_are_for_many_channels(channels):
    """There they take less memory, too."""
    grid = Grid((6, 6), (4, 4), (4, 4))
    problem = grid, [(0, 0)], normal(0, 1, 1, channels, channels)
    made = make(problem, form="dft", dtype=torch.float32)
    assert made.parts == form_module.complex_parts(grid, channels, channels)
    assert made.parts == (3 if channels == 512 else 2)
    numbers = 24 * channels**2 * (3 if channels == 512 else 4)
    tables = sum(table.numel() for table in made._dft.tables)
    assert made.nbytes == 4 * (numbers + tables)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@given(problem=problems())
def test_a_map_tells_its_memory(form, backend, problem):
    made = make(problem, form=form, backend=backend, dtype=torch.float32)
    held = [value for name, value in vars(made).items() if name in ("_kept",)]
    arrays = [*held, *(made._dft.tables if made._dft is not None else ())]
    assert made.nbytes == sum(
        a.untyped_storage().nbytes() if isinstance(a, torch.Tensor) else a.nbytes for a in arrays
    )


def test_a_bound_on_the_memory_holds_whatever_the_form():
    problem = Grid((4, 4), (4, 4), (4, 4)), [(0, 0)], normal(0, 1, 1, 3, 3)
    assert make(problem).form == "matrix"
    x = image_for(problem, 1, 2)
    for memory, streams in ((2000, False), (1000, True)):
        tight = make(problem, memory=memory)
        assert (tight.form, tight.streams) == ("fft", streams)
        assert tight.nbytes <= memory < make(problem, form="dft").nbytes
        assert relative(tight(x), dense_product(problem, x.numpy())) < 1e-13


@given(
    size=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    groups=st.sampled_from([1, 3, 64]),
    rows=st.sampled_from([1, 3, 64, 512]),
    columns=st.sampled_from([1, 3, 64, 512]),
)
def test_the_form_suits_the_sizes(size, groups, rows, columns):
    size = tuple(size)
    form = choose_form(Grid(size, size, size), groups, rows, columns)
    entries = groups * rows * columns * math.prod(size) ** 2
    if form == "matrix":
        assert entries <= 1 << 24  # 128 MiB in double
    if len(size) > 1 and min(size) >= 200:
        assert form == "fft"  # products with large matrices of cosines are no match
    if math.prod(size) == 1 and entries <= 1 << 24:
        assert form == "matrix"  # nothing to transform


@given(n=st.integers(1, 2000))
def test_fast_lengths_have_small_factors(n):
    length = fast_length(n)
    assert n <= length < n + max(n / 4, 1)
    assert length == n or n > 36  # products with matrices suit any length
    if n > 36:
        for prime in (2, 3, 5, 7, 11, 13):
            while length % prime == 0:
                length //= prime
        assert length == 1


def test_images_of_common_sizes_get_grids_that_transform_fast():
    padded = {size: fast_length(size + 2) for size in (14, 28, 56, 112, 224)}
    assert padded == {14: 16, 28: 30, 56: 60, 112: 120, 224: 240}
