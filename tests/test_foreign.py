"""Networks of other families, written as their repositories write them, inverted unchanged."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import frfx
from tests.foreign import attention, merging, residual, shapes
from tests.foreign.case import Foreign
from tests.networks_zoo import snapshot
from tests.oracles import relative

NETWORKS: dict[str, Foreign] = {
    **residual.NETWORKS,
    **merging.NETWORKS,
    **attention.NETWORKS,
    **shapes.NETWORKS,
}
PLACES = [(name, layer) for name, case in NETWORKS.items() for layer in case.layers]


@functools.cache
def subject(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network whose norms know its features, a batch, and the second classes."""
    torch.manual_seed(0)
    case = NETWORKS[name]
    model = case.build()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the mean over the batches below
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(32, *case.shape))
        x = torch.randn(4, *case.shape)
        return model.eval(), x, model(x).topk(2).indices[:, 1]


def invert(name: str, layer: str, policy: frfx.policy.Policy) -> frfx.Inverse:
    """Return the inverse, with an example for the networks that symbolic tracing cannot follow."""
    model, x, _ = subject(name)
    case = NETWORKS[name]
    example = x if case.front_end == "torch.export" else None
    inverse = frfx.invert(model, layer, policy=policy, example_input=example)
    assert inverse.traced.front_end == case.front_end
    return inverse


@pytest.mark.parametrize("name", NETWORKS)
def test_layers(name):
    model, _, _ = subject(name)
    case = NETWORKS[name]
    if case.front_end == "torch.export":
        with pytest.raises(frfx.TraceError, match="Give example_input"):
            frfx.layers(model)
        return
    names = [row.name for row in frfx.layers(model)]
    assert len(names) == len(set(names))
    for layer in case.layers:
        assert any(row == layer or row.startswith(f"{layer}.") for row in names)


@pytest.mark.parametrize(("name", "layer"), PLACES)
def test_regions(name, layer):
    """Every value is finite, and the model's own output as the target moves nothing."""
    model, x, y = subject(name)
    before = snapshot(model)
    inverse = invert(name, layer, frfx.policy.minimal())
    found = frfx.measure(inverse, x, y)
    assert bool(found.deviation.isfinite().all())
    assert all(bool(row.residual.isfinite().all()) for row in found.residuals)
    with torch.no_grad():
        nodes = inverse.reconstruct(x, model(x))
    assert relative(nodes.feature, nodes[inverse.layer].forward) < 1e-4
    assert snapshot(model) == before


@pytest.mark.parametrize(("name", "layer"), PLACES)
def test_joint(name, layer):
    model, x, y = subject(name)
    before = snapshot(model)
    inverse = invert(name, layer, frfx.policy.joint(unreached="ignore"))
    found = frfx.measure(inverse, x, y)
    (report,) = inverse.report.values()
    assert bool(found.deviation.isfinite().all())
    assert int(report.reached.sum()) >= 2
    assert bool(found.consistent[report.reached].all())
    assert snapshot(model) == before


def test_a_batch_folded_with_places():
    """Within its transformer, a sample of MobileViT is several rows: only one step may see that."""
    _, x, y = subject("mobilevit")
    found = frfx.measure(invert("mobilevit", "add", frfx.policy.minimal()), x, y)
    assert bool(found.deviation.isfinite().all())
    with pytest.raises(frfx.InputError, match=r"'add' has shape \(16, 16, 8\).*cut elsewhere"):
        invert("mobilevit", "add", frfx.policy.joint())(x, y)


class OneSize(nn.Module):
    """A forward that takes images of one size only, and says so."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (10, 10):
            raise ValueError("images of 10 x 10")
        return self.fc(torch.tanh(self.conv(x)).flatten(1))


def test_image_sizes_that_export_has_fixed():
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 10, 10), torch.arange(4)
    inverse = frfx.invert(OneSize().eval(), "conv", policy="joint", example_input=x)
    assert inverse.traced.front_end == "torch.export"
    assert inverse.traced.sizes == (None, 3, 10, 10)
    assert inverse(x[:2], y[:2]).shape == (2, 4, 8, 8)
    with pytest.raises(frfx.InputError, match=r"to the shape \(any, 3, 10, 10\).*\(4, 3, 14, 14\)"):
        inverse(torch.randn(4, 3, 14, 14), y)


class Masked(nn.Module):
    """Attention that masks by minus infinity; and without a softmax behind, on request."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.qk, self.v, self.fc = nn.Linear(6, 12), nn.Linear(6, 6), nn.Linear(6, 5)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).chunk(2, -1)
        scores = q @ k.transpose(1, 2)
        future = torch.ones(4, 4, dtype=torch.bool).triu(1)
        if self.mask != "row":
            scores = scores.masked_fill(future, -torch.inf)
        else:
            scores = scores.masked_fill(torch.ones(4, 4, dtype=torch.bool), -torch.inf)
        weights = scores if self.mask == "raw" else scores.softmax(-1)
        return self.fc((weights @ self.v(x)).mean(1))


def test_masks_of_minus_infinity():
    torch.manual_seed(0)
    x, y = torch.randn(3, 4, 6), torch.arange(3)
    for policy in (frfx.policy.minimal(), frfx.policy.joint()):
        assert bool(frfx.invert(Masked("future").eval(), "x", policy=policy)(x, y).isfinite().all())
    for mask in ("row", "raw"):  # a softmax of nothing but masks, a product with them
        with pytest.raises(frfx.NonFiniteError, match="'masked_fill': its output holds NaN or inf"):
            frfx.invert(Masked(mask).eval(), "x", policy="joint")(x, y)


class Ranked(nn.Module):
    """Order statistics of a convolution: ops that no rule is known for, in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv1d(2, 4, 3), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x)).cumsum(-1)
        x, _ = x.sort(dim=-1)
        return self.fc(torch.erf(x).flatten(1))


def test_every_op_without_a_rule_is_named_at_once():
    torch.manual_seed(0)
    model, x, y = Ranked().eval(), torch.randn(3, 2, 8), torch.arange(3)
    for branches in ("region", "rules"):
        with pytest.raises(frfx.UnsupportedOpsError) as caught:
            frfx.invert(model, "conv", policy=frfx.policy.minimal(branches=branches))
        assert [op.path for op in caught.value.ops] == ["cumsum", "sort", "erf"]
        assert all("no rule is registered for it" in op.reason for op in caught.value.ops)
        assert all("register_rule" in op.remedy for op in caught.value.ops)
    inverse = frfx.invert(model, "conv", policy="joint")
    assert frfx.measure(inverse, x, y).label_consistency == 1
