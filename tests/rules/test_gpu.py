"""Every family of rules gives on the GPU what it gives on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from oracles import normal, reconstruct, relative
from torch import nn

import frfx

pytestmark = pytest.mark.gpu

FAMILIES = {
    "linear": (nn.Linear(6, 4), (6,)),
    "conv": (nn.Conv2d(3, 2, 3), (3, 6, 7)),
    "conv, more channels out": (nn.Conv1d(2, 5, 3), (2, 9)),
    "batch norm": (nn.BatchNorm2d(3), (3, 4, 4)),
    "arithmetic": (lambda x: 3 - x / 7, (3, 4)),
    "tanh": (nn.Tanh(), (5,)),
    "gelu": (nn.GELU(), (5,)),
    "prelu": (nn.PReLU(), (5,)),
    "max pool": (nn.MaxPool2d(2), (3, 5, 4)),
    "max pool, overlapping": (nn.MaxPool2d(3, 2, 1), (3, 6, 7)),
    "max pool, conflicting": (nn.MaxPool2d(3, 1, 1), (3, 5, 4)),
    "adaptive max pool": (nn.AdaptiveMaxPool2d((2, 3)), (3, 5, 4)),
    "average pool": (nn.AvgPool2d(2), (3, 5, 4)),
    "adaptive pool": (nn.AdaptiveAvgPool2d(1), (3, 5, 4)),
    "mean": (lambda x: x.mean((2, 3)), (3, 5, 4)),
    "reshape": (nn.Flatten(), (3, 5, 4)),
    "permute": (lambda x: x.permute(0, 2, 1), (3, 5)),
    "softmax": (nn.Softmax(1), (5,)),
}


@pytest.mark.parametrize("policy", ["paper", "minimal"])
@pytest.mark.parametrize(("function", "shape"), FAMILIES.values(), ids=FAMILIES)
def test_equals_the_cpu(function, shape, policy):
    there = here = function
    if isinstance(function, nn.Module):
        here = copy.deepcopy(function).double().eval().requires_grad_(False)
        there = copy.deepcopy(here).cuda()
    x = normal(0, 4, *shape)
    target = here(normal(1, 4, *shape))
    found = reconstruct(there, x.cuda(), target.cuda(), policy)
    assert found.is_cuda
    assert relative(found.cpu(), reconstruct(here, x, target, policy)) < 1e-9


@pytest.mark.parametrize("embed", [frfx.nearest_embedding, frfx.maximum_assignment])
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_embeddings_equal_the_cpus(embed, margin):
    logits, labels = normal(0, 8, 10), torch.arange(8)
    found = embed(logits.cuda(), labels.cuda(), margin)
    torch.testing.assert_close(found.cpu(), embed(logits, labels, margin), rtol=0, atol=1e-13)
