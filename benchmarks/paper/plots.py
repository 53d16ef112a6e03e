"""The paper's figures, drawn from records."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from paper import statistics
from paper.layout import accuracies, grouped
from paper.records import Record
from paper.settings import METHODS

COLOURS = {"bp": "0.45", "one-hot": "tab:orange", "ma": "tab:green", "ne": "tab:blue"}


def half_width(values: Sequence[float]) -> float:
    """Return half the width of the 95 % confidence interval of a mean (Student's t)."""
    if len(values) < 2:
        return 0.0
    _, deviation = statistics.mean_and_deviation(values)
    return float(stats.t.ppf(0.975, len(values) - 1)) * deviation / len(values) ** 0.5


def evolution(
    scores: Sequence[float],
    maps: Sequence[Sequence[Tensor]],
    x: Tensor,
    shapes: Sequence[Sequence[int]],
) -> Figure:
    """Draw Fig. 4: discrepancies of forward and reconstructed features at stages of training.

    Args:
        scores: Test accuracy in % of each stage.
        maps: `|a^ - a*|` by stage and layer, each with the images in front.
        x: The images.
        shapes: Of the feature of each layer, (channels, height, width), or (features,).
    """
    count, stages, layers = len(x), len(scores), len(shapes)
    columns = 1 + stages * layers
    figure = Figure(figsize=(1.9 * columns, 1.45 * count + 0.9), layout="constrained")
    axes = figure.subplots(count, columns, squeeze=False)
    limits = [max(float(stage[i].amax()) for stage in maps) for i in range(layers)]
    drawn = None
    for row in range(count):
        picture = x[row].cpu()
        pixels = picture[0] if len(picture) == 1 else picture.permute(1, 2, 0)
        low, high = float(pixels.min()), float(pixels.max())
        axes[row][0].imshow((pixels - low) / (high - low or 1), cmap="gray")
        for layer in range(layers):
            for stage in range(stages):
                axis = axes[row][1 + layer * stages + stage]
                values = mosaic(maps[stage][layer][row].cpu(), shapes[layer])
                drawn = axis.imshow(
                    values / (limits[layer] or 1), cmap="jet", vmin=0, vmax=1, aspect="equal"
                )
                if row == 0:
                    axis.set_title(f"layer {layer + 1}, at {scores[stage]:.2f} %", fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0][0].set_title("input", fontsize=9)
    if drawn is not None:
        figure.colorbar(drawn, ax=axes, label="|a^ − a*|, of the layer's largest", shrink=0.8)
    return figure


def mosaic(feature: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the channels of a feature side by side, with a gap; a vector as a rectangle."""
    if len(shape) == 1:
        width = int(shape[0] ** 0.5)
        missing = -shape[0] % width
        return torch.nn.functional.pad(feature.flatten(), (0, missing)).view(-1, width)
    channels = feature.reshape(tuple(shape))
    across = int(-(-(len(channels) ** 0.5) // 1))
    padded = torch.nn.functional.pad(channels, (0, 1, 0, 1), value=float("nan"))
    empty = torch.full_like(padded[:1], float("nan"))
    cells = [*padded.split(1), *[empty] * (-len(channels) % across)]
    rows = [torch.cat(cells[i : i + across], 2)[0] for i in range(0, len(cells), across)]
    return torch.cat(rows)[:-1, :-1]


def embeddings(records: Sequence[Record], before: float) -> Figure:
    """Draw Fig. 5: accuracy by epoch for each embedding, mean and 95 % confidence."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    ((_, methods),) = grouped(records).items()
    for name, found in methods.items():
        epochs = sorted(next(iter(found.values())).accuracies)
        values = [list(accuracies(found, epoch).values()) for epoch in epochs]
        means = [statistics.mean_and_deviation(v)[0] for v in values]
        widths = [half_width(v) for v in values]
        axis.plot(epochs, means, color=COLOURS.get(name), label=METHODS[name].label, marker=".")
        axis.fill_between(
            epochs,
            [m - w for m, w in zip(means, widths, strict=True)],
            [m + w for m, w in zip(means, widths, strict=True)],
            color=COLOURS.get(name),
            alpha=0.2,
            linewidth=0,
        )
    axis.axhline(before, color="black", linestyle=":", label="baseline")
    axis.set_xlabel("epoch of post-training, the last layer alone")
    axis.set_ylabel("test accuracy, %")
    axis.legend()
    return figure


def stages(before: dict[int, float], records: Sequence[Sequence[Record]]) -> Figure:
    """Draw Fig. 6: baselines of different stages, and what post-training makes of each.

    Args:
        before: Accuracies in % by the epochs of training before.
        records: The runs of each.
    """
    figure = Figure(figsize=(max(6.0, 0.75 * len(before) + 2), 4.5), layout="constrained")
    axis = figure.subplots()
    places = list(range(1, len(before) + 1))
    axis.plot(places, list(before.values()), color="black", marker=".", label="baseline")
    by_stage = [next(iter(grouped(some).values())) for some in records]
    last = max(epoch for record in records[0] for epoch in record.accuracies)
    for name, style in (("bp", "-"), ("hold", "--")):
        values = [list(accuracies(methods[name], last).values()) for methods in by_stage]
        means = [statistics.mean_and_deviation(some)[0] for some in values]
        label = f"{METHODS[name].label}, {last} epochs"
        axis.plot(places, means, style, color="0.6", marker=".", label=label)
    epochs = sorted(by_stage[0]["fr"][0].accuracies)
    for i, epoch in enumerate(epochs):
        colour = ("tab:green", "tab:blue", "tab:red")[i % 3]
        width = 0.6 / len(epochs)
        axis.boxplot(
            [list(accuracies(methods["fr"], epoch).values()) for methods in by_stage],
            positions=[place + (i - (len(epochs) - 1) / 2) * width for place in places],
            widths=0.8 * width,
            boxprops={"color": colour},
            medianprops={"color": colour},
            whiskerprops={"color": colour},
            capprops={"color": colour},
            flierprops={"markeredgecolor": colour, "markersize": 3},
            manage_ticks=False,
        )
        axis.plot([], [], color=colour, label=f"FR, {epoch} epoch{'s' if epoch > 1 else ''}")
    axis.set_xticks(places, list(map(str, before)))
    axis.set_xlabel("epochs of training before")
    axis.set_ylabel("test accuracy, %")
    axis.legend()
    return figure


def architectures(found: dict[str, tuple[float, list[Record]]]) -> Figure:
    """Draw Fig. 7: BP and FR by pair, for channels that grow and channels that shrink."""
    figure = Figure(figsize=(5 * len(found), 4), layout="constrained")
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for axis, (name, (before, records)) in zip(axes, found.items(), strict=True):
        groups = grouped(records)
        last = max(epoch for record in records for epoch in record.accuracies)
        for method, colour, shift in (("bp", "black", -0.08), ("fr", "tab:red", 0.08)):
            values = [list(accuracies(m[method], last).values()) for m in groups.values()]
            axis.errorbar(
                [i + shift for i in range(len(values))],
                [statistics.mean_and_deviation(v)[0] for v in values],
                yerr=[half_width(v) for v in values],
                color=colour,
                label=METHODS[method].label,
                marker="o",
                capsize=3,
                linestyle="-" if method == "bp" else "none",
            )
        axis.axhline(before, color="0.5", linestyle=":", label="baseline")
        axis.set_xticks(range(len(groups)), [f"({s},{r})" for s, r in groups], fontsize=8)
        axis.set_title(f"channels {name}")
        axis.set_xlabel("(l_S, l_R)")
        axis.set_ylabel("test accuracy, %, mean and 95 % interval")
        axis.legend()
    return figure


matplotlib.rcParams["axes.formatter.useoffset"] = False
