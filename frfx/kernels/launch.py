"""What compiles the sources of this folder and launches them."""

from __future__ import annotations

import contextlib
import functools
import importlib.resources
import warnings
from typing import Any, Protocol

import torch

from frfx.kernels.arrangement import Device

SOURCES = ("label", "activation", "max_pool", "fourier", "conjugate_gradients")
"""The files of this folder, `.cu`."""

_WITHOUT_ASKING = 48 << 10
"""Bytes of shared memory that every block may have."""


class Launcher(Protocol):
    """Runs a kernel.

    Attributes:
        device_type: Where its tensors lie, as torch calls it.
    """

    device_type: str

    def works(self) -> bool:
        """Tell whether it can compile and launch at all."""

    def about(self, device: torch.device) -> Device:
        """Return what a device has."""

    def __call__(
        self,
        name: str,
        device: torch.device,
        blocks: int,
        threads: int,
        arguments: tuple[int | float, ...],
        shared: int = 0,
    ) -> None:
        """Launch the instance of a template, such as ``"unpool_tiles<float, true>"``.

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

    Nothing of CUDA is asked before the first launch.

    Args:
        cupy: The module.
    """

    device_type = "cuda"

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._kernels: dict[tuple[str, int], Any] = {}
        self._streams: dict[tuple[int, int], Any] = {}
        self._large: set[tuple[str, int]] = set()
        self._about: dict[torch.device, Device] = {}
        self._works: bool | None = None

    def works(self) -> bool:
        """Tell whether CuPy can compile the kernels; if not, warn once."""
        if self._works is None:
            try:
                self._compile("transpose<float>")
            except Exception as error:  # no compiler, no headers, a device that it does not know
                self._works = False
                warnings.warn(
                    f"CuPy cannot compile frfx's kernels; torch computes in their place: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            else:
                self._works = True
        return self._works

    def about(self, device: torch.device) -> Device:
        """Return what a device has."""
        if device not in self._about:
            has = torch.cuda.get_device_properties(device)
            self._about[device] = Device(
                has.multi_processor_count,
                has.shared_memory_per_block_optin,
                has.shared_memory_per_multiprocessor,
            )
        return self._about[device]

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
        current = torch.cuda.current_device()
        index = current if device.index is None else device.index
        pointer = torch.cuda.current_stream(device).cuda_stream
        if (pointer, index) not in self._streams:
            self._streams[pointer, index] = self._cupy.cuda.ExternalStream(pointer, index)
        with contextlib.nullcontext() if index == current else torch.cuda.device(index):
            if (name, index) not in self._kernels:
                self._kernels[name, index] = self._compile(name)
            kernel, stream = self._kernels[name, index], self._streams[pointer, index]
            if shared > _WITHOUT_ASKING and (name, index) not in self._large:
                kernel.max_dynamic_shared_size_bytes = self.about(device).a_block
                self._large.add((name, index))
            kernel((blocks,), (threads,), arguments, shared_mem=shared, stream=stream)

    def _compile(self, name: str) -> Any:
        module = self._cupy.RawModule(
            code=source(), options=("-std=c++17",), name_expressions=(name,)
        )
        return module.get_function(name)


@functools.cache
def source() -> str:
    """Return the source of all kernels."""
    folder = importlib.resources.files(__package__)
    return "\n".join((folder / f"{name}.cu").read_text() for name in SOURCES)
