"""Does post-training gain from reconstructed targets? BP, the paper's targets, joint ones, `hold`.

Run by `nox -s bench-post-train`. `hold` is the control: its targets are the baseline's own forward
features, so that it keeps the features still and knows of no label. All methods start from one
baseline and see the same batches under the same seed; the test is paired over the seeds.
"""

from __future__ import annotations

import copy
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from scipy.stats import ttest_rel
from torch import nn

import frfx
from frfx import data, demo, models

console = Console(width=120)
BATCH_SIZE = 256


@dataclass(frozen=True)
class Method:
    """A way to post-train.

    Attributes:
        name: For the table.
        policy: What reconstructs the targets; None for backpropagation alone.
        weighing: As for `frfx.PostTraining`.
        hold: Whether the targets are the baseline's forward features.
    """

    name: str
    policy: str | None = None
    weighing: str = "paper"
    hold: bool = False


METHODS = (
    Method("BP"),
    Method("hold", "paper", hold=True),
    Method("paper", "paper"),
    Method("minimal", "minimal"),
    Method("joint", "joint"),
    Method("paper, relative", "paper", "relative"),
    Method("joint, relative", "joint", "relative"),
)


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        accuracies: On the test set after every epoch.
    """

    pair: tuple[int, int]
    method: str
    alpha: float
    seed: int
    accuracies: list[float]


def run(
    model: nn.Module,
    train: data.Images,
    test: data.Images,
    pair: tuple[int, int],
    method: Method,
    alpha: float,
    seed: int,
    epochs: int,
) -> Run:
    """Post-train a copy of the baseline."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    loader = train.batches(min(BATCH_SIZE, len(train) // 20), shuffle=True, generator=generator)
    step = frfx.PostTraining(
        model,
        freeze_upto=pair[0],
        upto_layer=pair[1],
        alpha=0.0 if method.policy is None else alpha,
        policy=method.policy or "paper",
        weighing=method.weighing,
    )
    optimizer = torch.optim.Adam(step.trained_parameters(), lr=1e-3)
    accuracies = []
    with step:
        for _ in range(epochs):
            for x, y in loader:
                target = None
                if method.hold and step.targets is not None:
                    target = step.targets.forward_feature(x)
                optimizer.zero_grad()
                step(x, y, target).total.backward()
                optimizer.step()
            accuracies.append(frfx.accuracy(model, test.batches(1000)))
    return Run(pair, method.name, alpha, seed, accuracies)


def table(runs: list[Run], baseline: float) -> Table:
    """Return the last accuracies, with paired tests against BP and against `hold`."""
    shown = Table(
        "(l_S, l_R)", "alpha", "method", "test accuracy, %", "p against BP", "p against hold",
        title=f"{len({r.seed for r in runs})} seeds; the baseline has {100 * baseline:.2f}",
    )  # fmt: skip
    cells: dict[tuple, dict[str, list[float]]] = {}
    for r in runs:
        cells.setdefault((r.pair, r.alpha), {}).setdefault(r.method, []).append(r.accuracies[-1])
    for (pair, alpha), methods in cells.items():
        for name, values in methods.items():
            percent = [100 * value for value in values]
            spread = f" ± {statistics.stdev(percent):.3f}" if len(percent) > 1 else ""
            shown.add_row(
                str(pair),
                f"{alpha:g}",
                name,
                f"{statistics.mean(percent):.3f}{spread}",
                _paired(values, methods.get("BP")),
                _paired(values, methods.get("hold")),
            )
    return shown


def _paired(values: list[float], others: list[float] | None) -> str:
    if others is None or values == others or len(values) < 2:
        return ""
    return f"{ttest_rel(values, others).pvalue:.3f}"


def main(
    data_set: Annotated[
        str, typer.Option("--data", help=f"The data set: {data.KINDS}.")
    ] = "digits",
    network: Annotated[str, typer.Option(help="The paper's network for it.")] = "digits",
    weights: Annotated[
        Path | None, typer.Option(help="A trained baseline; else one is trained.")
    ] = None,
    pairs: Annotated[str, typer.Option(help="Pairs (l_S, l_R), as in 0,3 0,4.")] = "0,2",
    alphas: Annotated[
        str, typer.Option(help="Weights of the reconstruction loss.")
    ] = "0.1 0.5 0.9",
    seeds: Annotated[int, typer.Option(min=1)] = 5,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    output: Annotated[Path, typer.Option(help="Where the figures go.")] = Path(
        "post_training.json"
    ),
) -> None:
    """Compare post-training by BP, by reconstructed targets and by held features."""
    torch.set_num_threads(1)
    train, test = data.load(data_set, split="train"), data.load(data_set, split="test")
    if weights is None:
        model = demo.train_baseline(network, train, test, console)
    else:
        model = models.load_model(f"paper:{network}", weights)
    baseline = frfx.accuracy(model, test.batches(1000))
    runs: list[Run] = []
    for text in pairs.split():
        start, end = (int(part) for part in text.split(","))
        for alpha in map(float, alphas.split()):
            for method in METHODS:
                for seed in range(seeds):
                    before = next(
                        (r for r in runs if method.policy is None and r.method == method.name
                         and r.pair == (start, end) and r.seed == seed), None,
                    )  # fmt: skip
                    if before is not None:  # BP knows no alpha
                        runs.append(Run(before.pair, "BP", alpha, seed, before.accuracies))
                        continue
                    runs.append(run(model, train, test, (start, end), method, alpha, seed, epochs))
                output.write_text(
                    json.dumps({"baseline": baseline, "runs": [asdict(r) for r in runs]}, indent=1)
                )
    console.print(table(runs, baseline))
    console.print(f"figures: {output}")


if __name__ == "__main__":
    typer.run(main)
