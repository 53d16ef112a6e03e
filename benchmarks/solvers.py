"""What solving costs: layer by layer beside its floor, and whole networks beside a training step.

Run by `nox -s bench-solvers`; prints tables and writes them as JSON. All figures of a row are
measured in turns within one run, the least of each is kept, and they are read as ratios.

The floor of a layer is the sum of three things, each alone and on contiguous data: the real Fourier
transform of the residual on the layer's grid, the product with one matrix a frequency, and the
transform back. A "step" is one forward and backward pass of the same layer or network.
"""

from __future__ import annotations

import json
import math
import platform
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from stopwatch import Stopwatch
from torch import Tensor, nn
from torch.nn import functional as F

import frfx
from frfx import models
from frfx.linalg import Convolution, Solver
from frfx.linalg.backend import get_backend
from frfx.linalg.polyphase import Polyphase
from frfx.linalg.spectral import SpectralFactor

console = Console(width=170)


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


@dataclass(frozen=True)
class Rates:
    """What a GPU reaches: entries copied, in bytes read and written, and complex products.

    Attributes:
        bytes_per_ms: Of a large copy.
        products_per_ms: Complex multiplications and additions of a large batch of matrices.
    """

    bytes_per_ms: float
    products_per_ms: float

    @classmethod
    def measure(cls, device: torch.device, watch: Stopwatch) -> Rates | None:
        """Return the rates of a GPU; None for a CPU, whose floor is made of transforms."""
        if device.type != "cuda":
            return None
        source = torch.randn(1 << 28, device=device)
        result = torch.empty_like(source)
        a = torch.randn(64, 512, 512, dtype=torch.complex64, device=device)
        found = watch({"copy": lambda: result.copy_(source), "product": lambda: torch.bmm(a, a)})
        return cls(2 * source.nbytes / found["copy"], a.shape[0] * 512**3 / found["product"])

    def floor(self, operator: Convolution, batch: int) -> float:
        """Return the milliseconds that a layer's solve takes at least."""
        model = Polyphase(operator)
        half = math.prod(model.grid[:-1]) * (model.grid[-1] // 2 + 1)
        matrices = model.groups * half * model.rows * model.columns
        images = 2 * math.prod(operator.in_shape) + 2 * math.prod(operator.out_shape)
        moved = 8 * matrices + 4 * batch * images
        return max(moved / self.bytes_per_ms, batch * matrices / self.products_per_ms)


def measure_layer(
    layer: Layer, device: torch.device, watch: Stopwatch, rates: Rates | None
) -> dict[str, Any]:
    """Return the row of one layer."""
    module = layer.module(device)
    operator = Convolution(
        module.weight.detach(),
        (layer.size, layer.size),
        stride=module.stride,
        padding=((layer.padding,) * 2,) * 2,
        groups=layer.groups,
    )
    x = torch.randn(layer.batch, *operator.in_shape, device=device)
    output = module(x).detach()
    target = output + torch.randn_like(output)
    solvers = {"auto": Solver().prepare(operator)}
    if solvers["auto"].solver == "iterative":  # one application of its model, for comparison
        solvers["spectral"] = Solver("spectral").prepare(operator)
    functions: dict[str, Callable[[], Any]] = {
        name: lambda factor=factor: x + factor.solve(target - output)
        for name, factor in solvers.items()
    }
    functions["step"] = lambda: step(module, x)
    functions |= floor(operator, layer.batch, device)
    try:
        cupy = Solver(solvers["auto"].solver).prepare(operator, get_backend("cupy"))
        functions["cupy"] = lambda: x + cupy.solve(target - output)
    except frfx.BackendError:
        pass
    samples = literal_samples(operator)
    if samples:
        functions["literal"] = literal(operator, x[:samples], target[:samples])
    found = watch(functions)
    prepare = watch.once(lambda: Solver().prepare(operator))
    sum_of_parts = found["there"] + found["product"] + found["back"]
    inner = solvers["auto"].factor
    convergence = solvers["auto"].take_convergence()
    return {
        "layer": layer.name,
        "geometry": str(layer),
        "batch": layer.batch,
        "solver": solvers["auto"].solver,
        "form": inner.map.form if isinstance(inner, SpectralFactor) else "",
        "steps": int(convergence.steps.max()) if convergence is not None else None,
        "ms": found["auto"],
        "floor_ms": sum_of_parts,
        "floor_parts_ms": {name: found[name] for name in ("there", "product", "back")},
        "to_floor": found["auto"] / sum_of_parts,
        "to_step": found["auto"] / found["step"],
        "once_to_floor": found["spectral"] / sum_of_parts if "spectral" in found else None,
        "to_gpu_floor": found["auto"] / rates.floor(operator, layer.batch) if rates else None,
        "cupy_to_torch": found["cupy"] / found["auto"] if "cupy" in found else None,
        "literal_to_torch": (
            found["literal"] * layer.batch / samples / found["auto"] if samples else None
        ),
        "prepare_to_step": prepare / found["step"],
        "factor_mib": solvers["auto"].nbytes / 2**20,
    }


def step(module: nn.Module, x: Tensor) -> None:
    """Run one forward and backward pass."""
    module.zero_grad()
    module(x.requires_grad_()).sum().backward()
    x.requires_grad_(False)
    x.grad = None


def floor(
    operator: Convolution, batch: int, device: torch.device
) -> dict[str, Callable[[], Tensor]]:
    """Return the three parts of a layer's floor."""
    model = Polyphase(operator)
    rows, columns, groups = model.rows, model.columns, model.groups
    half = (*model.grid[:-1], model.grid[-1] // 2 + 1)
    frequencies = groups * math.prod(half)
    residual = torch.randn(batch, groups * rows, *model.grid, device=device)
    spectrum = torch.randn(batch, groups * columns, *half, dtype=torch.complex64, device=device)
    dims = tuple(range(2, residual.ndim))
    if rows == columns == 1:
        scale = torch.randn(groups, *half, dtype=torch.complex64, device=device)
        product = lambda: spectrum * scale  # noqa: E731
    else:
        matrices = torch.randn(frequencies, columns, rows, dtype=torch.complex64, device=device)
        vectors = torch.randn(frequencies, rows, batch, dtype=torch.complex64, device=device)
        product = lambda: torch.bmm(matrices, vectors)  # noqa: E731
    return {
        "there": lambda: torch.fft.rfftn(residual, dim=dims),
        "product": product,
        "back": lambda: torch.fft.irfftn(spectrum, s=model.grid, dim=dims),
    }


def literal_samples(operator: Convolution) -> int:
    """Return how many samples the literal systems are solved for: none where it takes too long."""
    plain = not any(map(any, operator.padding)) and set(operator.stride) == {1}
    if not plain or operator.groups > 1:
        return 0
    entries = math.prod(operator.size) * (operator.in_channels + operator.out_channels) ** 2
    return min(8, (1 << 24) // entries)


def literal(operator: Convolution, x: Tensor, target: Tensor) -> Callable[[], Tensor]:
    """Return Eq. 19 or 20 as they are written: one system a sample and frequency.

    What depends on the kernel alone is made before; the right-hand sides are left out of the cost.
    """
    model = Polyphase(operator)
    half = (*model.grid[:-1], model.grid[-1] // 2 + 1)
    axes = [torch.arange(f, dtype=torch.float64) / n for f, n in zip(half, model.grid, strict=True)]
    kernel = model.matrices(torch.cartesian_prod(*axes))[0].to(x.device, torch.complex64)
    rows, columns = kernel.shape[1:]
    samples, frequencies = len(x), len(kernel)
    if columns >= rows:  # Eq. 19
        system = torch.zeros(
            frequencies, rows + columns, rows + columns, dtype=kernel.dtype, device=x.device
        )
        system[:, :columns, :columns] = torch.eye(columns, device=x.device)
        system[:, :columns, columns:] = kernel.mH
        system[:, columns:, :columns] = kernel
    else:  # Eq. 20
        system = kernel.mH @ kernel
    right = torch.randn(samples, frequencies, system.shape[-1], dtype=kernel.dtype, device=x.device)
    systems = system.expand(samples, *system.shape).contiguous()
    return lambda: torch.linalg.solve(systems, right)


def measure_network(
    name: str, size: int, batch: int, layer: str | int, options: dict[str, Any], watch: Stopwatch
) -> dict[str, Any]:
    """Return the row of a whole network."""
    torch.manual_seed(0)
    model = models.load_model(name).eval().to(watch.device)
    x = torch.randn(batch, *((3, size, size) if size else (3, 32, 32)), device=watch.device)
    y = torch.randint(0, 10, (batch,), device=watch.device)
    policy = frfx.policy.paper().override(op=nn.Conv2d, **options)
    inverse = frfx.invert(model, layer, policy=policy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = watch.once(lambda: inverse(x, y))
        with torch.no_grad():
            found = watch(
                {
                    "inverse": lambda: inverse(x, y),
                    "forward": lambda: model(x),
                    "step": torch.enable_grad()(
                        lambda: (model.zero_grad(), F.cross_entropy(model(x), y).backward())
                    ),
                }
            )
    return {
        "network": name,
        "image": x.shape[-1],
        "batch": batch,
        "down to": str(layer),
        "options": ", ".join(f"{k}={v}" for k, v in options.items()),
        "inverse_ms": found["inverse"],
        "to_step": found["inverse"] / found["step"],
        "forward_to_step": found["forward"] / found["step"],
        "back_to_step": (found["inverse"] - found["forward"]) / found["step"],
        "prepare_to_step": (first - found["inverse"]) / found["step"],
        "factors_mib": inverse.prepare.nbytes / 2**20,
    }


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table."""
    table = Table(title=title)
    names = [name for name in rows[0] if not name.endswith("parts_ms")]
    for name in names:
        table.add_column(name.replace("_", " "))
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in names))
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("bench-solvers.json"),
    quick: Annotated[bool, typer.Option(help="The small ones, under two minutes.")] = False,
    seconds: Annotated[float, typer.Option(help="Time for every figure of a layer.")] = 0.5,
    threads: Annotated[int, typer.Option(help="Of the CPU; 0 leaves them.")] = 0,
) -> None:
    """Measure."""
    if threads:
        torch.set_num_threads(threads)
    seconds = min(seconds, 0.15) if quick else seconds
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda", 0))
    record: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    for device in devices:
        watch = Stopwatch(device, seconds)
        chosen = [layer for layer in LAYERS if layer.quick or not quick]
        rates = Rates.measure(device, watch)
        rows = [measure_layer(layer, device, watch, rates) for layer in chosen]
        show(f"Layers on {device}", rows)
        networks = [("paper:cifar10", 0, 256, layer, {}) for layer in (3, 2, 1, 0)]
        if not quick:
            for options in ({"solver": "spectral", "damping": 1e-2}, {}):
                networks.append(("torchvision:vgg11", 64, 128, "features.0", options))
        whole = [measure_network(*arguments, watch) for arguments in networks]  # type: ignore[arg-type]
        show(f"Networks on {device}", whole)
        record[str(device)] = {
            "layers": rows,
            "networks": whole,
            "layer": [asdict(c) for c in chosen],
        }
    output.write_text(json.dumps(record, indent=1))
    console.print(f"written: {output}")


if __name__ == "__main__":
    typer.run(main)
