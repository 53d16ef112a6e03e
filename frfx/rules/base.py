"""What every rule is, and what it leaves in the reconstruction graph."""

from __future__ import annotations

import abc
import math
import numbers
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from frfx.errors import ConvergenceError, ConvergenceWarning, PolicyError
from frfx.linalg import Dense, Factor, Solver
from frfx.linalg.auto import SOLVERS, Choice, Operator, SolverName
from frfx.linalg.backend import Backend, torch_backend
from frfx.linalg.conjugate_gradients import Convergence
from frfx.linalg.copies import Copies
from frfx.linalg.iterative import MAX_STEPS, TOLERANCE
from frfx.linalg.spectral import FACTOR_MEMORY
from frfx.ops import Op, Shape

Unconverged = Literal["warn", "raise", "ignore"]


class Inversion(nn.Module, abc.ABC):
    """The inverse of one op, a module of the reconstruction graph.

    Attributes:
        solver: What it solves with, for the summary.
        reason: What else the summary says of it.
        partial: Whether it may answer for some entries of its input only, as `share` tells.
        backend: What it computes with, where there is a choice.
    """

    solver = "closed form"
    reason = ""
    partial = False
    backend: Backend = torch_backend

    def check_convergence(self) -> None:
        """Warn or raise, as asked, if the last solve has left samples unsolved.

        Raises:
            ConvergenceError: If it has, and the rule is to raise.
        """

    @abc.abstractmethod
    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        """Return the inputs that the op should have had.

        Args:
            target: `y*`, what the op should have given; a tuple for an op that returns one.
            output: `y^`, what it gave.
            *inputs: `x^`, the activations that it was given, in the order of `op.inputs`, held
                ones among them.

        Returns:
            `x*` for the input that the rule reconstructs, of its shape; a tuple in the order of
            `rule.reconstructs(op)` if there are several.
        """

    def share(self, *inputs: Tensor) -> Tensor | None:
        """Return which entries of the input the answer speaks for; None for all of them.

        Where several ops read one value, an entry that a selection leaves out follows the others'
        answers alone.

        Args:
            *inputs: As `forward` takes them.

        Returns:
            How often the op reads each entry, of a shape that broadcasts to the input's.
        """
        del inputs
        return None


class Prepared(Protocol):
    """What a factored inversion makes once: a solver's factor, or anything that knows its size."""

    @property
    def nbytes(self) -> int:
        """The memory that it holds, in bytes."""


class FactoredInversion(Inversion):
    """An inversion that computes with something made from the model's weights.

    The factors are made by the graph's first node, before the call runs, and forgotten when the
    weights change; they are no part of the state dict.

    Attributes:
        op: The op that is inverted.
        factors: What has been made, by the key that `key` computes from the shapes.
        like: An empty tensor of the input's dtype and device, for factors that no weight places.
    """

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op
        self.factors: dict[Shape, Any] = {}
        self.like = torch.empty(0, device="cpu")

    def key(self, input_shape: Shape, output_shape: Shape) -> Shape:
        """Return what of the shapes (without the batch) the factor depends on."""
        del input_shape, output_shape
        return ()

    @abc.abstractmethod
    def factorize(self, key: Shape) -> Prepared:
        """Make the factor for one key from the weights as they are now."""

    def factor(self, input: Tensor, output: Tensor) -> Any:
        """Return the factor for an input and output of these shapes."""
        return self.factors[self.key(tuple(input.shape[1:]), tuple(output.shape[1:]))]


class AffineInversion(FactoredInversion):
    """`x* = x^ + A+ (y* - y^)` for an affine op with the linear part A.

    Args:
        op: The op that is inverted.
        operator: Makes the linear part from the op and a factor's key.
        solver: Factors it.
        key: What of the shapes of input and output the operator depends on.
        unconverged: What to do about samples that an iterative solver has not solved.
    """

    def __init__(
        self,
        op: Op,
        operator: Callable[[Op, Shape], Operator],
        solver: Solver | Dense,
        key: Callable[[Shape, Shape], Shape] | None = None,
        unconverged: Unconverged = "warn",
    ) -> None:
        super().__init__(op)
        self._operator, self._solver, self._key = operator, solver, key
        self.solver = solver.name
        self.unconverged = unconverged

    def key(self, input_shape: Shape, output_shape: Shape) -> Shape:
        """Return what of the shapes the operator depends on."""
        return () if self._key is None else self._key(input_shape, output_shape)

    def linear_part(self, key: Shape) -> Operator:
        """Return A with the weights as they are now."""
        return self._operator(self.op, key)

    def factorize(self, key: Shape) -> Factor:
        """Factor the linear part from the weights as they are now."""
        return self._solver.prepare(self.linear_part(key), self.backend)

    def forward(self, target: Tensor | Copies, output: Tensor, *inputs: Tensor) -> Tensor:
        """Return `x^ + A+ (y* - y^)`, of a target that may be copies, not written out."""
        (x,) = inputs
        with torch.autocast(x.device.type, enabled=False):
            factor = self.factor(x, output)
            x = factor.correct(x, target, output)
        if torch.compiler.is_compiling() and isinstance(factor, Choice) and factor.iterates:
            self._check_compiled()  # the graph's last node does not, and the solver broke it anyway
        return x

    @torch.compiler.disable
    def _check_compiled(self) -> None:
        self.check_convergence()

    def check_convergence(self) -> None:
        """Warn or raise, as asked, if the last solve has left samples unsolved.

        Raises:
            ConvergenceError: If it has, and `unconverged` is ``"raise"``.
        """
        for factor in self.factors.values():
            if isinstance(factor, Choice):
                report_convergence(factor.take_convergence(), self.op, self.unconverged)


def report_convergence(convergence: Convergence | None, op: Op, unconverged: Unconverged) -> None:
    """Warn or raise, as asked, about the samples that an iterative solver has not solved.

    Raises:
        ConvergenceError: If there are some, and `unconverged` is ``"raise"``.
    """
    if convergence is None or unconverged == "ignore":
        return
    failed = int((~convergence.converged).sum())
    if not failed:
        return
    message = (
        f"{op.path} ({op.show_shapes()}): the iterative solver has left {failed} "
        f"of {len(convergence.converged)} samples above its tolerance, the worst at a "
        f"relative residual of {float(convergence.residual.max()):.2g} after "
        f"{int(convergence.steps.max())} steps. Their best step is used; "
        f"policy.override(node={op.path!r}, damping=..., max_steps=..., "
        'tolerance=...) helps, and unconverged="ignore" is silent'
    )
    if unconverged == "raise":
        raise ConvergenceError(message)
    warnings.warn(message, ConvergenceWarning, stacklevel=2)


@dataclass(frozen=True)
class Rule(abc.ABC):
    """How to invert one kind of op: a value, whose fields are the options that a policy may set.

    Attributes:
        equation: The paper's equation, or the reference, that the rule implements.
        accuracy: ``"exact"`` if the answer is what the principle asks for, to rounding: among the
            minimisers of `||f(x) - y*||`, the one nearest to `x^`, as long as no option damps it or
            cuts it off. Else ``"exact"`` followed by the exceptions, or ``"approximate: "``
            followed by what is done instead.
        solvers: What the inversions may solve with, as the summary names it.
        anywhere: Whether a policy may give it to ops that it is not registered for.
    """

    equation: ClassVar[str] = ""
    accuracy: ClassVar[str] = "not stated"
    solvers: ClassVar[tuple[str, ...]] = ("closed form",)
    anywhere: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in fields(self):
            check_size(field.name, getattr(self, field.name))

    def supports(self, op: Op) -> str | None:
        """Return None if the rule can invert the op, or the reason why it cannot.

        It is asked when the graph is compiled and again when the shapes are known.
        """
        del op
        return None

    def reconstructs(self, op: Op) -> tuple[str, ...]:
        """Return which of the free inputs the inversion answers for: names of `op.free`, in order.

        The others keep their forward values, and where one feature is read under several names,
        only the answers that are given count.
        """
        return op.free

    @abc.abstractmethod
    def build(self, op: Op) -> Inversion:
        """Return the module that inverts the op in the reconstruction graph."""

    def __str__(self) -> str:
        """Return the name, with the options that are not the default."""
        options = [
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return type(self).__name__ + (f"({', '.join(options)})" if options else "")


@dataclass(frozen=True)
class AffineRule(Rule):
    """A rule for an affine op, whose pseudo-inverse may be cut off and damped.

    Attributes:
        rcond: Singular values up to this share of the largest count as zero; None for the
            machine epsilon times the larger dimension.
        damping: Tikhonov's parameter relative to the squared largest singular value; None for 0.
    """

    rcond: float | None = None
    damping: float | None = None

    @property
    def dense(self) -> Dense:
        """The solver that inverts what is a matrix, or one a dimension."""
        return Dense(self.rcond, self.damping or 0.0)


@dataclass(frozen=True)
class SolverRule(AffineRule):
    """A rule for an affine op, with a choice of solver.

    Attributes:
        solver: ``"dense"``, ``"spectral"`` (convolutions), ``"iterative"``, or ``"auto"``: by
            structure, size and condition number, as the summary says.
        rcond: See `AffineRule`.
        damping: See `AffineRule`; None for 0, or for what `auto` finds necessary.
        tolerance: Of the iterative solver: bound on the residual of the normal equations, relative
            by sample.
        max_steps: Of the iterative solver: bound on the steps.
        memory: Bound in bytes on the factor of one convolution; beyond it, its matrices are made
            anew in chunks at every call.
        unconverged: What to do about samples that it has not solved: ``"warn"``, ``"raise"`` or
            ``"ignore"``.
    """

    solver: SolverName = "auto"
    tolerance: float = TOLERANCE
    max_steps: int = MAX_STEPS
    memory: float = FACTOR_MEMORY
    unconverged: Unconverged = "warn"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("solver", self.solver, SOLVERS)
        if self.solver == "iterative" and self.rcond is not None:
            raise PolicyError(
                f"solver='iterative' cannot cut singular values off, as rcond={self.rcond!r} asks: "
                "give it damping=..., or rcond=None"
            )
        check_iteration(self.tolerance, self.max_steps, self.unconverged)

    def affine(
        self,
        op: Op,
        operator: Callable[[Op, Shape], Operator],
        key: Callable[[Shape, Shape], Shape] | None = None,
    ) -> AffineInversion:
        """Return the inversion of an op with this linear part, by the solver that is asked for."""
        solver = Solver(
            self.solver, self.rcond, self.damping, self.tolerance, self.max_steps, self.memory
        )
        return AffineInversion(op, operator, solver, key, self.unconverged)


@dataclass(frozen=True)
class CGLSRule(Rule):
    """A rule that solves by conjugate gradients, of an operator that is only applied.

    Attributes:
        damping: Tikhonov's parameter relative to the squared largest singular value of a sample's
            operator, which a bidiagonalisation estimates from below; None leaves it to the rule.
        tolerance: Bound on the residual of the normal equations, relative by sample.
        max_steps: Bound on the steps.
        unconverged: What to do about samples that are above the tolerance after the last step:
            ``"warn"``, ``"raise"`` or ``"ignore"``.
    """

    solvers = ("CGLS",)
    damping: float | None = None
    tolerance: float = TOLERANCE
    max_steps: int = MAX_STEPS
    unconverged: Unconverged = "warn"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_iteration(self.tolerance, self.max_steps, self.unconverged)


def check_iteration(tolerance: float, max_steps: int, unconverged: Unconverged) -> None:
    """Raise `PolicyError` for options that no iterative solver can keep to."""
    check_choice("unconverged", unconverged, ("warn", "raise", "ignore"))
    if not (isinstance(tolerance, numbers.Real) and 0 < float(tolerance) < 1):
        raise PolicyError(f"tolerance={tolerance!r} does not lie between 0 and 1")
    if not (isinstance(max_steps, int) and max_steps >= 1):
        raise PolicyError(f"max_steps={max_steps!r} is less than one step, or no whole number")


_SIZES = ("label_margin", "clamp_margin", "rcond", "damping", "memory")
"""Options that are numbers from zero on; `rcond` and `damping` may be None."""


def check_size(option: str, value: Any) -> None:
    """Raise `PolicyError` for a value that an option cannot have, if it is a size."""
    if option not in _SIZES or (value is None and option in ("rcond", "damping")):
        return
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if option == "memory":
        if not number or not float(value) >= 0:
            raise PolicyError(f"memory is a number of bytes, not {value!r}")
    elif not number or not 0 <= float(value) < math.inf:
        raise PolicyError(f"{option} is a finite number from 0 on, not {value!r}")
    if option == "clamp_margin" and float(value) >= 1:
        raise PolicyError(f"clamp_margin={value!r} leaves no range: it is less than 1")


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `PolicyError` for a value that is none of the choices."""
    if value not in choices:
        shown = ", ".join(map(repr, choices))
        raise PolicyError(f"{option}={value!r} is none of {shown}")


def keeps_shape(op: Op) -> str | None:
    """Return why a rule for single entries cannot be for an op, or None."""
    if op.output_shape is not None and op.input_shapes != (op.output_shape,):
        return "it changes the shape, so its target is none for its input"
    return None


def one_input(op: Op, *read: str) -> str | None:
    """Return why an op cannot be inverted through its argument `input` alone, or None.

    Args:
        op: The op.
        *read: Arguments whose values the rule must read from the model.
    """
    if set(op.inputs) != {"input"}:
        others = ", ".join(op.inputs.values()) or "nothing"
        return f"it is applied to {others}, not to one activation"
    computed = [name for name in read if name in op.computed]
    if computed:
        return f"its {' and '.join(computed)} is computed in the graph, not read from the model"
    return None


def spans_batch(op: Op, dims: Iterable[int]) -> bool:
    """Return whether the batch is one of the dimensions, as far as the shapes are known."""
    batch = {0} if op.input_shapes is None else {0, -len(op.input_shapes[0]) - 1}
    return not batch.isdisjoint(dims)
