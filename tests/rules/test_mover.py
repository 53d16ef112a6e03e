"""Functions that move entries: against the dense Jacobian, bit for bit where they only move."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models import swin_transformer

import frfx
from tests.oracles import invert, minimal_affine_preimage, normal, relative


def merge(x):
    """Call torchvision's function where fx finds it."""
    return swin_transformer._patch_merging_pad(x)


@given(h=st.integers(1, 5), w=st.integers(1, 5), c=st.integers(1, 3), count=st.integers(1, 3))
def test_patch_merging_is_the_minimal_preimage(h, w, c, count):
    x = normal(0, count, h, w, c)
    target = normal(1, *merge(x).shape)
    found = invert(merge)(x, target)
    assert relative(found, minimal_affine_preimage(merge, x, target)) < 1e-12


@given(h=st.integers(1, 5), w=st.integers(1, 5))
def test_patch_merging_moves_and_computes_nothing(h, w):
    x, wanted = normal(0, 2, h, w, 3), normal(1, 2, h, w, 3)
    inverse = invert(merge)
    assert torch.equal(inverse(x, merge(x)), x)
    assert torch.equal(inverse(x, merge(wanted)), wanted)
    half = inverse(x.half(), merge(wanted.half()))
    assert half.dtype == torch.float16
    assert torch.equal(half, wanted.half())


def test_patch_merging_at_several_sizes_and_in_a_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), swin_transformer.PatchMerging(3)).double().eval()
    inverse = frfx.invert(model, "0")
    assert "patch_merging" in [row.op for row in inverse.summary()]
    for h, w in ((4, 4), (3, 5), (4, 4)):
        x = normal(h * w, 2, h, w, 3)
        with torch.no_grad():
            feature, merged = model[0](x), merge(model[0](x))
            assert torch.allclose(inverse(x, model(x)), feature, atol=1e-12)
            norm, reduction = model[1].norm, model[1].reduction
            target = model(x) + 0.1 * normal(1, *model(x).shape)
            rest = frfx.invert(nn.Sequential(norm, reduction), "input")
            wanted = rest(merged, target)
        found = inverse(x, target)
        moved = wanted != 0
        assert torch.allclose(merge(found)[moved & (merged != 0)], wanted[moved & (merged != 0)])
    assert len(inverse.prepare.factored["_patch_merging_pad"].factors) == 2


@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t"])
def test_swin_down_to_its_last_merging(name):
    from torchvision import models

    torch.manual_seed(0)
    model = models.get_model(name, weights=None).eval()
    merging = [row for row in frfx.layers(model) if row.op == "patch_merging"]
    assert len(merging) == 3
