"""Runs that are trained at once: their weights are stacked, their batches shared by the methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paper.settings import LEARNING_RATE, Method
from paper.study import CHUNK, Inputs, Study, rows


class Stack:
    """Post-training of one pair (l_S, l_R) by several methods from several seeds.

    A run differs from the others in its loss and in the order of its batches alone, so that all of
    them are one network with stacked weights ``(seeds, methods, ...)``. Feature maps hold the runs
    side by side as channels, ``(batch, runs * channels, height, width)``, and the channels last in
    memory: with the few channels of these networks, a run more costs a convolution or a pooling
    little. The methods of a seed read the same batches, so that the first convolution has no
    groups but the seeds. Adam works entry by entry, so that one optimizer of the stack does what
    an optimizer for each run would do.

    Args:
        study: The baseline and its data.
        pair: (l_S, l_R).
        methods: How to train.
        seeds: Of the orders of the batches.
        alpha: The weight of the reconstruction loss (Eq. 3) for methods that have none of their
            own.
        batch_size: Images a step.
    """

    def __init__(
        self,
        study: Study,
        pair: tuple[int, int],
        methods: Sequence[Method],
        seeds: Sequence[int],
        alpha: float,
        batch_size: int,
    ) -> None:
        self.study, self.methods, self.seeds = study, tuple(methods), tuple(seeds)
        self.batch_size, self.layer = batch_size, pair[1]
        self.trained, self.tail = map(pool_first, study.parts(*pair))
        self.inputs, self.test = study.inputs(pair[0])
        lead = (len(self.seeds), len(self.methods))
        self.weights = {
            name: weight.detach().expand(*lead, *weight.shape).clone().requires_grad_()
            for name, weight in self.trained.named_parameters()
        }
        self.optimizer = torch.optim.Adam(list(self.weights.values()), lr=LEARNING_RATE)
        alphas = [method.weight(alpha) for method in self.methods]
        self.classifying = _rows([weight < 1 for weight in alphas], study.device)
        self.reconstructing = _rows([weight > 0 for weight in alphas], study.device)
        asked = [self.methods[i] for i in self.reconstructing.tolist()]
        self.distances = [method.loss for method in asked]
        # By method and seed: only fresh targets differ by the seed.
        self.targets = [
            [study.targets(pair[1], method.targets)] * len(self.seeds) for method in asked
        ]
        scales = [study.scale(pair[1], m.targets) if m.relative else 1.0 for m in asked]
        weights = torch.tensor(alphas, device=study.device)
        self.weight_cls = 1 - weights[self.classifying]
        self.weight_rec = weights[self.reconstructing] / torch.tensor(scales, device=study.device)
        self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        self.epoch = 0

    def features(self, x: Tensor) -> Tensor:
        """Return what the trained layers make of a batch a seed.

        Args:
            x: ``(seeds, batch, ...)``.

        Returns:
            ``(seeds, methods, batch, ...)``.
        """
        lead = (len(self.seeds), len(self.methods))
        runs, groups = lead[0] * lead[1], lead[0]  # all runs of a seed read the same to begin with
        maps = x.ndim == 5
        h = x.transpose(0, 1).flatten(1, 2) if maps else x.unsqueeze(1)
        for name, module in self.trained.named_children():
            if isinstance(module, nn.Flatten):
                h = h.unflatten(1, (lead[0], groups // lead[0], -1)).flatten(3).movedim(0, 2)
                maps = False
            elif isinstance(module, nn.Conv2d):
                weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
                h = h.contiguous(memory_format=torch.channels_last)
                h = F.conv2d(h, weight.flatten(0, 2), bias.flatten(), groups=groups)
                groups = runs
            elif isinstance(module, nn.Linear):
                weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
                h = h @ weight.mT + bias.unsqueeze(2)
            else:
                h = module(h)
        return h.unflatten(1, (*lead, -1)).movedim(0, 2) if maps else h

    def losses(self, index: Tensor) -> Tensor:
        """Return Eq. 3 for every run.

        Args:
            index: The rows of the batch of every seed, ``(seeds, batch)``.

        Returns:
            ``(seeds, methods)``.
        """
        features = self.features(self.inputs.rows(index))
        loss = features.new_zeros(features.shape[:2])
        if len(self.classifying):
            asked = _select(features, self.classifying)
            labels = self.inputs.labels[index].unsqueeze(1).expand(*asked.shape[:3])
            entropy = F.cross_entropy(
                self._logits(asked).flatten(0, 2), labels.flatten(), reduction="none"
            )
            weighed = self.weight_cls * entropy.view(labels.shape).mean(-1)
            loss = loss.index_add(1, self.classifying, weighed)
        if len(self.reconstructing):
            asked = _select(features, self.reconstructing).unbind(1)
            distances = [
                _distance(feature, _targets(by_seed, index), loss=name)
                for feature, by_seed, name in zip(asked, self.targets, self.distances, strict=True)
            ]
            distance = torch.stack(distances, dim=1)
            loss = loss.index_add(1, self.reconstructing, self.weight_rec * distance)
        return loss

    def _logits(self, features: Tensor) -> Tensor:
        """Return what the frozen tail makes of features, ``(seeds, methods, batch, classes)``."""
        h = features.flatten(0, 2)
        if h.ndim == 4:
            h = h.contiguous(memory_format=torch.channels_last)
        return self.tail(h).unflatten(0, features.shape[:3])

    def _refresh(self) -> None:
        """Reconstruct anew the targets that are to follow the weights."""
        if self.epoch == 0:
            return  # the baseline's
        for by_seed, i in zip(self.targets, self.reconstructing.tolist(), strict=True):
            for seed in range(len(self.seeds)) if self.methods[i].fresh else ():
                weights = {name: w[seed, i].detach() for name, w in self.weights.items()}
                kind = self.methods[i].targets
                by_seed[seed] = self.study.fresh_targets(self.layer, kind, weights)

    def step(self, index: Tensor) -> None:
        """Train every run on its batch."""
        self.optimizer.zero_grad()
        self.losses(index).sum().backward()
        self.optimizer.step()

    def train(self) -> None:
        """Train for one epoch."""
        self._refresh()
        count = len(self.inputs)
        orders = torch.stack([torch.randperm(count, generator=g) for g in self.generators])
        for index in orders.to(self.study.device).split(self.batch_size, dim=1):
            self.step(index)
        self.epoch += 1

    @torch.no_grad()
    def accuracies(self) -> Tensor:
        """Return the test accuracy of every run in %, ``(seeds, methods)``."""
        right = torch.zeros(len(self.seeds), len(self.methods), dtype=torch.long)
        for some, labels in _chunks(self.test):
            features = self.features(some.expand(len(self.seeds), *some.shape))
            right += (self._logits(features).argmax(-1) == labels).sum(-1).cpu()
        return 100 * right.double() / len(self.test)

    def state(self) -> dict[str, Any]:
        """Return what a stack of the same runs needs to go on from here."""
        return {
            "epoch": self.epoch,
            "weights": {name: weight.detach() for name, weight in self.weights.items()},
            "optimizer": self.optimizer.state_dict(),
            "generators": [generator.get_state() for generator in self.generators],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.epoch = state["epoch"]
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        for generator, saved in zip(self.generators, state["generators"], strict=True):
            generator.set_state(saved)


def pool_first(part: nn.Sequential) -> nn.Sequential:
    """Return layers with every max pooling before the tanh that it follows: the same function,
    for tanh increases, with a quarter of the entries to take the tanh of.
    """
    modules = list(part.named_children())
    for i in range(len(modules) - 1):
        if isinstance(modules[i][1], nn.Tanh) and isinstance(modules[i + 1][1], nn.MaxPool2d):
            modules[i], modules[i + 1] = modules[i + 1], modules[i]
    ordered = nn.Sequential()
    for name, module in modules:
        ordered.add_module(name, module)
    return ordered


def _rows(chosen: Sequence[bool], device: torch.device) -> Tensor:
    """Return where a condition holds."""
    return torch.tensor(chosen, device=device).nonzero().flatten()


def _select(features: Tensor, methods: Tensor) -> Tensor:
    """Return the features of some methods."""
    return features if len(methods) == features.shape[1] else features[:, methods]


def _targets(by_seed: Sequence[Tensor], index: Tensor) -> Tensor:
    """Return the targets of the batch of every seed."""
    found = list(map(rows, by_seed, index))
    return torch.stack(found) if len(found) > 1 else found[0].unsqueeze(0)


def _distance(features: Tensor, targets: Tensor, loss: str) -> Tensor:
    """Return the mean distance of a batch of every seed, ``(seeds,)``."""
    distance = {"mse": F.mse_loss, "l1": F.l1_loss}[loss]
    apart = distance(features, targets, reduction="none")
    return apart.mean(tuple(range(1, apart.ndim)))


def _chunks(inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
    """Return inputs and labels, some at a time."""
    starts = range(0, len(inputs), CHUNK)
    return [(inputs.rows(slice(s, s + CHUNK)), inputs.labels[s : s + CHUNK]) for s in starts]
