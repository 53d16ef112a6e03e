"""What is compared, on which data, and with which settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from frfx import networks

BATCH_SIZE = 256
LEARNING_RATE = 1e-3
"""Of Adam. Source: FR-PT, Section 4."""

STAGES = (1, 5, 10)
"""The epochs after which the paper gives the accuracy."""


@dataclass(frozen=True)
class Method:
    """A way to post-train.

    Attributes:
        name: As on the command line.
        label: As in the tables.
        targets: ``"none"`` trains by backpropagation alone (alpha 0); ``"forward"`` holds the
            feature where the baseline has it, which knows of no label; a key of
            `paper.study.EMBEDDINGS` embeds the label at the logits; anything else is the policy of
            `frfx.invert` that reconstructs the feature.
        loss: Of the reconstruction, ``"mse"`` (Eq. 2) or ``"l1"``.
        alpha: The weight of the reconstruction loss; None for the benchmark's.
        relative: Whether that loss is divided by what it is before training, as by the weighing
            ``"relative"`` of `frfx.PostTraining`.
        fresh: Whether every epoch has targets of its own, reconstructed by the network as it is
            then; else they are those of the baseline.
    """

    name: str
    label: str
    targets: str
    loss: Literal["mse", "l1"] = "mse"
    alpha: float | None = None
    relative: bool = False
    fresh: bool = False

    def weight(self, alpha: float) -> float:
        """Return the weight of the reconstruction loss, where the benchmark's is alpha."""
        if self.targets == "none":
            return 0.0
        return alpha if self.alpha is None else self.alpha


METHODS = {
    method.name: method
    for method in (
        Method("bp", "BP", "none"),
        Method("fr", "FR", "paper"),
        Method("hold", "hold", "forward"),
        Method("fr-minimal", "FR, minimal", "minimal"),
        Method("fr-joint", "FR, joint", "joint"),
        # Source: FR-PT, Section 4.2, for the last layer alone.
        Method("one-hot", "one-hot", "one-hot"),
        Method("ma", "MA", "maximum-assignment", loss="l1"),
        Method("ne", "NE", "nearest-embedding"),
    )
}


FLAGS = ("relative", "fresh")


def method(name: str) -> Method:
    """Return a method by its name: ``NAME[+relative][+fresh][@ALPHA]``, NAME a key of `METHODS`.

    Raises:
        KeyError: If there is no such method.
    """
    start, at, alpha = name.partition("@")
    base, *flags = start.split("+")
    found = METHODS[base]
    if (at or flags) and found.targets == "none":
        raise KeyError(name)
    if not set(flags) <= set(FLAGS) or ("fresh" in flags and found.targets == "forward"):
        raise KeyError(name)
    try:
        weight = float(alpha) if at else None
    except ValueError:
        raise KeyError(name) from None
    if weight is not None and not 0 <= weight <= 1:
        raise KeyError(name)
    label = ", ".join([found.label, *flags, *([f"alpha {alpha}"] if at else [])])
    set_flags = {flag: flag in flags for flag in FLAGS}
    return replace(found, name=name, label=label, alpha=weight, **set_flags)


def base_name(name: str) -> str:
    """Return the key of `METHODS` that a method's name begins with."""
    return name.partition("@")[0].partition("+")[0]


def order(name: str) -> tuple[float, int, str]:
    """Return what methods are sorted by: the weight, then as in `METHODS`."""
    return method(name).alpha or 0.0, list(METHODS).index(base_name(name)), name


@dataclass(frozen=True)
class Benchmark:
    """A data set of the paper with its network.

    Attributes:
        name: The key of `frfx.networks.NETWORKS`.
        data: The kind of data set, as `frfx.data.load` knows it.
        table: The number of the paper's table; None where it has none.
        goal: The test accuracy of the paper's baseline, in %, at which training stops.
        epochs: How long a baseline is trained at most.
    """

    name: str
    data: str
    table: int | None
    goal: float
    epochs: int = 30

    @property
    def spec(self) -> networks.NetworkSpec:
        """The network."""
        return networks.NETWORKS[self.name]

    def pairs(self) -> list[tuple[int, int]]:
        """Return all (l_S, l_R), in the order of the paper's tables."""
        return [(s, r) for r in range(1, self.spec.n_layers + 1) for s in range(r)]


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("digits", "digits", None, 97.0, epochs=80),
        Benchmark("mnist", "mnist", 1, 97.62),
        Benchmark("cifar10", "cifar10", 2, 62.55),
        Benchmark("cifar100", "cifar100", 3, 36.74),
        Benchmark("tiny-imagenet", "tiny-imagenet", 4, 24.99),
        Benchmark("imagenette", "imagenette", 5, 51.56),
        Benchmark("imagewoof", "imagewoof", 6, 27.23),
    )
}
