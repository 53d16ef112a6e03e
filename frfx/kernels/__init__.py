"""CUDA kernels for what torch does in many: label embedding, activations, pooling, small images.

Which steps have one, and what it saves, is recorded in docs/solvers.md. The kernels are compiled
and launched by CuPy; everything that they compute, torch computes, too, where they do not serve.
"""

from frfx.kernels.kernels import CircularMap, CupyLauncher, Kernels, Launcher, Windows

__all__ = ["CircularMap", "CupyLauncher", "Kernels", "Launcher", "Windows"]
