"""Nearest points of small polyhedra, one a sample, by principal pivoting on the dual."""

from __future__ import annotations

import torch
from torch import Tensor

_RIDGE = 1e-10
"""Softness of the constraints, relative to their scaled Gram matrix: it gives inconsistent ones a
solution, and dependent ones a single one."""

_REFINEMENTS = 1
"""Each squares the error that the softness leaves."""

_PATIENCE = 3
"""How many exchanges of whole blocks may fail to shrink the infeasibilities before single ones."""


def nearest_point_multipliers(gram: Tensor, bound: Tensor, active: Tensor) -> Tensor:
    """Return the multipliers of `min |d|^2 / 2` subject to `J d >= bound`, for every sample.

    The minimiser is `d = J^T multipliers`. Constraints that contradict each other are met as nearly
    as can be, by the sum of the squared distances to their half-spaces; rows of zeros, which
    nothing can meet, are left out.

    Args:
        gram: `J J^T`, shape (N, K, K), float64.
        bound: Shape (N, K), float64.
        active: Which constraints there are, shape (N, K), bool.

    Returns:
        Shape (N, K), not negative, 0 where there is no constraint.

    Reference:
        Judice and Pires (1994): block principal pivoting, which exchanges every index of the wrong
        sign at once, and falls back on Murty's least-index rule, which ends after finitely many.
    """
    count = gram.shape[-1]
    size = gram.diagonal(dim1=-2, dim2=-1)
    active = active & (size > size.amax(-1, keepdim=True) * 1e-24)
    scale = torch.where(active, size, 1).rsqrt()
    matrix = gram * scale[..., :, None] * scale[..., None, :]
    matrix = torch.where(active[..., :, None] & active[..., None, :], matrix, 0)
    identity = torch.eye(count, dtype=gram.dtype, device=gram.device)
    matrix = matrix + _RIDGE * identity
    right = torch.where(active, bound * scale, 0)
    height = right.abs().amax(-1, keepdim=True)
    right = right / torch.where(height > 0, height, 1)
    solution = _complementary(matrix, right, identity)
    for _ in range(_REFINEMENTS):  # the method of multipliers takes the softness back
        solution = _complementary(matrix, right + _RIDGE * solution, identity)
    return solution * height * scale


def _complementary(matrix: Tensor, right: Tensor, identity: Tensor) -> Tensor:
    """Return `u >= 0` with `w = matrix u - right >= 0` and `u w = 0`; `matrix` is definite."""
    count = matrix.shape[-1]
    tolerance = 64 * count * torch.finfo(matrix.dtype).eps
    basic = right > 0
    fewest = torch.full_like(basic[..., 0], count + 1, dtype=torch.long)
    patience = torch.full_like(fewest, _PATIENCE)
    order = torch.arange(count, device=matrix.device)
    for _ in range(50 * (count + 1)):
        u = _solve(matrix, right, basic, identity)
        w = (matrix @ u[..., None])[..., 0] - right
        floor = tolerance * u.abs().amax(-1, keepdim=True).clamp(min=1)
        wrong = torch.where(basic, u < -floor, w < -floor)
        size = wrong.sum(-1)
        if not bool(size.any()):  # synchronises: the pivots are few, and the systems small
            break
        fewer = size < fewest
        fewest = torch.where(fewer, size, fewest)
        patience = torch.where(fewer, _PATIENCE, patience - 1)
        last = order == torch.where(wrong, order, -1).amax(-1, keepdim=True)
        whole = fewer | (patience >= 0)
        basic = basic ^ torch.where(whole[..., None], wrong, wrong & last)
    return u.clamp(min=0)


def _solve(matrix: Tensor, right: Tensor, basic: Tensor, identity: Tensor) -> Tensor:
    """Solve for the basic unknowns of every sample, the others 0."""
    pairs = basic[..., :, None] & basic[..., None, :]
    factor, _ = torch.linalg.cholesky_ex(torch.where(pairs, matrix, identity))
    return torch.cholesky_solve(torch.where(basic, right, 0)[..., None], factor)[..., 0]
