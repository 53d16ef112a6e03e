"""Linear maps that autograd does not look into, against finite differences and the dense matrix."""

from __future__ import annotations

import torch
from torch.autograd import gradcheck, gradgradcheck

from frfx.linalg.linear_function import linear_function
from tests.oracles import normal

A, CONSTANT = normal(0, 5, 3), normal(1, 5)


def affine(x):
    return linear_function(
        lambda v: v @ A.mT, lambda u: u @ A, x, value=lambda v: v @ A.mT + CONSTANT
    )


def test_derivatives_of_any_order_and_in_either_mode():
    x = normal(2, 4, 3).requires_grad_()
    assert torch.equal(affine(x), x @ A.mT + CONSTANT)
    assert gradcheck(affine, x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(lambda v: affine(v.sin()), x)


def test_without_a_constant_the_value_is_the_product():
    x = normal(2, 4, 3).requires_grad_()
    y = linear_function(lambda v: v @ A.mT, lambda u: u @ A, x)
    assert torch.equal(y, x @ A.mT)
    (found,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(found, A.sum(0).expand(4, 3))


def test_function_transforms():
    x, tangent = normal(2, 4, 3), normal(3, 4, 3)
    found = torch.func.grad(lambda v: affine(v).square().sum())(x)
    torch.testing.assert_close(found, 2 * affine(x) @ A)
    _, found = torch.func.jvp(affine, (x,), (tangent,))
    torch.testing.assert_close(found, tangent @ A.mT)


def test_vectorised_derivatives():
    """All rows of a Jacobian at once: one product of a batch of samples."""
    x, rows = normal(2, 4, 3), torch.eye(20, dtype=torch.float64).view(20, 4, 5)
    expected = torch.autograd.functional.jacobian(lambda v: v.sin() @ A.mT, x)

    def function(v):
        return affine(v.sin())

    for found in (
        torch.func.jacrev(function)(x),
        torch.func.jacfwd(function)(x),
        torch.autograd.functional.jacobian(function, x, vectorize=True),
        torch.func.jacrev(torch.func.vmap(lambda v: affine(v[None].sin())[0]))(x),
    ):
        torch.testing.assert_close(found, expected)
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(leaf), leaf, rows, is_grads_batched=True)
    torch.testing.assert_close(found.view(4, 5, 4, 3), expected)
    hessian = torch.func.hessian(lambda v: affine(v.sin()).square().sum())(x)
    plain = torch.func.hessian(lambda v: (v.sin() @ A.mT + CONSTANT).square().sum())(x)
    torch.testing.assert_close(hessian, plain)


def test_nothing_is_recorded_where_nobody_asks():
    with torch.no_grad():
        assert affine(normal(2, 4, 3).requires_grad_()).grad_fn is None
    assert affine(normal(2, 4, 3)).grad_fn is None
