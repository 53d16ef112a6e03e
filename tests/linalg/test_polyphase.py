"""The circular model at its frequencies: matrices, Gram matrices either way, against dense sums."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frfx.linalg import Convolution
from frfx.linalg.autocorrelation import Autocorrelation, differences
from frfx.linalg.form import Grid
from frfx.linalg.polyphase import Polyphase
from tests.geometries import convolutions, model_matrix
from tests.oracles import normal, relative

sides = st.sampled_from(["rows", "columns"])


def all_frequencies(model):
    """Return every frequency of the grid, shape (F, dims): of the whole spectrum."""
    axes = [torch.arange(n, dtype=torch.float64) / n for n in model.grid]
    return torch.cartesian_prod(*axes).reshape(-1, len(axes))


def by_sums(model, frequencies):
    """Return `sum_m K[m] exp(2 pi i u m)` entry by entry of the kernel, (G, F, rows, columns)."""
    op = model.operator
    kernel = op.kernel.double().numpy().reshape(op.groups, model.rows, -1, *op.kernel.shape[2:])
    phases = math.prod(op.stride)
    shape = (op.groups, len(frequencies), model.rows, kernel.shape[2], phases)
    values = np.zeros(shape, dtype=complex)
    for tap in itertools.product(*map(range, op.kernel.shape[2:])):
        reach = [d * j - b for d, j, (b, _) in zip(op.dilation, tap, op.padding, strict=True)]
        blocks = [m // s for m, s in zip(reach, op.stride, strict=True)]
        phase = np.ravel_multi_index(
            [m % s for m, s in zip(reach, op.stride, strict=True)], op.stride
        )
        wave = np.exp(2j * np.pi * (frequencies.numpy() @ blocks))
        values[..., phase] += wave[:, None, None] * kernel[(..., *tap)][:, None]
    return values.reshape(*shape[:3], -1)


def half(model):
    """Return how many frequencies the half spectrum has."""
    return math.prod(Grid(model.grid, model.grid, model.grid).half)


def as_real(values):
    return torch.view_as_real(torch.as_tensor(values).resolve_conj())


@given(operator=convolutions(), scale=st.sampled_from([1.0, 3.0]))
def test_matrices_are_sums_over_the_kernel(operator, scale):
    model = Polyphase(operator)
    frequencies = all_frequencies(model)
    found = model.matrices(frequencies, scale)
    assert relative(as_real(found), as_real(by_sums(model, frequencies) / scale)) < 1e-12


@given(operator=convolutions(modes=["zeros"]).filter(lambda op: math.prod(op.size) < 30))
def test_their_singular_values_are_those_of_the_dense_model(operator):
    model = Polyphase(operator)
    found = torch.linalg.svdvals(model.matrices(all_frequencies(model))).flatten().sort().values
    expected = np.linalg.svd(model_matrix(operator, model.grid), compute_uv=False)
    np.testing.assert_allclose(found, np.sort(expected)[-len(found) :], atol=1e-10)


@given(operator=convolutions(), side=sides, scale=st.sampled_from([1.0, 3.0]))
def test_gram_matrices_by_the_autocorrelation_are_products(operator, side, scale):
    model = Polyphase(operator)
    frequencies = all_frequencies(model)
    matrices = model.matrices(frequencies, scale)
    expected = matrices @ matrices.mH if side == "rows" else matrices.mH @ matrices
    by_lags = Autocorrelation.of(model.shifts, model.taps, side)
    assert relative(as_real(by_lags.gram(frequencies, scale**-2)), as_real(expected)) < 1e-12
    assert relative(as_real(model.gram(frequencies, side, scale)), as_real(expected)) < 1e-12


@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_many_channels_take_the_autocorrelation(dtype, tolerance, stride, side):
    operator = Convolution(normal(0, 40, 40, 3, 3), (24, 24), (stride,) * 2, ((1, 1),) * 2)
    model = Polyphase(operator, dtype)
    assert model.correlates(side, half(model))
    frequencies = Grid(model.grid, model.grid, model.grid).frequencies()
    matrices = Polyphase(operator).matrices(frequencies)
    expected = matrices @ matrices.mH if side == "rows" else matrices.mH @ matrices
    found = model.gram(frequencies, side)
    assert found.dtype == dtype.to_complex()
    assert relative(as_real(found).double(), as_real(expected)) < tolerance


@pytest.mark.parametrize(
    ("channels", "window", "size"),
    [((10, 3), 25, 64), ((64, 3), 7, 9), ((1, 1), 3, 32), ((64, 64), 3, 3)],
    ids=["large window", "short side", "depthwise", "few frequencies"],
)
def test_where_it_would_take_more_it_is_not_taken(channels, window, size):
    operator = Convolution(normal(0, *channels, window, window), (size, size))
    model = Polyphase(operator)
    short = "rows" if model.rows <= model.columns else "columns"
    side = "rows" if channels == (10, 3) else short
    assert not model.correlates(side, half(model))


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_squares_of_taps_stay_within_the_range(scale):
    operator = Convolution(normal(0, 40, 40, 3, 3), (24, 24))
    model = Polyphase(operator)
    scaled = Polyphase(replace(operator, kernel=scale * operator.kernel))
    frequencies = all_frequencies(model)[:5]
    assert scaled.correlates("rows", half(scaled))
    found, expected = scaled.gram(frequencies, "rows", scale), model.gram(frequencies, "rows")
    assert relative(as_real(found), as_real(expected)) < 1e-12


@given(shifts=st.lists(st.tuples(*[st.integers(-3, 3)] * 2), min_size=1, max_size=8, unique=True))
def test_differences_come_in_pairs_around_none(shifts):
    shifts = torch.tensor(shifts)
    lags, which = differences(shifts)
    assert torch.equal(lags, -lags.flip(0))
    assert not lags[len(lags) // 2].any()
    for i, j in itertools.product(range(len(shifts)), repeat=2):
        assert torch.equal(lags[which[i, j]], shifts[i] - shifts[j])


@given(operator=convolutions())
def test_squared_norms_are_traces(operator):
    model = Polyphase(operator)
    frequencies = all_frequencies(model)
    expected = as_real(model.matrices(frequencies)).square().sum((0, 2, 3, 4))
    assert relative(model.squared_norms(frequencies), expected) < 1e-12


def test_a_sample_of_frequencies_takes_no_autocorrelation():
    model = Polyphase(Convolution(normal(0, 40, 40, 3, 3), (24, 24)))
    assert model.correlates("rows", half(model))
    assert not model.correlates("rows", 8)
