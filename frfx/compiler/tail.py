"""What lies between the cut and the output: its ops, its branches, and the paper's layers."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
from torch import fx

from frfx import vocabulary
from frfx.compiler.bind import bind, is_fresh, live_nodes, op_type
from frfx.compiler.trace import Traced
from frfx.errors import LayerError, UnsupportedOp, nearest


@dataclass(frozen=True)
class LayerInfo:
    """One node that a reconstruction may reach.

    Attributes:
        index: The paper's layer number `l` if this node is `a_l`, the value that the next
            convolution or linear op reads; the input is `a_0`, the logits are `a_L`. None for other
            nodes.
        name: The node's name as torchvision's feature extraction spells it.
        op: The name of its operation.
        parameters: How many parameters the layer `index` has (convolution or linear op,
            normalisation, activation), 0 for other nodes.
        inversion: How the node is inverted: the rule, the region that it is a part of, held, or
            not supported. Empty where no layer was asked for.
    """

    index: int | None
    name: str
    op: str
    parameters: int
    inversion: str = ""


class Layers(Sequence[LayerInfo]):
    """The nodes of a network in forward order; prints as a table.

    Attributes:
        note: What is said below the table.
        unsupported: The ops that cannot be inverted, each with the reason and the way out, in
            forward order; none where no layer was asked for.
    """

    def __init__(
        self,
        rows: Sequence[LayerInfo],
        note: str = "",
        unsupported: Sequence[UnsupportedOp] = (),
    ) -> None:
        self._rows = tuple(rows)
        self.note, self.unsupported = note, tuple(unsupported)

    def __getitem__(self, i):  # type: ignore[no-untyped-def]
        return self._rows[i]

    def __len__(self) -> int:
        return len(self._rows)

    def __str__(self) -> str:
        width = max([4, *(len(row.name) for row in self)])
        kind = max([2, *(len(row.op) for row in self)])
        how = "  inverted by" if any(row.inversion for row in self) else ""
        lines = [f"{'l':>3}  {'name':<{width}}  {'op':<{kind}}  parameters{how}"]
        for row in self:
            index = "" if row.index is None else row.index
            parameters = row.parameters or ""
            line = f"{index:>3}  {row.name:<{width}}  {row.op:<{kind}}  {parameters:>10}"
            lines.append(f"{line}  {row.inversion}" if how else line)
        return "\n".join([*lines, *([self.note] if self.note else [])])

    __repr__ = __str__


@dataclass(frozen=True)
class Tail:
    """The part of a traced network between a cut and the output.

    Attributes:
        cut: The node whose value is reconstructed.
        logits: The last node before softmax, log-softmax or argmax.
        nodes: The nodes after the cut up to the output that hold activations, in forward order.
        chain: The nodes through which every path from the cut to the output leads (the dominators
            of the output), in forward order, the cut first.
    """

    cut: fx.Node
    logits: fx.Node
    nodes: tuple[fx.Node, ...]
    chain: tuple[fx.Node, ...]


class Network:
    """The data flow of a traced model: activations as nodes, their use as edges."""

    def __init__(self, traced: Traced) -> None:
        self.traced, self.output = traced, (output := traced.output)
        self.live = live_nodes(traced.graph)
        self.flow: nx.DiGraph = nx.DiGraph()
        self.flow.add_node(traced.input)
        for node in traced.graph.nodes:
            if node in self.live:
                self.flow.add_node(node)
                if not is_fresh(node):
                    sources = (s for s in node.all_input_nodes if s in self.live)
                    self.flow.add_edges_from((source, node) for source in sources)
        if output not in self.live or not nx.has_path(self.flow, traced.input, output):
            raise LayerError("the model's output does not depend on its input")

    def dominators(self, start: fx.Node, end: fx.Node | None = None) -> list[fx.Node]:
        """Return the nodes on every path from `start` to `end`, the output, in forward order."""
        idom = nx.immediate_dominators(self.flow, start)
        chain = [self.output if end is None else end]
        while chain[-1] is not start:
            chain.append(idom[chain[-1]])
        return chain[::-1]

    def parametric(self) -> list[fx.Node]:
        """Return the convolution and linear nodes on the way to the output, in forward order."""
        useful = nx.ancestors(self.flow, self.output) | {self.output}
        return [n for n in self.traced.graph.nodes if n in useful and self._is_parametric(n)]

    def _is_parametric(self, node: fx.Node) -> bool:
        kind = op_type(node, self.traced.root)
        return kind is not None and kind.parametric

    def layer_nodes(self) -> list[fx.Node] | None:
        """Return `[a_0, a_1, ..., a_L]`; None if layers have no numbers, as `_unnumbered` tells."""
        chain = set(self.dominators(self.traced.input))
        parametric = self.parametric()
        if not parametric or not chain.issuperset(parametric):
            return None
        reads = [next(iter(self.flow.predecessors(node))) for node in parametric[1:]]
        return [self.traced.input, *reads, self.logits()]

    def _unnumbered(self) -> str:
        if self.parametric():
            return "branches between its layers"
        return "has no convolution and no linear layer"

    def logits(self) -> fx.Node:
        """Return the output, or what a trailing softmax, log-softmax or argmax reads."""
        node = self.output
        while (kind := op_type(node, self.traced.root)) and kind in vocabulary.HEADS:
            (node,) = self.flow.predecessors(node)
        return node

    def class_dim(self) -> int:
        """Return the dimension of the logits that holds the classes.

        The one that a head behind them names; else the second, as torch's own losses take it.
        """
        for node in self.traced.graph.nodes:
            if node in self.heads:
                dim = bind(node, self.traced, self.live).arguments.get("dim")
                if isinstance(dim, int):
                    return dim
        return 1

    def layers(self) -> Layers:
        """Return every node that a reconstruction may reach, with the paper's numbers."""
        numbered = self.layer_nodes()
        index = {node: i for i, node in enumerate(numbered or ())}
        sizes = dict(zip(numbered or (), self._parameter_counts(numbered or ()), strict=True))
        useful = nx.ancestors(self.flow, self.output) | {self.output}
        rows = []
        for node in self.traced.graph.nodes:
            if node not in useful:
                continue
            kind = op_type(node, self.traced.root)
            op = node.op if kind is None else kind.name
            name = self.traced.paths[node]
            rows.append(LayerInfo(index.get(node), name, op, sizes.get(node, 0)))
        note = "" if numbered else f"The network {self._unnumbered()}: use names."
        return Layers(rows, note)

    def _parameter_counts(self, numbered: Sequence[fx.Node]) -> list[int]:
        counts, before = [], 0
        for node in numbered:
            behind = nx.ancestors(self.flow, node) | {node}
            total = sum(p.numel() for p in self.parameters(behind))
            counts.append(total - before)
            before = total
        return counts

    def parameters(self, nodes: set[fx.Node]) -> list:
        """Return the parameters that a set of nodes reads, each once, in forward order.

        Among them those that a weight is computed of in the graph.
        """
        found: dict[int, object] = {}
        root, read = self.traced.root, self._with_weights(nodes)
        owned = dict(root.named_parameters(remove_duplicate=False))
        for node in self.traced.graph.nodes:
            if node not in read:
                continue
            if node.op == "call_module":
                found |= {id(p): p for p in root.get_submodule(node.target).parameters()}
            elif node.op == "get_attr" and node.target in owned:
                found[id(owned[node.target])] = owned[node.target]
        return list(found.values())

    def _with_weights(self, nodes: set[fx.Node]) -> set[fx.Node]:
        """Return nodes and what they read that is no activation, nor computed of one."""
        found, waiting = set(nodes), list(nodes)
        while waiting:
            sources = set(waiting.pop().all_input_nodes) - found - set(self.flow)
            found |= sources
            waiting += sources
        return found

    def find(self, layer: int | str) -> fx.Node:
        """Return the node that the paper's layer number or torchvision's name stands for.

        Raises:
            LayerError: If there is none; names the nearest, or the range.
        """
        if isinstance(layer, int) and not isinstance(layer, bool):
            if layer == 0:
                return self.traced.input
            numbered = self.layer_nodes()
            if numbered is None:
                rows = (row for row in self.layers() if row.op != "placeholder")
                raise LayerError(
                    f"layer {layer}: this network {self._unnumbered()}, so there is no "
                    f"number but 0, the input. Use a name: {', '.join(repr(r.name) for r in rows)}"
                )
            if not 0 <= layer < len(numbered):
                raise LayerError(
                    f"layer {layer}: this network has the layers 0 (its input) to "
                    f"{len(numbered) - 1} (its logits); frfx.layers(model) lists them"
                )
            return numbered[layer]
        if not isinstance(layer, str):
            raise LayerError(f"a layer is an int or a name, not {layer!r}")
        useful = nx.ancestors(self.flow, self.output) | {self.output}
        named = {
            self.traced.paths[node]: node for node in self.traced.graph.nodes if node in useful
        }
        if layer in named:
            return named[layer]
        inside = [node for name, node in named.items() if name.startswith(f"{layer}.")]
        if inside:  # a container stands for its last node, as in torchvision
            return inside[-1]
        raise LayerError(
            f"no layer {layer!r} on the way to the output.{nearest(layer, named)} "
            "frfx.layers(model) lists them all"
        )

    def tail(self, cut: fx.Node) -> Tail:
        """Return what lies between a node and the output."""
        output = self.output
        after = nx.descendants(self.flow, cut)
        if cut in self.heads:
            raise LayerError(
                f"layer {self.traced.paths[cut]!r} lies behind the logits "
                f"{self.traced.paths[self.logits()]!r}: there is nothing to invert"
            )
        if self.returns_several(cut):
            raise LayerError(
                f"layer {self.traced.paths[cut]!r} is a tuple of tensors: name what it is made of, "
                "or one of its parts"
            )
        within = after & (nx.ancestors(self.flow, output) | {output})
        nodes = tuple(node for node in self.traced.graph.nodes if node in within)
        return Tail(
            cut=cut,
            logits=self.logits(),
            nodes=nodes,
            chain=tuple(self.dominators(cut)),
        )

    def returns_several(self, node: fx.Node) -> bool:
        """Tell whether a node's value is a tuple: of ops unknown, whether parts of it are read."""
        kind = op_type(node, self.traced.root)
        return bool(parts_of(node)) if kind is None else kind.several

    @functools.cached_property
    def heads(self) -> set[fx.Node]:
        """The softmax, log-softmax and argmax nodes behind the logits, up to the output."""
        behind = nx.descendants(self.flow, self.logits())
        return behind & (nx.ancestors(self.flow, self.output) | {self.output})


def parts_of(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that take a part of what an op returns, by its number, and are read."""
    if not node.op.startswith("call_"):
        return []
    users = (user for user in node.users if user.target is operator.getitem and user.users)
    return [user for user in users if isinstance(user.args[1], int)]
