"""Grids and circular maps, made ready for the kernels of fourier.cu."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

_A_BLOCK = (4, 8, 16)
"""How many images a block may take."""

_BLOCKS = 256
"""So many blocks fill a device."""

_LATENCY = 128
"""How many threads more a turn of a block might have had in the time that it waits for memory."""


@dataclass(frozen=True)
class Plane:
    """A periodic grid of two dimensions, and the tables of the transforms on it.

    Attributes:
        size: Height and width of the grid.
        source: Those of the source, which lies at the grid's origin.
        result: Those of the result, likewise.
        tables: The four tables of fourier.cu, one after the other, complex.
    """

    size: tuple[int, int]
    source: tuple[int, int]
    result: tuple[int, int]
    tables: Tensor

    @classmethod
    def of(
        cls, size: tuple[int, int], source: tuple[int, int], result: tuple[int, int], like: Tensor
    ) -> Plane:
        """Make the tables, of the complex type and on the device of a tensor."""
        (height, width), half = size, size[1] // 2 + 1
        frequency = torch.arange(half)
        twice = torch.where((frequency == 0) | (2 * frequency == width), 1.0, 2.0)
        tables = (
            _columns(source[0], height, height, -1),
            _columns(height, result[0], height, 1),
            _powers(source[1], half, width, -1),
            _powers(half, result[1], width, 1) * twice[:, None],
        )
        return cls(size, source, result, torch.cat([t.flatten() for t in tables]).to(like))

    @property
    def half(self) -> int:
        """The width of half a spectrum."""
        return self.size[1] // 2 + 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """The six sizes, in the order in which the kernels take them."""
        return *self.size, *self.source, *self.result

    @property
    def nbytes(self) -> int:
        """The memory of the tables, in bytes."""
        return self.tables.numel() * self.tables.element_size()

    def there(self, images: int) -> tuple[int, int]:
        """Return how many complex numbers a block keeps of the even and of the odd steps there."""
        lines = images * self.source[0]
        residual = -(-lines // 4) * 4 * self.source[1]
        return lines * self.half, max(-(-residual // 2), images * self.size[0] * self.half)

    def back(self, images: int) -> tuple[int, int]:
        """Return the same for the steps back."""
        return images * self.size[0] * self.half, images * self.result[0] * self.half

    def work_there(self, images: int) -> tuple[tuple[int, int], ...]:
        """Return how many times a thread has four results to make, and of how many terms each."""
        lines = -(-images * self.source[0] // 4)
        return (
            (lines * self.half, self.source[1]),
            (images * _wide(self.size[0], self.size[0]) * self.half, self.source[0]),
        )

    def work_back(self, images: int) -> tuple[tuple[int, int], ...]:
        """Return the same for the steps back."""
        lines = -(-images * self.result[0] // 4)
        return (
            (images * _wide(self.result[0], self.size[0]) * self.half, self.size[0]),
            (lines * self.result[1], self.half),
        )

    def images(self, memory: int, images: int) -> int:
        """Return how many images a block should take, of so many; 0 if not even the fewest fit.

        Neighbours are read and written together, but there should be blocks for the whole device.
        """
        one = self.tables.element_size() * max(sum(self.there(1)), sum(self.back(1)))
        fitting = [n for n in _A_BLOCK if n * one <= memory] or [0]
        return max((n for n in fitting if images >= n * _BLOCKS), default=fitting[0])


def _wide(results: int, height: int) -> int:
    """Return how many threads make a column, as fourier.cu has it."""
    split = height % 2 == 0
    return -(-(min(results, height // 2) if split else results) // (2 if split else 4))


def _columns(terms: int, results: int, height: int, sign: int) -> Tensor:
    """Return a table of transforms along columns."""
    wide = _wide(results, height) * (2 if height % 2 == 0 else 4)
    return _powers(terms, wide, height, sign)


def _powers(rows: int, columns: int, n: int, sign: int) -> Tensor:
    """Return `exp(sign 2 pi i r c / n)`, complex128."""
    turns = torch.outer(torch.arange(rows), torch.arange(columns)) % n
    angle = sign * 2 * math.pi / n * turns.double()
    return torch.polar(torch.ones_like(angle), angle)


@dataclass(frozen=True)
class CircularMap:
    """A block-circulant map of images, made ready for the kernel that does it all.

    Attributes:
        plane: The grid.
        matrices: Shape (G, c', c, F), complex, with F = height * (width // 2 + 1).
    """

    plane: Plane
    matrices: Tensor

    @classmethod
    def of(cls, plane: Plane, matrices: Tensor) -> CircularMap:
        """Take matrices (G, F, c', c) at the half spectrum, over the size of the grid."""
        return cls(plane, matrices.permute(0, 2, 3, 1).contiguous())

    @property
    def buffers(self) -> tuple[int, int]:
        """How many complex numbers a block keeps of the even steps, and of the odd ones."""
        _, rows, columns, _ = self.matrices.shape
        pairs = zip(self.plane.there(columns), self.plane.back(rows), strict=True)
        even, odd = (max(pair) for pair in pairs)
        return even + even % 2, odd + odd % 2

    @property
    def shared(self) -> int:
        """The shared memory that a block needs, in bytes."""
        return sum(self.buffers) * self.matrices.element_size()

    @functools.cached_property
    def threads(self) -> int:
        """How many threads a block should have."""
        _, rows, columns, frequencies = self.matrices.shape
        product = (-(-rows // 4) * frequencies, columns)
        return threads_for((*self.plane.work_there(columns), product, *self.plane.work_back(rows)))

    @property
    def nbytes(self) -> int:
        """The memory that matrices and tables hold, in bytes."""
        return self.plane.nbytes + self.matrices.numel() * self.matrices.element_size()


@functools.lru_cache(1 << 10)
def threads_for(work: tuple[tuple[int, int], ...]) -> int:
    """Return how many threads a block should have: few are idle in any step, or wait alone."""

    def cost(threads: int) -> int:
        return sum(-(-count // threads) * terms for count, terms in work) * (threads + _LATENCY)

    return min(range(64, 513, 32), key=cost)
