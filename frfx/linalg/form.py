"""The grid of a block-circulant map, and by its sizes the form and the pieces to compute it in."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from frfx.linalg.products import has_whole_registers, onednn_is_faster

Form = Literal["matrix", "dft", "fft"]

_CHUNK = 1 << 20
"""Entries of matrices that are made at a time: on a CPU they should stay in the cache, and memory
that is larger by much is fetched anew from the system every time. On a GPU four times as many."""

_MATRIX_UP_TO = 1 << 24
"""Entries of the whole map as one matrix, at most."""

_MATRIX_ON_GPU_UP_TO = 1 << 21
"""Entries up to which it is the fastest on a GPU (docs/solvers.md)."""


_PRODUCT_RATE = 80
"""Multiplications and additions a nanosecond in the products at the frequencies."""

_SLOWER_PRODUCTS = {True: 1.6, False: 1.4}
"""How much longer they take, beside all else, where MKL fills half of a register: on processors
that compute with whole ones, and on others (`products`)."""

_SHORT = 36
"""Up to which length transforms are mostly products with matrices, which any length suits."""

_ELSE = 6.0
"""What an entry costs beside its transforms, as these are counted: the products, mostly."""


@dataclass(frozen=True)
class Grid:
    """The periodic grid of a map and the corners of it that source and result lie in.

    Attributes:
        size: The grid's shape.
        source: The shape of the source.
        result: The shape of the result.
    """

    size: tuple[int, ...]
    source: tuple[int, ...]
    result: tuple[int, ...]

    @property
    def half(self) -> tuple[int, ...]:
        """The shape of the half spectrum of real data: half along the last dimension."""
        return (*self.size[:-1], self.size[-1] // 2 + 1)

    def frequencies(self, form: Form = "fft") -> Tensor:
        """Return all frequencies of the half spectrum, shape (F, dims), in cycles a sample.

        Where transforms are products, those of the last dimension vary the slowest.
        """
        axes = [
            torch.arange(f, dtype=torch.float64, device="cpu") / n
            for f, n in zip(self.half, self.size, strict=True)
        ]
        if form == "dft":
            return torch.cartesian_prod(axes[-1], *axes[:-1]).reshape(-1, len(axes)).roll(-1, 1)
        return torch.cartesian_prod(*axes).reshape(-1, len(axes))

    def conjugates(self, form: Form = "fft") -> tuple[list[slice], Tensor, Tensor]:
        """Return which frequencies to compute at, for what is real: of -u and u, one is enough.

        Returns:
            Runs of frequencies, as `frequencies` counts them; those that are in none, and for each
            of these the one in a run of which it is the conjugate.
        """
        size = torch.tensor(self.size, device="cpu")
        steps = (self.frequencies(form) * size).round().long()
        own = torch.arange(len(steps), device="cpu")
        places = torch.full(self.size, len(steps), device="cpu")  # where there is none
        places[tuple(steps.T)] = own
        opposite = places[tuple((-steps % size).T)]
        others = (opposite < own).nonzero().flatten()
        ends = [-1, *others.tolist(), len(steps)]
        runs = [slice(i + 1, j) for i, j in itertools.pairwise(ends) if i + 1 < j]
        return runs, others, opposite[others]


def chunk(device: torch.device) -> int:
    """Return how many entries of a map's matrices are made at a time."""
    return _CHUNK if device.type == "cpu" else 4 * _CHUNK


def spectral_bytes(grid: Grid, entries: int, dtype: torch.dtype) -> int:
    """Return the memory of a complex matrix of so many entries at every frequency, in bytes."""
    return 2 * dtype.itemsize * entries * math.prod(grid.half)


def choose_form(grid: Grid, groups: int, rows: int, columns: int) -> Form:
    """Return the form that is the fastest for these sizes on a CPU, by a model of what it costs.

    The model counts nanoseconds of a core a sample. What decides is the ratio of its numbers: the
    rate of large and small products, and the time that an entry takes to be transformed or moved.
    """
    slower = _SLOWER_PRODUCTS[has_whole_registers()] if onednn_is_faster() else 1.0
    source, result = math.prod(grid.source), math.prod(grid.result)
    whole = rows * result * columns * source
    entries = source * columns + result * rows
    product = slower * 8 * math.prod(grid.half) * rows * columns / _PRODUCT_RATE
    by_fft = entries * sum(map(_fast, grid.size)) / 2 + product
    by_fft += (0.4 if rows == columns == 1 else 1.7) * entries  # channels alone stay where they are
    by_dft = slower * _transforms(grid, rows, columns) + product + 0.6 * entries
    fits = groups * whole <= _MATRIX_UP_TO
    costs: dict[Form, float] = {"dft": by_dft, "fft": by_fft}
    if fits:
        costs["matrix"] = 2 * whole / 150
    return min(costs, key=costs.__getitem__)


def complex_parts(grid: Grid, rows: int, columns: int) -> int:
    """Return whether complex numbers are 2 real ones in products, or 3: their sum is one, too.

    Three products of matrices of the size do for one of complex ones, not four, and three matrices
    are kept; but the last transform there and the first one back take half as long again. On a CPU
    the one is worth it where the other is no more than half of what it saves.
    """
    last = max(len(grid.size) - 2, 0)  # which dimension is transformed last, and back first
    n, source, result = grid.size[last], grid.source[last], grid.result[last]
    saved = 2 * math.prod(grid.half) * rows * columns / _PRODUCT_RATE
    entries = math.prod(grid.half) * (source * columns + result * rows)
    more = (2 if len(grid.size) == 1 else 4) * entries / _transform_rate(n)
    return 3 if 2 * more <= saved else 2


def _transform_rate(n: int) -> float:
    return 130 * n / (n + 10)  # small matrices are multiplied slowly


def _transforms(grid: Grid, rows: int, columns: int) -> float:
    """Return what the transforms of a sample cost as products with matrices."""
    cost, left, right, done = 0.0, math.prod(grid.source), math.prod(grid.result), 1
    for i in (-1, *range(len(grid.size) - 1)):
        n, f, source, result = grid.size[i], grid.half[i], grid.source[i], grid.result[i]
        rate = _transform_rate(n)
        complex_step = 1 if i == -1 else 2
        left, right = left // source, right // result
        cost += 4 * complex_step * done * f * source * left * columns / rate
        cost += 4 * complex_step * done * f * result * right * rows / rate
        done *= f
    return cost


def _fast(n: int) -> float:
    """Return what fast transforms of a length cost an entry, there and back."""
    others = n
    for prime in (2, 3, 5, 7, 11, 13):
        while others % prime == 0:
            others //= prime
    if others > 1:
        return 6.5
    return {1: 3.0, 2: 2.25, 4: 2.0, 8: 2.0}.get(n & -n, 1.5)


def fast_length(n: int) -> int:
    """Return the length, no less than n, for which transforms and products take the least time."""
    if n <= _SHORT:
        return n
    return min(range(n, n + n // 4), key=lambda m: m * (_fast(m) + _ELSE))


def choose_form_on_gpu(grid: Grid, groups: int, rows: int, columns: int) -> Form:
    """Return the form that is the fastest for these sizes on a GPU, where launches count."""
    entries = groups * rows * columns * math.prod(grid.source) * math.prod(grid.result)
    return "matrix" if entries <= _MATRIX_ON_GPU_UP_TO else "fft"
