"""Runs that are trained at once: their weights are stacked, their batches shared by the methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn import functional as F

from paper.settings import LEARNING_RATE, Method
from paper.study import CHUNK, Inputs, Study


class Stack:
    """Post-training of one pair (l_S, l_R) by several methods from several seeds.

    A run differs from the others in its targets and in the order of its batches alone, so that all
    of them are one network with stacked weights ``(seeds, methods, ...)``. The methods of a seed
    read the same batches: a first convolution takes them as more output channels, which costs
    less than a grouped convolution. Adam works entry by entry, so that one optimizer of the stack
    does what an optimizer for each run would do.

    Args:
        study: The baseline and its data.
        pair: (l_S, l_R).
        methods: How to train.
        seeds: Of the orders of the batches.
        alpha: The weight of the reconstruction loss (Eq. 3).
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
        self.batch_size = batch_size
        self.trained, self.tail = study.parts(*pair)
        self.inputs, self.test = study.inputs(pair[0])
        lead = (len(self.seeds), len(self.methods))
        self.weights = {
            name: weight.detach().expand(*lead, *weight.shape).clone().requires_grad_()
            for name, weight in self.trained.named_parameters()
        }
        self.optimizer = torch.optim.Adam(list(self.weights.values()), lr=LEARNING_RATE)
        kinds = [method.targets for method in self.methods]
        self.reconstructing = [i for i, kind in enumerate(kinds) if kind != "none" and alpha > 0]
        self.losses_taken = [self.methods[i].loss for i in self.reconstructing]
        absolute = [loss == "l1" for loss in self.losses_taken]
        self.absolute = torch.tensor(absolute, dtype=torch.bool, device=study.device)
        self.targets = [study.targets(pair[1], kinds[i]) for i in self.reconstructing]
        alphas = torch.zeros(len(kinds), device=study.device)
        alphas[self.reconstructing] = alpha
        self.alphas = alphas
        self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        self.epoch = 0

    def features(self, x: Tensor) -> Tensor:
        """Return what the trained layers make of a batch a seed.

        Args:
            x: ``(seeds, batch, ...)``.

        Returns:
            ``(seeds, methods, batch, ...)``.
        """

        def run(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self.trained, weights, (x,))

        methods = vmap(run, in_dims=(0, None))
        if len(self.seeds) > 1:
            return vmap(methods)(self.weights, x)
        only = {name: weight[0] for name, weight in self.weights.items()}
        if len(self.methods) > 1:
            return methods(only, x[0]).unsqueeze(0)  # one seed needs no grouped convolution
        only = {name: weight[0] for name, weight in only.items()}
        return run(only, x[0]).unsqueeze(0).unsqueeze(0)

    def losses(self, index: Tensor) -> Tensor:
        """Return Eq. 3 for every run.

        Args:
            index: The rows of the batch of every seed, ``(seeds, batch)``.

        Returns:
            ``(seeds, methods)``.
        """
        features = self.features(self.inputs.rows(index))
        logits = self.tail(features.flatten(0, 2))
        labels = self.inputs.labels[index].unsqueeze(1).expand(*features.shape[:3])
        entropy = F.cross_entropy(logits, labels.flatten(), reduction="none")
        loss = (1 - self.alphas) * entropy.view(labels.shape).mean(-1)
        if not self.reconstructing:
            return loss
        targets = torch.stack([targets[index] for targets in self.targets], dim=1)
        if len(self.reconstructing) < len(self.methods):
            features = features[:, self.reconstructing]
        deviations = (features - targets).flatten(2)
        reconstruction = deviations.square().mean(-1)
        if "l1" in self.losses_taken:
            reconstruction = torch.where(self.absolute, deviations.abs().mean(-1), reconstruction)
        weighed = self.alphas[self.reconstructing] * reconstruction
        return loss.index_add(1, torch.tensor(self.reconstructing, device=loss.device), weighed)

    def step(self, index: Tensor) -> None:
        """Train every run on its batch."""
        self.optimizer.zero_grad()
        self.losses(index).sum().backward()
        self.optimizer.step()

    def train(self) -> None:
        """Train for one epoch."""
        count = len(self.inputs)
        orders = torch.stack([torch.randperm(count, generator=g) for g in self.generators])
        for index in orders.to(self.study.device).split(self.batch_size, dim=1):
            self.step(index)
        self.epoch += 1

    @torch.no_grad()
    def accuracies(self) -> Tensor:
        """Return the test accuracy of every run in %, ``(seeds, methods)``."""
        right = torch.zeros(len(self.seeds), len(self.methods), dtype=torch.long)
        for rows, labels in _chunks(self.test):
            features = self.features(rows.expand(len(self.seeds), *rows.shape))
            predicted = self.tail(features.flatten(0, 2)).argmax(-1).view(*features.shape[:3])
            right += (predicted == labels).sum(-1).cpu()
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


def _chunks(inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
    """Return inputs and labels, some at a time."""
    starts = range(0, len(inputs), CHUNK)
    return [(inputs.rows(slice(s, s + CHUNK)), inputs.labels[s : s + CHUNK]) for s in starts]
