"""The loop: post-train modules of a network over a data loader."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frfx.compiler.outputs import follow, locate
from frfx.compiler.prepare import Weights
from frfx.errors import FrfxError, InputError, TargetError, first_line
from frfx.policy import Policy
from frfx.posttrain.step import PostTraining
from frfx.view import evaluation_view

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class EpochRecord:
    """What an epoch of post-training came to.

    Attributes:
        epoch: Counted from 1.
        loss: The mean over samples, of all processes, of the total loss (Eq. 3).
        classification: The mean of Eq. 1; None where alpha is 1.
        reconstruction: The mean of Eq. 2; None where alpha is 0.
        val_accuracy: The share of right predictions on `val_loader` after the epoch, if given.
        seconds: Wall time of the training part, without the validation.
    """

    epoch: int
    loss: float
    classification: float | None
    reconstruction: float | None
    val_accuracy: float | None
    seconds: float


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
) -> list[EpochRecord]:
    """Post-train the layers `l_S + 1 .. l_R` of a network in place, the rest frozen.

    Args:
        model: The network; the parameters of those layers are trained, everything else comes back
            as it was, after an exception too.
        loader: Yields batches (x, y) anew for every epoch.
        upto_layer: `l_R`, as for `frfx.invert`.
        freeze_upto: `l_S`, as for `PostTraining`.
        alpha: The weight of the reconstruction loss (Eq. 3); 0 is plain backpropagation.
        epochs: How many epochs in all, those before a resume included.
        policy: How features are reconstructed, as for `frfx.invert`.
        backend: As for `frfx.invert`.
        optimizer: Makes the optimizer from the trained parameters; None for the paper's Adam with
            a learning rate of 1e-3.
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
            anew with a resume.
        progress: Whether to show a progress bar (extra `frfx[cli]`).
        example_input: A batch; needed only for models that symbolic tracing cannot follow.
        output: Which of several tensors that the model returns is its output, as for
            `frfx.invert`.
        weighing: How alpha weighs the reconstruction loss, as for `PostTraining`; after a resume
            the mean that ``"relative"`` divides by is taken anew.

    Returns:
        One record an epoch, those before a resume included.

    Raises:
        LayerError, UnsupportedOpsError, TargetError: As `PostTraining` does, or for a choice of
            `targets` that does not exist.
        FrfxError: If the checkpoint cannot be read, or is of other layers.
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
    )
    with step, _progress_bar(progress, epochs) as advance:
        make = optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=1e-3))
        loop = _Loop(step, make(step.trained_parameters()), loader, targets == "cache", fabric)
        history = loop.load(checkpoint)
        for epoch in range(len(history) + 1, epochs + 1):
            losses, seconds = loop.epoch()
            scored = None if val_loader is None else accuracy(model, val_loader, output)
            history.append(EpochRecord(epoch, *losses, val_accuracy=scored, seconds=seconds))
            loop.save(checkpoint, history)
            advance()
    return history


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
        device = self.step.trained_parameters()[0].device
        loaded = ((x.to(device), y.to(device)) for x, y in self.loader)
        if self.cache is not None:
            return self.cache.batches(loaded)
        return ((x, y, None) for x, y in loaded)

    def save(self, path: str | Path | None, history: list[EpochRecord]) -> None:
        """Save everything that a resume needs."""
        if path is None:
            return
        targets = self.step.targets
        state = {
            "trained": [p.detach() for p in self.step.trained_parameters()],
            "buffers": self.step.trained_buffers(),
            "optimizer": self.optimizer.state_dict(),
            "reference": None if targets is None else targets.state(),
            "history": [asdict(record) for record in history],
        }
        if self.fabric is not None:
            self.fabric.save(path, state)
            return
        partial = Path(f"{path}.partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, partial)
        partial.replace(path)  # an interrupted save leaves the last one whole

    def load(self, path: str | Path | None) -> list[EpochRecord]:
        """Take up what `save` left, if it is there; return the history."""
        if path is None or not Path(path).exists():
            return []
        tensors = [*self.step.trained_parameters(), *self.step.trained_buffers()]
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            trained = [*state["trained"], *state["buffers"]]
        except Exception as error:  # a file of another kind fails in many ways
            raise FrfxError(f"{str(path)!r} is no checkpoint of post-training") from error
        if [tensor.shape for tensor in tensors] != [saved.shape for saved in trained]:
            raise FrfxError(
                f"the checkpoint {str(path)!r} is of other layers: the shapes it holds are not "
                "those of the parameters that are trained here"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for tensor, saved in zip(tensors, trained, strict=True):
                tensor.copy_(saved)
        if self.step.targets is not None and state["reference"] is not None:
            self.step.targets.load(state["reference"])
        return [EpochRecord(**record) for record in state["history"]]


class _Cache:
    """Inputs, labels and targets of one pass over the loader, in memory; made anew if stale."""

    def __init__(self, step: PostTraining) -> None:
        assert step.targets is not None
        self.targets = step.targets
        self.weights: Weights | None = None
        self.kept: list[Tensor] = []
        self.size = 0

    def batches(self, loaded: Iterator[Batch]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the cached batches in random order."""
        if self.weights is None or not self.weights.match(self.targets.frozen):
            parts = [(x, y, self.targets(x, y)) for x, y in loaded]
            if not parts:
                return
            self.size = len(parts[0][0])
            self.kept = [torch.cat(column) for column in zip(*parts, strict=True)]
            self.weights = Weights(self.targets.frozen)
        x, y, target = self.kept
        for chosen in torch.randperm(len(x)).split(self.size):
            index = chosen.to(x.device)
            yield x[index], y[index], target[index]


@torch.no_grad()
def accuracy(model: nn.Module, loader: Iterable[Batch], output: str | int | None = None) -> float:
    """Return the share of samples whose largest output is the label, in evaluation mode.

    Args:
        model: Any classifier, of outputs (N, K, ...), or of labels (N, ...) if it ends in argmax;
            its mode is not touched.
        loader: Yields batches (x, y) of inputs and integer labels (N, ...); inputs are moved and
            cast to the model's type.
        output: Which of several tensors that the model returns is its output, as for
            `frfx.invert`.

    Raises:
        InputError: If the model cannot take a batch.
        LayerError: If there is no such output.
        TargetError: If the labels do not fit the outputs, or there are none.
    """
    view = evaluation_view(model, inplace=True)
    weight = next((p for p in view.parameters() if p.is_floating_point()), None)
    right: Tensor | int = 0
    count = 0
    for x, y in loader:
        if weight is not None:
            x = x.to(weight.device, weight.dtype if x.is_floating_point() else x.dtype)
        try:
            value = view(x)
        except Exception as error:  # whatever torch says of an input that does not fit
            raise InputError(
                f"the model cannot take a batch of shape {tuple(x.shape)}: {first_line(error)}"
            ) from error
        scores = follow(value, locate(value, output))
        predicted = scores.argmax(1) if scores.is_floating_point() else scores
        if predicted.shape != y.shape:
            raise TargetError(
                f"labels of shape {tuple(y.shape)} do not fit outputs of shape "
                f"{tuple(scores.shape)}: expected {tuple(predicted.shape)}"
            )
        right = right + (predicted == y.to(predicted.device)).sum()
        count += y.numel()
    if count == 0:
        raise TargetError("the loader gave no batch")
    return int(right) / count


@contextlib.contextmanager
def _progress_bar(show: bool, epochs: int) -> Iterator[Callable[[], None]]:
    if not show:
        yield lambda: None
        return
    try:
        from rich.progress import Progress
    except ImportError as error:
        raise FrfxError("a progress bar needs rich: pip install 'frfx[cli]'") from error
    with Progress() as bar:
        task = bar.add_task("post-training", total=epochs)
        yield lambda: bar.advance(task)
