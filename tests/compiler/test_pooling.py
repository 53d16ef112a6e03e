"""Max pooling in the forward part of a reconstruction graph, against torch's own."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import frfx
from frfx.compiler import rows
from frfx.compiler.pooling import Pooling
from frfx.rules.axis import Axis


@st.composite
def poolings(draw) -> tuple[nn.Module, torch.Tensor]:
    """Draw a pooling module and an image that it takes."""
    dims = draw(st.integers(1, 3))
    several = st.tuples(*[st.integers(1, 3)] * dims)
    kernel, stride, dilation = draw(several), draw(several), draw(several)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    size = [
        draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 9))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    module = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1]
    ceil = draw(st.booleans())
    pool = module(kernel, stride, padding, dilation, ceil_mode=ceil)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return pool, torch.randn(2, 3, *size, generator=generator)


class Pooled(nn.Module):
    """Pools an activation, and ends in logits behind what any image pools to."""

    def __init__(self, pool: nn.Module, dims: int) -> None:
        super().__init__()
        self.tanh, self.pool, self.dims = nn.Tanh(), pool, dims
        self.fc = nn.Linear(3, 4)

    def forward(self, x):
        pooled = self.pool(self.tanh(x)).mean(tuple(range(2, 2 + self.dims)))
        return self.fc(pooled)


@given(poolings())
def test_any_geometry_pools_as_torch_does(drawn):
    pool, x = drawn
    expected = pool(torch.tanh(x))
    assume(torch.isfinite(expected).all())  # else a window reads nothing, and nothing is inverted
    inverse = frfx.invert(Pooled(pool, x.ndim - 2), "pool")
    torch.testing.assert_close(inverse.replaced.pool(x), expected)


def small(*behind: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(5, 4, 3), *behind,
        nn.Flatten(), nn.LazyLinear(4),
    )  # fmt: skip


def initialised(model: nn.Module) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    x = torch.randn(6, 3, 11, 11, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(x)
    return model, x, torch.arange(6) % 4


def plain(inverse: frfx.Inverse, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every pooling run the model's own calls."""
    monkeypatch.setattr(Pooling, "_commutes", lambda self, x: False)


@pytest.mark.parametrize("layer", [4, 3, 1, 0])
@pytest.mark.parametrize("policy", ["paper", "minimal"])
def test_a_reconstruction_is_what_it_is_by_the_models_own_calls(policy, layer, monkeypatch):
    model, x, y = initialised(small(nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1)))
    inverse = frfx.invert(model, layer, policy=policy)
    with torch.no_grad():
        found, nodes = inverse(x, y), inverse.reconstruct(x, y)
        plain(inverse, monkeypatch)
        torch.testing.assert_close(found, inverse(x, y))
        for name, node in inverse.reconstruct(x, y).items():
            torch.testing.assert_close(nodes[name].forward, node.forward)
            torch.testing.assert_close(nodes[name].target, node.target)


def test_an_activation_that_is_read_stays():
    model, *_ = initialised(small())
    assert "'1'" not in frfx.invert(model, "2").code.replace('"', "'")
    assert "self.replaced._2(_1)" in frfx.invert(model, "1").code


class Functional(nn.Module):
    """Calls functions and methods, one of them of two readers, and one that does not increase."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(100, 4)

    def forward(self, x):
        x = F.max_pool2d(input=self.conv(x).sigmoid(), kernel_size=2, stride=1, padding=1)
        y = torch.tanh(x)
        x = F.max_pool2d(y, 3, 2) + F.max_pool2d(torch.relu(x), 3, 2) + y.mean((2, 3), keepdim=True)
        return self.fc(F.max_pool2d(torch.sin(x), 1, 1).flatten(1))


def test_functions_and_methods_are_called_as_they_were():
    torch.manual_seed(0)
    model = Functional().eval()
    x = torch.randn(2, 3, 13, 13)
    with torch.no_grad():
        model.fc = nn.Linear(F.max_pool2d(torch.zeros(1, 4, 12, 12), 3, 2).numel(), 4)
        inverse = frfx.invert(model, "fc")
        found = inverse.reconstruct(x, torch.zeros(2, dtype=torch.long))
        torch.testing.assert_close(found["fc"].forward, model(x))
    assert sum(isinstance(module, Pooling) for module in inverse.replaced.children()) == 4


@pytest.mark.parametrize("where", ["0", "1", "2"])
def test_hooks_run_in_their_place(where):
    """Those that look and those that change a value, whenever they are registered."""
    model, x, y = initialised(small())
    inverse = frfx.invert(model, "3")
    with torch.no_grad():
        inverse(x, y)
        shapes = []
        module = model.get_submodule(where)
        module.register_forward_hook(lambda m, args, out: shapes.append(out.shape))
        module.register_forward_hook(lambda m, args, out: -out)
        inverse.refresh()  # else nothing looks at the graph again
        found = inverse.reconstruct(x, y)["3"].forward
    torch.testing.assert_close(found, model[:4](x))
    assert set(shapes) == {model[: int(where) + 1](x).shape}


def test_gradients_are_those_of_the_models_own_calls():
    """With respect to the input and to the weights."""
    model, x, y = initialised(small())
    x = torch.round(2 * x) / 2  # ties, between which torch's own pooling chooses
    inverse = frfx.invert(model, "3", policy="minimal")
    gradients = []
    for wanted in ([x, *model[0].parameters()], list(model[0].parameters())):
        for commutes in (Pooling._commutes, lambda self, x: False):
            with patch.object(Pooling, "_commutes", commutes):
                x.requires_grad_(wanted[0] is x)
                loss = inverse(x, y).square().sum()
                gradients.append(torch.autograd.grad(loss, wanted))
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[2], gradients[3])


def test_other_layouts_stay_with_torch(monkeypatch):
    model, *_ = initialised(small())
    inverse = frfx.invert(model, "3")
    seen = []
    monkeypatch.setattr(Axis, "tap", lambda *args: seen.append(args))
    inverse.replaced._2(torch.randn(2, 3, 11, 11).to(memory_format=torch.channels_last))
    assert not seen


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.booleans(),
    st.sampled_from([(2, 2), (2, 3), (3, 1), (4, 2)]), st.integers(9, 16), st.integers(0, 99),
)  # fmt: skip
def test_rows_of_a_convolution_are_channels(kernel, down, across, padding, bias, window, height, s):
    torch.manual_seed(s)
    model = nn.Sequential(
        nn.Conv2d(2, 3, (kernel, 2), (down, across), (padding, 1), bias=bias), nn.Tanh(),
        nn.MaxPool2d(window, (window[0], 1)), nn.Conv2d(3, 4, 1), nn.Flatten(), nn.LazyLinear(4),
    )  # fmt: skip
    x = torch.randn(2, 2, height, 7)
    assume(model[:2](x).shape[2] >= window[0] and model[:2](x).shape[3] >= window[1])
    model(x)
    pooling = frfx.invert(model, "3").replaced._2
    assert isinstance(pooling, Pooling)
    with torch.no_grad(), patch.multiple(rows, _WORTH=0, _lanes=lambda: 24):
        assert rows.most_rows(pooling._before, x, window[0]).rows % window[0] == 0
        torch.testing.assert_close(pooling(x), model[:3](x))
        model[0].weight.neg_()  # it is the model's own
        model[0].bias = None if bias else nn.Parameter(torch.ones(3))
        torch.testing.assert_close(pooling(x), model[:3](x))


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding="valid"),
    ],
)
def test_other_convolutions_stay_where_they_are(convolution):
    model = nn.Sequential(convolution, nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(4))
    x = torch.randn(2, 4, 8, 8)
    model(x)
    inverse = frfx.invert(model, "1")
    assert (inverse.replaced._1._before is None) is (convolution.padding != "valid")
    with torch.no_grad():
        y = torch.tensor([1, 2])
        torch.testing.assert_close(inverse.reconstruct(x, y)["1"].forward, model[:2](x))


def test_nothing_of_the_model_is_registered_twice():
    model, *_ = initialised(small())
    inverse = frfx.invert(model, "3")
    assert not list(inverse.replaced.parameters())
    assert sum(isinstance(module, Pooling) for module in inverse.replaced.children()) == 1
