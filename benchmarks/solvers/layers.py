"""Single layers beside their floors, the literal systems of the paper and a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from frfx.linalg import Convolution, Solver
from frfx.linalg.auto import Choice
from frfx.linalg.backend import get_backend
from frfx.linalg.spectral import SpectralFactor
from solvers.floors import Rates, floor, literal, literal_samples
from solvers.stopwatch import Stopwatch


@dataclass(frozen=True)
class Layer:
    """A convolution, the size of its input and the batch."""

    name: str
    channels: tuple[int, int]
    kernel: int
    size: int
    batch: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    quick: bool = True

    def __str__(self) -> str:
        parts = [f"{self.channels[0]}->{self.channels[1]} k{self.kernel}"]
        parts += [f"s{self.stride}"] * (self.stride > 1) + [f"p{self.padding}"] * (self.padding > 0)
        parts += [f"g{self.groups}"] * (self.groups > 1)
        return " ".join(parts) + f" {self.size}x{self.size}"

    def operator(self, module: nn.Conv2d) -> Convolution:
        """Return the linear part of the layer."""
        return Convolution(
            module.weight.detach(),
            (self.size, self.size),
            stride=module.stride,
            padding=((self.padding,) * 2,) * 2,
            groups=self.groups,
        )

    def module(self, device: torch.device) -> nn.Conv2d:
        """Return the layer, initialised by torch."""
        torch.manual_seed(0)
        return nn.Conv2d(
            *self.channels, self.kernel, self.stride, self.padding, groups=self.groups
        ).to(device)


LAYERS = (
    Layer("MNIST conv1", (1, 2), 5, 28, 256),
    Layer("MNIST conv2", (2, 4), 5, 12, 256),
    Layer("CIFAR-10 conv1", (3, 5), 5, 32, 256),
    Layer("CIFAR-10 conv2", (5, 10), 3, 14, 256),
    Layer("CIFAR-10 conv3", (10, 15), 3, 6, 256),
    Layer("Tiny ImageNet conv2", (10, 25), 3, 30, 128),
    Layer("ImageNette conv1", (3, 10), 25, 224, 8, quick=False),
    Layer("unpadded 64-128", (64, 128), 3, 34, 32),
    Layer("unpadded 256", (256, 256), 3, 10, 64),
    Layer("unpadded 512", (512, 512), 3, 6, 64, quick=False),
    Layer("VGG-11 conv2", (64, 128), 3, 32, 32, padding=1),
    Layer("VGG-11 conv4", (256, 256), 3, 16, 32, padding=1, quick=False),
    Layer("ResNet stem", (3, 64), 7, 64, 32, stride=2, padding=3),
    Layer("ResNet 1x1", (256, 64), 1, 16, 32),
    Layer("ResNet 1x1 stride 2", (256, 512), 1, 16, 32, stride=2),
    Layer("ResNet 3x3 stride 2", (64, 128), 3, 16, 32, stride=2, padding=1),
    Layer("ResNeXt grouped", (128, 128), 3, 16, 32, padding=1, groups=32),
    Layer("MobileNet depthwise", (96, 96), 3, 16, 32, padding=1, groups=96),
    Layer("ConvNeXt patchify", (96, 192), 2, 16, 32, stride=2),
    Layer("VGG-16 conv2", (64, 64), 3, 224, 4, padding=1, quick=False),
)


class Problem:
    """One batch for a layer: forward values, a target, and the factors that solve for it.

    Args:
        layer: The layer.
        device: Where it is.
    """

    def __init__(self, layer: Layer, device: torch.device) -> None:
        self.module = layer.module(device)
        self.operator = layer.operator(self.module)
        self.x = torch.randn(layer.batch, *self.operator.in_shape, device=device)
        self.output = self.module(self.x).detach()
        self.target = self.output + torch.randn_like(self.output)

    def solve(self, factor: Choice) -> Callable[[], Tensor]:
        """Return what corrects the input by a factor."""
        return lambda: factor.correct(self.x, self.target, self.output)

    def step(self) -> None:
        """Run one forward and backward pass."""
        self.module.zero_grad()
        self.module(self.x.requires_grad_()).sum().backward()
        self.x.requires_grad_(False)
        self.x.grad = None


def on_cpu(layer: Layer, watch: Stopwatch) -> dict[str, Any]:
    """Return the row of a layer on a CPU, in milliseconds."""
    problem = Problem(layer, watch.device)
    operator = problem.operator
    factors = {"auto": Solver().prepare(operator)}
    if factors["auto"].solver == "iterative":  # one application of its model, for comparison
        factors["spectral"] = Solver("spectral").prepare(operator)
    functions = {name: problem.solve(factor) for name, factor in factors.items()}
    functions["step"] = problem.step  # type: ignore[assignment]
    functions |= floor(operator, layer.batch, watch.device)
    samples = literal_samples(operator)
    if samples:
        functions["literal"] = literal(operator, problem.x[:samples])
    found = watch(functions)
    prepare = watch.once(lambda: Solver().prepare(operator))
    sum_of_parts = found["there"] + found["product"] + found["back"]
    return {
        **about(layer, factors["auto"]),
        "ms": found["auto"],
        "floor_ms": sum_of_parts,
        "floor_parts_ms": {name: found[name] for name in ("there", "product", "back")},
        "to_floor": found["auto"] / sum_of_parts,
        "once_to_floor": found["spectral"] / sum_of_parts if "spectral" in found else None,
        "to_step": found["auto"] / found["step"],
        "literal_to_ours": (
            found["literal"] * layer.batch / samples / found["auto"] if samples else None
        ),
        "prepare_to_step": prepare / found["step"],
        "factor_mib": factors["auto"].nbytes / 2**20,
    }


BACKENDS = ("auto", "torch", "cupy")


def on_gpu(layer: Layer, watch: Stopwatch, rates: Rates) -> dict[str, Any]:
    """Return the row of a layer on a GPU, in microseconds: of a CUDA graph, and as called, "eager".

    What iterates has the time of one application of its model there, for a graph holds all the
    steps that there may be; its own is under "eager".
    """
    problem = Problem(layer, watch.device)
    operator, chosen = problem.operator, Solver().prepare(problem.operator, get_backend("auto"))
    once = Solver("spectral", damping=1e-2) if chosen.iterates else Solver()
    factors = {}
    for name in BACKENDS:
        factors[name] = once.prepare(operator, get_backend(name))
    functions = {name: problem.solve(factor) for name, factor in factors.items()}
    called = {**functions, "auto": problem.solve(chosen)}
    samples = literal_samples(operator)
    if samples:
        called["literal"] = literal(operator, problem.x[:samples])
    with torch.no_grad():
        found = watch.captured(functions)
        eager = watch(called)
        row = about(layer, chosen)
    step = watch.captured({"step": problem.step})["step"]
    least, bound = rates.floor(operator, layer.batch)
    inner = factors["auto"].factor
    if isinstance(inner, SpectralFactor):
        row["form"] = inner.map.form
        if inner.map.by_kernels is not None:
            row["form"] = "one kernel" if inner.map.by_kernels.in_one else "kernels"
    fastest = found.get("auto")  # matrices that are made anew at every call cannot be captured
    return {
        **row,
        "floor_us": 1e3 * least,
        "bound": bound,
        **{f"{name}_us": 1e3 * found[name] if name in found else None for name in BACKENDS},
        "to_floor": fastest / least if fastest else None,
        "to_step": fastest / step if fastest else None,
        **{f"eager_{name}_us": 1e3 * eager[name] for name in BACKENDS},
        "literal_to_ours": (
            eager["literal"] * layer.batch / samples / eager["auto"] if samples else None
        ),
        "factor_mib": chosen.nbytes / 2**20,
    }


def about(layer: Layer, chosen: Choice) -> dict[str, Any]:
    """Return what a row says of a layer and of what solves it."""
    inner, convergence = chosen.factor, chosen.take_convergence()
    return {
        "layer": layer.name,
        "geometry": str(layer),
        "batch": layer.batch,
        "solver": chosen.solver,
        "form": inner.map.form if isinstance(inner, SpectralFactor) else "",
        "steps": int(convergence.steps.max()) if convergence is not None else None,
    }
