"""What a run costs: time of a step, memory of a step, and the targets, once."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

import frfx
from paper.baseline import batch_size
from paper.settings import LEARNING_RATE, method
from paper.stack import Stack
from paper.study import Study

PLAIN = "plain"
"""Backpropagation as it is usually written: the frozen front is run in every step."""


@dataclass(frozen=True)
class Cost:
    """What a run of one method costs.

    Attributes:
        parameters: How many are trained.
        step: Seconds a training step; on a CPU, of the process.
        memory: MB (1e6 bytes): on a GPU the peak of allocated memory in a step; on a CPU the most
            bytes of tensors alive at once in a step, with weights, gradients, Adam's moments and
            the batch, but without the data set.
        targets: Seconds for the targets of the whole training set, computed once.
    """

    parameters: int
    step: float
    memory: float
    targets: float


def measure(
    study: Study, pair: tuple[int, int], methods: list[str], alpha: float, rounds: int = 5
) -> dict[str, Cost]:
    """Measure methods beside each other, one run each.

    Args:
        study: The baseline and its data.
        pair: (l_S, l_R).
        methods: Their names; `PLAIN` is measured with them.
        alpha: The weight of the reconstruction loss.
        rounds: How often all take turns; the fastest turn counts.
    """
    size, device = batch_size(study.train), study.device
    index = torch.arange(size, device=device)
    steps: dict[str, Callable[[], None]] = {PLAIN: _plain(study, pair, size)}
    seconds, by_targets = dict.fromkeys([PLAIN, *methods], 0.0), dict[str, float]()
    study.forget_targets()
    for name in methods:
        chosen = method(name)
        if chosen.targets != "none":
            start = _clock(device)
            study.targets(pair[1], chosen.targets)
            taken = _clock(device) - start  # next to nothing for the second method that has them
            seconds[name] = by_targets.setdefault(chosen.targets, taken)
        stack = Stack(study, pair, [chosen], [0], alpha, size)
        steps[name] = lambda stack=stack: stack.step(index.unsqueeze(0))
        parameters = sum(weight[0, 0].numel() for weight in stack.weights.values())
    fastest = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            start = _clock(device)
            for _ in range(4):
                step()
            fastest[name] = min(fastest[name], (_clock(device) - start) / 4)
    resident = _resident(study, parameters)
    return {
        name: Cost(parameters, fastest[name], peak(step, device, resident) / 1e6, seconds[name])
        for name, step in steps.items()
    }


def _plain(study: Study, pair: tuple[int, int], size: int) -> Callable[[], None]:
    model = copy.deepcopy(study.model).requires_grad_(True)
    step = frfx.PostTraining(model, freeze_upto=pair[0], upto_layer=pair[1], alpha=0.0)
    optimizer = torch.optim.Adam(step.trained_parameters(), lr=LEARNING_RATE)
    inputs = study.inputs(0)[0]
    index = torch.arange(size, device=study.device)

    def run() -> None:
        optimizer.zero_grad()
        step(inputs.rows(index), inputs.labels[index]).total.backward()
        optimizer.step()

    return run


def _resident(study: Study, parameters: int) -> int:
    """Return the bytes that live through a step: all weights, Adam's two moments, gradients."""
    weights = sum(weight.numel() for weight in study.model.parameters())
    return 4 * (weights + 3 * parameters)


def peak(step: Callable[[], None], device: torch.device, resident: int = 0) -> int:
    """Return the most bytes that are allocated at once during a call.

    Args:
        step: What is called, after it was called once.
        device: Where its tensors are.
        resident: Bytes that are there before, on a CPU, where no allocator keeps count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before + resident
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most + resident


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()
