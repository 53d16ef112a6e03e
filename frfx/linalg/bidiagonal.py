"""The largest singular values of operators that are only applied to vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from frfx.linalg.linear_function import Map


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
    right, length = _unit(start)
    left, beta = None, torch.zeros_like(length)
    diagonal, above = [], []
    for step in range(steps):
        image = mv(right)
        left, alpha = _unit(image if left is None else image - beta * left)
        diagonal.append(alpha[..., 0])
        if step < steps - 1:
            right, beta = _unit(rmv(left) - alpha * right)
            above.append(beta[..., 0])
    bidiagonal = torch.diag_embed(torch.stack(diagonal, -1))
    if above:
        bidiagonal = bidiagonal + torch.diag_embed(torch.stack(above, -1), offset=1)
    finite = bidiagonal.isfinite().all(-1).all(-1)
    bidiagonal = torch.where(finite[..., None, None], bidiagonal, 0)  # LAPACK refuses the rest
    return torch.where(finite, torch.linalg.svdvals(bidiagonal).amax(-1), torch.nan)


def unstructured(like: Tensor) -> Tensor:
    """Return vectors (..., n) without a structure that operators have, all of them the same."""
    count = torch.arange(1, like.shape[-1] + 1, device=like.device, dtype=torch.float64)
    return torch.cos(1.618 * count.square()).to(like.dtype).expand_as(like)


def _unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return vectors over their lengths, and these, shape (..., 1); 0 of what has none."""
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / length.clamp(min=torch.finfo(length.dtype).tiny), length
