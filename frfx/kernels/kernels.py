"""The kernels as functions of tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from frfx.kernels.launch import Launcher
from frfx.kernels.plane import CircularMap, Plane, threads_for
from frfx.recording import is_recorded

TYPES = {torch.float32: "float", torch.float64: "double"}

_THREADS = 256
_MOST_BLOCKS = 1 << 16


@dataclass(frozen=True)
class Windows:
    """Windows along one dimension, as `frfx.rules.axis.RegularAxis` has them."""

    size: int
    count: int
    kernel: int
    stride: int
    padding: int
    dilation: int

    def arguments(self) -> tuple[int, ...]:
        """Return them in the order in which the kernels take them."""
        return self.size, self.count, self.kernel, self.stride, self.padding, self.dilation


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

    def shared_memory(self, device: torch.device) -> int:
        """Return how many bytes of shared memory a block may have on a device."""
        return self._launch.shared_memory(device)

    def _each(
        self, name: str, count: int, arguments: tuple[int | float, ...], like: Tensor
    ) -> None:
        """Run a kernel whose threads take their shares of so many entries."""
        blocks = min(-(-count // _THREADS), _MOST_BLOCKS)
        self._launch(name, like.device, blocks, _THREADS, arguments)

    def nearest_embedding(self, logits: Tensor, labels: Tensor, margin: float) -> Tensor:
        """Return what `frfx.nearest_embedding` does, for classes in the last dimension."""
        logits = logits.contiguous()
        labels = labels.to(logits.device, torch.int64).contiguous()
        result = torch.empty_like(logits)
        classes = logits.shape[-1]
        samples, a_block = logits.numel() // classes, 4
        arguments = (
            logits.data_ptr(),
            labels.data_ptr(),
            result.data_ptr(),
            samples,
            classes,
            float(margin),
        )
        name = f"nearest_embedding<{TYPES[logits.dtype]}>"
        self._launch(name, logits.device, -(-samples // a_block), 32 * a_block, arguments)
        return result

    def preimage(
        self, functor: str, target: Tensor, output: Tensor, x: Tensor, limits: tuple[float, float]
    ) -> Tensor:
        """Return the nearest preimage under an activation, by its functor in activation.cu."""
        target, output, x = target.contiguous(), output.contiguous(), x.contiguous()
        result = torch.empty_like(target)
        addresses = (t.data_ptr() for t in (target, output, x, result))
        arguments = (*addresses, x.numel(), *map(float, limits))
        self._each(f"preimage<{TYPES[x.dtype]}, {functor}>", x.numel(), arguments, x)
        return result

    def max_unpool(
        self, target: Tensor, x: Tensor, windows: tuple[Windows, Windows], *, minimal: bool,
        disjoint: bool, complete: bool,
    ) -> Tensor:  # fmt: skip
        """Return an image whose windows have the target as their maximum.

        Args:
            target: Shape (N, C, *count); every window must have an entry whose bound is its target.
            x: The forward image, (N, C, *size).
            windows: Along both dimensions.
            minimal: Whether it is the nearest one, or every entry takes its bound.
            disjoint: Whether no window reaches into another.
            complete: Whether every entry is read by a window.
        """
        target, x = target.contiguous(), x.contiguous()
        geometry = (*windows[0].arguments(), *windows[1].arguments())
        kind, nearest = TYPES[x.dtype], str(minimal).lower()

        def run(name: str, count: int, *tensors: Tensor) -> None:
            addresses = (t.data_ptr() for t in tensors)
            self._each(name, count, (*addresses, count, *geometry), x)

        if disjoint:
            result = torch.empty_like(x) if complete else x.clone()
            run(f"unpool_tiles<{kind}, {nearest}>", target.numel(), target, x, result)
            return result
        result = torch.empty_like(x)
        bounds = torch.empty_like(x) if minimal else x
        run(f"unpool_bounds<{kind}, {nearest}>", x.numel(), target, x, bounds, result)
        if minimal:
            run(f"unpool_tops<{kind}>", target.numel(), target, x, bounds, result)
        return result

    def circular_map(
        self, circular: CircularMap, source: Tensor, minus: Tensor | None, plus: Tensor | None
    ) -> Tensor:
        """Return `plus + map(source - minus)`, without what is None.

        Args:
            circular: The map.
            source: Shape (N, G, c, ...), as `minus`; the sizes are the map's.
            minus: What is taken off it.
            plus: Shape (N, G, c', ...).
        """
        plane = circular.plane
        groups, rows, columns, _ = circular.matrices.shape
        n = source.shape[0]
        size = plane.result[5 - source.ndim :]  # of one dimension, without the height of one
        result = source.new_empty(n, groups, rows, *size)
        kept, addresses = _addresses(source, minus, plus, circular.matrices, plane.tables, result)
        sizes = (*plane.size, *plane.source, *plane.result, circular.buffers[0])
        name = f"circular_map<{TYPES[source.dtype]}>"
        arguments = (*addresses, groups, rows, columns, *sizes)
        blocks = n * groups
        self._launch(name, source.device, blocks, circular.threads, arguments, circular.shared)
        del kept
        return result

    def spectra(self, plane: Plane, a_block: int, source: Tensor, minus: Tensor | None) -> Tensor:
        """Return the half spectra of `source - minus`, frequencies first.

        Args:
            plane: The grid.
            a_block: How many images a block of threads takes.
            source: Shape (images, h, w), the plane's source; as `minus`.
            minus: What is taken off it, if it is there.

        Returns:
            Shape (F, images), complex.
        """
        images = source.shape[:-2].numel()
        frequencies = plane.size[0] * plane.half
        result = source.new_empty(frequencies, images, dtype=source.dtype.to_complex())
        kept, addresses = _addresses(source, minus, plane.tables, result)
        arguments = (*addresses, images, a_block)
        there, work = plane.there(a_block), plane.work_there(a_block)
        self._transform("spectra", plane, source, images, a_block, arguments, there, work)
        del kept
        return result

    def images_of(self, plane: Plane, a_block: int, spectra: Tensor, plus: Tensor | None) -> Tensor:
        """Return the images of half spectra (F, images), plus `plus` (images, h, w) if there is."""
        images = spectra.shape[1]
        dtype = spectra.dtype.to_real()
        result = spectra.new_empty(images, *plane.result, dtype=dtype)
        kept, addresses = _addresses(spectra, plus, plane.tables, result)
        arguments = (*addresses, images, a_block)
        back, work = plane.back(a_block), plane.work_back(a_block)
        self._transform("images_of", plane, result, images, a_block, arguments, back, work)
        del kept
        return result

    def _transform(
        self, name: str, plane: Plane, like: Tensor, images: int, a_block: int,
        arguments: tuple[int, ...], buffers: tuple[int, int], work: list[tuple[int, int]],
    ) -> None:  # fmt: skip
        even = buffers[0] + buffers[0] % 2
        sizes = (*plane.size, *plane.source, *plane.result, even)
        shared = (even + buffers[1]) * plane.tables.element_size()
        blocks = -(-images // a_block)
        self._launch(
            f"{name}<{TYPES[like.dtype]}>", like.device, blocks, threads_for(work),
            (*arguments, *sizes), shared,
        )  # fmt: skip

    def transpose(self, matrix: Tensor) -> Tensor:
        """Return a complex matrix (m, n) as a contiguous one (n, m)."""
        matrix = matrix.contiguous()
        rows, columns = matrix.shape
        result = matrix.new_empty(columns, rows)
        tiles = -(-rows // 32) * -(-columns // 32)
        arguments = (matrix.data_ptr(), result.data_ptr(), rows, columns)
        name = f"transpose<{TYPES[matrix.dtype.to_real()]}>"
        shared = 32 * 33 * matrix.element_size()
        self._launch(name, matrix.device, tiles, _THREADS, arguments, shared)
        return result

    def residual_on_grid(self, target: Tensor, output: Tensor, size: tuple[int, int]) -> Tensor:
        """Return `target - output`, (..., h, w), in the corner of zeros (..., *size)."""
        target, output = target.contiguous(), output.contiguous()
        result = target.new_empty(*target.shape[:-2], *size)
        addresses = (t.data_ptr() for t in (target, output, result))
        arguments = (*addresses, result.numel(), *size, *target.shape[-2:])
        self._each(f"residual_on_grid<{TYPES[target.dtype]}>", result.numel(), arguments, target)
        return result


def _addresses(*tensors: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
    """Return the tensors, contiguous, to be kept until the launch, and where they lie, or 0."""
    kept = [None if t is None else t.contiguous() for t in tensors]
    return kept, [0 if t is None else t.data_ptr() for t in kept]
