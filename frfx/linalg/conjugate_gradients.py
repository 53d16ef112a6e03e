"""Conjugate gradients on a batch of symmetric positive definite systems, each to its own end."""

from __future__ import annotations

import abc
import math
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from frfx.kernels import Kernels
from frfx.linalg.linear_function import Map
from frfx.recording import is_capturing

After = Callable[[Tensor, Tensor], Tensor]
"""Applies an operator to what a preconditioner has made of a residual, given both."""

_BEHIND = 3
"""Steps that a GPU may have waiting before the host looks how the first of them went."""


class Convergence(NamedTuple):
    """How a batch of systems went.

    Attributes:
        residual: The relative residual of the normal equations by sample, shape (N,).
        steps: The steps by sample, shape (N,).
        converged: Whether the residual is within the tolerance, by sample, shape (N,).
    """

    residual: Tensor
    steps: Tensor
    converged: Tensor


def conjugate_gradients(
    operator: Map,
    right: Tensor,
    precondition: Map,
    *,
    tolerance: float,
    max_steps: int,
    kernels: Kernels | None = None,
    after: After | None = None,
) -> tuple[Tensor, Convergence]:
    """Solve a batch of symmetric positive definite systems, each to its own end.

    A sample stops when its residual is within the tolerance, when it can get no smaller in this
    precision, or after the last step. What it returns is its best step, never one worse than zero.
    On a CPU, samples that have stopped leave the batch, so they cost nothing. On a GPU they stay
    and are not written any more; whether all have stopped is learnt some steps late, so that the
    device is never idle, and not at all while a CUDA graph is captured, which holds all steps.

    Args:
        operator: Maps (N, ...) to (N, ...), linear and symmetric positive definite by sample.
        right: The right-hand sides, shape (N, ...).
        precondition: An approximate inverse, symmetric positive definite.
        tolerance: Bound on the norm of a sample's residual relative to its right-hand side.
        max_steps: Bound on the steps.
        kernels: What computes the rest of a step, where it serves; autograd does not see it.
        after: A faster way to apply the operator behind `precondition`, where kernels do not serve.

    Returns:
        The solutions, and how it went.

    Source: Hestenes and Stiefel, 1952; Saad, Iterative Methods for Sparse Linear Systems, Alg. 9.1.
    """
    if kernels is not None and kernels.serve(right):
        batch: _Batch = _KernelBatch(right, tolerance, kernels)
    else:
        batch = _TorchBatch(right, tolerance, after)
    for step in range(1, max_steps + 1):
        if batch.has_stopped():
            break
        batch.step(operator, precondition, step)
    best = batch.best.detach()
    return batch.found, Convergence(best, batch.steps, best <= tolerance)


class _Batch(abc.ABC):
    """A batch on its way, and how a step changes it.

    Args:
        right: The right-hand sides.
        tolerance: Where a sample stops.

    Attributes:
        found: The best step of every sample.
        best: Its relative residual.
        steps: How many steps a sample has gone.
        running: Whether it goes on.
        r: The residuals.
    """

    r: Tensor

    def __init__(self, right: Tensor, tolerance: float) -> None:
        self.tolerance, self.tiny = tolerance, torch.finfo(right.dtype).tiny
        self.norm = norms(right)
        self.found = torch.zeros_like(right, memory_format=torch.contiguous_format)
        self.running = self.norm > self.tiny
        self.best = torch.where(self.running, torch.ones_like(self.norm), 0.0)
        self.steps = torch.zeros(len(right), dtype=torch.long, device=right.device)
        self._asks = right.device.type == "cpu"
        self._news = _News() if right.is_cuda and not is_capturing(right.device) else None

    def has_stopped(self) -> bool:
        """Tell whether no sample is running, as far as is known."""
        if self._asks:
            return not bool(self.running.any())
        return self._news is not None and self._news.all_stopped()

    def step(self, operator: Map, precondition: Map, step: int) -> None:
        """Take a step."""
        p = self.turn(precondition(self.r))
        self.advance(p, operator(p), step)

    @abc.abstractmethod
    def turn(self, z: Tensor) -> Tensor:
        """Return the next direction, given the preconditioned residuals."""

    @abc.abstractmethod
    def advance(self, p: Tensor, q: Tensor, step: int) -> None:
        """Go along a direction, whose image is q."""

    def _tell(self) -> None:
        if self._news is not None:
            self._news.send(self.running)


class _TorchBatch(_Batch):
    """What torch computes, out of place."""

    def __init__(self, right: Tensor, tolerance: float, after: After | None) -> None:
        super().__init__(right, tolerance)
        self._after = after
        self._index: Any = torch.arange(len(right), device="cpu") if self._asks else slice(None)
        self.r = right
        self._x, self._p = torch.zeros_like(right), torch.zeros_like(right)
        self._q = torch.zeros_like(right) if after else right[:0]
        self._height = torch.full_like(self.norm, math.inf)  # no step before the first

    def has_stopped(self) -> bool:
        if super().has_stopped():
            return True
        if not self._asks:
            return False
        alive = self.running[self._index]
        if int(alive.sum()) <= len(self._index) // 2:
            self._index = self._index[alive]
            kept = (self._x, self.r, self._p, self._height)
            self._x, self.r, self._p, self._height = (v[alive] for v in kept)
            self._q = self._q[alive] if self._after else self._q
        return False

    def step(self, operator: Map, precondition: Map, step: int) -> None:
        if self._after is None:
            super().step(operator, precondition, step)
            return
        z = precondition(self.r)
        p, image = self.turn(z), self._after(z, self.r)
        self._q = torch.addcmul(image, self._ratio, self._q)  # as the direction has turned
        self.advance(p, self._q, step)

    def turn(self, z: Tensor) -> Tensor:
        before, self._height = self._height, _dot(self.r, z)
        ratio = self._height / before.clamp(min=self.tiny)
        ratio = torch.where(self.running[self._index], ratio, 0.0)
        self._ratio = by_sample(ratio, z)
        self._p = torch.addcmul(z, self._ratio, self._p)
        return self._p

    def advance(self, p: Tensor, q: Tensor, step: int) -> None:
        index, tiny, height = self._index, self.tiny, self._height
        curvature = _dot(p, q)
        # A breakdown (no curvature left, or none in this precision) ends a sample where it stands.
        goes_on = self.running[index] & (height > tiny)
        sound = goes_on & (curvature > tiny) & torch.isfinite(curvature)
        length = torch.where(sound, height / curvature.clamp(min=tiny), 0.0)
        self._x = torch.addcmul(self._x, by_sample(length, p), p)
        self.r = torch.addcmul(self.r, by_sample(length, p), q, value=-1)
        relative = norms(self.r) / self.norm[index].clamp(min=tiny)
        better = sound & (relative < self.best[index])
        self.best[index] = torch.where(better, relative, self.best[index])
        if self._asks and len(self._x) == len(self.found) and bool(better.all()):
            self.found = self._x
        else:
            self.found[index] = torch.where(by_sample(better, p), self._x, self.found[index])
        self.steps[index] = torch.where(sound, step, self.steps[index])
        self.running[index] = sound & ~(relative <= self.tolerance)
        self._tell()


class _KernelBatch(_Batch):
    """What four kernels compute, in place."""

    def __init__(self, right: Tensor, tolerance: float, kernels: Kernels) -> None:
        super().__init__(right, tolerance)
        self._kernels = kernels
        self.r = right.clone(memory_format=torch.contiguous_format)
        self._x, self._p = torch.zeros_like(self.r), torch.zeros_like(self.r)
        self._heights, self._curvatures, self._squares = (kernels.sums_of(right) for _ in range(3))
        self._before = torch.full_like(self._heights, math.inf)
        self._best_before = torch.empty_like(self.best)
        self._ran = torch.empty_like(self.running)

    def turn(self, z: Tensor) -> Tensor:
        self._kernels.dots(z, self.r, self._heights)
        self._kernels.turn(z, self._p, self._heights, self._before, self.running)
        return self._p

    def advance(self, p: Tensor, q: Tensor, step: int) -> None:
        run, sums = self._kernels, (self._heights, self._curvatures)
        self.best, self._best_before = self._best_before, self.best
        self.running, self._ran = self._ran, self.running
        run.dots(p, q, self._curvatures)
        run.advance(self._x, self.r, p, q, *sums, self._ran, self._squares)
        run.keep(
            self._x, self.found, *sums, self._squares, self.norm, self._best_before, self.best,
            self._ran, self.running, self.steps, step, self.tolerance,
        )  # fmt: skip
        self._heights, self._before = self._before, self._heights
        self._tell()


class _News:
    """Tells the host whether any sample is still running, as it was a few steps ago."""

    def __init__(self) -> None:
        self._sent: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def send(self, running: Tensor) -> None:
        """Start copying the news of a step."""
        flag = running.any().to("cpu", non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(running.device))
        self._sent.append((flag, event))

    def all_stopped(self) -> bool:
        """Tell whether the last step that is known of has left no sample running."""
        stopped = False
        while self._sent:
            flag, event = self._sent[0]
            if len(self._sent) > _BEHIND:
                event.synchronize()  # the device has other steps to go on with
            elif not event.query():
                break
            stopped = not bool(flag)
            self._sent.popleft()
        return stopped


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def norms(x: Tensor) -> Tensor:
    """Return the norm of every sample."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def by_sample(values: Tensor, x: Tensor) -> Tensor:
    """Return a number a sample in a shape that broadcasts with the samples."""
    return values.view(-1, *[1] * (x.ndim - 1))
