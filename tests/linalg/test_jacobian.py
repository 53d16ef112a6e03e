"""The Jacobian of what torch computes, as two products, against dense ones in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from frfx.linalg.jacobian import Jacobian
from tests.oracles import integers, jacobian, normal, relative

W = normal(11, 6, 6)


def _attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x @ W, x, x * 0.5)


def _gate(x: Tensor) -> Tensor:
    return x * F.hardsigmoid((x @ W).mean(1, keepdim=True))


def _own_kernels(x: Tensor) -> Tensor:
    """Convolves every sample with kernels that are made of it."""
    kernels = x.tanh().flatten(0, 1)[:, None, :3]
    return F.conv1d(x.reshape(1, -1, 6), kernels, groups=len(kernels)).reshape(len(x), -1)


class Doubled(Tensor):
    """A kernel that convolves as twice what it holds, as those do that are quantised."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        plain = [a.as_subclass(Tensor) if isinstance(a, Doubled) else a for a in args]
        if func is F.conv1d:
            plain[1] = 2 * plain[1]
        return func(*plain, **(kwargs or {}))


K = normal(12, 6, 2, 3)
DOUBLED = K.as_subclass(Doubled)
B, B24, C = normal(13, 6), normal(14, 24), normal(15, 24).exp()
aten = torch.ops.aten

LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "convolution": lambda x: torch.tanh(F.conv1d(x, K, B, 2, 2, groups=2)) @ W[:4],
    "dilated convolution": lambda x: F.conv1d(x.exp(), K, stride=1, dilation=2, groups=2),
    "planes": lambda x: F.conv2d(x[:, None].sin(), normal(1, 3, 1, 2, 3), B[:3], (1, 2), (0, 1)),
    "space": lambda x: F.conv3d(x[:, None, None], normal(1, 2, 1, 1, 2, 2), padding="valid"),
    "same": lambda x: F.conv1d(x.sin(), K, B, padding="same", groups=2),
    "transposed convolution": lambda x: F.conv_transpose1d(
        x.sin(), K[:4], B[:4], 2, 1, output_padding=1, groups=2
    ),
    "transposed in planes": lambda x: F.conv_transpose2d(
        x[:, None], normal(1, 1, 2, 2, 2), None, (2, 1), dilation=(1, 2)
    ),
    "exported convolution": lambda x: aten.conv1d.default(x, K, B, [1], [1], [1], 2),
    "exported transpose": lambda x: aten.conv_transpose2d.input(x[:, None], K[:1, :, None]),
    "batch norm": lambda x: torch.relu(
        F.batch_norm(x, B[:4], B[:4].exp(), W[0, :4], W[1, :4], eps=0.1)
    ),
    "batch norm of matrices": lambda x: F.batch_norm(
        x.flatten(1).sin(), normal(1, 24), C, None, B24
    ),
    "exported batch norm": lambda x: aten.batch_norm.default(
        x, None, None, B[:4], B[:4].exp(), False, 0.1, 1e-5, False
    ),
    "kernels of the feature": _own_kernels,
    "the feature as kernels": lambda x: F.conv1d(normal(1, 1, 4, 9), x).transpose(0, 1),
    "an offset of the feature": lambda x: F.conv1d(x, K, x[0, 0] * 0, groups=2),
    "a subclass as kernels": lambda x: F.conv1d(x, DOUBLED, None, 1, 1, 1, 2).tanh(),
    "checkpoint": lambda x: checkpoint(
        lambda v: F.conv1d(v, K, B, 1, 1, 1, 2).tanh(), x, use_reentrant=False
    ),
    "vmap": lambda x: torch.vmap(lambda v: F.conv1d(v[None], K, B, groups=2)[0].tanh())(x),
    "complex": lambda x: torch.view_as_real(
        F.conv1d(torch.complex(x, x.sin()), K + 1j, groups=2)
    ).flatten(1),
}
"""Layers that are affine maps, or might be taken for one."""

CASES: dict[str, Callable[[Tensor], Tensor]] = LAYERS | {
    "linear": lambda x: x @ W,
    "residual": lambda x: x + torch.tanh(x @ W),
    "relu": lambda x: torch.relu(x @ W) @ W,
    "softmax": lambda x: torch.softmax(x @ W, -1) * x,
    "layer norm": lambda x: F.layer_norm(x, (6,)) @ W,
    "attention": _attention,
    "hardsigmoid": lambda x: F.hardsigmoid(x @ W),
    "hardswish": lambda x: x + F.hardswish(x @ W),
    "gate": _gate,
    "gated attention": lambda x: _attention(x) * F.hardsigmoid(x),
    "max": lambda x: F.max_pool1d(x, 2) @ W[:3],
    "several uses": lambda x: torch.cat([x, x * x, x.flip(2)], 2)[:, :, 2:],
    "fewer entries": lambda x: (x @ W)[:, :2, :3].flatten(1),
    "one number": lambda x: x.square().sum((1, 2)),
    "steps": lambda x: x + torch.round(x),
}
"""Functions of (N, 4, 6), each sample for itself."""


@pytest.mark.parametrize("name", CASES)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 4))
def test_both_products(name, seed, count):
    function, x = CASES[name], normal(seed, count, 4, 6)
    products = Jacobian(function, x)
    rows = function(x).reshape(count, -1).shape[1]
    assert relative(products.output, function(x)) < 1e-14
    assert products.systems == count
    tangent, cotangent = normal(seed + 1, count, 24), normal(seed + 2, count, rows)
    forward, back = products.mv(tangent), products.rmv(cotangent)
    for k in range(count):
        dense = jacobian(function, x[k : k + 1])
        assert relative(forward[k], dense @ tangent[k].numpy()) < 1e-10
        assert relative(back[k], dense.T @ cotangent[k].numpy()) < 1e-10
    pairs = (forward * cotangent).sum(1), (tangent * back).sum(1)
    torch.testing.assert_close(*pairs)
    assert not products.couples_samples()


class Doubles(TorchFunctionMode):
    """Doubles what convolutions give."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        value = func(*args, **(kwargs or {}))
        return 2 * value if func is F.conv1d else value


def test_modes_that_change_what_a_layer_computes():
    x, tangent = normal(0, 2, 4, 6), normal(1, 2, 24)

    def function(x: Tensor) -> Tensor:
        return F.conv1d(x.sin(), K.to(x.dtype), groups=2)

    with Doubles():
        found = Jacobian(function, x).mv(tangent)
    assert relative(found, 2 * Jacobian(function, x).mv(tangent)) < 1e-12

    def halved(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return function(x.float()).double()

    products = Jacobian(halved, x)
    assert 1e-4 < relative(products.mv(tangent), Jacobian(function, x).mv(tangent)) < 1e-2


class Convolutions(TorchDispatchMode):
    """Counts what convolves, there and back."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "convolution" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="this torch does not tell whether a checkpoint counts what is saved",
)
@pytest.mark.parametrize("trained", [True, False])
def test_a_product_convolves_once_a_layer(trained):
    """The weight's part of the second derivative, which nobody asks for, is not made."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.ConvTranspose2d(3, 2, 3, 2)
    )
    model.double().eval().requires_grad_(trained)
    products = Jacobian(model, normal(0, 2, 2, 5, 5))
    for product, entries in ((products.mv, 50), (products.rmv, 98)):
        with Convolutions() as convolutions:
            found = product(normal(1, 2, entries))
        assert convolutions.count == 2
        assert not found.requires_grad


class Gated(nn.Module):
    """Attention in a gate whose op has no second derivative; its kernel has no tangents."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.gate = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x)[0] * F.hardsigmoid(self.gate(x))


@pytest.mark.parametrize("trained", [True, False])
def test_forward_mode_through_a_module_of_attention(trained):
    """With frozen weights, torch would take a fused kernel that has no derivative."""
    model = Gated().double().eval().requires_grad_(trained)
    x, tangent = normal(0, 2, 4, 6), normal(1, 2, 24)
    with torch.no_grad():
        found = Jacobian(model, x).mv(tangent)
    assert not found.requires_grad
    for k in range(2):
        assert relative(found[k], jacobian(model, x[k : k + 1]) @ tangent[k].numpy()) < 1e-10


def test_pieces_of_a_staircase():
    """Where the derivative is zero, both products are; nothing else is said of the function."""
    x = normal(0, 3, 4)
    for function in (torch.sign, torch.round, lambda v: torch.sign(v) * torch.round(v)):
        products = Jacobian(function, x)
        assert not products.mv(normal(1, 3, 4)).any()
        assert not products.rmv(normal(2, 3, 4)).any()


@pytest.mark.parametrize(
    "function", [lambda x: x.detach() * 2, lambda x: (W + W)[:3].expand(3, 3, 6)]
)
def test_what_no_gradient_reaches_is_refused(function):
    with pytest.raises(NotImplementedError, match="nothing flows back"):
        Jacobian(function, normal(0, 3, 4, 6))


def test_weights_that_ask_for_gradients_get_none():
    layer = nn.Linear(6, 5).double()
    products = Jacobian(layer, normal(0, 3, 6))
    for found in (products.mv(normal(1, 3, 6)), products.rmv(normal(2, 3, 5)), products.output):
        assert not found.requires_grad
    assert layer.weight.grad is None
    assert layer.bias.grad is None


# --- samples that depend on each other ---


def _neighbours(x: Tensor) -> Tensor:
    """Adds to each of two neighbours what the other is: frames of one clip."""
    pairs = x.reshape(-1, 2, *x.shape[1:])
    return x + (pairs.flip(1) @ W).reshape(x.shape)


COUPLED: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x - x.mean(0, keepdim=True),
    "sequence first": lambda x: _attention(x.transpose(0, 1)).transpose(0, 1),
    "neighbours": _neighbours,
    "ends": lambda x: x + torch.cat([x[-1:], 0 * x[1:]]),
    "forward only": lambda x: x.cumsum(0),
    "turned": lambda x: x.roll(1, 0),
    "another number of rows": lambda x: x.transpose(0, 1) @ W,
}


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("count", [2, 6, 8])
def test_rows_that_depend_on_each_other_are_found(name, count):
    function, x = COUPLED[name], normal(0, count, 4, 6)
    products = Jacobian(function, x)
    assert products.couples_samples()
    products.systems = 1
    dense = jacobian(function, x)
    tangent, cotangent = normal(1, 1, x.numel()), normal(2, 1, len(dense))
    assert relative(products.mv(tangent)[0], dense @ tangent[0].numpy()) < 1e-10
    assert relative(products.rmv(cotangent)[0], dense.T @ cotangent[0].numpy()) < 1e-10


def test_rows_whose_derivative_is_infinite_tell_of_no_others():
    x = normal(0, 4, 3)
    x[2] = 0
    roots = Jacobian(lambda v: v + v.abs().sqrt(), x)
    assert roots.couples_samples() is None
    assert Jacobian(lambda v: v.abs().sqrt() + v.roll(1, 0), x).couples_samples() is True


@given(seed=st.integers(0, 10**6), count=st.integers(1, 9), data=st.data())
def test_any_two_rows_that_depend_on_each_other_are_found(seed, count, data):
    """A matrix over the samples couples them unless it is diagonal."""
    mix = torch.eye(count, dtype=torch.float64)
    if data.draw(st.booleans()):
        row, column = (data.draw(st.integers(0, count - 1)) for _ in range(2))
        mix[row, column] += 1
    x = integers(seed, count, 3)
    coupled = bool((mix - mix.diag().diag()).any())
    assert Jacobian(lambda v: torch.tanh(mix @ v), x).couples_samples() == coupled
