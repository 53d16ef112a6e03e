"""torchvision's networks made ready for an inverse: weights, images, statistics, places to cut at.

Used by `benchmarks/zoo.py` and `tests/test_zoo.py`. Nothing here changes how a network computes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from frfx.compiler.probe import run_forward
from frfx.compiler.tail import Network
from frfx.compiler.trace import trace
from frfx.view import evaluation_view

CLASSIFIERS: list[str] = torchvision.models.list_models(module=torchvision.models)
SEGMENTERS: list[str] = torchvision.models.list_models(module=torchvision.models.segmentation)

SHARES = {"first stage": 0.25, "middle": 0.5, "last stage": 0.75}
"""Where to cut, beside the stem: at this share of the convolutions, linear ops and attentions."""

_APART = 0.05
"""Share of the convolutions, linear ops and attentions that lies between two cuts at least."""

_DEEPEST = 0.9
"""Share of the convolutions, linear ops and attentions that lies before a cut at most."""

_NOTHING = 1e-5
"""Weights that torchvision starts at or below this leave a block or a head without effect."""

_CALIBRATION = 64
"""Images that the statistics of batch norms are of."""

_LAYERS = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Setting:
    """How a network is built and fed.

    Attributes:
        size: Height and width of an image: the least that leaves every stage a pixel, or that the
            network takes at all.
        batch: How many images: fewer for networks that take a second and more for a training step.
        options: What its constructor is given.
    """

    size: int = 32
    batch: int = 4
    options: dict[str, Any] = field(default_factory=dict)


_SETTINGS = {
    "alexnet": Setting(63),
    **dict.fromkeys(
        ("convnext_large", "efficientnet_v2_l", "regnet_x_32gf", "regnet_y_32gf", "regnet_y_128gf"),
        Setting(batch=2),
    ),
    **dict.fromkeys(("resnext101", "swin_b", "wide_resnet101"), Setting(batch=2)),
    "inception_v3": Setting(75, options={"init_weights": False}),  # drawn by slow code, else
    "googlenet": Setting(32, options={"init_weights": False}),
    "maxvit": Setting(224, batch=2),  # windows of 7 in four stages: no smaller image fits
    "swin_v2": Setting(64),  # 32 is a single window, which is not shifted
    "vit_h_14": Setting(28, batch=2, options={"image_size": 28}),
    "vit_b_32": Setting(64, options={"image_size": 64}),
    "vit_l_32": Setting(64, batch=2, options={"image_size": 64}),
    "vit_l_16": Setting(32, batch=2, options={"image_size": 32}),
    "vit": Setting(32, options={"image_size": 32}),
    "deeplabv3": Setting(batch=2, options={"weights_backbone": None}),
    "fcn": Setting(batch=2, options={"weights_backbone": None}),
    "lraspp": Setting(batch=2, options={"weights_backbone": None}),
}


def setting(name: str) -> Setting:
    """Return how a network is built and fed, by the longest prefix of its name that is known."""
    known = [prefix for prefix in _SETTINGS if name.startswith(prefix)]
    return _SETTINGS[max(known, key=len)] if known else Setting()


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """Return a network of the zoo in evaluation mode, random but in working order, and images.

    Weights are torchvision's own initialisation, but for those that start at nothing (the heads and
    class tokens of vision transformers, the layer scales of ConvNeXt), which are drawn, too.
    What a network normalises is measured on random images, of which the first are returned: the
    statistics of its batch norms, or, where it has no norms, scales and biases of its layers.

    Args:
        name: As `torchvision.models.list_models` spells it.
        seed: Of all that is drawn.
    """
    torch.manual_seed(seed)
    chosen = setting(name)
    model = torchvision.models.get_model(name, weights=None, **chosen.options)
    wake(model)
    x = images(_CALIBRATION, chosen.size)
    calibrate(model, x)
    return model.eval(), x[: chosen.batch].clone()


@torch.no_grad()
def wake(model: nn.Module) -> None:
    """Draw the weights that are initialised to nothing, biases apart."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or float(parameter.abs().max()) > _NOTHING:
            continue
        if name.endswith("layer_scale"):
            parameter.uniform_(0.1, 1)
        else:
            nn.init.normal_(parameter, std=0.02)


@torch.no_grad()
def calibrate(model: nn.Module, x: Tensor) -> None:
    """Bring the features of a batch to unit scale: by batch norms, or where no norms are, without.

    By one batch, for then every norm sees in evaluation mode what its statistics are of: averages
    over several let the features of squeeze-and-excitation networks grow by powers of ten.

    Reference:
        Kraehenbuehl et al., Data-dependent initializations of convolutional neural networks
        (2016), for networks without norms, whose logits would else hardly depend on the image.
    """
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of the batches: the first one's own
        norm.train()
    layers: list[nn.Module] = []
    if not any(isinstance(module, (_BatchNorm, nn.LayerNorm)) for module in model.modules()):
        layers = [module for module in model.modules() if isinstance(module, _LAYERS)]
    hooks = [layer.register_forward_hook(_standardise) for layer in layers]
    model(x)
    for hook in hooks:
        hook.remove()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _standardise(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Rescale and shift a layer so that every channel has mean 0 and variance 1 on a batch."""
    assert isinstance(layer, _LAYERS)
    assert layer.bias is not None
    mean = output.transpose(0, 1).flatten(1).mean(1)
    scale = output.transpose(0, 1).flatten(1).std(1)
    layer.weight /= scale.view(-1, *[1] * (layer.weight.ndim - 1))
    layer.bias.copy_((layer.bias - mean) / scale)
    return layer.forward(*inputs)


def images(count: int, size: int) -> Tensor:
    """Draw images with structure at every scale, every channel of mean 0 and variance 1."""
    scales = [s for s in (2, 4, 8, 16, 32, 64, 128) if s < size] + [size]
    drawn = (
        F.interpolate(torch.randn(count, 3, s, s), (size, size), mode="bilinear") for s in scales
    )
    return F.instance_norm(torch.stack([part / part.std() for part in drawn]).sum(0))


def cuts(model: nn.Module, x: Tensor) -> dict[str, tuple[str, float]]:
    """Choose four places to cut a network at, from its own structure.

    Every choice is the last node before the next convolution, linear op or attention, among the
    nodes that all paths lead through. Where these leave out more than half of the network (a long
    bypass), the way with the most convolutions, linear ops and attentions counts as the only one.

    Args:
        model: Any network.
        x: A batch for it.

    Returns:
        Depth to the name of a node and the share of the convolutions, linear ops and attentions
        before it, from the last stage to the stem.
    """
    network = Network(trace(evaluation_view(model)))
    tensors = run_forward(network.traced, x).shapes
    parametric = set(_parametric(network))
    total = len(parametric)
    last: dict[int, fx.Node] = {}
    for node in (n for n in _chain(network, parametric) if n in tensors):
        last[len(parametric & (nx.ancestors(network.flow, node) | {node}))] = node
    stem, *depths = [depth for depth in sorted(last) if 0 < depth <= _DEEPEST * total]
    chosen = _nearest(depths, [share * total for share in SHARES.values()], _APART * total)
    places = {"stem": stem, **dict(zip(SHARES, chosen, strict=True))}
    paths = network.traced.paths
    return {
        depth: (paths[last[place]], round(place / total, 3))
        for depth, place in reversed(places.items())
    }


def _parametric(network: Network) -> Iterator[fx.Node]:
    """Yield the convolutions, linear ops and attentions, in forward order."""
    weights = dict(network.traced.root.named_parameters(remove_duplicate=False))
    known = set(network.parametric())
    for node in network.flow:
        matrices = [
            source
            for source in node.all_input_nodes
            if source.op == "get_attr" and source.target in weights
            if sum(size > 1 for size in weights[source.target].shape) > 1
        ]
        module = None
        if node.op == "call_module":
            module = network.traced.root.get_submodule(str(node.target))
        if node in known or len(matrices) > 1 or isinstance(module, nn.MultiheadAttention):
            yield node


def _chain(network: Network, parametric: set[fx.Node]) -> Iterator[fx.Node]:
    """Yield the nodes that all paths lead through, and those of the main way past long bypasses."""

    def between(start: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
        chain = network.dominators(start, end)
        for before, after in itertools.pairwise(chain):
            inside = nx.descendants(network.flow, before) & nx.ancestors(network.flow, after)
            if 2 * len(inside & parametric) > len(parametric):
                ways = [n for n in network.flow.predecessors(after) if n in inside]
                reach = {n: len(nx.ancestors(network.flow, n) & inside & parametric) for n in ways}
                yield from between(before, max(ways, key=reach.__getitem__))
            yield after

    yield from between(network.traced.input, network.logits())


def _nearest(places: list[int], wanted: list[float], apart: float) -> tuple[int, ...]:
    """Return as many ascending places, this far apart at least, with the least distances in sum."""
    return min(
        (
            chosen
            for chosen in itertools.combinations(places, len(wanted))
            if all(b - a >= apart for a, b in itertools.pairwise(chosen))
        ),
        key=lambda chosen: sum(abs(a - b) for a, b in zip(chosen, wanted, strict=True)),
    )
