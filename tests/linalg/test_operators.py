"""Operators: the transpose is the adjoint, and the action is that of the dense matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import jacobian, normal, relative

from frfx.linalg import Convolution, Diagonal, Matrix

seeds = st.integers(0, 2**31)
sizes = st.integers(1, 6)


def dot_test(operator, x, y):
    """Assert `<A x, y> == <x, A^T y>`, and that `A x` and `A^T y` fit y and x."""
    forward, backward = operator.mv(x), operator.rmv(y)
    assert forward.shape == y.shape
    assert backward.shape == x.shape
    left, right = (forward * y).sum().item(), (x * backward).sum().item()
    scale = float(forward.norm() * y.norm() + x.norm() * backward.norm())
    assert abs(left - right) <= 1e-12 * (scale + 1)


@given(seed=seeds, m=sizes, n=sizes, leading=st.sampled_from([(), (3,), (2, 3)]))
def test_matrix_dot_test(seed, m, n, leading):
    matrix = Matrix(normal(seed, m, n))
    dot_test(matrix, normal(seed + 1, *leading, n), normal(seed + 2, *leading, m))


@given(seed=seeds, m=sizes, n=sizes)
def test_matrix_acts_on_the_last_dimension(seed, m, n):
    matrix, x = normal(seed, m, n), normal(seed + 1, 3, n)
    expected = np.stack([matrix.numpy() @ row for row in x.numpy()])
    assert relative(Matrix(matrix).mv(x), expected) < 1e-12


@given(seed=seeds, shape=st.sampled_from([(), (4,), (3, 1), (3, 4)]))
def test_diagonal_dot_test(seed, shape):
    diagonal = Diagonal(normal(seed, *shape))
    dot_test(diagonal, normal(seed + 1, 2, 3, 4), normal(seed + 2, 2, 3, 4))


@st.composite
def convolutions(draw):
    """Draw a kernel and the spatial size of its operand, in 1 to 3 dimensions."""
    dims = draw(st.integers(1, 3))
    window = [draw(st.integers(1, 3)) for _ in range(dims)]
    size = tuple(k + draw(st.integers(0, 3)) for k in window)
    channels = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return normal(draw(seeds), *channels, *window), size


@given(drawn=convolutions(), seed=seeds)
def test_convolution_dot_test(drawn, seed):
    kernel, size = drawn
    valid = [n - k + 1 for n, k in zip(size, kernel.shape[2:], strict=True)]
    x = normal(seed, 2, kernel.shape[1], *size)
    dot_test(Convolution(kernel, size), x, normal(seed + 1, 2, kernel.shape[0], *valid))


def test_convolution_is_the_sum_of_eq_11():
    kernel, x = normal(0, 2, 3, 2, 3), normal(1, 1, 3, 4, 5)
    result = Convolution(kernel, (4, 5)).mv(x)
    expected = np.zeros((1, 2, 3, 3))
    for n, i, j in np.ndindex(2, 3, 3):
        expected[0, n, i, j] = (x[0, :, i : i + 2, j : j + 3] * kernel[n]).sum()
    assert relative(result, expected) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transposed_jacobian(dtype):
    operator = Convolution(normal(0, 3, 2, 3, 2, dtype=dtype), (4, 4))
    doubled = Convolution(operator.kernel.double(), operator.size)
    y = normal(1, 1, 3, 2, 3, dtype=dtype)
    matrix = jacobian(doubled.mv, torch.zeros(1, 2, 4, 4))
    assert relative(operator.rmv(y).ravel(), matrix.T @ y.double().numpy().ravel()) < 1e-6
