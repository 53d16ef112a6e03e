"""Solve without writing anything out: preconditioned conjugate gradients on the operator itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from frfx.linalg.autocorrelation import Side
from frfx.linalg.backend import Backend, torch_backend
from frfx.linalg.conjugate_gradients import (
    Convergence,
    by_sample,
    conjugate_gradients,
    norms,
)
from frfx.linalg.edges import Edges
from frfx.linalg.linear_function import Map, linear_function
from frfx.linalg.operators import Convolution, Matrix, Transposed, convolution_of
from frfx.linalg.pseudo_inverse import (
    Factor,
    Spectrum,
    largest_singular_value,
    solve_dtype,
)
from frfx.linalg.spectral import FACTOR_MEMORY, SpectralFactor
from frfx.recording import is_capturing

TOLERANCE = 1e-2
"""Default bound on the relative residual of the normal equations."""

MAX_STEPS = 50
"""Default bound on the steps."""

_ROUNDING = 100.0
"""Units of rounding, times the condition number, that a product behind the preconditioner is off by
at most: 10 to 20 have been seen, whatever that number."""

_PRECONDITIONER_DAMPING = 1e-4
"""The circular model may be singular where the operator is not; its inverse must not explode."""


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
        edges: What multiplies with the Gram matrix behind the preconditioner; None where the
            operator itself does.
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
        edges: Edges | None = None,
        backend: Backend = torch_backend,
    ) -> None:
        self.operator, self.preconditioner, self.spectrum = operator, preconditioner, spectrum
        self.scale, self.dual, self.shift = scale, dual, shift
        self.tolerance, self.max_steps, self._backend = tolerance, max_steps, backend
        self.edges = edges
        self.convergence: Convergence | None = None

    @property
    def nbytes(self) -> int:
        """The memory that the scaled operator and the preconditioner hold, in bytes."""
        held = _entries(self.operator).nbytes
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
        # To autograd a constant: what a solution of a scaled residual is scaled back by.
        size = by_sample(residual.detach().abs().flatten(1).amax(1), residual)
        size = torch.where(size == 0, 1.0, size)
        residual = residual / size
        # What is not finite comes back as NaN, for a system without a norm is not iterated.
        unscale = size / self.scale
        if self.dual:
            solution = self._iterate(lambda y: mv(rmv(y)), residual)
            return self._checked(rmv(solution), residual) * unscale
        solution = self._iterate(lambda x: rmv(mv(x)), rmv(residual))
        return solution * unscale

    def _iterate(self, gram: Map, right: Tensor) -> Tensor:
        """Solve with a Gram matrix of the operator, shifted."""
        went: list[Convergence] = []

        def solve(right: Tensor) -> Tensor:
            solution, convergence = conjugate_gradients(
                lambda p: torch.add(gram(p), p, alpha=self.shift),
                right,
                self._precondition,
                tolerance=self.tolerance,
                max_steps=self.max_steps,
                kernels=self._backend.kernels,
                after=None if self.edges is None else self._after,
            )
            went.append(convergence)
            return solution

        # A symmetric map: its gradients and tangents are solutions, too, and no step is recorded.
        solution = linear_function(solve, solve, right)
        self.convergence = went[0]
        return solution

    def _checked(self, deviation: Tensor, residual: Tensor) -> Tensor:
        """Tell where rounding has spoiled the deviation, and drop what is worse than none.

        A residual out of the operator's reach makes the dual solution as large as the shift is
        small. The operator annihilates it, but not its rounding: which the dual system does not
        show, but the normal equations do.
        """
        assert self.convergence is not None
        left, steps, _ = self.convergence
        with torch.no_grad():
            missing = residual - self.operator.mv(deviation)
            gradient = self.operator.rmv(missing) - self.shift * deviation
            size = norms(residual)
            worse = ~(norms(missing) <= size)
            # What a residual of that size leaves in the normal equations, at most.
            most = 2 * self.spectrum.largest / self.scale * _copies(self.operator) ** 0.5 * size
            seen = norms(gradient) / torch.where(most > 0, most, 1.0)
            left = torch.where(worse, 1.0, left.maximum(seen.clamp(max=1.0)))
        self.convergence = Convergence(left, steps, left <= self.tolerance)
        return torch.where(by_sample(worse, deviation), 0.0, deviation)

    def _after(self, z: Tensor, r: Tensor) -> Tensor:
        """Multiply with the shifted Gram matrix, once the preconditioner has."""
        assert self.edges is not None
        return self.edges.product(z, r).add_(z, alpha=self.shift)

    def _precondition(self, x: Tensor) -> Tensor:
        return x if self.preconditioner is None else self.preconditioner.solve(x)


def _entries(operator: Matrix | Convolution | Transposed) -> Tensor:
    """Return the tensor that an operator is made of."""
    return operator.matrix if isinstance(operator, Matrix) else operator.kernel


def _copies(operator: Matrix | Convolution | Transposed) -> int:
    """Return how often padding copies an entry, at most: by as much the model may fall short."""
    if isinstance(operator, Matrix) or convolution_of(operator).padding_mode == "zeros":
        return 1
    return math.prod(1 + sum(pair) for pair in convolution_of(operator).padding)


def _scaled(
    operator: Matrix | Convolution | Transposed, scale: float
) -> Matrix | Convolution | Transposed:
    """Return the operator divided by a number, in the precision that is solved in."""
    entries = _entries(operator).detach()  # to autograd a constant: no step is recorded
    entries = entries.to(solve_dtype(entries.dtype)) / scale
    return Matrix(entries) if isinstance(operator, Matrix) else operator.with_kernel(entries)


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
            edges = None
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
            edges = _edges(operator, preconditioner, dual, self.tolerance)
        return IterativeFactor(
            operator,
            preconditioner,
            Spectrum(scale * spectrum.largest, scale * spectrum.smallest, spectrum.deficient),
            scale=scale,
            dual=dual,
            shift=damping * spectrum.largest**2,
            tolerance=self.tolerance,
            max_steps=self.max_steps,
            edges=edges,
            backend=backend,
        )


def _edges(
    operator: Convolution | Transposed, model: SpectralFactor, dual: bool, tolerance: float
) -> Edges | None:
    """Return what multiplies behind the preconditioner, on a CPU, if it is exact enough there."""
    conv = convolution_of(operator)
    condition = min(model.spectrum.condition, model.shift**-0.5 * model.spectrum.largest)
    if (
        conv.kernel.device.type != "cpu"
        or tolerance < _ROUNDING * condition * torch.finfo(conv.kernel.dtype).eps
    ):
        return None
    side: Side = "rows" if dual != isinstance(operator, Transposed) else "columns"
    return Edges.of(conv, side, model.shift)
