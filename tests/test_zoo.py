"""Twelve networks of torchvision, unchanged, from labels back to the stem.

`nox -s zoo` takes all of them, to four depths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo_models
import zoo_page
from torch import Tensor, nn
from torchvision import models
from torchvision.models import densenet, resnet, vision_transformer
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import SwinTransformer, SwinTransformerBlockV2

import frfx

CLASSES = 10


def vgg() -> nn.Module:
    """VGG with its own classifier: 7x7 pixels of 8 channels, pooled to from fewer."""
    model = models.VGG(models.vgg.make_layers([8, "M", 8, 8, "M"], batch_norm=True), CLASSES)
    model.classifier = nn.Sequential(
        nn.Linear(8 * 49, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, CLASSES)
    )
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "basic": (lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES), 32),
    "bottleneck": (
        lambda: resnet.ResNet(
            resnet.Bottleneck, [1, 1, 1, 1], CLASSES, groups=4, width_per_group=8
        ),
        32,
    ),
    "vgg": (vgg, 16),
    "shufflenet": (lambda: models.ShuffleNetV2([2, 2, 2], [8, 16, 24, 32, 64], CLASSES), 32),
    "googlenet": (lambda: models.googlenet(num_classes=CLASSES, init_weights=False), 32),
    "densenet": (lambda: densenet.DenseNet(8, (2, 2, 2, 2), 16, num_classes=CLASSES), 32),
    "mobilenet": (lambda: models.mobilenet_v3_small(width_mult=0.5, num_classes=CLASSES), 32),
    "convnext": (
        lambda: models.ConvNeXt(
            [
                models.convnext.CNBlockConfig(16, 32, 1),
                models.convnext.CNBlockConfig(32, None, 1),
            ],
            num_classes=CLASSES,
        ),
        32,
    ),
    "swin": (
        lambda: SwinTransformer(
            [2, 2], 16, [2, 2], [2, 4], [3, 3], num_classes=CLASSES, block=SwinTransformerBlockV2
        ),
        16,
    ),
    "vit": (
        lambda: vision_transformer.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=CLASSES),
        16,
    ),
    "maxvit": (
        lambda: MaxVit(
            (32, 32), 8, 2, [8, 16], [1, 1], 4, stochastic_depth_prob=0.2, num_classes=CLASSES
        ),
        32,
    ),
    "lraspp": (
        lambda: models.segmentation.lraspp_mobilenet_v3_large(
            num_classes=CLASSES, weights_backbone=None
        ),
        32,
    ),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network in working order, and two of the images that it is calibrated with."""
    torch.manual_seed(0)
    make, size = NETWORKS[name]
    model = make()
    zoo_models.wake(model)
    x = zoo_models.images(16, size)
    zoo_models.calibrate(model, x)
    return model, x[:2].clone()


def run(
    model: nn.Module, layer: str, x: Tensor, feature: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the value of a layer and the logits, after putting a feature in its place."""
    path = layer
    modules = dict(model.named_modules())
    while path not in modules:  # the last op of a module: its output
        path = path.rpartition(".")[0]
    seen: list[Tensor] = []

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        seen.append(output)
        return feature

    handle = modules[path].register_forward_hook(hook)
    with torch.no_grad():
        output = model(x)
    handle.remove()
    (value,) = seen
    return value, output["out"] if isinstance(output, dict) else output


def state(model: nn.Module) -> dict[str, Any]:
    """Return what an inverse could have changed."""
    modes = {path: module.training for path, module in model.named_modules()}
    flags = {
        name: (id(t), t._version, t.requires_grad, t.grad is None, t.sum().item())
        for name, t in model.state_dict(keep_vars=True).items()
    }
    return {"modes": modes, "flags": flags}


@pytest.mark.parametrize("name", NETWORKS)
def test_from_labels_to_the_stem(name):
    model, x = build(name)
    layer, share = zoo_models.cuts(model, x)["stem"]
    assert share < 0.25
    forward, logits = run(model, layer, x)
    before = state(model)
    y = logits.argmin(1)
    margin = 0.1 * float(logits.std())
    dense = logits.ndim > 2
    if dense:
        y = logits.mean((2, 3)).argmin(1)[:, None, None].expand_as(y).contiguous()
    policies = {"layerwise": frfx.policy.minimal(margin=margin)}
    if not dense:  # of which joint inversion takes long: see benchmarks/zoo.py
        policies["joint"] = frfx.policy.joint(margin=margin, unreached="ignore")
    for kind, policy in policies.items():
        inverse = frfx.invert(model, layer, policy=policy)
        feature = inverse(x, y)
        assert feature.shape == forward.shape
        assert torch.isfinite(feature).all()
        assert not torch.equal(feature, forward)
        found = frfx.measure(inverse, x, y)
        _, reconstructed = run(model, layer, x, feature)
        kept = (reconstructed.argmax(1) == y).double().mean()
        assert found.label_consistency == pytest.approx(kept.item())
        moved = (feature - forward).flatten(1).norm(dim=1) / forward.flatten(1).norm(dim=1)
        assert found.relative_deviation == pytest.approx(moved.mean().item(), rel=1e-4)
        assert all(torch.isfinite(residual.residual).all() for residual in found.residuals)
        if kind == "joint":
            (report,) = inverse.report.values()
            assert report.reached.any()
            assert found.consistent[report.reached].all()
        same = inverse(x, logits)  # the forward output as target gives the forward feature back
        assert (same - forward).norm() <= 1e-3 * forward.norm()
    assert state(model) == before


@pytest.mark.parametrize("name", ["shufflenet", "densenet", "vit", "lraspp"])
def test_cuts_ascend_and_differ(name):
    model, x = build(name)
    cuts = zoo_models.cuts(model, x)
    assert list(cuts) == ["last stage", "middle", "first stage", "stem"]
    shares = [share for _, share in cuts.values()]
    assert 0.9 >= shares[0] > shares[1] > shares[2] > shares[3] > 0
    for layer, _ in cuts.values():  # a single tensor with the batch first
        inverse = frfx.invert(model, layer, policy="joint")
        inverse.prepare.ready(x)
        assert inverse.layer == layer


def test_calibrated_features_have_unit_scale():
    model, x = zoo_models.build("mobilenet_v3_small")
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert not model.training
    assert all(norm.momentum == 0.01 for norm in norms.values())
    spread = {}
    for name, norm in norms.items():
        norm.register_forward_hook(lambda m, i, o, name=name: spread.update({name: o.std()}))
    model(x)
    assert spread.keys() == norms.keys()
    assert all(0.1 < value < 5 for value in spread.values())


def test_networks_without_norms_are_calibrated_through_their_layers():
    torch.manual_seed(0)
    model = models.squeezenet1_1(num_classes=CLASSES)
    x = zoo_models.images(16, 32)
    zoo_models.calibrate(model, x)
    spread = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, i, o: spread.append(o.std((0, 2, 3))))
    model(x)
    assert all(torch.allclose(value, torch.ones(()), atol=1e-2) for value in spread)


def test_the_page_hides_no_failure():
    settings = {"layerwise": "a()", "joint": "b()"}
    row = {"depth": "stem", "layer": "conv1", "share": 0.1, "policy": "layerwise"}
    good = {"consistency": 0.75, "deviation": 0.5, "residual": 0.25, "inverse_s": 3.0}
    common = {"parameters": 1, "image": 32, "batch": 4, "step_s": 2.0, "settings": settings}
    versions = {"torch": "2", "torchvision": "0"}
    records = [
        {"network": "one", "ended": "finished", "rows": [row | good | {"ops": 3}]},
        {"network": "two", "ended": "stopped after 5 s", "rows": [], "under way": row},
        {"network": "three", "ended": "finished", "rows": [row | {"error": "E: why"}]},
        {"network": "four", "ended": "ended with exit code -9", "rows": []},
    ]
    records = [record | common | versions for record in records]
    records[2]["settings"] = settings | {"joint": "b(2)"}
    page = zoo_page.page(records, 86)
    assert "Layerwise: `a()`.\nJoint: `b()`;\nof three: `b(2)`." in page
    assert "| layerwise | stem | 1 of 4 | 0.75 | 0.5 | 0.5 | 1.5 | 1.5 |" in page
    assert "- two: stopped after 5 s at stem, layerwise" in page
    assert "- three, stem (`conv1`), layerwise: E: why" in page
    assert "- four: ended with exit code -9" in page
