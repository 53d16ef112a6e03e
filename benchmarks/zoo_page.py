"""The Markdown page of `benchmarks/zoo.py`, from its records."""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

POLICIES = ("layerwise", "joint")
DEPTHS = ("last stage", "middle", "first stage", "stem")

_SHOWN = [
    *(("consistency", policy) for policy in POLICIES),
    *(("deviation", policy) for policy in POLICIES),
    ("residual", "layerwise"),
    *(("time", policy) for policy in POLICIES),
]

_HEAD = """# The zoo: every network of torchvision, run backwards

Written by `nox -s zoo -- --table docs/zoo.md`, with torch {torch} and torchvision {torchvision}.
{found} of the {known} networks of torchvision, unchanged, from a batch of labels to four depths.

**Networks.** Random weights (seed 0) as torchvision draws them, but for those that it starts at
nothing (heads and class tokens of vision transformers, layer scales of ConvNeXt), which are drawn,
too. Statistics of batch norms are those of 64 random images, of which the first are inverted; where
a network has no norms (AlexNet, SqueezeNet, VGG), its layers are scaled and shifted by these.
*Image* is the side of the smallest one that leaves every stage a pixel, or that the network takes.

**Targets.** One label an image, drawn at random from all classes whatever the network says (for
segmentation: at every pixel). Margins are in standard deviations of the logits.

**Cuts.** The stem, and the places that lie nearest to 1/4, 1/2 and 3/4 of the convolutions, linear
ops and attentions; each the last node before the next such op, on every path through the network
(of LR-ASPP, which bypasses most of its backbone: on the longest). *Share*: how many lie before it.

**Policies.** {policies}

**Columns.** *Consistency*: share of the labels that the rest of the network gives for `a*`.
*Deviation*: mean of `||a* - a^|| / ||a^||`. *Residual*: mean of `||f(x*) - y*|| / ||y^||` at the op
on the way where it is largest. *Time*: of one inverse, forward pass and all, over one forward and
backward pass of the network on the same batch. *Compile* and *prepare*: to the stem, layerwise; the
first in seconds, the second over the same forward and backward pass. All times are of the process,
on one thread of a CPU.

**What is weak.** A finite feature is not yet one that has the label. The labels are hard (hundreds
of classes outscore them, nothing was trained), and op by op most convolutional networks have lost
them by the last stage already: units that are off cannot be asked for less, and no step makes up
for what the one behind it has missed. A larger margin helps there only (ResNet-18, 30 deviations: 4
of 4 labels at the last stage, 0 at the middle). A layerwise deviation that vanishes on the way down
(ShuffleNet, GoogLeNet, Inception) says that the target is lost, not that it is near; where it comes
back below a max pooling (the stems of the latter two), windows that overlap share their largest
entry and are asked for values that hardly differ, in Inception by rounding: to meet both, another
entry rises all the way. Nothing bounds the steps here. With `trust_region=0.3` MaxViT's deviation
at the middle is 0.29 instead of 13, its residual 0.21 instead of 13; the label is lost either way.
Joint inversion holds most labels; where it does not, its steps have run out, and `inverse.report`
tells of which samples. Labels at every pixel it meets in part only.
"""


def page(records: Sequence[dict[str, Any]], known: int) -> str:
    """Return the page of some of the networks that are known."""
    first = next(record for record in records if "settings" in record)
    head = _HEAD.format(
        torch=first["torch"],
        torchvision=first["torchvision"],
        found=len(records),
        known=known,
        policies="\n".join(_settings(records, policy) for policy in POLICIES),
    )
    parts = [head, "## In short\n", summary(records), "\n## Networks\n", _networks(records)]
    parts += ["\n## Cuts\n", _cuts(records)]
    if failed := _failures(records):
        parts += ["\n## What failed\n", failed]
    return "\n".join(parts) + "\n"


def _settings(records: Sequence[dict[str, Any]], policy: str) -> str:
    """Return how a policy was written for most networks, and for which it was not."""
    written = [(r["settings"][policy], r["network"]) for r in records if "settings" in r]
    (usual, _), *others = collections.Counter(call for call, _ in written).most_common()
    parts = [f"{policy.capitalize()}: `{usual}`"]
    for other, _ in others:
        parts.append(f"of {', '.join(name for call, name in written if call == other)}: `{other}`")
    return ";\n".join(parts) + "."


def summary(records: Sequence[dict[str, Any]]) -> str:
    """Return what became of all networks, a row a policy and depth."""
    rows = []
    for policy in POLICIES:
        for depth in DEPTHS:
            found = [
                row | {"time": row["inverse_s"] / record["step_s"]}
                for record in records
                for row in record["rows"]
                if row["policy"] == policy and row["depth"] == depth and "consistency" in row
            ]
            rows.append(
                [policy, depth, f"{len(found)} of {len(records)}"]
                + [
                    _number(function(row[name] for row in found)) if found else ""
                    for name, function in (
                        ("consistency", statistics.fmean),
                        ("deviation", statistics.median),
                        ("deviation", max),
                        ("time", statistics.median),
                        ("time", max),
                    )
                ]
            )
    names = ["policy", "depth", "finite", "consistency, mean", "deviation, median", "largest"]
    return _table([*names, "time, median", "largest"], rows)


def _networks(records: Sequence[dict[str, Any]]) -> str:
    rows = []
    for record in records:
        if "step_s" not in record:
            continue
        stem = next(
            (r for r in record["rows"] if (r["policy"], r["depth"]) == ("layerwise", "stem")), {}
        )
        prepare = stem.get("prepare_s", math.nan) / record["step_s"]
        rows.append(
            [
                record["network"],
                f"{record['parameters'] / 1e6:.1f}",
                str(record["image"]),
                str(record["batch"]),
                f"{1e3 * record['step_s']:.3g}",
                _number(stem.get("compile_s")),
                _number(prepare),
                str(stem.get("ops", "")),
            ]
        )
    names = ["network", "M parameters", "image", "batch", "step, ms"]
    return _table([*names, "compile, s", "prepare", "ops"], rows)


def _cuts(records: Sequence[dict[str, Any]]) -> str:
    rows = []
    for record in records:
        for depth in DEPTHS:
            found = {row["policy"]: row for row in record["rows"] if row["depth"] == depth}
            if not found:
                continue
            place = next(iter(found.values()))
            cells = [record["network"], depth, f"`{place['layer']}`", f"{place['share']:.2f}"]
            for name, policy in _SHOWN:
                row = found.get(policy, {})
                row = row | {"time": row.get("inverse_s", math.nan) / record["step_s"]}
                cells.append(_number(row.get(name)) if "consistency" in row else "failed")
            rows.append(cells)
    kinds = [f"{name}: {policy}" for name, policy in _SHOWN]
    return _table(["network", "depth", "cut", "share", *kinds], rows)


def _failures(records: Iterable[dict[str, Any]]) -> str:
    lines = []
    for record in records:
        if record["ended"] != "finished":
            way = record.get("under way", {})
            place = ", ".join(str(way[key]) for key in ("depth", "policy") if key in way)
            lines.append(f"- {record['network']}: {record['ended']}" + (place and f" at {place}"))
        lines += [
            f"- {record['network']}, {row['depth']} (`{row['layer']}`), {row['policy']}: "
            + " ".join(row["error"].split())[:500]
            for row in record["rows"]
            if "error" in row
        ]
    return "\n".join(lines)


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _number(value: float | None, show: Callable[[float], str] = "{:.3g}".format) -> str:
    return "" if value is None or math.isnan(value) else show(value)
