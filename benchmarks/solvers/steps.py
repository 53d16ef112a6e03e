"""Single steps of a reconstruction with a kernel, beside torch: a GPU alone has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import frfx
from frfx.linalg.backend import get_backend
from solvers.stopwatch import Stopwatch

IMAGE = (256, 8, 28, 28)

OPS: dict[str, tuple[nn.Module, str]] = {
    "tanh": (nn.Tanh(), "paper"),
    "sigmoid": (nn.Sigmoid(), "paper"),
    "ReLU6": (nn.ReLU6(), "minimal"),
    "SiLU": (nn.SiLU(), "paper"),
    "GELU": (nn.GELU(), "paper"),
    "Mish": (nn.Mish(), "paper"),
    "max pooling 2, copied": (nn.MaxPool2d(2), "paper"),
    "max pooling 2, minimal": (nn.MaxPool2d(2), "minimal"),
    "max pooling 3 s2 p1, copied": (nn.MaxPool2d(3, 2, 1), "paper"),
    "max pooling 3 s2 p1, minimal": (nn.MaxPool2d(3, 2, 1), "minimal"),
    "max pooling 3 s1 p1, minimal": (nn.MaxPool2d(3, 1, 1), "minimal"),
}


def measure(watch: Stopwatch) -> Iterator[dict[str, Any]]:
    """Yield the rows, in microseconds of a CUDA graph."""
    for classes in (10, 1000):
        logits = torch.randn(256, classes, device=watch.device)
        labels = torch.randint(0, classes, (256,), device=watch.device)
        name = f"nearest embedding, {classes} classes"
        yield _row(name, watch, nn.Identity(), "minimal", (labels, None, logits), labels=True)
    for name, (op, policy) in OPS.items():
        x = torch.randn(IMAGE, device=watch.device)
        output = op(x)
        target = op(torch.randn(IMAGE, device=watch.device))
        yield _row(name, watch, op, policy, (target, output, x))


def _row(
    name: str, watch: Stopwatch, op: nn.Module, policy: str, given: tuple[Any, ...],
    labels: bool = False,
) -> dict[str, Any]:  # fmt: skip
    inverse = frfx.invert(nn.Sequential(nn.Identity(), op), "0", policy=policy).inverse
    inversion = next(iter(inverse.children())) if labels else inverse.get_submodule("_1")

    def run(backend: str) -> Tensor:
        inversion.backend = get_backend(backend)
        return inversion(*given)

    with torch.no_grad():
        found = watch.captured({name: lambda name=name: run(name) for name in ("torch", "auto")})
        eager = watch({name: lambda name=name: run(name) for name in ("torch", "auto")})
    return {
        "step": name,
        "torch_us": 1e3 * found["torch"],
        "kernel_us": 1e3 * found["auto"],
        "kernel_to_torch": found["auto"] / found["torch"],
        "eager_torch_us": 1e3 * eager["torch"],
        "eager_kernel_us": 1e3 * eager["auto"],
    }
