"""Ops that move entries: the inverse puts every entry back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torchvision.ops.stochastic_depth import StochasticDepth, stochastic_depth

import frfx
from tests.oracles import minimal_affine_preimage, normal, reconstruct, relative

MOVES = {
    "nn.Flatten": nn.Flatten(),
    "nn.Flatten(2)": nn.Flatten(2),
    "nn.Unflatten": nn.Unflatten(1, (3, 2)),
    "torch.flatten": lambda x: torch.flatten(x, 1),
    "x.flatten": lambda x: x.flatten(start_dim=1, end_dim=-2),
    "x.view": lambda x: x.view(2, -1, 1, 5),
    "x.view of its size": lambda x: x.view(x.size(0), -1),
    "x.reshape": lambda x: x.reshape(x.shape[0], 15, -1),
    "torch.reshape": lambda x: torch.reshape(x, (2, 2, 3, 5, 2)),
    "x.unflatten": lambda x: x.unflatten(1, (2, 3)),
    "torch.unflatten": lambda x: torch.unflatten(x, 1, (2, 3)),
    "x.unsqueeze": lambda x: x.unsqueeze(2),
    "torch.unsqueeze": lambda x: torch.unsqueeze(x, -1),
    "x.squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "torch.squeeze": lambda x: torch.squeeze(x.unsqueeze(3)),
    "x.permute": lambda x: x.permute(0, 2, 3, 1),
    "x.permute of a tuple": lambda x: x.permute((0, 3, 1, 2)),
    "x.permute negative": lambda x: x.permute(0, -1, 1, -2),
    "x.permute keyword": lambda x: x.permute(dims=(0, 2, 1, 3)),
    "torch.permute keyword": lambda x: torch.permute(x, dims=(0, 3, 1, 2)),
    "torch.permute": lambda x: torch.permute(x, (0, 2, 1, 3)),
    "x.transpose": lambda x: x.transpose(1, 3),
    "x.transpose negative": lambda x: x.transpose(-1, 1),
    "torch.transpose": lambda x: torch.transpose(x, 2, 3),
    "torch.transpose keywords": lambda x: torch.transpose(x, dim0=2, dim1=1),
    "x.swapaxes": lambda x: x.swapaxes(1, 2),
    "torch.swapaxes": lambda x: torch.swapaxes(x, 1, 2),
    "torch.swapaxes keywords": lambda x: torch.swapaxes(x, axis0=1, axis1=2),
    "torch.swapdims": lambda x: torch.swapdims(x, 1, 3),
    "x.ravel": lambda x: x.ravel().view(2, -1),
    "x.view_as": lambda x: x.view_as(x),
    "x.reshape_as": lambda x: x.reshape_as(torch.zeros(2, 3, 20)),
    "x.movedim": lambda x: x.movedim(1, -1),
    "torch.movedim": lambda x: torch.movedim(x, (1, 2), (-1, 1)),
    "torch.moveaxis": lambda x: torch.moveaxis(x, 3, 1),
    "x.roll": lambda x: x.roll(2, 1),
    "x.roll of all": lambda x: x.roll(3),
    "torch.roll": lambda x: torch.roll(x, shifts=(-1, 2), dims=(2, 3)),
    "x.flip": lambda x: x.flip(1, 3),
    "x.flip of a list": lambda x: x.flip([2]),
    "torch.flip": lambda x: torch.flip(x, dims=(-1, 1)),
    "x.rot90": lambda x: x.rot90(1, (2, 3)),
    "torch.rot90": lambda x: torch.rot90(x, k=3, dims=[1, -1]),
    "aten.roll": lambda x: torch.ops.aten.roll.default(x, [1, 1], [2, 3]),
    "aten.flip": lambda x: torch.ops.aten.flip.default(x, [1]),
    "x.to": lambda x: x.to(torch.float64),
    "x.to of a tensor": lambda x: x.to(torch.zeros(1, dtype=torch.float64)),
    "x.type_as": lambda x: x.type_as(torch.zeros(1, dtype=torch.float64)),
    "x.double": lambda x: x.double(),
    "aten._to_copy": lambda x: torch.ops.aten._to_copy.default(x, dtype=torch.float64),
    "nn.Identity": nn.Identity(),
    "x.contiguous": lambda x: x.contiguous(),
    "x.clone": lambda x: x.clone(),
    "torch.clone": lambda x: torch.clone(x),
    "nn.Dropout": nn.Dropout(0.7),
    "nn.Dropout2d": nn.Dropout2d(0.7),
    "nn.AlphaDropout": nn.AlphaDropout(0.7),
    "F.dropout": lambda x: F.dropout(x, 0.5, training=False),
    "F.dropout2d": lambda x: F.dropout2d(x, 0.5, training=False),
    "aten.view": lambda x: torch.ops.aten.view.default(x, [2, 60]),
    "aten.permute": lambda x: torch.ops.aten.permute.default(x, [0, 3, 1, 2]),
    "aten.transpose": lambda x: torch.ops.aten.transpose.int(x, 1, 2),
    "aten.unsqueeze": lambda x: torch.ops.aten.unsqueeze.default(x, 1),
    "aten.squeeze": lambda x: torch.ops.aten.squeeze.dims(x.unsqueeze(1), [1]),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_moves_back(move):
    move = move.eval() if isinstance(move, nn.Module) else move
    x = normal(0, 2, 6, 2, 5)
    target = normal(1, *move(x).shape)
    found = reconstruct(move, x, target)
    assert found.shape == x.shape
    assert torch.equal(move(found), target)
    assert relative(found, minimal_affine_preimage(move, x, target)) < 1e-13


def test_a_cast_that_rounds():
    def rounded(x):
        return x.half().float()

    x, target = normal(0, 2, 3).float(), normal(1, 2, 3).float()
    assert torch.equal(reconstruct(rounded, x, rounded(x)), x)
    assert torch.equal(reconstruct(rounded, x, target), target)


def test_detach():
    x, target = normal(0, 2, 3), normal(1, 2, 3)
    assert torch.equal(reconstruct(lambda x: x.detach(), x, target), target)
    assert torch.equal(reconstruct(torch.detach, x, target), target)


@given(dims=st.permutations(range(1, 5)), data=st.data())
def test_any_permutation(dims, data):
    signs = data.draw(st.lists(st.booleans(), min_size=5, max_size=5))
    spelled = [d - 5 if negative else d for d, negative in zip([0, *dims], signs, strict=True)]
    x = torch.arange(2.0 * 3 * 4 * 5 * 6, dtype=torch.float64).view(2, 3, 4, 5, 6)
    found = reconstruct(lambda x: x.permute(spelled), torch.zeros_like(x), x.permute(0, *dims))
    assert torch.equal(found, x)


@given(dim0=st.integers(1, 3), dim1=st.integers(-3, -1))
def test_any_transposition(dim0, dim1):
    x = torch.arange(2.0 * 3 * 4 * 5, dtype=torch.float64).view(2, 3, 4, 5)
    target = x.transpose(dim0, dim1)
    found = reconstruct(lambda x: x.transpose(dim0, dim1), torch.zeros_like(x), target)
    assert torch.equal(found, x)


MOVES_OF_THE_BATCH = {
    "transpose": (lambda x, w: (x.transpose(0, 1) * w).transpose(0, 1), (3, 2, 3)),
    "permute": (lambda x, w: (x.permute(2, 0, 1) * w).permute(1, 2, 0), (3, 2, 3)),
    "flatten": (lambda x, w: F.linear(x.flatten(0, 1), w).unflatten(0, (2, -1)), (3, 3)),
    "view": (lambda x, w: F.linear(x.view(-1, 3), w).view(x.size(0), 3, 3), (3, 3)),
}


@pytest.mark.parametrize(("function", "shape"), MOVES_OF_THE_BATCH.values(), ids=MOVES_OF_THE_BATCH)
def test_the_batch_may_move_on_the_way(function, shape):
    w, x, target = normal(0, *shape), normal(1, 2, 3, 3), normal(2, 2, 3, 3)
    expected = minimal_affine_preimage(lambda x: function(x, w), x, target)
    assert relative(reconstruct(function, x, target, w=w), expected) < 1e-11


class Dropping(nn.Module):
    """Calls the function by its name, as torchvision's own module does."""

    def forward(self, x):
        return stochastic_depth(x, 0.7, "batch", self.training)


@pytest.mark.parametrize("module", [StochasticDepth(0.7, "row"), Dropping()], ids=["module", "fn"])
def test_stochastic_depth_in_evaluation_mode(module):
    x, target = normal(0, 2, 3), normal(1, 2, 3)
    inverse = frfx.invert(nn.Sequential(module), "input")
    assert torch.equal(inverse(x, target), target)
    assert [row.op for row in inverse.summary()][-1] == "stochastic_depth"


def test_stochastic_depth_that_drops():
    class Active(nn.Module):
        def forward(self, x):
            return stochastic_depth(x, 0.7, "batch")

    with pytest.raises(frfx.UnsupportedOpsError, match="it drops at random in evaluation mode"):
        frfx.invert(Active(), "x")
