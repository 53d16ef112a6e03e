"""How maps of small images are dealt out to blocks and threads: as a model of the time has it.

The constants of the model were fitted to times of an H200 (docs/solvers.md): what it chooses takes
5 % more than the best of all choices in the mean, and 20 % at most.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

_IMAGES = (4, 8, 16)
"""How many images a block of the transforms may take."""

_THREADS = range(64, 385, 32)
"""How many threads a block may have: two of the most, as in fourier.cu, have registers enough."""

_REGISTERS = 80
"""What a thread takes of them, at most, ..."""

_ALL_REGISTERS = 1 << 16
"""... and how many a multiprocessor has."""

_ALL_THREADS = 1 << 11
"""How many threads a multiprocessor may have."""

_RESERVED = 1 << 10
"""Bytes of shared memory that the driver takes of every block."""

_TILES = {1: 1.1, 2: 1.0, 4: 0.95}
"""What a product costs in a tile of a width: the wider, the less there is to load."""

_LATENCY = 256
"""How many threads more might have had a turn in the time that one waits for memory."""

_CARRIED = 40
"""What a number costs, in products, that is read from or written to the memory of the device."""

Steps = tuple[tuple[int, int], ...]
"""Tiles that the threads of a block make, and products in each, by step."""


class Device(NamedTuple):
    """What a device has.

    Attributes:
        multiprocessors: How many.
        a_block: Bytes of shared memory that a block may have.
        shared: Bytes that a multiprocessor has.
    """

    multiprocessors: int
    a_block: int
    shared: int


class Sizes(NamedTuple):
    """A grid of two dimensions, and the corners of it that source and result lie in.

    In the order in which the kernels take them.
    """

    height: int
    width: int
    source_h: int
    source_w: int
    result_h: int
    result_w: int

    @property
    def half(self) -> int:
        """The width of half a spectrum."""
        return self.width // 2 + 1

    @property
    def pitch(self) -> int:
        """How many numbers a line of half a spectrum takes in shared memory: an even count."""
        return self.half + self.half % 2

    @property
    def independent(self) -> int:
        """How many frequencies of half a spectrum of a real image are no conjugates of others.

        In the columns that are their own opposites, the lower half is the conjugate of the upper.
        """
        own_opposites = 2 if self.width % 2 == 0 else 1
        return self.height * self.half - (self.height - 1) // 2 * own_opposites

    # How many results are made; the others are their pairs.

    @property
    def columns_there(self) -> int:
        """Of a column of the spectrum."""
        return paired(self.height, self.height)

    @property
    def columns_back(self) -> int:
        """Of a column of the result."""
        return paired(self.result_h, self.height)

    @property
    def rows_there(self) -> int:
        """Of a line of the spectrum."""
        return self.width // 4 + 1 if self.width % 2 == 0 else self.half

    @property
    def rows_back(self) -> int:
        """Of a line of the result."""
        return paired(self.result_w, self.width)

    # What a block needs and does.

    def memory_there(self, images: int) -> tuple[int, int]:
        """Return how many complex numbers a block keeps of the even and of the odd steps there."""
        lines = images * self.source_h
        residual = 4 * (quads(lines) | 1) * self.source_w
        return lines * self.pitch, max(residual // 2, images * self.height * self.pitch)

    def memory_back(self, images: int) -> tuple[int, int]:
        """Return the same for the steps back."""
        return images * self.height * self.pitch, images * self.result_h * self.pitch

    def steps_there(self, images: int, tile: int) -> Steps:
        """Return the steps there."""
        rows = (tile + 1) // 2
        return (
            (
                quads(images * self.source_h) * parts(self.rows_there, rows),
                8 * rows * self.source_w,
            ),
            (images * parts(self.columns_there, tile) * self.pitch // 2, 8 * tile * self.source_h),
        )

    def steps_back(self, images: int, tile: int) -> Steps:
        """Return the steps back."""
        return (
            (images * parts(self.columns_back, tile) * self.pitch // 2, 8 * tile * self.height),
            (quads(images * self.result_h) * parts(self.rows_back, tile), 8 * tile * self.half),
        )


def parts(n: int, each: int) -> int:
    """Return how many parts of a size, or less, there are."""
    return -(-n // each)


def quads(n: int) -> int:
    """Return how many parts of four."""
    return parts(n, 4)


def paired(results: int, size: int) -> int:
    """Return how many results are made of sums over even and odd terms, if the size is even."""
    return min(results, size // 2) if size % 2 == 0 else results


class Arrangement(NamedTuple):
    """What a kernel is launched with.

    Attributes:
        images: How many images a block takes.
        tile: How wide a tile is.
        threads: How many a block has.
        even, odd: How many complex numbers a block keeps of even and odd steps.
    """

    images: int
    tile: int
    threads: int
    even: int
    odd: int

    def bytes_of(self, real: Tensor) -> int:
        """Return the shared memory of a block, in bytes, by the type of the numbers' parts."""
        return 2 * real.element_size() * (self.even + self.odd)


class _Option(NamedTuple):
    """One way to deal out images, without the threads."""

    images: int
    blocks: int
    memory: tuple[int, int]
    steps: Callable[[int], Steps]


@functools.lru_cache(1 << 10)
def arrange(
    sizes: Sizes, images: int, real_bytes: int, device: Device, *, back: bool
) -> Arrangement | None:
    """Return how the transforms of some images are dealt out; None if not even a few fit."""
    memory = sizes.memory_back if back else sizes.memory_there
    steps = sizes.steps_back if back else sizes.steps_there

    def option(each: int) -> _Option:
        carried = each * sizes.independent, _CARRIED
        return _Option(
            each, parts(images, each), memory(each), lambda tile: (*steps(each, tile), carried)
        )

    return _fastest(map(option, _IMAGES), real_bytes, device)


@functools.lru_cache(1 << 10)
def arrange_map(
    sizes: Sizes, rows: int, columns: int, blocks: int, real_bytes: int, device: Device
) -> Arrangement | None:
    """Return how a whole map is dealt out, a sample and group a block; None if it does not fit."""
    numbers = sizes.height * sizes.pitch
    between = ((quads(rows) * numbers, 16 * columns), (sizes.height * sizes.half, _CARRIED))
    pairs = zip(sizes.memory_there(columns), sizes.memory_back(rows), strict=True)
    even, odd = map(max, pairs)

    def steps(tile: int) -> Steps:
        there, back = sizes.steps_there(columns, tile), sizes.steps_back(rows, tile)
        return (*there, *between, *back)

    return _fastest([_Option(1, blocks, (even, odd), steps)], real_bytes, device)


def _fastest(options: Iterable[_Option], real_bytes: int, device: Device) -> Arrangement | None:
    best: tuple[float, Arrangement] | None = None
    tiles = [tile for tile in _TILES if tile * real_bytes <= 16]  # others do not fit the registers
    for option in options:
        even, odd = (count + count % 2 for count in option.memory)
        for tile, threads in itertools.product(tiles, _THREADS):
            way = Arrangement(option.images, tile, threads, even, odd)
            memory = 2 * real_bytes * (even + odd)
            if memory <= device.a_block:
                time = _time(way, option, memory, device)
                best = min(best or (time, way), (time, way))
    return None if best is None else best[1]


def _time(way: Arrangement, option: _Option, memory: int, device: Device) -> float:
    """Return about how long a kernel takes, in products of a multiprocessor."""
    threads = way.threads
    resident = min(
        _ALL_REGISTERS // (threads * _REGISTERS),
        _ALL_THREADS // threads,
        max(1, device.shared // (memory + _RESERVED)),
    )
    waves, left = divmod(option.blocks, resident * device.multiprocessors)
    busy = waves * (resident * threads + _LATENCY)
    if left:
        busy += parts(left, device.multiprocessors) * threads + _LATENCY
    turns = sum(parts(count, threads) * products for count, products in option.steps(way.tile))
    return _TILES[way.tile] * turns * busy
