"""The batched dual against a QP solver, and against its own optimality conditions."""

from __future__ import annotations

import numpy as np
import pytest
import quadprog
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from frfx.joint.dual import nearest_point_multipliers
from tests.oracles import integers, normal


def solve(matrix: Tensor, bound: Tensor, active: Tensor) -> Tensor:
    multipliers = nearest_point_multipliers(matrix @ matrix.mT, bound, active)
    assert bool((multipliers >= 0).all())
    assert not bool(multipliers[~active].any())
    return (matrix.mT @ multipliers[..., None])[..., 0]


def oracle(matrix: Tensor, bound: Tensor, active: Tensor) -> np.ndarray | None:
    """Return the nearest point by quadprog, or None if the constraints contradict each other."""
    rows, right, size = matrix[active].numpy(), bound[active].numpy(), matrix.shape[1]
    if not len(rows):
        return np.zeros(size)
    try:
        return quadprog.solve_qp(np.eye(size), np.zeros(size), rows.T.copy(), right)[0]
    except ValueError:
        return None


@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.integers(1, 8),
    st.sampled_from([1e-6, 1.0, 1e6]),
    st.booleans(),
)
def test_is_the_nearest_point(seed, size, count, scale, whole):
    draw = integers if whole else normal  # whole numbers: ties, dependent rows, rows of zeros
    matrix, bound = draw(seed, 6, count, size) * scale, draw(seed + 1, 6, count)
    active = normal(seed + 2, 6, count) > -0.8
    found = solve(matrix, bound, active)
    for k in range(6):
        expected = oracle(matrix[k], bound[k], active[k])
        if expected is not None:
            error = np.linalg.norm(found[k].numpy() - expected)
            assert error <= 1e-6 * max(np.linalg.norm(expected), 1e-3 / scale)
        else:  # the gradient of the squared distances to the half-spaces vanishes
            rows, right = matrix[k][active[k]], bound[k][active[k]]
            kept = rows.norm(dim=1) > 0
            size = rows[kept].norm(dim=1)
            rows, right = rows[kept] / size[:, None], right[kept] / size
            missing = (right - rows @ found[k]).clamp(min=0)
            assert (rows.mT @ missing).norm() <= 1e-3 * max(missing.norm(), right.norm())


def test_nothing_to_do():
    matrix = normal(0, 3, 4, 5)
    assert not solve(matrix, -torch.ones(3, 4).double(), torch.ones(3, 4).bool()).any()
    assert not solve(matrix, torch.ones(3, 4).double(), torch.zeros(3, 4).bool()).any()
    assert not solve(matrix * 0, torch.ones(3, 4).double(), torch.ones(3, 4).bool()).any()


@pytest.mark.parametrize("angle", [1e-3, 1e-5, 1e-7])
def test_nearly_parallel_rows(angle):
    """The second row hardly differs: its bound is met where the first alone would miss it."""
    turned = torch.tensor([np.cos(angle), np.sin(angle)])
    matrix = torch.stack([torch.tensor([1.0, 0.0]).double(), turned])[None]
    bound = torch.tensor([[1.0, 1.0 + angle]]).double()
    found = solve(matrix, bound, torch.ones(1, 2).bool())
    assert float((bound - (matrix @ found[..., None])[..., 0]).max()) <= 1e-8


def test_samples_do_not_touch_each_other():
    matrix, bound = normal(0, 40, 6, 9), normal(1, 40, 6)
    active = torch.ones(40, 6).bool()
    together = solve(matrix, bound, active)
    alone = torch.cat([solve(matrix[k, None], bound[k, None], active[k, None]) for k in range(40)])
    torch.testing.assert_close(together, alone)
