"""The loop: post-train modules of a network over a data loader."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from frfx.errors import FrfxError, TargetError
from frfx.policy import Policy
from frfx.posttrain.batches import Batch, pairs
from frfx.posttrain.checkpoint import Checkpoint, EpochRecord
from frfx.posttrain.scoring import accuracy
from frfx.posttrain.step import PostTraining
from frfx.weights import Weights


def post_train(
    model: nn.Module,
    loader: Iterable[Batch],
    *,
    upto_layer: int | str,
    freeze_upto: int | str = 0,
    alpha: float = 0.1,
    epochs: int = 10,
    policy: Policy | str = "paper",
    backend: str = "auto",
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    val_loader: Iterable[Batch] | None = None,
    targets: str = "recompute",
    fabric: Any = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
    example_input: Tensor | None = None,
    output: str | int | None = None,
    weighing: str = "paper",
    classification_loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    reconstruction_loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
) -> list[EpochRecord]:
    """Post-train the layers `l_S + 1 .. l_R` of a network in place, the rest frozen.

    Args:
        model: The network; the parameters of those layers are trained, everything else comes back
            as it was, after an exception too.
        loader: Yields batches (x, y) anew for every epoch. Inputs are cast to the type of the
            trained parameters, integer labels to long.
        upto_layer: `l_R`, as for `frfx.invert`.
        freeze_upto: `l_S`, as for `PostTraining`.
        alpha: The weight of the reconstruction loss (Eq. 3); 0 is plain backpropagation.
        epochs: How many epochs in all, those before a resume included.
        policy: How features are reconstructed, as for `frfx.invert`.
        backend: As for `frfx.invert`.
        optimizer: Makes the optimizer from the trained parameters; None for the paper's Adam with
            a learning rate of 1e-3. None that needs a closure (LBFGS).
        val_loader: Batches to measure the accuracy on after every epoch.
        targets: ``"recompute"`` them for every batch, or ``"cache"`` inputs, labels and targets of
            one pass over the loader in memory, as the paper does; the epochs then shuffle what is
            cached, and the loader's random augmentation is frozen with it.
        fabric: A launched `lightning.fabric.Fabric` for device, precision and several processes
            (extra `frfx[fabric]`); None for plain torch on the model's device. The model stays
            where Fabric moves it. A torch `DataLoader` is split among the processes; of any other
            iterable, every process gets all.
        checkpoint: A file to save to after every epoch and, if it is there, to resume from; its
            folder is made. The order in which the loader shuffles is the loader's own, and begins
            anew with a resume, as do random numbers; learning rates are those of the file.
        progress: Whether to show a progress bar (extra `frfx[cli]`).
        example_input: A batch; needed only for models that symbolic tracing cannot follow.
        output: Which of several tensors that the model returns is its output, as for
            `frfx.invert`.
        weighing: How alpha weighs the reconstruction loss, as for `PostTraining`; after a resume
            the mean that ``"relative"`` divides by is taken anew.
        classification_loss: As for `PostTraining`: another for outputs that are not classes.
        reconstruction_loss: As for `PostTraining`.

    Returns:
        One record an epoch, those before a resume included.

    Raises:
        LayerError, UnsupportedOpsError, TargetError: As `PostTraining` does, or for a choice of
            `targets` that does not exist, or if a loader yields anything else than pairs.
        FrfxError: If the checkpoint cannot be read, or is of other layers or another optimizer; or
            if the optimizer needs a closure.
    """
    if targets not in ("recompute", "cache"):
        raise TargetError(f'targets are "recompute" or "cache", not {targets!r}')
    step = PostTraining(
        model,
        upto_layer=upto_layer,
        freeze_upto=freeze_upto,
        alpha=alpha,
        policy=policy,
        backend=backend,
        example_input=example_input,
        output=output,
        weighing=weighing,
        classification_loss=classification_loss,
        reconstruction_loss=reconstruction_loss,
    )
    with step, _progress_bar(progress, epochs) as show:
        make = optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=1e-3))
        made = make(step.trained_parameters())
        _check_optimizer(made)
        loop = _Loop(step, made, loader, targets == "cache", fabric)
        saved = None if checkpoint is None else Checkpoint(checkpoint, step, loop.optimizer, fabric)
        history = [] if saved is None else saved.load()
        show(len(history))
        for epoch in range(len(history) + 1, epochs + 1):
            losses, seconds = loop.epoch()
            scored = None if val_loader is None else accuracy(model, val_loader, output)
            history.append(EpochRecord(epoch, *losses, val_accuracy=scored, seconds=seconds))
            if saved is not None:
                saved.save(history)
            show(epoch)
    return history


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise `FrfxError` for an optimizer that evaluates the loss itself."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise FrfxError(
            f"{type(optimizer).__name__} evaluates the loss more than once a step: train with "
            "frfx.PostTraining in a loop of your own, and give its step a closure"
        )


class _Loop:
    """Batches, targets, backward and step, in plain torch or through Fabric."""

    def __init__(
        self,
        step: PostTraining,
        optimizer: torch.optim.Optimizer,
        loader: Iterable[Batch],
        cache: bool,
        fabric: Any,
    ) -> None:
        self.step, self.fabric = step, fabric
        self.run, self.optimizer, self.loader = step, optimizer, loader
        if fabric is not None:
            self.run, self.optimizer = fabric.setup(step, optimizer)
            if isinstance(loader, torch.utils.data.DataLoader):
                self.loader = fabric.setup_dataloaders(loader)
        self.cache = _Cache(step) if cache and step.targets is not None else None

    def epoch(self) -> tuple[tuple[float, float | None, float | None], float]:
        """Train for one epoch; return the mean losses and the time."""
        self.run.train()
        sums, count, start = [0.0, 0.0, 0.0], 0, time.perf_counter()
        for x, y, target in self._batches():
            self.optimizer.zero_grad()
            losses = self.run(x, y, target)
            if self.fabric is None:
                losses.total.backward()
            else:
                self.fabric.backward(losses.total)
            self.optimizer.step()
            count += len(x)
            for i, loss in enumerate(losses[:3]):  # in single: a sum in half soon stops growing
                sums[i] += 0.0 if loss is None else loss.detach().float() * len(x)
        if count == 0:
            raise TargetError("the loader gave no batch; it must yield batches anew every epoch")
        totals = [*map(float, sums), count]
        if self.fabric is not None:
            device = self.step.trained_parameters()[0].device
            totals = self.fabric.all_reduce(torch.tensor(totals, device=device), reduce_op="sum")
        seconds = time.perf_counter() - start
        alpha = self.step.alpha
        means = [float(total / totals[3]) for total in totals[:3]]
        return (
            means[0],
            None if alpha == 1 else means[1],
            None if alpha == 0 else means[2],
        ), seconds

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        like = self.step.trained_parameters()[0]
        loaded = (
            (
                x.to(like.device, like.dtype) if x.is_floating_point() else x.to(like.device),
                y.to(like.device) if y.is_floating_point() else y.to(like.device, torch.long),
            )
            for x, y in pairs(self.loader)
        )
        if self.cache is not None:
            return self.cache.batches(loaded)
        return ((x, y, None) for x, y in loaded)


class _Cache:
    """Inputs, labels and targets of one pass over the loader, in memory; made anew if stale."""

    def __init__(self, step: PostTraining) -> None:
        assert step.targets is not None
        self.step, self.targets = step, step.targets
        self.weights: Weights | None = None
        self.kept: list[Tensor] = []
        self.size = 0

    def batches(self, loaded: Iterator[Batch]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the cached batches in random order."""
        if self.weights is None or not self.weights.match(self.targets.frozen):
            parts = [(x, y, self.step.reconstruct(x, y)) for x, y in loaded]
            if not parts:
                return
            self.size = len(parts[0][0])
            self.kept = [torch.cat(column) for column in zip(*parts, strict=True)]
            self.weights = Weights(self.targets.frozen)
        x, y, target = self.kept
        for chosen in torch.randperm(len(x), device="cpu").split(self.size):
            index = chosen.to(x.device)
            yield x[index], y[index], target[index]


@contextlib.contextmanager
def _progress_bar(show: bool, epochs: int) -> Iterator[Callable[[int], None]]:
    """Give what shows how many epochs are done."""
    if not show:
        yield lambda done: None
        return
    try:
        from rich.progress import Progress
    except ImportError as error:
        raise FrfxError("a progress bar needs rich: pip install 'frfx[cli]'") from error
    with Progress() as bar:
        task = bar.add_task("post-training", total=epochs)
        yield lambda done: bar.update(task, completed=done)
