"""Joint inversion beside the layerwise policies, and beside attacks that look for the same feature.

Run by `nox -s bench-joint`; prints tables and writes them as JSON. Times are of the process, on one
thread, and read as ratios within one run.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from clock import clocked
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import frfx
from frfx import data, demo, models

console = Console(width=150)
MARGIN = 0.01


def training_step(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the time of one training step on a batch: the best of three."""
    best = float("inf")
    for _ in range(3):
        with clocked() as clock:
            F.cross_entropy(model(x), y).backward()
        best = min(best, clock.seconds)
        model.zero_grad()
    return best


def policies(margin: float) -> dict[str, frfx.policy.Policy | str]:
    """Return what is compared, layer by layer."""
    return {
        "paper": "paper",
        "minimal": "minimal",
        "joint": frfx.policy.joint(margin=margin, unreached="ignore"),
        "joint equality": frfx.policy.joint(
            margin=margin, constraint="equality", unreached="ignore"
        ),
    }


def by_layer(model: nn.Module, test: data.Images, batch_size: int) -> list[dict[str, Any]]:
    """Invert every test image to every layer, under every policy."""
    last = max(row.index for row in frfx.layers(model) if row.index is not None)
    x, y = next(iter(test.batches(batch_size)))
    step = training_step(model, x, y)
    rows = []
    for layer in range(last - 1, -1, -1):
        for name, policy in policies(MARGIN).items():
            inverse = frfx.invert(model, layer, policy=policy)
            inverse.prepare.ready(x)
            with clocked() as clock:
                inverse(x, y)
            parts, reached, steps = [], [], []
            for images, labels in test.batches(batch_size):
                parts.append(frfx.measure(inverse, images, labels))
                for report in inverse.report.values():
                    reached.append(report.reached)
                    steps.append(report.steps)
            found = frfx.Measurement.cat(parts)
            rows.append(
                {
                    "l_R": layer,
                    "layer": found.layer,
                    "policy": name,
                    "consistency": found.label_consistency,
                    "deviation": found.relative_deviation,
                    "time / training step": clock.seconds / step,
                    "reached": float(torch.cat(reached).double().mean()) if reached else None,
                    "steps": float(torch.cat(steps).double().mean()) if steps else None,
                }
            )
    return rows


class Margined(nn.Module):
    """The rest of the network, its label handicapped by the margin: all methods solve one problem.

    Attributes:
        labels: The labels of the batch.
    """

    def __init__(self, tail: nn.Module, labels: Tensor, classes: int) -> None:
        super().__init__()
        self.tail, self.labels = tail, labels
        self.handicap = MARGIN * F.one_hot(labels, classes)

    def forward(self, a: Tensor) -> Tensor:
        return self.tail(a) - self.handicap


def attacks(
    margined: nn.Module, feature: Tensor, labels: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """Return what a user would take today, by the public API of each, a hundred steps each."""
    import foolbox
    from adv_lib.attacks import alma

    bound = 2 * float(feature.abs().max())
    wrapped = foolbox.PyTorchModel(margined.eval(), bounds=(-bound, bound))
    goal = foolbox.criteria.TargetedMisclassification(labels)
    scale = float(feature.flatten(1).norm(dim=1).mean())

    def run(attack: Any) -> Tensor:
        return attack(wrapped, feature, goal, epsilons=None)[0]

    class Unit(nn.Module):
        """ALMA looks in the unit cube."""

        def forward(self, u: Tensor) -> Tensor:
            return margined((u - 0.5) * 2 * bound)

    def run_alma() -> Tensor:
        found = alma(
            Unit(),
            feature / (2 * bound) + 0.5,
            labels,
            targeted=True,
            num_steps=100,
            init_lr_distance=0.05 * scale / (2 * bound),
        )
        return (found - 0.5) * 2 * bound

    return {
        "DDN, 100 steps": lambda: run(
            foolbox.attacks.DDNAttack(steps=100, init_epsilon=0.05 * scale)
        ),
        "FMN, 100 steps": lambda: run(foolbox.attacks.L2FMNAttack(steps=100)),
        "ALMA, 100 steps": run_alma,
        "L-BFGS, 5 penalties of 20": lambda: penalised(margined, feature, labels),
    }


def penalised(margined: nn.Module, feature: Tensor, labels: Tensor) -> Tensor:
    """Minimise `||a - a^||^2 + c violation^2` by L-BFGS for growing c; keep the nearest."""
    best, nearest = feature.clone(), torch.full((len(feature),), torch.inf)
    a = feature.clone().requires_grad_()
    scale = feature.flatten(1).square().sum(1).mean()

    def minimise(weight: float) -> None:
        optimizer = torch.optim.LBFGS([a], max_iter=20, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            logits = margined(a)
            own = logits.gather(1, labels[:, None])
            missing = (logits - own + MARGIN).clamp(min=0).scatter(1, labels[:, None], 0)
            value = (a - feature).square().sum() / scale + weight * missing.square().sum()
            value.backward()
            return value

        optimizer.step(loss)

    for weight in (1.0, 10.0, 100.0, 1e3, 1e4):
        minimise(weight)
        with torch.no_grad():
            distance = (a - feature).flatten(1).norm(dim=1)
            better = (margined(a).argmax(1) == labels) & (distance < nearest)
            best[better], nearest[better] = a.detach()[better], distance[better]
    return best


def against_attacks(model: nn.Module, x: Tensor, y: Tensor) -> list[dict[str, Any]]:
    """Look for the nearest feature of misclassified images from which the label wins."""
    children = list(model.named_children())
    rows = []
    for place, (name, child) in enumerate(children):
        if not isinstance(child, (nn.Conv2d, nn.Linear)) or place + 1 == len(children):
            continue
        front, tail = model[:place], model[place:]
        with torch.no_grad():
            feature = front(x)
        margined = Margined(tail, y, tail(feature[:1]).shape[1])
        size = feature.flatten(1).norm(dim=1)
        methods = attacks(margined, feature, y)
        for steps in (3, 4, 5, 6, 12):
            policy = frfx.policy.joint(margin=MARGIN, steps=steps, unreached="ignore")
            inverse = frfx.invert(tail, "input", policy=policy)  # of the tail alone, as the others
            inverse.prepare.ready(feature)
            methods[f"joint, {steps} steps at most"] = functools.partial(inverse, feature, y)
        found = []
        for method, run in methods.items():
            seconds = math.inf
            for _ in range(3):
                with clocked() as clock:
                    a = run()
                seconds = min(seconds, clock.seconds)
            with torch.no_grad():
                logits = tail(a)
            own = logits.gather(1, y[:, None])[:, 0]
            rival = logits.scatter(1, y[:, None], -torch.inf).amax(1)
            reached = own >= rival + 0.99 * MARGIN - 1e-5
            moved = (a - feature).flatten(1).norm(dim=1) / size
            found.append((method, reached, moved, seconds))
        # Over the images that all but the worst reach, so that a miss lowers no mean.
        both = torch.stack([r for m, r, _, _ in found if m.startswith(("DDN", "joint"))]).all(0)
        slowest = next(seconds for method, _, _, seconds in found if method.startswith("DDN"))
        for method, reached, moved, seconds in found:
            rows.append(
                {
                    "input of": name,
                    "method": method,
                    "reached": float(reached.double().mean()),
                    "deviation": float(moved[reached & both].mean()),
                    "time / DDN's": seconds / slowest,
                }
            )
    return rows


def of_large_networks() -> list[dict[str, Any]]:
    """Invert ResNet-18 and ViT-B/16, random weights and 1,000 classes, on small images."""
    import torchvision

    torch.manual_seed(0)
    resnet, images = torchvision.models.resnet18().eval(), torch.randn(32, 3, 64, 64)
    depths = ["avgpool", "layer4", "layer3", "layer2", "layer1"]
    rows = of_depths("ResNet-18", resnet, images, depths)
    torch.manual_seed(0)
    vit, images = torchvision.models.vit_b_16(image_size=32).eval(), torch.randn(16, 3, 32, 32)
    nn.init.normal_(vit.heads.head.weight, std=0.02)  # torchvision's are zero
    depths = [f"encoder.layers.encoder_layer_{i}" for i in (11, 8, 5, 1)]
    return rows + of_depths("ViT-B/16", vit, images, depths)


def of_depths(name: str, model: nn.Module, x: Tensor, depths: list[str]) -> list[dict[str, Any]]:
    """Invert one network to several depths, towards random labels and towards the tenth class."""
    with torch.no_grad():
        logits = model(x)
    step = training_step(model, x, logits.argmax(1))
    generator = torch.Generator().manual_seed(0)
    targets = {
        "random label": torch.randint(0, logits.shape[1], (len(x),), generator=generator),
        "tenth class": logits.topk(10).indices[:, 9],
    }
    rows = []
    for target, labels in targets.items():
        for depth in depths:
            policy = frfx.policy.joint(margin=MARGIN, unreached="ignore")
            inverse = frfx.invert(model, depth, policy=policy)
            inverse.prepare.ready(x)
            with clocked() as clock:
                inverse(x, labels)
            found = frfx.measure(inverse, x, labels)
            (report,) = inverse.report.values()
            rows.append(
                {
                    "network": name,
                    "target": target,
                    "layer": depth,
                    "consistency": found.label_consistency,
                    "deviation": found.relative_deviation,
                    "time / training step": clock.seconds / step,
                    "steps": float(report.steps.double().mean()),
                }
            )
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(
            *(
                "" if v is None else f"{v:.5g}" if isinstance(v, float) else str(v)
                for v in row.values()
            )
        )
    console.print(table)


def on_data(
    data_set: str, network: str, weights: Path | None, batch_size: int, quick: bool, only: str
) -> dict[str, Any]:
    """Return and print the tables for one of the paper's networks."""
    test = data.load(data_set, split="test")
    if weights is None:
        train = data.load(data_set, split="train")
        model = demo.train_baseline(network, train, test, console)
    else:
        model = models.load_model(f"paper:{network}", weights).eval()
    accuracy = frfx.accuracy(model, test.batches(1000))
    some = test.subset(min(500, len(test)), seed=0) if quick else test
    found: dict[str, Any] = {"data": data_set, "accuracy": accuracy, "images": len(some)}
    if only in ("", "layers"):
        found["layers"] = by_layer(model, some, min(batch_size, len(some)))
        show(f"{network}: test accuracy {accuracy:.4f}, {len(some)} images", found["layers"])
    if only in ("", "attacks"):
        x, y = next(iter(test.subset(min(1024, len(test)), seed=0).batches(1024)))
        with torch.no_grad():
            wrong = model(x).argmax(1) != y
        found["attacks"] = against_attacks(model, x[wrong], y[wrong])
        show(f"{int(wrong.sum())} misclassified of {len(x)} images", found["attacks"])
    return found


def main(
    data_set: Annotated[
        str, typer.Option("--data", help=f"The data set: {data.KINDS}.")
    ] = "digits",
    network: Annotated[str, typer.Option(help="The paper's network for it.")] = "digits",
    weights: Annotated[
        Path | None, typer.Option(help="A trained baseline; else one is trained.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the figures go, as JSON.")] = Path(
        "joint.json"
    ),
    batch_size: Annotated[int, typer.Option(min=1)] = 1000,
    quick: Annotated[bool, typer.Option(help="Only some test images.")] = False,
    only: Annotated[
        str, typer.Option(help="layers, attacks or large; empty for the first two.")
    ] = "",
) -> None:
    """Compare joint inversion with the layerwise policies, and with minimal-norm attacks."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if only == "large":
        found: dict[str, Any] = {"large": of_large_networks()}
        show("1,000 classes, random weights", found["large"])
    else:
        found = on_data(data_set, network, weights, batch_size, quick, only)
    output.write_text(json.dumps(found, indent=2))
    console.print(f"figures: {output}")


if __name__ == "__main__":
    typer.run(main)
