"""Indexing and copying against the pseudo-inverse of the Jacobian."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import frfx
from frfx import vocabulary
from frfx.rules import RepeatRule, SelectRule
from tests.branches import answer, op_of
from tests.oracles import invert, minimal_affine_preimage, normal, reconstruct, relative

aten = torch.ops.aten

SELECTIONS = {
    "x[:, 0]": lambda x: x[:, 0],
    "x[:, -1]": lambda x: x[:, -1],
    "x[:, 1:3]": lambda x: x[:, 1:3],
    "x[..., 1:]": lambda x: x[..., 1:],
    "x[..., 0::2, 1::2]": lambda x: x[..., 0::2, 1::2],
    "x[:, None, :, 2]": lambda x: x[:, None, :, 2],
    "x[:, :, 1, 2]": lambda x: x[:, :, 1, 2],
    "x[1] of channels first": lambda x: x.transpose(0, 1)[1],
    "x.__getitem__": lambda x: x.__getitem__((slice(None), 2)),
    "x[:, :size]": lambda x: x[:, : x.size(1) - 1],
    "x[..., size, :size]": lambda x: x[..., x.size(2) - 1, 1 : x.shape[3]],
    "x[:, :size, tensor]": lambda x: x[:, : x.size(2), torch.tensor([2, 2])],
    "x.select of a size": lambda x: x.select(1, x.size(2)),
    "x.select": lambda x: x.select(1, 2),
    "torch.select": lambda x: torch.select(x, -1, -2),
    "x.narrow": lambda x: x.narrow(1, 1, 2),
    "torch.narrow": lambda x: torch.narrow(x, 3, -2, 2),
    "x.index_select": lambda x: x.index_select(1, torch.tensor([2, 0])),
    "torch.index_select": lambda x: torch.index_select(x, 2, torch.tensor([1, 1, 0])),
    "x[:, [2, 0]]": lambda x: x[:, [2, 0]],
    "x[:, [2, 0, 2]]": lambda x: x[:, [2, 0, 2]],
    "x[:, tensor]": lambda x: x[:, torch.tensor([[3, 0], [1, 3]])],
    "x[..., tensor, tensor]": lambda x: x[..., torch.tensor([0, 1]), torch.tensor([2, 2])],
    "x[:, mask]": lambda x: x[:, torch.tensor([True, False, True, False])],
    "x[:, :, None, tensor]": lambda x: x[:, :, None, torch.tensor([1])],
    "aten.slice": lambda x: aten.slice.Tensor(x, 1, 1, 9223372036854775807),
    "aten.slice from the end": lambda x: aten.slice.Tensor(x, -1, -3, -1, 2),
    "aten.select": lambda x: aten.select.int(x, 1, 0),
    "aten.narrow": lambda x: aten.narrow.default(x, 1, 0, 2),
    "aten.index": lambda x: aten.index.Tensor(x, [None, torch.tensor([1, 3])]),
    "aten.index_select": lambda x: aten.index_select.default(x, 1, torch.tensor([1])),
}
COPIES = {
    "x.expand": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "x.expand of its sizes": lambda x: x[:, :, :1].expand(x.size(0), x.size(1), 2, -1),
    "x.expand to more dimensions": lambda x: x.expand(3, -1, -1, -1, -1).transpose(0, 1),
    "x.broadcast_to": lambda x: x[:, :, :, :1].broadcast_to((2, 4, 3, 2)),
    "torch.broadcast_to": lambda x: torch.broadcast_to(x.mean(3, keepdim=True), (2, 4, 3, 2)),
    "aten.expand": lambda x: aten.expand.default(x[:, :1], [2, 4, 3, 5]),
    "x.repeat": lambda x: x.repeat(1, 2, 1, 3),
    "x.repeat to more dimensions": lambda x: x.repeat(2, 1, 1, 1, 2),
    "x.repeat of its size": lambda x: x.repeat(1, x.size(1), 1, 1),
    "x.tile": lambda x: x.tile((2,)),
    "torch.tile": lambda x: torch.tile(x, (2, 1, 2)),
    "aten.repeat": lambda x: aten.repeat.default(x, [1, 1, 2, 1]),
    "x.repeat_interleave": lambda x: x.repeat_interleave(3, 1),
    "torch.repeat_interleave": lambda x: torch.repeat_interleave(x, 2, dim=-1),
    "x.repeat_interleave of all": lambda x: x.repeat_interleave(2).view(2, -1),
    "aten.repeat_interleave": lambda x: aten.repeat_interleave.self_int(x, 2, 2),
}


@pytest.mark.parametrize("policy", ["minimal", "paper"])
@pytest.mark.parametrize("function", (SELECTIONS | COPIES).values(), ids=list(SELECTIONS | COPIES))
def test_entries_that_are_read(function, policy):
    x = normal(0, 2, 4, 3, 5)
    target = normal(1, *function(x).shape)
    found = reconstruct(function, x, target, policy)
    assert found.shape == x.shape
    assert relative(found, minimal_affine_preimage(function, x, target)) < 1e-13
    assert torch.equal(reconstruct(function, x, function(x), policy), x)


@pytest.mark.parametrize("function", SELECTIONS.values(), ids=SELECTIONS)
def test_entries_that_are_not_read_stay(function):
    x = normal(0, 2, 4, 3, 5)
    leaf = x.clone().requires_grad_()
    function(leaf).sum().backward()
    found = reconstruct(function, x, normal(1, *function(x).shape))
    assert torch.equal(found == x, leaf.grad == 0)


ends = st.one_of(st.none(), st.integers(-5, 5))
parts = st.one_of(
    st.integers(-3, 2), st.builds(slice, ends, ends, st.integers(1, 3)), st.none(), st.just(...)
)


@given(index=st.lists(parts, max_size=3).filter(lambda i: sum(p is ... for p in i) < 2))
def test_any_basic_index(index):
    x = normal(0, 2, 3, 4, 3)
    index = (slice(None), *index)
    target = normal(1, *x[index].shape)
    if target.numel() == 0:
        return
    expected = minimal_affine_preimage(lambda x: x[index], x, target)
    assert relative(reconstruct(lambda x: x[index], x, target), expected) < 1e-13


@given(data=st.data(), dim=st.integers(1, 3))
def test_any_indices_in_a_tensor(data, dim):
    x = normal(0, 2, 3, 4, 2)
    places = st.integers(-x.shape[dim], x.shape[dim] - 1)
    index = torch.tensor(data.draw(st.lists(places, min_size=1, max_size=5)))
    at = (slice(None),) * dim + (index,)
    target = normal(1, *x[at].shape)
    expected = minimal_affine_preimage(lambda x: x[at], x, target)
    assert relative(reconstruct(lambda x: x[at], x, target), expected) < 1e-13


def test_indices_in_a_buffer_may_change():
    class Select(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("index", torch.tensor([0, 2]))

        def forward(self, x):
            return x[:, self.index]

    model = Select()
    inverse = frfx.invert(model, "x")
    x, target = normal(0, 2, 4), normal(1, 2, 2)
    for index in ([0, 2], [3, 3]):
        model.index.copy_(torch.tensor(index))
        expected = minimal_affine_preimage(lambda x: x[:, model.index], x, target)
        assert relative(inverse(x, target), expected) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["x[:, 1:3]", "x[:, [2, 0, 2]]", "x.repeat", "x.expand"])
def test_in_the_type_of_the_model(name, dtype):
    function = (SELECTIONS | COPIES)[name]
    x = normal(0, 2, 4, 3, 5).to(dtype)
    target = normal(1, *function(x).shape).to(dtype)
    found = reconstruct(function, x, target)
    assert found.dtype == dtype
    expected = minimal_affine_preimage(function, x, target)
    assert relative(found.double(), expected) < 2 * torch.finfo(dtype).eps


def test_damped_copies():
    x, target = normal(0, 2, 3), normal(1, 2, 6)
    plain = reconstruct(lambda x: x.repeat(1, 2), x, target)
    damped = reconstruct(lambda x: x.repeat(1, 2), x, target, frfx.policy.minimal(damping=0.25))
    assert relative(damped - x, (plain - x) / 1.25) < 1e-13


def test_only_the_shape_of_another_is_read():
    x, other, target = normal(0, 2, 3, 1), normal(1, 2, 3, 4), normal(2, 2, 3, 4)
    rule = RepeatRule()
    op = op_of(vocabulary.expand, "input", "other")
    assert rule.reconstructs(op) == ("input",)
    (found,) = answer(rule, op, target, x.expand_as(other), x, other)
    assert relative(found, x + (target - x).mean(2, keepdim=True)) < 1e-14
    held = op_of(vocabulary.expand, "input", "other", held=("input",))
    reason = "its input is not reached from the layer, only the shape that it takes"
    assert rule.supports(held) == reason


SHARES = {
    "slice": ({"index": (slice(None), slice(1, 3))}, [0, 1, 1, 0]),
    "number": ({"index": (slice(None), 2)}, [0, 0, 1, 0]),
    "list": ({"index": (slice(None), [0, 2, 0])}, [2, 0, 1, 0]),
}


@pytest.mark.parametrize("case", SHARES.values(), ids=SHARES)
def test_how_often_entries_are_read(case):
    arguments, counts = case
    inversion = SelectRule().build(op_of(vocabulary.getitem, "input", **arguments))
    x = normal(0, 2, 4)
    if isinstance(inversion, frfx.rules.FactoredInversion):
        inversion.factors[(4,)] = inversion.factorize((4,))
    assert inversion.share(x).expand(2, 4).tolist() == [counts, counts]


def test_slices_of_one_value_together():
    """Answers, weighed by their shares, are the least-squares solution of all that is read."""
    x = normal(0, 2, 4)
    index = [(slice(None), slice(0, 2)), (slice(None), slice(1, 3))]
    targets = [normal(i, 2, 2) for i in (1, 2)]
    moved, counts = torch.zeros_like(x), torch.zeros_like(x)
    for at, target in zip(index, targets, strict=True):
        inversion = SelectRule().build(op_of(vocabulary.getitem, "input", index=at))
        moved += inversion(target, x[at], x) - x
        counts += inversion.share(x)
    expected = minimal_affine_preimage(
        lambda x: torch.cat([x[at] for at in index], 1), x, torch.cat(targets, 1)
    )
    assert relative(x + moved / counts.clamp(min=1), expected) < 1e-13


REFUSED = {
    "computed index": (
        lambda x: x[:, torch.arange(x.size(1) - 1)],
        "its index is computed from more than the size of the image",
    ),
    "repeats in a tensor": (
        lambda x: x.repeat_interleave(torch.tensor([1, 2, 1, 1]), 1),
        "its repeats are a tensor, not one number",
    ),
    "whole numbers": (lambda x: x.to(torch.int32), "it rounds to another kind of number"),
    "index of the batch": (
        lambda x: x[torch.tensor([1, 0])],
        "it does not index every sample alike",
    ),
    "one of the batch": (
        lambda x: x[torch.tensor([1, 0]), torch.tensor([1, 0])],
        "it does not index every sample alike",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused(case):
    function, reason = case
    with pytest.raises(frfx.UnsupportedOpsError, match=reason):
        invert(function)(normal(0, 2, 4, 3, 5), torch.zeros(1))
