"""Commands: `nox -s paper -- table mnist --data PATH`, `nox -s paper -- figure 5 ...`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

import frfx
from frfx import data
from paper import baseline, cost, experiments, pages, plots, repairs, runs
from paper.records import Cell, Store, write_compact, write_whole
from paper.settings import BENCHMARKS, METHODS, STAGES, Benchmark, method
from paper.study import Study

METHODS_HELP = (
    f"{', '.join(METHODS)}; with an alpha of its own as in hold@0.9, and weighed as in "
    "fr-joint+relative@0.5, or given new targets every epoch as in fr-joint+fresh."
)

console = Console(width=150)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Reproduce the tables and figures of the FR-PT paper from real data."""


Data = Annotated[
    str,
    typer.Option(
        "--data", help="The folder of the data set, or KIND:PATH as frfx.data.load reads it."
    ),
]
Output = Annotated[Path, typer.Option(help="Where baseline, records, tables and plots go.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of torch.")]
BaselineEpochs = Annotated[
    int | None, typer.Option(min=1, help="Train the baseline no longer than this.")
]


def benchmark_named(name: str, epochs: int | None) -> Benchmark:
    """Return a benchmark, its baseline trained no longer than so many epochs."""
    if name not in BENCHMARKS:
        raise typer.BadParameter(f"no data set {name!r}: {', '.join(BENCHMARKS)}")
    found = BENCHMARKS[name]
    return found if epochs is None else dataclasses.replace(found, epochs=epochs)


def read(benchmark: Benchmark, where: str) -> tuple[data.Images, data.Images]:
    """Return the images to train and to test on, which must fit the network."""
    spec = where
    if ":" not in where:
        spec = f"{benchmark.data}:{where}" if where else benchmark.data
    size = None if benchmark.data in ("digits", "mnist") else benchmark.spec.input_shape[1:]
    kind = spec.partition(":")[0]
    resized = size if kind in ("imagenette", "imagewoof", "imagefolder") else None
    train, test = (data.load(spec, split=split, size=resized) for split in ("train", "test"))
    for images in (train, test):
        found, wanted = tuple(images.images.shape[1:]), benchmark.spec.input_shape
        if found != wanted or len(images.classes) != benchmark.spec.linear[-1]:
            raise frfx.DataError(
                f"{spec} has images of shape {found} in {len(images.classes)} classes; the network "
                f"{benchmark.name!r} takes {wanted} in {benchmark.spec.linear[-1]}"
            )
    return train, test


def begin(
    name: str, where: str, output: Path, threads: int, epochs: int | None
) -> tuple[Benchmark, Path, data.Images, data.Images]:
    """Return a benchmark, the folder of its results, and its images to train and to test on."""
    torch.set_num_threads(threads)
    benchmark = benchmark_named(name, epochs)
    folder = output / name
    folder.mkdir(parents=True, exist_ok=True)
    return benchmark, folder, *read(benchmark, where)


def chosen_pairs(benchmark: Benchmark, text: str) -> list[tuple[int, int]]:
    """Return pairs written as "0,3 1,3"; "all" for those of the paper's table."""
    if text == "all":
        return benchmark.pairs()
    pairs = []
    for part in text.split():
        try:
            l_s, l_r = map(int, part.split(","))
        except ValueError:
            raise typer.BadParameter(f"{part!r} is no pair l_S,l_R") from None
        if (l_s, l_r) not in benchmark.pairs():
            raise typer.BadParameter(f"the {benchmark.name} network has no pair {part}")
        pairs.append((l_s, l_r))
    return pairs


def chosen_methods(text: str) -> list[str]:
    """Return methods written as "bp,fr"."""
    names = text.split(",")
    for name in names:
        try:
            method(name)
        except KeyError:
            raise typer.BadParameter(f"no method {name!r}: {METHODS_HELP}") from None
    return names


@app.command()
def table(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(BENCHMARKS)}.")],
    where: Data = "",
    seeds: Annotated[int, typer.Option("--runs", min=1)] = 10,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    pairs: Annotated[str, typer.Option(help='"all", or some, as in "0,3 1,3".')] = "all",
    methods: Annotated[str, typer.Option(help=METHODS_HELP)] = "bp,fr,hold",
    alpha: Annotated[float | None, typer.Option(help="Instead of the paper's.")] = None,
    output: Output = Path("paper-results"),
    device: Device = "cpu",
    threads: Threads = 1,
    at_once: Annotated[
        int, typer.Option(min=1, help="Seeds trained at once: pays on a GPU, hardly on a CPU.")
    ] = 1,
    baseline_epochs: BaselineEpochs = None,
    run: Annotated[
        bool, typer.Option("--run/--no-run", help="Whether to run what is not recorded yet.")
    ] = True,
    measure_costs: Annotated[
        bool, typer.Option("--costs/--no-costs", help="Whether to measure time and memory.")
    ] = True,
) -> None:
    """Post-train every pair by every method from one baseline, and tabulate the accuracies."""
    benchmark, folder, train, test = begin(name, where, output, threads, baseline_epochs)
    model, facts = baseline.obtain(benchmark, train, test, folder, device)
    console.print(f"{name}: baseline {facts['accuracy']:.2f} % after {facts['epochs']} epochs")
    study = Study(model, train, test)
    names = chosen_methods(methods)
    cells = [
        Cell(name, *pair, method, seed)
        for pair in chosen_pairs(benchmark, pairs)
        for seed in range(seeds)
        for method in names
    ]
    weight = benchmark.spec.alpha if alpha is None else alpha
    records = runs.run_cells(
        study,
        Store(folder / "records"),
        cells,
        alpha=weight,
        epochs=epochs,
        fingerprint=facts["sha256"],
        stages=STAGES,
        at_once=at_once,
        run=run,
        tell=console.print,
    )
    file = folder / "costs.json"
    costs = pages.load_costs(file)
    if measure_costs:
        for pair in dict.fromkeys(cell.pair for cell in cells):
            if not set(costs.get(pair, ())) >= set(names):
                costs[pair] = cost.measure(study, pair, names, weight)
                pages.save_costs(costs, file)
    written = pages.write(name, records, costs, facts, folder)
    console.print((folder / "table.md").read_text(), markup=False, soft_wrap=True)
    console.print("written: " + ", ".join(map(str, written)), soft_wrap=True)


@app.command()
def repair(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(BENCHMARKS)}.")],
    where: Data = "",
    pairs: Annotated[str, typer.Option(help='Which modules to train, as in "3,4 1,4".')] = "all",
    handful: Annotated[int, typer.Option(min=1, help="Mistakes to mend at once.")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="Handfuls.")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="Steps at most.")] = 200,
    output: Output = Path("paper-results"),
    device: Device = "cpu",
    threads: Threads = 1,
    baseline_epochs: BaselineEpochs = None,
) -> None:
    """Mend a handful of mistakes in several ways, and count what else changes."""
    benchmark, folder, train, test = begin(name, where, output, threads, baseline_epochs)
    model, _ = baseline.obtain(benchmark, train, test, folder, device)
    study, outcomes = Study(model, train, test), []
    for pair in chosen_pairs(benchmark, pairs):
        mending = repairs.Repair(study, pair)
        for seed in range(repeats):
            outcomes += [mending.mend(s, seed, handful, steps) for s in repairs.STRATEGIES]
        console.print(f"({pair[0]}, {pair[1]}): {repeats} handfuls")
    grid = repairs.table(outcomes)
    write_whole(folder / "repair.json", json.dumps([dataclasses.asdict(o) for o in outcomes]))
    write_whole(folder / "repair.md", grid.markdown())
    console.print(grid.markdown(), markup=False, soft_wrap=True)


FIGURES = {4: "mnist", 5: "mnist", 6: "cifar100", 7: "cifar10"}
"""The paper's figures, and the data set that each is of."""


@app.command()
def figure(
    number: Annotated[int, typer.Argument(help="4, 5, 6 or 7.")],
    name: Annotated[
        str, typer.Option("--of", help="Another data set than the paper's for this figure.")
    ] = "",
    where: Data = "",
    seeds: Annotated[int, typer.Option("--runs", min=1)] = 10,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    pairs: Annotated[
        str, typer.Option(help="Fig. 6: one pair, (1, 4) in the paper. Fig. 7: which.")
    ] = "",
    stages: Annotated[int, typer.Option(min=1, help="Fig. 6: how many baselines.")] = 30,
    every: Annotated[int, typer.Option(min=1, help="Fig. 6: epochs between two of them.")] = 1,
    samples: Annotated[int, typer.Option(min=1, help="Fig. 4: how many images.")] = 4,
    alpha: Annotated[float | None, typer.Option(help="Instead of the paper's.")] = None,
    output: Output = Path("paper-results"),
    device: Device = "cpu",
    threads: Threads = 1,
    baseline_epochs: BaselineEpochs = None,
) -> None:
    """Draw a figure of the paper, from runs that are made if they are not there."""
    if number not in FIGURES:
        raise typer.BadParameter(f"no figure {number}: {', '.join(map(str, FIGURES))}")
    name = name or FIGURES[number]
    benchmark, folder, train, test = begin(name, where, output, threads, baseline_epochs)
    images = experiments.Images(benchmark, train, test, folder, device, tell=console.print)
    weight = benchmark.spec.alpha if alpha is None else alpha
    last = benchmark.spec.n_layers
    path = folder / f"figure-{number}.png"
    if number == 4:
        reached = experiments.evolution(images)
        x, y = next(iter(images.test.batches(samples, device=device)))
        maps = experiments.discrepancies(reached, x, y)
        shapes = experiments.feature_shapes(benchmark.spec)[:-1]
        drawn = plots.evolution([score for score, _ in reached], maps, x, shapes)
    elif number == 5:
        records = experiments.embeddings(images, seeds, epochs, weight)
        before = json.loads((folder / "baseline.json").read_text())["accuracy"]
        drawn = plots.embeddings(records, before)
        write_compact(records, path.with_suffix(".json"))
    elif number == 6:
        (pair,) = chosen_pairs(benchmark, pairs or f"1,{last - 1}")
        scores, by_stage = experiments.stages(images, stages, every, pair, seeds, epochs, weight)
        drawn = plots.stages(scores, by_stage)
        write_compact([record for some in by_stage for record in some], path.with_suffix(".json"))
    else:
        chosen = chosen_pairs(benchmark, pairs or "all")
        found = experiments.architectures(images, chosen, seeds, epochs, weight)
        drawn = plots.architectures(found)
        all_records = [record for _, records in found.values() for record in records]
        write_compact(all_records, path.with_suffix(".json"))
    drawn.savefig(path, dpi=150)
    console.print(f"written: {path}", soft_wrap=True)


if __name__ == "__main__":
    app()
