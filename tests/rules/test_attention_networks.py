"""Attention through the whole graph: what is held is not averaged in, and shifted windows."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

import frfx
from tests.oracles import jacobian, minimal_affine_preimage, normal, relative

RULES = frfx.policy.minimal(branches="rules")
UNDAMPED = frfx.policy.minimal(branches="rules", damping=0.0)


class Block(nn.Module):
    """An attention block over tokens (N, L, 8), of two heads, with a residual and a head."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)
        self.out, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        n, length, _ = x.shape
        parts = self.qkv(self.norm(x)).reshape(n, length, 3, 2, 4)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        y = self.mix(q, k, v).transpose(1, 2).reshape(n, length, 8)
        return self.head((x + self.out(y)).mean(1))


class Products(Block):
    def mix(self, q, k, v):
        return (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v


class Sums(Block):
    def mix(self, q, k, v):
        weights = torch.einsum("bhld,bhsd->bhls", q / 2, k).softmax(-1)
        return torch.einsum("bhls,bhsd->bhld", weights, v)


class Fused(Block):
    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class Encoder(nn.Module):
    """torch's own encoder."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12), 2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.encoder(x.transpose(0, 1)).transpose(0, 1).mean(1))


def make(kind):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nested tensors
        return kind().double().eval().requires_grad_(False)


@pytest.mark.filterwarnings("ignore::frfx.ConditionWarning", "ignore::frfx.ConvergenceWarning")
@pytest.mark.parametrize("policy", ["paper", "minimal"])
@pytest.mark.parametrize("kind", [Products, Sums, Fused, Encoder])
def test_every_op_by_its_rule(kind, policy):
    model, x = make(kind), normal(0, 3, 6, 8)
    inverse = frfx.invert(model, "x", policy=getattr(frfx.policy, policy)(branches="rules"))
    if policy == "minimal":  # the paper's ReLU does not leave what it has cut off
        assert torch.equal(inverse(x, model(x)), x)
    found = inverse(x, model(x) + 1e-4 * normal(1, 3, 5))
    assert found.isfinite().all()
    assert relative(found, x) > 0


@pytest.mark.filterwarnings("ignore::frfx.ConditionWarning")
def test_attention_by_hand_is_that_of_the_function():
    x, labels = normal(0, 3, 6, 8), torch.tensor([0, 2, 4])
    found = [
        frfx.invert(make(kind), "x", policy=RULES)(x, labels) for kind in (Fused, Products, Sums)
    ]
    assert relative(found[1], found[0]) < 1e-9
    assert relative(found[2], found[0]) < 1e-9


def test_query_and_key_do_not_average_with_the_value():
    class Self(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    x, target = normal(0, 2, 4, 6), normal(1, 2, 4, 6)
    weights = (x @ x.mT / 6**0.5).softmax(-1)
    found = frfx.invert(Self(), "x", policy=UNDAMPED)(x, target)
    assert relative(found, minimal_affine_preimage(lambda v: weights @ v, x, target)) < 1e-9


def test_the_module_answers_for_its_value_alone():
    class Self(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    model = make(Self)
    x, target = normal(0, 1, 3, 6), normal(1, 1, 3, 6)
    policy = UNDAMPED.override(node="attention", tolerance=1e-13, max_steps=100_000)
    found = frfx.invert(model, "x", policy=policy)(x, target)

    def path(value):
        return model.attention(x, x, value)[0]

    condition = np.linalg.cond(jacobian(path, x))
    expected = minimal_affine_preimage(path, x, target)
    assert relative(found, expected) < 1e-13 * condition**2 + 1e-9


@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2])
@pytest.mark.parametrize("shift", [[0, 0], [1, 1]], ids=["whole", "shifted"])
@pytest.mark.parametrize("size", [(4, 4), (3, 4)], ids=["fits", "padded"])
@pytest.mark.parametrize("damping", [0.0, 1e-2])
def test_shifted_windows_are_solved_through_their_jacobian(kind, shift, size, damping):
    torch.manual_seed(0)
    module = kind(4, [2, 2], shift, 2).double().eval().requires_grad_(False)
    x = normal(0, 1, *size, 4)
    target = module(x) + 0.1 * normal(1, 1, *size, 4)
    policy = frfx.policy.minimal(damping=damping).override(
        node="shifted_window_attention", tolerance=1e-13, max_steps=20_000
    )
    found = frfx.invert(module, "x", policy=policy)(x, target)
    deviation = (found - x).numpy().ravel()
    matrix = jacobian(module, x)
    residual = (target - module(x)).numpy().ravel()
    if damping == 0.0:
        singular = np.linalg.svd(matrix, compute_uv=False)
        expected = np.linalg.pinv(matrix, rcond=1e-12) @ residual
        condition = singular.max() / singular[singular > 1e-12 * singular.max()].min()
        assert relative(deviation, expected) < 1e-13 * condition**2 + 1e-8
        return
    # The normal equations hold, with a shift that is at most what was asked for.
    gradient = matrix.T @ (residual - matrix @ deviation)
    shifted = gradient @ deviation / (deviation @ deviation)
    largest = np.linalg.svd(matrix, compute_uv=False).max()
    assert 0.7 * damping * largest**2 <= shifted <= (1 + 1e-9) * damping * largest**2
    assert relative(gradient, shifted * deviation) < 1e-9
