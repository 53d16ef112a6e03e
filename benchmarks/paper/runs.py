"""Runs what is not finished, and records it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import frfx
from paper.baseline import batch_size
from paper.records import Cell, Record, Store
from paper.settings import LEARNING_RATE, method
from paper.stack import Stack
from paper.study import Study


def settings(
    study: Study, name: str, alpha: float, epochs: int, fingerprint: str
) -> dict[str, Any]:
    """Return what a run's result depends on besides its cell."""
    return {
        "alpha": method(name).weight(alpha),
        "epochs": epochs,
        "batch size": batch_size(study.train),
        "learning rate": LEARNING_RATE,
        "baseline": fingerprint,
        "training images": len(study.train),
    }


def run_cells(
    study: Study,
    store: Store,
    cells: Sequence[Cell],
    *,
    alpha: float,
    epochs: int,
    fingerprint: str,
    stages: Sequence[int],
    at_once: int = 1,
    run: bool = True,
    tell: Callable[[str], None] = print,
) -> list[Record]:
    """Return the records of runs; those that are not there yet are run.

    Args:
        study: The baseline and its data.
        store: Where the records lie.
        cells: The runs.
        alpha: The weight of the reconstruction loss.
        epochs: How long to train.
        fingerprint: Of the baseline.
        stages: The epochs after which to measure the accuracy; the last one always is.
        at_once: How many seeds are stacked.
        run: Whether to run what is not there.
        tell: Takes a line on what has been done.
    """
    needed = {cell: settings(study, cell.method, alpha, epochs, fingerprint) for cell in cells}
    waiting = [cell for cell, wanted in needed.items() if store.find(cell, wanted) is None]
    for group in _groups(waiting, at_once) if run else ():
        _run(study, store, group, needed, alpha, epochs, {*stages, epochs}, tell)
    found = (store.find(cell, wanted) for cell, wanted in needed.items())
    return [record for record in found if record is not None]


def _groups(cells: Sequence[Cell], at_once: int) -> Iterator[list[Cell]]:
    """Yield runs that can be trained at once: one pair, some seeds, the same methods for each."""
    methods: dict[tuple[tuple[int, int], int], list[str]] = {}
    for cell in cells:
        methods.setdefault((cell.pair, cell.seed), []).append(cell.method)
    alike: dict[tuple[tuple[int, int], tuple[str, ...]], list[int]] = {}
    for (pair, seed), names in methods.items():
        alike.setdefault((pair, tuple(names)), []).append(seed)
    by_key = {(cell.pair, cell.seed, cell.method): cell for cell in cells}
    for (pair, names), seeds in alike.items():
        for start in range(0, len(seeds), at_once):
            some = seeds[start : start + at_once]
            yield [by_key[pair, seed, name] for seed in some for name in names]


def _run(
    study: Study,
    store: Store,
    cells: list[Cell],
    needed: dict[Cell, dict[str, Any]],
    alpha: float,
    epochs: int,
    stages: set[int],
    tell: Callable[[str], None],
) -> None:
    """Train one stack, from its checkpoint if there is one, and record its runs."""
    seeds = list(dict.fromkeys(cell.seed for cell in cells))
    names = list(dict.fromkeys(cell.method for cell in cells))
    methods = [method(name) for name in names]
    pair = cells[0].pair
    stack = Stack(study, pair, methods, seeds, alpha, batch_size(study.train))
    about = [(cell.file, needed[cell]) for cell in cells]
    scores: dict[int, list[list[float]]] = {}
    checkpoint = store.folder / f"{pair[0]}-{pair[1]}-{'+'.join(names)}-{seeds[0]}.ckpt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=study.device, weights_only=True)
        if saved["about"] == about:
            stack.load(saved["stack"])
            scores = saved["scores"]
    while stack.epoch < epochs:
        stack.train()
        if stack.epoch in stages:
            scores[stack.epoch] = stack.accuracies().tolist()
        if stack.epoch < epochs:
            with _whole_file(checkpoint) as draft:
                torch.save({"about": about, "stack": stack.state(), "scores": scores}, draft)
    versions = {"torch": torch.__version__, "frfx": frfx.__version__}
    for cell in cells:
        i, j = seeds.index(cell.seed), names.index(cell.method)
        accuracies = {epoch: values[i][j] for epoch, values in scores.items()}
        store.save(Record(cell, needed[cell], accuracies, versions))
    checkpoint.unlink(missing_ok=True)
    last = scores[epochs]
    shown = ", ".join(
        f"{name} {sum(row[j] for row in last) / len(last):.2f}" for j, name in enumerate(names)
    )
    tell(f"({pair[0]}, {pair[1]}) seeds {seeds[0]} to {seeds[-1]}: {shown}")


@contextmanager
def _whole_file(path: Any) -> Iterator[Any]:
    """Give a name to write to, which becomes the file when it is complete."""
    draft = path.with_name(path.name + ".draft")
    yield draft
    draft.replace(path)
