"""Operators that are only applied to vectors, as bidiagonal matrices, and what these tell."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from frfx.linalg.linear_function import Map

_ROUNDING = 16.0
"""How many units of rounding of an operator a new direction has to be."""


@dataclass(frozen=True)
class Bidiagonal:
    """A batch of operators J on the vectors that a bidiagonalisation has met: `J V = U B`.

    What J makes of all of V but the last, and `J^T` of all of U, lies among these.

    Attributes:
        left: U, shape (N, k + 1, m): orthonormal rows, or zero where there is no further one, or
            something is not finite.
        right: V, the same, shape (N, k + 1, n).
        matrix: B, lower bidiagonal, shape (N, k + 1, k + 1).
        start: Where it has begun, in terms of U, shape (N, k + 1).
    """

    left: Tensor
    right: Tensor
    matrix: Tensor
    start: Tensor

    def mv(self, x: Tensor) -> Tensor:
        """Apply J to a vector in terms of V, in terms of U."""
        return (self.matrix @ x[..., None])[..., 0]

    def rmv(self, y: Tensor) -> Tensor:
        """Apply its transpose to a vector in terms of U."""
        return (self.matrix.mT @ y[..., None])[..., 0]

    def of_left(self, y: Tensor) -> Tensor:
        """Return the vector that is y in terms of U."""
        return (y[:, None] @ self.left)[:, 0]

    def of_right(self, x: Tensor) -> Tensor:
        """Return the vector that is x in terms of V."""
        return (x[:, None] @ self.right)[:, 0]

    def __truediv__(self, scale: Tensor) -> Bidiagonal:
        """Return what the operators over a number each, shape (N, 1), are."""
        return replace(self, matrix=self.matrix / scale[..., None])

    def largest(self) -> Tensor:
        """Return the largest singular values, from below; NaN of what is not finite."""
        return _largest(self.matrix)


def bidiagonalise(mv: Map, rmv: Map, start: Tensor, steps: int) -> Bidiagonal:
    """Bidiagonalise a batch of operators from the left.

    Args:
        mv: Applies J: (N, n) -> (N, m).
        rmv: Applies its transpose.
        start: Shape (N, m).
        steps: The products that are made with J; with the transpose it is one more.

    Reference:
        Paige and Saunders (1982), LSQR, "Bidiag 1".
    """
    lefts: list[Tensor] = []
    rights: list[Tensor] = []
    matrix, length = _bidiagonal(mv, rmv, start, steps, lefts, rights)
    finite = matrix.isfinite().all(-1).all(-1)[:, None, None]
    return Bidiagonal(
        left=torch.where(finite, torch.stack(lefts, 1), 0),
        right=torch.where(finite, torch.stack(rights, 1), 0),
        matrix=matrix,
        start=F.pad(length, (0, steps)),
    )


def _bidiagonal(
    mv: Map,
    rmv: Map,
    start: Tensor,
    steps: int,
    lefts: list[Tensor] | None = None,
    rights: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return B and the length of the first vector; add the vectors to lists, if there are any."""
    left, length = _another(start, lefts, torch.zeros_like(start[..., :1].abs()))
    right, alpha = _another(rmv(left), rights, torch.zeros_like(length))
    diagonal = [alpha]
    below: list[Tensor] = []
    for _ in range(steps):
        largest = torch.cat(diagonal + below, -1).amax(-1, keepdim=True)
        left, beta = _another(mv(right) - alpha * left, lefts, largest)
        right, alpha = _another(rmv(left) - beta * right, rights, largest)
        below.append(beta)
        diagonal.append(alpha)
    matrix = torch.diag_embed(torch.cat(diagonal, -1))
    if below:
        matrix = matrix + torch.diag_embed(torch.cat(below, -1), offset=-1)
    return matrix, length


def _another(vector: Tensor, known: list[Tensor] | None, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Return the direction of what a vector has beside the known ones, and its length.

    Both are zero where that is rounding, which would lead anywhere. A list of known ones grows.
    """
    for other in known or ():
        vector = vector - (vector * other).sum(-1, keepdim=True) * other
    length = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    vector = vector / length.clamp(min=torch.finfo(length.dtype).tiny)
    spent = length <= _ROUNDING * torch.finfo(length.dtype).eps * largest
    vector, length = torch.where(spent, 0, vector), torch.where(spent, 0, length)
    if known is not None:
        known.append(vector)
    return vector, length


def largest_singular_values(mv: Map, rmv: Map, start: Tensor, steps: int) -> Tensor:
    """Return close estimates from below, one an operator.

    Args:
        mv: Applies the operators: (..., n) -> (..., m).
        rmv: Applies their adjoints.
        start: Vectors as `unstructured` returns them, shape (..., n).
        steps: How many products are made with the operators, and about as many with the adjoints.

    Returns:
        Shape (...), real; NaN where something is not finite.

    Reference:
        Golub and Kahan (1965): bidiagonalisation, whose singular values approach the extreme ones.
    """
    adjoint, _ = _bidiagonal(rmv, mv, start, steps - 1)
    return _largest(adjoint)


def unstructured(like: Tensor) -> Tensor:
    """Return vectors (..., n) without a structure that operators have, all of them the same."""
    count = torch.arange(1, like.shape[-1] + 1, device=like.device, dtype=torch.float64)
    return torch.cos(1.618 * count.square()).to(like.dtype).expand_as(like)


def _largest(matrices: Tensor) -> Tensor:
    finite = matrices.isfinite().all(-1).all(-1)
    matrices = torch.where(finite[..., None, None], matrices, 0)  # LAPACK refuses the rest
    return torch.where(finite, torch.linalg.svdvals(matrices).amax(-1), torch.nan)
