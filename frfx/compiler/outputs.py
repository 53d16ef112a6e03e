"""Which of the tensors that a model returns is inverted, and the graph of that one alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from frfx.errors import LayerError, nearest

Key = str | int

_DEFAULT = "out"
"""What torchvision calls the main one of several outputs."""


def choose_output(graph: fx.Graph, output: Key | None) -> tuple[Key, ...]:
    """Let a graph return one of its tensors, and drop what only the others need.

    Args:
        graph: What the tracer made of a model: returns tensors in dicts, tuples, lists, named
            tuples and dataclasses.
        output: The key, the index or the name of the one to keep. None for the only one, or
            ``"out"``.

    Returns:
        Where the tensor is in what the model returns.

    Raises:
        LayerError: If there is no such output, or it is not clear which one is meant.
    """
    end = next(iter(reversed(graph.nodes)))
    path = locate(end.args[0], output)
    value = follow(end.args[0], path)
    if not isinstance(value, fx.Node):
        raise LayerError("the model's output does not depend on its input")
    before = set(end.all_input_nodes)
    end.args = (value,)
    _drop(graph, before - {value})
    return path


def locate(value: Any, output: Key | None) -> tuple[Key, ...]:
    """Return where the chosen one of several tensors is in what a model returns.

    Args:
        value: What it returns, of tensors or of nodes that stand for them.
        output: See `choose_output`.

    Raises:
        LayerError: As `choose_output` does.
    """
    path: tuple[Key, ...] = ()
    if output is not None and not _entries(value):
        raise LayerError(f"output={output!r}: the model returns one tensor, so leave this out")
    while entries := _entries(value):
        key = _choose(value, entries, output, path)
        path, value, output = (*path, key), entries[key], None
    return path


def follow(value: Any, path: tuple[Key, ...]) -> Any:
    """Return what lies at a path in the value that a model returns, or None."""
    for key in path:
        value = _entries(value).get(key)
    return value


def _choose(value: Any, entries: dict[Key, Any], output: Key | None, path: tuple[Key, ...]) -> Key:
    """Return the key of one of the entries that a value has."""
    if output is None and _DEFAULT in entries:
        return _DEFAULT
    if output is None and len(entries) == 1:
        return next(iter(entries))
    known = ", ".join(map(repr, entries))
    if output is None and path:
        raise LayerError(
            f"the model's output {path[-1]!r} holds several tensors ({known}): wrap the model in a "
            "module that returns the one to start from"
        )
    if output is None:
        first = next(iter(entries))
        raise LayerError(
            f"the model returns several tensors ({known}): name the one to start from, as in "
            f"output={first!r}"
        )
    if output in entries:
        return output
    fields = _fields(value)
    if isinstance(output, int) and not isinstance(value, Mapping):  # counted from the end, or named
        places: list[Key] = list(fields) if fields else list(range(len(value)))
        if -len(places) <= output < len(places) and places[output] in entries:
            return places[output]
    close = nearest(output, map(str, entries)) if isinstance(output, str) else ""
    raise LayerError(f"output={output!r}: the model returns {known}.{close}")


def _entries(value: Any) -> dict[Key, Any]:
    """Return what a container holds that may be a tensor, by key; nothing for anything else."""
    found: dict[Key, Any] = {}
    if isinstance(value, Mapping):
        found = dict(value)
    elif isinstance(value, fx.Node):
        given: dict[str, Any] = dict(zip(_fields(value), value.args, strict=False))
        given |= value.kwargs
        found = {name: given[name] for name in _fields(value) if name in given}
    elif names := _fields(value):
        found = {name: getattr(value, name) for name in names}
    elif isinstance(value, (tuple, list)):
        found = dict(enumerate(value))
    return {
        key: entry
        for key, entry in found.items()
        if isinstance(entry, (Tensor, fx.Node)) or _entries(entry)
    }


def _fields(value: Any) -> tuple[str, ...]:
    """Return the field names of a named tuple, a dataclass, or of a node that makes one."""
    kind = value.target if isinstance(value, fx.Node) else type(value)
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind))
    return tuple(getattr(kind, "_fields", ()))


def _drop(graph: fx.Graph, unread: set[fx.Node]) -> None:
    """Erase nodes, and what only they have read."""
    for node in reversed(graph.nodes):
        if node in unread and not node.users and node.op != "placeholder":
            unread |= set(node.all_input_nodes)
            graph.erase_node(node)
