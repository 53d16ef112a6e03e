"""What frfx raises and warns: one small tree, every message with its way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class FrfxError(Exception):
    """Base of every error that frfx raises on purpose."""


class TraceError(FrfxError):
    """The model could not be turned into a graph."""


class TraceMismatchError(TraceError):
    """The traced graph does not compute what the model computes."""


class ModelError(FrfxError, ValueError):
    """The model is in a state that cannot be inverted (meta tensors, uninitialised parameters)."""


class LayerError(FrfxError, ValueError):
    """`upto_layer` or `freeze_upto` names no usable place in the network."""


class InputError(FrfxError, ValueError):
    """The input batch cannot be used."""


class TargetError(FrfxError, ValueError):
    """The labels or the output target cannot be used."""


class NonFiniteError(FrfxError, ArithmeticError):
    """NaN or infinity in the weights, the input, or on the way; names the first node."""


class RegistryError(FrfxError, ValueError):
    """A rule is registered twice, or for something that is no op."""


class PolicyError(FrfxError, ValueError):
    """A policy names a node, an op or an option that does not exist."""


class BackendError(FrfxError, RuntimeError):
    """The requested backend cannot be had here."""


class DataError(FrfxError, ValueError):
    """A data set is missing or not laid out as its reader expects."""


class UnreachedError(FrfxError, ArithmeticError):
    """Joint inversion has not brought every sample to its target, and the policy asks for that."""


class UnreachedWarning(UserWarning):
    """Joint inversion has not brought every sample to its target; the nearest miss is returned."""


class ConvergenceError(FrfxError, ArithmeticError):
    """An iterative solver has not reached its tolerance, and the policy asks for that."""


class ConvergenceWarning(UserWarning):
    """An iterative solver has not reached its tolerance; its best step is used."""


class ConditionWarning(UserWarning):
    """An operator is rank-deficient to working precision; the answer is the truncated one."""


class ModeWarning(UserWarning):
    """The model is in training mode, and that changes what it computes."""


@dataclass(frozen=True)
class UnsupportedOp:
    """One op that no rule can invert: where it is, why, and the line that would help."""

    path: str
    op: str
    shapes: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.op}\n"
            f"    shapes: {self.shapes}\n"
            f"    reason: {self.reason}\n"
            f"    way out: {self.remedy}"
        )


class UnsupportedOpsError(FrfxError, NotImplementedError):
    """Some ops between the layer and the output have no rule; `.ops` lists every one of them."""

    def __init__(self, ops: Sequence[UnsupportedOp]) -> None:
        self.ops = tuple(ops)
        count = len(self.ops)
        head = f"{count} op{'s' * (count != 1)} between the layer and the output cannot be inverted"
        super().__init__(head + ":\n" + "\n".join(f"  {op}" for op in self.ops))

    def __reduce__(self) -> tuple[type, tuple[tuple[UnsupportedOp, ...]]]:
        return type(self), (self.ops,)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'a', 'b'?` for the known names nearest to `name`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=5, cutoff=0.4)
    return f" Did you mean {', '.join(map(repr, close))}?" if close else ""


def first_line(error: Exception) -> str:
    """Return an exception's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
