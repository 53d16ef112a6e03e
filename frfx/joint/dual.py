"""Nearest points of small polyhedra, one a sample, by principal pivoting on the dual."""

from __future__ import annotations

import torch
from torch import Tensor

_RIDGE = 1e-10
"""Softness of the constraints, relative to their scaled Gram matrix: it gives inconsistent ones a
solution, and dependent ones a single one."""

_REFINEMENTS = 1
"""Each squares the error that the softness leaves."""

_BLOCKS = 4
"""How many exchanges of whole blocks every sample is given before anybody counts."""

_PATIENCE = 3
"""How many more may fail to shrink the infeasibilities before single ones."""


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
    size = gram.diagonal(dim1=1, dim2=2)
    active = active & (size > size.amax(1, keepdim=True) * 1e-24)
    scale = (size.rsqrt().nan_to_num(posinf=0) * active)[..., None]  # 0 for what there is not
    matrix = gram * scale * scale.mT
    matrix.diagonal(dim1=1, dim2=2).add_(_RIDGE)
    right = bound[..., None] * scale
    height = torch.linalg.vector_norm(right, torch.inf, dim=1, keepdim=True)
    right = right / height.masked_fill(height == 0, 1)
    basis = _Basis(matrix, right > 0)
    solution = _complementary(matrix, right, basis)
    for _ in range(_REFINEMENTS):  # the method of multipliers takes the softness back
        solution = _complementary(matrix, right + _RIDGE * solution, basis)
    return (solution * (height * scale))[..., 0]


class _Basis:
    """Which unknowns, as columns (N, K, 1), are basic, the others 0; and the matrix factored so."""

    def __init__(self, matrix: Tensor, basic: Tensor) -> None:
        self._matrix = matrix
        self._identity = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
        self.exchange(basic)

    def exchange(self, basic: Tensor) -> None:
        """Take other unknowns for basic."""
        self.basic = basic
        pairs = basic & basic.mT
        self._factor, _ = torch.linalg.cholesky_ex(torch.where(pairs, self._matrix, self._identity))

    def solve(self, right: Tensor) -> Tensor:
        """Solve for the basic unknowns."""
        return torch.cholesky_solve(right * self.basic, self._factor)


def _complementary(matrix: Tensor, right: Tensor, basis: _Basis) -> Tensor:
    """Return `u >= 0` with `w = matrix u - right >= 0` and `u w = 0`, shapes (N, K, 1).

    Starts from a basis of the matrix, which is definite, and leaves it as that of the solution.
    """
    count = matrix.shape[1]
    tolerance = 64 * count * torch.finfo(matrix.dtype).eps
    rule = None
    for trial in range(50 * (count + 1)):
        u = basis.solve(right)
        w = torch.baddbmm(right, matrix, u, beta=-1)
        height = torch.linalg.vector_norm(u, torch.inf, dim=1, keepdim=True)
        wrong = torch.where(basis.basic, u, w) < height.clamp(min=1) * -tolerance
        if not bool(wrong.any()):  # synchronises: the pivots are few, and the systems small
            break
        if trial >= _BLOCKS:
            rule = rule or _Exchange(right)
            wrong = rule.choose(wrong)
        basis.exchange(basis.basic ^ wrong)
    return u.clamp(min=0)


class _Exchange:
    """Which indices of the wrong sign are exchanged: all, until that fails to make them fewer."""

    def __init__(self, like: Tensor) -> None:
        self._fewest = torch.full_like(like[:, :1], like.shape[1] + 1, dtype=torch.long)
        self._patience = torch.full_like(self._fewest, _PATIENCE)
        self._order = torch.arange(like.shape[1], device=like.device)[:, None]

    def choose(self, wrong: Tensor) -> Tensor:
        """Return which of the wrong ones, shape (N, K, 1), are exchanged now."""
        size = wrong.sum(1, keepdim=True)
        fewer = size < self._fewest
        self._fewest = torch.where(fewer, size, self._fewest)
        self._patience = torch.where(fewer, _PATIENCE, self._patience - 1)
        last = self._order == torch.where(wrong, self._order, -1).amax(1, keepdim=True)
        return wrong & (fewer | (self._patience >= 0) | last)
