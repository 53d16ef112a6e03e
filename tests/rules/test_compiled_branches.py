"""Rules of several inputs, and of copies, are tensor code that compiles whole."""

from __future__ import annotations

import pytest
import torch

from frfx import vocabulary
from frfx.rules import (
    CatRule,
    ProductRule,
    QuotientRule,
    RepeatRule,
    SelectRule,
    SplitRule,
    StackRule,
    SumRule,
)
from tests.branches import op_of
from tests.oracles import normal

PAIR = ("input", "other")
TENSORS = ("tensors[0]", "tensors[1]")

CASES = {
    "sum": (SumRule(), op_of(vocabulary.add, *PAIR, alpha=2), lambda a, b: a + 2 * b),
    "product": (ProductRule(), op_of(vocabulary.mul, *PAIR), lambda a, b: a * b),
    "held": (ProductRule(), op_of(vocabulary.mul, *PAIR, held=("other",)), lambda a, b: a * b),
    "held gate": (ProductRule(gate="held"), op_of(vocabulary.mul, *PAIR), lambda a, b: a * b),
    "quotient": (QuotientRule(), op_of(vocabulary.div, *PAIR), lambda a, b: a / b),
    "cat": (
        CatRule(),
        op_of(vocabulary.cat, *TENSORS, tensors=TENSORS, dim=-1),
        lambda a, b: torch.cat([a, b], -1),
    ),
    "stack": (
        StackRule(),
        op_of(vocabulary.stack, TENSORS[0], tensors=TENSORS, dim=1),
        lambda a: torch.stack([a, a], 1),
    ),
    "split": (
        SplitRule(),
        op_of(vocabulary.split, "input", split_size=2, dim=1),
        lambda a: a.split(2, 1),
    ),
    "slice": (
        SelectRule(),
        op_of(vocabulary.getitem, "input", index=(slice(None), slice(1, 3))),
        lambda a: a[:, 1:3],
    ),
    "expand": (RepeatRule(), op_of(vocabulary.expand, "input"), lambda a: a.expand(3, 2, 3, 4)),
    "repeat": (RepeatRule(), op_of(vocabulary.repeat, "input"), lambda a: a.repeat(1, 2, 1)),
    "interleave": (
        RepeatRule(),
        op_of(vocabulary.repeat_interleave, "input", repeats=2, dim=1),
        lambda a: a.repeat_interleave(2, 1),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_compiles_without_a_graph_break(case):
    rule, op, function = case
    widths = (4, 1) if "tensors" not in op.arguments else (4, 2)
    inputs = [normal(i, 2, 3, width) for i, width in enumerate(widths[: len(op.inputs)])]
    output = function(*inputs)
    several = isinstance(output, tuple)
    parts = output if several else (output,)
    target = tuple(normal(9 + i, *part.shape) for i, part in enumerate(parts))
    target = target if several else target[0]
    inversion = rule.build(op)
    compiled = torch.compile(inversion, backend="aot_eager", fullgraph=True)
    expected = inversion(target, output, *inputs)
    torch.testing.assert_close(compiled(target, output, *inputs), expected)
