"""What the tests marked `gpu` ask that needs no GPU: on a device that the CPU plays."""

from __future__ import annotations

import copy

import pytest
import torch

import frfx
from frfx import networks
from frfx.linalg import products
from tests.emulated_cuda import CAN_EMULATE, Remote, emulated
from tests.joint import test_joint_gpu
from tests.joint.test_joint_networks import Encoder, Residual, batch, fresh
from tests.oracles import normal, relative
from tests.rules import test_attention, test_gpu

pytestmark = [
    pytest.mark.skipif(not CAN_EMULATE, reason="this torch knows no device without its driver"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a CUDA device: the tests marked gpu run on it"
    ),
]

CHECKS = {"is_finite": 2, "check_range": 1}
"""Where the host waits in every call: the input and the result are finite, the labels exist."""


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    with emulated(monkeypatch) as waits:
        yield waits


def test_the_device_tells_its_tensors_from_the_hosts(waits):
    here, there = torch.ones(2, 3), torch.ones(2, 3, device="cuda")
    assert there.is_cuda
    assert (there + 1)[0].device == torch.zeros(1).to("cuda").device
    with pytest.raises(RuntimeError, match="on the same device"):
        there + here
    assert not waits
    assert torch.equal((2 * there).add_(1).cpu(), 3 * here)
    assert float(there.sum()) == 6
    assert waits == {"test": 2}


@pytest.mark.parametrize("policy", ["paper", "minimal"])
@pytest.mark.parametrize(("function", "shape"), test_gpu.FAMILIES.values(), ids=test_gpu.FAMILIES)
def test_every_family_of_rules(function, shape, policy):
    test_gpu.test_equals_the_cpu(function, shape, policy)


@pytest.mark.parametrize("in_tf32", [False, True])
@pytest.mark.parametrize("size", [100, 3000])
def test_long_sums_of_a_linear_layer(size, in_tf32, waits, monkeypatch):
    """The bias is added to the product, or after it: in place, but never of what is given."""
    x, weight, bias = normal(0, 4, size).float(), normal(1, 5, size).float(), normal(2, 5).float()
    there = [t.to("cuda") for t in (x, weight, bias)]
    own, at_once = torch.nn.functional.linear, []
    monkeypatch.setattr(products, "_in_tf32", lambda: in_tf32)
    monkeypatch.setattr(products.F, "linear", lambda *a: at_once.append(a) or own(*a))
    found = products.linear(*there)
    assert bool(at_once) == (size == 100 or in_tf32)
    assert found.is_cuda
    assert not waits
    torch.testing.assert_close(found.cpu(), own(x, weight, bias))
    assert all(torch.equal(t.cpu(), own) for t, own in zip(there, (x, weight, bias), strict=True))


def test_what_else_is_asked_of_a_gpu():
    test_gpu.test_an_op_without_weights_follows_its_input()
    test_gpu.test_the_host_learns_in_time_that_all_have_converged()
    for embed in (frfx.nearest_embedding, frfx.maximum_assignment):
        test_gpu.test_embeddings_equal_the_cpus(embed, 0.5)
    test_attention.test_on_a_gpu(torch.float64)


@pytest.mark.parametrize("constraint", ["inequality", "equality"])
@pytest.mark.parametrize(("kind", "layer"), [(Residual, "block1"), (Encoder, "norm1")])
def test_joint_inversion(kind, layer, constraint):
    test_joint_gpu.test_as_on_the_cpu(kind, layer, constraint)


@pytest.mark.parametrize("policy", ["paper", "minimal"])
def test_a_call_waits_for_its_checks_alone(policy, waits):
    torch.manual_seed(0)
    model = networks.build("mnist").eval()
    x, y = normal(0, 4, 1, 28, 28).float(), torch.arange(4)
    expected = frfx.invert(model, 0, policy=policy)(x, y)
    inverse = frfx.invert(copy.deepcopy(model).cuda(), 0, policy=policy)
    x, y = x.cuda(), y.cuda()
    inverse(x, y)
    waits.clear()
    found = inverse(x, y)
    assert waits == CHECKS
    assert isinstance(found, Remote)
    assert relative(found.cpu(), expected.detach()) < 1e-4


@pytest.mark.parametrize(
    ("kind", "layer", "branches"),
    [(Residual, "stem", "region"), (Encoder, "patch", "region"), (Encoder, "patch", "rules")],
)
@pytest.mark.filterwarnings("ignore::frfx.ConvergenceWarning")
def test_branches(kind, layer, branches):
    x, y = batch(fresh(kind), 6)
    x, model = x.double(), fresh(kind).double()
    policy = frfx.policy.minimal(branches=branches)
    expected = frfx.invert(model, layer, policy=policy)(x, y)
    inverse = frfx.invert(copy.deepcopy(model).cuda(), layer, policy=policy)
    found = inverse(x.cuda(), y.cuda())
    assert isinstance(found, Remote)
    assert relative(found.cpu(), expected.detach()) < 1e-6


def test_post_training():
    torch.manual_seed(0)
    models = [networks.build("digits").double()]
    models.append(copy.deepcopy(models[0]))
    x, y = normal(0, 12, 1, 8, 8), torch.arange(12) % 10
    found = []
    for model, device in zip(models, ("cpu", "cuda"), strict=True):
        model.to(device)
        with frfx.PostTraining(model, upto_layer=2, alpha=0.5, weighing="relative") as step:
            optimizer = torch.optim.SGD(step.trained_parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                losses = step(x.to(device), y.to(device))
                losses.total.backward()
                optimizer.step()
        found.append(
            [float(losses.total.detach()), *(p.detach().cpu() for p in model.parameters())]
        )
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    for here, there in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(there, here)
