"""Which solver is chosen for which operator, why, and that it is the one that then solves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given

from frfx.linalg import (
    Convolution,
    Dense,
    Diagonal,
    Iterative,
    Matrix,
    Separable,
    Solver,
    Spectral,
    Transposed,
    auto,
)
from tests.geometries import convolutions, matrix_of, seeds
from tests.oracles import damped_least_squares, normal, relative

PADDED = ((1, 1), (1, 1))


def kernel(n_out, n_in, *window, dominant=3.0):
    """Return a kernel whose middle tap dominates, or which is noise."""
    values = 0.3 * normal(0, n_out, n_in, *window)
    values[(..., *(k // 2 for k in window))] += dominant * torch.eye(n_out, n_in)
    return values


WELL, ILL = kernel(3, 3, 3, 3), kernel(3, 3, 3, 3, dominant=0.0)
SAME = Convolution(WELL, (6, 6), padding=PADDED)

# Operator, solver, and what the reason says.
CHOICES = {
    "matrix": (Matrix(normal(0, 3, 4)), "dense", "a matrix"),
    "diagonal": (Diagonal(normal(0, 4)), "dense", "a matrix"),
    "separable": (Separable((normal(0, 3, 4),)), "dense", "a matrix"),
    "one by one": (Convolution(kernel(2, 3, 1, 1), (5, 5)), "dense", "share no entry"),
    "one by one, strided": (
        Convolution(kernel(2, 3, 1, 1), (5, 5), stride=(2, 2)),
        "dense",
        "share no entry",
    ),
    "patchify": (Convolution(kernel(2, 3, 2, 2), (6, 6), stride=(2, 2)), "dense", "share no entry"),
    "transposed patchify": (
        Transposed(Convolution(kernel(2, 3, 2, 2), (6, 6), stride=(2, 2))),
        "dense",
        "share no entry",
    ),
    "no padding": (Convolution(WELL, (6, 6)), "spectral", "exact: no padding"),
    "no padding, strided": (Convolution(WELL, (7, 7), (2, 2)), "spectral", "exact: no padding"),
    "no padding, ill conditioned": (Convolution(ILL, (9, 9)), "spectral", "exact: no padding"),
    "circular": (
        replace(SAME, padding_mode="circular"),
        "spectral",
        "exact: circular padding",
    ),
    "circular, but larger": (
        Convolution(WELL, (6, 6), padding=((2, 2), (2, 2)), padding_mode="circular"),
        "dense",
        "written out",
    ),
    "padded": (SAME, "dense", "small: written out as a matrix;"),
    "padded, depthwise": (
        Convolution(torch.rand(500, 1, 3, 3), (8, 8), padding=((1, 1), (1, 1)), groups=500),
        "dense",  # as one matrix it would take 8 GiB
        "written out as a matrix a group",
    ),
    "transposed": (Transposed(Convolution(WELL, (6, 6))), "dense", "written out as a matrix"),
}


@pytest.mark.parametrize(("operator", "solver", "reason"), CHOICES.values(), ids=CHOICES)
def test_what_is_chosen_and_why(operator, solver, reason):
    choice = Solver().prepare(operator)
    assert choice.solver == solver
    assert reason in choice.reason


def test_the_condition_number_of_a_matrix_in_double():
    """Written out it is as exact as the decomposition; its Gram matrix would lose it."""
    binomial = torch.tensor([1.0, 6, 15, 20, 15, 6, 1], dtype=torch.float64) / 64
    kernel = torch.outer(binomial, binomial)[None, None]
    operator = Convolution(kernel, (18, 18), padding=((3, 3), (3, 3)))
    choice = Solver(damping=0.0).prepare(operator)
    singular = np.linalg.svd(matrix_of(operator), compute_uv=False)
    assert choice.spectrum.condition == pytest.approx(singular[0] / singular[-1], rel=1e-4)
    assert not choice.spectrum.deficient


LARGE = {
    "padded": SAME,
    "transposed": Transposed(Convolution(WELL, (6, 6))),
    "transposed, padded": Transposed(SAME),
}


@pytest.mark.parametrize("operator", LARGE.values(), ids=LARGE)
def test_what_is_too_large_to_be_written_out_is_refined(operator, monkeypatch):
    monkeypatch.setattr(auto, "_WRITE_OUT", 1000)
    choice = Solver(tolerance=1e-9, max_steps=200).prepare(operator)
    assert choice.solver == "iterative"
    assert "refined" in choice.reason
    assert "damped" not in choice.reason
    residual = normal(1, 2, *operator.out_shape)
    expected = residual.flatten(1).numpy() @ np.linalg.pinv(matrix_of(operator)).T
    assert relative(choice.solve(residual), expected) < 1e-6


def test_a_cutoff_that_cuts_is_not_left_to_an_iteration(monkeypatch):
    monkeypatch.setattr(auto, "_WRITE_OUT", 1000)
    assert Solver(rcond=1e-6).prepare(SAME).solver == "iterative"
    choice = Solver(rcond=0.9).prepare(SAME)
    assert choice.solver == "spectral"
    assert choice.spectrum.deficient


@pytest.mark.parametrize("large", [False, True])
def test_ill_conditioned_operators_are_damped_and_it_is_said(large, monkeypatch):
    if large:
        monkeypatch.setattr(auto, "_WRITE_OUT", 1000)
    operator = replace(SAME, kernel=ILL)
    # Most of the largest singular value is taken away at the constant image.
    spoiled = operator.with_kernel(ILL - ILL.mean((2, 3), keepdim=True))
    choice = Solver().prepare(spoiled)
    assert choice.solver == ("spectral" if large else "dense")
    assert "damped by 0.01" in choice.reason
    residual = normal(1, 2, *spoiled.out_shape)
    found = choice.solve(residual)
    if large:
        expected = Spectral(damping=1e-2).prepare(spoiled).solve(residual)
        assert torch.equal(found, expected)
    else:
        columns = residual.flatten(1).numpy().T
        expected = damped_least_squares(matrix_of(spoiled), columns, 1e-2).T
        assert relative(found.flatten(1), expected) < 1e-9


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_damping_that_is_asked_for_is_what_is_used(damping):
    spoiled = SAME.with_kernel(ILL - ILL.mean((2, 3), keepdim=True))
    for operator in (SAME, spoiled):
        choice = Solver(damping=damping).prepare(operator)
        assert "damped by" not in choice.reason
        residual = normal(1, 2, *operator.out_shape)
        columns = residual.flatten(1).numpy().T
        expected = damped_least_squares(matrix_of(operator), columns, damping).T
        assert relative(choice.solve(residual).flatten(1), expected) < 1e-8


NAMED = {"dense": Dense(), "spectral": Spectral(), "iterative": Iterative()}


@pytest.mark.parametrize("name", NAMED)
@given(drawn=convolutions(dominant=3.0), seed=seeds)
def test_a_solver_by_its_name(name, drawn, seed):
    for operator in (drawn, Transposed(drawn)):
        choice = Solver(name).prepare(operator)
        residual = normal(seed, 2, *operator.out_shape)
        assert (choice.solver, choice.reason) == (name, "as asked")
        expected = NAMED[name].prepare(operator)
        assert torch.equal(choice.solve(residual), expected.solve(residual))
        assert choice.nbytes == expected.nbytes
        assert choice.spectrum == expected.spectrum


def test_options_reach_the_solver():
    operator = SAME.to(torch.float32)
    iterative = Solver("iterative", damping=0.2, tolerance=0.3, max_steps=7).prepare(operator)
    assert (iterative.factor.tolerance, iterative.factor.max_steps) == (0.3, 7)
    residual = normal(1, 2, *operator.out_shape).float()
    for name, same in {
        "dense": Dense(0.1, 0.2),
        "spectral": Spectral(0.1, 0.2),
        "iterative": Iterative(0.2, 0.3, 7),
    }.items():
        found = Solver(name, rcond=None if name == "iterative" else 0.1, damping=0.2,
                       tolerance=0.3, max_steps=7).prepare(operator)  # fmt: skip
        assert torch.equal(found.solve(residual), same.prepare(operator).solve(residual))
    assert Solver("spectral", memory=0).prepare(operator).factor.map.streams


@pytest.mark.parametrize("name", ["spectral", "iterative"])
@pytest.mark.parametrize("operator", [Diagonal(normal(0, 4)), Separable((normal(0, 3, 4),))])
def test_what_a_solver_cannot_do(name, operator):
    with pytest.raises(TypeError, match=f"no {name} solver for a {type(operator).__name__}"):
        Solver(name).prepare(operator)


def test_a_matrix_has_no_spectrum_over_frequencies():
    with pytest.raises(TypeError, match="no spectral solver for a Matrix"):
        Solver("spectral").prepare(Matrix(normal(0, 3, 4)))


def test_a_convergence_is_told_once():
    choice = Solver("iterative").prepare(SAME)
    assert choice.take_convergence() is None
    choice.solve(normal(0, 2, *SAME.out_shape))
    assert choice.take_convergence().converged.all()
    assert choice.take_convergence() is None
    assert Solver("dense").prepare(SAME).take_convergence() is None
