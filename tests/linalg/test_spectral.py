"""The spectral solver against dense circulant matrices and the paper's own equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import circulant, damped_least_squares, normal, pad_left, paper_convolution, relative

from frfx.linalg import Convolution, Spectral

seeds = st.integers(0, 2**31)


@st.composite
def geometries(draw):
    """Draw channels, window and size of a small convolution in 1 to 3 dimensions."""
    dims = draw(st.integers(1, 3))
    most = {1: 9, 2: 6, 3: 3}[dims]
    window = tuple(draw(st.integers(1, min(3, most))) for _ in range(dims))
    size = tuple(draw(st.integers(k, most)) for k in window)
    return draw(st.integers(1, 4)), draw(st.integers(1, 4)), window, size


def problem(seed, geometry, dtype=torch.float64):
    """Return a kernel and a residual, the kernel with a dominant entry: well conditioned."""
    n_out, n_in, window, size = geometry
    kernel = 0.2 * normal(seed, n_out, n_in, *window)
    kernel[(slice(None), slice(None), *(0 for _ in window))] += 3 * torch.eye(n_out, n_in)
    valid = [n - k + 1 for n, k in zip(size, window, strict=True)]
    return kernel.to(dtype), normal(seed + 1, 2, n_out, *valid, dtype=dtype)


@given(seed=seeds, geometry=geometries())
def test_equals_the_pseudo_inverse_of_the_circulant_matrix(seed, geometry):
    size = geometry[3]
    kernel, residual = problem(seed, geometry)
    found = Spectral().prepare(Convolution(kernel, size)).solve(residual)
    padded = pad_left(residual.numpy(), size).reshape(2, -1)
    expected = padded @ np.linalg.pinv(circulant(kernel.numpy(), size)).T
    assert found.shape == (2, kernel.shape[1], *size)
    assert relative(found, expected) < 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@given(seed=seeds, geometry=geometries())
def test_equals_the_papers_equations(dtype, tolerance, seed, geometry):
    n_out, n_in, _, size = geometry
    kernel, residual = problem(seed, geometry, dtype)
    feature, bias = normal(seed + 2, 2, n_in, *size), normal(seed + 3, n_out)
    wide = kernel.double()
    output = Convolution(wide, size).mv(feature) + bias.reshape(-1, *[1] * len(size))
    found = feature + Spectral().prepare(Convolution(kernel, size)).solve(residual)
    expected = paper_convolution(
        wide.numpy(), bias.numpy(), feature.numpy(), (output + residual).numpy()
    )
    assert relative(found, expected) < tolerance


@given(seed=seeds, geometry=geometries(), damping=st.floats(1e-4, 1))
def test_damping_solves_the_augmented_system(seed, geometry, damping):
    size = geometry[3]
    kernel, residual = problem(seed, geometry)
    found = Spectral(damping=damping).prepare(Convolution(kernel, size)).solve(residual)
    padded = pad_left(residual.numpy(), size).reshape(2, -1)
    matrix = circulant(kernel.numpy(), size)
    expected = damped_least_squares(matrix, padded.T, damping).T
    assert relative(found, expected) < 1e-10


@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (3, 2, 2, 2), (2, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_frequency_that_the_kernel_does_not_pass(shape, dtype):
    # A difference filter annihilates constants: the zero frequency has no inverse.
    kernel = normal(0, *shape)
    dims = tuple(range(2, kernel.ndim))
    kernel = (kernel - kernel.mean(dims, keepdim=True)).to(dtype)
    kernel = torch.round(kernel * 64) / 64
    kernel -= kernel.sum(dims, keepdim=True) * torch.eye(kernel[0, 0].numel())[0].view(shape[2:])
    size = (4, 5)[: len(dims)]
    factor = Spectral().prepare(Convolution(kernel, size))
    assert factor.spectrum.deficient
    residual = normal(1, 2, shape[0], *[n - k + 1 for n, k in zip(size, shape[2:], strict=True)])
    matrix = circulant(kernel.double().numpy(), size)
    cutoff = 1e-6 if dtype == torch.float32 else 1e-12
    padded = pad_left(residual.numpy(), size).reshape(2, -1)
    expected = padded @ np.linalg.pinv(matrix, rcond=cutoff).T
    found = factor.solve(residual.to(dtype))
    assert relative(found, expected) < (1e-5 if dtype == torch.float32 else 1e-11)


@given(seed=seeds, geometry=geometries(), rcond=st.sampled_from([0.3, 0.6, 0.9]))
def test_cutoff_is_relative_to_all_frequencies(seed, geometry, rcond):
    size = geometry[3]
    kernel, residual = problem(seed, geometry)
    factor = Spectral(rcond=rcond).prepare(Convolution(kernel, size))
    matrix = circulant(kernel.numpy(), size)
    singular = np.linalg.svd(matrix, compute_uv=False)
    assert np.abs(singular / singular.max() - rcond).min() > 1e-9  # no value on the very edge
    padded = pad_left(residual.numpy(), size).reshape(2, -1)
    expected = padded @ np.linalg.pinv(matrix, rcond=rcond).T
    assert relative(factor.solve(residual), expected) < 1e-11
    assert factor.spectrum.deficient == (singular.min() <= rcond * singular.max())


@given(seed=seeds, geometry=geometries())
def test_condition_is_that_of_the_circulant_matrix(seed, geometry):
    size = geometry[3]
    kernel, _ = problem(seed, geometry)
    factor = Spectral().prepare(Convolution(kernel, size))
    expected = np.linalg.cond(circulant(kernel.numpy(), size))
    assert factor.spectrum.condition == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_kernels_are_solved_in_single(dtype):
    kernel, residual = problem(3, (2, 3, (3, 2), (6, 7)), dtype)
    factor = Spectral().prepare(Convolution(kernel, (6, 7)))
    found = factor.solve(residual.float())
    assert factor.dtype == torch.float32
    assert found.dtype == torch.float32
    matrix = circulant(kernel.double().numpy(), (6, 7))
    padded = pad_left(residual.double().numpy(), (6, 7)).reshape(2, -1)
    assert relative(found, padded @ np.linalg.pinv(matrix).T) < 1e-6
