"""What an op is: its type, how programs spell it, and what a rule sees of one node."""

from __future__ import annotations

import contextlib
import inspect
import operator
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class OpType:
    """One kind of operation, however a program spells it.

    Attributes:
        name: The field's name of the operation, such as ``"conv"``.
        signature: The canonical arguments in positional order. A module's attributes of the same
            names are its arguments.
        parametric: Whether the op opens a layer as the paper counts them.
        several: Whether the op returns a tuple, of which programs take parts by `getitem`.
    """

    name: str
    signature: inspect.Signature
    parametric: bool = False
    several: bool = False

    def __repr__(self) -> str:
        return f"OpType({self.name!r})"


@dataclass(frozen=True)
class Spelling:
    """One way to write an op: a module class, a function, a method's name or an ATen overload.

    A module class or function of a package that frfx does not import is named as a string,
    ``"package.module:name"`` with the module that defines it.
    """

    type: OpType
    signature: inspect.Signature


_SPELLINGS: dict[Hashable, Spelling] = {}


def define(
    name: str,
    signature: str,
    spellings: Iterable[Hashable],
    *,
    parametric: bool = False,
    several: bool = False,
) -> OpType:
    """Create an op type and enter its spellings.

    Args:
        name: The name shown to users.
        signature: The canonical arguments as a function would declare them. A module's attributes
            of the same names are its arguments. Names with a leading underscore are passed over.
        spellings: Module classes, functions, method names and ATen overloads, and
            ``"package.module:name"`` for what is not to be imported.
        parametric: Whether the op opens a layer.
        several: Whether the op returns a tuple.
    """
    op_type = OpType(name, _parse(signature), parametric, several)
    spell(op_type, spellings)
    return op_type


def spell(
    op_type: OpType,
    spellings: Iterable[Hashable],
    signature: str | inspect.Signature | None = None,
) -> None:
    """Enter further spellings of an op type, with an argument order of their own if need be."""
    order = _parse(signature) if isinstance(signature, str) else signature or op_type.signature
    for spelling in spellings:
        _SPELLINGS[spelling] = Spelling(op_type, order)


def _parse(signature: str) -> inspect.Signature:
    return inspect.signature(eval(f"lambda {signature}: None"))


def lookup(spelling: Hashable) -> Spelling | None:
    """Return the entry of a module class, function, method name or ATen overload, if any."""
    entry = _SPELLINGS.get(spelling)
    if entry is None and (inspect.isfunction(spelling) or isinstance(spelling, type)):
        return _SPELLINGS.get(f"{spelling.__module__}:{spelling.__qualname__}")
    return entry


def is_lazy(spelling: Hashable) -> bool:
    """Tell whether a spelling names what frfx does not import, as ``"package.module:name"``."""
    return isinstance(spelling, str) and ":" in spelling


def _imported() -> Iterator[Hashable]:
    """Yield every spelling, but of the lazy ones only what somebody has imported: the object."""
    for spelling in _SPELLINGS:
        if not is_lazy(spelling):
            yield spelling
            continue
        home, _, name = str(spelling).partition(":")
        if home in sys.modules and hasattr(sys.modules[home], name):
            yield getattr(sys.modules[home], name)


def names() -> set[str]:
    """Return the names of all op types."""
    return {entry.type.name for entry in _SPELLINGS.values()}


def module_classes() -> tuple[type[nn.Module], ...]:
    """Return every module class that spells an op: the tracer keeps their instances whole."""
    return tuple(s for s in _imported() if isinstance(s, type) and issubclass(s, nn.Module))


def spellings() -> tuple[Hashable, ...]:
    """Return every way to write an op, but for what nobody has imported."""
    return tuple(_imported())


def spellings_of(op_type: OpType) -> tuple[Hashable, ...]:
    """Return every way to write one op, by name for what is not imported here."""
    return tuple(s for s, entry in _SPELLINGS.items() if entry.type is op_type)


def functions() -> tuple[Callable[..., Any], ...]:
    """Return every Python function that spells an op: the tracer keeps calls of them whole."""
    return tuple(s for s in _imported() if inspect.isfunction(s))


_HOMES = (nn.functional, torch, torch.special, torch.linalg, operator)
"""Where programs take functions from, whatever module they say they are of."""


def describe(spelling: Hashable) -> str:
    """Return the spelling as a program writes it, such as ``torch.nn.Conv2d``."""
    if is_lazy(spelling):
        return str(spelling).replace(":", ".")
    if isinstance(spelling, str):
        return f'"{spelling}"'
    if isinstance(spelling, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return f"torch.ops.{spelling}"
    for home in _HOMES:  # before its own name: F.max_pool2d has none, torch.special.expit another
        found = [key for key, value in vars(home).items() if value is spelling]
        if found:
            return f"{home.__name__}.{found[0]}"
    module = getattr(spelling, "__module__", None) or "torch"
    name = str(getattr(spelling, "__qualname__", getattr(spelling, "__name__", repr(spelling))))
    if module.startswith("torch.nn.modules."):
        module = "torch.nn"
    elif module.startswith("torch._C"):
        module = "torch"
    elif module == "_operator":
        module = "operator"
    return f"{module}.{name}"


@dataclass(frozen=True)
class Op:
    """One node of the forward graph, as rules and plans see it.

    Attributes:
        type: The kind of operation, or None for one that the vocabulary does not know.
        name: The fx node's name.
        path: The node's name as torchvision's feature extraction spells it.
        spelling: The module class, function, method name or ATen overload that the program uses.
        inputs: The arguments that hold activations: canonical name to fx node name. Elements of a
            list are named ``tensors[0]``, ``tensors[1]``, ...
        arguments: The constant arguments by canonical name. In a sequence, what the graph holds
            is named: ``("tensors[0]", "tensors[1]")``.
        computed: Names of arguments that the graph computes from activations or their sizes, so no
            rule can read them.
        module: The module that the node calls, if it calls one.
        tensor_of: The model's tensors among the arguments, and those that the graph computes from
            them alone; each value reads the tensor anew.
        made_of: Of the latter, what the graph computes them from.
        size_of: What the graph computes from sizes alone among the arguments; each value reads it
            from the values of the graph's nodes, by name.
        input_shapes: Shapes of the activations that come in, without the batch; None until known.
        output_shape: Shape of what comes out, without the batch; None until known, and for ops
            that return several tensors.
        held: The names among `inputs` that the layer does not reach: they stay as they are.
    """

    type: OpType | None
    name: str
    path: str
    spelling: Hashable
    inputs: Mapping[str, str]
    arguments: Mapping[str, Any]
    computed: tuple[str, ...] = ()
    module: nn.Module | None = None
    tensor_of: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    made_of: Mapping[str, Callable[[], list[Tensor]]] = field(default_factory=dict)
    size_of: Mapping[str, Callable[[Mapping[str, Any]], Any]] = field(default_factory=dict)
    input_shapes: tuple[Shape, ...] | None = None
    output_shape: Shape | None = None
    held: frozenset[str] = frozenset()

    @property
    def free(self) -> tuple[str, ...]:
        """The names among `inputs` of what is reconstructed."""
        return tuple(name for name in self.inputs if name not in self.held)

    def tensor(self, name: str) -> Tensor | None:
        """Return the model's tensor that is the argument `name` now, detached, or None."""
        read = self.tensor_of.get(name)
        return None if read is None else read().detach()

    def tensors(self) -> list[Tensor]:
        """Return every parameter and buffer of the model that the op reads."""
        if self.module is None:
            own = [read() for name, read in self.tensor_of.items() if name not in self.made_of]
            return own + [tensor for read in self.made_of.values() for tensor in read()]
        # What torch's own generators yield, which are slow to start at every call.
        modules = self.module.modules() if self.module._modules else (self.module,)
        held = (group for m in modules for group in (m._parameters, m._buffers))
        return [tensor for group in held for tensor in group.values() if tensor is not None]

    def sizes(self, name: str, dims: int) -> tuple[int, ...]:
        """Return the argument `name` (an int or a sequence, as in a stride) as `dims` ints."""
        value = self.arguments[name]
        if isinstance(value, int):
            return (value,) * dims
        sizes = tuple(value)
        return sizes * dims if len(sizes) == 1 else sizes

    def with_shapes(self, input_shapes: tuple[Shape, ...], output_shape: Shape | None) -> Op:
        """Return this op with its shapes known."""
        return replace(self, input_shapes=input_shapes, output_shape=output_shape)

    def with_sizes(self, values: Mapping[str, Any]) -> Op:
        """Return this op with the arguments that the graph computes from sizes.

        Args:
            values: What the graph's nodes have given, by name; what is not there stays unknown.
        """
        known = {}
        for name, read in self.size_of.items():
            with contextlib.suppress(KeyError):
                known[name] = read(values)
        return replace(
            self,
            arguments={**self.arguments, **known},
            computed=tuple(n for n in self.computed if n.partition("[")[0] not in known),
            size_of={},
        )

    def show_shapes(self) -> str:
        """Return the shapes for people: ``5x28x28 -> 10x12x12``, with those of the weights."""
        shown = ""
        if self.input_shapes is not None and self.output_shape is not None:
            ins = ", ".join(show_shape(shape) for shape in self.input_shapes)
            shown = f"{ins} -> {show_shape(self.output_shape)}"
        weights = [f"{n} {show_shape(tuple(read().shape))}" for n, read in self.tensor_of.items()]
        return "; ".join(filter(None, [shown or "known once there is an input", *weights]))


def show_shape(shape: Shape) -> str:
    """Return a shape for people, such as ``5x28x28``."""
    return "x".join(map(str, shape)) if shape else "scalar"
