"""The runs behind the paper's figures."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import frfx
from frfx import data, models, networks
from paper import baseline, runs
from paper.records import Cell, Record, Store, write_whole
from paper.settings import STAGES, Benchmark
from paper.study import Study

Tell = Callable[[str], None]
EVOLUTION = (0.0, 58.94, 96.75)
"""Test accuracies in % of the three stages of Fig. 4; the first one is an untrained network."""


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """A benchmark's data and where they are worked on."""

    benchmark: Benchmark
    train: data.Images
    test: data.Images
    folder: Path
    device: str
    tell: Tell


def evolution(images: Images, checks: Sequence[int] = (40, 4)) -> list[tuple[float, nn.Module]]:
    """Return one network at three stages of its training, with the accuracies (Fig. 4).

    Args:
        images: The data.
        checks: How often an epoch to see whether the next stage is reached, by stage.
    """
    torch.manual_seed(0)
    model = networks.build(images.benchmark.spec).to(images.device)
    found = [(baseline.score(model, images.test), copy.deepcopy(model))]
    batches = -(-len(images.train) // baseline.batch_size(images.train))
    trained = enumerate(baseline.steps(model, images.train), start=1)
    for goal, often in zip(EVOLUTION[1:], checks, strict=True):
        goal, every = min(goal, images.benchmark.goal), max(1, batches // often)
        for step, finished in trained:
            if step % every == 0 or finished == images.benchmark.epochs:
                score = baseline.score(model, images.test)
                if score >= goal or finished >= images.benchmark.epochs:
                    break
        found.append((score, copy.deepcopy(model)))
    return found


def discrepancies(
    stages: Sequence[tuple[float, nn.Module]], x: Tensor, y: Tensor, policy: str = "paper"
) -> list[list[Tensor]]:
    """Return `|a^ - a*|` of every layer but the logits, by stage (Fig. 4)."""
    found = []
    for _, model in stages:
        last = max(row.index for row in frfx.layers(model) if row.index is not None)
        layers = []
        for layer in range(1, last):
            inverse = frfx.invert(model, layer, policy=policy)
            node = inverse.reconstruct(x, y)[inverse.layer]
            layers.append((node.forward - node.target).abs())
        found.append(layers)
    return found


def feature_shapes(spec: networks.NetworkSpec) -> list[tuple[int, ...]]:
    """Return the shape of the feature of every layer, before it is flattened."""
    convolutions = spec.convolutions
    shapes: list[tuple[int, ...]] = [
        dataclasses.replace(spec, convolutions=convolutions[: i + 1]).feature_shape
        for i in range(len(convolutions))
    ]
    return shapes + [(features,) for features in spec.linear]


def embeddings(images: Images, seeds: int, epochs: int, alpha: float) -> list[Record]:
    """Train the last layer alone against labels embedded in three ways (Fig. 5)."""
    model, facts = _baseline(images, images.folder, images.benchmark.spec)
    last = images.benchmark.spec.n_layers
    names = ("bp", "one-hot", "ma", "ne")
    cells = [
        Cell(images.benchmark.name, last - 1, last, name, seed)
        for seed in range(seeds)
        for name in names
    ]
    return runs.run_cells(
        Study(model, images.train, images.test),
        Store(images.folder / "figure-5"),
        cells,
        alpha=alpha,
        epochs=epochs,
        fingerprint=facts["sha256"],
        stages=range(1, epochs + 1),
        at_once=seeds,
        tell=images.tell,
    )


def stages(
    images: Images,
    count: int,
    every: int,
    pair: tuple[int, int],
    seeds: int,
    epochs: int,
    alpha: float,
) -> tuple[dict[int, float], list[list[Record]]]:
    """Post-train networks at several stages of their training, by BP, FR and `hold` (Fig. 6).

    Args:
        images: The data.
        count: How many stages.
        every: How many epochs of training lie between two.
        pair: (l_S, l_R).
        seeds: How many runs of each.
        epochs: How long to post-train.
        alpha: The weight of the reconstruction loss.

    Returns:
        The accuracy of each stage in %, by the epochs that it was trained for, and the records of
        its runs.
    """
    folder = images.folder / "figure-6"
    found = _trained_stages(images, [every * (i + 1) for i in range(count)], folder)
    records = []
    for epoch, (model, facts) in found.items():
        cells = [
            Cell(images.benchmark.name, *pair, name, seed)
            for seed in range(seeds)
            for name in ("bp", "fr", "hold")
        ]
        records.append(
            runs.run_cells(
                Study(model, images.train, images.test),
                Store(folder / f"stage-{epoch:02}"),
                cells,
                alpha=alpha,
                epochs=epochs,
                fingerprint=facts["sha256"],
                stages=STAGES,
                tell=images.tell,
            )
        )
    return {epoch: facts["accuracy"] for epoch, (_, facts) in found.items()}, records


def _trained_stages(
    images: Images, wanted: Sequence[int], folder: Path
) -> dict[int, tuple[nn.Module, dict[str, Any]]]:
    """Return the network after some epochs of its training; what is saved is not trained again."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = networks.build(images.benchmark.spec).to(images.device)
    known = folder / "stages.json"
    facts = json.loads(known.read_text()) if known.exists() else {}
    if not set(map(str, wanted)) <= set(facts):
        facts = {}
        for epoch in itertools.islice(baseline.epochs(model, images.train), max(wanted)):
            accuracy = baseline.score(model, images.test)
            models.save_weights(model, folder / f"stage-{epoch:02}.safetensors")
            facts[str(epoch)] = {"accuracy": accuracy, "sha256": baseline.fingerprint(model)}
        write_whole(known, json.dumps(facts, indent=1) + "\n")
    found = {}
    for epoch in wanted:
        model = networks.build(images.benchmark.spec).to(images.device)
        models.load_weights(model, folder / f"stage-{epoch:02}.safetensors")
        found[epoch] = (model.eval(), facts[str(epoch)])
    return found


def reversed_channels(spec: networks.NetworkSpec) -> networks.NetworkSpec:
    """Return a network whose convolutions have their numbers of channels the other way round."""
    channels = [out for out, _, _ in spec.convolutions][::-1]
    convolutions = tuple(
        (out, kernel, pool)
        for out, (_, kernel, pool) in zip(channels, spec.convolutions, strict=True)
    )
    return dataclasses.replace(spec, convolutions=convolutions)


def architectures(
    images: Images, pairs: Sequence[tuple[int, int]], seeds: int, epochs: int, alpha: float
) -> dict[str, tuple[float, list[Record]]]:
    """Post-train a network, and the one with its channels reversed, by BP and FR (Fig. 7).

    Returns:
        The accuracy of each before, in %, and its records, by its channels, as "5-10-15".
    """
    found = {}
    for spec in (images.benchmark.spec, reversed_channels(images.benchmark.spec)):
        name = "-".join(str(out) for out, _, _ in spec.convolutions)
        same = spec == images.benchmark.spec
        folder = images.folder if same else images.folder / "figure-7" / f"channels-{name}"
        model, facts = _baseline(images, folder, spec)
        cells = [
            Cell(images.benchmark.name, *pair, method, seed)
            for pair in pairs
            for seed in range(seeds)
            for method in ("bp", "fr")
        ]
        records = runs.run_cells(
            Study(model, images.train, images.test),
            Store(folder / "records"),
            cells,
            alpha=alpha,
            epochs=epochs,
            fingerprint=facts["sha256"],
            stages=STAGES,
            tell=images.tell,
        )
        found[name] = (facts["accuracy"], records)
    return found


def _baseline(
    images: Images, folder: Path, spec: networks.NetworkSpec
) -> tuple[nn.Module, dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    return baseline.obtain(images.benchmark, images.train, images.test, folder, images.device, spec)
