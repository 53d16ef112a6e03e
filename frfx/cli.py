"""The command line: layers, invert, post-train, demo."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, cast

import torch
import typer
from rich.console import Console
from rich.table import Table

import frfx
from frfx import data, demo, models, plot

app = typer.Typer(
    help="Run trained networks backwards.", no_args_is_help=True, pretty_exceptions_enable=False
)
console = Console()

Model = Annotated[str, typer.Argument(help=f"The model: {models.KINDS}.")]
Weights = Annotated[Path | None, typer.Option(help="State dict: .safetensors or torch.save's.")]
Data = Annotated[str, typer.Option(help=f"The data set: {data.KINDS}.")]
Upto = Annotated[
    str,
    typer.Option(help="l_R: a layer number or a node's name; node:2 for a node that is called 2."),
]
PolicyName = Annotated[str, typer.Option(help="paper, minimal or joint.")]
BatchSize = Annotated[int, typer.Option(min=1)]


@app.command()
def layers(
    model: Model,
    weights: Weights = None,
    upto: Annotated[
        str | None,
        typer.Option(help="Show how every op down to this layer is inverted."),
    ] = None,
    policy: Annotated[str, typer.Option(help="With --upto: paper, minimal or joint.")] = "paper",
    branches: Annotated[
        str | None, typer.Option(help="With --upto: region or rules; the policy's own if not given")
    ] = None,
) -> None:
    """List the places of a network that a reconstruction may reach.

    With --upto, how every op between that layer and the output is inverted; exits with 1 if some
    cannot be.
    """
    with _errors():
        network = models.load_model(model, weights)
        if upto is not None:
            chosen = frfx.policy.resolve(policy)
            if branches is not None:
                chosen = replace(chosen, branches=cast(frfx.policy.Branches, branches))
            found = frfx.layers(network, upto_layer=_layer(upto), policy=chosen)
            demo.show(console, found)
            if found.unsupported:
                raise typer.Exit(1)
            return
        found = frfx.layers(network)
        table = Table("l", "name", "op", "parameters", title=model)
        for row in found:
            index = "" if row.index is None else str(row.index)
            table.add_row(index, row.name, row.op, f"{row.parameters:,}" if row.parameters else "")
        console.print(table)
        if found.note:
            console.print(found.note)


@app.command()
def invert(
    model: Model,
    upto: Upto,
    data_set: Annotated[
        str, typer.Option("--data", help=f"The data set: {data.KINDS}.")
    ] = "digits",
    weights: Weights = None,
    policy: PolicyName = "paper",
    samples: Annotated[int, typer.Option(min=1, help="How many test images.")] = 1000,
    batch_size: BatchSize = 256,
    code: Annotated[bool, typer.Option(help="Print the reconstruction graph's code.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Write a* and a^ here: .safetensors or torch.save's.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw what moves most, and least, of the first batch here.")
    ] = None,
) -> None:
    """Reconstruct a layer's feature from the labels of test images, and judge it."""
    with _errors():
        if figure is not None:
            plot.check_format(figure)
        images = data.load(data_set, split="test")
        images = images.subset(min(samples, len(images)), seed=0)
        inverse = frfx.invert(_trained(model, weights), _layer(upto), policy=policy)
        parts, targets, forwards = [], [], []
        for x, y in images.batches(batch_size):
            parts.append(frfx.measure(inverse, x, y))
            if output is not None:
                nodes = inverse.reconstruct(x, y)
                targets.append(nodes[inverse.layer].target)
                forwards.append(nodes[inverse.layer].forward)
        if code:
            demo.show(console, inverse.code)
        demo.show(console, inverse.summary(), frfx.Measurement.cat(parts))
        if output is not None:
            tensors = {"target": torch.cat(targets), "forward": torch.cat(forwards)}
            models.save_tensors(tensors, output)
            demo.show(console, f"features: {output}")
        if figure is not None:
            demo.draw(inverse, images, figure, batch_size=batch_size)
            demo.show(console, f"figure: {figure}")


@app.command(name="post-train")
def post_train(
    model: Model,
    upto: Upto,
    data_set: Annotated[
        str, typer.Option("--data", help=f"The data set: {data.KINDS}.")
    ] = "digits",
    freeze_upto: Annotated[
        str, typer.Option(help="l_S: the last frozen layer of the front, as --upto.")
    ] = "0",
    weights: Weights = None,
    alpha: Annotated[float, typer.Option(min=0, max=1, help="Weight of Eq. 2 in Eq. 3.")] = 0.1,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    policy: PolicyName = "paper",
    batch_size: BatchSize = 256,
    seed: Annotated[int, typer.Option(help="Of shuffling, dropout and weights not given.")] = 0,
    checkpoint: Annotated[Path | None, typer.Option(help="Save to and resume from here.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the trained weights here.")] = None,
) -> None:
    """Post-train the layers l_S + 1 .. l_R of a network, the rest frozen."""
    with _errors():
        torch.manual_seed(seed)
        network = _trained(model, weights)
        generator = torch.Generator().manual_seed(seed)
        train = data.load(data_set, split="train")
        validation = data.load(data_set, split="test").batches(1000)
        before = frfx.accuracy(network, validation)
        history = frfx.post_train(
            network,
            train.batches(batch_size, shuffle=True, generator=generator),
            upto_layer=_layer(upto),
            freeze_upto=_layer(freeze_upto),
            alpha=alpha,
            epochs=epochs,
            policy=policy,
            val_loader=validation,
            checkpoint=checkpoint,
            progress=True,
        )
        table = Table("epoch", "loss", "L_cls", "L_rec", "accuracy", "seconds")
        table.add_row("before", "", "", "", f"{before:.4f}", "")
        for row in history:
            terms = (
                "" if t is None else f"{t:.4g}" for t in (row.classification, row.reconstruction)
            )
            scored = "" if row.val_accuracy is None else f"{row.val_accuracy:.4f}"
            table.add_row(str(row.epoch), f"{row.loss:.4g}", *terms, scored, f"{row.seconds:.1f}")
        console.print(table)
        if output is not None:
            models.save_weights(network, output)
            demo.show(console, f"weights: {output}")


@app.command(name="demo")
def run_demo(
    data_set: Annotated[
        str, typer.Option("--data", help="digits, or a data set that the paper has a network for.")
    ] = "digits",
    output: Annotated[Path, typer.Option(help="Folder for the weights and the figure.")] = Path(
        "frfx-demo"
    ),
    runs: Annotated[int, typer.Option(min=1, help="Runs of FR and BP, one a seed.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of post-training.")] = 5,
) -> None:
    """Train a small network, invert every layer, and compare post-training FR with BP."""
    with _errors():
        demo.run(data_set, output, runs=runs, epochs=epochs, console=console)


def _trained(spec: str, weights: Path | None) -> torch.nn.Module:
    """Load a model; say so if it has not been trained, for the figures mean little then."""
    model = models.load_model(spec, weights)
    if weights is None and spec.startswith(("paper:", "torchvision:")):
        demo.show(Console(stderr=True), f"{spec} without --weights is not trained")
    return model


def _layer(text: str) -> int | str:
    return int(text) if text.isdecimal() else text.removeprefix("node:")


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Show a mistake as its message, not as a traceback."""
    try:
        yield
    except (frfx.FrfxError, OSError) as error:  # the latter of files that cannot be written
        stderr = Console(stderr=True)
        stderr.print(f"[bold red]{type(error).__name__}:[/]", end=" ")
        demo.show(stderr, error)
        raise typer.Exit(1) from error
