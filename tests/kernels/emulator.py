"""Runs the CUDA kernels on a CPU: compiled as C++, a thread of the host for a thread of the GPU."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

from frfx.kernels import Device
from frfx.kernels.kernels import TYPES
from frfx.kernels.launch import source

MEMORY = 1 << 18
"""Bytes of shared memory, as in emulator.h."""

FUNCTORS = (
    "Tanh", "Sigmoid", "Identity", "Dip<Silu>", "Dip<Gelu>", "Dip<GeluTanh>", "Dip<Mish>",
)  # fmt: skip

TEMPLATES = (
    "nearest_embedding<{type}>",
    *(f"{name}, {tile}>" for tile in (1, 2, 4) for name in (
        "images_of<{type}", *(f"{kernel}<{{type}}, {copies}" for copies in ("true", "false")
                              for kernel in ("circular_map", "spectra")))),
    "residual_on_grid<{type}>",
    "transpose<{type}>",
    "dots<{type}>",
    "turn<{type}>",
    "advance<{type}>",
    "keep<{type}>",
    "unpool_tops<{type}>",
    *(f"{name}<{{type}}, {minimal}>" for name in ("unpool_bounds", "unpool_tiles")
      for minimal in ("true", "false")),
    *(f"max_pool<{{type}}, {size}>" for size in range(4)),
    *(f"preimage<{{type}}, {functor}>" for functor in FUNCTORS),
    *(f"unpool_preimages<{{type}}, {functor}>" for functor in ("Tanh", "Sigmoid")),
)  # fmt: skip
INSTANCES = tuple(t.format(type=kind) for kind in TYPES.values() for t in TEMPLATES)


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the kernels as a shared library; None without a compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    folder = Path(tempfile.mkdtemp(prefix="frfx-kernels-"))
    lines = [f'#include "{Path(__file__).with_name("emulator.h")}"', source()]
    for i, name in enumerate(INSTANCES):
        lines.append(
            f'extern "C" void run_{i}(int blocks, int threads, const std::uint64_t* arguments) '
            f"{{ launch({name}, blocks, threads, arguments); }}"
        )
    (folder / "kernels.cpp").write_text("\n".join(lines))
    built = folder / "kernels.so"
    command = [
        compiler,
        "-std=c++20",
        "-O1",
        "-shared",
        "-fPIC",
        "-pthread",
        "-Wno-unknown-pragmas",
    ]
    done = subprocess.run(
        [*command, str(folder / "kernels.cpp"), "-o", str(built)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(built))
    shutil.rmtree(folder)
    return loaded


class EmulatedLauncher:
    """Launches kernels of a shared library that was compiled for the CPU.

    Attributes:
        device: What it emulates.
        launched: The names of the instances that it has launched.
    """

    device_type = "cpu"
    device = Device(1, MEMORY, MEMORY)

    def __init__(self) -> None:
        self.launched: list[str] = []

    def works(self):
        """Tell whether it can launch: it can."""
        return True

    def about(self, device):
        """Return what the emulated device has."""
        return self.device

    def __call__(self, name, device, blocks, threads, arguments, shared=0):
        """Launch the instance of a template."""
        assert device.type == "cpu"
        assert shared <= MEMORY
        slots = (ctypes.c_uint64 * len(arguments))()
        for i, value in enumerate(arguments):
            kind = ctypes.c_double if isinstance(value, float) else ctypes.c_int64
            kind.from_buffer(slots, 8 * i).value = value
        memory = (ctypes.c_ubyte * MEMORY).in_dll(library(), "memory")
        ctypes.memset(memory, 0xFF, MEMORY)  # NaN, for whoever reads what nobody has written
        getattr(library(), f"run_{INSTANCES.index(name)}")(blocks, threads, slots)
        assert bytes(memory[shared:]) == b"\xff" * (MEMORY - shared), "written beyond its memory"
        self.launched.append(name)
