"""The dense solver: factors of matrices and diagonals against dense float64 linear algebra."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from frfx.linalg import Convolution, Dense, Diagonal, Matrix, Transposed
from frfx.linalg.dense import GramFactor, MatrixFactor, WindowFactor, write_out, written_out_bytes
from tests.geometries import convolutions, matrix_of
from tests.oracles import damped_least_squares, normal, relative

seeds = st.integers(0, 2**31)
sizes = st.integers(1, 8)


@given(seed=seeds, m=sizes, n=sizes, leading=st.sampled_from([(), (4,), (2, 3)]))
def test_matrix_equals_lstsq(seed, m, n, leading):
    matrix, residual = normal(seed, m, n), normal(seed + 1, *leading, m)
    deviation = Dense(rcond=1e-9).prepare(Matrix(matrix)).solve(residual)
    assert deviation.shape == (*leading, n)
    columns = residual.reshape(-1, m).T.numpy()
    expected = np.linalg.lstsq(matrix.numpy(), columns, rcond=1e-9)[0].T
    condition = np.linalg.cond(matrix.numpy())
    assert relative(deviation, expected) < 1e-13 * condition + 1e-12


@given(seed=seeds, m=sizes, n=sizes, damping=st.floats(1e-4, 10))
def test_damped_matrix(seed, m, n, damping):
    matrix, residual = normal(seed, m, n), normal(seed + 1, 3, m)
    deviation = Dense(damping=damping).prepare(Matrix(matrix)).solve(residual)
    expected = damped_least_squares(matrix.numpy(), residual.T.numpy(), damping).T
    assert relative(deviation, expected) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_matrices_up_to_single_are_solved_in_single(dtype, shape):
    # Well conditioned, so that only the rounding of the result is seen.
    matrix = (normal(0, *shape) / 8 + torch.eye(*shape)).to(dtype)
    factor = Dense().prepare(Matrix(matrix))
    assert factor.inverse.dtype == torch.float32
    assert factor.solve(torch.ones(2, shape[0])).dtype == torch.float32
    assert relative(factor.inverse, np.linalg.pinv(matrix.double().numpy())) < 1e-6
    assert not factor.spectrum.deficient


@given(seed=seeds, m=sizes, n=sizes)
def test_condition_of_a_matrix(seed, m, n):
    matrix = normal(seed, m, n)
    factor = Dense().prepare(Matrix(matrix))
    assert factor.spectrum.condition == pytest.approx(np.linalg.cond(matrix.numpy()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_deficient_matrix(dtype, shape):
    rank = 3
    exact = (normal(0, shape[0], rank) @ normal(1, rank, shape[1])).to(dtype)
    factor = Dense().prepare(Matrix(exact))
    assert factor.spectrum.deficient
    cutoff = np.finfo(str(dtype)[6:]).eps * max(shape)
    expected = np.linalg.pinv(exact.double().numpy(), rcond=cutoff)
    assert np.linalg.matrix_rank(expected, tol=1e-6 * np.linalg.norm(expected, 2)) == rank
    assert relative(factor.inverse, expected) < (1e-11 if dtype == torch.float64 else 1e-5)


@given(
    values=st.lists(st.sampled_from([0.0, 1e-12, 0.3, -2.0, 1.0, 5.0]), min_size=1, max_size=6),
    seed=seeds,
)
def test_diagonal_equals_pinv(values, seed):
    diagonal = torch.tensor(values, dtype=torch.float64)
    factor = Dense(rcond=1e-9).prepare(Diagonal(diagonal))
    residual = normal(seed, 3, len(values))
    expected = residual.numpy() @ np.linalg.pinv(np.diag(values), rcond=1e-9).T
    assert relative(factor.solve(residual), expected) < 1e-12
    largest = max(map(abs, values))
    assert factor.spectrum.deficient == any(abs(v) <= 1e-9 * largest for v in values)


@given(values=st.lists(st.floats(-3, 3), min_size=1, max_size=6), damping=st.floats(0.01, 2))
def test_damped_diagonal(values, damping):
    diagonal = torch.tensor([*values, 3.0], dtype=torch.float64)
    residual = normal(0, len(diagonal))
    found = Dense(damping=damping).prepare(Diagonal(diagonal)).solve(residual)
    expected = damped_least_squares(np.diag(diagonal.numpy()), residual.numpy(), damping)
    assert relative(found, expected) < 1e-9


def test_condition_of_a_diagonal():
    diagonal = torch.tensor([[4.0], [-0.5]], dtype=torch.float64)
    spectrum = Dense().prepare(Diagonal(diagonal)).spectrum
    assert spectrum.condition == pytest.approx(np.linalg.cond(np.diag([4.0, -0.5])))
    assert Dense().prepare(Diagonal(torch.zeros(2))).spectrum.condition == math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_diagonal_keeps_the_precision_of_the_residual(dtype):
    # A number has no precision of its own: it must neither coarsen nor widen what it is applied to.
    solved = torch.promote_types(dtype, torch.float32)
    for three in (torch.tensor(3.0, dtype=torch.float64), torch.full((4,), 3)):
        found = Dense().prepare(Diagonal(three)).solve(torch.ones(4, dtype=dtype))
        assert found.dtype == solved
        assert torch.equal(found, torch.full((4,), 1 / 3, dtype=solved))


def test_a_diagonal_of_whole_numbers_is_solved_in_the_precision_of_the_residual():
    factor = Dense().prepare(Diagonal(torch.tensor([3, 7])))
    found = factor.solve(torch.ones(2, dtype=torch.float64))
    np.testing.assert_allclose(found.numpy(), [1 / 3, 1 / 7], rtol=1e-15)


def test_a_factor_tells_its_memory():
    assert Dense().prepare(Matrix(torch.ones(3, 5))).nbytes == 3 * 5 * 4


# Convolutions: written out, or a matrix a window.

either_way = st.sampled_from([lambda operator: operator, Transposed])


@given(drawn=convolutions(), way=either_way)
def test_an_operator_written_out_is_its_matrix(drawn, way):
    """The blocks of a block-diagonal matrix, where there are groups."""
    operator = way(drawn)
    matrices = write_out(operator)
    assert len(matrices) == drawn.groups
    assert relative(torch.block_diag(*matrices), matrix_of(operator)) < 1e-14
    assert written_out_bytes(operator) * drawn.groups == matrix_of(operator).nbytes


def test_an_operator_is_written_out_in_parts():
    operator = Convolution(normal(0, 1, 1, 3), (5000,), stride=(40,))
    assert relative(write_out(operator)[0], matrix_of(operator)) < 1e-14


@given(drawn=convolutions(), way=either_way, seed=seeds)
def test_a_convolution_equals_lstsq(drawn, way, seed):
    operator = way(drawn)
    matrix = matrix_of(operator)
    residual = normal(seed, 2, *operator.out_shape)
    singular = np.linalg.svd(matrix, compute_uv=False)
    assume(((singular < 1e-10 * singular[0]) | (singular > 1e-6 * singular[0])).all())
    found = Dense(rcond=1e-8).prepare(operator).solve(residual)
    expected = np.linalg.lstsq(matrix, residual.flatten(1).numpy().T, rcond=1e-8)[0].T
    assert found.shape == (2, *operator.in_shape)
    assert relative(found.flatten(1), expected) < 1e-8


@given(drawn=convolutions(), way=either_way, seed=seeds, damping=st.floats(1e-3, 1))
def test_a_damped_convolution(drawn, way, seed, damping):
    operator = way(drawn)
    residual = normal(seed, 2, *operator.out_shape)
    found = Dense(damping=damping).prepare(operator).solve(residual).flatten(1)
    columns = residual.flatten(1).numpy().T
    assert relative(found, damped_least_squares(matrix_of(operator), columns, damping).T) < 1e-9


@st.composite
def patches(draw):
    """Draw a convolution whose windows lie apart, with gaps between them and at the end."""
    drawn = draw(convolutions(padded=False))
    gaps = draw(st.lists(st.integers(0, 1), min_size=3, max_size=3))
    stride = tuple(e + gap for e, gap in zip(drawn.extent, gaps, strict=False))
    size = tuple(e + draw(st.integers(0, 5)) for e in drawn.extent)
    return replace(drawn, stride=stride, size=size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(drawn=patches(), way=either_way, seed=seeds)
def test_windows_apart_have_a_matrix_each(dtype, drawn, way, seed):
    operator = way(drawn)
    matrix = matrix_of(operator)
    kept = np.linalg.svd(matrix, compute_uv=False)
    kept = kept[kept > 1e-9 * kept[0]]
    assume(kept[0] < 30 * kept[-1])
    residual = normal(seed, 2, *operator.out_shape)
    factor = Dense().prepare(operator.to(dtype))
    found = factor.solve(residual.to(dtype))
    assert isinstance(factor, WindowFactor)
    expected = residual.flatten(1).numpy() @ np.linalg.pinv(matrix, rcond=1e-6).T
    assert relative(found.flatten(1), expected) < (1e-10 if dtype == torch.float64 else 1e-4)
    assert factor.nbytes == drawn.kernel.numel() * dtype.itemsize


# Long matrices: the Gram matrix of the short side.


def with_condition(seed, m, n, condition):
    """Return a matrix in single precision whose singular values spread evenly in logarithm."""
    left, _, right = torch.linalg.svd(normal(seed, m, n), full_matrices=False)
    exponents = torch.linspace(0, -np.log10(condition), min(m, n), dtype=torch.float64)
    return ((left * 10**exponents) @ right).float()


@pytest.mark.parametrize("shape", [(256, 512), (512, 256)])
@pytest.mark.parametrize("condition", [3, 1e3])
@pytest.mark.parametrize("damping", [0.0, 1e-2])
def test_long_matrices_in_single_precision(shape, condition, damping):
    matrix = with_condition(0, *shape, condition)
    residual = normal(1, 3, shape[0]).float()
    factor = Dense(damping=damping).prepare(Matrix(matrix))
    columns = residual.double().numpy().T
    expected = damped_least_squares(matrix.double().numpy(), columns, damping).T
    # As close as the rounded pseudo-inverse would be: the condition number enters once. Damping is
    # relative to the largest singular value, which is estimated.
    slack = 1e-2 if damping else 0
    assert relative(factor.solve(residual), expected) < 2e-6 * max(condition, 10) + slack
    squared = (1 + damping) / (condition**-2 + damping)
    assert isinstance(factor, GramFactor if squared < 1e3 else MatrixFactor)


def test_a_long_matrix_is_not_kept_twice():
    matrix = with_condition(0, 256, 600, 3)
    factor = Dense().prepare(Matrix(matrix))
    assert factor.nbytes == 256 * 256 * 4
    assert factor.matrix.data_ptr() == matrix.data_ptr()


def test_a_long_deficient_matrix():
    matrix = (normal(0, 256, 20) @ normal(1, 20, 520)).float()
    residual = normal(2, 3, 256).float()
    factor = Dense().prepare(Matrix(matrix))
    assert factor.spectrum.deficient
    expected = residual.double().numpy() @ np.linalg.pinv(matrix.double().numpy(), rcond=1e-5).T
    assert relative(factor.solve(residual), expected) < 1e-4
