"""Every network of torchvision, run backwards to four depths.

Run by `nox -s zoo`. Each network has a process of its own, with a limit of time, and leaves a JSON
record, so that a run that was stopped goes on where it was; `--table` writes what is recorded as a
Markdown page. Times are of the process, on one thread, and read as ratios.
"""

from __future__ import annotations

import collections
import gc
import json
import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import torchvision
import typer
import zoo_models
import zoo_page
from clock import clocked
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import frfx
from frfx import metrics

console = Console(width=150)

QUICK = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "lraspp_mobilenet_v3_large",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "vit_b_32",
]

LAYERWISE: dict[str, Any] = {"margin": 3.0}
JOINT: dict[str, Any] = {"margin": 0.1, "steps": 6, "classes": 4, "unreached": "ignore"}
"""Options of the policies; margins are in standard deviations of the logits."""

SMALL = 7_500_000
"""Parameters up to which a network counts as small."""

PATIENT: dict[str, Any] = {"steps": 24}
"""For joint inversion of small networks: narrow as they are, 6 steps leave them halfway to the
label, and a step costs little."""

DENSE: dict[str, Any] = {"constraint": "equality", "steps": 6, "iterations": 10}
"""For labels at every pixel, which are a target of the size of the output: many short solves, for
one that is solved to the end goes too far to be of use."""

LARGE: dict[str, Any] = {"solver": "iterative", "damping": 1e-2}
"""For the linear layers of networks with one of more than 2,048 inputs and outputs, whose factor
would take a minute."""


def policies(model: nn.Module, logits: Tensor) -> dict[str, tuple[frfx.policy.Policy, str]]:
    """Return what is compared, each with how it is written; margins in deviations of the logits."""
    scale = float(logits.std())
    layerwise = frfx.policy.minimal(**LAYERWISE | {"margin": LAYERWISE["margin"] * scale})
    written = shown("frfx.policy.minimal", LAYERWISE)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if max((min(module.weight.shape) for module in linear), default=0) > 2048:
        layerwise = layerwise.override(op=nn.Linear, **LARGE)
        written += f".override(op=nn.Linear, {shown('', LARGE)[1:-1]})"
    small = sum(parameter.numel() for parameter in model.parameters()) < SMALL
    options = JOINT | (DENSE if logits.ndim > 2 else PATIENT if small else {})
    joint = frfx.policy.joint(**options | {"margin": options["margin"] * scale})
    return {
        "layerwise": (layerwise, written),
        "joint": (joint, shown("frfx.policy.joint", options)),
    }


def shown(name: str, options: dict[str, Any]) -> str:
    """Return a call as it is written."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})"


def scores(model: nn.Module, x: Tensor) -> Tensor:
    """Return the logits of a batch, of a network that may return several outputs."""
    output = model(x)
    return output["out"] if isinstance(output, dict) else output


def training_step(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the time of one forward and backward pass: the best of two, after one."""
    best = float("inf")
    for _ in range(3):
        with clocked() as clock:
            F.cross_entropy(scores(model, x), y).backward()
        best = min(best, clock.seconds)
        model.zero_grad()
    return best


def measure_network(name: str, path: Path, seed: int) -> None:
    """Measure one network, and record what is known after every cut and policy."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what is imported is no garbage, and takes a quarter of a second to look through
    with clocked() as clock:
        model, x = zoo_models.build(name, seed)
    with torch.no_grad():
        logits = scores(model, x)
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, logits.shape[1], (len(x),), generator=generator)
    y = y.view(-1, *[1] * (logits.ndim - 2)).expand(-1, *logits.shape[2:]).contiguous()
    chosen = policies(model, logits)
    record: dict[str, Any] = {
        "network": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image": x.shape[-1],
        "batch": len(x),
        "classes": logits.shape[1],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "build_s": clock.seconds,
        "step_s": training_step(model, x, y),
        "settings": {kind: written for kind, (_, written) in chosen.items()},
        "rows": [],
    }
    for depth, (layer, share) in zoo_models.cuts(model, x).items():
        for kind, (policy, _) in chosen.items():
            row = {"depth": depth, "layer": layer, "share": share, "policy": kind}
            record["under way"] = row
            path.write_text(json.dumps(record, indent=1))
            record["rows"].append(row | invert(model, layer, policy, x, y))
    del record["under way"]
    path.write_text(json.dumps(record | {"ended": "finished"}, indent=1))


def invert(
    model: nn.Module, layer: str, policy: frfx.policy.Policy, x: Tensor, y: Tensor
) -> dict[str, Any]:
    """Invert to one cut under one policy; what fails says why."""
    found: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            with clocked() as clock:
                inverse = frfx.invert(model, layer, policy=policy)
            found["compile_s"] = clock.seconds
            with clocked() as clock:
                inverse.prepare.ready(x)
            found["prepare_s"] = clock.seconds
            with clocked() as clock:
                nodes = inverse.reconstruct(x, y)
            found["inverse_s"] = clock.seconds
            found |= numbers(inverse, metrics.judge(inverse, nodes, x, y))
        except Exception as error:  # whatever it is, the others go on
            found["error"] = f"{type(error).__name__}: {error}"
            found["traceback"] = traceback.format_exc()
    counts = collections.Counter(w.category.__name__ for w in told)
    return found | {"warnings": dict(counts)}


def numbers(inverse: frfx.Inverse, found: frfx.Measurement) -> dict[str, Any]:
    """Return the three numbers of a reconstruction; of a joint one, what its logits miss."""
    numbers: dict[str, Any] = {
        "consistency": found.label_consistency,
        "deviation": found.relative_deviation,
        "ops": len(inverse.plan.steps),
    }
    for report in inverse.report.values():
        numbers |= {
            "steps": float(report.steps.double().mean()),
            "reached": float(report.reached.double().mean()),
            "violation": float(report.violation.max()),
        }
    if found.residuals:
        worst = max(found.residuals, key=lambda residual: residual.relative)
        numbers |= {"residual": worst.relative, "residual at": worst.node}
    return numbers


def supervise(name: str, path: Path, seed: int, limit: float) -> dict[str, Any]:
    """Measure a network in a process of its own; say how that ended if it did not finish."""
    process = _context().Process(target=measure_network, args=(name, path, seed))
    process.start()
    process.join(limit)
    ended = f"stopped after {limit:g} s"
    if process.exitcode is None:
        process.terminate()
        process.join()
    elif process.exitcode:
        ended = f"ended with exit code {process.exitcode}"
    record = json.loads(path.read_text()) if path.exists() else {"network": name, "rows": []}
    if "ended" not in record:
        record["ended"] = ended
        path.write_text(json.dumps(record, indent=1))
    return record


def _context() -> Any:
    """Return how processes are started: from one that has imported torch already, if possible."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision", "frfx", "zoo_models"])
    return context


def show(record: dict[str, Any]) -> None:
    """Print what is known of a network."""
    head = f"{record['network']}: {record['ended']}"
    if "step_s" in record:
        head += f", {record['parameters'] / 1e6:.1f} M parameters, step {record['step_s']:.3g} s"
    columns: dict[str, Callable[[dict[str, Any]], Any]] = {
        "depth": lambda row: row["depth"],
        "layer": lambda row: row["layer"],
        "policy": lambda row: row["policy"],
        "compile s": lambda row: row.get("compile_s"),
        "prepare s": lambda row: row.get("prepare_s"),
        "time / step": lambda row: row["inverse_s"] / record["step_s"],
        "consistency": lambda row: row["consistency"],
        "deviation": lambda row: row["deviation"],
        "residual": lambda row: row.get("residual", ""),
        "at": lambda row: row.get("residual at", ""),
    }
    table = Table(*columns, title=head)
    failed = [row for row in record["rows"] if "error" in row]
    for row in record["rows"]:
        if row not in failed:
            values = (column(row) for column in columns.values())
            table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values))
    console.print(table)
    for row in failed:
        console.print(f"{row['depth']}, {row['layer']}, {row['policy']}: {row['error'][:1000]}")


def main(
    networks: Annotated[
        list[str] | None, typer.Argument(help="Names of torchvision; none for all 86.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where the records lie.")] = Path("zoo-records"),
    table: Annotated[
        Path | None, typer.Option(help="A Markdown page to write from the records.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="One small network of every family.")] = False,
    again: Annotated[bool, typer.Option(help="Measure what is recorded, too.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Networks at once, a thread each.")] = 2,
    limit: Annotated[float, typer.Option(help="Seconds for one network.")] = 3600,
    seed: int = 0,
) -> None:
    """Invert torchvision's networks to four depths, layer by layer and jointly."""
    known = zoo_models.CLASSIFIERS + zoo_models.SEGMENTERS
    chosen = networks or (QUICK if quick else known)
    if unknown := set(chosen) - set(known):
        raise typer.BadParameter(f"no networks of torchvision: {', '.join(sorted(unknown))}")
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.json" for name in chosen}
    waiting = []
    for name, path in paths.items():
        finished = path.exists() and "ended" in json.loads(path.read_text())
        if again or not finished:
            path.unlink(missing_ok=True)
            waiting.append(name)
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        for record in pool.map(lambda n: supervise(n, paths[n], seed, limit), waiting):
            show(record)
    console.print(f"{len(waiting)} networks in {(time.perf_counter() - start) / 60:.1f} minutes")
    records = [json.loads(path.read_text()) for path in paths.values()]
    console.print(zoo_page.summary(records))
    if table is not None:
        table.write_text(zoo_page.page(records, len(known)))
        console.print(f"written: {table}")


if __name__ == "__main__":
    typer.run(main)
