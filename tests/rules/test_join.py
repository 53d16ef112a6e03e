"""Joining and splitting: every part gets its slice, against the pseudo-inverse of the Jacobian."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import frfx
from frfx import ops, vocabulary
from frfx.rules import CatRule, SplitRule, StackRule
from tests.branches import answer, least_deviations, op_of
from tests.oracles import invert, minimal_affine_preimage, normal, reconstruct, relative


def joined(kind, count, free, known=None, dim=1):
    """Return the op that joins tensors, of which some are free, and some activations at all."""
    known = range(count) if known is None else known
    names = [f"tensors[{i}]" for i in range(count)]
    inputs = [names[i] for i in known]
    held = tuple(names[i] for i in known if i not in free)
    return op_of(kind, *inputs, held=held, tensors=tuple(names), dim=dim)


def compare(rule, kind, function, values, free, dim=1, known=None):
    """Compare the answer for the free ones among these values with dense linear algebra."""
    output = function(values, dim)
    target = normal(99, *output.shape)
    op = joined(kind, len(values), free, known, dim)
    inputs = [values[i] for i in (range(len(values)) if known is None else known)]
    found = answer(rule, op, target, output, *inputs)

    def of_free(*parts):
        given = dict(zip(free, parts, strict=True))
        return function([given.get(i, value) for i, value in enumerate(values)], dim)

    expected = least_deviations(of_free, [values[i] for i in free], target)
    assert len(found) == len(free)
    for result, wanted in zip(found, expected, strict=True):
        assert relative(result, wanted) < 1e-13


@given(
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    dim=st.sampled_from([1, 2, -1, -2]),
    data=st.data(),
)
def test_cat(sizes, dim, data):
    shape = [2, 3, 4]
    values = []
    for i, size in enumerate(sizes):
        shape[dim] = size
        values.append(normal(i, *shape))
    free = sorted(data.draw(st.sets(st.sampled_from(range(len(sizes))), min_size=1)))
    compare(CatRule(), vocabulary.cat, torch.cat, values, free, dim)


@pytest.mark.parametrize(
    ("known", "free"),
    [([1, 2], [1, 2]), ([0, 1], [0, 1]), ([1], [1]), ([0, 2], [0, 2]), ([2, 3], [3]), ([0], [0])],
)
def test_cat_with_what_is_no_activation(known, free):
    values = [normal(i, 2, size, 3) for i, size in enumerate((3, 1, 2, 4)[: max(*known, 2) + 1])]
    if known == [1]:
        values = values[:2]
    compare(CatRule(), vocabulary.cat, torch.cat, values, free, 1, known)


@given(count=st.integers(1, 4), dim=st.sampled_from([0, 1, 2, -1, -2]), data=st.data())
def test_stack(count, dim, data):
    values = [normal(i, 2, 3) for i in range(count)]
    free = sorted(data.draw(st.sets(st.sampled_from(range(count)), min_size=1)))
    compare(StackRule(), vocabulary.stack, torch.stack, values, free, dim)


CLASS_TOKEN = {
    "first": lambda x, w: torch.cat([w.expand(x.shape[0], -1, -1), x], dim=1),
    "last": lambda x, w: torch.cat((x, w.expand(x.shape[0], -1, -1)), 1),
    "two": lambda x, w: torch.concat([w.repeat(2, 1, 1), w.expand(2, -1, -1), x], 1),
    "along a dimension by count": lambda x, w: torch.cat(
        [w.expand(x.size(0), 1, 4), x], x.dim() - 2
    ),
    "stacked": lambda x, w: torch.stack([x, w.expand(2, 3, 4)], -2),
    "negative": lambda x, w: torch.concatenate([w.repeat(2, 3, 1), x], -1),
    "aten.cat": lambda x, w: torch.ops.aten.cat.default([w.expand(2, 1, 4), x], 1),
    "aten.stack": lambda x, w: torch.ops.aten.stack.default([w.expand(2, 3, 4), x], 1),
}


@pytest.mark.parametrize("function", CLASS_TOKEN.values(), ids=CLASS_TOKEN)
def test_a_class_token(function):
    w, x = normal(0, 1, 1, 4), normal(1, 2, 3, 4)
    target = normal(2, *function(x, w).shape)
    found = reconstruct(function, x, target, w=w)
    assert relative(found, minimal_affine_preimage(lambda x: function(x, w), x, target)) < 1e-13


SPLITS = {
    "torch.chunk": (torch.chunk, {"chunks": 2}),
    "uneven chunk": (torch.chunk, {"chunks": 4}),
    "torch.split": (torch.split, {"split_size": 2}),
    "split in sizes": (torch.split, {"split_size": [1, 4]}),
    "split_with_sizes": (torch.split_with_sizes, {"split_size": [2, 2, 1]}),
    "tensor_split": (torch.tensor_split, {"indices_or_sections": 3}),
    "tensor_split at": (torch.tensor_split, {"indices_or_sections": (1, 4)}),
    "unbind": (torch.unbind, {}),
}


@pytest.mark.parametrize("dim", [1, -1, 2])
@pytest.mark.parametrize("case", SPLITS.values(), ids=SPLITS)
def test_parts_are_joined(case, dim):
    function, arguments = case
    x = normal(0, 2, 5, 5)
    parts = function(x, *arguments.values(), dim)
    targets = tuple(normal(i, *part.shape) for i, part in enumerate(parts))
    entry = ops.lookup(function)
    assert entry.type.several
    op = op_of(entry.type, "input", dim=dim, **arguments)
    assert SplitRule().supports(op) is None
    found = SplitRule().build(op)(targets, parts, x)
    assert all(map(torch.equal, function(found, *arguments.values(), dim), targets))
    (expected,) = least_deviations(
        lambda x: torch.cat([p.flatten() for p in function(x, *arguments.values(), dim)]),
        [x],
        torch.cat([t.flatten() for t in targets]),
    )
    assert relative(found, expected) < 1e-13


@pytest.mark.parametrize(
    "spelling",
    [torch.ops.aten.split.Tensor, torch.ops.aten.split_with_sizes.default, "split", "chunk"]
    + [torch.ops.aten.chunk.default, torch.ops.aten.unbind.int, "unbind", "tensor_split"],
)
def test_spellings_of_several(spelling):
    assert ops.lookup(spelling).type.several


REFUSED = {
    "in the middle": (
        lambda x, w: torch.cat([w.expand(2, -1, -1), x, w.expand(2, -1, -1)], 1),
        "where x lies in it cannot be told",
    ),
    "overlap": (
        lambda x, w: torch.tensor_split(x, (2, 1), 1)[0],
        "its parts may overlap: its indices do not rise",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused(case):
    function, reason = case
    with pytest.raises(frfx.UnsupportedOpsError, match=reason):
        invert(function, frfx.policy.minimal(branches="rules"), w=normal(0, 1, 1, 4))
