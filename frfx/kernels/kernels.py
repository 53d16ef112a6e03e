"""The kernels as functions of tensors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from frfx.kernels.arrangement import Arrangement, arrange, arrange_map
from frfx.kernels.launch import Launcher
from frfx.kernels.plane import CircularMap, Plane
from frfx.recording import is_recorded

TYPES = {torch.float32: "float", torch.float64: "double"}

_THREADS = 256
_MOST_BLOCKS = 1 << 16

_UNROLLED = 3
"""Windows of up to so many entries along a dimension have kernels of their own."""

_A_SHARE = 1 << 11
"""Entries of a sample that a block takes at least, where sums are made over samples, ..."""

_MOST_SHARES = 32
"""... and how many blocks a sample has at most."""


class Windows(NamedTuple):
    """Windows along one dimension, in the order in which the kernels take what describes them.

    Attributes:
        size: The entries of the image.
        outputs: The windows.
        kernel: The entries of a window.
        stride: From one window to the next.
        padding: How far the first window begins in front of the image.
        dilation: From one entry of a window to the next.
    """

    size: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    dilation: int

    @property
    def plain(self) -> bool:
        """Whether they have no gaps and lie within the image."""
        end = (self.outputs - 1) * self.stride + self.kernel
        return self.dilation == 1 and self.padding == 0 and end <= self.size


class Kernels:
    """The kernels, as functions of tensors.

    Args:
        launcher: Runs them.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._launch = launcher

    @property
    def device_type(self) -> str:
        """Where tensors must lie, as torch calls it."""
        return self._launch.device_type

    def serve(self, *tensors: Tensor) -> bool:
        """Tell whether they can take these tensors: of one type, on their device, not recorded."""
        first = tensors[0]
        return (
            first.dtype in TYPES
            and first.device.type == self.device_type
            and all(t.device == first.device and t.dtype == first.dtype for t in tensors)
            and first.numel() > 0
            and not is_recorded(*tensors)
            and self._launch.works()
        )

    def fit(self, plane: Plane, like: Tensor) -> bool:
        """Tell whether blocks have memory enough for transforms on a grid."""
        return None not in (self._arrange(plane, 1, like, back) for back in (False, True))

    def _arrange(self, plane: Plane, images: int, like: Tensor, back: bool) -> Arrangement | None:
        device = self._launch.about(like.device)
        return arrange(plane.sizes, images, like.element_size(), device, back=back)

    def arrange_map(self, circular: CircularMap, n: int, like: Tensor) -> Arrangement | None:
        """Return how a map of n samples is dealt out; None if one does not fit a block."""
        groups, rows, columns, *_ = circular.matrices.shape
        device, sizes = self._launch.about(like.device), circular.plane.sizes
        return arrange_map(sizes, rows, columns, n * groups, like.element_size(), device)

    def _run(
        self, name: str, like: Tensor, blocks: int, threads: int,
        *arguments: Tensor | float | None, shared: int = 0,
    ) -> None:  # fmt: skip
        """Run the instance of a kernel for the type and the device of a tensor.

        Args:
            name: With `{}` for the type.
            like: The tensor.
            blocks, threads, shared: As the launcher takes them.
            *arguments: Tensors are handed over by address, contiguous; None is no tensor.
        """
        kept = [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]
        plain = [0 if a is None else a.data_ptr() if isinstance(a, Tensor) else a for a in kept]
        name = name.format(TYPES[like.dtype])
        self._launch(name, like.device, blocks, threads, tuple(plain), shared)

    def _each(self, name: str, count: int, like: Tensor, *arguments: Tensor | float) -> None:
        """Run a kernel whose threads take their shares of so many entries."""
        blocks = min(-(-count // _THREADS), _MOST_BLOCKS)
        self._run(name, like, blocks, _THREADS, *arguments)

    def nearest_embedding(self, logits: Tensor, labels: Tensor, margin: float) -> Tensor:
        """Return what `frfx.nearest_embedding` does, for classes in the last dimension."""
        result, labels = _like(logits), labels.to(logits.device, torch.int64)
        samples, a_block = labels.numel(), 4
        self._run(
            "nearest_embedding<{}>", logits, -(-samples // a_block), 32 * a_block,
            logits, labels, result, samples, logits.shape[-1], float(margin),
        )  # fmt: skip
        return result

    def preimage(
        self, functor: str, target: Tensor, output: Tensor, x: Tensor, limits: tuple[float, float]
    ) -> Tensor:
        """Return the nearest preimage under an activation, by its functor in activation.cu."""
        result, ends = _like(x), map(float, limits)
        self._each(
            f"preimage<{{}}, {functor}>", x.numel(), x, target, output, x, result, x.numel(), *ends
        )
        return result

    def max_pool(self, x: Tensor, rows: Windows, columns: Windows) -> Tensor:
        """Return the largest entries of the windows of images (N, C, *size)."""
        count = (rows.outputs, columns.outputs)[4 - x.ndim :]
        result = x.new_empty(*x.shape[:2], *count)
        plain = all(w.plain and w.kernel == rows.kernel <= _UNROLLED for w in (rows, columns))
        self._each(
            f"max_pool<{{}}, {rows.kernel if plain else 0}>", result.numel(), x,
            x, result, result.numel(), *rows, *columns,
        )  # fmt: skip
        return result

    def max_unpool(
        self, target: Tensor, x: Tensor, rows: Windows, columns: Windows, *, minimal: bool,
        disjoint: bool, complete: bool,
    ) -> Tensor:  # fmt: skip
        """Return an image whose windows have the target as their maximum.

        Args:
            target: Shape (N, C, *count); every window must have an entry whose bound is its target.
            x: The forward image, (N, C, *size).
            rows, columns: The windows along either dimension.
            minimal: Whether it is the nearest one, or every entry takes its bound.
            disjoint: Whether no window reaches into another.
            complete: Whether every entry is read by a window.
        """
        kind = str(minimal).lower()

        def run(name: str, count: int, *tensors: Tensor) -> None:
            self._each(name, count, x, *tensors, count, *rows, *columns)

        x = x.contiguous()
        result = x.clone() if disjoint and not complete else _like(x)
        if disjoint:
            run(f"unpool_tiles<{{}}, {kind}>", target.numel(), target, x, result)
            return result
        bounds = _like(x) if minimal else x
        run(f"unpool_bounds<{{}}, {kind}>", x.numel(), target, x, bounds, result)
        if minimal:
            run("unpool_tops<{}>", target.numel(), target, x, bounds, result)
        return result

    def unpool_preimages(
        self, functor: str, limits: tuple[float, float], target: Tensor, output: Tensor,
        pooled: Tensor, x: Tensor, rows: Windows, columns: Windows, *, complete: bool,
    ) -> Tensor:  # fmt: skip
        """Return an image whose activation has the target as the maximum of every window.

        Args:
            functor: The activation, which increases, by its functor in activation.cu.
            limits: The range that targets are limited to.
            target: Shape (N, C, *count), as what follows.
            output: What the activation is pooled to.
            pooled: What the image is pooled to.
            x: The image, (N, C, *size).
            rows, columns: The windows along either dimension, which share no entry.
            complete: Whether every entry is read by a window.
        """
        x = x.contiguous()
        result = _like(x) if complete else x.clone()
        self._each(
            f"unpool_preimages<{{}}, {functor}>", target.numel(), x,
            target, output, pooled, x, result, target.numel(), *map(float, limits),
            *rows, *columns,
        )  # fmt: skip
        return result

    def circular_map(
        self, circular: CircularMap, source: Tensor, minus: Tensor | None, plus: Tensor | None,
        tile: tuple[int, int] = (1, 1),
    ) -> Tensor:  # fmt: skip
        """Return `plus + map(source - minus)`, without what is None.

        Args:
            circular: The map.
            source: Shape (N, G, c, ...), as `minus`; the sizes are the map's.
            minus: What is taken off it.
            plus: Shape (N, G, c', ...).
            tile: Rows and columns of the tiles whose entries the source holds once.
        """
        plane, sizes = circular.plane, circular.plane.sizes
        groups, rows, columns, *_ = circular.matrices.shape
        n = source.shape[0]
        size = (sizes.result_h, sizes.result_w)[5 - source.ndim :]  # of one dimension, no height
        result = source.new_empty(n, groups, rows, *size)
        way = self.arrange_map(circular, n, source)
        assert way is not None
        self._run(
            f"circular_map<{{}}, {_copies(tile)}, {way.tile}>", source, n * groups, way.threads,
            source, minus, plus, circular.matrices, plane.tables, result,
            groups, rows, columns, *sizes, way.even, *tile, shared=way.bytes_of(source),
        )  # fmt: skip
        return result

    def spectra(
        self, plane: Plane, source: Tensor, minus: Tensor | None, tile: tuple[int, int] = (1, 1)
    ) -> Tensor:
        """Return the half spectra of `source - minus`, frequencies first.

        Args:
            plane: The grid.
            source: Shape (images, h, w), the plane's source; as `minus`.
            minus: What is taken off it, if it is there.
            tile: Rows and columns of the tiles whose entries the source holds once.

        Returns:
            Shape (F, images), complex, at the plane's independent frequencies.
        """
        images = len(source)
        result = source.new_empty(plane.sizes.independent, images, dtype=source.dtype.to_complex())
        self._transform(
            f"spectra<{{}}, {_copies(tile)}", source, plane, images,
            source, minus, plane.tables, result, last=tile,
        )  # fmt: skip
        return result

    def images_of(self, plane: Plane, spectra: Tensor, plus: Tensor | None) -> Tensor:
        """Return the images of spectra, as `spectra` has them, plus `plus` (images, h, w)."""
        images, size = spectra.shape[1], (plane.sizes.result_h, plane.sizes.result_w)
        result = spectra.new_empty(images, *size, dtype=spectra.dtype.to_real())
        self._transform(
            "images_of<{}", result, plane, images, spectra, plus, plane.tables, result, back=True
        )
        return result

    def _transform(
        self, name: str, like: Tensor, plane: Plane, images: int, *tensors: Tensor | None,
        last: tuple[int, ...] = (), back: bool = False,
    ) -> None:  # fmt: skip
        way = self._arrange(plane, images, like, back)
        assert way is not None
        self._run(
            f"{name}, {way.tile}>", like, -(-images // way.images), way.threads,
            *tensors, images, way.images, *plane.sizes, way.even, *last, shared=way.bytes_of(like),
        )  # fmt: skip

    def transpose(self, matrix: Tensor) -> Tensor:
        """Return a complex matrix (m, n) as a contiguous one (n, m)."""
        rows, columns = matrix.shape
        result = matrix.new_empty(columns, rows)
        tiles = -(-rows // 32) * -(-columns // 32)
        shared = 32 * 33 * matrix.element_size()
        real = torch.view_as_real(result)  # for the type
        self._run(
            "transpose<{}>", real, tiles, _THREADS, matrix, result, rows, columns, shared=shared
        )
        return result

    def residual_on_grid(self, target: Tensor, output: Tensor, size: tuple[int, int]) -> Tensor:
        """Return `target - output`, (..., h, w), in the corner of zeros (..., *size)."""
        result, count = target.new_empty(*target.shape[:-2], *size), target.shape[:-2].numel()
        count *= size[0] * size[1]
        self._each(
            "residual_on_grid<{}>", count, target,
            target, output, result, count, *size, *target.shape[-2:],
        )  # fmt: skip
        return result

    # Conjugate gradients, for samples (N, ...). Sums over them are left as a number a block.

    def sums_of(self, samples: Tensor) -> Tensor:
        """Return what sums over samples are written to."""
        shares = -(-samples[0].numel() // _A_SHARE)
        return samples.new_empty(len(samples), max(1, min(shares, _MOST_SHARES)))

    def dots(self, a: Tensor, b: Tensor, sums: Tensor) -> None:
        """Write the sums of products."""
        self._shared("dots<{}>", a, sums, a, b, sums)

    def turn(
        self, z: Tensor, p: Tensor, heights: Tensor, before: Tensor, running: Tensor
    ) -> None:  # fmt: skip
        """Write the next directions, `z + heights / before * p`, to p where a sample is running."""
        tiny = torch.finfo(p.dtype).tiny
        self._shared("turn<{}>", p, heights, z, p, heights, before, running, limits=(tiny,))

    def advance(
        self, x: Tensor, r: Tensor, p: Tensor, q: Tensor, heights: Tensor, curvatures: Tensor,
        running: Tensor, squares: Tensor,
    ) -> None:  # fmt: skip
        """Write a step along p, whose image is q, to x and to r, and the sums of r's squares."""
        self._shared(
            "advance<{}>", x, squares, x, r, p, q, heights, curvatures, running, squares,
            limits=(torch.finfo(x.dtype).tiny,),
        )  # fmt: skip

    def keep(
        self, x: Tensor, found: Tensor, heights: Tensor, curvatures: Tensor, squares: Tensor,
        norm: Tensor, best: Tensor, best_now: Tensor, running: Tensor, running_now: Tensor,
        steps: Tensor, step: int, tolerance: float,
    ) -> None:  # fmt: skip
        """Write what of x is the best yet to `found`, and how it went."""
        self._shared(
            "keep<{}>", x, squares, x, found, heights, curvatures, squares, norm, best, best_now,
            running, running_now, steps, step, limits=(float(tolerance), torch.finfo(x.dtype).tiny),
        )  # fmt: skip

    def _shared(
        self, name: str, like: Tensor, sums: Tensor, *arguments: Tensor | int,
        limits: tuple[float, ...] = (),
    ) -> None:  # fmt: skip
        """Run a kernel whose blocks share the samples as the numbers of the sums have it."""
        shares, entries = sums.shape[1], like[0].numel()
        self._run(
            name, like, sums.numel(), _THREADS, *arguments, shares, entries, *limits,
            shared=_THREADS // 32 * sums.element_size(),
        )  # fmt: skip


def _copies(tile: tuple[int, int]) -> str:
    """Return whether tiles have several entries, in C++."""
    return "true" if math.prod(tile) > 1 else "false"


def _like(x: Tensor) -> Tensor:
    """Return an empty tensor of the same shape, contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
