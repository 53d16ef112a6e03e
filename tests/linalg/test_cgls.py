"""Conjugate gradients on products alone, against dense linear algebra in float64."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from frfx.linalg.bidiagonal import bidiagonalise, largest_singular_values, unstructured
from frfx.linalg.cgls import cgls, damped_cgls
from tests.oracles import Array, normal, relative

SYSTEMS = {
    "seed": st.integers(0, 10**6),
    "rows": st.integers(1, 8),
    "columns": st.integers(1, 8),
    "rank": st.integers(0, 8),
}
COUNT = 4


def matrices(seed: int, rows: int, columns: int, rank: int, condition: float = 20.0) -> Tensor:
    """Return a matrix a sample, each of the rank, with singular values from 1 down."""
    rank = min(rank, rows, columns)
    found = []
    for k in range(COUNT):
        left = torch.linalg.qr(normal(seed + 10 * k, rows, rows)).Q[:, :rank]
        right = torch.linalg.qr(normal(seed + 10 * k + 1, columns, columns)).Q[:, :rank]
        values = torch.logspace(0, -1, rank, base=condition, dtype=torch.float64)
        found.append(left * values @ right.mT)
    return torch.stack(found)


def products(matrix: Tensor) -> tuple:
    """Return what applies the matrices, one a sample, and what applies their transposes."""
    return (
        lambda v: (matrix @ v[..., None])[..., 0],
        lambda v: (matrix.mT @ v[..., None])[..., 0],
    )


def solve(matrix: Tensor, right: Tensor, **options):
    """Return what `cgls` finds, down to rounding unless it is asked for less."""
    return cgls(*products(matrix), right, **{"tolerance": 1e-13, "max_steps": 500, **options})


def pseudo_inverse(matrix: Tensor, right: Tensor) -> Array:
    """Return the least-squares solutions of least norm."""
    pairs = zip(matrix.numpy(), right.numpy(), strict=True)
    return np.stack([np.linalg.pinv(a, rcond=1e-9) @ r for a, r in pairs])


def damped(matrix: Tensor, right: Tensor, shift: Tensor) -> Array:
    """Return the damped least-squares solutions, as augmented problems."""
    found = []
    for a, r, s in zip(matrix.numpy(), right.numpy(), shift.tolist(), strict=True):
        count = a.shape[1]
        augmented = np.vstack([a, np.sqrt(s) * np.eye(count)])
        found.append(np.linalg.lstsq(augmented, np.concatenate([r, np.zeros(count)]))[0])
    return np.stack(found)


def objective(matrix: Tensor, right: Tensor, shift: Tensor | float, at: Tensor) -> Tensor:
    """Return `||A d - r||^2 + shift ||d||^2`."""
    missing = products(matrix)[0](at) - right
    return missing.square().sum(1) + shift * at.square().sum(1)


@given(**SYSTEMS)
def test_the_least_squares_solution_of_least_norm(seed, rows, columns, rank):
    """For any rank, whether the system is consistent or not."""
    matrix, right = matrices(seed, rows, columns, rank), normal(seed + 7, COUNT, rows)
    found, convergence = solve(matrix, right)
    assert relative(found, pseudo_inverse(matrix, right)) < 1e-9
    assert bool(convergence.converged.all())
    assert int(convergence.steps.max()) <= 4 * max(1, min(rank, rows, columns))


@given(**SYSTEMS, log_shift=st.floats(-4, 1))
def test_one_shift_a_sample(seed, rows, columns, rank, log_shift):
    matrix, right = matrices(seed, rows, columns, rank), normal(seed + 7, COUNT, rows)
    shift = 10**log_shift * torch.tensor([1.0, 0.1, 3.0, 10.0], dtype=torch.float64)
    found, _ = solve(matrix, right, shift=shift)
    assert relative(found, damped(matrix, right, shift)) < 1e-9


def test_one_shift_for_all():
    matrix, right = matrices(3, 5, 7, 4), normal(4, COUNT, 5)
    expected = damped(matrix, right, torch.tensor([0.3] * COUNT, dtype=torch.float64))
    assert relative(solve(matrix, right, shift=0.3)[0], expected) < 1e-9


@given(**SYSTEMS, max_steps=st.integers(1, 12), shift=st.sampled_from([0.0, 1e-3, 0.5]))
def test_more_steps_are_never_worse(seed, rows, columns, rank, max_steps, shift):
    """The objective falls with every step, and no step is where it begins."""
    matrix = matrices(seed, rows, columns, rank, condition=1e4)
    right = normal(seed + 7, COUNT, rows)
    before = objective(matrix, right, shift, torch.zeros(COUNT, columns, dtype=torch.float64))
    for steps in range(1, max_steps + 1):
        found, _ = solve(matrix, right, shift=shift, max_steps=steps)
        now = objective(matrix, right, shift, found)
        assert bool((now <= before * (1 + 1e-12) + 1e-24).all())
        before = now


@given(**SYSTEMS, max_steps=st.integers(1, 6), tolerance=st.sampled_from([1e-1, 1e-4, 1e-10]))
def test_the_record_is_true(seed, rows, columns, rank, max_steps, tolerance):
    """What is said to be left of the gradient is left of it, and that is what convergence means."""
    matrix = matrices(seed, rows, columns, rank, condition=1e3)
    right = normal(seed + 7, COUNT, rows)
    found, convergence = solve(matrix, right, max_steps=max_steps, tolerance=tolerance)
    mv, rmv = products(matrix)
    first, last = rmv(right).norm(dim=1), rmv(right - mv(found)).norm(dim=1)
    exact = torch.where(first > 0, last / first.clamp(min=1e-300), 0)
    torch.testing.assert_close(convergence.residual, exact, rtol=1e-4, atol=1e-10)
    assert bool((convergence.steps <= max_steps).all())
    assert bool((convergence.converged | (exact > tolerance * (1 - 1e-6))).all())
    assert bool((~convergence.converged | (exact <= tolerance + 1e-11)).all())
    last = int(convergence.steps.max())
    if last > 1:  # no step is gone by a sample that is there already
        _, before = solve(matrix, right, max_steps=last - 1, tolerance=tolerance)
        assert not before.converged[convergence.steps == last].any()


def test_a_zero_right_side_and_a_zero_matrix():
    """Nothing is asked for, or nothing can be done: no step, and it has converged."""
    matrix, right = matrices(0, 4, 5, 4), normal(1, COUNT, 4)
    right[1], matrix[2] = 0, 0
    for shift in (0.0, 0.1):
        found, convergence = solve(matrix, right, shift=shift)
        assert not found[1].any()
        assert not found[2].any()
        assert bool(found.isfinite().all())
        assert convergence.converged.tolist() == [True] * COUNT
        assert convergence.steps[1:3].tolist() == [0, 0]
        assert bool((convergence.steps[[0, 3]] > 0).all())


@given(**SYSTEMS, shift=st.sampled_from([0.0, 0.1]))
def test_a_sample_gets_what_it_gets_alone(seed, rows, columns, rank, shift):
    """Easy samples stop early and stay where they are while hard ones go on."""
    matrix, right = matrices(seed, rows, columns, rank), normal(seed + 7, COUNT, rows)
    matrix[0] *= 1e3
    together, record = solve(matrix, right, shift=shift, tolerance=1e-3)
    for k in range(COUNT):
        one = slice(k, k + 1)
        alone, own = solve(matrix[one], right[one], shift=shift, tolerance=1e-3)
        torch.testing.assert_close(together[one], alone, rtol=1e-9, atol=1e-12)
        assert int(record.steps[k]) == int(own.steps[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [-30, -12, 0, 12, 30])
def test_right_sides_of_any_scale(dtype, power):
    """Squares of neither large nor small ones leave the range of the type."""
    matrix, right = matrices(0, 6, 5, 4), normal(1, COUNT, 6)
    scale = 10.0**power
    options = {"tolerance": 1e-5, "max_steps": 100}
    found, convergence = cgls(*products(matrix.to(dtype)), (scale * right).to(dtype), **options)
    assert relative(found.double() / scale, pseudo_inverse(matrix, right)) < 1e-3
    assert bool(convergence.converged.all())


def test_single_precision_stops_at_its_rounding():
    """What rounding leaves of a gradient is nobody's to minimise: it has converged."""
    matrix = matrices(0, 8, 8, 5, condition=100.0)
    right = normal(1, COUNT, 8)
    found, convergence = solve(matrix.float(), right.float(), max_steps=300)
    assert bool(convergence.converged.all())
    assert int(convergence.steps.max()) < 100
    assert relative(found, pseudo_inverse(matrix, right)) < 1e-2


@given(**SYSTEMS)
def test_a_miss_that_is_allowed(seed, rows, columns, rank):
    """A sample stops where that share of what is asked for is missing."""
    matrix = matrices(seed, rows, columns, rank)
    right = products(matrix)[0](normal(seed + 8, COUNT, columns))  # can be met
    found, convergence = solve(matrix, right, miss=0.3)
    missing = (right - products(matrix)[0](found)).norm(dim=1)
    assert bool((missing <= 0.3 * right.norm(dim=1) + 1e-12).all())
    assert bool(convergence.converged.all())
    assert bool((convergence.steps <= solve(matrix, right)[1].steps).all())


def seen(matrix: Tensor, right: Tensor, steps: int) -> Tensor:
    """Return the largest singular value between the first Krylov spaces of either side."""
    values = []
    for a, r in zip(matrix, right, strict=True):
        spaces = []
        for gram, vector in ((a @ a.mT, r), (a.mT @ a, a.mT @ r)):
            vectors: list[Tensor] = []
            for _ in range(steps + 1):
                whole = vector.norm()
                for _ in range(2):
                    vector = vector - sum((v @ vector) * v for v in vectors)
                if not vector.norm() > 1e-7 * whole:
                    break
                vectors.append(vector / vector.norm())
                vector = gram @ vectors[-1]
            spaces.append(torch.stack(vectors or [0 * vector], 1))
        start, end = spaces
        values.append(torch.linalg.matrix_norm(start.mT @ a @ end, 2))
    return torch.stack(values)


def estimated(matrix: Tensor, right: Tensor) -> Tensor:
    """Return what damping is relative to: also what one product from elsewhere shows."""
    elsewhere = products(matrix)[1](unstructured(right))
    image, length = products(matrix)[0](elsewhere).norm(dim=1), elsewhere.norm(dim=1)
    return seen(matrix, right, 4).maximum(torch.where(length > 0, image / length, 0))


@given(**SYSTEMS, steps=st.integers(1, 5))
def test_bidiagonalisation(seed, rows, columns, rank, steps):
    """What it says of the operator is so, and its largest singular value is one from below."""
    matrix = matrices(seed, rows, columns, max(rank, 1), condition=3.0) * 7
    right = normal(seed, COUNT, rows)
    known = bidiagonalise(*products(matrix), right, steps)
    assert relative(known.of_left(known.start), right) < 1e-12
    x, y = normal(seed + 1, COUNT, steps + 1), normal(seed + 2, COUNT, steps + 1)
    x[:, -1] = 0
    mv, rmv = products(matrix)
    for found, expected in (
        (known.of_left(known.mv(x)), mv(known.of_right(x))),
        (known.of_right(known.rmv(y)), rmv(known.of_left(y))),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(known.largest(), seen(matrix, right, steps), rtol=1e-6, atol=0)
    exact = torch.linalg.matrix_norm(matrix, 2)
    assert bool((known.largest() <= exact * (1 + 1e-12)).all())
    if steps >= 4:
        assert bool((known.largest() >= 0.5 * exact).all())


@given(**SYSTEMS, damping=st.sampled_from([0.0, 1e-3, 0.5]))
def test_damping_is_relative_to_the_largest_singular_value(seed, rows, columns, rank, damping):
    matrix, right = matrices(seed, rows, columns, rank), normal(seed + 7, COUNT, rows)
    matrix *= torch.tensor([1e-3, 1, 10, 1e4], dtype=torch.float64)[:, None, None]
    options = {"tolerance": 1e-13, "max_steps": 500}
    found, convergence = damped_cgls(*products(matrix), right, damping=damping, **options)
    if damping:
        expected = damped(matrix, right, damping * estimated(matrix, right).square())
    else:
        expected = pseudo_inverse(matrix, right)
    assert bool(convergence.converged.all())
    for k in range(COUNT):  # each on the scale of its own
        assert relative(found[k], expected[k]) < 1e-9


@given(
    seed=SYSTEMS["seed"], rows=st.integers(9, 12), columns=st.integers(9, 12),
    max_steps=st.integers(0, 7), tolerance=st.sampled_from([1e-1, 1e-4, 1e-13]),
)  # fmt: skip
def test_the_first_steps_are_those_of_conjugate_gradients(
    seed, rows, columns, max_steps, tolerance
):
    """Among the vectors of the bidiagonalisation, and from there on."""
    matrix = matrices(seed, rows, columns, 12)
    right, options = normal(seed + 7, COUNT, rows), {"tolerance": tolerance, "max_steps": max_steps}
    found, convergence = damped_cgls(*products(matrix), right, damping=1e-2, **options)
    shift = 1e-2 * estimated(matrix, right).square()
    expected, known = cgls(*products(matrix), right, shift=shift, **options)
    assert relative(found, expected) < 1e-10
    torch.testing.assert_close(convergence.residual, known.residual, rtol=1e-8, atol=1e-11)
    assert convergence.steps.tolist() == known.steps.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gain", [1e-15, 1e-10, 1e10, 1e15])
def test_operators_of_any_scale(gain, dtype):
    """The squares of their products neither overflow nor vanish."""
    matrix, right = matrices(0, 6, 5, 5), normal(1, COUNT, 6)
    options = {"damping": 1e-3, "tolerance": 1e-5, "max_steps": 50}
    expected, _ = damped_cgls(*products(matrix), right, **options)
    found, convergence = damped_cgls(
        *products((gain * matrix).to(dtype)), right.to(dtype), **options
    )
    assert bool(convergence.converged.all())
    assert relative(found.double() * gain, expected) < 1e-4


def test_damping_does_not_jump_with_what_the_right_side_begins_to_see():
    matrix = torch.diag(torch.tensor([1.0, 1e-3], dtype=torch.float64))[None]
    blind, seeing = (torch.tensor([[e, 1.0]], dtype=torch.float64) for e in (0.0, 1e-12))
    options = {"damping": 1e-2, "tolerance": 1e-10, "max_steps": 50}
    found, expected = (damped_cgls(*products(matrix), r, **options)[0] for r in (blind, seeing))
    torch.testing.assert_close(found, expected, rtol=0.01, atol=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_a_sample_whose_products_are_not_finite(bad, damping):
    """It takes no step and has not converged; the others get what they get alone."""
    matrix, right = matrices(0, 4, 5, 4), normal(1, COUNT, 4)
    solve = functools.partial(damped_cgls, damping=damping, tolerance=1e-10, max_steps=50)
    expected, _ = solve(*products(matrix), right)
    spoiled = matrix.clone()
    spoiled[1, 0, 0] = bad
    found, convergence = solve(*products(spoiled), right)
    assert convergence.converged.tolist() == [True, False, True, True]
    assert convergence.residual[1] == 1
    expected[1] = 0
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_largest_singular_value_of_what_is_not_finite(bad):
    """It is said of the sample, and of no other."""
    matrix, right = matrices(0, 4, 5, 4), normal(1, COUNT, 4)
    matrix[1, 0, 0] = bad
    known = bidiagonalise(*products(matrix), right, 3)
    assert known.largest().isnan().tolist() == [False, True, False, False]
    assert known.of_right(known.start).isfinite().all()


def test_one_step_towards_the_largest_singular_value():
    """That is how long the image of the first vector is, over it."""
    matrix = matrices(0, 4, 5, 4)
    mv, rmv = products(matrix)
    start = normal(1, COUNT, 5)
    found = largest_singular_values(mv, rmv, start, 1)
    torch.testing.assert_close(found, mv(start).norm(dim=1) / start.norm(dim=1))


def test_the_largest_singular_value_of_nothing():
    matrix = torch.zeros(COUNT, 3, 5, dtype=torch.float64)
    known = bidiagonalise(*products(matrix), torch.ones(COUNT, 3).double(), 3)
    assert not known.largest().any()


def test_every_sample_has_a_tolerance_of_its_own():
    matrix = normal(0, 30, 30) + 8 * torch.eye(30)
    right = normal(1, 1, 30).expand(3, 30)
    tolerance = torch.tensor([1e-1, 1e-4, 1e-8])

    def solve(tolerance, miss, right):
        return cgls(
            lambda d: d @ matrix.T, lambda r: r @ matrix, right,
            tolerance=tolerance, miss=miss, max_steps=60,
        )  # fmt: skip

    for miss in (0.0, tolerance):
        found, went = solve(tolerance, miss, right)
        for k in range(3):
            own = miss if isinstance(miss, float) else float(miss[k])
            alone, steps = solve(float(tolerance[k]), own, right[k : k + 1])
            torch.testing.assert_close(found[k], alone[0])
            assert int(went.steps[k]) == int(steps.steps[0])
        assert went.steps.tolist() == sorted(went.steps.tolist())
        assert went.steps[0] < went.steps[2]
