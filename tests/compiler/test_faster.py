"""Layers of the forward part that are computed by faster ways, against the model's own calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import frfx
from frfx.compiler import linear, rows
from frfx.compiler.linear import Product
from frfx.compiler.rows import InRows


@dataclass(frozen=True)
class Case:
    """A kind of layers, and a network of such.

    Attributes:
        kind: What takes their place.
        where: The module of that.
        bound: Its bound on their size.
        none: A value of it under which no layer is replaced.
        layers: Makes the network.
        shape: Of a batch of three.
        replaced: The names of the layers, the second of which is changed and looked at.
    """

    kind: type[nn.Module]
    where: ModuleType
    bound: str
    none: int
    layers: Callable[[], tuple[nn.Module, ...]]
    shape: tuple[int, ...]
    replaced: tuple[str, ...]

    def network(self) -> tuple[nn.Sequential, Tensor, Tensor]:
        """Return the network, a batch and its labels."""
        torch.manual_seed(0)
        model = nn.Sequential(*self.layers()).eval()
        return model, torch.randn(self.shape), torch.tensor([2, 0, 1])

    def names(self, inverse: frfx.Inverse) -> tuple[str, ...]:
        """Return which layers are replaced."""
        children = inverse.replaced.named_children()
        return tuple(name for name, module in children if isinstance(module, self.kind))


CASES = {
    "linear": Case(
        Product, linear, "_LARGE", 1 << 20,
        lambda: (
            nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 4)
        ),
        (3, 7), ("0", "2", "4"),
    ),
    "rows": Case(
        InRows, rows, "_FEW", 1,
        lambda: (
            nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 3, padding=1), nn.Flatten(),
            nn.Linear(2 * 12 * 6, 4),
        ),
        (3, 2, 14, 8), ("0", "2"),
    ),
}  # fmt: skip
each_kind = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def _every_layer_counts(monkeypatch):
    monkeypatch.setattr(linear, "_LARGE", 1)
    monkeypatch.setattr(rows, "_lanes", lambda: 16)


@each_kind
def test_a_reconstruction_is_that_by_the_models_own_calls(case, monkeypatch):
    model, x, y = case.network()
    inverse = frfx.invert(model, "0")
    assert case.names(inverse) == tuple(f"_{name}" for name in case.replaced)
    assert not list(inverse.replaced.parameters())
    monkeypatch.setattr(case.where, case.bound, case.none)
    plain = frfx.invert(model, "0")
    assert not case.names(plain)
    with torch.no_grad():
        torch.testing.assert_close(inverse(x, y), plain(x, y))
        model.get_submodule(case.replaced[1]).weight.neg_()  # they are the model's own
        torch.testing.assert_close(inverse(x, y), plain(x, y))
        torch.testing.assert_close(copy.deepcopy(inverse)(x, y), plain(x, y))
        inverse, plain, x = inverse.double(), plain.double(), x.double()
        torch.testing.assert_close(inverse(x, y), plain(x, y))


@each_kind
def test_hooks_run_in_their_place(case):
    """Those that look and those that change a value, whenever they are registered."""
    model, x, y = case.network()
    end, seen = str(len(model) - 1), case.replaced[1]
    inverse, shapes = frfx.invert(model, end), []
    with torch.no_grad():
        inverse(x, y)
        hooked = model.get_submodule(seen)
        hooked.register_forward_hook(lambda m, args, out: shapes.append(out.shape))
        hooked.register_forward_hook(lambda m, args, out: -out)
        inverse.refresh()  # else nothing looks at the graph again
        found = inverse.reconstruct(x, y)[end].forward
        torch.testing.assert_close(found, model(x))
    assert set(shapes) == {model[: int(seen) + 1](x).shape}


def test_layers_that_are_called_by_keyword():
    """Hooks may see how: these are called as they were."""

    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.tanh, self.pool = nn.Conv2d(2, 3, 3), nn.Tanh(), nn.MaxPool2d(2)
            self.fc, self.end = nn.Linear(12, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.pool(input=self.tanh(input=self.conv(input=x)))
            return self.end(self.fc(input=x.flatten(1)))

    torch.manual_seed(0)
    model, x = Keyword().eval(), torch.randn(2, 2, 6, 6)

    def hook(module, args, kwargs):
        return args, {"input": 2 * kwargs["input"]}

    for module in (model.conv, model.tanh, model.pool, model.fc):
        module.register_forward_pre_hook(hook, with_kwargs=True)
    inverse = frfx.invert(model, "fc")
    assert [name for name, _ in inverse.replaced.named_children()] == ["end"]
    with torch.no_grad():
        found = inverse.reconstruct(x, torch.tensor([1, 2]))
        torch.testing.assert_close(found["end"].forward, model(x))
