"""The dense solver: factors of matrices and diagonals against dense float64 linear algebra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import damped_least_squares, normal, relative

from frfx.linalg import Dense, Diagonal, Matrix

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
    assert np.linalg.matrix_rank(expected, rtol=1e-6) == rank
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
