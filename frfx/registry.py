"""Op -> rules: which rules there are, and for which principle."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from frfx import ops
from frfx.errors import RegistryError
from frfx.ops import OpType

if TYPE_CHECKING:
    from frfx.rules.base import Rule

RuleFactory = Callable[..., "Rule"]
F = TypeVar("F", bound=RuleFactory)


class Registry:
    """The rules by op type and principle. A principle of None serves every policy."""

    def __init__(self) -> None:
        self._rules: dict[tuple[OpType, str | None], RuleFactory] = {}

    def add(
        self, op_type: OpType, factory: RuleFactory, principle: str | None, overwrite: bool
    ) -> None:
        """Enter a rule.

        Raises:
            RegistryError: If there is one for the op and principle, and `overwrite` is false.
        """
        key = (op_type, principle)
        if not overwrite:
            self.check_free(op_type, principle)
        if overwrite and principle is None:  # replaces what any principle would have chosen
            self._rules = {k: rule for k, rule in self._rules.items() if k[0] is not op_type}
        self._rules[key] = factory

    def check_free(self, op_type: OpType, principle: str | None) -> None:
        """Raise `RegistryError` if there is a rule for the op and principle, or any principle."""
        principles = [p for o, p in self._rules if o is op_type and principle in (p, None)]
        for principle in principles:  # that of one principle goes before that of all
            rule = self._rules[op_type, principle]
            where = f"{op_type.name!r}" + (f" under {principle!r}" if principle else "")
            raise RegistryError(
                f"there is a rule for {where} already: {_name(rule)}. "
                "Pass overwrite=True to replace it"
            )

    def find(self, op_type: OpType | None, principle: str) -> RuleFactory | None:
        """Return the rule for an op under a principle, if there is one."""
        if op_type is None:
            return None
        return self._rules.get((op_type, principle)) or self._rules.get((op_type, None))

    def op_types(self, rule: type[Rule]) -> list[OpType]:
        """Return the ops that a class of rules is registered for."""
        entered = (
            (op_type, getattr(factory, "func", factory)) for op_type, _, factory in self.entries()
        )
        return list(dict.fromkeys(op_type for op_type, factory in entered if factory is rule))

    def entries(self) -> list[tuple[OpType, str | None, RuleFactory]]:
        """Return all rules in the order of their entry."""
        return [(op_type, principle, rule) for (op_type, principle), rule in self._rules.items()]

    def options(self) -> set[str]:
        """Return the names of the options that rules take."""
        return {name for rule in self._rules.values() for name in option_names(rule)}

    def copy(self) -> Registry:
        """Return a registry that may be added to without changing this one."""
        twin = Registry()
        twin._rules = dict(self._rules)
        return twin


default = Registry()
"""What `invert` looks rules up in."""


def option_names(factory: RuleFactory) -> list[str]:
    """Return the options that a rule takes, which a policy may set."""
    return list(inspect.signature(factory).parameters)


def _name(factory: RuleFactory) -> str:
    return getattr(factory, "__name__", None) or repr(factory)


def register_rule(
    *op: Hashable, principle: str | None = None, overwrite: bool = False
) -> Callable[[F], F]:
    """Register a rule class for an op, however programs spell it.

    Args:
        *op: Op types of `frfx.vocabulary`, or spellings of one op: module classes, functions,
            names of tensor methods, ATen overloads, or ``"package.module:name"`` for a class or
            function that is not to be imported here. Spellings that are not known yet become a
            new op, or further spellings of the one that is named beside them. The tracer keeps
            modules and functions that are registered here whole.
        principle: The policy that the rule serves, ``"paper"`` or ``"minimal"``; None for all.
        overwrite: Whether the rule replaces one that is there.

    Returns:
        A decorator for a subclass of `frfx.rules.Rule` (or anything that makes a rule from
        options); it returns the class unchanged.

    Raises:
        RegistryError: For something that cannot be an op, or a rule that is there already.
    """
    _parse(op)  # complains of bad spellings at once

    def decorate(factory: F) -> F:
        known, fresh = _parse(op)
        for op_type in known if not overwrite else []:
            default.check_free(op_type, principle)
        if known:
            ops.spell(known[0], fresh)
        for op_type in known or [_define(fresh)]:
            default.add(op_type, factory, principle, overwrite)
        return factory

    return decorate


def resolve(op: Hashable) -> OpType:
    """Return the op type that a spelling, or an op type itself, stands for.

    Raises:
        RegistryError: If no op is spelled so.
    """
    entry = _entry(op)
    if entry is None:
        _check_spelling(op)
        raise RegistryError(f"no op is spelled {ops.describe(op)}; register a rule for it first")
    return entry


def _parse(op: tuple[Hashable, ...]) -> tuple[list[OpType], list[Hashable]]:
    """Return the op types that are named, each once, and the spellings that are not known yet."""
    if not op:
        raise RegistryError("name the op: a module class, function, method name or ATen overload")
    known = list(dict.fromkeys(entry for o in op if (entry := _entry(o))))
    fresh = [o for o in op if not _entry(o)]
    for spelling in fresh:
        _check_spelling(spelling)
    if fresh and len(known) > 1:
        names = " and ".join(repr(o.name) for o in known)
        raise RegistryError(
            f"{ops.describe(fresh[0])} is named beside {names}: register it with one of them"
        )
    return known, fresh


def _define(spellings: list[Hashable]) -> OpType:
    """Create an op for spellings that are not known yet."""
    full = ops.describe(spellings[0]).strip('"')
    short = full.rsplit(".", 1)[-1]
    op_type = ops.define(full if short in ops.names() else short, "input, *args, **kwargs", [])
    for spelling in spellings:
        ops.spell(op_type, [spelling], _signature(spelling))
    return op_type


def _signature(spelling: Hashable) -> inspect.Signature | None:
    """Return the arguments that a user's function or module declares, the first called `input`."""
    if not (inspect.isfunction(spelling) or isinstance(spelling, type)):
        return None
    declared = inspect.signature(getattr(spelling, "forward", spelling))
    parameters = list(declared.parameters.values())[isinstance(spelling, type) :]  # without self
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not parameters or parameters[0].kind not in positional:
        return None
    return inspect.Signature([parameters[0].replace(name="input"), *parameters[1:]])


def _entry(op: Hashable) -> OpType | None:
    if isinstance(op, OpType):
        return op
    if not isinstance(op, Hashable):
        raise RegistryError(f"{op!r} is no module class, function, method or ATen overload")
    entry = ops.lookup(op)
    return None if entry is None else entry.type


def _check_spelling(spelling: Hashable) -> None:
    if isinstance(spelling, nn.Module):
        raise RegistryError(
            f"{spelling!r} is one module: name its class, {type(spelling).__name__}"
        )
    if ops.is_lazy(spelling):
        return
    if isinstance(spelling, str):
        if not hasattr(Tensor, spelling):
            raise RegistryError(f"tensors have no method {spelling!r}")
    elif isinstance(spelling, type):
        if not issubclass(spelling, nn.Module):
            raise RegistryError(f"{spelling.__name__} is no torch.nn.Module")
    elif isinstance(spelling, torch._ops.OpOverloadPacket):
        names = ", ".join(f"torch.ops.{spelling}.{name}" for name in spelling.overloads())
        raise RegistryError(f"torch.ops.{spelling} has several overloads; name them: {names}")
    elif not callable(spelling):
        raise RegistryError(f"{spelling!r} is no module class, function, method or ATen overload")
