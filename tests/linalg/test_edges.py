"""Gram matrices of padded convolutions behind their model, against the convolutions themselves."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from frfx.linalg import Convolution, Iterative, Transposed, edges
from frfx.linalg.edges import Edges
from frfx.linalg.spectral import SpectralFactor
from tests.geometries import seeds
from tests.oracles import normal, relative


@st.composite
def padded(draw):
    """Draw a convolution of an image that is larger than two windows."""
    dims = draw(st.sampled_from([1, 1, 2, 2, 3]))

    def each(*choices: int) -> tuple[int, ...]:
        return tuple(draw(st.sampled_from(choices)) for _ in range(dims))

    window, stride = each(1, 2, 3, 4) if dims < 3 else each(1, 2, 3), each(1, 1, 2, 3)
    dilation, size = each(1, 1, 2), each(8, 11, 20) if dims < 3 else each(8, 9)
    padding = tuple(zip(each(0, 1, 2, 3), each(0, 1, 2, 3), strict=True))
    groups = draw(st.sampled_from([1, 1, 2]))
    kernel = normal(draw(seeds), groups * draw(st.integers(1, 3)), draw(st.integers(1, 2)), *window)
    operator = Convolution(kernel, size, stride, padding, dilation, groups)
    assume(all(n >= 1 for n in operator.out_size))
    return operator


def image_of(operator, side, z):
    """Return the product with a Gram matrix by the operator itself."""
    mv, rmv = operator.mv, operator.rmv
    return mv(rmv(z)) if side == "rows" else rmv(mv(z))


@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(operator=padded(), side=st.sampled_from(["rows", "columns"]), seed=seeds)
def test_the_product_behind_the_model_is_the_operators(operator, side, seed):
    model = SpectralFactor(operator, cutoff=-1.0, damping=1e-2, gram=side)
    with patch.object(edges, "_WORTH", 100):
        found = Edges.of(operator, side, model.shift)
    assume(found is not None)
    r = normal(seed, 2, *(operator.out_shape if side == "rows" else operator.in_shape))
    z = model.solve(r)
    assert relative(found.product(z, r), image_of(operator, side, z)) < 1e-10


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("channels", [(2, 8), (8, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_conjugate_gradients_take_the_same_steps(channels, stride, transposed):
    """Whether the Gram matrix is that of the rows or the columns."""
    kernel = 0.3 * normal(0, *channels, 3, 3)
    kernel[:2, :2, 1, 1] += 3 * torch.eye(2)
    operator = Convolution(kernel, (36, 33), (stride, 1), ((1, 1), (1, 1)))
    if transposed:
        operator = Transposed(operator)
    solver = Iterative(tolerance=1e-8, max_steps=200)
    factor, plain = solver.prepare(operator), solver.prepare(operator)
    assert factor.edges is not None
    plain.edges = None
    residual = operator.mv(normal(1, 5, *operator.in_shape))
    residual[:2] = operator.mv(operator.rmv(residual[:2]))  # easier: they leave the batch first
    residual[2] = 0
    found, expected = factor.solve(residual), plain.solve(residual)
    assert factor.convergence.converged.all()
    assert factor.convergence.steps.tolist() == plain.convergence.steps.tolist()
    assert relative(found, expected) < 1e-9
    left, right = operator.rmv(residual - operator.mv(found)), operator.rmv(residual)
    assert float(left.norm()) < 1e-6 * float(right.norm())


def test_single_precision_keeps_its_word():
    kernel = 0.3 * normal(0, 4, 2, 3, 3, dtype=torch.float32)
    operator = Convolution(kernel, (32, 32), padding=((1, 1), (1, 1)))
    residual = normal(1, 3, *operator.out_shape, dtype=torch.float32)
    factor = Iterative().prepare(operator)
    assert factor.edges is not None
    found = factor.solve(residual)
    right = operator.rmv(residual)
    left = (operator.rmv(residual - operator.mv(found))).flatten(1).norm(dim=1)
    told = factor.convergence.residual
    torch.testing.assert_close(left / right.flatten(1).norm(dim=1), told, rtol=1e-2, atol=1e-4)
    assert Iterative(tolerance=1e-6).prepare(operator).edges is None  # rounding would spoil it


@pytest.mark.parametrize(
    "changes",
    [
        {"padding_mode": "reflect"},
        {"padding": ((-1, 1), (1, 1))},
        {"size": (6, 6)},  # most of it is edge
        {"size": (2, 2)},
    ],
)
def test_where_there_are_none(changes):
    operator = Convolution(normal(0, 2, 2, 3, 3), (32, 32), padding=((1, 1), (1, 1)))
    assert Edges.of(operator, "columns", 0.1) is not None
    for side in ("rows", "columns"):
        assert Edges.of(replace(operator, **changes), side, 0.1) is None


def test_a_window_of_one_entry_has_no_edges():
    operator = Convolution(normal(0, 2, 2, 1, 1), (9, 9), padding=((1, 0), (0, 2)))
    model = SpectralFactor(operator, cutoff=-1.0, damping=1e-2, gram="columns")
    found = Edges.of(operator, "columns", model.shift)
    assert found.strips == ()
    r = normal(1, 2, *operator.in_shape)
    z = model.solve(r)
    assert relative(found.product(z, r), image_of(operator, "columns", z)) < 1e-12
