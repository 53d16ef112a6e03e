"""The array libraries that solvers run on: torch, and CuPy through the array API and DLPack."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frfx.errors import BackendError


@dataclass(frozen=True)
class Namespace:
    """The functions of the array API that solvers use, under its names.

    torch has most of them under other names; this spares every user a package that renames them.
    """

    reshape: Callable[[Any, tuple[int, ...]], Any]
    permute_dims: Callable[[Any, tuple[int, ...]], Any]
    concat: Callable[..., Any]
    rfftn: Callable[..., Any]
    irfftn: Callable[..., Any]


class Backend(abc.ABC):
    """An array library.

    Attributes:
        name: What users call it.
        namespace: Its array API.
    """

    name: str
    namespace: Namespace

    @abc.abstractmethod
    def constant(self, tensor: Tensor) -> Any:
        """Return a tensor that is kept, as an array of the library."""

    @abc.abstractmethod
    def run(self, function: Callable[[Any], Any], x: Tensor) -> Tensor:
        """Return what a function of arrays makes of a tensor, on the tensor's device."""

    @abc.abstractmethod
    def batch_last(self, x: Any) -> Any:
        """Move the batch and the channels back: (N, G, c, *s) -> (G, *s, c, N)."""

    @abc.abstractmethod
    def batch_first(self, x: Any) -> Any:
        """Undo `batch_last`."""


class TorchBackend(Backend):
    """torch, on the device of the tensors."""

    name = "torch"
    namespace = Namespace(
        reshape=torch.reshape,
        permute_dims=torch.permute,
        concat=lambda arrays, axis: torch.cat(arrays, axis),
        rfftn=lambda x, s, axes: torch.fft.rfftn(x, s, axes),
        irfftn=lambda x, s, axes: torch.fft.irfftn(x, s, axes),
    )

    def constant(self, tensor: Tensor) -> Tensor:
        return tensor

    def run(self, function: Callable[[Any], Any], x: Tensor) -> Tensor:
        return function(x)

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
        self.namespace = Namespace(
            reshape=cupy.reshape,
            permute_dims=cupy.transpose,
            concat=cupy.concatenate,
            rfftn=cupy.fft.rfftn,
            irfftn=cupy.fft.irfftn,
        )

    def constant(self, tensor: Tensor) -> Any:
        if tensor.device.type != "cuda":
            raise BackendError(
                f'backend "cupy" computes on CUDA devices, and the weights are on {tensor.device}: '
                'move the model, or use backend="torch"'
            )
        return self._cupy.from_dlpack(tensor.detach())

    @torch.compiler.disable
    def run(self, function: Callable[[Any], Any], x: Tensor) -> Tensor:
        device = x.device.index
        stream = torch.cuda.current_stream(x.device).cuda_stream
        with self._cupy.cuda.Device(device), self._cupy.cuda.ExternalStream(stream, device):
            return torch.from_dlpack(function(self._cupy.from_dlpack(x.detach())))

    def batch_last(self, x: Any) -> Any:
        return self._cupy.ascontiguousarray(x.transpose(1, *range(3, x.ndim), 2, 0))

    def batch_first(self, x: Any) -> Any:
        return x.transpose(x.ndim - 1, 0, x.ndim - 2, *range(1, x.ndim - 2))


BACKENDS = ("auto", "torch", "cupy")


def get_backend(name: str) -> Backend:
    """Return a backend by name; ``"auto"`` is torch.

    Raises:
        BackendError: If there is no such backend, or it cannot be had here.
    """
    if name == "cupy":
        return CupyBackend()
    if name not in BACKENDS:
        known = ", ".join(map(repr, BACKENDS))
        raise BackendError(f"there is no backend {name!r}; there are {known}")
    return torch_backend
