"""What runs a reconstruction: torch, or CuPy through the array API and DLPack; and the kernels."""

from __future__ import annotations

import abc
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frfx.errors import BackendError
from frfx.kernels import CupyLauncher, Kernels


@dataclass(frozen=True)
class Namespace:
    """The functions of the array API that solvers use, under its names.

    torch has most of them under other names; this spares every user a package that renames them.
    The inverse transform does not divide by the size of the grid.
    """

    reshape: Callable[[Any, tuple[int, ...]], Any]
    permute_dims: Callable[[Any, tuple[int, ...]], Any]
    concat: Callable[..., Any]
    rfftn: Callable[..., Any]
    irfftn: Callable[..., Any]


class Backend(abc.ABC):
    """An array library, and the kernels that stand in for many of its calls.

    Attributes:
        name: What users call it.
        namespace: Its array API.
        kernels: For CUDA devices; None if there are none.
    """

    name: str
    namespace: Namespace
    kernels: Kernels | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return get_backend, (self.name,)

    def kernels_for(self, *tensors: Tensor) -> Kernels | None:
        """Return the kernels if there are any and they can take these tensors."""
        return self.kernels if self.kernels and self.kernels.serve(*tensors) else None

    @abc.abstractmethod
    def constant(self, tensor: Tensor) -> Any:
        """Return a tensor that is kept, as an array of the library."""

    @abc.abstractmethod
    def run(self, function: Callable[..., Any], x: Tensor, *others: Tensor | None) -> Tensor:
        """Return what a function of arrays makes of tensors, on the first one's device."""

    @abc.abstractmethod
    def batch_last(self, x: Any) -> Any:
        """Move the batch and the channels back: (N, G, c, *s) -> (G, *s, c, N)."""

    @abc.abstractmethod
    def batch_first(self, x: Any) -> Any:
        """Undo `batch_last`."""


class TorchBackend(Backend):
    """torch, on the device of the tensors.

    Args:
        kernels: The kernels, if they are to be used.
    """

    def __init__(self, kernels: Kernels | None = None) -> None:
        self.name = "torch" if kernels is None else "auto"
        self.kernels = kernels

    namespace = Namespace(
        reshape=torch.reshape,
        permute_dims=torch.permute,
        concat=lambda arrays, axis: torch.cat(arrays, axis),
        rfftn=lambda x, s, axes: torch.fft.rfftn(x, s, axes),
        irfftn=lambda x, s, axes: torch.fft.irfftn(x, s, axes, norm="forward"),
    )

    def constant(self, tensor: Tensor) -> Tensor:
        return tensor

    def run(self, function: Callable[..., Any], x: Tensor, *others: Tensor | None) -> Tensor:
        return function(x, *others)

    def batch_last(self, x: Tensor) -> Tensor:
        n, groups, channels, *size = x.shape
        if x.device.type != "cpu" or (torch.get_num_threads() > 1 and not _collides(x)):
            return x.permute(1, *range(3, x.ndim), 2, 0).contiguous()
        # Transposing a matrix, which runs on one thread, and then moving whole rows: on one thread
        # faster than a permutation, and on any number where the permutation's reads collide.
        rows = x.reshape(n, -1).t().contiguous().view(groups, channels, *size, n)
        return rows.movedim(1, -2)

    def batch_first(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return x.permute(x.ndim - 1, 0, x.ndim - 2, *range(1, x.ndim - 2))
        rows = x.movedim(-2, 1).contiguous()
        return rows.view(-1, x.shape[-1]).t().contiguous().view(x.shape[-1], *rows.shape[:-1])


torch_backend = TorchBackend()


def _collides(x: Tensor) -> bool:
    """Return whether samples lie at a distance that maps them to the same lines of a cache."""
    return x[0].numel() * x.element_size() % 4096 == 0


class CupyBackend(Backend):
    """CuPy, on the GPU and the current stream of the tensors, which it shares memory with.

    Raises:
        BackendError: If CuPy or a CUDA device is missing.
    """

    name = "cupy"

    def __init__(self) -> None:
        try:
            import cupy
        except ImportError as error:
            raise BackendError(
                'backend "cupy" needs CuPy: install frfx[cupy-cuda12x] or frfx[cupy-cuda13x], '
                'whichever CUDA your driver has, or use backend="torch"'
            ) from error
        if not torch.cuda.is_available():
            raise BackendError(
                'backend "cupy" needs a CUDA device, and torch sees none: use backend="torch"'
            )
        self._cupy = cupy
        self._memory = cupy.cuda.PythonFunctionAllocator(torch.cuda.caching_allocator_alloc, _free)
        self.kernels = Kernels(CupyLauncher(cupy))
        self.namespace = Namespace(
            reshape=cupy.reshape,
            permute_dims=cupy.transpose,
            concat=cupy.concatenate,
            rfftn=cupy.fft.rfftn,
            irfftn=functools.partial(cupy.fft.irfftn, norm="forward"),
        )

    def constant(self, tensor: Tensor) -> Any:
        if tensor.device.type != "cuda":
            raise BackendError(
                f'backend "cupy" computes on CUDA devices, and the weights are on {tensor.device}: '
                'move the model, or use backend="torch"'
            )
        return self._cupy.from_dlpack(tensor.detach())

    @torch.compiler.disable
    def run(self, function: Callable[..., Any], x: Tensor, *others: Tensor | None) -> Tensor:
        cuda, device = self._cupy.cuda, x.device.index
        stream = torch.cuda.current_stream(x.device).cuda_stream
        # torch's memory: what one of the two has freed, the other can have.
        memory = cuda.using_allocator(self._memory.malloc)
        with cuda.Device(device), cuda.ExternalStream(stream, device), memory:
            arrays = (t if t is None else self._cupy.from_dlpack(t.detach()) for t in (x, *others))
            return torch.from_dlpack(function(*arrays))

    def batch_last(self, x: Any) -> Any:
        return self._cupy.ascontiguousarray(x.transpose(1, *range(3, x.ndim), 2, 0))

    def batch_first(self, x: Any) -> Any:
        return x.transpose(x.ndim - 1, 0, x.ndim - 2, *range(1, x.ndim - 2))


def _free(
    pointer: int,
    device: int,
    delete: Callable[[int], None] = torch.cuda.caching_allocator_delete,
    is_finalizing: Callable[[], bool] = sys.is_finalizing,
) -> None:
    """Give memory back to torch, which may be gone before CuPy's plans when the process ends."""
    if not is_finalizing():
        delete(pointer)


BACKENDS = ("auto", "torch", "cupy")


def get_backend(name: str) -> Backend:
    """Return a backend by name.

    ``"auto"`` is what was measured to be the fastest (docs/solvers.md): torch for transforms and
    products, and the kernels where there is a CUDA device and CuPy to launch them.

    Raises:
        BackendError: If there is no such backend, or it cannot be had here.
    """
    if name == "cupy":
        return CupyBackend()
    if name not in BACKENDS:
        known = ", ".join(map(repr, BACKENDS))
        raise BackendError(f"there is no backend {name!r}; there are {known}")
    if name == "auto" and torch.cuda.is_available() and not torch.version.hip:
        return _with_kernels()
    return torch_backend


@functools.cache
def _with_kernels() -> TorchBackend:
    try:
        import cupy
    except ImportError:
        return torch_backend
    return TorchBackend(Kernels(CupyLauncher(cupy)))
