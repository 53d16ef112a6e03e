"""The kernels as functions of tensors, and what launches them."""

from __future__ import annotations

import functools
import importlib.resources
import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

SOURCES = ("label", "activation", "max_pool", "fourier")
"""The files of this folder, `.cu`."""

TYPES = {torch.float32: "float", torch.float64: "double"}

_THREADS = 256
_MOST_BLOCKS = 1 << 16

_LATENCY = 128
"""How many threads more a turn of a block might have had in the time that it waits for memory."""


class Launcher(Protocol):
    """Runs a kernel.

    Attributes:
        device_type: Where its tensors lie, as torch calls it.
        shared_memory: How many bytes of shared memory a block may have.
    """

    device_type: str
    shared_memory: int

    def __call__(
        self,
        name: str,
        device: torch.device,
        blocks: int,
        threads: int,
        arguments: tuple[int | float, ...],
        shared: int = 0,
    ) -> None:
        """Launch the instance of a template, such as ``"unpool<float, true>"``.

        Args:
            name: The instance.
            device: Of the tensors.
            blocks: How many blocks of threads.
            threads: How many threads a block has.
            arguments: Addresses and numbers, which the kernels take as `long long` and `double`.
            shared: Bytes of shared memory a block.
        """


class CupyLauncher:
    """Compiles kernels with CuPy, and launches them on torch's current stream.

    Args:
        cupy: The module.
    """

    device_type = "cuda"

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._kernels: dict[tuple[str, int], Any] = {}
        self._streams: dict[tuple[int, int], Any] = {}
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.shared_memory = properties.shared_memory_per_block_optin

    def __call__(
        self,
        name: str,
        device: torch.device,
        blocks: int,
        threads: int,
        arguments: tuple[int | float, ...],
        shared: int = 0,
    ) -> None:
        """Launch the instance of a template."""
        index = torch.cuda.current_device() if device.index is None else device.index
        pointer = torch.cuda.current_stream(device).cuda_stream
        if (pointer, index) not in self._streams:
            self._streams[pointer, index] = self._cupy.cuda.ExternalStream(pointer, index)
        with torch.cuda.device(index):
            if (name, index) not in self._kernels:
                self._kernels[name, index] = self._compile(name)
            kernel, stream = self._kernels[name, index], self._streams[pointer, index]
            kernel((blocks,), (threads,), arguments, shared_mem=shared, stream=stream)

    def _compile(self, name: str) -> Any:
        module = self._cupy.RawModule(
            code=source(), options=("-std=c++17",), name_expressions=(name,)
        )
        kernel = module.get_function(name)
        kernel.max_dynamic_shared_size_bytes = self.shared_memory
        return kernel


@functools.cache
def source() -> str:
    """Return the source of all kernels."""
    folder = importlib.resources.files(__package__)
    return "\n".join((folder / f"{name}.cu").read_text() for name in SOURCES)


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


@dataclass(frozen=True)
class CircularMap:
    """A block-circulant map of images, made ready for the kernel.

    Attributes:
        groups, rows, columns: G, c' and c.
        size: Height and width of the grid.
        source: Those of the source.
        result: Those of the result.
        matrices: Shape (G, c', c, F), complex, with F = height * (width // 2 + 1).
        tables: The four tables of transforms, one after the other, complex.
    """

    groups: int
    rows: int
    columns: int
    size: tuple[int, int]
    source: tuple[int, int]
    result: tuple[int, int]
    matrices: Tensor
    tables: Tensor

    @classmethod
    def of(
        cls,
        size: tuple[int, int],
        source: tuple[int, int],
        result: tuple[int, int],
        matrices: Tensor,
    ) -> CircularMap:
        """Make the tables for a grid.

        Args:
            size: Height and width of the grid.
            source: Those of the source, at the grid's origin.
            result: Those of the result, likewise.
            matrices: The matrices at the frequencies of the half spectrum (G, F, c', c), complex,
                over the size of the grid.
        """
        groups, _, rows, columns = matrices.shape
        height, width = size
        half = width // 2 + 1
        frequency = torch.arange(half)
        twice = torch.where((frequency == 0) | (2 * frequency == width), 1.0, 2.0)
        tables = (
            _padded(_powers(source[0], height, height, -1)),
            _padded(_powers(height, result[0], height, 1)),
            _powers(source[1], half, width, -1),
            _powers(half, result[1], width, 1) * twice[:, None],
        )
        return cls(
            groups,
            rows,
            columns,
            size,
            source,
            result,
            matrices.permute(0, 2, 3, 1).contiguous(),
            torch.cat([table.flatten() for table in tables]).to(matrices),
        )

    @property
    def buffers(self) -> tuple[int, int]:
        """How many complex numbers a block keeps of the even steps, and of the odd ones."""
        height, half = self.size[0], self.size[1] // 2 + 1
        lines = self.columns * self.source[0]
        residual = -(-lines // 4) * 4 * self.source[1]
        even = max(lines * half, self.rows * height * half)
        odd = max(
            -(-residual // 2), self.columns * height * half, self.rows * self.result[0] * half
        )
        return even + even % 2, odd + odd % 2

    @property
    def shared(self) -> int:
        """The shared memory that a block needs, in bytes."""
        return sum(self.buffers) * self.matrices.element_size()

    @functools.cached_property
    def threads(self) -> int:
        """How many threads a block should have: few are idle in any step, or wait alone."""
        height, half = self.size[0], self.size[1] // 2 + 1
        quads = [-(-n // 4) for n in (self.columns * self.source[0], height, self.rows,
                                      self.result[0], self.rows * self.result[0])]  # fmt: skip
        steps = (  # how many times four results there are to make, and of how many terms each
            (quads[0] * half, self.source[1]),
            (self.columns * quads[1] * half, self.source[0]),
            (quads[2] * height * half, self.columns),
            (self.rows * quads[3] * half, height),
            (quads[4] * self.result[1], half),
        )

        def cost(threads: int) -> int:
            turns = sum(-(-count // threads) * terms for count, terms in steps)
            return turns * (threads + _LATENCY)

        return min(range(64, 513, 32), key=cost)

    @property
    def nbytes(self) -> int:
        """The memory that matrices and tables hold, in bytes."""
        return sum(t.numel() * t.element_size() for t in (self.matrices, self.tables))


def _powers(rows: int, columns: int, n: int, sign: int) -> Tensor:
    """Return `exp(sign 2 pi i r c / n)`, complex128."""
    turns = torch.outer(torch.arange(rows), torch.arange(columns)) % n
    angle = sign * 2 * math.pi / n * turns.double()
    return torch.polar(torch.ones_like(angle), angle)


def _padded(table: Tensor) -> Tensor:
    """Return a table with its columns filled up to a multiple of four."""
    return torch.nn.functional.pad(table, (0, -table.shape[1] % 4))


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
        """Tell whether they can take these tensors: of one type, on their device, no autograd."""
        first = tensors[0]
        return (
            first.dtype in TYPES
            and all(
                t.device.type == self.device_type
                and t.device == first.device
                and t.dtype == first.dtype
                and not (t.requires_grad and torch.is_grad_enabled())
                for t in tensors
            )
            and first.numel() > 0
            and not torch.compiler.is_compiling()
        )

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
            source: Shape (N, G * c, *source), as `minus`.
            minus: What is taken off it.
            plus: Shape (N, G * c', *result).
        """
        given = [None if t is None else t.contiguous() for t in (source, minus, plus)]
        n = source.shape[0]
        result = source.new_empty(n, circular.groups * circular.rows, *circular.result)
        tensors = (*given, circular.matrices, circular.tables, result)
        arguments = (
            *(0 if t is None else t.data_ptr() for t in tensors),
            circular.groups,
            circular.rows,
            circular.columns,
            *circular.size,
            *circular.source,
            *circular.result,
            circular.buffers[0],
        )
        name = f"circular_map<{TYPES[source.dtype]}>"
        blocks = n * circular.groups
        self._launch(name, source.device, blocks, circular.threads, arguments, circular.shared)
        return result

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
