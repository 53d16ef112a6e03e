"""Separable operators and their pseudo-inverses against the dense Kronecker product."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frfx.linalg import Dense, Separable
from frfx.linalg.separable import FilteredFactor, SeparableFactor
from tests.oracles import damped_least_squares, normal, relative

seeds = st.integers(0, 2**31)


@st.composite
def operators(draw, spread=0.0):
    """Draw one to three matrices of any shapes and ranks.

    Args:
        spread: The singular values of each are between 1 and 10 to minus this.
    """
    matrices = []
    for seed in draw(st.lists(seeds, min_size=1, max_size=3)):
        m, n = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        rank = draw(st.integers(1, min(m, n)))
        left, _ = torch.linalg.qr(normal(seed, m, rank))
        right, _ = torch.linalg.qr(normal(seed + 1, n, rank))
        singular = 10 ** (-spread * torch.linspace(0, 1, rank, dtype=torch.float64))
        matrices.append((left * singular) @ right.mT)
    return Separable(tuple(matrices))


def kronecker(operator):
    """Return the operator as one dense matrix."""
    return functools.reduce(np.kron, [matrix.numpy() for matrix in operator.matrices])


def apply(matrix, x, shape):
    """Apply a dense matrix to the last dimensions of (2, 3, *size)."""
    return (x.reshape(2, 3, -1).numpy() @ matrix.T).reshape(2, 3, *shape)


def sizes(operator):
    """Return the spatial sizes of what goes in and of what comes out."""
    return [[m.shape[side] for m in operator.matrices] for side in (1, 0)]


@given(operator=operators(), seed=seeds)
def test_acts_as_the_kronecker_product(operator, seed):
    before, after = sizes(operator)
    x, y = normal(seed, 2, 3, *before), normal(seed + 1, 2, 3, *after)
    dense = kronecker(operator)
    assert relative(operator.mv(x), apply(dense, x, after)) < 1e-12
    assert relative(operator.rmv(y), apply(dense.T, y, before)) < 1e-12


def test_acts_in_the_precision_of_the_operand():
    operator = Separable((normal(0, 3, 2), normal(1, 2, 4)))
    assert operator.mv(torch.ones(1, 1, 2, 4)).dtype == torch.float32
    assert operator.rmv(torch.ones(1, 1, 3, 2)).dtype == torch.float32


@given(operator=operators(spread=1), seed=seeds)
def test_the_pseudo_inverse_is_one_matrix_a_dimension(operator, seed):
    before, after = sizes(operator)
    residual = normal(seed, 2, 3, *after)
    factor = Dense().prepare(operator)
    assert isinstance(factor, SeparableFactor)
    expected = np.linalg.pinv(kronecker(operator), rcond=1e-10)
    assert relative(factor.solve(residual), apply(expected, residual, before)) < 1e-10


@given(operator=operators(spread=2), seed=seeds, rcond=st.floats(1e-3, 0.9))
def test_the_cutoff_is_relative_to_the_largest_product(operator, seed, rcond):
    before, after = sizes(operator)
    dense = kronecker(operator)
    singular = np.linalg.svd(dense, compute_uv=False)
    if (abs(np.log(np.maximum(singular, 1e-30) / singular[0] / rcond)) < 1e-6).any():
        return  # at the cutoff itself, rounding decides
    residual = normal(seed, 2, 3, *after)
    found = Dense(rcond=rcond).prepare(operator).solve(residual)
    expected = np.linalg.pinv(dense, rcond=rcond)
    assert relative(found, apply(expected, residual, before)) < 1e-10


@given(operator=operators(spread=2), seed=seeds, damping=st.floats(1e-4, 10))
def test_damping(operator, seed, damping):
    before, after = sizes(operator)
    residual = normal(seed, 2, 3, *after)
    factor = Dense(damping=damping).prepare(operator)
    assert isinstance(factor, FilteredFactor)
    columns = residual.reshape(6, -1).T.numpy()
    expected = damped_least_squares(kronecker(operator), columns, damping).T
    assert relative(factor.solve(residual), expected.reshape(2, 3, *before)) < 1e-9


def test_a_cutoff_between_products_needs_the_whole_spectrum():
    """Of the products 1, 0.5, 0.5, 0.25 the last alone is cut: no cutoff in one dimension is."""
    half = torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64))
    factor = Dense(rcond=0.3).prepare(Separable((half, half)))
    assert isinstance(factor, FilteredFactor)
    assert factor.spectrum.deficient
    solved = factor.solve(torch.ones(1, 1, 2, 2, dtype=torch.float64))
    np.testing.assert_allclose(solved[0, 0].numpy(), [[1, 2], [2, 0]], atol=1e-14)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_zeros_give_zeros(damping):
    zero = Separable((torch.zeros(2, 3).double(), torch.ones(1, 2).double()))
    found = Dense(damping=damping).prepare(zero)
    assert torch.equal(found.solve(torch.ones(1, 1, 2, 1)), torch.zeros(1, 1, 3, 2))
    assert found.spectrum.condition == float("inf")
    assert found.spectrum.deficient


def test_a_cutoff_of_zero_does_not_let_rounding_through():
    twice = normal(0, 4, 2)
    operator = Separable((torch.cat([twice, twice], 1), normal(1, 2, 2)))
    assert np.linalg.svd(kronecker(operator), compute_uv=False).min() > 0  # to rounding only
    factor = Dense(rcond=0.0).prepare(operator)
    expected = np.linalg.pinv(kronecker(operator), rcond=1e-10)
    residual = normal(2, 2, 3, 4, 2)
    assert relative(factor.solve(residual), apply(expected, residual, (4, 2))) < 1e-10


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize(
    ("given", "solved"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_solves_in_single_at_least(given, solved, damping):
    operator = Separable((normal(0, 3, 2), normal(1, 2, 4)), given)
    factor = Dense(damping=damping).prepare(operator)
    residual = normal(2, 2, 3, 3, 2, dtype=given)
    found = factor.solve(residual)
    assert found.dtype == solved
    columns = residual.double().reshape(6, -1).T.numpy()
    expected = damped_least_squares(kronecker(operator), columns, damping).T
    assert relative(found, expected.reshape(2, 3, 2, 4)) < 50 * torch.finfo(solved).eps


def test_the_cutoff_is_that_of_the_operands_precision():
    """A singular value of 1e-8 is one in double, and rounding in single."""
    diagonal = torch.diag(torch.tensor([1.0, 1e-8], dtype=torch.float64))
    assert not Dense().prepare(Separable((diagonal,))).spectrum.deficient
    single = Dense().prepare(Separable((diagonal,), torch.float32))
    assert single.spectrum.deficient
    assert torch.equal(single.solve(torch.ones(2)), torch.tensor([1.0, 0.0]))


def test_condition():
    operator = Separable((normal(0, 3, 2), normal(1, 3, 4)))
    spectrum = Dense().prepare(operator).spectrum
    first, second = (np.linalg.cond(matrix.numpy()) for matrix in operator.matrices)
    assert spectrum.condition == pytest.approx(first * second)
    assert not spectrum.deficient


def test_a_factor_tells_its_memory():
    operator = Separable((torch.ones(2, 5), normal(0, 3, 3).float()))
    assert Dense().prepare(operator).nbytes == (2 * 5 + 3 * 3) * 4
    damped = Dense(damping=0.1).prepare(operator)
    assert damped.nbytes == (2 * (2 + 5) + 3 * (3 + 3) + 2 * 3) * 4


def test_dimensions_that_stay_cost_nothing():
    factor = Dense().prepare(Separable((torch.eye(5).double(), torch.ones(1, 2).double())))
    assert factor.nbytes == 2 * 8
    residual = normal(0, 2, 3, 5, 1)
    assert relative(factor.solve(residual), (residual / 2).expand(2, 3, 5, 2)) < 1e-15
