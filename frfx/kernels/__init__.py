"""CUDA kernels for what torch does in many: labels, activations, pooling, images, iterations.

Which steps have one, and what it saves, is recorded in docs/solvers.md. The kernels are compiled
and launched by CuPy; everything that they compute, torch computes, too, where they do not serve.
"""

from frfx.kernels.arrangement import Device, Sizes
from frfx.kernels.kernels import Kernels, Windows
from frfx.kernels.launch import CupyLauncher, Launcher
from frfx.kernels.plane import CircularMap, Plane

__all__ = [
    "CircularMap",
    "CupyLauncher",
    "Device",
    "Kernels",
    "Launcher",
    "Plane",
    "Sizes",
    "Windows",
]
