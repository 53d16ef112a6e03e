"""Apply one matrix a frequency: the block-circulant maps that spectral solvers end in.

A map takes (N, G, c, *source) to (N, G, c', *result): it puts the source at the origin of a
periodic grid, transforms it, multiplies by a (c', c) matrix at every frequency, transforms back,
and keeps the corner of the grid that the result lies in. It has three forms, equal to rounding:

- `"matrix"`: the whole map as one real matrix. The fastest for small images.
- `"dft"`: the transforms as products with real matrices, the batch as the last dimension, so that
  no step but the first and the last moves data without computing. The fastest for images up to
  about 16 pixels wide, on which fast transforms are mostly overhead.
- `"fft"`: fast transforms. The fastest for large images.

The code is written against the array API and runs on any of its namespaces. On a GPU, kernels take
its place where they are faster (`kernel_map`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from frfx.linalg.backend import Backend, Namespace, torch_backend
from frfx.linalg.kernel_map import KernelMap
from frfx.linalg.pseudo_inverse import nbytes
from frfx.recording import is_recorded

Form = Literal["matrix", "dft", "fft"]

_CHUNK = 1 << 22
"""Matrix entries that are made at a time, and bound on those of a temporary."""

_CACHED = 1 << 20
"""Entries of an image stack that a thread transforms at a time: they should stay in the cache."""

_AT_ONCE = 1 << 26
"""The same on a GPU, where it only bounds the memory."""

_LEAST_BATCH = 16
"""Samples that are transformed at a time at least, twice as many with groups: fewer make poor
matrix products."""

_MATRIX_UP_TO = 1 << 21
"""Entries up to which the whole map as one matrix is the fastest on a GPU (docs/solvers.md)."""

_DFT_UP_TO = 16
"""Largest side of a grid on which transforms as matrix products beat fast ones (see
docs/solvers.md)."""

_SCALAR_DFT_UP_TO = 8
"""The same where every channel stands alone, and the product costs nothing."""


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

    def half(self, form: Form) -> tuple[int, ...]:
        """Return the shape of the half spectrum of real data: half along one dimension."""
        halved = len(self.size) - 1 if form == "fft" else 0
        return tuple(n // 2 + 1 if i == halved else n for i, n in enumerate(self.size))

    def frequencies(self, form: Form) -> Tensor:
        """Return all frequencies of the half spectrum, shape (F, dims), in cycles a sample."""
        axes = [
            torch.arange(f, dtype=torch.float64) / n
            for f, n in zip(self.half(form), self.size, strict=True)
        ]
        return torch.cartesian_prod(*axes).reshape(-1, len(axes))


Matrices = Callable[[Tensor], Tensor]
"""Makes the matrices (G, F, c', c), complex128, at frequencies (F, dims)."""


class FourierMap:
    """A block-circulant map, made ready.

    Args:
        matrices: Makes the matrices at given frequencies.
        grid: Where the map lives.
        groups, rows, columns: G, c' and c.
        dtype: The real type that is computed in.
        device: Where it is computed.
        memory: Bound in bytes on what is kept. Beyond it, the matrices are made anew in chunks
            whenever the map is applied.
        form: One of the forms; None for the one that the sizes ask for.
        backend: The array library that applies the map.

    Attributes:
        form: The form that was chosen.
        streams: Whether the matrices are made anew at every application.
        by_kernels: What applies the map by kernels; None where none are the fastest.
    """

    def __init__(
        self,
        matrices: Matrices,
        grid: Grid,
        *,
        groups: int,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        device: torch.device,
        memory: float = math.inf,
        form: Form | None = None,
        backend: Backend = torch_backend,
    ) -> None:
        self.grid, self.groups, self.rows, self.columns = grid, groups, rows, columns
        self.dtype, self.device, self.backend = dtype, device, backend
        choose = choose_form if device.type == "cpu" else choose_form_on_gpu
        self.form = form or choose(grid, groups, rows, columns)
        if form is None and self._bytes_of(self.form) > memory:
            self.form = "fft"  # the smallest, and it can be made anew in chunks
        self._matrices = matrices
        self.streams = self.form != "matrix" and self._bytes_of(self.form) > memory
        self._tables: tuple[Any, ...] = ()
        self._kept: Any = None
        self._ready = False
        self.by_kernels = KernelMap.of(self)
        if self.by_kernels is None or self.by_kernels.in_one is None:
            self._make_ready()

    def _make_ready(self) -> None:
        """Make what the form applies: a map that a kernel does in one seldom needs it."""
        if self._ready:
            return
        self._ready, constant = True, self.backend.constant
        with torch.inference_mode(False), torch.no_grad():
            if self.form == "dft":
                tables = _dft_tables(self.grid, self.dtype, self.device)
                self._tables = tuple(map(constant, tables))
            if self.form == "matrix":
                self._kept = constant(self._dense())
            elif not self.streams:
                self._kept = constant(self.at(self.grid.frequencies(self.form), self.form))

    def _bytes_of(self, form: Form) -> int:
        """Return the memory of a form's matrices, in bytes."""
        grid = self.grid
        if form == "matrix":
            count, width = math.prod(grid.source) * math.prod(grid.result), 1
        else:
            count, width = math.prod(grid.half(form)), 4 if form == "dft" else 2
        return self.groups * self.rows * self.columns * count * width * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """The memory that the map holds, in bytes."""
        kept = [self._kept] if self._kept is not None else []
        held = 0 if self.by_kernels is None else self.by_kernels.nbytes
        return held + sum(
            array.size * array.itemsize if not isinstance(array, Tensor) else nbytes(array)
            for array in (*self._tables, *kept)
        )

    def __call__(
        self, source: Tensor, minus: Tensor | None = None, plus: Tensor | None = None
    ) -> Tensor:
        """Return `plus + map(source - minus)`, without what is None.

        Args:
            source: Shape (N, G, c, *source), as `minus`.
            minus: What is taken off it.
            plus: Shape (N, G, c', *result), as what is returned.
        """
        if self.by_kernels is not None and self.by_kernels.serve(source, minus, plus):
            return self.by_kernels(source, minus, plus)
        if not is_recorded(source, minus, plus):
            return self.backend.run(self._apply, source, minus, plus)
        # Step by step: nothing in place, and what another library detaches is the map alone.
        residual = source if minus is None else source - minus
        image = self.backend.run(self._apply, residual, None, None)
        return image if plus is None else plus + image

    def _apply(self, source: Any, minus: Any, plus: Any) -> Any:
        """Apply the map to parts of the batch: what is between the steps stays in caches."""
        self._make_ready()
        n = source.shape[0]
        most = n if self.form == "matrix" else self.samples_at_once()
        most = -(-n // -(-n // most)) if n else 1  # parts of one size
        in_place = plus is not None and n > most and isinstance(plus, Tensor)
        whole = torch.empty_like(plus) if in_place else None
        parts = []
        for i in range(0, max(n, 1), most):
            x, y, z = (t if t is None or n <= most else t[i : i + most, ...]
                       for t in (source, minus, plus))  # fmt: skip
            result = self._by_form(x if y is None else self._residual(x, y))
            if whole is not None:
                torch.add(z, result, out=whole[i : i + most])
            else:
                parts.append(result if z is None else z + result)
        return _join(self.backend.namespace, parts, axis=0) if whole is None else whole

    def _residual(self, target: Any, output: Any) -> Any:
        """Return `target - output`; of torch's, for fast transforms, on the grid."""
        grid = self.grid
        if self.form != "fft" or grid.size == grid.source or not isinstance(target, Tensor):
            return target - output
        padded = target.new_zeros(*target.shape[:3], *grid.size)
        corner = (slice(None),) * 3 + tuple(slice(n) for n in grid.source)
        torch.sub(target, output, out=padded[corner])
        return padded

    def _by_form(self, x: Any) -> Any:
        xp = self.backend.namespace
        if self.form == "matrix":
            return self._by_matrix(xp, x)
        return self._by_dft(xp, x) if self.form == "dft" else self._by_fft(xp, x)

    def samples_at_once(self) -> int:
        """Return how many samples go through together."""
        entries = math.prod(self.grid.size) * self.groups * max(self.rows, self.columns)
        if self.device.type != "cpu":
            return max(1, _AT_ONCE // entries)
        least = _LEAST_BATCH if self.groups == 1 else 2 * _LEAST_BATCH
        # With many channels the matrices are what is read: as many entries of vectors, at least.
        least = max(least, self.rows * self.columns // (self.rows + self.columns))
        cached = torch.get_num_threads() * _CACHED // entries
        return max(1, min(16 * _CHUNK // entries, max(least, cached)))

    # The matrices of a form, for some frequencies.

    def at(self, frequencies: Tensor, form: Form) -> Tensor:
        """Return the matrices in the layout that a form multiplies with."""
        shape = (self.groups, len(frequencies), self.rows, self.columns)
        real = form == "dft"
        if real:
            shape = (*shape[:2], 2 * self.rows, 2 * self.columns)
        out = torch.empty(
            shape, dtype=self.dtype if real else self.dtype.to_complex(), device=self.device
        )
        most = max(1, _CHUNK // (self.groups * self.rows * self.columns))
        for start in range(0, len(frequencies), most):
            part = slice(start, start + most)
            values = self._matrices(frequencies[part])
            if real:
                out[:, part, : self.rows, : self.columns] = values.real
                out[:, part, : self.rows, self.columns :] = -values.imag
                out[:, part, self.rows :, : self.columns] = values.imag
                out[:, part, self.rows :, self.columns :] = values.real
            else:  # the transform back does not divide by the size of the grid
                out[:, part] = values / math.prod(self.grid.size)
        return out

    def chunks(self) -> Iterator[tuple[slice, Any]]:
        """Yield the matrices, all at once if they are kept."""
        if not self.streams:
            yield slice(None), self._kept
            return
        frequencies = self.grid.frequencies(self.form)
        most = max(1, _CHUNK // (self.groups * self.rows * self.columns))
        for start in range(0, len(frequencies), most):
            part = slice(start, start + most)
            yield part, self.backend.constant(self.at(frequencies[part], self.form))

    # The three forms.

    def _dense(self) -> Tensor:
        """Return the whole map, shape (G, c * source, c' * result)."""
        by_fft = FourierMap(
            self._matrices, self.grid, groups=self.groups, rows=self.rows, columns=self.columns,
            dtype=torch.float64, device=self.device, form="fft",
        )  # fmt: skip
        entries = self.columns * math.prod(self.grid.source)
        basis = torch.eye(entries, dtype=torch.float64, device=self.device)
        basis = basis.view(entries, 1, self.columns, *self.grid.source)
        images = by_fft(basis.expand(-1, self.groups, *basis.shape[2:]))
        return images.flatten(2).transpose(0, 1).to(self.dtype).contiguous()

    def _by_matrix(self, xp: Namespace, x: Any) -> Any:
        shape = (x.shape[0], self.groups, self.rows, *self.grid.result)
        if self.groups == 1:
            return xp.reshape(xp.reshape(x, (x.shape[0], -1)) @ self._kept[0, ...], shape)
        by_group = xp.permute_dims(xp.reshape(x, (x.shape[0], self.groups, -1)), (1, 0, 2))
        return xp.reshape(xp.permute_dims(by_group @ self._kept, (1, 0, 2)), shape)

    def _by_fft(self, xp: Namespace, x: Any) -> Any:
        axes = tuple(range(3, x.ndim))
        spectrum = xp.rfftn(x, s=self.grid.size, axes=axes)
        half = spectrum.shape[3:]
        spectrum = xp.reshape(spectrum, (*spectrum.shape[:3], -1))
        if self.rows == self.columns == 1:
            parts = [spectrum[:, :, 0, part] * m[:, :, 0, 0] for part, m in self.chunks()]
            product = _join(xp, parts, axis=2)
        else:
            spectrum = self.backend.batch_last(spectrum)  # (G, F, c, N)
            parts = [_times(m, spectrum[:, part, ...]) for part, m in self.chunks()]
            product = self.backend.batch_first(_join(xp, parts, axis=1))
        product = xp.reshape(product, (x.shape[0], self.groups, self.rows, *half))
        image = xp.irfftn(product, s=self.grid.size, axes=axes)
        corner = tuple(slice(n) for n in self.grid.result)
        return image[(..., *corner)]

    def _by_dft(self, xp: Namespace, x: Any) -> Any:
        """Transform dimension by dimension; the layout is (G, *frequencies, 2, c, N)."""
        n, groups = x.shape[0], self.groups
        size, half = self.grid.size, self.grid.half("dft")
        first, *others = self._tables[: len(size)]
        first_back, *others_back = self._tables[len(size) :]
        x = self.backend.batch_last(x)  # (G, *source, c, N)
        x = first @ xp.reshape(x, (groups, self.grid.source[0], -1))
        done = groups * half[0]
        for table, source in zip(others, self.grid.source[1:], strict=True):
            x = table @ xp.reshape(x, (done, 2 * source, -1))
            done *= table.shape[0] // 2
        x = xp.reshape(x, (groups, done // groups, 2 * self.columns, n))
        if self.rows == self.columns == 1:
            real, imag = x[:, :, :1, :], x[:, :, 1:, :]
            parts = [
                m[:, :, :, :1] * real[:, part, ...] + m[:, :, :, 1:] * imag[:, part, ...]
                for part, m in self.chunks()
            ]
        else:
            parts = [_times(m, x[:, part, ...]) for part, m in self.chunks()]
        x = _join(xp, parts, axis=1)  # (G, F, 2 c', N)
        for table, count in zip(others_back[::-1], half[:0:-1], strict=True):
            done //= count
            x = table @ xp.reshape(x, (done, 2 * count, -1))
        x = first_back @ xp.reshape(x, (groups, 2 * half[0], -1))
        x = xp.reshape(x, (groups, *self.grid.result, self.rows, n))
        return self.backend.batch_first(x)


def choose_form(grid: Grid, groups: int, rows: int, columns: int) -> Form:
    """Return the form that is the fastest for these sizes, by a model of what it costs."""
    if max(grid.size) > _DFT_UP_TO or (rows == columns == 1 and max(grid.size) > _SCALAR_DFT_UP_TO):
        return "fft"
    source, result = math.prod(grid.source), math.prod(grid.result)
    whole = rows * result * columns * source
    frequencies = math.prod(grid.half("dft"))
    products, left, right = 8 * frequencies * rows * columns, list(grid.source), list(grid.result)
    done = 1
    for f, s, r in zip(grid.half("dft"), grid.source, grid.result, strict=True):
        complex_step = 1 if done == 1 else 2
        products += 4 * complex_step * done * f * s * math.prod(left[1:]) * columns
        products += 4 * complex_step * done * f * r * math.prod(right[1:]) * rows
        del left[0], right[0]
        done *= f
    by_dft = products / 80 + 0.8 * (source * columns + result * rows)
    # Nanoseconds a sample: 150 GFlop/s in one large product, 80 in the small ones, 0.8 ns an entry
    # for the change of layout. The ratios, not the machine, decide.
    fits = groups * whole <= 4 * _CHUNK
    return "matrix" if fits and 2 * whole / 150 <= by_dft else "dft"


def choose_form_on_gpu(grid: Grid, groups: int, rows: int, columns: int) -> Form:
    """Return the form that is the fastest for these sizes on a GPU, where launches count."""
    entries = groups * rows * columns * math.prod(grid.source) * math.prod(grid.result)
    return "matrix" if entries <= _MATRIX_UP_TO else "fft"


def _dft_tables(grid: Grid, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return the real matrices of the transforms there, then of those back, by dimension.

    There: the first takes (source,) to (F, 2), the others (2, source) to (F, 2); the pair is real
    and imaginary part. Back: the others take (F, 2) to (2, result), the first to (result,).
    """
    there, back = [], []
    for i, (n, f, source, result) in enumerate(
        zip(grid.size, grid.half("dft"), grid.source, grid.result, strict=True)
    ):
        frequency = torch.arange(f, dtype=torch.float64)
        angle = -2 * math.pi / n * torch.outer(frequency, torch.arange(source).double())
        cosine, sine = angle.cos(), angle.sin()
        real = torch.stack([cosine, sine], 1).reshape(2 * f, source)
        imaginary = torch.stack([-sine, cosine], 1).reshape(2 * f, source)
        there.append(real if i == 0 else torch.cat([real, imaginary], 1))
        angle = 2 * math.pi / n * torch.outer(torch.arange(result).double(), frequency)
        cosine, sine = angle.cos() / n, angle.sin() / n
        if i == 0:  # the other half of the spectrum is the conjugate
            twice = torch.where((frequency == 0) | (2 * frequency == n), 1.0, 2.0)
            back.append(torch.stack([cosine * twice, -sine * twice], 2).reshape(result, 2 * f))
        else:
            real = torch.stack([cosine, -sine], 2).reshape(result, 2 * f)
            imaginary = torch.stack([sine, cosine], 2).reshape(result, 2 * f)
            back.append(torch.cat([real, imaginary]))
    return [table.to(device, dtype).contiguous() for table in (*there, *back)]


def _times(matrices: Any, x: Any) -> Any:
    """Multiply without the dimension of the groups where there is one group: strides may stay."""
    if matrices.shape[0] > 1:
        return matrices @ x
    return (matrices[0, ...] @ x[0, ...])[None, ...]


def _join(xp: Namespace, parts: list[Any], axis: int) -> Any:
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=axis)
