"""What pooling, interpolation and padding share: a matrix for every spatial dimension."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from frfx.linalg import Dense, Separable
from frfx.ops import Op, Shape
from frfx.rules.base import AffineInversion

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Dimension:
    """One of the dimensions that an op acts on.

    Attributes:
        index: Which of them, from 0.
        count: How many there are.
        size: Its size in the input.
        onto: Its size in the output.
        like: An empty tensor of the input's dtype and device.
    """

    index: int
    count: int
    size: int
    onto: int
    like: Tensor

    def impulses(self, dtype: torch.dtype = torch.float64, others: int = 1) -> Tensor:
        """Return the unit vectors along this dimension as a batch of images.

        Args:
            dtype: The images' dtype.
            others: Their size in the other dimensions, along which they are constant.

        Returns:
            Shape (size, 1, others, ..., size, ..., others).
        """
        eye = torch.eye(self.size, dtype=dtype, device=self.like.device)
        images = eye.reshape(self.size, 1, *self.place(self.size, 1))
        return images.expand(-1, -1, *self.place(self.size, others)).contiguous()

    def response(self, images: Tensor) -> Tensor:
        """Return the matrix (m, n) of a linear op, in double, from what it makes of impulses."""
        return images[(slice(None), 0, *self.place(slice(None), 0))].mT.double()

    def alone(self) -> Dimension:
        """Return this dimension as the only one."""
        return replace(self, index=0, count=1)

    def place(self, value: S, others: T) -> list[S | T]:
        """Return a list with a value in this dimension's place, and another in all others."""
        return [value if i == self.index else others for i in range(self.count)]


class SeparableInversion(AffineInversion):
    """`x* = x^ + A+ (y* - y^)` for an op that acts on each of the last dimensions apart.

    Args:
        op: The op that is inverted.
        dims: How many dimensions it acts on; None for all but batch and channels.
        matrix: Makes the matrix (m, n) of one of them.
        solver: Factors them.
    """

    def __init__(
        self, op: Op, dims: int | None, matrix: Callable[[Dimension], Tensor], solver: Dense
    ) -> None:
        super().__init__(op, self._separable, solver)
        self.dims, self.matrix, self.options = dims, matrix, solver
        self.solver = "separable"

    def key(self, input_shape: Shape, output_shape: Shape) -> Shape:
        """Return the sizes of the dimensions that are acted on, before and after."""
        dims = len(input_shape) - 1 if self.dims is None else self.dims
        return (*input_shape[-dims:], *output_shape[-dims:])

    def _separable(self, op: Op, key: Shape) -> Separable:
        del op
        count = len(key) // 2
        dimensions = (
            Dimension(index, count, *sizes, self.like)
            for index, sizes in enumerate(zip(key[:count], key[count:], strict=True))
        )
        return Separable(tuple(map(self.matrix, dimensions)), self.like.dtype)


def equal_singular_values(solver: Dense) -> float:
    """Return the share of the pseudo-inverse that is left of it by cutoff and damping.

    For an op whose singular values are all the same: windows that tile the image, copies.
    """
    return 0.0 if solver.rcond is not None and solver.rcond >= 1 else 1 / (1 + solver.damping)
