"""Choose a solver for an operator: by its structure, its size and its condition number."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from frfx.linalg.backend import Backend, torch_backend
from frfx.linalg.conjugate_gradients import Convergence
from frfx.linalg.copies import Copies, written_out
from frfx.linalg.dense import Dense, write_out, written_out_bytes
from frfx.linalg.iterative import MAX_STEPS, TOLERANCE, Iterative, IterativeFactor
from frfx.linalg.operators import Convolution, Diagonal, Matrix, Transposed, convolution_of
from frfx.linalg.polyphase import Polyphase
from frfx.linalg.pseudo_inverse import Factor, Spectrum, singular_values
from frfx.linalg.separable import Separable
from frfx.linalg.spectral import FACTOR_MEMORY, Spectral, SpectralFactor

Operator: TypeAlias = Matrix | Diagonal | Separable | Convolution | Transposed

SolverName = Literal["auto", "dense", "spectral", "iterative"]
SOLVERS = ("auto", "dense", "spectral", "iterative")

_WRITE_OUT = 1 << 25
"""Operators whose matrices, one a group, fit into this many bytes in double may be written out."""

_WELL_CONDITIONED = 100.0
"""Condition number up to which an exact solution is worth its deviation, and quickly found."""

_ILL_CONDITIONED_DAMPING = 1e-2
"""Damping where it is not. Undamped, the solution of the circular model of a padded convolution
leaves a larger residual than no deviation at all (docs/solvers.md)."""


@dataclass(frozen=True)
class Choice(Factor):
    """A factor and how it came about.

    Attributes:
        factor: What solves.
        solver: The name of its solver.
        reason: Why this one, for the summary.
    """

    factor: Factor
    solver: str
    reason: str

    @property
    def spectrum(self) -> Spectrum:  # type: ignore[override]
        """The operator's singular values in short."""
        return self.factor.spectrum

    @property
    def iterates(self) -> bool:
        """Whether the solver may fail to converge."""
        return isinstance(self.factor, IterativeFactor)

    def take_convergence(self) -> Convergence | None:
        """Return how the last solve went, if it was iterative and nobody has asked yet."""
        if not isinstance(self.factor, IterativeFactor):
            return None
        convergence, self.factor.convergence = self.factor.convergence, None
        return convergence

    def solve(self, residual: Tensor) -> Tensor:
        """Return the solution of `operator(d) = residual`."""
        return self.factor.solve(residual)

    def correct(self, x: Tensor, target: Tensor | Copies, output: Tensor) -> Tensor:
        """Return `x + solve(target - output)`."""
        if isinstance(self.factor, SpectralFactor):
            return self.factor.correct(x, target, output)
        return self.factor.correct(x, written_out(target), output)

    @property
    def nbytes(self) -> int:
        """The memory that the factor holds, in bytes."""
        return self.factor.nbytes


@dataclass(frozen=True)
class Solver:
    """What a rule asks for: a solver by name, or the one that fits the operator.

    Attributes:
        name: ``"dense"``, ``"spectral"``, ``"iterative"`` or ``"auto"``.
        rcond: Singular values up to this share of the largest count as zero; None for the machine
            epsilon times the larger dimension.
        damping: Tikhonov's parameter relative to the squared largest singular value; None for 0,
            or for what `auto` finds necessary.
        tolerance: Of the iterative solver: bound on the relative residual of the normal equations.
        max_steps: Of the iterative solver: bound on the steps.
        memory: Bound in bytes on one factor.
    """

    name: SolverName = "auto"
    rcond: float | None = None
    damping: float | None = None
    tolerance: float = TOLERANCE
    max_steps: int = MAX_STEPS
    memory: float = FACTOR_MEMORY

    def prepare(self, operator: Operator, backend: Backend = torch_backend) -> Choice:
        """Factor an operator."""
        if self.name != "auto":
            factor = self._as_asked(operator, backend)
            return Choice(factor, self.name, "as asked")
        if isinstance(operator, (Matrix, Diagonal, Separable)):
            return Choice(self._dense.prepare(operator), "dense", "a matrix")
        conv = convolution_of(operator)
        if conv.disjoint:
            reason = "its windows share no entry: a matrix each"
            return Choice(self._dense.prepare(operator), "dense", reason)
        if Polyphase(conv).exact and not isinstance(operator, Transposed):
            reason = "circular padding" if Polyphase(conv).wraps else "no padding"
            return Choice(self._spectral.prepare(operator, backend), "spectral", f"exact: {reason}")
        return self._approximated(operator, backend)

    def _approximated(self, operator: Convolution | Transposed, backend: Backend) -> Choice:
        """Choose where the circular model is not the operator."""
        conv = convolution_of(operator)
        if written_out_bytes(operator) <= _WRITE_OUT:
            exact = operator.kernel.dtype == torch.float64
            find = torch.linalg.svdvals if exact else singular_values
            singular = find(write_out(operator).double())
            spectrum = Spectrum(float(singular.amax()), float(singular.amin()), deficient=False)
            solver, note = self._if_ill_conditioned(spectrum.condition)
            factor: Factor = solver._dense.prepare(operator, backend, spectrum)
            form = "a matrix a group" if conv.groups > 1 else "a matrix"
            return Choice(factor, "dense", f"padded and small: written out as {form}; {note}")
        spectrum = Polyphase(conv).spectrum(0.0)
        condition = spectrum.condition
        solver, note = self._if_ill_conditioned(condition)
        cuts = self.rcond is not None and self.rcond * condition >= 1  # no iteration could
        if (condition <= _WELL_CONDITIONED or self.damping) and not cuts:
            factor = solver._iterative.prepare(operator, backend, spectrum)
            return Choice(factor, "iterative", f"padded: the circular model, refined; {note}")
        factor = solver._spectral.prepare(operator, backend, spectrum)
        return Choice(factor, "spectral", f"padded: the circular model, not refined; {note}")

    def _if_ill_conditioned(self, condition: float) -> tuple[Solver, str]:
        """Return the solver with the damping that a condition number asks for, and a note of it."""
        note = f"condition number {condition:.2g}"
        if self.damping is not None or condition <= _WELL_CONDITIONED:
            return self, note
        damped = replace(self, damping=_ILL_CONDITIONED_DAMPING)
        return damped, f"{note}: damped by {_ILL_CONDITIONED_DAMPING:g}"

    def _as_asked(self, operator: Operator, backend: Backend) -> Factor:
        if self.name == "dense":
            return self._dense.prepare(operator, backend)
        if isinstance(operator, (Diagonal, Separable)) or (
            self.name == "spectral" and isinstance(operator, Matrix)
        ):
            raise TypeError(f"no {self.name} solver for a {type(operator).__name__}")
        if self.name == "spectral" and not isinstance(operator, Matrix):
            return self._spectral.prepare(operator, backend)
        return self._iterative.prepare(operator, backend)

    @property
    def _dense(self) -> Dense:
        return Dense(self.rcond, self.damping or 0.0)

    @property
    def _spectral(self) -> Spectral:
        return Spectral(self.rcond, self.damping or 0.0, self.memory)

    @property
    def _iterative(self) -> Iterative:
        return Iterative(self.damping or 0.0, self.tolerance, self.max_steps, self.memory)
