"""The page of supported ops: `python -m frfx.support > docs/support.md`."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator

import torch

from frfx import ops, registry, rules, vocabulary
from frfx.joint import JointRule
from frfx.ops import OpType
from frfx.rules import Rule

_HEAD = """# What is supported

Written by `python -m frfx.support > docs/support.md` from the registry; a test holds it true. For a
network of yours, `frfx layers MODEL --upto NAME` shows before compiling how every op is inverted,
and what is not supported, with the reason and the way out; so does
`frfx.layers(model, upto_layer=...)`.

## Ops that have a rule

**Answer.** *Exact*: what [the one principle](design.md#one-principle) asks for, to rounding: among
the minimisers of `||f(x) - y*||`, the one nearest to the forward value `x^`, as long as no option
damps it or cuts it off. Else, what is done instead. **Solver**: as `inverse.summary()` names it;
where there are several, structure, size and condition number choose ([how](solvers.md)).
**Rule**: where `paper` and `minimal` take different ones, each has a line. What a rule refuses (an
op that mixes the samples of a batch, for instance), it says with its reason.

**Spelled**: modules (`nn` is `torch.nn`), functions (`F` is `torch.nn.functional`), methods in
quotes; in-place ones (`add_`, `inplace=True`) count as theirs. A digit stands for its variants:
`nn.Conv1d/2d/3d`. How many ATen overloads, as `torch.export` leaves them, stands behind; they are
listed at the end.

"""

_REGIONS = """
## What needs no rule

| what | solved by | answer | solver |
| --- | --- | --- | --- |
| [a region](branches.md) around branches, `branches="region"` (the default) | {region} |
| [the whole tail](joint.md), `policy="joint"` | {joint} |

Inside of both, ops need only a derivative: whatever torch can differentiate may be there.
`frfx.register_rule(function)(frfx.rules.RegionRule)` solves a single op without a rule of its own
so, too; at one node, `policy.override(node=..., rule=frfx.rules.RegionRule())` does. Nor is there a
rule for

- a feature that several ops read: it takes the mean of their answers;
- `getitem` of a tuple (of a chunk, a split, an attention): the walk puts the parts together, and
  one that nobody asks for stays;
- sizes and what is computed from them (`x.shape`, `size`, `len`, arithmetic), parameters and
  buffers that the forward reads and what it computes from them alone (a weight that is normalised,
  viewed or parametrized), constants that it makes;
- what the layer does not reach: it is held at its forward value.

## Rules that only a policy names

| by `policy.override(op=..., rule=...)` | answer | solver |
| --- | --- | --- |
{named}
"""


def page() -> str:
    """Return the page, in Markdown."""
    entries = registry.default.entries()
    kinds = _in_order({kind for kind, _, _ in entries} - {vocabulary.region})
    lines = ["| op | spelled | rule | answer | solver |", "| --- | --- | --- | --- | --- |"]
    for kind in kinds:
        cells = [f"`{kind.name}`", _spelled(kind)]
        found = {str(principle): make() for op, principle, make in entries if op is kind}
        for principle, rule in sorted(found.items(), reverse=True):  # the paper's first
            where = "" if principle == "None" else f" ({principle})"
            lines.append(_row(*cells, f"`{rule}`{where}", *_says(rule)))
            cells = ["", ""]
    between = _REGIONS.format(
        region=" | ".join(["`RegionRule`", *_says(rules.RegionRule())]),
        joint=" | ".join(["`JointRule`", *_says(JointRule())]),
        named="\n".join(_row(f"`{rule}`", *_says(rule)) for rule in _unregistered()),
    )
    return _HEAD + "\n".join(lines) + "\n" + between + _aten(kinds)


def _in_order(kinds: set[OpType]) -> list[OpType]:
    """Return op types as the vocabulary has them, then the others by name."""
    known = [kind for kind in vars(vocabulary).values() if isinstance(kind, OpType)]
    ordered = [kind for kind in dict.fromkeys(known) if kind in kinds]
    return ordered + sorted(kinds - set(known), key=lambda kind: kind.name)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _says(rule: Rule) -> tuple[str, str]:
    """Return what a rule says of its answers, and what it solves with."""
    return rule.accuracy, ", ".join(rule.solvers)


def _unregistered() -> Iterator[Rule]:
    """Yield the rules of frfx that no op has from the start."""
    taken = {type(make()) for _, _, make in registry.default.entries()}
    for name in rules.__all__:
        value = getattr(rules, name)
        if isinstance(value, type) and issubclass(value, Rule) and value not in {*taken, Rule}:
            yield value()


def _is_aten(spelling: Hashable) -> bool:
    return isinstance(spelling, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))


def _spelled(kind: OpType) -> str:
    """Return the spellings of an op, modules first, and how many ATen overloads there are."""
    spellings = ops.spellings_of(kind)
    names = [_short(ops.describe(s)) for s in spellings if not _is_aten(s)]
    groups = sorted(_merged(names), key=_order)
    aten = sum(map(_is_aten, spellings))
    shown = [f"`{name}`" for name in groups] + ([f"ATen: {aten}"] if aten else [])
    return ", ".join(shown)


def _order(name: str) -> int:
    """Sort modules first, methods last."""
    if name.startswith('"'):
        return 2
    return 0 if name.rpartition(".")[2][0].isupper() else 1


def _short(name: str) -> str:
    return name.replace("torch.nn.functional.", "F.").replace("torch.nn.", "nn.")


def _merged(names: Iterable[str]) -> list[str]:
    """Write names that differ in their number of dimensions only as one."""
    found: dict[str, list[str]] = {}
    for name in names:
        stem = re.sub(r"[123]d", "{}", name, count=1)
        found.setdefault(stem, []).append(name)
    merged = []
    for stem, variants in found.items():
        dims = "/".join(d for d in ("1d", "2d", "3d") if stem.format(d) in variants)
        merged.append(stem.format(dims) if len(variants) > 1 else variants[0])
    return merged


def _aten(kinds: Iterable[OpType]) -> str:
    """Return the list of ATen overloads, folded."""
    lines = []
    for kind in kinds:
        names = [ops.describe(s) for s in ops.spellings_of(kind) if _is_aten(s)]
        if names:
            shown = ", ".join(f"`{name.removeprefix('torch.ops.')}`" for name in names)
            lines.append(f"- {kind.name}: {shown}")
    head = "\n## ATen overloads\n\n<details><summary>All, below `torch.ops`</summary>\n\n"
    return head + "\n".join(lines) + "\n\n</details>\n"


if __name__ == "__main__":
    print(page(), end="")
