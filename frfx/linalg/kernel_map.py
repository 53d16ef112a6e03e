"""Block-circulant maps by the kernels of frfx.kernels, where these are the fastest on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from frfx.kernels import CircularMap, Kernels, Plane, Sizes
from frfx.linalg.backend import TorchBackend
from frfx.linalg.copies import Copies

if TYPE_CHECKING:
    from frfx.linalg.fourier import FourierMap

_PLANE_UP_TO = 36
"""Side of a grid up to which transforms as products with tables beat fast ones and the
transpositions around them (docs/solvers.md)."""

_IN_ONE = range(1 << 8, 1 << 17)
"""How many entries the matrices have where one kernel for the whole map is faster still, ..."""

_IN_ONE_MEMORY = 64 << 10
"""... and the bytes of shared memory up to which: several blocks then run on a multiprocessor."""


class KernelMap:
    """Applies a map by kernels: the whole of it by one, or what is around the product.

    Args:
        origin: The map.
        kernels: The kernels.
        plane: The grid, if they have transforms on it; else torch has, between our kernels.

    Attributes:
        in_one: The map for the kernel that takes it in one; None where that is not the fastest.
    """

    def __init__(self, origin: FourierMap, kernels: Kernels, plane: Plane | None) -> None:
        self._map, self._kernels, self._plane = origin, kernels, plane
        self.in_one: CircularMap | None = None
        self._kept: Tensor | None = None
        entries = math.prod(origin.grid.size) * origin.rows * origin.columns
        like = torch.empty(0, dtype=origin.dtype, device=origin.device)
        if plane is not None and entries in _IN_ONE and not origin.streams:
            found = CircularMap.of(plane, origin.at(origin.grid.frequencies(), real=False))
            way = kernels.arrange_map(found, 1, like)
            if way is not None and way.bytes_of(like) <= _IN_ONE_MEMORY:
                self.in_one = found
        if plane is not None and not kernels.fit(plane, like):
            self._plane = None
        if self._plane is not None:
            self._frequencies = origin.grid.frequencies()[self._plane.frequencies]
            if self.in_one is None and self._frequencies_first and not origin.streams:
                self._kept = origin.at(self._frequencies, real=False)

    @classmethod
    def of(cls, origin: FourierMap) -> KernelMap | None:
        """Return how kernels apply a map; None where they do not, or not faster."""
        kernels, grid = origin.backend.kernels, origin.grid
        if kernels is None or kernels.device_type != origin.device.type or len(grid.size) > 2:
            return None
        plane = None
        if max(grid.size) <= _PLANE_UP_TO:
            shapes = (grid.size, grid.source, grid.result)
            sizes = Sizes(*(n for shape in shapes for n in ((1, *shape)[-2], shape[-1])))
            like = torch.empty(0, dtype=origin.dtype.to_complex(), device=origin.device)
            plane = Plane.of(sizes, like)
        made = cls(origin, kernels, plane)
        return made if made.in_one or made._frequencies_first else None

    @property
    def _frequencies_first(self) -> bool:
        """Whether the product is torch's, and takes frequencies first as they are."""
        pointwise = self._map.rows == self._map.columns == 1
        by_torch = self._map.form == "fft" and isinstance(self._map.backend, TorchBackend)
        return by_torch and (self._map.groups == 1 or (pointwise and self._plane is not None))

    @property
    def has_matrices(self) -> bool:
        """Whether the kernels have matrices of their own, so that the map's are seldom needed."""
        return self.in_one is not None or self._kept is not None

    @property
    def nbytes(self) -> int:
        """The memory that the kernels' own matrices and tables hold, in bytes."""
        if self.in_one is not None:
            return self.in_one.nbytes
        held = 0 if self._plane is None else self._plane.nbytes
        return held if self._kept is None else held + self._kept.nbytes

    def serve(self, source: Tensor | Copies, *others: Tensor | None) -> bool:
        """Tell whether the kernels can take these tensors."""
        first = source.values if isinstance(source, Copies) else source
        given = [t for t in others if t is not None]
        return first.dtype == self._map.dtype and self._kernels.serve(first, *given)

    def __call__(
        self, source: Tensor | Copies, minus: Tensor | None, plus: Tensor | None
    ) -> Tensor:
        """Return `plus + map(source - minus)`, without what is None; shapes as the map's."""
        tile = (1, 1)
        if isinstance(source, Copies):
            if self.in_one is None and self._plane is None:
                source = source.written_out()
            else:
                tile = source.sides
                source = source.values
        if self.in_one is not None:
            return self._kernels.circular_map(self.in_one, source, minus, plus, tile)
        most = self._map.samples_at_once()
        if source.shape[0] <= most:
            return self._part(source, minus, plus, tile)
        pieces = [
            (None,) * -(-source.shape[0] // most) if t is None else t.split(most)
            for t in (minus, plus)
        ]
        parts = zip(source.split(most), *pieces, strict=True)
        return torch.cat([self._part(first, m, p, tile) for first, m, p in parts])

    def _part(
        self, source: Tensor, minus: Tensor | None, plus: Tensor | None, tile: tuple[int, int]
    ) -> Tensor:
        if self._plane is None:
            return self._between(source, minus, plus)
        plane, n = self._plane, source.shape[0]
        height, width = plane.sizes.source_h, plane.sizes.source_w
        source = source.reshape(-1, height // tile[0], width // tile[1])
        minus = minus if minus is None else minus.reshape(-1, height, width)
        product = self._product(self._kernels.spectra(plane, source, minus, tile), n)
        images = self._kernels.images_of(plane, product, plus)
        return images.view(n, self._map.groups, self._map.rows, *self._map.grid.result)

    def _between(self, source: Tensor, minus: Tensor | None, plus: Tensor | None) -> Tensor:
        """Use torch's fast transforms, with kernels for what is around them."""
        size, n = self._map.grid.size, source.shape[0]
        if minus is not None and len(size) == 2:
            source, minus = self._kernels.residual_on_grid(source, minus, size), None
        source = source if minus is None else source - minus
        axes = tuple(range(3, source.ndim))
        spectra = torch.fft.rfftn(source, size, axes)
        half = spectra.shape[3:]
        product = self._product(self._kernels.transpose(spectra.reshape(-1, half.numel())), n)
        product = self._kernels.transpose(product).view(n, 1, self._map.rows, *half)
        image = torch.fft.irfftn(product, size, axes, norm="forward")
        image = image[(..., *map(slice, self._map.grid.result))]
        return image if plus is None else plus + image

    def _product(self, spectra: Tensor, n: int) -> Tensor:
        """Multiply (F, N * G * c) by the matrices: (F, N * G * c')."""
        if self._map.groups > 1:
            spectra = spectra.unflatten(1, (n, self._map.groups))
            parts = [spectra[part] * m[:, :, 0, 0].mT[:, None] for part, m in self._matrices()]
        else:
            spectra = spectra.view(-1, n, self._map.columns)
            parts = [torch.bmm(spectra[part], m[0].mT) for part, m in self._matrices()]
        return torch.cat(parts).flatten(1) if len(parts) > 1 else parts[0].flatten(1)

    def _matrices(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the matrices that spectra are multiplied by, all at once if they are kept."""
        if self._kept is not None:
            return iter([(slice(None), self._kept)])
        return self._map.chunks() if self._plane is None else self._map.anew(self._frequencies)
