"""Single steps of a reconstruction: on a CPU beside the op's own, on a GPU by kernels and torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import frfx
from frfx.linalg.backend import get_backend
from frfx.rules import Inversion
from solvers.stopwatch import Stopwatch

IMAGE = (256, 8, 28, 28)

OPS: dict[str, tuple[nn.Module, str]] = {
    "tanh": (nn.Tanh(), "paper"),
    "sigmoid": (nn.Sigmoid(), "paper"),
    "ReLU6": (nn.ReLU6(), "minimal"),
    "hardswish": (nn.Hardswish(), "paper"),
    "SiLU": (nn.SiLU(), "paper"),
    "GELU": (nn.GELU(), "paper"),
    "Mish": (nn.Mish(), "paper"),
    "max pooling 2, copied": (nn.MaxPool2d(2), "paper"),
    "max pooling 2, minimal": (nn.MaxPool2d(2), "minimal"),
    "max pooling 3 s2 p1, copied": (nn.MaxPool2d(3, 2, 1), "paper"),
    "max pooling 3 s2 p1, minimal": (nn.MaxPool2d(3, 2, 1), "minimal"),
    "max pooling 3 s1 p1, minimal": (nn.MaxPool2d(3, 1, 1), "minimal"),
}


@dataclass(frozen=True)
class Step:
    """What inverts one op, and what it is given.

    Attributes:
        name: What the table calls it.
        op: The op; None for the embedding of labels.
        inversion: What inverts it.
        given: Target, output and input.
    """

    name: str
    op: nn.Module | None
    inversion: Inversion
    given: tuple[Tensor, Tensor | None, Tensor]

    def inverse(self, backend: str) -> Callable[[], Tensor]:
        """Return what runs it, with a backend."""

        def run() -> Tensor:
            self.inversion.backend = get_backend(backend)
            return self.inversion(*self.given)

        return run

    def forward_backward(self) -> None:
        """Run the op itself, and its gradient."""
        assert self.op is not None
        x = self.given[2].detach().requires_grad_()
        self.op(x).sum().backward()


def steps(device: torch.device) -> Iterator[Step]:
    """Yield what is measured."""
    for classes in (10, 1000):
        logits = torch.randn(256, classes, device=device)
        labels = torch.randint(0, classes, (256,), device=device)
        name = f"nearest embedding, {classes} classes"
        inversion = _inversion(nn.Identity(), "minimal", "argmax")
        yield Step(name, None, inversion, (labels, None, logits))
    for name, (op, policy) in OPS.items():
        x = torch.randn(IMAGE, device=device)
        output, target = op(x), op(torch.randn(IMAGE, device=device))
        yield Step(name, op, _inversion(op, policy, "_1"), (target, output, x))


def _inversion(op: nn.Module, policy: str, name: str) -> Inversion:
    """Return an inversion of a network of one op."""
    inverse = frfx.invert(nn.Sequential(nn.Identity(), op), "0", policy=policy)
    found = inverse.inverse.get_submodule(name)
    assert isinstance(found, Inversion)
    return found


def on_cpu(step: Step, watch: Stopwatch) -> dict[str, Any]:
    """Return the row of a step on a CPU."""
    functions: dict[str, Callable[[], Any]] = {"inverse": step.inverse("auto")}
    with torch.no_grad():
        found = watch(functions)
    if step.op is not None:
        found |= watch({"step": step.forward_backward})
    return {
        "step": step.name,
        "inverse_ms": found["inverse"],
        "ns_an_entry": 1e6 * found["inverse"] / step.given[2].numel(),
        "to_step": found["inverse"] / found["step"] if step.op else None,
    }


def on_gpu(step: Step, watch: Stopwatch) -> dict[str, Any]:
    """Return the row of a step on a GPU: times in microseconds, of a CUDA graph and as called."""
    functions = {name: step.inverse(name) for name in ("torch", "auto")}
    with torch.no_grad():
        found, eager = watch.captured(functions), watch(functions)
    return {
        "step": step.name,
        "torch_us": 1e3 * found["torch"],
        "kernel_us": 1e3 * found["auto"],
        "kernel_to_torch": found["auto"] / found["torch"],
        "eager_torch_us": 1e3 * eager["torch"],
        "eager_kernel_us": 1e3 * eager["auto"],
    }
