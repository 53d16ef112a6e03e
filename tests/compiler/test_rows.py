"""Convolutions of few channels in the forward part, several rows at once, against the model."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import frfx
from frfx.compiler import rows
from frfx.compiler.rows import InRows, most_rows


@pytest.fixture(autouse=True)
def _a_register_of_sixteen(monkeypatch):
    monkeypatch.setattr(rows, "_lanes", lambda: 16)


def small() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 3, padding=1), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(2 * 12 * 6, 4)).eval()
    return model, torch.randn(3, 2, 14, 8), torch.tensor([2, 0, 1])


def in_rows(inverse: frfx.Inverse) -> list[str]:
    """Return the names of the layers that are replaced."""
    return [name for name, m in inverse.replaced.named_children() if isinstance(m, InRows)]


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.booleans(),
    st.integers(1, 8), st.integers(5, 18), st.integers(0, 99),
)  # fmt: skip
def test_all_rows_are_there_and_in_order(kernel, down, across, padding, bias, channels, height, s):
    torch.manual_seed(s)
    layer = nn.Conv2d(2, channels, (kernel, 2), (down, across), (padding, 1), bias=bias)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(4))
    x = torch.randn(2, 2, height, 5)
    model(x)
    assume(model[0](x).shape[2] > 1)
    found = frfx.invert(model, "0").replaced._0
    with torch.no_grad(), patch.object(rows, "_WORTH", 0):
        torch.testing.assert_close(found(x), layer(x))
        together = most_rows(found._op, x)
        at_once = 1 if together is None else together.rows
        assert layer(x).shape[2] % at_once == 0
        assert at_once * channels <= 16
        layer.weight.neg_()  # it is the model's own
        layer.bias = None if bias else nn.Parameter(torch.ones(channels))
        torch.testing.assert_close(found(x), layer(x))


def test_gradients_are_those_of_the_models_own_calls():
    model, x, y = small()
    inverse = frfx.invert(model, "0")
    gradients = []
    for served in (True, False):
        with patch.object(rows, "_lanes", lambda served=served: 16 * served):
            x.requires_grad_()
            loss = inverse(x, y).square().sum()
            gradients.append(torch.autograd.grad(loss, [x, *model[0].parameters()]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("convolution", "served"),
    [
        (nn.Conv2d(2, 4, 3, padding=1), True),
        (nn.Conv2d(2, 9, 3, padding=1), False),  # two rows fill more than a register
        (nn.Conv2d(2, 4, 1), False),  # no fewer products
        (nn.Conv2d(2, 4, 3, 3), False),
    ],
)
def test_where_it_is_worth_it(convolution, served):
    x = torch.randn(2, 2, 12, 12)
    model = nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.LazyLinear(4))
    model(x)
    inverse = frfx.invert(model, "0")
    found = [most_rows(inverse.replaced.get_submodule(name)._op, x) for name in in_rows(inverse)]
    assert any(found) is served


def test_other_types_and_layouts_stay_with_torch():
    model, x, _ = small()
    op = frfx.invert(model, "0").replaced._0._op
    assert most_rows(op, x).rows == 4
    assert most_rows(op, x.double()) is None
    assert most_rows(op, x.to(memory_format=torch.channels_last)) is None
    assert most_rows(op, x[0]) is None
    with torch.backends.mkldnn.flags(enabled=False):
        assert most_rows(op, x) is None


@pytest.mark.parametrize(("register", "count"), [("AVX512", 16), ("AVX2", 8), ("DEFAULT", 0)])
def test_a_register_holds_so_many_channels(monkeypatch, register, count):
    monkeypatch.undo()
    with patch.object(torch.backends.cpu, "get_cpu_capability", lambda: register):
        assert rows._lanes() == count
