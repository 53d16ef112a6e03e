"""Run by `nox -s bench-solvers`; prints tables and writes them as JSON.

All figures of a row are measured in turns within one run, the least of each is kept, and they are
read as ratios.

The floor of a layer on a CPU is the sum of three things, each alone and on contiguous data: the
real Fourier transform of the residual on the layer's grid, the product with one matrix a frequency,
and the transform back. On a GPU it is the time to move what must be moved, or to multiply, at the
rates that the same run has measured. A "step" is one forward and backward pass of the same layer or
network.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from solvers import large, layers, networks, steps
from solvers.floors import Rates
from solvers.stopwatch import Stopwatch

console = Console(width=190)


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


def run(case: networks.Case, watch: Stopwatch) -> list[dict[str, Any]]:
    """Return the rows of a network, one a backend that differs."""
    backends = ["auto", "torch"] if watch.device.type == "cuda" else ["auto"]
    return [networks.measure(case, watch, backend) for backend in backends]


def main(
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("bench-solvers.json"),
    quick: Annotated[bool, typer.Option(help="The small ones, under two minutes.")] = False,
    seconds: Annotated[float, typer.Option(help="Time for every figure of a layer.")] = 0.5,
    threads: Annotated[int, typer.Option(help="Of the CPU; 0 leaves them.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or all that there are.")] = "all",
    memory: Annotated[
        bool, typer.Option(help="VGG-16 at 224x224 alone, on a CPU, in 8 GiB.")
    ] = False,
) -> None:
    """Measure."""
    if threads:
        torch.set_num_threads(threads)
    seconds = min(seconds, 0.15) if quick else seconds
    there = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    record: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    devices = there if device == "all" else [device]
    if memory:  # alone
        devices, record["memory"] = [], [large.measure_apart()]
        show("memory on cpu", record["memory"])
    for name in devices:
        watch = Stopwatch(torch.device(name), seconds)
        chosen = [layer for layer in layers.LAYERS if layer.quick or not quick]
        tables: dict[str, list[dict[str, Any]]] = {}
        cases = list(networks.cases(watch.device))
        # Large ones last: they leave the memory of the process in pieces, which costs a tenth.
        tables["networks"] = [row for case in cases if case.small for row in run(case, watch)]
        if name == "cpu":
            tables["layers"] = [layers.on_cpu(layer, watch) for layer in chosen]
        else:
            rates = Rates.measure(watch.device, watch)
            record["gpu"] = torch.cuda.get_device_name()
            record["rates"] = vars(rates)
            tables["layers"] = [layers.on_gpu(layer, watch, rates) for layer in chosen]
        measure = steps.on_cpu if name == "cpu" else steps.on_gpu
        tables["steps"] = [measure(step, watch) for step in steps.steps(watch.device)]
        others = [case for case in cases if not case.small and not quick]
        tables["networks"] += [row for case in others for row in run(case, watch)]
        for title, rows in tables.items():
            show(f"{title} on {name}", rows)
        record[name] = tables
    output.write_text(json.dumps(record, indent=1))
    console.print(f"written: {output}")


if __name__ == "__main__":
    typer.run(main)
