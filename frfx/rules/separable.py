"""What pooling, interpolation and padding share: a matrix for every spatial dimension."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from frfx.linalg import Dense, Separable
from frfx.ops import Op, Shape
from frfx.rules.base import AffineInversion

DimensionMatrix = Callable[[int, int, int, Tensor], Tensor]
"""Makes the matrix (m, n) of a spatial dimension from its index among those, n, m, and a tensor of
the dtype and device of what the op is applied to."""


class SeparableInversion(AffineInversion):
    """`x* = x^ + A+ (y* - y^)` for an op that acts on each of the last dimensions apart.

    Args:
        op: The op that is inverted.
        dims: How many dimensions it acts on; None for all but batch and channels.
        matrix: Makes the matrix of one of them.
        solver: Factors them.
    """

    def __init__(self, op: Op, dims: int | None, matrix: DimensionMatrix, solver: Dense) -> None:
        super().__init__(op, self._separable, solver)
        self.dims, self.matrix, self.options = dims, matrix, solver
        self.solver = "separable"

    def key(self, input_shape: Shape, output_shape: Shape) -> Shape:
        """Return the sizes of the dimensions that are acted on, before and after."""
        dims = len(input_shape) - 1 if self.dims is None else self.dims
        return (*input_shape[-dims:], *output_shape[-dims:])

    def _separable(self, op: Op, key: Shape) -> Separable:
        del op
        dims = len(key) // 2
        sizes = enumerate(zip(key[:dims], key[dims:], strict=True))
        matrices = (self.matrix(dim, size, onto, self.like) for dim, (size, onto) in sizes)
        return Separable(tuple(matrices), self.like.dtype)


def impulses(size: int, dims: int, dim: int, like: Tensor) -> Tensor:
    """Return all unit vectors of one spatial dimension as a batch of images.

    What a linear op makes of them, read by `response`, is its matrix.

    Args:
        size: The size of the dimension; the others have the size 1.
        dims: How many spatial dimensions the images have.
        dim: Which of them the vectors lie along.
        like: Its dtype and device are taken.

    Returns:
        Shape (size, 1, 1, ..., size, ..., 1).
    """
    eye = torch.eye(size, dtype=like.dtype, device=like.device)
    return eye.reshape(size, 1, *[1] * dim, size, *[1] * (dims - 1 - dim))


def response(images: Tensor) -> Tensor:
    """Return the matrix (m, n) of a linear op from its n responses to impulses, in double."""
    return images.flatten(1).mT.double()


def equal_singular_values(rcond: float | None, damping: float) -> float:
    """Return the share of the pseudo-inverse that is left of it by cutoff and damping.

    For an op whose singular values are all the same: windows that tile the image, copies.
    """
    return 0.0 if rcond is not None and rcond >= 1 else 1 / (1 + damping)
