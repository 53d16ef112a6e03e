"""Large linear layers in the forward part of a reconstruction graph, against the model's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import frfx
from frfx.compiler import linear
from frfx.compiler.linear import Product


@pytest.fixture(autouse=True)
def _every_layer_is_large(monkeypatch):
    monkeypatch.setattr(linear, "_LARGE", 1)


def small() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    layers = nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 4)
    return nn.Sequential(*layers).eval(), torch.randn(3, 7), torch.tensor([2, 0, 1])


def products(inverse: frfx.Inverse) -> list[str]:
    """Return the names of the layers that are replaced."""
    return [name for name, m in inverse.replaced.named_children() if isinstance(m, Product)]


def test_gradients_are_those_of_the_models_own_calls():
    model, x, _ = small()
    x.requires_grad_()
    with torch.no_grad():
        target = model(x) + 0.1
    inverse = frfx.invert(model, "2")
    found = torch.autograd.grad(inverse(x, target).square().sum(), [x, model[0].weight])
    for name in products(inverse):
        setattr(inverse.replaced, name, model[int(name[1:])])
    expected = torch.autograd.grad(inverse(x, target).square().sum(), [x, model[0].weight])
    torch.testing.assert_close(found, expected)


class Functional(nn.Module):
    """Calls the function, and a module whose input is a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.fc = nn.Linear(4, 3), nn.Linear(9, 5)

    def forward(self, x):
        return F.linear(torch.tanh(self.each(x)).flatten(1), self.fc.weight, self.fc.bias)


def test_modules_alone_are_replaced():
    torch.manual_seed(0)
    model, x = Functional().eval(), torch.randn(2, 3, 4)
    inverse = frfx.invert(model, "each")
    assert products(inverse) == ["each"]
    with torch.no_grad():
        nodes = inverse.reconstruct(x, torch.tensor([4, 0]))
        torch.testing.assert_close(nodes["each"].forward, model.each(x))


def test_half_precision_that_is_asked_for_is_given():
    model, x, y = small()
    inverse = frfx.invert(model, "0")
    with torch.no_grad():
        inverse(x, y)
        with torch.autocast("cpu", torch.bfloat16):
            assert inverse.replaced._0(x).dtype == torch.bfloat16
        assert inverse.replaced._0(x).dtype == torch.float32
