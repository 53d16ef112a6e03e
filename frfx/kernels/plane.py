"""Grids and circular maps, made ready for the kernels of fourier.cu."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_A_BLOCK = (4, 8, 16)
"""How many images a block may take."""

_BLOCKS = 256
"""So many blocks fill a device."""

_MOST_THREADS = 384
"""Threads that a block may have, as in fourier.cu: two blocks then have registers enough."""

_TILES = 1 << 15
"""So many tiles fill a device, ..."""

_TILES_A_BLOCK = 48
"""... and so many a block."""

_LATENCY = 128
"""How many threads more a turn of a block might have had in the time that it waits for memory."""


Work = tuple[tuple[int, int], ...]


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
            _powers(source[0], _fours(_paired(height, height)), height, -1),
            _powers(height, _fours(_paired(result[0], height)), height, 1),
            _powers(source[1], _fours(_there(width)), width, -1),
            _powers(half, _paired(result[1], width), width, 1) * twice[:, None],
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

    def work_there(self, images: int, tile: int) -> Work:
        """Return how many tiles a block's threads make there, and of how many products each."""
        lines, of_rows = images * self.source[0], (tile + 1) // 2
        columns = _parts(_paired(self.size[0], self.size[0]), tile)
        return (
            (_quads(lines) * _parts(_there(self.size[1]), of_rows), 8 * of_rows * self.source[1]),
            (images * columns * self.pitch // 2, 8 * tile * self.source[0]),
        )

    def work_back(self, images: int, tile: int) -> Work:
        """Return the same for the steps back."""
        columns = _parts(_paired(self.result[0], self.size[0]), tile)
        rows = _parts(_paired(self.result[1], self.size[1]), tile)
        return (
            (images * columns * self.pitch // 2, 8 * tile * self.size[0]),
            (_quads(images * self.result[0]) * rows, 8 * tile * self.half),
        )

    def images(self, memory: int, images: int) -> int:
        """Return how many images a block should take, of so many; 0 if not even the fewest fit.

        Neighbours are read and written together, but there should be blocks for the whole device.
        """
        one = self.tables.element_size() * max(sum(self.there(1)), sum(self.back(1)))
        fitting = [n for n in _A_BLOCK if n * one <= memory] or [0]
        return max((n for n in fitting if images >= n * _BLOCKS), default=fitting[0])


def _parts(n: int, each: int) -> int:
    return -(-n // each)


def _quads(n: int) -> int:
    return _parts(n, 4)


def _fours(n: int) -> int:
    return 4 * _quads(n)


def _paired(results: int, size: int) -> int:
    """Return how many results are made, where the others are their pairs, as fourier.cu has it."""
    return min(results, size // 2) if size % 2 == 0 else results


def _there(width: int) -> int:
    """Return the same for the half spectrum of a line."""
    return width // 4 + 1 if width % 2 == 0 else width // 2 + 1


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

    def work(self, tile: int) -> Work:
        """Return how many tiles a block's threads make, and of how many products each."""
        _, rows, columns, height, pitch = self.matrices.shape
        product = (_quads(rows) * height * pitch, 16 * columns)
        plane = self.plane
        return (*plane.work_there(columns, tile), product, *plane.work_back(rows, tile))

    @property
    def nbytes(self) -> int:
        """The memory that matrices and tables hold, in bytes."""
        return self.plane.nbytes + self.matrices.numel() * self.matrices.element_size()


@functools.lru_cache(1 << 10)
def threads_for(work: Work) -> int:
    """Return how many threads a block should have: few are idle in any step, or wait alone."""

    def cost(threads: int) -> int:
        return sum(_parts(count, threads) * each for count, each in work) * (threads + _LATENCY)

    return min(range(64, _MOST_THREADS + 1, 32), key=cost)


def tile_for(work: Callable[[int], Work], blocks: int, dtype: torch.dtype) -> int:
    """Return how wide tiles should be: as wide as leaves a device full of threads."""
    for tile in (4, 2) if dtype == torch.float32 else (2,):
        fewest = min(count for count, _ in work(tile))
        if fewest >= _TILES_A_BLOCK and blocks * fewest >= _TILES:
            return tile
    return 1
