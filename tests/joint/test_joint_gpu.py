"""Joint inversion on a CUDA device: as on the CPU."""

from __future__ import annotations

import pytest
import torch

import frfx
from tests.joint.test_joint_networks import Encoder, Residual, batch, fresh

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("kind", "layer"), [(Residual, "block1"), (Encoder, "norm1")])
@pytest.mark.parametrize("constraint", ["inequality", "equality"])
def test_as_on_the_cpu(kind, layer, constraint):
    model = fresh(kind).double()
    x, y = batch(fresh(kind), 20)
    policy = frfx.policy.joint(constraint=constraint, steps=30, unreached="ignore")
    expected = frfx.invert(model, layer, policy=policy)
    there = expected(x.double(), y)
    inverse = frfx.invert(fresh(kind).double().cuda(), layer, policy=policy)
    found = inverse(x.double().cuda(), y.cuda())
    assert found.device.type == "cuda"
    reached = expected.report[expected.layer].reached
    assert torch.equal(inverse.report[inverse.layer].reached.cpu(), reached)
    torch.testing.assert_close(found.cpu()[reached], there[reached], rtol=1e-4, atol=1e-6)
