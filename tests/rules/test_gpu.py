"""Every family of rules gives on the GPU what it gives on the CPU."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import torch
from torch import nn

import frfx
from frfx import networks
from frfx.linalg import Convolution, Solver
from tests.oracles import normal, reconstruct, relative

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
    "average pool, overlapping": (nn.AvgPool2d(3, 2, 1), (3, 5, 4)),
    "adaptive pool, unequal windows": (nn.AdaptiveAvgPool2d((2, 7)), (3, 5, 4)),
    "nearest": (nn.Upsample(scale_factor=1.5), (3, 5, 4)),
    "bilinear": (nn.Upsample((7, 3), mode="bilinear"), (3, 5, 4)),
    "bicubic": (nn.Upsample(scale_factor=2, mode="bicubic"), (3, 5, 4)),
    "reflection": (nn.ReflectionPad2d(1), (3, 5, 4)),
    "zero padding": (nn.ZeroPad2d(1), (3, 5, 4)),
    "pixel shuffle": (nn.PixelShuffle(2), (4, 5, 4)),
    "layer norm": (nn.LayerNorm(4), (3, 4)),
    "group norm": (nn.GroupNorm(2, 4), (4, 3)),
    "instance norm": (nn.InstanceNorm1d(3), (3, 4)),
    "RMS norm": (nn.RMSNorm(4), (3, 4)),
    "mean": (lambda x: x.mean((2, 3)), (3, 5, 4)),
    "reshape": (nn.Flatten(), (3, 5, 4)),
    "permute": (lambda x: x.permute(0, 2, 1), (3, 5)),
    "class token": (lambda x: torch.cat([x.new_zeros(x.size(0), 1, 3), x], 1), (3, 3)),
    "slice": (lambda x: x[:, 1:, ::2], (3, 5)),
    "indices": (lambda x: x[:, [2, 0, 2]], (3, 5)),
    "expand": (lambda x: x.expand(-1, 3, 5), (1, 5)),
    "roll": (lambda x: x.roll((1, -1), (1, 2)), (3, 5)),
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


def test_an_op_without_weights_follows_its_input():
    pool = nn.AvgPool2d(3, 2, 1)
    inverse = frfx.invert(nn.Sequential(nn.Identity(), pool), "0")
    x = normal(0, 2, 3, 6, 6)
    target = normal(1, *pool(x).shape)
    here = inverse(x, target)
    assert relative(inverse(x.cuda(), target.cuda()).cpu(), here) < 1e-12
    assert torch.equal(inverse(x, target), here)


@pytest.mark.parametrize("statistics", ["forward", "free"])
def test_a_walk_does_not_wait_for_the_gpu(statistics):
    """Once its factors are there, nothing of it is read back."""
    model = nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.GroupNorm(2, 4), nn.Upsample(scale_factor=2))
    model = model.double().cuda().eval()
    policy = frfx.policy.minimal().override(op=nn.GroupNorm, statistics=statistics)
    inverse = frfx.invert(model, "input", policy=policy)
    x = normal(0, 2, 4, 6, 6).cuda()
    target = model(x).detach() + 0.1
    inverse(x, target)
    values = [x]
    for layer in model:
        values.append(layer(values[-1]).detach())
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in (2, 1, 0):
            target = inverse.get_submodule(f"inverse._{i}")(target, values[i + 1], values[i])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(target).all()


@pytest.mark.parametrize("embed", [frfx.nearest_embedding, frfx.maximum_assignment])
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_embeddings_equal_the_cpus(embed, margin):
    logits, labels = normal(0, 8, 10), torch.arange(8)
    found = embed(logits.cuda(), labels.cuda(), margin)
    torch.testing.assert_close(found.cpu(), embed(logits, labels, margin), rtol=0, atol=1e-13)


@pytest.mark.parametrize("policy", ["paper", "minimal"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_reconstruction_is_captured_in_a_cuda_graph(backend, policy):
    """Once an input of the size has been seen, nothing waits for the device."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 20, 3), nn.Tanh(), nn.Conv2d(20, 18, 3), nn.SiLU(), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(18, 6, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip
    here = model.eval().requires_grad_(False)
    model = copy.deepcopy(here).cuda()
    x, y = normal(0, 4, 3, 26, 26).float().cuda(), torch.arange(4).cuda()
    inverse = frfx.invert(model, "0", backend=backend, policy=policy)
    inverse(x, y)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        inverse(x, y)  # as torch asks: warm up on a side stream
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = inverse(x, y)
    for seed in (1, 2):  # what else is computed meanwhile takes none of the graph's memory
        x.copy_(normal(seed, *x.shape))
        y.copy_((y + seed) % 10)
        expected = inverse(x, y)
        graph.replay()
        assert relative(captured.cpu(), expected.cpu()) < 1e-5
        on_cpu = frfx.invert(here, "0", policy=policy)(x.cpu(), y.cpu())
        assert relative(captured.cpu(), on_cpu) < 1e-3


def test_torch_makes_a_graph_of_it():
    """What docs/solvers.md shows: `torch.cuda.make_graphed_callables`."""
    torch.manual_seed(0)
    model = networks.build("mnist").cuda().eval()
    x, y = normal(0, 4, 1, 28, 28).float().cuda(), torch.arange(4).cuda()
    inverse = frfx.invert(model, 0)
    inverse(x, y)
    with torch.no_grad():
        graphed = torch.cuda.make_graphed_callables(lambda x, y: inverse(x, y), (x, y))
        x, y = normal(1, 4, 1, 28, 28).float().cuda(), torch.arange(4, 8).cuda()
        assert relative(graphed(x, y).cpu(), inverse(x, y).cpu()) < 1e-5


def test_the_host_learns_in_time_that_all_have_converged():
    operator = Convolution(
        normal(5, 16, 4, 3, 3).float().cuda(), (40, 40), padding=((1, 1), (1, 1))
    )
    factor = Solver("iterative", max_steps=1000).prepare(operator)
    residual = normal(6, 7, *operator.out_shape).float().cuda()
    calls = 0

    class Counted(Convolution):
        def rmv(self, y):
            nonlocal calls
            calls += 1
            return super().rmv(y)

    inner = factor.factor
    given = {field.name: getattr(inner.operator, field.name) for field in fields(Convolution)}
    inner.operator = Counted(**given)
    factor.solve(residual)
    steps = int(factor.take_convergence().steps.max())
    assert steps <= calls <= steps + 8
