"""A baseline cut in three: a frozen front that is run once, layers that train, a frozen tail."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import frfx
from frfx import data, rules

CHUNK = 1000
"""Images that pass through a frozen part at once."""

WHOLE = 2**30
"""Bytes up to which normalised images are kept; more are normalised batch by batch."""

EMBEDDINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one-hot": rules.one_hot,
    "maximum-assignment": rules.maximum_assignment,
    "nearest-embedding": rules.nearest_embedding,
}
"""Labels as logits: functions of the forward logits and the labels."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the trained layers read, in memory, and the labels.

    Attributes:
        values: Features ``(N, ...)``, or images as bytes that are normalised when they are read.
        labels: ``(N,)``.
    """

    values: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: Tensor | slice) -> Tensor:
        """Return some of the inputs as float32."""
        some = rows(self.values, index)
        return data.instance_normalise(some) if some.dtype == torch.uint8 else some


def rows(values: Tensor, index: Tensor | slice) -> Tensor:
    """Return some rows of a tensor, feature maps with the channels last in memory as they are."""
    return values.movedim(1, -1)[index].movedim(-1, -3) if values.ndim == 4 else values[index]


class Study:
    """A trained baseline and its data.

    Everything that a run needs and no run changes is computed here once, and kept for as long as
    the runs that need it: the output of the frozen front, and the targets. Both depend on the
    baseline alone, for the paper augments nothing.

    Args:
        model: A network of `frfx.networks`: a `torch.nn.Sequential`.
        train: To train on.
        test: To measure the accuracy on.
    """

    def __init__(self, model: nn.Module, train: data.Images, test: data.Images) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.train, self.test = train, test
        self.device = next(self.model.parameters()).device
        names = [name for name, _ in self.model.named_children()]
        rows = [row for row in frfx.layers(self.model) if row.index is not None]
        ends = {row.index: 1 + names.index(row.name) for row in rows if row.index}
        self._ends = [0, *(ends[index] for index in sorted(ends))]
        self._inputs: tuple[int, Inputs, Inputs] | None = None
        self._targets: dict[tuple[int, str], Tensor] = {}

    @property
    def n_layers(self) -> int:
        """The paper's L."""
        return len(self._ends) - 1

    def part(self, start: int, end: int) -> nn.Sequential:
        """Return the layers start + 1 to end, sharing their weights."""
        modules = list(self.model.named_children())[self._ends[start] : self._ends[end]]
        part = nn.Sequential()
        for name, module in modules:
            part.add_module(name, module)
        return part

    def parts(self, l_s: int, l_r: int) -> tuple[nn.Sequential, nn.Sequential]:
        """Return the trained layers and the frozen tail."""
        if not 0 <= l_s < l_r <= self.n_layers:
            raise frfx.LayerError(
                f"no pair ({l_s}, {l_r}) of {self.n_layers} layers: 0 <= l_S < l_R <= L"
            )
        trained, tail = (
            self.part(start, end) for start, end in pairwise((l_s, l_r, self.n_layers))
        )
        return trained, tail

    def inputs(self, l_s: int) -> tuple[Inputs, Inputs]:
        """Return what layer l_S + 1 reads, to train and to test."""
        if self._inputs is None or self._inputs[0] != l_s:
            self._inputs = None  # the old ones go before the new ones come
            front = self.part(0, l_s)
            self._inputs = (l_s, *(self._read(front, images) for images in (self.train, self.test)))
        return self._inputs[1:]

    def _read(self, front: nn.Sequential, images: data.Images) -> Inputs:
        labels = images.labels.to(self.device)
        if len(front) == 0 and images.images.numel() * 4 > WHOLE:
            return Inputs(images.images.to(self.device), labels)
        return Inputs(self._collect(images, lambda x, _: front(x)), labels)

    def targets(self, l_r: int, kind: str) -> Tensor:
        """Return the targets of all training images.

        Args:
            l_r: The layer.
            kind: ``"forward"`` for the baseline's own feature, a key of `EMBEDDINGS` for the
                logits, or a policy of `frfx.invert`.

        Raises:
            frfx.LayerError: If labels are to be embedded below the logits.
        """
        if any(layer != l_r for layer, _ in self._targets):
            self._targets.clear()
        if (l_r, kind) not in self._targets:
            compute: Callable[[Tensor, Tensor], Tensor]
            if kind == "forward":
                front = self.part(0, l_r)
                compute = lambda x, _: front(x)  # noqa: E731
            elif kind in EMBEDDINGS:
                if l_r != self.n_layers:
                    raise frfx.LayerError(f"{kind} gives logits, not the feature of layer {l_r}")
                compute = lambda x, y: EMBEDDINGS[kind](self.model(x), y)  # noqa: E731
            else:
                compute = frfx.invert(self.model, l_r, policy=kind)
            self._targets[l_r, kind] = self._collect(self.train, compute)
        return self._targets[l_r, kind]

    def fresh_targets(self, l_r: int, kind: str, weights: dict[str, Tensor]) -> Tensor:
        """Return the targets that a policy reconstructs where some weights are others by now."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(weights, strict=False)
        return self._collect(self.train, frfx.invert(model, l_r, policy=kind))

    def scale(self, l_r: int, kind: str) -> float:
        """Return the mean squared distance of targets from the baseline's own feature; 1 for 0."""
        targets, features = self.targets(l_r, kind), self.targets(l_r, "forward")
        squares = [
            F.mse_loss(a, b)
            for a, b in zip(targets.split(CHUNK), features.split(CHUNK), strict=True)
        ]
        sizes = torch.tensor([len(a) for a in targets.split(CHUNK)], device=self.device)
        return float((torch.stack(squares) * sizes).sum() / sizes.sum()) or 1.0

    def forget_targets(self) -> None:
        """Drop all targets; they are computed anew when they are asked for."""
        self._targets.clear()

    @torch.no_grad()
    def _collect(self, images: data.Images, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return what a function makes of all images, written into one tensor."""
        found, start = torch.empty(0), 0
        for x, y in images.batches(CHUNK, device=self.device):
            values = compute(x, y)
            if start == 0:
                found = values.new_empty(len(images), *values.shape[1:])
                if found.ndim == 4:
                    found = found.contiguous(memory_format=torch.channels_last)
            found[start : start + len(values)] = values
            start += len(values)
        return found
