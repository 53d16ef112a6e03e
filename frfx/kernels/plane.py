"""Grids and circular maps, made ready for the kernels of fourier.cu."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

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
            F.pad(_powers(source[1], half, width, -1), (0, -half % 4)),
            _powers(half, result[1], width, 1) * twice[:, None],
        )
        return cls(size, source, result, torch.cat([t.flatten() for t in tables]).to(like))

    @property
    def half(self) -> int:
        """The width of half a spectrum."""
        return self.size[1] // 2 + 1

    @property
    def pitch(self) -> int:
        """How many numbers a line of half a spectrum takes in shared memory: an even count."""
        return self.half + self.half % 2

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
        residual = 4 * (_quads(lines) | 1) * self.source[1]
        return lines * self.pitch, max(residual // 2, images * self.size[0] * self.pitch)

    def back(self, images: int) -> tuple[int, int]:
        """Return the same for the steps back."""
        return images * self.size[0] * self.pitch, images * self.result[0] * self.pitch

    def work_there(self, images: int) -> tuple[tuple[int, int], ...]:
        """Return how many tiles the threads have to make, and of how many terms each."""
        wide = _quads(_near(self.size[0], self.size[0]))
        return (
            (_quads(images * self.source[0]) * _quads(self.half), self.source[1]),
            (images * wide * self.pitch // 2, self.source[0]),
        )

    def work_back(self, images: int) -> tuple[tuple[int, int], ...]:
        """Return the same for the steps back."""
        wide = _quads(_near(self.result[0], self.size[0]))
        return (
            (images * wide * self.pitch // 2, self.size[0]),
            (_quads(images * self.result[0]) * _quads(self.result[1]), self.half),
        )

    def images(self, memory: int, images: int) -> int:
        """Return how many images a block should take, of so many; 0 if not even the fewest fit.

        Neighbours are read and written together, but there should be blocks for the whole device.
        """
        one = self.tables.element_size() * max(sum(self.there(1)), sum(self.back(1)))
        fitting = [n for n in _A_BLOCK if n * one <= memory] or [0]
        return max((n for n in fitting if images >= n * _BLOCKS), default=fitting[0])


def _quads(n: int) -> int:
    return -(-n // 4)


def _near(results: int, height: int) -> int:
    """Return how many results of a column are made from sums, as fourier.cu has it."""
    return min(results, height // 2) if height % 2 == 0 else results


def _columns(terms: int, results: int, height: int, sign: int) -> Tensor:
    """Return a table of transforms along columns."""
    return _powers(terms, 4 * _quads(_near(results, height)), height, sign)


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
        matrices: Shape (G, c', c, height, pitch), complex.
    """

    plane: Plane
    matrices: Tensor

    @classmethod
    def of(cls, plane: Plane, matrices: Tensor) -> CircularMap:
        """Take matrices (G, F, c', c) at the half spectrum, over the size of the grid."""
        lines = matrices.permute(0, 2, 3, 1).unflatten(-1, (plane.size[0], plane.half))
        return cls(plane, F.pad(lines, (0, plane.pitch - plane.half)).contiguous())

    @property
    def buffers(self) -> tuple[int, int]:
        """How many complex numbers a block keeps of the even steps, and of the odd ones."""
        _, rows, columns, *_ = self.matrices.shape
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
        _, rows, columns, height, pitch = self.matrices.shape
        product = (_quads(rows) * height * pitch, columns)
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
