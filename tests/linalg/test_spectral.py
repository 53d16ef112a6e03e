"""The spectral solver against dense circulant matrices and the paper's own equations."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from frfx.linalg import Convolution, Spectral, Transposed, form, fourier, polyphase
from frfx.linalg.form import fast_length
from frfx.linalg.polyphase import Polyphase
from frfx.linalg.spectral import SpectralFactor
from tests.geometries import convolutions, matrix_of, model_matrix, plain_sum
from tests.oracles import (
    circulant,
    damped_least_squares,
    normal,
    pad_left,
    paper_convolution,
    relative,
)

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


# Any stride, dilation, groups and padding: against the dense model on the grid.


def by_model(operator, residual, solve):
    """Solve with the dense circular model: embed in its grid, solve, and cut out.

    Args:
        operator: A convolution or its transpose.
        residual: What is solved for, shape (N, *out_shape).
        solve: Takes the model's matrix and the columns of right-hand sides.
    """
    transposed = isinstance(operator, Transposed)
    conv = operator.of if transposed else operator
    grid = Polyphase(conv).grid
    image = [g * s for g, s in zip(grid, conv.stride, strict=True)]
    matrix = model_matrix(conv, grid)
    if transposed:
        matrix, around, within = matrix.T, image, [conv.out_channels, *grid]
    else:
        around, within = grid, [conv.in_channels, *image]
    gaps = zip(around, residual.shape[2:], strict=True)
    embedded = np.pad(residual.numpy(), [(0, 0), (0, 0), *((0, n - m) for n, m in gaps)])
    solved = solve(matrix, embedded.reshape(len(residual), -1).T)
    corner = tuple(slice(n) for n in operator.in_shape[1:])
    return solved.T.reshape(len(residual), *within)[(..., *corner)]


def well_conditioned(matrix, most=1e6):
    singular = np.linalg.svd(matrix, compute_uv=False)
    return singular[-1] * most > singular[0]


either_way = st.sampled_from([lambda operator: operator, Transposed])


def unknowns(operator):
    """Return how many entries the model's operand has."""
    blocks = zip(Polyphase(operator).grid, operator.stride, strict=True)
    return operator.in_channels * math.prod(g * s for g, s in blocks)


@st.composite
def long_convolutions(draw):
    """Draw a padded convolution in one dimension whose grid has more blocks than it needs."""
    stride, n_in, n_out = (draw(st.integers(1, 2)) for _ in range(3))
    before, after = draw(st.integers(1, 2)), draw(st.integers(0, 2))
    kernel = 0.3 * normal(draw(seeds), n_out, n_in, 3)
    kernel[..., 1] += 2 * torch.eye(n_out, n_in)
    size = draw(st.integers(36, 60)) * stride
    return Convolution(kernel, (size,), (stride,), ((before, after),), (1,), 1, "zeros")


zeros = st.one_of(
    convolutions(modes=["zeros"], dominant=2.0).filter(lambda drawn: unknowns(drawn) <= 150),
    long_convolutions(),
)


@given(drawn=zeros, way=either_way, seed=seeds)
def test_equals_the_pseudo_inverse_of_the_model(drawn, way, seed):
    operator = way(drawn)
    assume(well_conditioned(model_matrix(drawn, Polyphase(drawn).grid)))
    residual = normal(seed, 2, *operator.out_shape)
    found = Spectral().prepare(operator).solve(residual)
    expected = by_model(operator, residual, lambda a, b: np.linalg.pinv(a) @ b)
    assert found.shape == (2, *operator.in_shape)
    assert relative(found, expected) < 1e-9


@given(drawn=zeros, way=either_way, seed=seeds, damping=st.floats(1e-3, 1))
def test_damping_of_the_model(drawn, way, seed, damping):
    operator = way(drawn)
    residual = normal(seed, 2, *operator.out_shape)
    found = Spectral(damping=damping).prepare(operator).solve(residual)
    expected = by_model(operator, residual, lambda a, b: damped_least_squares(a, b, damping))
    assert relative(found, expected) < 1e-9


@given(drawn=zeros, way=either_way, seed=seeds, rcond=st.sampled_from([0.2, 0.5]))
def test_cutoff_of_the_model(drawn, way, seed, rcond):
    operator = way(drawn)
    singular = np.linalg.svd(model_matrix(drawn, Polyphase(drawn).grid), compute_uv=False)
    assume(np.abs(singular / singular.max() - rcond).min() > 1e-9)
    residual = normal(seed, 2, *operator.out_shape)
    factor = Spectral(rcond=rcond).prepare(operator)
    expected = by_model(operator, residual, lambda a, b: np.linalg.pinv(a, rcond=rcond) @ b)
    assert relative(factor.solve(residual), expected) < 1e-9
    assert factor.spectrum.deficient == (singular.min() <= rcond * singular.max())


@given(operator=convolutions(padded=False, dominant=2.0), seed=seeds)
def test_wide_convolutions_without_padding_leave_no_residual(operator, seed):
    model = Polyphase(operator)
    assert model.exact
    assume(model.rows <= model.columns)
    assume(well_conditioned(model_matrix(operator, model.grid)))
    residual = normal(seed, 2, *operator.out_shape)
    found = Spectral().prepare(operator).solve(residual)
    assert relative(plain_sum(operator, found.numpy()), residual) < 1e-8


@given(operator=convolutions(modes=["circular"], padded=True, dominant=2.0), seed=seeds)
def test_circular_padding_that_keeps_the_size_is_the_model_itself(operator, seed):
    sizes = zip(operator.size, operator.stride, operator.extent, strict=True)
    assume(all(n % s == 0 and e - 1 <= n for n, s, e in sizes))
    # Padding by the reach in all, so that every place of the stride has its window.
    reach = [e - 1 for e in operator.extent]
    assume(all(r <= n for r, n in zip(reach, operator.size, strict=True)))
    operator = replace(operator, padding=tuple((r // 2, r - r // 2) for r in reach))
    assert Polyphase(operator).wraps
    matrix = matrix_of(operator)
    assume(well_conditioned(matrix))
    residual = normal(seed, 2, *operator.out_shape)
    factor = Spectral().prepare(operator)
    expected = residual.flatten(1).numpy() @ np.linalg.pinv(matrix).T
    assert relative(factor.solve(residual), expected) < 1e-9
    assert factor.spectrum.condition == pytest.approx(np.linalg.cond(matrix), rel=1e-6)


@given(operator=st.one_of(convolutions(modes=["zeros"]), long_convolutions()))
def test_the_grid_is_the_smallest_on_which_no_window_wraps(operator):
    """On the grid, windows of the image read no place twice; on a smaller one, some would.

    A larger one has fast transforms, and is taken where the model is none of the paper's.
    """
    for n, out, s, d, k, (before, _), grid in zip(
        operator.size,
        operator.out_size,
        operator.stride,
        operator.dilation,
        operator.kernel.shape[2:],
        operator.padding,
        Polyphase(operator).grid,
        strict=True,
    ):
        read = [p * s + d * j - before for p in range(out) for j in range(k)]
        blocks = {place // s for place in [*read, 0, n - 1]}
        smallest = max(blocks) - min(blocks) + 1
        assert grid == (fast_length(smallest) if any(map(any, operator.padding)) else smallest)


@pytest.mark.parametrize("pointwise", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [0.0, 1e-2])
@given(drawn=zeros, way=either_way, seed=seeds)
def test_a_bound_on_the_memory_changes_nothing_else(damping, dtype, pointwise, drawn, way, seed):
    """Where channels are many, no damped inverse is made: the systems are solved."""
    operator = way(drawn).to(dtype)
    residual = normal(seed, 2, *operator.out_shape, dtype=dtype)
    kept = Spectral(damping=damping).prepare(operator)
    with pytest.MonkeyPatch.context() as patch:
        if not pointwise:
            patch.setattr(fourier, "_POINTWISE_UP_TO", 0)
        streamed = Spectral(damping=damping, memory=0).prepare(operator)
    assume(kept.spectrum.condition < 100 or damping)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert streamed.map.streams
    assert relative(streamed.solve(residual), kept.solve(residual)) < tolerance
    assert streamed.spectrum.condition == pytest.approx(kept.spectrum.condition, rel=1e-3)
    assert streamed.spectrum.deficient == kept.spectrum.deficient


def test_a_bound_on_the_memory_holds():
    operator = Convolution(normal(0, 32, 32, 3, 3, dtype=torch.float32), (24, 24))
    kept, streamed = Spectral().prepare(operator), Spectral(memory=1 << 16).prepare(operator)
    assert kept.nbytes >= 24 * 13 * 32 * 32 * 8
    assert streamed.map.nbytes <= 1 << 16
    assert streamed.nbytes <= 4 * 8 * operator.kernel.numel()  # the kernel's products with itself


def test_a_bound_on_the_memory_keeps_the_smallest_grid():
    """Where the matrices of a larger one would have to be made anew at every call."""
    kernel = normal(0, 32, 32, 3, 3, dtype=torch.float32)
    operator = Convolution(kernel, (56, 56), padding=((1, 1),) * 2)
    needed = {n: n * (n // 2 + 1) * 32 * 32 * 8 for n in (58, 60)}
    for memory, grid in ((needed[60], 60), (needed[60] - 1, 58), (needed[58] - 1, 60)):
        factor = Spectral(damping=1e-2, memory=memory).prepare(operator)
        assert factor.model.grid == (grid, grid)
        assert factor.map.streams == (memory < needed[58])


@pytest.mark.parametrize("memory", [1 << 29, 0], ids=["kept", "streamed"])
@given(drawn=zeros, seed=seeds, rcond=st.sampled_from([None, 0.5]))
def test_chunks_of_frequencies_share_their_cutoff(memory, drawn, seed, rcond):
    residual = normal(seed, 2, *drawn.out_shape)
    singular = np.linalg.svd(model_matrix(drawn, Polyphase(drawn).grid), compute_uv=False)
    assume(np.abs(singular / singular.max() - (rcond or 1e-12)).min() > 1e-9)
    whole = Spectral(rcond=rcond).prepare(drawn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(form, "_CHUNK", 40)
        chunked = Spectral(rcond=rcond, memory=memory).prepare(drawn)
        found = chunked.solve(residual)
    assert relative(found, whole.solve(residual)) < 1e-9
    assert chunked.spectrum.condition == pytest.approx(whole.spectrum.condition, rel=1e-6)
    assert chunked.spectrum.deficient == whole.spectrum.deficient


@pytest.mark.parametrize("memory", [1 << 29, 0], ids=["kept", "streamed"])
@pytest.mark.parametrize("gram", ["rows", "columns"])
@given(drawn=zeros, way=either_way, seed=seeds, damping=st.floats(1e-3, 1))
def test_inverse_gram_matrices(gram, memory, drawn, way, seed, damping):
    """What preconditions: `(A A^T + damping s^2)^-1` of the model, or of its transpose's."""
    operator = way(drawn)
    factor = SpectralFactor(operator, cutoff=-1.0, damping=damping, gram=gram, memory=memory)
    side = operator.out_shape if gram == "rows" else operator.in_shape
    given_vector = normal(seed, 2, *side)
    matrix = model_matrix(drawn, Polyphase(drawn).grid)
    matrix = matrix.T if isinstance(operator, Transposed) else matrix
    product = matrix @ matrix.T if gram == "rows" else matrix.T @ matrix
    shift = damping * np.linalg.norm(matrix, 2) ** 2
    inverse = np.linalg.inv(product + shift * np.eye(len(product)))
    image = (gram == "rows") == isinstance(operator, Transposed)
    grid = Polyphase(drawn).grid
    around = [g * s for g, s in zip(grid, drawn.stride, strict=True)] if image else grid
    gaps = zip(around, side[1:], strict=True)
    embedded = np.pad(given_vector.numpy(), [(0, 0), (0, 0), *((0, n - m) for n, m in gaps)])
    solved = (embedded.reshape(2, -1) @ inverse).reshape(embedded.shape)
    expected = solved[(..., *(slice(n) for n in side[1:]))]
    assert relative(factor.solve(given_vector), expected) < 1e-9


@pytest.mark.parametrize("damping", [0.0, 1e-2])
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_scale_does_not_matter(scale, damping):
    """In single precision too, whose range the Gram matrices of such kernels leave."""
    kernel = 0.3 * normal(0, 2, 3, 3)
    kernel[..., 1] += 3 * torch.eye(2, 3)
    plain = Spectral(damping=damping).prepare(Convolution(kernel.float(), (7,)))
    scaled = Spectral(damping=damping).prepare(Convolution((kernel * scale).float(), (7,)))
    residual = normal(1, 2, 2, 5)
    found = scaled.solve((residual * scale).float())
    assert relative(found, plain.solve(residual.float())) < 1e-5


@pytest.mark.parametrize("memory", [1 << 29, 0], ids=["kept", "streamed"])
@pytest.mark.parametrize("damping", [1e-4, 1e-2])
def test_damping_in_single_precision(damping, memory):
    kernel = normal(0, 4, 4, 3, 3).float()
    operator = Convolution(kernel, (7, 8))
    residual = normal(1, 2, 4, 5, 6).float()
    found = Spectral(damping=damping, memory=memory).prepare(operator).solve(residual)
    doubled = operator.to(torch.float64)
    expected = by_model(
        doubled, residual.double(), lambda a, b: damped_least_squares(a, b, damping)
    )
    assert relative(found, expected) < 1e-3


def test_the_spectrum_of_a_large_model_is_estimated_closely():
    """From a sample of its frequencies, against those of all of them."""
    kernel = normal(0, 8, 8, 3, 3) / 8
    operator = Convolution(kernel, (40, 40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(polyphase, "_SAMPLED_WORK", 1 << 16)
        spectrum = Spectral().prepare(operator).spectrum
    flipped = np.zeros((8, 8, 40, 40))
    flipped[..., :3, :3] = kernel.numpy()
    singular = np.linalg.svd(np.moveaxis(np.fft.fft2(flipped), (0, 1), (-2, -1)), compute_uv=False)
    assert spectrum.largest == pytest.approx(singular.max(), rel=0.05)
    assert singular.min() <= spectrum.smallest * (1 + 1e-9)
    assert spectrum.smallest <= np.quantile(singular, 0.05)
