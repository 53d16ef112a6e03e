"""Solve without writing anything out: preconditioned conjugate gradients on the operator itself."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from frfx.linalg.backend import Backend, torch_backend
from frfx.linalg.operators import Convolution, Matrix, Transposed
from frfx.linalg.pseudo_inverse import (
    Factor,
    Spectrum,
    largest_singular_value,
    nbytes,
    solve_dtype,
)
from frfx.linalg.spectral import FACTOR_MEMORY, SpectralFactor
from frfx.recording import is_capturing

TOLERANCE = 1e-2
"""Default bound on the relative residual of the normal equations."""

MAX_STEPS = 50
"""Default bound on the steps."""

_BEHIND = 3
"""Steps that a GPU may have waiting before the host looks how the first of them went."""

_PRECONDITIONER_DAMPING = 1e-4
"""The circular model may be singular where the operator is not; its inverse must not explode."""


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


class IterativeFactor(Factor):
    """An operator, a preconditioner and the tolerance.

    The operator is scaled so that its largest entry is 1, and so is every sample of the residual:
    then no product of two scales leaves the range of the precision.

    Attributes:
        operator: What is solved with, scaled.
        scale: What the operator was divided by.
        preconditioner: The inverse Gram matrices of the circular model; None for a matrix.
        spectrum: The singular values of the model, or of the matrix as far as they are known.
        dual: Whether the Gram matrix is that of the rows.
        shift: Tikhonov's parameter, of the scaled operator.
        tolerance: See `Iterative`.
        max_steps: See `Iterative`.
        convergence: How the last solve went; None before it.
    """

    def __init__(
        self,
        operator: Matrix | Convolution | Transposed,
        preconditioner: SpectralFactor | None,
        spectrum: Spectrum,
        *,
        scale: float,
        dual: bool,
        shift: float,
        tolerance: float,
        max_steps: int,
    ) -> None:
        self.operator, self.preconditioner, self.spectrum = operator, preconditioner, spectrum
        self.scale, self.dual, self.shift = scale, dual, shift
        self.tolerance, self.max_steps = tolerance, max_steps
        self.convergence: Convergence | None = None

    @property
    def nbytes(self) -> int:
        """The memory that the scaled operator and the preconditioner hold, in bytes."""
        held = nbytes(_entries(self.operator))
        return held if self.preconditioner is None else held + self.preconditioner.nbytes

    @torch.compiler.disable
    def solve(self, residual: Tensor) -> Tensor:
        """Return `argmin |A d - r|^2 + shift |d|^2` for every sample of the batch."""
        solution = self._solve(residual)
        if is_capturing(residual.device):  # what a graph's memory holds later tells nobody
            self.convergence = None
        return solution

    def _solve(self, residual: Tensor) -> Tensor:
        residual = residual.to(_entries(self.operator).dtype)
        mv, rmv = self.operator.mv, self.operator.rmv
        size = _like(residual.abs().flatten(1).amax(1), residual)
        residual = torch.where(size > 0, residual / size, 0.0)
        # What is not finite comes back as NaN, for a system without a norm is not iterated.
        unscale = size / self.scale
        if self.dual:
            solution, self.convergence = conjugate_gradients(
                lambda y: mv(rmv(y)) + self.shift * y,
                residual,
                self._precondition,
                tolerance=self.tolerance,
                max_steps=self.max_steps,
            )
            return self._no_worse(rmv(solution), residual) * unscale
        solution, self.convergence = conjugate_gradients(
            lambda x: rmv(mv(x)) + self.shift * x,
            rmv(residual),
            self._precondition,
            tolerance=self.tolerance,
            max_steps=self.max_steps,
        )
        return solution * unscale

    def _no_worse(self, deviation: Tensor, residual: Tensor) -> Tensor:
        """Drop what is worse than no deviation.

        A residual out of the operator's reach makes the dual solution as large as the shift is
        small. The operator annihilates it, but not its rounding.
        """
        assert self.convergence is not None
        left, steps, converged = self.convergence
        worse = ~(_norm(residual - self.operator.mv(deviation)) <= _norm(residual))
        self.convergence = Convergence(torch.where(worse, 1.0, left), steps, converged & ~worse)
        return torch.where(_like(worse, deviation), 0.0, deviation)

    def _precondition(self, x: Tensor) -> Tensor:
        return x if self.preconditioner is None else self.preconditioner.solve(x)


def _entries(operator: Matrix | Convolution | Transposed) -> Tensor:
    """Return the tensor that an operator is made of."""
    return operator.matrix if isinstance(operator, Matrix) else operator.kernel


def _scaled(operator: Matrix | Convolution | Transposed, scale: float) -> Any:
    """Return the operator divided by a number, in the precision that is solved in."""
    if isinstance(operator, Transposed):
        return Transposed(_scaled(operator.of, scale))
    entries = _entries(operator)
    entries = entries.to(solve_dtype(entries.dtype)) / scale
    return Matrix(entries) if isinstance(operator, Matrix) else operator.with_kernel(entries)


def conjugate_gradients(operator, right, precondition, *, tolerance, max_steps):  # type: ignore[no-untyped-def]
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

    Returns:
        The solutions, and how it went.

    Source: Hestenes and Stiefel, 1952; Saad, Iterative Methods for Sparse Linear Systems, Alg. 9.1.
    """
    samples = len(right)
    asks = right.device.type == "cpu"
    news = _News() if right.is_cuda and not is_capturing(right.device) else None
    tiny = torch.finfo(right.dtype).tiny
    norm = _norm(right)
    found = torch.zeros_like(right)
    best = torch.ones_like(norm)
    steps = torch.zeros(samples, dtype=torch.long, device=right.device)
    running = norm > tiny
    best = torch.where(running, best, 0.0)
    index: Any = torch.arange(samples) if asks else slice(None)
    x, r, p = torch.zeros_like(right), right, torch.zeros_like(right)
    rz = torch.full_like(norm, math.inf)  # nothing of a step before the first
    for step in range(1, max_steps + 1):
        if asks:
            alive = running[index]
            if not bool(alive.any()):
                break
            if int(alive.sum()) <= len(index) // 2:
                index = index[alive]
                x, r, p, rz = (v[alive] for v in (x, r, p, rz))
        elif news is not None and news.all_stopped():
            break
        z = precondition(r)
        before, rz = rz, _dot(r, z)
        ratio = torch.where(running[index], rz / before.clamp(min=tiny), 0.0)
        p = torch.addcmul(z, _like(ratio, z), p)
        q = operator(p)
        curvature = _dot(p, q)
        # A breakdown (no curvature left, or none in this precision) ends a sample where it stands.
        sound = running[index] & (curvature > tiny) & (rz > tiny) & torch.isfinite(curvature)
        length = torch.where(sound, rz / curvature.clamp(min=tiny), 0.0)
        x = torch.addcmul(x, _like(length, x), p)
        r = torch.addcmul(r, _like(length, r), q, value=-1)
        relative = _norm(r) / norm[index].clamp(min=tiny)
        better = sound & (relative < best[index])
        best[index] = torch.where(better, relative, best[index])
        if asks and len(x) == samples and bool(better.all()):
            found = x
        else:
            found[index] = torch.where(_like(better, x), x, found[index])
        steps[index] = torch.where(sound, step, steps[index])
        running[index] = sound & ~(relative <= tolerance)
        if news is not None:
            news.send(running)
    return found, Convergence(best.detach(), steps, best.detach() <= tolerance)


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


def _norm(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a.flatten(1), dim=1)


def _like(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Iterative:
    """Conjugate gradients on the normal equations of the operator itself, matrix-free.

    Where A has no more rows than columns, `(A A^T + shift) y = r` and `d = A^T y`, whatever the
    preconditioner the least-norm solution; otherwise `(A^T A + shift) d = A^T r`. The
    preconditioner is the inverse of the same Gram matrix of the circular model. The normal
    equations square the condition number, so they are damped at least by the machine epsilon: what
    is singular, or nearly so, cannot make them diverge.

    Attributes:
        damping: Tikhonov's parameter relative to the squared largest singular value.
        tolerance: Bound on the residual of the normal equations, relative by sample.
        max_steps: Bound on the steps.
        memory: Bound in bytes on the preconditioner.
    """

    damping: float = 0.0
    tolerance: float = TOLERANCE
    max_steps: int = MAX_STEPS
    memory: float = FACTOR_MEMORY
    name = "iterative"

    def prepare(
        self,
        operator: Matrix | Convolution | Transposed,
        backend: Backend = torch_backend,
        spectrum: Spectrum | None = None,
    ) -> IterativeFactor:
        """Make the preconditioner, from a model whose spectrum may be known."""
        scale = float(_entries(operator).abs().amax()) or 1.0
        operator = _scaled(operator, scale)
        damping = max(self.damping, torch.finfo(_entries(operator).dtype).eps)
        if isinstance(operator, Matrix):
            dual = operator.matrix.shape[0] <= operator.matrix.shape[1]
            largest = largest_singular_value(operator.matrix)
            spectrum, preconditioner = Spectrum(largest, math.nan, deficient=False), None
        else:
            dual = math.prod(operator.out_shape) <= math.prod(operator.in_shape)
            preconditioner = SpectralFactor(
                operator,
                cutoff=-1.0,  # a preconditioner has no null space
                damping=max(damping, _PRECONDITIONER_DAMPING),
                gram="rows" if dual else "columns",
                memory=self.memory,
                spectrum=None if spectrum is None else spectrum / scale,
                backend=backend,
            )
            spectrum = preconditioner.spectrum
        return IterativeFactor(
            operator,
            preconditioner,
            Spectrum(scale * spectrum.largest, scale * spectrum.smallest, spectrum.deficient),
            scale=scale,
            dual=dual,
            shift=damping * spectrum.largest**2,
            tolerance=self.tolerance,
            max_steps=self.max_steps,
        )
