"""Grids and circular maps, made ready for the kernels of fourier.cu."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from frfx.kernels.arrangement import Sizes, quads


@dataclass(frozen=True)
class Plane:
    """A periodic grid of two dimensions, and the tables of the transforms on it.

    Attributes:
        sizes: Of the grid, the source and the result, which lie at the grid's origin.
        tables: The four tables of fourier.cu, one after the other, complex.
    """

    sizes: Sizes
    tables: Tensor

    @classmethod
    def of(cls, sizes: Sizes, like: Tensor) -> Plane:
        """Make the tables, of the complex type and on the device of a tensor."""
        height, width, half = sizes.height, sizes.width, sizes.half
        frequency = torch.arange(half, device="cpu")
        twice = torch.where((frequency == 0) | (2 * frequency == width), 1.0, 2.0)
        tables = (
            _powers(sizes.source_h, 4 * quads(sizes.columns_there), height, -1),
            _powers(height, 4 * quads(sizes.columns_back), height, 1),
            _powers(sizes.source_w, 4 * quads(sizes.rows_there), width, -1),
            _powers(half, sizes.rows_back, width, 1) * twice[:, None],
        )
        return cls(sizes, torch.cat([t.flatten() for t in tables]).to(like))

    @property
    def frequencies(self) -> Tensor:
        """The numbers of the independent frequencies among those of the half spectrum."""
        height, width, half = self.sizes.height, self.sizes.width, self.sizes.half
        kept = torch.ones(height, half, dtype=torch.bool, device="cpu")
        kept[height // 2 + 1 :, :: width // 2 if width % 2 == 0 else half] = False
        return kept.flatten().nonzero().flatten()

    @property
    def nbytes(self) -> int:
        """The memory of the tables, in bytes."""
        return self.tables.nbytes


def _powers(rows: int, columns: int, n: int, sign: int) -> Tensor:
    """Return `exp(sign 2 pi i r c / n)`, complex128."""
    row, column = (torch.arange(count, device="cpu") for count in (rows, columns))
    turns = torch.outer(row, column) % n
    angle = sign * 2 * math.pi / n * turns.double()
    return torch.polar(torch.ones_like(angle), angle)


@dataclass(frozen=True)
class CircularMap:
    """A block-circulant map of images, made ready for the kernel that does it all.

    Attributes:
        plane: The grid.
        matrices: Shape (G, c', c, height, pitch), complex.
    """

    plane: Plane
    matrices: Tensor

    @classmethod
    def of(cls, plane: Plane, matrices: Tensor) -> CircularMap:
        """Take matrices (G, F, c', c) at the half spectrum, over the size of the grid."""
        sizes = plane.sizes
        lines = matrices.permute(0, 2, 3, 1).unflatten(-1, (sizes.height, sizes.half))
        return cls(plane, F.pad(lines, (0, sizes.pitch - sizes.half)).contiguous())

    @property
    def nbytes(self) -> int:
        """The memory that matrices and tables hold, in bytes."""
        return self.plane.nbytes + self.matrices.nbytes
