"""The demonstration behind `frfx demo`: train, invert every layer, post-train FR against BP."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import frfx
from frfx import data, models, networks, plot

BATCH_SIZE = 256
"""As in the paper (Sec. 4)."""

BASELINE_EPOCHS = {"digits": 80, "mnist": 20, "cifar10": 25}
GOAL = {"digits": 0.97, "mnist": 0.9762, "cifar10": 0.6255}
"""Accuracies to stop the baseline at: for MNIST and CIFAR-10 those of the paper's baselines."""


def run(data_set: str, output: Path, *, runs: int, epochs: int, console: Console) -> None:
    """Run the demonstration and print what it finds.

    Args:
        data_set: As for `frfx.data.load`; its kind names the network.
        output: Folder for the baseline's weights and the figure.
        runs: How many seeds of post-training.
        epochs: How many epochs of post-training.
        console: Where to print.
    """
    kind = data_set.partition(":")[0]
    train, test = data.load(data_set, split="train"), data.load(data_set, split="test")
    name = _network_for(kind, train)
    console.print(f"{data_set}: {len(train):,} training and {len(test):,} test images")
    with _threads(1 if name == "digits" else torch.get_num_threads()):
        _run(name, train, test, output, runs, epochs, console)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Use so many threads: over a network as small as that for digits they only contend."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(
    name: str,
    train: data.Images,
    test: data.Images,
    output: Path,
    runs: int,
    epochs: int,
    console: Console,
) -> None:
    model = train_baseline(name, train, test, console)
    models.save_weights(model, output / f"{name}.safetensors")
    show(console, frfx.layers(model))
    last = max(row.index for row in frfx.layers(model) if row.index is not None)
    for policy in ("paper", "minimal"):
        console.print(judge(model, test, policy, last))
    inverse = frfx.invert(model, 1, policy="minimal")
    draw(inverse, test, output / "features.png")
    show(console, inverse.summary())
    pairs = [(0, last - 1), (0, last)]
    alpha = networks.NETWORKS[name].alpha
    console.print(compare(model, train, test, pairs, alpha, runs, epochs))
    show(console, f"weights and figure: {output}")


def show(console: Console, *texts: object) -> None:
    """Print texts as they are, on lines as long as they are."""
    for text in texts:
        console.print(str(text), markup=False, highlight=False, soft_wrap=True)


def _network_for(kind: str, images: data.Images) -> str:
    if kind in networks.NETWORKS:
        return kind
    shape = tuple(images.images.shape[1:])
    for name, spec in networks.NETWORKS.items():
        if spec.input_shape == shape and spec.linear[-1] == len(images.classes):
            return name
    raise frfx.DataError(
        f"no network for images of shape {shape} in {len(images.classes)} classes; "
        f"there is one for each of {', '.join(networks.NETWORKS)}"
    )


def train_baseline(
    name: str, train: data.Images, test: data.Images, console: Console, seed: int = 0
) -> nn.Module:
    """Train a network as the paper does (Adam, learning rate 1e-3, batches of 256)."""
    torch.manual_seed(seed)
    model = networks.build(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = train.batches(
        min(BATCH_SIZE, len(train) // 20),
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )
    held_out = test.batches(1000)
    start, scores = time.perf_counter(), [0.0]
    while scores[-1] < GOAL.get(name, 1.0) and len(scores) <= BASELINE_EPOCHS.get(name, 30):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        scores.append(frfx.accuracy(model, held_out))
    console.print(
        f"baseline {name}: test accuracy {scores[-1]:.4f} after {len(scores) - 1} epochs, "
        f"{time.perf_counter() - start:.0f} s"
    )
    return model.eval()


def judge(model: nn.Module, test: data.Images, policy: str, last: int) -> Table:
    """Return the three numbers for every layer, over the whole test set."""
    table = Table(
        "l_R", "layer", "label consistency", "relative deviation", "median", "worst residual",
        title=f"Reconstruction from the labels, policy {policy}",
    )  # fmt: skip
    for layer in range(last, -1, -1):
        inverse = frfx.invert(model, layer, policy=policy)
        found = frfx.Measurement.cat([frfx.measure(inverse, x, y) for x, y in test.batches(1000)])
        worst = max(found.residuals, key=lambda r: r.relative, default=None)
        table.add_row(
            str(layer),
            found.layer,
            f"{found.label_consistency:.4f}",
            f"{found.relative_deviation:.4f}",
            f"{found.deviation_quantiles([0.5])[0]:.4f}",
            "" if worst is None else f"{worst.relative:.2g} at {worst.node}",
        )
    return table


def compare(
    model: nn.Module,
    train: data.Images,
    test: data.Images,
    pairs: list[tuple[int, int]],
    alpha: float,
    runs: int,
    epochs: int,
) -> Table:
    """Post-train from one baseline by BP and by FR with the same seeds; return the accuracies."""
    held_out = test.batches(1000)
    before = frfx.accuracy(model, held_out)
    table = Table(
        "(l_S, l_R)", "method", "epoch 1", f"epoch {epochs}", "seconds an epoch",
        title=f"Post-training, test accuracy of {runs} runs; the baseline has {before:.4f}",
    )  # fmt: skip
    for start, end in pairs:
        methods = {
            "BP": (0.0, "paper"),
            "FR paper": (alpha, "paper"),
            "FR minimal": (alpha, "minimal"),
        }
        for method, (weight, policy) in methods.items():
            histories = []
            for seed in range(runs):
                generator = torch.Generator().manual_seed(seed)
                histories.append(
                    frfx.post_train(
                        copy.deepcopy(model),
                        train.batches(
                            min(BATCH_SIZE, len(train) // 20), shuffle=True, generator=generator
                        ),
                        upto_layer=end,
                        freeze_upto=start,
                        alpha=weight,
                        epochs=epochs,
                        policy=policy,
                        val_loader=held_out,
                    )
                )
            seconds = statistics.mean(record.seconds for history in histories for record in history)
            table.add_row(
                f"({start}, {end})",
                method,
                _spread([history[0].val_accuracy or 0.0 for history in histories]),
                _spread([history[-1].val_accuracy or 0.0 for history in histories]),
                f"{seconds:.2f}",
            )
    return table


def _spread(values: list[float]) -> str:
    mean = f"{100 * statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.3f}"


def draw(
    inverse: frfx.Inverse, images: data.Images, path: Path, samples: int = 5, batch_size: int = 2000
) -> None:
    """Draw forward, reconstructed and difference features: those that move most, and the least.

    Args:
        inverse: What to draw.
        images: Where to take samples from: the first batch.
        path: Where to write the figure; folders are made.
        samples: How many rows, if there are so many images.
        batch_size: How many images to choose from.
    """
    x, y = next(iter(images.batches(batch_size)))
    nodes = inverse.reconstruct(x, y)
    feature = nodes[inverse.layer]
    moved = (feature.target - feature.forward).flatten(1).norm(dim=1)
    order = moved.argsort(descending=True).tolist()
    chosen = order if len(order) <= samples else [*order[: samples - 1], order[-1]]
    figure = plot.feature_maps(
        feature.forward[chosen],
        feature.target[chosen],
        images=x[chosen],
        captions=[images.classes[int(y[i])] for i in chosen],
    )
    figure.suptitle(f"Feature {inverse.layer!r}: what it was, and what it should have been")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
