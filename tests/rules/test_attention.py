"""Attention against the pseudo-inverse of its value path, the weights held at forward values."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import frfx
from frfx import vocabulary
from frfx.rules import AttentionRule, MultiheadAttentionRule
from tests.bound_ops import bound, solve
from tests.oracles import jacobian, minimal_affine_preimage, normal, relative

seeds = st.integers(0, 2**31)
SDPA = vocabulary.scaled_dot_product_attention
MHA = vocabulary.multi_head_attention


def weights_of(query, key, mask=None, causal=False, scale=None):
    """Return the weights as the formula has them, one entry after the other."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.einsum("...le,...se->...ls", query, key) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        rows, columns = (torch.arange(n) for n in scores.shape[-2:])
        scores = scores.masked_fill(columns[None] > rows[:, None], -math.inf)
    return scores.softmax(-1)


BOOLEAN = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1], [0, 1, 1, 1]], dtype=torch.bool)
CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 2.5},
    "boolean mask": {"attn_mask": BOOLEAN},
    "float mask": {"attn_mask": normal(9, 3, 4)},
    "mask by head": {"attn_mask": normal(9, 1, 2, 3, 4)},
}


@pytest.mark.parametrize("aten", [False, True], ids=["F", "aten"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_value_path_of_dot_product_attention(case, aten):
    call = (
        torch.ops.aten.scaled_dot_product_attention.default
        if aten
        else F.scaled_dot_product_attention
    )
    options = {name: value for name, value in case.items() if name != "attn_mask"}
    mask = {"attn_mask": case["attn_mask"]} if "attn_mask" in case else {}
    q, k, v = normal(0, 2, 2, 3, 5), normal(1, 2, 2, 4, 5), normal(2, 2, 2, 4, 6)
    target = normal(3, 2, 2, 3, 6)
    held = weights_of(q, k, case.get("attn_mask"), case.get("is_causal", False), case.get("scale"))
    buffers = {name: value for name, value in mask.items() if value.is_floating_point()}
    fixed = {name: value for name, value in mask.items() if name not in buffers}
    op = bound(
        lambda q, k, v, **buffers: call(q, k, v, **buffers, **fixed, **options), SDPA, 3, **buffers
    )
    output = call(q, k, v, **case)
    assert relative(output, held @ v) < 1e-13  # the oracle's weights are those of the op
    found = solve(AttentionRule(damping=0.0), op, target, output, q, k, v)
    expected = minimal_affine_preimage(lambda v: held @ v, v, target)
    assert relative(found, expected) < 1e-9


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 4, 3, 5), (2, 4, 6, 5), (2, 1, 6, 2)),
        ((1, 4, 3, 5), (2, 4, 6, 5), (1, 1, 6, 2)),
        ((2, 3, 5), (2, 6, 5), (1, 6, 2)),
    ],
    ids=["heads", "batch and heads", "batch"],
)
def test_a_value_that_heads_or_samples_have_in_common(shapes):
    q, k, v = (normal(i, *shape) for i, shape in enumerate(shapes))
    held = weights_of(q, k)
    target = normal(3, *(held @ v).shape)
    op = bound(F.scaled_dot_product_attention, SDPA, 3)
    found = solve(AttentionRule(damping=0.0), op, target, held @ v, q, k, v)
    assert relative(found, minimal_affine_preimage(lambda v: held @ v, v, target)) < 1e-9


@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (3, 3)])
def test_grouped_queries(heads):
    count, groups = heads
    q, k, v = normal(0, 2, count, 3, 5), normal(1, 2, groups, 4, 5), normal(2, 2, groups, 4, 6)
    target = normal(3, 2, count, 3, 6)

    def call(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    held = weights_of(q, k.repeat_interleave(count // groups, 1))

    def path(v):
        return held @ v.repeat_interleave(count // groups, 1)

    assert relative(call(q, k, v), path(v)) < 1e-13
    op = bound(call, SDPA, 3)
    found = solve(AttentionRule(damping=0.0), op, target, call(q, k, v), q, k, v)
    assert relative(found, minimal_affine_preimage(path, v, target)) < 1e-9


def test_queries_that_attend_to_nothing_ask_for_nothing():
    q, k, v = normal(0, 2, 3, 5), normal(1, 2, 4, 5), normal(2, 2, 4, 6)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    output = F.scaled_dot_product_attention(q, k, v, mask)
    assert torch.equal(output[:, 1], torch.zeros(2, 6, dtype=torch.float64))
    target = normal(3, 2, 3, 6)
    op = bound(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask), SDPA, 3)
    found = solve(AttentionRule(damping=0.0), op, target, output, q, k, v)
    others = torch.tensor([0, 2])
    held = weights_of(q[:, others], k)
    expected = minimal_affine_preimage(lambda v: held @ v, v, target[:, others])
    assert relative(found, expected) < 1e-9


def test_a_mask_that_comes_with_the_samples():
    q, k, v, target = normal(0, 2, 3, 5), normal(1, 2, 4, 5), normal(2, 2, 4, 6), normal(3, 2, 3, 6)
    mask = normal(4, 2, 3, 4)
    op = bound(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), SDPA, 4)
    held = weights_of(q, k, mask)
    found = solve(AttentionRule(damping=0.0), op, target, held @ v, q, k, v, mask)
    assert relative(found, minimal_affine_preimage(lambda v: held @ v, v, target)) < 1e-9


def test_queries_of_the_model():
    q, k, v, target = normal(0, 1, 3, 5), normal(1, 2, 4, 5), normal(2, 2, 4, 6), normal(3, 2, 3, 6)
    op = bound(lambda k, v, q: F.scaled_dot_product_attention(q, k, v), SDPA, 2, q=q)
    held = weights_of(q, k)
    found = solve(AttentionRule(damping=0.0), op, target, held @ v, k, v)
    assert relative(found, minimal_affine_preimage(lambda v: held @ v, v, target)) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    q, k, v = (
        normal(0, 2, 3, 5).to(dtype),
        normal(1, 2, 6, 5).to(dtype),
        normal(2, 2, 6, 4).to(dtype),
    )
    output = F.scaled_dot_product_attention(q, k, v)
    target = normal(3, 2, 3, 4).float()
    op = bound(F.scaled_dot_product_attention, SDPA, 3)
    found = solve(AttentionRule(damping=0.0), op, target, output, q, k, v)
    held = weights_of(q.double(), k.double()).numpy()
    residual = (target - output).double().numpy()
    assert found.dtype == torch.float32
    assert relative(found, v.double().numpy() + np.linalg.pinv(held) @ residual) < 1e-4


@pytest.mark.parametrize("several", [False, True])
def test_the_forward_output_as_target_leaves_the_value(several):
    if several:
        module = attention(4, 2)
        x = normal(0, 2, 3, 4)
        output = module(x, x, x)
        op = bound(Call(module), MHA, 1)
        assert torch.equal(solve(MultiheadAttentionRule(), op, output, output, x, x, x), x)
    else:
        q, k, v = normal(0, 2, 3, 5), normal(1, 2, 6, 5), normal(2, 2, 6, 4)
        output = F.scaled_dot_product_attention(q, k, v)
        op = bound(F.scaled_dot_product_attention, SDPA, 3)
        assert torch.equal(solve(AttentionRule(damping=0.0), op, output, output, q, k, v), v)


# --- multi-head attention ---


class Call(nn.Module):
    """Calls a multi-head attention, with options."""

    def __init__(self, module, **options):
        super().__init__()
        self.module = module
        self.masks = [name for name, value in options.items() if isinstance(value, torch.Tensor)]
        for name in self.masks:
            self.register_buffer(name, options.pop(name))
        self.options = options

    def forward(self, query, key=None, value=None):
        key = query if key is None else key
        value = key if value is None else value
        masks = {name: getattr(self, name) for name in self.masks}
        return self.module(query, key, value, **masks, **self.options)


def attention(embed, heads, seed=0, **options):
    """Return a multi-head attention in float64 with well-conditioned projections, evaluating."""
    module = nn.MultiheadAttention(embed, heads, dtype=torch.float64, **options).eval()
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(seed + i, *parameter.shape))
        module.out_proj.weight.copy_(conditioned(module.out_proj.weight))
        if module.in_proj_weight is None:
            parts = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        else:
            parts = module.in_proj_weight.chunk(3)
        for part in parts:
            part.copy_(conditioned(part))
    return module.requires_grad_(False)


def conditioned(matrix):
    """Return a matrix of the same singular vectors with singular values from 1 to 2."""
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ torch.diag(torch.linspace(2, 1, len(singular), dtype=matrix.dtype)) @ right


def value_path(module, query, key, mask=None):
    """Return the weights, and the output as a function of the value, by the formula."""
    heads = module.num_heads
    if module.in_proj_weight is None:
        projections = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    else:
        projections = module.in_proj_weight.chunk(3)
    biases = [0] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k = (
        (x @ projections[i].T + biases[i]).unflatten(-1, (heads, -1)).transpose(1, 2)
        for i, x in enumerate((query, key))
    )
    held = weights_of(q, k, mask)

    def path(value):
        v = (value @ projections[2].T + biases[2]).unflatten(-1, (heads, -1)).transpose(1, 2)
        return module.out_proj((held @ v).transpose(1, 2).flatten(2))

    return held, path


PADDING = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
LATER = torch.ones(4, 4, dtype=torch.bool).triu(1)
ALONE = torch.eye(4, dtype=torch.bool).roll(1, 0)
MASKS = {
    "none": ({}, None),
    "attn_mask": ({"attn_mask": LATER}, ~LATER),
    "causal": ({"attn_mask": LATER, "is_causal": True}, ~LATER),
    "padding": ({"key_padding_mask": PADDING}, ~PADDING[:, None, None]),
    "both": (
        {"attn_mask": ALONE, "key_padding_mask": PADDING},
        ~PADDING[:, None, None] & ~ALONE,
    ),
    "float": ({"attn_mask": normal(8, 4, 4)}, normal(8, 4, 4)),
    "by head": ({"attn_mask": normal(8, 4, 4, 4)}, normal(8, 2, 2, 4, 4)),
}


EXACT = MultiheadAttentionRule(damping=0.0, tolerance=1e-13, max_steps=100_000)


def is_well_conditioned(held):
    """Tell whether CGLS can find the least-squares solution for weights like these."""
    singular = torch.linalg.svdvals(held)
    kept = torch.where(singular > 1e-14, singular, math.inf)
    return bool((singular.amax(-1) < 30 * kept.amin(-1)).all())


@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "output and weights"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["L, N, E", "N, L, E"])
@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS)
def test_self_attention(case, batch_first, need_weights):
    options, mask = case
    module = attention(6, 2, batch_first=batch_first)
    target = normal(9, 2, 4, 6)
    draws = (normal(seed, 2, 4, 6) for seed in itertools.count(10))
    x = next(x for x in draws if is_well_conditioned(value_path(module, x, x, mask)[0]))
    _, path = value_path(module, x, x, mask)
    call = Call(module, need_weights=need_weights, **options)
    given, wanted = (x, target) if batch_first else (x.transpose(0, 1), target.transpose(0, 1))
    output, *rest = call(given)
    assert relative(output if batch_first else output.transpose(0, 1), path(x)) < 1e-13
    op = bound(call, MHA, 1)
    found = solve(EXACT, op, (wanted, *rest), (output, *rest), given, given, given)
    assert found.shape == given.shape
    found = found if batch_first else found.transpose(0, 1)
    assert relative(found, minimal_affine_preimage(path, x, target, rcond=1e-9)) < 1e-8


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 3, "vdim": 4}, {"vdim": 9}, {"kdim": 5}])
@pytest.mark.parametrize("lengths", [(2, 4), (4, 2)], ids=["wide", "tall"])
@pytest.mark.parametrize("heads", [1, 2, 6])
def test_attention_to_others(heads, lengths, sizes, bias):
    module = attention(6, heads, bias=bias, batch_first=True, **sizes)
    v, target = normal(8, 2, lengths[1], module.vdim), normal(9, 2, lengths[0], 6)
    draws = (
        (normal(seed, 2, lengths[0], 6), normal(seed + 1, 2, lengths[1], module.kdim))
        for seed in itertools.count(10)
    )
    q, k = next(qk for qk in draws if is_well_conditioned(value_path(module, *qk)[0]))
    _, path = value_path(module, q, k)
    op = bound(Call(module), MHA, 3)
    output = module(q, k, v)
    found = solve(EXACT, op, (target, output[1]), output, q, k, v)
    assert relative(found, minimal_affine_preimage(path, v, target, rcond=1e-9)) < 1e-8


@given(seed=seeds, dead=st.integers(0, 5))
def test_damping_and_singular_projections(seed, dead):
    module = attention(6, 2, seed, batch_first=True)
    with torch.no_grad():
        module.out_proj.weight[:, :dead] = 0
        module.in_proj_weight[12 + dead :] = 0
    x, target = normal(seed + 10, 1, 3, 6), normal(seed + 11, 1, 3, 6)
    _, path = value_path(module, x, x)
    output = module(x, x, x)
    matrix = jacobian(path, x)
    damping = 1e-3
    rule = MultiheadAttentionRule(damping=damping, tolerance=1e-12, max_steps=10_000)
    found = solve(rule, bound(Call(module), MHA, 1), (target, output[1]), output, x, x, x)
    # The normal equations hold, with a shift that is at most what was asked for.
    deviation = (found - x).numpy().ravel()
    gradient = matrix.T @ ((target - output[0]).numpy().ravel() - matrix @ deviation)
    shift = gradient @ deviation / max(deviation @ deviation, 1e-300)
    largest = np.linalg.svd(matrix, compute_uv=False).max()
    if largest > 0:
        assert 0.7 * damping * largest**2 <= shift <= (1 + 1e-6) * damping * largest**2
    assert np.abs(gradient - shift * deviation).max() <= 1e-9 * (1 + np.abs(gradient).max())


@pytest.mark.parametrize("held", [(), ("query",), ("query", "key")], ids=str)
def test_damped_where_the_weights_would_move(held):
    damping = 0.0 if len(held) == 2 else 1e-2
    q, k, v, target = (normal(i, 2, 3, 4) for i in range(4))
    output = F.scaled_dot_product_attention(q, k, v)
    op = bound(F.scaled_dot_product_attention, SDPA, 3, held=held)
    found = solve(AttentionRule(), op, target, output, q, k, v)
    expected = solve(AttentionRule(damping=damping), op, target, output, q, k, v)
    assert torch.equal(found, expected)
    module = attention(4, 2, batch_first=True)
    output = module(q, k, v)
    op = bound(Call(module), MHA, 3, held=held)
    found = solve(MultiheadAttentionRule(), op, (target, None), output, q, k, v)
    rule = MultiheadAttentionRule(damping=damping)
    assert torch.equal(found, solve(rule, op, (target, None), output, q, k, v))


@pytest.mark.parametrize("unconverged", ["warn", "raise", "ignore"])
def test_what_is_not_solved_is_told(unconverged):
    module = attention(6, 2, batch_first=True)
    x, target = normal(10, 2, 4, 6), normal(11, 2, 4, 6)
    output = module(x, x, x)
    op = bound(Call(module), MHA, 1)
    inversion = MultiheadAttentionRule(damping=0.0, max_steps=2, unconverged=unconverged).build(op)
    inversion((target, output[1]), output, x, x, x)
    if unconverged == "ignore":
        inversion.check_convergence()
    elif unconverged == "raise":
        with pytest.raises(frfx.ConvergenceError, match="has left 2 of 2 samples above its toler"):
            inversion.check_convergence()
    else:
        with pytest.warns(frfx.ConvergenceWarning, match="after 2 steps"):
            inversion.check_convergence()
    inversion.check_convergence()  # tells once


def test_every_sample_gets_what_it_gets_alone():
    module = attention(6, 2, batch_first=True)
    x, target = normal(10, 3, 4, 6), normal(11, 3, 4, 6)
    x[1] *= 1e3
    target[2] *= 1e9
    output = module(x, x, x)
    op = bound(Call(module), MHA, 1)
    rule = MultiheadAttentionRule(damping=1e-2)
    found = solve(rule, op, (target, output[1]), output, x, x, x)
    parts = [t[:1] for t in (target, *output, x)]
    alone = solve(rule, op, (parts[0], parts[2]), tuple(parts[1:3]), *[parts[3]] * 3)
    torch.testing.assert_close(found[:1], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_multi_head_attention_in_low_precision(dtype):
    double = attention(6, 2, batch_first=True)
    module = copy.deepcopy(double).to(dtype)
    x, target = normal(10, 2, 4, 6).to(dtype), normal(11, 2, 4, 6).float()
    output = module(x, x, x)
    rule = MultiheadAttentionRule(damping=1e-2, tolerance=1e-5, max_steps=1000)
    found = solve(rule, bound(Call(module), MHA, 1), (target, output[1]), output, x, x, x)
    # The same in double, of the values that came out in low precision.
    double.load_state_dict(module.double().state_dict())
    step = target.double() - output[0].double()
    exact = double(x.double(), x.double(), x.double())
    wanted = (exact[0] + step, exact[1])
    expected = solve(rule, bound(Call(double), MHA, 1), wanted, exact, *[x.double()] * 3)
    assert found.dtype == torch.float32
    assert relative(found, expected) < 2e-5 + 50 * torch.finfo(dtype).eps


def test_hooks_of_the_module_run_no_more_often():
    module = attention(6, 2, batch_first=True)
    x = normal(10, 2, 4, 6)
    output = module(x, x, x)
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    solve(MultiheadAttentionRule(), bound(Call(module), MHA, 1), output, output, x, x, x)
    assert not calls


def test_queries_that_attend_to_nothing():
    module = attention(6, 2)
    x, target = normal(10, 4, 1, 6), normal(11, 4, 1, 6)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[2] = True
    call = Call(module, attn_mask=mask, need_weights=False)
    output = call(x)
    assert output[0].isfinite().all()
    rule = MultiheadAttentionRule(damping=1e-2)
    assert solve(rule, bound(call, MHA, 1), (target, None), output, x, x, x).isfinite().all()


REFUSED = {
    "dropout": (
        AttentionRule,
        SDPA,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1),
        (),
        "it drops weights at random in evaluation mode, too: pass dropout_p=0.0",
    ),
    "computed mask": (
        AttentionRule,
        SDPA,
        lambda q, k, v, w: F.scaled_dot_product_attention(q, k, v, w[: q.size(1)]),
        (),
        "its attn_mask is computed in the graph, not read from the model",
    ),
    "held value": (
        AttentionRule,
        SDPA,
        F.scaled_dot_product_attention,
        ("value",),
        "its value, the only input that moves while the weights are held, is out of the layer's "
        "reach; its query and key are not",
    ),
    "held value of a module": (
        MultiheadAttentionRule,
        MHA,
        Call(attention(6, 2)),
        ("key", "value"),
        "its value, the only input that moves while the weights are held, is out of the layer's "
        "reach; its query is not",
    ),
    "bias_k": (
        MultiheadAttentionRule,
        MHA,
        Call(attention(6, 2, add_bias_kv=True)),
        (),
        "it attends to values of its own (add_bias_kv or add_zero_attn)",
    ),
    "add_zero_attn": (
        MultiheadAttentionRule,
        MHA,
        Call(attention(6, 2, add_zero_attn=True)),
        (),
        "it attends to values of its own (add_bias_kv or add_zero_attn)",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused(case):
    rule, kind, function, held, reason = case
    tensors = {"w": torch.ones(9, 4)} if "mask" in reason else {}
    op = bound(function, kind, 3, held=held, **tensors)
    assert rule().supports(op) == reason


def test_attention_without_a_batch():
    op = bound(Call(attention(6, 2)), MHA, 1).with_shapes(((6,),) * 3, ())
    reason = MultiheadAttentionRule().supports(op)
    assert reason.startswith("its input has no batch dimension: 6, 6, 6 -> ")


@pytest.mark.parametrize(
    "options", [{"tolerance": 0.0}, {"max_steps": 0}, {"unconverged": "never"}], ids=str
)
def test_options_out_of_range(options):
    with pytest.raises(frfx.PolicyError):
        MultiheadAttentionRule(**options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_gpu(dtype):
    q, k, v, target = (normal(i, 2, 3, 16, 8).to(dtype) for i in range(4))
    op = bound(F.scaled_dot_product_attention, SDPA, 3)
    output = F.scaled_dot_product_attention(q, k, v)
    expected = solve(AttentionRule(damping=1e-3), op, target, output, q, k, v)
    found = solve(AttentionRule(damping=1e-3), op, *(t.cuda() for t in (target, output, q, k, v)))
    assert relative(found.cpu(), expected) < (1e-3 if dtype == torch.float32 else 1e-9)
    module = attention(6, 2, batch_first=True).to(dtype)
    x, target = normal(10, 2, 4, 6).to(dtype), normal(11, 2, 4, 6).to(dtype)
    rule = MultiheadAttentionRule(damping=1e-2, tolerance=1e-5, max_steps=500)
    output = module(x, x, x)
    expected = solve(rule, bound(Call(module), MHA, 1), (target, None), output, x, x, x)
    op = bound(Call(module.cuda()), MHA, 1)
    output = module(*[x.cuda()] * 3)
    found = solve(rule, op, (target.cuda(), None), output, *[x.cuda()] * 3)
    assert relative(found.cpu(), expected) < 1e-3
