"""Operators: the transpose is the adjoint, and the action is that of the dense matrix."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from frfx.linalg import Convolution, Diagonal, Matrix, Transposed
from tests.geometries import convolutions, matrix_of, plain_sum, seeds
from tests.oracles import jacobian, normal, relative

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


@given(operator=convolutions(), seed=seeds)
def test_convolution_is_the_plain_sum_over_windows(operator, seed):
    x = normal(seed, 2, *operator.in_shape)
    result = operator.mv(x)
    assert result.shape == (2, *operator.out_shape)
    assert relative(result, plain_sum(operator, x.numpy())) < 1e-13


@given(operator=convolutions(), seed=seeds)
def test_convolution_dot_test(operator, seed):
    x, y = normal(seed, 2, *operator.in_shape), normal(seed + 1, 2, *operator.out_shape)
    dot_test(operator, x, y)
    dot_test(Transposed(operator), y, x)
    assert Transposed(operator).in_shape == operator.out_shape
    assert Transposed(operator).out_shape == operator.in_shape


@given(seed=seeds, groups=st.sampled_from([1, 2]), dims=st.integers(1, 3))
def test_many_channels_out_for_each_one_in(seed, groups, dims):
    """For which the transpose of a CPU may have a form of its own."""
    shape = (32 * groups, 1, *[3, 2, 2][:dims])
    operator = Convolution(normal(seed, *shape), (6, 5, 4)[:dims], (2,) * dims, groups=groups)
    dot_test(
        operator, normal(seed + 1, 2, *operator.in_shape), normal(seed + 2, 2, *operator.out_shape)
    )


@given(operator=convolutions(symmetric=True), seed=seeds)
def test_convolution_is_torchs_module(operator, seed):
    dims = len(operator.size)
    module = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        operator.in_channels,
        operator.out_channels,
        operator.kernel.shape[2:],
        stride=operator.stride,
        padding=tuple(before for before, _ in operator.padding),
        dilation=operator.dilation,
        groups=operator.groups,
        padding_mode=operator.padding_mode,
        bias=False,
        dtype=torch.float64,
    ).requires_grad_(False)
    module.weight.copy_(operator.kernel)
    x = normal(seed, 2, *operator.in_shape)
    assert torch.equal(operator.mv(x), module(x))


@given(
    operator=convolutions(modes=["zeros"], symmetric=True),
    seed=seeds,
    extra=st.lists(st.integers(0, 2), min_size=3, max_size=3),
)
def test_the_transpose_is_torchs_transposed_convolution(operator, seed, extra):
    dims = len(operator.size)
    limits = zip(extra, operator.stride, operator.dilation, strict=False)
    extra = tuple(min(e, max(s, d) - 1) for e, s, d in limits)
    # The smallest image that has these windows, without which torch refuses an empty result.
    assume(
        all(
            (n - 1) * s + reach + e > 2 * before
            for n, s, reach, e, (before, _) in zip(
                operator.out_size,
                operator.stride,
                operator.extent,
                extra,
                operator.padding,
                strict=True,
            )
        )
    )
    module = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1](
        operator.out_channels,
        operator.in_channels,
        operator.kernel.shape[2:],
        stride=operator.stride,
        padding=tuple(before for before, _ in operator.padding),
        output_padding=extra,
        dilation=operator.dilation,
        groups=operator.groups,
        bias=False,
        dtype=torch.float64,
    ).requires_grad_(False)
    module.weight.copy_(operator.kernel)
    y = normal(seed, 2, *operator.out_shape)
    expected = module(y)
    # What the output is padded by beyond the reach of a stride is cut from the padding.
    padding = tuple(
        (before, before - e // s * s)
        for (before, _), e, s in zip(operator.padding, extra, operator.stride, strict=True)
    )
    whole = replace(operator, size=tuple(expected.shape[2:]), padding=padding)
    assert whole.out_shape == operator.out_shape
    assert relative(Transposed(whole).mv(y), expected) < 1e-14
    dot_test(Transposed(whole), y, normal(seed + 1, *expected.shape))


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


@given(operator=convolutions())
def test_windows_that_share_no_entry_and_add_none(operator):
    ones = replace(
        operator.with_kernel(torch.ones_like(operator.kernel[:1, :1])),
        groups=1,
        padding_mode="zeros",
    )
    apart = matrix_of(ones).sum(0).max() <= 1 and not any(map(any, operator.padding))
    assert apart or not operator.disjoint
    if max(operator.dilation) == 1 and min(operator.out_size) > 1:
        assert operator.disjoint == apart


def test_to_another_type():
    operator = Convolution(normal(0, 2, 2, 3), (5,), padding=((1, 0),), padding_mode="reflect")
    single = Transposed(operator).to(torch.float32)
    assert single.kernel.dtype == torch.float32
    assert single.of.padding == operator.padding
    assert single.of.padding_mode == "reflect"
    assert Matrix(normal(0, 2, 2)).to(torch.float32).matrix.dtype == torch.float32
