"""The largest and smallest entry along dimensions: nearest by brute force."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import frfx
from tests.oracles import integers, invert, normal, reconstruct, window_distance

SPELLINGS = {
    "amax": (lambda x: torch.amax(x, (1, -1)), (1, 3), 1),
    "amax method": (lambda x: x.amax(2, keepdim=True), (2,), 1),
    "amin": (lambda x: torch.amin(x, dim=(3, 2), keepdim=True), (2, 3), -1),
    "max": (lambda x: torch.max(x, 1)[0], (1,), 1),
    "max keepdim": (lambda x: torch.max(x, dim=-1, keepdim=True)[0], (3,), 1),
    "max method": (lambda x: x.max(2)[0], (2,), 1),
    "max by name": (lambda x: x.max(2).values, (2,), 1),
    "min": (lambda x: torch.min(x, 2)[0], (2,), -1),
    "aten": (lambda x: torch.ops.aten.max.dim(x, 3)[0], (3,), 1),
}


@functools.cache
def inverse_of(name):
    """Return the compiled inverse of a network that is one of these."""
    return invert(SPELLINGS[name][0])


@pytest.mark.parametrize("name", SPELLINGS)
@given(seed=st.integers(0, 10**6), ties=st.booleans())
def test_nearest(name, seed, ties):
    function, dims, sign = SPELLINGS[name]
    draw = integers if ties else normal
    x = draw(seed, 2, 2, 3, 2)
    output = function(x)
    target = draw(seed + 1, *output.shape)
    found = inverse_of(name)(x, target)
    torch.testing.assert_close(function(found), target, rtol=1e-12, atol=1e-12)
    kept = [dim for dim in range(4) if dim not in dims]
    rows = [v.permute(*kept, *dims).flatten(len(kept)) for v in (sign * x, sign * found)]
    wanted = (sign * target).reshape(rows[0].shape[:-1])
    for place in itertools.product(*(range(n) for n in wanted.shape)):
        least = window_distance(rows[0][place].numpy(), float(wanted[place]))
        moved = float((rows[1][place] - rows[0][place]).norm())
        assert moved == pytest.approx(least, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", SPELLINGS)
def test_fixed_point(name):
    function, *_ = SPELLINGS[name]
    for x in (normal(3, 3, 2, 3, 2), integers(4, 3, 2, 3, 2), torch.zeros(3, 2, 3, 2)):
        assert torch.equal(reconstruct(function, x, function(x)), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    x = normal(5, 3, 4).to(dtype)
    found = reconstruct(lambda x: x.amax(1, keepdim=True), x, torch.zeros(3, 1, dtype=dtype))
    assert found.dtype == dtype
    assert np.allclose(found.float().amax(1), 0)


@pytest.mark.parametrize(
    "function",
    [lambda x: torch.max(x, 0)[0] + x[:1], lambda x: torch.amax(x, (0, 1), keepdim=True) + x],
)
def test_the_batch_is_no_dimension_to_take_it_over(function):
    with pytest.raises(frfx.UnsupportedOpsError, match="extreme over the batch"):
        invert(function, frfx.policy.minimal(branches="rules"))
