"""Products by oneDNN against double precision, whatever processor this is."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from frfx.linalg import products
from frfx.linalg.products import has_whole_registers, matmul, onednn_is_faster
from tests.oracles import normal, relative

needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this build of torch has no oneDNN",
)


@pytest.fixture(autouse=True)
def _as_if_it_were_faster(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_ENTRIES", {True: 1, False: 1})


class Counter:
    """Counts the products that oneDNN makes."""

    def __init__(self) -> None:
        self.count, self._own = 0, products._by_onednn

    def __call__(self, a: Tensor, b: Tensor, *others: Tensor | None) -> Tensor:
        self.count += 1
        return self._own(a, b, *others)


sizes = st.integers(0, 9)


@needs_onednn
@given(
    batch=st.lists(st.integers(0, 3), max_size=2), m=sizes, k=sizes, n=sizes,
    turned=st.tuples(st.booleans(), st.booleans()), given_out=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_products_are_those_of_double(batch, m, k, n, turned, given_out, seed):
    a = normal(seed, *batch, m, k, dtype=torch.float32)
    b = normal(seed + 1, *batch, k, n, dtype=torch.float32)
    a, b = (t.mT.contiguous().mT if turn else t for t, turn in zip((a, b), turned, strict=True))
    out = torch.full((*batch, m, n), torch.nan) if given_out else None
    found = matmul(a, b, out)
    expected = a.double() @ b.double()
    assert found.shape == expected.shape
    assert out is None or found.data_ptr() == out.data_ptr()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_large_matrices_are_exact_to_single():
    a, b = (normal(seed, 3, 512, 512, dtype=torch.float32) for seed in (0, 1))
    counter = Counter()
    with patch.object(products, "_by_onednn", counter):
        found = matmul(a, b)
    assert counter.count == 3
    assert relative(found.double(), a.double() @ b.double()) < 1e-6


@needs_onednn
@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.ones(4, 6)[:, ::2], torch.ones(3, 5)),
        (torch.ones(4, 3), torch.ones(3, 10)[:, ::2]),
        (torch.ones(3, 4, 3), torch.ones(3, 5)),
        (torch.ones(4, 3), torch.ones(2, 3, 5)),
        (torch.ones(1, 4, 3), torch.ones(2, 3, 5)),
        (torch.ones(4, 3).double(), torch.ones(3, 5).double()),
        (torch.ones(4, 0), torch.ones(0, 5)),
    ],
    ids=["rows", "columns", "one right", "one left", "broadcast", "double", "nothing"],
)
def test_what_onednn_does_not_take_torch_multiplies(a, b):
    counter = Counter()
    with patch.object(products, "_by_onednn", counter):
        torch.testing.assert_close(matmul(a, b), a @ b)
    assert not counter.count


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_is_added(dtype):
    x, a, b = normal(0, 4, 5), normal(1, 4, 3), normal(2, 3, 5)
    found = products.addmm(*(t.to(dtype) for t in (x, a, b)))
    assert relative(found.double(), x + a @ b) < 10 * torch.finfo(dtype).eps


@needs_onednn
@given(
    batch=st.lists(st.integers(0, 3), min_size=1, max_size=2), k=sizes, n=sizes,
    bias=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_linear_layers_are_those_of_double(batch, k, n, bias, dtype, seed):
    x, weight = normal(seed, *batch, k, dtype=dtype), normal(seed + 1, n, k, dtype=dtype)
    added = normal(seed + 2, n, dtype=dtype) if bias else None
    counter = Counter()
    with patch.object(products, "_by_onednn", counter):
        found = products.linear(x, weight, added)
    expected = x.double() @ weight.double().mT + (0 if added is None else added.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    plain = len(batch) == 1 and dtype == torch.float32 and min(x.numel(), weight.numel()) > 0
    assert counter.count == plain


BIASES = {
    "strided": torch.randn(5, 2)[:, 0],
    "expanded": torch.randn(1).expand(5),
    "one number": torch.randn(1),
    "no dimension": torch.tensor(2.0),
    "a row": torch.randn(1, 5),
    "a row a sample": torch.randn(4, 5),
}


@needs_onednn
@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_any_bias_that_torch_takes(bias):
    x, weight = normal(0, 4, 3).float(), normal(1, 5, 3).float()
    found = products.linear(x, weight, bias)
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, bias))


@needs_onednn
def test_a_product_is_of_the_type_that_autocast_asks_for():
    x, weight, bias = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5)
    with torch.autocast("cpu", torch.bfloat16):
        found = products.linear(x, weight, bias)
        expected = torch.nn.functional.linear(x, weight, bias)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@needs_onednn
@pytest.mark.parametrize("which", range(3))
def test_gradients_of_linear_layers_are_torchs(which):
    given = [normal(0, 3, 4), normal(1, 5, 4), normal(2, 5)]
    given = [t.float() for t in given]
    given[which].requires_grad_()
    (found,) = torch.autograd.grad(products.linear(*given).square().sum(), given[which])
    linear = torch.nn.functional.linear
    (expected,) = torch.autograd.grad(linear(*given).square().sum(), given[which])
    torch.testing.assert_close(found, expected)


class Matmul:
    """Settings of torch's: reading the older one is an error where the newer one was used."""

    def __init__(self, *, older: bool | None = None, newer: str = "none") -> None:
        self._older, self.fp32_precision = older, newer

    @property
    def allow_tf32(self) -> bool:
        if self._older is None:
            raise RuntimeError("mix of the legacy and new APIs")
        return self._older


@pytest.mark.parametrize(
    ("settings", "in_tf32"),
    [
        ({"older": False}, False),
        ({"older": True}, True),
        ({"newer": "tf32"}, True),
        ({"newer": "ieee"}, False),
    ],
)
def test_either_setting_is_read(settings, in_tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "matmul", Matmul(**settings))
    assert products._in_tf32() is in_tf32


@needs_onednn
def test_a_user_may_turn_it_off():
    a, b = normal(0, 4, 3, dtype=torch.float32), normal(1, 3, 5, dtype=torch.float32)
    assert products._serves(a, b)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not products._serves(a, b)


def test_nothing_breaks_a_compiled_graph():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    a, b = normal(0, 4, 3, dtype=torch.float32), normal(1, 3, 5, dtype=torch.float32)
    found = torch.compile(lambda a, b: matmul(a, b).sin(), backend=backend, fullgraph=True)(a, b)
    torch.testing.assert_close(found, (a @ b).sin())
    assert len(graphs) == 1


@needs_onednn
def test_gradients_and_transforms_are_torchs():
    a, b = normal(0, 4, 3, dtype=torch.float32), normal(1, 3, 5, dtype=torch.float32)
    a.requires_grad_()
    (found,) = torch.autograd.grad(matmul(a, b).sum(), a)
    torch.testing.assert_close(found, b.sum(1).expand(4, 3))
    stack = normal(2, 6, 4, 3, dtype=torch.float32)
    torch.testing.assert_close(torch.vmap(lambda each: matmul(each, b))(stack), stack @ b)
    with torch.no_grad():
        assert products._serves(a, b)  # nothing records there


@pytest.mark.parametrize(
    ("vendor", "capability", "faster"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
    ],
)
@needs_onednn
def test_mkl_keeps_what_it_is_made_for(vendor, capability, faster):
    with (
        patch.object(products, "_processor", lambda: f"vendor_id : {vendor}"),
        patch.object(torch.backends.cpu, "get_cpu_capability", lambda: capability),
        patch.object(torch.backends.mkl, "is_available", lambda: True),
    ):
        assert onednn_is_faster.__wrapped__() is faster


@pytest.mark.parametrize(
    ("says", "whole"),
    [
        ("cpu family\t: 26\nmodel\t\t: 2", True),
        ("cpu family\t: 25\nmodel\t\t: 17", False),
        ("AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD", True),
        ("", False),
    ],
)
def test_processors_with_whole_registers_are_known_by_their_family(says, whole):
    with patch.object(products, "_processor", lambda: says):
        assert has_whole_registers.__wrapped__() is whole
