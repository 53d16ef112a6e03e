"""Between its first node and its last, a reconstruction asks the device nothing."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import frfx
from frfx import networks

_ASKING = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select")
"""ATen ops whose answer, or whose shape, the host has to wait for."""


class Silence(TorchDispatchMode):
    """Fails on whatever would wait for a GPU, or could not be captured in a CUDA graph."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if name in _ASKING or (name in ("index", "index_put", "index_put_") and _has_mask(args)):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def _has_mask(args: Any) -> bool:
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)


class Walk(fx.Interpreter):
    """Runs a reconstruction graph; what lies between its ends, in silence."""

    def run_node(self, n: fx.Node) -> Any:
        if n.name in ("prepare", "finish") or n.op in ("placeholder", "output"):
            return super().run_node(n)
        with Silence():
            return super().run_node(n)


def wide() -> nn.Sequential:
    """Return a network with one layer of every solver that is no iteration, and every pooling."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2), nn.BatchNorm2d(8), nn.GELU(), nn.AvgPool2d(3, 2, 1),
        nn.Conv2d(8, 8, 1), nn.SiLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 12, 3, padding=1),
        nn.GroupNorm(2, 12), nn.LeakyReLU(), nn.AdaptiveMaxPool2d(3), nn.Upsample(scale_factor=2),
        nn.ConvTranspose2d(12, 6, 2, 2), nn.Softplus(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(24, 12), nn.LayerNorm(12), nn.Sigmoid(), nn.Linear(12, 10),
    )  # fmt: skip


@pytest.mark.parametrize("policy", ["paper", "minimal"])
@pytest.mark.parametrize(
    ("build", "size"),
    [
        (functools.partial(networks.build, "mnist"), (1, 28, 28)),
        (functools.partial(networks.build, "cifar10"), (3, 32, 32)),
        (wide, (3, 64, 64)),
    ],
    ids=["mnist", "cifar10", "wide"],
)
def test_a_walk_waits_for_nothing(build, size, policy):
    torch.manual_seed(0)
    model = build().eval().double()  # a listener is served by other steps, to the last digits
    x, y = torch.randn(3, *size).double(), torch.tensor([1, 2, 3])
    inverse = frfx.invert(model, 0, policy=policy)
    expected = inverse(x, y)  # makes the factors
    with torch.no_grad():
        torch.testing.assert_close(Walk(inverse).run(x, y), expected)
        scores = model(x) + 0.1
        inverse(x, scores)
        Walk(inverse).run(x, scores)


def test_the_mode_hears_what_waits():
    with Silence(), pytest.raises(AssertionError, match="waits"):
        torch.ones(2).sum().item()
    with Silence(), pytest.raises(AssertionError, match="waits"):
        _ = torch.ones(2)[torch.ones(2) > 0]
