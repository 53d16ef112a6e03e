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
    basic = right > 0
    solution, basic = _complementary(matrix, right, basic, identity)
    for _ in range(_REFINEMENTS):  # the method of multipliers takes the softness back
        solution, basic = _complementary(matrix, right + _RIDGE * solution, basic, identity)
    return solution * (height * scale)


def _complementary(
    matrix: Tensor, right: Tensor, basic: Tensor, identity: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `u >= 0` with `w = matrix u - right >= 0` and `u w = 0`; `matrix` is definite.

    Takes which unknowns are tried first as those above 0, and returns which they are, too.
    """
    count = matrix.shape[-1]
    tolerance = 64 * count * torch.finfo(matrix.dtype).eps
    rule = _Exchange(basic)
    for trial in range(50 * (count + 1)):
        u = _solve(matrix, right, basic, identity)
        w = (matrix @ u[..., None])[..., 0] - right
        floor = -tolerance * u.abs().amax(-1, keepdim=True).clamp(min=1)
        wrong = torch.where(basic, u, w) < floor
        if not bool(wrong.any()):  # synchronises: the pivots are few, and the systems small
            break
        basic = basic ^ (wrong if trial < _BLOCKS else rule.choose(wrong))
    return u.clamp(min=0), basic


class _Exchange:
    """Which indices of the wrong sign are exchanged: all, until that fails to make them fewer."""

    def __init__(self, basic: Tensor) -> None:
        count = basic.shape[-1]
        self._fewest = torch.full_like(basic[..., 0], count + 1, dtype=torch.long)
        self._patience = torch.full_like(self._fewest, _PATIENCE)
        self._order = torch.arange(count, device=basic.device)

    def choose(self, wrong: Tensor) -> Tensor:
        """Return which of the wrong ones, shape (N, K), are exchanged now."""
        size = wrong.sum(-1)
        fewer = size < self._fewest
        self._fewest = torch.where(fewer, size, self._fewest)
        self._patience = torch.where(fewer, _PATIENCE, self._patience - 1)
        last = self._order == torch.where(wrong, self._order, -1).amax(-1, keepdim=True)
        whole = fewer | (self._patience >= 0)
        return wrong & (whole[..., None] | last)


def _solve(matrix: Tensor, right: Tensor, basic: Tensor, identity: Tensor) -> Tensor:
    """Solve for the basic unknowns of every sample, the others 0."""
    pairs = basic[..., :, None] & basic[..., None, :]
    factor, _ = torch.linalg.cholesky_ex(torch.where(pairs, matrix, identity))
    return torch.cholesky_solve(torch.where(basic, right, 0)[..., None], factor)[..., 0]
