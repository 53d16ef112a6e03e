"""Apply one matrix a frequency: the block-circulant maps that spectral solvers end in.

A map takes (N, G, c, *source) to (N, G, c', *result): it puts the source at the origin of a
periodic grid, transforms it, multiplies by a (c', c) matrix at every frequency, transforms back,
and keeps the corner of the grid that the result lies in. It has three forms, equal to rounding:

- `"matrix"`: the whole map as one real matrix. The fastest for small images.
- `"dft"`: the transforms as products with real matrices, the batch as the last dimension, so that
  no step but the first and the last moves data without computing. The fastest for images up to
  about 40 pixels wide, on which fast transforms are mostly overhead.
- `"fft"`: fast transforms. The fastest for large images.

The code is written against the array API and runs on any of its namespaces. On a GPU, kernels take
its place where they are faster (`kernel_map`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from frfx.linalg.backend import Backend, Namespace, TorchBackend, torch_backend
from frfx.linalg.copies import Copies, written_out
from frfx.linalg.dft import Dft
from frfx.linalg.form import (
    Form,
    Grid,
    choose_form,
    choose_form_on_gpu,
    chunk,
    complex_parts,
    spectral_bytes,
)
from frfx.linalg.kernel_map import KernelMap
from frfx.linalg.products import matmul
from frfx.linalg.scratch import Scratch
from frfx.recording import is_recorded

_TEMPORARY = 1 << 26
"""Bound on the entries of a temporary."""

_CACHED = 1 << 19
"""Entries of an image stack that a thread transforms at a time: they should stay in the cache."""

_LEAST_BATCH = 32
"""Samples that are transformed at a time at least: fewer make poor matrix products."""

_POINTWISE_UP_TO = 32
"""Entries of a matrix up to which products of whole spectra, channel by channel, are faster than
changes of layout and products of small matrices."""

_LARGE = 1 << 12
"""Entries of a matrix from which it is worth looking for those that are conjugates of others."""

Matrices = Callable[[Tensor], Tensor]
"""Makes the matrices (G, F, c', c), complex, at frequencies (F, dims)."""

Apply = Callable[[Tensor, Tensor], Tensor]
"""Multiplies the matrices at frequencies (F, dims) by (G, F, c, N), and need not make them."""


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
        apply: What then takes the place of the matrices on a CPU, if anything does.
        form: One of the forms; None for the one that the sizes ask for.
        backend: The array library that applies the map.

    Attributes:
        form: The form that was chosen.
        parts: As what complex numbers are multiplied in the form `"dft"`; see `complex_parts`.
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
        apply: Apply | None = None,
        form: Form | None = None,
        backend: Backend = torch_backend,
    ) -> None:
        self.grid, self.groups, self.rows, self.columns = grid, groups, rows, columns
        self.dtype, self.device, self.backend = dtype, device, backend
        choose = choose_form if device.type == "cpu" else choose_form_on_gpu
        self.parts = complex_parts(grid, rows, columns) if device.type == "cpu" else 2
        self.form = form or choose(grid, groups, rows, columns)
        if form is None and self._bytes_of(self.form) > memory:
            self.form = "fft"  # the smallest, and it can be made anew in chunks
        self._matrices = matrices
        self.streams = self.form != "matrix" and self._bytes_of(self.form) > memory
        by_dft = self.form == "dft"
        self._dft = Dft(grid, dtype, device, backend, self.parts) if by_dft else None
        self._kept: Any = None
        self.by_kernels = KernelMap.of(self)
        by_torch = device.type == "cpu" and isinstance(backend, TorchBackend)
        few = rows * columns <= _POINTWISE_UP_TO
        self._pointwise = by_torch and few and self.form == "fft"
        self._in_place = by_torch and self.form != "matrix" and not self.streams
        self._applied = apply if by_torch and self.streams and self.form == "fft" else None
        if self.by_kernels is None or not self.by_kernels.has_matrices:
            self._make_ready()

    def _make_ready(self) -> None:
        """Make what the form applies, which a map that kernels apply seldom needs."""
        if self._kept is not None or self.streams:
            return
        constant = self.backend.constant
        with torch.inference_mode(False), torch.no_grad():
            if self.form == "matrix":
                self._kept = constant(self._dense())
            else:
                real = self.form == "dft"
                kept = self._everywhere(real)
                if self._pointwise:  # a frequency behind the other, in memory
                    kept = kept.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
                self._kept = constant(kept)

    def _bytes_of(self, form: Form) -> int:
        """Return the memory of a form's matrices, in bytes."""
        grid, entries = self.grid, self.groups * self.rows * self.columns
        if form == "matrix":
            return entries * math.prod(grid.source) * math.prod(grid.result) * self.dtype.itemsize
        complex_ones = spectral_bytes(grid, entries, self.dtype)
        if form == "fft":
            return complex_ones
        return complex_ones * 3 // 2 if self.parts == 3 else 2 * complex_ones

    @property
    def nbytes(self) -> int:
        """The memory that the map holds, in bytes."""
        kept = [self._kept] if self._kept is not None else []
        kept += self._dft.tables if self._dft is not None else ()
        held = 0 if self.by_kernels is None else self.by_kernels.nbytes
        return held + sum(array.nbytes for array in kept)

    def __call__(
        self, source: Tensor | Copies, minus: Tensor | None = None, plus: Tensor | None = None
    ) -> Tensor:
        """Return `plus + map(source - minus)`, without what is None.

        Args:
            source: Shape (N, G, c, *source), as `minus`.
            minus: What is taken off it.
            plus: Shape (N, G, c', *result), as what is returned.
        """
        if self.by_kernels is not None and self.by_kernels.serve(source, minus, plus):
            return self.by_kernels(source, minus, plus)
        source = written_out(source)
        if not is_recorded(source, minus, plus):
            if self._in_place and len(source):
                return self._write(source, minus, plus)
            return self.backend.run(self._apply, source, minus, plus)
        # Step by step: nothing in place, and what another library detaches is the map alone.
        residual = source if minus is None else source - minus
        image = self.backend.run(self._apply, residual, None, None)
        return image if plus is None else plus + image

    def _apply(self, *given: Any) -> Any:
        """Return `plus + map(source - minus)`."""
        self._make_ready()
        results = []
        for source, minus, plus in self._parts(given):
            image = self._by_form(source if minus is None else source - minus)
            results.append(image if plus is None else plus + image)
        return _join(self.backend.namespace, results, axis=0)

    def _write(self, *given: Tensor | None) -> Tensor:
        """Return the same, part by part by way of the same memory."""
        self._make_ready()
        source = cast(Tensor, given[0])
        whole = source.new_empty(len(source), self.groups, self.rows, *self.grid.result)
        entries = 0  # fast transforms have memory of their own
        padded: tuple[int, ...] | None = self.grid.size
        if self.form == "dft":
            spectrum = (
                self.parts * math.prod(self.grid.half) * self.groups * max(self.rows, self.columns)
            )
            entries, padded = min(len(source), self.samples_at_once()) * spectrum, None
        scratch = Scratch(source, entries)
        for x, minus, plus, out in self._parts((*given, whole)):
            residual = x if minus is None else scratch.residual(x, minus, padded)
            image = self._by_form(residual, scratch)
            if plus is None:
                out.copy_(image)
            else:
                torch.add(plus, image, out=out)
        return whole

    def _parts(self, given: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        """Yield parts of the batch, of about one size, that stay in the cache between the steps."""
        n = given[0].shape[0]
        most = max(n, 1) if self.form == "matrix" else self.samples_at_once()
        if n <= most:
            yield given
            return
        most = -(-n // -(-n // most))
        for i in range(0, n, most):
            yield tuple(t if t is None else t[i : i + most, ...] for t in given)

    def _by_form(self, x: Any, scratch: Scratch | None = None) -> Any:
        xp = self.backend.namespace
        if self.form == "matrix":
            return self._by_matrix(xp, x)
        return (self._by_dft if self.form == "dft" else self._by_fft)(xp, x, scratch)

    def samples_at_once(self) -> int:
        """Return how many samples go through together."""
        entries = math.prod(self.grid.size) * self.groups * max(self.rows, self.columns)
        most = max(1, _TEMPORARY // entries)
        if self.device.type != "cpu" or self.streams:
            return most
        # With many channels the matrices are what is read: as many entries of vectors, at least.
        least = max(_LEAST_BATCH, self.rows * self.columns // (self.rows + self.columns))
        cached = torch.get_num_threads() * _CACHED // entries
        return min(most, max(least, cached))

    # The matrices of a form, for some frequencies.

    def at(self, frequencies: Tensor, real: bool) -> Tensor:
        """Return the matrices (G, F, c', c) at frequencies.

        As real ones they are (G, F, 2 c', 2 c), rows and columns the real parts, then the
        imaginary ones; or (G, F, 3, c', c), real part, imaginary part and their sum.
        """
        out = self._room_for(len(frequencies), real)
        self._write_at(frequencies, out, real)
        return out

    def _everywhere(self, real: bool) -> Tensor:
        """Return the matrices at all frequencies of the form."""
        frequencies = self.grid.frequencies(self.form)
        if self.rows * self.columns < _LARGE:
            return self.at(frequencies, real)
        out = self._room_for(len(frequencies), real)
        runs, others, opposite = self.grid.conjugates(self.form)
        for run in runs:
            self._write_at(frequencies[run], out[:, run], real)
        made = out[:, opposite]
        if not real:
            made = made.conj()
        elif self.parts == 3:
            made[:, :, 1].neg_()
            torch.add(made[:, :, 0], made[:, :, 1], out=made[:, :, 2])
        else:
            made[..., : self.rows, self.columns :].neg_()
            made[..., self.rows :, : self.columns].neg_()
        out[:, others] = made
        return out

    def _room_for(self, count: int, real: bool) -> Tensor:
        shape: tuple[int, ...] = (self.groups, count, self.rows, self.columns)
        if real and self.parts == 3:
            shape = (*shape[:2], 3, self.rows, self.columns)
        elif real:
            shape = (*shape[:2], 2 * self.rows, 2 * self.columns)
        dtype = self.dtype if real else self.dtype.to_complex()
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _write_at(self, frequencies: Tensor, out: Tensor, real: bool) -> None:
        for part, some in self._pieces(frequencies):
            values = self._matrices(some)
            if real and self.parts == 3:
                out[:, part, 0], out[:, part, 1] = values.real, values.imag
                torch.add(values.real, values.imag, out=out[:, part, 2])
            elif real:
                out[:, part, : self.rows, : self.columns] = values.real
                out[:, part, : self.rows, self.columns :] = -values.imag
                out[:, part, self.rows :, : self.columns] = values.imag
                out[:, part, self.rows :, self.columns :] = values.real
            else:
                out[:, part] = values
        if not real:  # fast transforms back do not divide by the size of the grid
            torch.view_as_real(out).div_(math.prod(self.grid.size))

    def chunks(self) -> Iterator[tuple[slice, Any]]:
        """Yield the matrices, all at once if they are kept."""
        if self.streams:
            yield from self.anew(self.grid.frequencies(self.form))
        else:
            yield slice(None), self._kept

    def anew(self, frequencies: Tensor) -> Iterator[tuple[slice, Any]]:
        """Yield the matrices at frequencies, made piece by piece."""
        for part, some in self._pieces(frequencies):
            yield part, self.backend.constant(self.at(some, self.form == "dft"))

    def _pieces(self, frequencies: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the frequencies whose matrices are made at a time."""
        most = max(1, chunk(self.device) // (self.groups * self.rows * self.columns))
        for start in range(0, len(frequencies), most):
            part = slice(start, start + most)
            yield part, frequencies[part]

    # The three forms.

    def _dense(self) -> Tensor:
        """Return the whole map, shape (G, c * source, c' * result)."""
        grid = self.grid
        axes = tuple(range(3, 3 + len(grid.size)))
        matrices = self._matrices(grid.frequencies()).movedim(1, -1)
        response = torch.fft.irfftn(matrices.unflatten(-1, grid.half), s=grid.size, dim=axes)
        # What an entry sends to another depends on the way between the two.
        way = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        for n, source, result in zip(grid.size, grid.source, grid.result, strict=True):
            start = torch.arange(source, device=self.device)[:, None]
            along = (torch.arange(result, device=self.device) - start) % n
            way = (n * way[:, None, :, None] + along[:, None]).flatten(2).flatten(0, 1)
        whole = response.to(self.dtype).flatten(3)[..., way]  # (G, c', c, source, result)
        return whole.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2).contiguous()

    def _by_matrix(self, xp: Namespace, x: Any) -> Any:
        shape = (x.shape[0], self.groups, self.rows, *self.grid.result)
        if self.groups == 1:
            product = matmul if isinstance(x, Tensor) else operator.matmul
            return xp.reshape(product(xp.reshape(x, (x.shape[0], -1)), self._kept[0, ...]), shape)
        by_group = xp.permute_dims(xp.reshape(x, (x.shape[0], self.groups, -1)), (1, 0, 2))
        return xp.reshape(xp.permute_dims(by_group @ self._kept, (1, 0, 2)), shape)

    def _by_fft(self, xp: Namespace, x: Any, scratch: Scratch | None) -> Any:
        axes = tuple(range(3, x.ndim))
        spectrum = xp.rfftn(x, s=self.grid.size, axes=axes)
        half = spectrum.shape[3:]
        spectrum = xp.reshape(spectrum, (*spectrum.shape[:3], -1))
        if self._pointwise:
            parts = [_multiply_add(spectrum[..., part], m) for part, m in self.chunks()]
            product = _join(xp, parts, axis=3)
        elif self.rows == self.columns == 1:
            parts = [spectrum[:, :, :, part] * m[:, None, :, 0, 0] for part, m in self.chunks()]
            product = _join(xp, parts, axis=3)
        else:
            spectrum = self.backend.batch_last(spectrum)  # (G, F, c, N)
            product = self.backend.batch_first(self._product(xp, spectrum, None))
        product = xp.reshape(product, (x.shape[0], self.groups, self.rows, *half))
        image = xp.irfftn(product, s=self.grid.size, axes=axes)
        corner = tuple(slice(n) for n in self.grid.result)
        return image[(..., *corner)]

    def _by_dft(self, xp: Namespace, x: Any, scratch: Scratch | None) -> Any:
        assert self._dft is not None
        return self._dft.back(self._product(xp, self._dft.there(x, scratch), scratch), scratch)

    def _product(self, xp: Namespace, x: Any, scratch: Scratch | None) -> Any:
        """Multiply by the matrix of every frequency: (G, F, c, N) to (G, F, c', N).

        Of real ones, c and c' are their parts.
        """
        if self._applied is not None:
            pieces = self._pieces(self.grid.frequencies())
            parts = [self._applied(some, x[:, part]) for part, some in pieces]
            return torch.cat(parts, 1) / math.prod(self.grid.size)
        if self.form == "dft" and self.parts == 3:
            groups, frequencies, _, n = x.shape
            x = xp.reshape(x, (groups, frequencies, 3, self.columns, n))
            if scratch is not None:
                product = scratch.matmul(self._kept, x)
            else:
                products = [m @ x[:, part, ...] for part, m in self.chunks()]
                product = _join(xp, products, axis=1)
            return xp.reshape(product, (groups, frequencies, 3 * self.rows, n))
        if not self.rows == self.columns == 1:
            if scratch is not None:
                return scratch.matmul(self._kept, x)
            parts = [_times(m, x[:, part, ...]) for part, m in self.chunks()]
        elif scratch is not None:
            real, imag = x.split(1, 2)
            product = torch.mul(self._kept[..., :1], real, out=scratch.take(*x.shape))
            return product.addcmul_(self._kept[..., 1:], imag)
        else:
            real, imag = x[:, :, :1, :], x[:, :, 1:, :]
            parts = [
                m[:, :, :, :1] * real[:, part, ...] + m[:, :, :, 1:] * imag[:, part, ...]
                for part, m in self.chunks()
            ]
        return _join(xp, parts, axis=1)


def _multiply_add(x: Tensor, matrices: Tensor) -> Tensor:
    """Multiply (N, G, c, F) by (G, F, c', c) for every frequency, channel by channel."""
    by_entry = matrices.permute(0, 2, 3, 1)  # as they lie in memory
    total = x[:, :, None, 0] * by_entry[:, :, 0]
    for i in range(1, x.shape[2]):
        total.addcmul_(x[:, :, None, i], by_entry[:, :, i])
    return total


def _times(matrices: Any, x: Any) -> Any:
    """Multiply without the dimension of the groups where there is one group: strides may stay."""
    if matrices.shape[0] > 1:
        return matrices @ x
    return (matrices[0, ...] @ x[0, ...])[None, ...]


def _join(xp: Namespace, parts: list[Any], axis: int) -> Any:
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=axis)
