"""Conjugate gradients against dense pseudo-inverses, and on what they cannot solve."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from frfx.linalg import Convolution, Iterative, Matrix, Transposed, fourier
from frfx.linalg.conjugate_gradients import conjugate_gradients
from frfx.linalg.iterative import MAX_STEPS, TOLERANCE
from tests.geometries import convolutions, matrix_of, seeds
from tests.oracles import damped_least_squares, normal, relative

either_way = st.sampled_from([lambda operator: operator, Transposed])
well = convolutions(dominant=3.0)
exact = Iterative(tolerance=1e-10, max_steps=300)
DTYPES = (torch.float32, torch.float64)


def by_pinv(matrix, residual, shape):
    """Return the least-norm least-squares deviation, without what rounding makes of zero."""
    inverse = np.linalg.pinv(matrix, rcond=1e-9)
    return (residual.double().flatten(1).numpy() @ inverse.T).reshape(len(residual), *shape)


def condition(matrix):
    """Return the condition number, by all singular values of the short side."""
    singular = np.linalg.svd(matrix, compute_uv=False)
    return singular[0] / singular[-1] if singular[-1] > 0 else math.inf


@given(drawn=well, way=either_way, seed=seeds)
def test_equals_the_pseudo_inverse(drawn, way, seed):
    operator = way(drawn)
    matrix = matrix_of(operator)
    assume(condition(matrix) < 50)
    residual = normal(seed, 3, *operator.out_shape)
    factor = exact.prepare(operator)
    found = factor.solve(residual)
    assert found.shape == (3, *operator.in_shape)
    assert relative(found, by_pinv(matrix, residual, operator.in_shape)) < 1e-7
    assert factor.convergence.converged.all()


@given(drawn=well, way=either_way, seed=seeds)
def test_single_precision(drawn, way, seed):
    operator = way(drawn)
    matrix = matrix_of(operator)
    assume(condition(matrix) < 20)
    residual = normal(seed, 2, *operator.out_shape, dtype=torch.float32)
    factor = Iterative(tolerance=1e-5, max_steps=300).prepare(operator.to(torch.float32))
    found = factor.solve(residual)
    assert found.dtype == torch.float32
    assert relative(found, by_pinv(matrix, residual, operator.in_shape)) < 2e-3


@given(drawn=convolutions(), way=either_way, seed=seeds, damping=st.floats(1e-3, 1))
def test_damping(drawn, way, seed, damping):
    """The parameter is relative to the model's largest singular value, which the factor tells."""
    operator = way(drawn)
    matrix = matrix_of(operator)
    residual = normal(seed, 2, *operator.out_shape)
    factor = replace(exact, damping=damping).prepare(operator)
    relative_damping = damping * (factor.spectrum.largest / np.linalg.norm(matrix, 2)) ** 2
    columns = residual.flatten(1).numpy().T
    expected = damped_least_squares(matrix, columns, relative_damping).T
    assert relative(factor.solve(residual).flatten(1), expected) < 1e-6
    assert factor.convergence.converged.all()


@given(drawn=well, seed=seeds)
def test_the_largest_singular_value_is_that_of_the_model(drawn, seed):
    """No less than the convolution's own, of which the model is larger; both within the kernel's.

    Zero padding only drops columns of the model's matrix; copies may add to each other.
    """
    assume(drawn.padding_mode == "zeros")
    largest = Iterative().prepare(drawn).spectrum.largest
    assert largest >= np.linalg.norm(matrix_of(drawn), 2) * (1 - 1e-9)
    assert largest <= drawn.kernel.norm() * math.sqrt(math.prod(drawn.kernel.shape[2:])) * 1.001


@given(drawn=convolutions(), way=either_way, seed=seeds)
def test_wide_operators_have_the_deviation_in_their_row_space(drawn, way, seed):
    """Least-norm at every step, converged or not: nothing that the operator does not see moves."""
    operator = way(drawn)
    assume(math.prod(operator.out_shape) <= math.prod(operator.in_shape))
    matrix = matrix_of(operator)
    assume(condition(matrix) < 1e6)  # else rounding moves what it does not see, too
    found = Iterative(max_steps=3).prepare(operator).solve(normal(seed, 2, *operator.out_shape))
    onto_rows = np.linalg.pinv(matrix, rcond=1e-12) @ matrix
    flat = found.flatten(1).numpy()
    assert relative(flat @ onto_rows, flat) < 1e-9


@st.composite
def spoiled(draw):
    """Draw a convolution that is singular, or scaled badly by channel."""
    operator = draw(convolutions())
    kernel = operator.kernel.clone()
    how = draw(st.sampled_from(["zero", "zero rows", "zero taps", "twice", "rank one", "scaled"]))
    if how == "zero":
        kernel.zero_()
    elif how == "zero rows":
        kernel[:: draw(st.integers(1, 2))] = 0
    elif how == "zero taps":
        kernel[..., :1] = 0
    elif how == "twice":
        kernel[:] = kernel[:1]
    elif how == "rank one":
        kernel = kernel.sum(1, keepdim=True) * kernel.sum(0, keepdim=True)
    else:
        powers = st.sampled_from([-30, -15, -8, -3, 0, 3, 8, 15, 30])
        for dim in (0, 1):
            count = kernel.shape[dim]
            exponents = torch.tensor(draw(st.lists(powers, min_size=count, max_size=count)))
            half = 10.0 ** (exponents.double() / 2)
            kernel *= half.view(-1, *[1] * (kernel.ndim - 1 - dim))
    return draw(either_way)(operator.with_kernel(kernel))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("solver", [Iterative(), exact, Iterative(max_steps=1)])
@given(drawn=spoiled(), seed=seeds)
def test_never_worse_than_no_deviation(solver, dtype, drawn, seed):
    """Singular, or of 60 orders of magnitude: finite, and no larger an objective than at zero."""
    operator = drawn.to(dtype)
    residual = normal(seed, 2, *operator.out_shape, dtype=dtype)
    factor = solver.prepare(operator)
    found = factor.solve(residual)
    assert torch.isfinite(found).all()
    doubled = drawn.to(dtype).to(torch.float64)
    left = (doubled.mv(found.double()) - residual.double()).flatten(1).norm(dim=1)
    before = residual.double().flatten(1).norm(dim=1)
    slack = 1e-3 if dtype == torch.float32 else 1e-9
    assert (left <= before * (1 + slack)).all()
    assert torch.isfinite(factor.convergence.residual).all()
    assert (factor.convergence.residual <= 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("scale", "size"), [(1e-30, 1e-20), (1e-15, 1.0), (1.0, 1e-25), (1.0, 1e25), (1e30, 1e20)]
)
@given(drawn=well, way=either_way, seed=seeds)
def test_scale_does_not_matter(scale, size, dtype, drawn, way, seed):
    assume(condition(matrix_of(drawn)) < 20)
    operator = way(drawn)
    solver = Iterative(tolerance=1e-4, max_steps=1000)
    plain = solver.prepare(operator.to(dtype))
    conv = drawn.with_kernel(drawn.kernel * scale).to(dtype)
    scaled = solver.prepare(way(conv))
    residual = normal(seed, 2, *operator.out_shape)
    expected = plain.solve(residual.to(dtype)).double()
    found = scaled.solve((residual * size).to(dtype)).double()
    assert relative(found * (scale / size), expected) < 1e-3
    assert scaled.convergence.converged.all()
    assert scaled.spectrum.largest == pytest.approx(plain.spectrum.largest * scale, rel=1e-3)


@given(drawn=well, seed=seeds, extra=st.integers(1, 3))
def test_an_inconsistent_residual_is_projected(drawn, seed, extra):
    """More outputs than inputs: what the operator cannot reach does not disturb what it can."""
    more = 1 + extra * math.prod(drawn.stride)
    kernel = drawn.kernel.repeat_interleave(more, 0)
    operator = drawn.with_kernel(kernel + normal(seed, *kernel.shape))
    assume(math.prod(operator.out_shape) > math.prod(operator.in_shape))
    matrix = matrix_of(operator)
    assume(condition(matrix) < 30)
    residual = normal(seed, 2, *operator.out_shape)
    beyond = np.eye(len(matrix)) - matrix @ np.linalg.pinv(matrix)
    unreachable = residual.flatten(1).numpy() @ beyond
    worse = residual + 10 * torch.from_numpy(unreachable).view_as(residual)
    factor = replace(exact, max_steps=3000).prepare(operator)
    assert relative(factor.solve(worse), factor.solve(residual)) < 1e-7


def test_a_residual_out_of_reach_gives_nothing():
    matrix = torch.tensor([[1.0, 0], [0, 1], [0, 0]])
    factor = Iterative().prepare(Matrix(matrix))
    assert torch.equal(factor.solve(torch.tensor([[0.0, 0.0, 5.0]])), torch.zeros(1, 2))
    assert factor.convergence.converged.all()


@given(drawn=spoiled(), seed=seeds)
def test_a_residual_of_zero_gives_zero(drawn, seed):
    factor = Iterative().prepare(drawn)
    residual = normal(seed, 3, *drawn.out_shape)
    residual[1] = 0
    found = factor.solve(residual)
    assert torch.equal(found[1], torch.zeros(drawn.in_shape).double())
    assert factor.convergence.steps[1] == 0
    assert factor.convergence.converged[1]
    nothing = factor.solve(torch.zeros_like(residual))
    assert torch.equal(nothing, torch.zeros(3, *drawn.in_shape).double())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("padding", [1, 0])
def test_what_is_not_finite_stays_so_and_where_it_is(padding, value):
    pairs = ((padding, padding),)
    operator = Convolution(normal(0, 3, 3, 3) + 3 * torch.eye(3)[..., None], (8,), padding=pairs)
    residual = normal(1, 3, *operator.out_shape)
    expected = Iterative().prepare(operator).solve(residual)
    residual[1, 0, 0] = value
    found = Iterative().prepare(operator).solve(residual)
    assert not torch.isfinite(found[1]).all()
    assert relative(found[[0, 2]], expected[[0, 2]]) < 1e-12


# A batch.


def mixed(operator, seed, count=6):
    """Return residuals that take unlike numbers of steps: smooth, rough, zero and tiny ones."""
    residual = normal(seed, count, *operator.out_shape, dtype=operator.kernel.dtype)
    residual[0] = operator.mv(operator.rmv(residual[:1]))[0]
    residual[1] = 0
    residual[2] *= 1e-12
    return residual


@given(drawn=convolutions(dominant=1.0), way=either_way, seed=seeds)
def test_a_sample_gets_in_a_batch_what_it_gets_alone(drawn, way, seed):
    operator = way(drawn)
    residual = mixed(operator, seed)
    factor = Iterative(tolerance=1e-3, max_steps=3).prepare(operator)  # later, rounding speaks
    together = factor.solve(residual)
    convergence = factor.convergence
    assume(condition(matrix_of(operator)) < 100)
    for i, sample in enumerate(residual):
        alone = factor.solve(sample[None])[0]
        assert relative(together[i], alone) < 1e-6
        assert factor.convergence.steps[0] == convergence.steps[i]


@given(drawn=well, way=either_way, seed=seeds)
def test_the_same_in_single_precision(drawn, way, seed):
    operator = way(drawn).to(torch.float32)
    assume(condition(matrix_of(way(drawn))) < 20)
    residual = mixed(operator, seed)
    factor = Iterative(tolerance=2e-5, max_steps=1000).prepare(operator)
    together = factor.solve(residual)
    alone = torch.cat([factor.solve(sample[None]) for sample in residual])
    for i in range(len(residual)):  # each on the scale of its own
        assert relative(together[i], alone[i]) < 1e-3


def test_samples_stop_each_at_its_own_step_and_leave_the_batch():
    """A diagonal of k different values is solved in k steps: one sample sees 1 value, one 6."""
    diagonal = torch.diag(torch.tensor([1.0, 2, 3, 4, 5, 6], dtype=torch.float64))
    residual = torch.zeros(7, 6, dtype=torch.float64)
    for seen in range(1, 7):
        residual[seen, :seen] = 1
    batches = []
    matrix = diagonal @ diagonal.mT

    def counted(x):
        batches.append(len(x))
        return x @ matrix

    found, convergence = conjugate_gradients(
        counted, residual, lambda x: x, tolerance=1e-10, max_steps=50
    )
    assert convergence.steps.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert convergence.converged.all()
    assert relative(found, residual @ torch.linalg.inv(matrix)) < 1e-9
    assert batches[0] == 7
    assert batches[-1] <= 3  # half of them have gone, again and again
    assert len(batches) == 6


def test_the_last_step_is_reported():
    operator = Convolution(normal(0, 4, 4, 3, 3), (12, 12), padding=((1, 1), (1, 1)))
    residual = normal(1, 2, *operator.out_shape)
    factor = Iterative(tolerance=1e-8, max_steps=2).prepare(operator)
    factor.solve(residual)
    convergence = factor.convergence
    assert not convergence.converged.any()
    assert (convergence.residual > 1e-8).all()
    assert (convergence.steps <= 2).all()


@given(drawn=well, way=either_way, seed=seeds)
def test_the_residual_is_that_of_the_normal_equations(drawn, way, seed):
    operator = way(drawn)
    matrix = matrix_of(operator)
    assume(condition(matrix) < 30)
    residual = normal(seed, 2, *operator.out_shape)
    factor = Iterative().prepare(operator)
    found = factor.solve(residual).flatten(1).numpy()
    flat = residual.flatten(1).numpy()
    left, right = flat - found @ matrix.T, flat
    if not factor.dual:
        left, right = left @ matrix, right @ matrix
    expected = np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
    np.testing.assert_allclose(factor.convergence.residual.numpy(), expected, atol=1e-9)
    assert (expected <= TOLERANCE).all() == bool(factor.convergence.converged.all())


# Matrices.


@given(
    seed=seeds, m=st.integers(1, 8), n=st.integers(1, 8), leading=st.sampled_from([(3,), (2, 3)])
)
def test_matrices(seed, m, n, leading):
    matrix = normal(seed, m, n) * 0.2 + torch.eye(m, n)
    assume(condition(matrix.numpy()) < 30)
    residual = normal(seed + 1, *leading, m)
    factor = exact.prepare(Matrix(matrix))
    found = factor.solve(residual)
    assert found.shape == (*leading, n)
    assert relative(found, residual.numpy() @ np.linalg.pinv(matrix.numpy()).T) < 1e-7
    assert factor.convergence.converged.all()
    assert factor.spectrum.largest == pytest.approx(np.linalg.norm(matrix.numpy(), 2))


@given(seed=seeds, damping=st.floats(1e-3, 1))
def test_damped_matrices(seed, damping):
    matrix, residual = normal(seed, 4, 6), normal(seed + 1, 3, 4)
    found = replace(exact, damping=damping).prepare(Matrix(matrix)).solve(residual)
    expected = damped_least_squares(matrix.numpy(), residual.numpy().T, damping).T
    assert relative(found, expected) < 1e-7


# What is kept.


@pytest.mark.parametrize("pointwise", [True, False])
@given(drawn=well, way=either_way, seed=seeds)
def test_a_bound_on_the_memory_changes_nothing_else(pointwise, drawn, way, seed):
    operator = way(drawn)
    residual = normal(seed, 2, *operator.out_shape)
    kept = exact.prepare(operator)
    with pytest.MonkeyPatch.context() as patch:
        if not pointwise:
            patch.setattr(fourier, "_POINTWISE_UP_TO", 0)
        streamed = replace(exact, memory=0).prepare(operator)
    assume(kept.spectrum.condition < 100)
    assert streamed.preconditioner.map.streams
    found, expected = streamed.solve(residual), kept.solve(residual)
    # Of a system that has no solution (a window that wraps may come twice), rounding is left.
    solved = streamed.convergence.converged & kept.convergence.converged
    assert relative(found[solved], expected[solved]) < 1e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("consistent", [True, False])
def test_what_rounding_has_spoiled_has_not_converged(consistent, dtype):
    """Rows that depend on each other, and are asked for what they cannot give together."""
    kernel = normal(0, 4, 6, 3, 3)
    kernel[2] = 0.3 * kernel[0] + 0.7 * kernel[1]
    operator = Convolution(kernel, (7, 7), padding=((1, 1), (1, 1)))
    residual = normal(1, 4, *operator.out_shape)
    if consistent:
        residual = operator.mv(normal(1, 4, *operator.in_shape))
    tolerance = 1e-3
    factor = Iterative(tolerance=tolerance).prepare(operator.to(dtype))
    assert factor.dual
    found = factor.solve(residual.to(dtype))
    inverse = np.linalg.pinv(matrix_of(operator), rcond=1e-9)
    expected = (residual.flatten(1).numpy() @ inverse.T).reshape(found.shape)
    off = [relative(a, b) for a, b in zip(found, expected, strict=True)]
    assert bool(factor.convergence.converged.all()) == consistent
    assert (max(off) < 10 * tolerance) == consistent


def test_a_factor_tells_its_memory():
    assert Iterative().prepare(Matrix(torch.ones(3, 5))).nbytes == 3 * 5 * 4
    operator = Convolution(normal(0, 4, 4, 3, 3).float(), (9, 9), padding=((1, 1), (1, 1)))
    factor = Iterative().prepare(operator)
    assert factor.nbytes == factor.preconditioner.nbytes + operator.kernel.numel() * 4


def test_the_weights_are_not_kept():
    """A factor is of the weights as they were: what is written to them later does not show."""
    operator = Convolution(
        normal(0, 2, 2, 3) + 3 * torch.eye(2)[..., None], (7,), padding=((1, 1),)
    )
    factor, residual = Iterative().prepare(operator), normal(1, 2, *operator.out_shape)
    before = factor.solve(residual)
    operator.kernel.zero_()
    assert torch.equal(factor.solve(residual), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_solved_in_single(dtype):
    kernel = 0.1 * normal(0, 3, 3, 3, 3)
    kernel[..., 1, 1] += 2 * torch.eye(3)
    kernel = kernel.to(dtype)
    operator = Convolution(kernel, (6, 6), padding=((1, 1), (1, 1)))
    matrix = matrix_of(operator.to(torch.float64))
    assert condition(matrix) < 50
    residual = normal(1, 2, *operator.out_shape, dtype=dtype)
    found = Iterative(tolerance=1e-5, max_steps=200).prepare(operator).solve(residual)
    assert found.dtype == torch.float32
    assert relative(found, by_pinv(matrix, residual, operator.in_shape)) < 1e-3


def test_defaults():
    assert (Iterative().tolerance, Iterative().max_steps) == (TOLERANCE, MAX_STEPS)


@given(drawn=convolutions(), way=either_way, seed=seeds, damping=st.floats(1e-3, 1))
def test_the_gradient_is_the_transposed_solution(drawn, way, seed, damping):
    """And of a sample that is solved in no step, no less."""
    operator = way(drawn)
    matrix = matrix_of(operator)
    factor = replace(exact, damping=damping).prepare(operator)
    relative_damping = damping * (factor.spectrum.largest / np.linalg.norm(matrix, 2)) ** 2
    inverse = damped_least_squares(matrix, np.eye(len(matrix)), relative_damping)
    residual = normal(seed, 3, *operator.out_shape)
    residual[1] = 0
    cotangent = normal(seed + 1, 3, *operator.in_shape)
    solution = factor.solve(residual.requires_grad_())
    (found,) = torch.autograd.grad(solution, residual, cotangent)
    assert relative(found.flatten(1), cotangent.flatten(1).numpy() @ inverse) < 1e-6
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(residual.detach(), found)
        tangent = torch.autograd.forward_ad.unpack_dual(factor.solve(dual)).tangent
    assert relative(tangent.flatten(1), found.flatten(1).numpy() @ inverse.T) < 1e-6
