"""Batched pseudo-inverses, exact and by the Gram matrix, against `torch.linalg.pinv`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frfx.linalg import pseudo_inverse as module
from frfx.linalg.pseudo_inverse import (
    Spectrum,
    default_rcond,
    inverse_gram,
    largest_singular_value,
    pseudo_inverse,
    singular_values,
    solve_damped,
    solve_dtype,
)
from tests.oracles import normal, relative

seeds = st.integers(0, 2**31)
shapes = st.tuples(st.integers(1, 6), st.integers(1, 6))


def matrices(seed, *shape, complex=False):
    """Return random matrices with singular values from 0.5 to 2."""
    values = normal(seed, *shape)
    if complex:
        values = torch.complex(values, normal(seed + 1, *shape))
    left, _, right = torch.linalg.svd(values, full_matrices=False)
    count = min(shape[-2:])
    spread = torch.linspace(0.5, 2, count, dtype=torch.float64).to(values.dtype)
    return left @ (spread[:, None] * right)


def as_real(values):
    """Return complex numbers as pairs of reals, so that norms can be taken."""
    return torch.view_as_real(values) if values.is_complex() else values


@pytest.mark.parametrize("complex", [False, True])
@pytest.mark.parametrize(("exact", "tolerance"), [(True, 1e-13), (False, 1e-12)])
@given(seed=seeds, shape=shapes, batch=st.sampled_from([(), (3,), (2, 3)]))
def test_equals_pinv(exact, tolerance, complex, seed, shape, batch):
    given = matrices(seed, *batch, *shape, complex=complex)
    inverse, spectrum = pseudo_inverse(given, exact=exact, rcond=1e-9)
    assert inverse.shape == (*batch, *shape[::-1])
    assert inverse.dtype == given.dtype
    expected = torch.linalg.pinv(given)
    assert relative(as_real(inverse), as_real(expected)) < tolerance
    assert not spectrum.deficient


@pytest.mark.parametrize("complex", [False, True])
@given(seed=seeds, shape=shapes, damping=st.floats(1e-4, 1))
def test_what_is_damped_is_applied_without_its_inverse(complex, seed, shape, damping):
    given = matrices(seed, 3, *shape, complex=complex)
    right = matrices(seed + 2, 3, shape[0], 4, complex=complex)
    found = solve_damped(given @ given.mH, right, damping)
    product = (given @ given.mH).numpy() + damping * np.eye(shape[0])
    expected = np.linalg.solve(product, right.numpy())
    assert relative(as_real(found), as_real(torch.from_numpy(expected))) < 1e-9


@pytest.mark.parametrize("exact", [True, False])
@given(seed=seeds, shape=shapes)
def test_spectrum_is_numpys(exact, seed, shape):
    given = matrices(seed, 4, *shape) * torch.tensor([1.0, 2, 3, 0.5])[:, None, None]
    _, spectrum = pseudo_inverse(given, exact=exact, rcond=1e-9)
    singular = np.linalg.svd(given.numpy(), compute_uv=False)
    assert spectrum.largest == pytest.approx(singular.max(), rel=1e-12)
    assert spectrum.smallest == pytest.approx(singular.min(), rel=1e-9)


@pytest.mark.parametrize("exact", [True, False])
@given(seed=seeds, shape=shapes)
def test_condition_is_numpys(exact, seed, shape):
    given = matrices(seed, *shape)
    _, spectrum = pseudo_inverse(given, exact=exact, rcond=1e-9)
    assert spectrum.condition == pytest.approx(np.linalg.cond(given.numpy()), rel=1e-9)


@pytest.mark.parametrize("complex", [False, True])
@pytest.mark.parametrize("exact", [True, False])
@given(seed=seeds, shape=shapes, damping=st.floats(1e-6, 10))
def test_damping_solves_the_augmented_system(exact, complex, seed, shape, damping):
    given = matrices(seed, 2, *shape, complex=complex) * torch.tensor([1.0, 3])[:, None, None]
    inverse, _ = pseudo_inverse(given, exact=exact, rcond=1e-9, damping=damping)
    dense = given.numpy()
    scale = np.linalg.svd(dense, compute_uv=False).max()  # of the batch: it is one operator
    for found, matrix in zip(inverse, dense, strict=True):
        rows, columns = matrix.shape
        augmented = np.vstack([matrix, math.sqrt(damping) * scale * np.eye(columns)])
        right = np.vstack([np.eye(rows), np.zeros((columns, rows))])
        expected = np.linalg.lstsq(augmented, right, rcond=None)[0]
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-11 / scale)


@pytest.mark.parametrize("complex", [False, True])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
@pytest.mark.parametrize("kept", [0, 1, 2])
def test_cutoff_leaves_small_singular_values_out(exact, complex, shape, kept):
    given = matrices(kept, *shape, complex=complex)
    left, _, right = torch.linalg.svd(given, full_matrices=False)
    values = torch.full((min(shape),), 1e-4, dtype=torch.float64)
    values[:kept] = 1
    values[0] = 1  # the largest, to which the cutoff is relative
    given = left @ (50 * values.to(given.dtype)[:, None] * right)
    inverse, spectrum = pseudo_inverse(given, exact=exact, rcond=1e-3)
    expected = torch.linalg.pinv(given, rtol=1e-3)
    assert relative(as_real(inverse), as_real(expected)) < 1e-11
    assert spectrum.deficient
    inverse, spectrum = pseudo_inverse(given, exact=exact, rcond=1e-5)
    assert relative(as_real(inverse), as_real(torch.linalg.pinv(given, rtol=1e-5))) < 1e-7
    assert not spectrum.deficient


@pytest.mark.parametrize("exact", [True, False])
def test_the_cutoff_is_relative_to_the_whole_batch(exact):
    given = torch.stack([torch.eye(2), 1e-4 * torch.eye(2)]).double()
    inverse, spectrum = pseudo_inverse(given, exact=exact, rcond=1e-3)
    assert torch.equal(inverse[1], torch.zeros(2, 2, dtype=torch.float64))
    assert relative(inverse[0], np.eye(2)) < 1e-14
    assert spectrum.deficient
    assert spectrum.condition == pytest.approx(1e4)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", [(3, 2), (2, 3)])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_zero_inverts_to_zero(exact, shape, damping):
    inverse, spectrum = pseudo_inverse(
        torch.zeros(2, *shape, dtype=torch.float64), exact=exact, rcond=1e-9, damping=damping
    )
    assert torch.equal(inverse, torch.zeros(2, *shape[::-1], dtype=torch.float64))
    assert spectrum.deficient
    assert spectrum.condition == math.inf


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize("exact", [True, False])
@given(seed=seeds, shape=shapes)
def test_scale_does_not_matter(exact, scale, seed, shape):
    given = matrices(seed, *shape)
    inverse, spectrum = pseudo_inverse(given * scale, exact=exact, rcond=1e-9)
    assert relative(inverse * scale, torch.linalg.pinv(given)) < 1e-11
    assert not spectrum.deficient


@pytest.mark.parametrize(
    ("dtype", "solved"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_types_are_solved_in_single(dtype, solved):
    assert solve_dtype(dtype) == solved
    assert default_rcond(dtype, 7) == pytest.approx(7 * np.finfo(str(solved)[6:]).eps)


# Large matrices, by Cholesky where they are conditioned well enough.


def conditioned(seed, m, n, *conditions, complex=False):
    """Return one matrix a condition number, of the largest singular value 1, 2, 3, ..."""
    values = matrices(seed, len(conditions), m, n, complex=complex)
    left, _, right = torch.linalg.svd(values, full_matrices=False)
    count = min(m, n)
    spread = [
        (i + 1) * torch.logspace(0, -math.log10(c), count, dtype=torch.float64)
        for i, c in enumerate(conditions)
    ]
    return left @ (torch.stack(spread).to(values.dtype)[..., None] * right)


@pytest.mark.parametrize("complex", [False, True])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 30)])
@pytest.mark.parametrize("conditions", [(2, 10, 50), (5, 1e5, 20)], ids=["well", "one is not"])
def test_large_matrices(conditions, shape, complex):
    given = conditioned(0, *shape, *conditions, complex=complex)
    inverse, spectrum = pseudo_inverse(given, exact=False, rcond=1e-9)
    assert relative(as_real(inverse), as_real(torch.linalg.pinv(given))) < 1e-5
    singular = torch.linalg.svdvals(given)
    assert spectrum.largest == pytest.approx(float(singular.max()), rel=0.05)
    assert spectrum.smallest == pytest.approx(float(singular.min()), rel=0.05)
    assert not spectrum.deficient


@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_large_damped_matrices(shape, damping):
    given = conditioned(0, *shape, 3, 1e4)
    scale = float(torch.linalg.svdvals(given).max())
    inverse, _ = pseudo_inverse(given, exact=False, rcond=1e-12, damping=damping, scale=scale)
    gram = given.mT @ given + damping * scale**2 * torch.eye(shape[1]).double()
    assert relative(inverse, torch.linalg.solve(gram, given.mT)) < 1e-8


@pytest.mark.parametrize("shape", [(30, 40), (40, 30)])
def test_large_deficient_matrices(shape):
    given = conditioned(0, *shape, 4, 4)
    left, singular, right = torch.linalg.svd(given[1], full_matrices=False)
    given[1] = (left[:, :10] * singular[:10]) @ right[:10]
    inverse, spectrum = pseudo_inverse(given, exact=False, rcond=1e-6)
    assert relative(inverse, torch.linalg.pinv(given, rtol=1e-6)) < 1e-8
    assert spectrum.deficient


@pytest.mark.parametrize("complex", [False, True])
@pytest.mark.parametrize(("small", "deflates"), [(0, True), (7, True), (100, False)])
@pytest.mark.parametrize("shape", [(130, 150), (140, 140)])
def test_what_few_singular_values_are_cut_off_large_matrices(
    shape, small, deflates, complex, monkeypatch
):
    """Without the eigenvalues of the whole, unless they are many; the last one kept is near."""
    monkeypatch.setattr(module, "_DEFLATION_FROM", 100)
    monkeypatch.setattr(module, "_BLOCK", 30)
    if deflates:
        monkeypatch.setattr(module, "_by_eigh", None)
    given = normal(0, *shape)
    if complex:
        given = torch.complex(given, normal(1, *shape))
    left, _, right = torch.linalg.svd(given, full_matrices=False)
    values = torch.linspace(1, 2e-3, min(shape), dtype=torch.float64)
    values[1 : 1 + small] = torch.logspace(-5, -3.5, small, dtype=torch.float64)
    given = left @ (values.to(given.dtype)[:, None] * right)
    inverse, spectrum = pseudo_inverse(given, exact=False, rcond=1e-3)
    expected = (right.mH * torch.where(values < 1e-3, 0, 1 / values)) @ left.mH
    assert relative(as_real(inverse), as_real(expected)) < 1e-8
    assert spectrum.deficient == (small > 0)
    assert spectrum.smallest == pytest.approx(float(values.min()), rel=0.05)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_large_matrix_whose_pivots_vanish_exactly(batch):
    """Whole numbers leave no rounding behind, as the kernel of ones of a box filter does."""
    rows = torch.tensor([1.0, 0.0]).double().repeat(15)
    given = (rows[:, None] * torch.ones(40).double()).expand(*batch, 30, 40).clone()
    if batch:
        given[0] = conditioned(0, 30, 40, 3)[0]
    inverse, spectrum = pseudo_inverse(given, exact=False, rcond=1e-6)
    assert relative(inverse, torch.linalg.pinv(given, rtol=1e-6)) < 1e-8
    assert spectrum.deficient


@pytest.mark.parametrize("size", [3, 30])
@pytest.mark.parametrize("share", [1.0, 1.5])
def test_inverse_gram_matrices(share, size):
    given = conditioned(0, size, int(share * size), 3, 100, complex=True)
    product = given @ given.mH
    inverse, _ = inverse_gram(product, -1.0, 1e-2, scale=2.0)
    expected = torch.linalg.inv(product + 0.04 * torch.eye(size).double())
    assert relative(as_real(inverse), as_real(expected)) < 1e-9


@given(seed=seeds, shape=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_singular_values(seed, shape):
    given = conditioned(seed, *shape, 2, 30, complex=True)
    expected = np.linalg.svd(given.numpy(), compute_uv=False)
    np.testing.assert_allclose(np.sort(singular_values(given).numpy())[:, ::-1], expected, 1e-8)
    assert largest_singular_value(given) == pytest.approx(expected.max(), rel=0.05)


def test_singular_values_of_large_matrices_by_gram_matrices_that_are_given():
    given = conditioned(0, 120, 90, 2, 30)
    assert given.numel() * 90 > 1 << 20
    expected = np.linalg.svd(given.numpy(), compute_uv=False)
    found = singular_values(given, lambda: given.mT @ given)
    np.testing.assert_allclose(np.sort(found.numpy())[:, ::-1], expected, 1e-8)
    twice = singular_values(given, lambda: 4 * given.mT @ given)  # they are asked
    np.testing.assert_allclose(twice, 2 * found, 1e-8)


def test_the_spectrum_of_parts():
    parts = [Spectrum(2.0, 0.5, deficient=False), Spectrum(3.0, 1.0, deficient=True)]
    assert Spectrum.union(parts) == Spectrum(3.0, 0.5, deficient=True)
    assert Spectrum(3.0, 0.5, deficient=False).condition == 6
    assert Spectrum(3.0, 0.0, deficient=True).condition == math.inf
