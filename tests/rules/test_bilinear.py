"""Products of two tensors against the pseudo-inverse of their Jacobian with one operand held."""

from __future__ import annotations

import operator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import frfx
from frfx import vocabulary
from frfx.rules import BilinearRule, SumRule
from tests.bound_ops import bound, solve
from tests.oracles import (
    damped_least_squares,
    invert,
    jacobian,
    minimal_affine_preimage,
    normal,
    reconstruct,
    relative,
)

seeds = st.integers(0, 2**31)
sizes = st.integers(1, 5)

SPELLINGS = {
    "torch.matmul": torch.matmul,
    "@": operator.matmul,
    "x.matmul": lambda a, b: a.matmul(b),
    "torch.linalg.matmul": torch.linalg.matmul,
    "torch.bmm": torch.bmm,
    "x.bmm": lambda a, b: a.bmm(b),
    "mat2": lambda a, b: torch.bmm(a, mat2=b),
    "aten.matmul": torch.ops.aten.matmul.default,
    "aten.bmm": torch.ops.aten.bmm.default,
}


def pair(function, a, b, target, hold):
    """Return what a rule gives for the operand that is not held, and what NumPy gives."""
    op = bound(function, vocabulary.matmul)
    rule = BilinearRule(hold=hold, damping=0.0)
    found = solve(rule, op, target, function(a, b), a, b)
    if hold == "left":
        return found, minimal_affine_preimage(lambda b: function(a, b), b, target)
    return found, minimal_affine_preimage(lambda a: function(a, b), a, target)


@pytest.mark.parametrize("hold", ["left", "right"])
@pytest.mark.parametrize("function", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_equals_the_pseudo_inverse(function, hold):
    a, b, target = normal(0, 2, 3, 5), normal(1, 2, 5, 4), normal(2, 2, 3, 4)
    found, expected = pair(function, a, b, target, hold)
    assert relative(found, expected) < 1e-11


@pytest.mark.parametrize("hold", ["left", "right"])
@pytest.mark.parametrize("function", [torch.mm, lambda a, b: a.mm(b)], ids=["torch.mm", "x.mm"])
def test_matrices(function, hold):
    found, expected = pair(function, normal(0, 3, 5), normal(1, 5, 2), normal(2, 3, 2), hold)
    assert relative(found, expected) < 1e-11


@pytest.mark.parametrize("hold", ["left", "right"])
@given(
    seed=seeds,
    m=sizes,
    k=sizes,
    n=sizes,
    batches=st.sampled_from(
        [((), ()), ((3,), (3,)), ((3,), (1,)), ((1,), (3,)), ((2, 3), (3,)), ((3,), (2, 3))]
        + [((2, 1), (2, 3)), ((2, 3), (1, 3)), ((2, 1), (1, 3)), ((1, 1), (1, 1))]
    ),
)
def test_operands_that_are_repeated(hold, seed, m, k, n, batches):
    a, b = normal(seed, *batches[0], m, k), normal(seed + 1, *batches[1], k, n)
    target = normal(seed + 2, *torch.broadcast_shapes(*batches), m, n)
    found, expected = pair(torch.matmul, a, b, target, hold)
    condition = np.linalg.cond((a if hold == "left" else b).numpy()).max()
    assert found.shape == (b if hold == "left" else a).shape
    assert relative(found, expected) < 1e-13 * condition + 1e-11


@pytest.mark.parametrize("hold", ["left", "right"])
@pytest.mark.parametrize("shapes", [((2, 3, 4), (4,)), ((4,), (2, 4, 3))], ids=["right", "left"])
def test_vectors(shapes, hold):
    a, b = normal(0, *shapes[0]), normal(1, *shapes[1])
    found, expected = pair(torch.matmul, a, b, normal(2, 2, 3), hold)
    assert relative(found, expected) < 1e-11


@pytest.mark.parametrize("hold", ["left", "right"])
def test_the_operand_that_is_not_held_is_the_one_that_is_reconstructed(hold):
    op = bound(torch.matmul, vocabulary.matmul)
    names = {"left": "other", "right": "input"}
    assert BilinearRule(hold=hold).reconstructs(op) == (names[hold],)
    for held in ("input", "other"):  # the layer does not reach it: there is no choice
        reached = bound(torch.matmul, vocabulary.matmul, held=[held])
        (name,) = BilinearRule(hold=hold).reconstructs(reached)
        assert name in op.inputs
        assert name != held


def test_held_by_the_cut():
    a, b, target = normal(0, 2, 3, 5), normal(1, 2, 5, 4), normal(2, 2, 3, 4)
    op = bound(torch.matmul, vocabulary.matmul, held=["other"])
    found = solve(BilinearRule(hold="left"), op, target, a @ b, a, b)
    assert relative(found, minimal_affine_preimage(lambda a: a @ b, a, target)) < 1e-11


PARAMETERS = {
    "x @ w": (lambda x, w: x @ w, (2, 3, 4), (4, 5)),
    "w @ x": (lambda x, w: w @ x, (2, 3, 4), (5, 3)),
    "torch.mm": (torch.mm, (3, 4), (4, 2)),
    "x @ vector": (lambda x, w: x @ w, (2, 3, 4), (4,)),
    "x @ batch": (lambda x, w: x @ w, (2, 3, 4), (1, 4, 3)),
    "heads": (lambda x, w: x @ w, (2, 3, 2, 4), (3, 4, 3)),
    "repeated": (lambda x, w: x @ w, (2, 1, 2, 4), (3, 4, 3)),
    "einsum": (lambda x, w: torch.einsum("bsd,hdk->bhsk", x, w), (2, 3, 4), (2, 4, 5)),
    "einsum w first": (lambda x, w: torch.einsum("hdk,bsd->bhsk", w, x), (2, 3, 4), (2, 4, 5)),
}


@pytest.mark.parametrize("policy", ["paper", "minimal"])
@pytest.mark.parametrize("case", PARAMETERS.values(), ids=PARAMETERS)
def test_products_with_parameters_through_the_whole_graph(case, policy):
    function, shape, weight = case
    x, w = normal(0, *shape), normal(1, *weight)
    target = normal(2, *function(x, w).shape)
    found = reconstruct(lambda x, w: function(x, w), x, target, policy, w=w)
    assert relative(found, minimal_affine_preimage(lambda x: function(x, w), x, target)) < 1e-11


@pytest.mark.parametrize("alpha", [1, -0.5])
@pytest.mark.parametrize("batched", [False, True], ids=["addmm", "baddbmm"])
def test_products_that_are_added(batched, alpha):
    lead = (2,) if batched else ()
    call = torch.baddbmm if batched else torch.addmm

    def function(x, bias, w):
        return call(bias, x, w, beta=3, alpha=alpha)

    x, bias, w = normal(0, *lead, 3, 4), normal(1, *lead, 3, 5), normal(2, *lead, 4, 5)
    target = normal(3, *lead, 3, 5)
    op = bound(function, vocabulary.addmm, 1, bias=bias, w=w)
    expected = minimal_affine_preimage(lambda x: function(x, bias, w), x, target)
    found = reconstruct(function, x, target, bias=bias, w=w)
    assert BilinearRule().supports(op) is None
    assert relative(found, expected) < 1e-11
    several = bound(lambda b, x, w: call(b, x, w, alpha=alpha), vocabulary.addmm, 3)
    found = solve(
        BilinearRule(hold="right", damping=0.0),
        several,
        target,
        call(bias, x, w, alpha=alpha),
        bias,
        x,
        w,
    )
    expected = minimal_affine_preimage(lambda x: call(bias, x, w, alpha=alpha), x, target)
    assert relative(found, expected) < 1e-11


@st.composite
def equations(draw):
    """Draw an einsum of two operands without a diagonal, and shapes that fit it."""
    letters = "abcdEF"
    left = draw(st.lists(st.sampled_from(letters), unique=True, max_size=4))
    right = draw(st.lists(st.sampled_from(letters), unique=True, min_size=not left, max_size=4))
    both = sorted({*left, *right})
    extents = {name: draw(st.integers(1, 3)) for name in both}

    def shape(names):  # torch repeats dimensions of size 1, whatever they are called
        return [1 if draw(st.integers(0, 7)) == 0 else extents[name] for name in names]

    shapes = [shape(left), shape(right)]
    terms = ["".join(left), "".join(right)]
    dots = draw(st.sampled_from([None, 0, 1, 2]))
    if dots is not None:
        for i, names in enumerate((left, right)):
            if draw(st.booleans()) or i == 0:
                place = draw(st.integers(0, len(names)))
                mine = [2, 3][2 - draw(st.integers(0, dots)) :]
                shapes[i] = [*shapes[i][:place], *mine, *shapes[i][place:]]
                terms[i] = terms[i][:place] + "..." + terms[i][place:]
    equation = ",".join(terms)
    if draw(st.booleans()):
        output = draw(st.lists(st.sampled_from(both), unique=True))
        named = "".join(output)
        if dots is not None and draw(st.integers(0, 3)):
            named = "..." + named
        equation += " -> " + named
    return equation, shapes


@pytest.mark.parametrize("hold", ["left", "right"])
@given(seed=seeds, drawn=equations())
def test_einsum_equals_the_pseudo_inverse(hold, seed, drawn):
    equation, shapes = drawn
    a, b = normal(seed, *shapes[0]), normal(seed + 1, *shapes[1])
    output = torch.einsum(equation, a, b)
    target = normal(seed + 2, *output.shape)
    op = bound(lambda a, b: torch.einsum(equation, a, b), vocabulary.einsum)
    found = solve(BilinearRule(hold=hold, damping=0.0), op, target, output, a, b)
    x, function = (
        (b, lambda b: torch.einsum(equation, a, b))
        if hold == "left"
        else (a, lambda a: torch.einsum(equation, a, b))
    )
    singular = np.linalg.svd(jacobian(function, x), compute_uv=False)
    kept = singular[singular > 1e-10 * singular.max(initial=0)]
    condition = kept.max(initial=1) / kept.min(initial=1) if len(kept) else 1
    assert found.shape == x.shape
    expected = minimal_affine_preimage(function, x, target, rcond=1e-11)
    assert relative(found, expected) < 1e-12 * condition**2 + 1e-11


@pytest.mark.parametrize("equation", ["bij->bji", "b...->...b", "bij->bi", "b i j -> b", "bij"])
def test_einsum_of_one_operand(equation):
    x = normal(0, 2, 3, 4)
    target = normal(1, *torch.einsum(equation, x).shape)
    op = bound(lambda x: torch.einsum(equation, x), vocabulary.einsum, 1)
    found = solve(BilinearRule(damping=0.0), op, target, torch.einsum(equation, x), x)
    expected = minimal_affine_preimage(lambda x: torch.einsum(equation, x), x, target)
    assert relative(found, expected) < 1e-12


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: torch.einsum("bij,bjk->bik", [a, b]),
        lambda a, b: torch.ops.aten.einsum.default("bij,bjk->bik", [a, b]),
    ],
    ids=["torch", "aten"],
)
def test_einsum_of_a_list(function):
    a, b, target = normal(0, 2, 3, 5), normal(1, 2, 5, 4), normal(2, 2, 3, 4)
    found = solve(
        BilinearRule(damping=0.0), bound(function, vocabulary.einsum), target, a @ b, a, b
    )
    assert relative(found, minimal_affine_preimage(lambda b: a @ b, b, target)) < 1e-11


@pytest.mark.parametrize(
    "einsum", [torch.einsum, torch.ops.aten.einsum.default], ids=["torch", "aten"]
)
def test_einsum_of_a_list_with_a_parameter(einsum):
    x, w, target = normal(0, 2, 3), normal(1, 3, 4), normal(2, 2, 4)
    found = reconstruct(lambda x, w: einsum("ij,jk", [x, w]), x, target, w=w)
    assert relative(found, minimal_affine_preimage(lambda x: x @ w, x, target)) < 1e-11


@given(seed=seeds, shape=st.tuples(sizes, sizes, sizes), rank=st.integers(0, 3))
def test_the_forward_output_as_target_leaves_the_input(seed, shape, rank):
    m, k, n = shape
    a = normal(seed, 2, m, rank) @ normal(seed + 1, 2, rank, k)
    b = normal(seed + 2, 2, k, n)
    op = bound(torch.matmul, vocabulary.matmul)
    assert torch.equal(solve(BilinearRule(damping=0.0), op, a @ b, a @ b, a, b), b)


@given(seed=seeds, rank=st.integers(0, 3), single=st.booleans())
def test_singular_operands(seed, rank, single):
    a = normal(seed, 2, 5, rank) @ normal(seed + 1, 2, rank, 4)
    b, target = normal(seed + 2, 2, 4, 3), normal(seed + 3, 2, 5, 3)
    if single:
        a, b, target = a.float(), b.float(), target.float()
    op = bound(torch.matmul, vocabulary.matmul)
    found = solve(BilinearRule(rcond=1e-4), op, target, a @ b, a, b)
    assert found.dtype == b.dtype
    residual = (target - a @ b).double().numpy()
    expected = b.double().numpy() + np.linalg.pinv(a.double().numpy(), rcond=1e-4) @ residual
    assert relative(found, expected) < (1e-2 if single else 1e-9)


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_single_precision(scale):
    a = (normal(0, 2, 4, 6) * scale).float()
    b, target = normal(1, 2, 6, 3).float(), normal(2, 2, 4, 3).float() * scale
    op = bound(torch.matmul, vocabulary.matmul)
    found = solve(BilinearRule(damping=0.0), op, target, a @ b, a, b)
    double = [t.double() for t in (a, b, target)]
    expected = minimal_affine_preimage(lambda b: double[0] @ b, double[1], double[2])
    assert found.dtype == torch.float32
    assert relative(found, expected) < 1e-5


def test_half_precision_is_solved_in_single():
    a, b, target = normal(0, 2, 4, 6).half(), normal(1, 2, 6, 3).half(), normal(2, 2, 4, 3).float()
    op = bound(torch.matmul, vocabulary.matmul)
    found = solve(BilinearRule(damping=0.0), op, target, a @ b, a, b)
    residual = (target - a @ b).double().numpy()
    expected = b.double().numpy() + np.linalg.pinv(a.double().numpy()) @ residual
    assert found.dtype == torch.float32
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)], ids=["tall", "wide"])
@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1.0])
def test_damping_is_relative_to_every_matrix(damping, shape, dtype):
    scale = torch.tensor([1.0, 1e6])[:, None, None]
    a, b = normal(0, 2, *shape) * scale, normal(1, 2, shape[1], 3)
    target = normal(2, 2, shape[0], 3) * scale
    a, b, target = a.to(dtype), b.to(dtype), target.to(dtype)
    op = bound(torch.matmul, vocabulary.matmul)
    found = solve(BilinearRule(damping=damping), op, target, a @ b, a, b)
    for i in range(2):
        residual = (target - a @ b)[i].double().numpy()
        step = damped_least_squares(a[i].double().numpy(), residual, damping)
        expected = b[i].double().numpy() + step
        assert relative(found[i], expected) < (1e-4 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("held", [(), ("input",)], ids=str)
def test_damped_where_what_is_held_would_move(held):
    a, b, target = normal(0, 2, 3, 5), normal(1, 2, 5, 4), normal(2, 2, 3, 4)
    op = bound(torch.matmul, vocabulary.matmul, held=held)
    found = solve(BilinearRule(), op, target, a @ b, a, b)
    rule = BilinearRule(damping=0.0 if held else 1e-2)
    assert torch.equal(found, solve(rule, op, target, a @ b, a, b))


def test_no_sample_changes_another():
    a, b, target = normal(0, 3, 4, 4), normal(1, 3, 4, 2), normal(2, 3, 4, 2)
    op = bound(torch.matmul, vocabulary.matmul)
    alone = solve(BilinearRule(damping=0.0), op, target[:1], a[:1] @ b[:1], a[:1], b[:1])
    a[1] *= 1e12
    a[2, 0, 0] = torch.nan
    found = solve(BilinearRule(damping=0.0), op, target, a @ b, a, b)
    torch.testing.assert_close(found[:1], alone)
    assert found[1].isfinite().all()
    assert found[2].isnan().all()


def test_a_matrix_of_the_model_is_factored_once():
    x, w, target = normal(0, 2, 4), normal(1, 4, 3), normal(2, 2, 3)
    inverse = invert(lambda x, w: x @ w, w=w)
    inverse(x, target)
    (row,) = (row for row in inverse.summary() if row.op == "matmul")
    np.testing.assert_allclose(row.condition, np.linalg.cond(w.numpy()))


REFUSED = {
    "computed operand": (
        lambda x, w: x @ (w * x.size(0)),
        vocabulary.matmul,
        "its other is computed in the graph, not read from the model",
    ),
    "computed operand of einsum": (
        lambda x, w: torch.einsum("ij,jk", x, w * x.size(0)),
        vocabulary.einsum,
        "its right is computed in the graph, not read from the model",
    ),
    "computed alpha": (
        lambda x, w: w.addmm(x, w, alpha=x.size(0)),
        vocabulary.addmm,
        "its alpha or beta is computed in the graph, not read from the model",
    ),
    "the summand": (
        lambda x, w: torch.addmm(x, w, w),
        vocabulary.addmm,
        "it would have to reconstruct its input, which it does not multiply",
    ),
    "computed operand in a list": (
        lambda x, w: torch.ops.aten.einsum.default("ij,jk", [x, w * x.size(0)]),
        vocabulary.einsum,
        "one of its operands is computed in the graph, not read from the model",
    ),
    "diagonal": (
        lambda x, w: torch.einsum("ii,ij", x, w),
        vocabulary.einsum,
        "it takes a diagonal: 'i' stands twice in 'ii'",
    ),
    "three operands": (
        lambda x, w: torch.einsum("ij,jk,kl", x, w, w),
        vocabulary.einsum,
        "it multiplies 3 tensors: write it as products of two",
    ),
    "sublists": (
        lambda x, w: torch.einsum(x, [0, 1], w, [1, 2]),
        vocabulary.einsum,
        "its equation is no string",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused(case):
    function, kind, reason = case
    op = bound(function, kind, 1, w=torch.ones(3, 3))
    assert BilinearRule().supports(op) == reason


def test_an_unknown_side_to_hold():
    with pytest.raises(frfx.PolicyError, match="hold='both' is none of 'left', 'right'"):
        BilinearRule(hold="both")


def test_compiles_without_a_graph_break():
    a, b, target = normal(0, 2, 3, 5), normal(1, 2, 5, 4), normal(2, 2, 3, 4)
    inversion = BilinearRule().build(bound(torch.matmul, vocabulary.matmul))
    compiled = torch.compile(inversion, backend="aot_eager", fullgraph=True)
    expected = inversion(target, a @ b, a, b)
    torch.testing.assert_close(compiled(target, a @ b, a, b), expected)


def test_other_rules_reconstruct_every_free_input():
    op = bound(torch.add, vocabulary.add)
    assert SumRule().reconstructs(op) == ("input", "other")
    held = bound(torch.add, vocabulary.add, held=["input"])
    assert SumRule().reconstructs(held) == ("other",)
