"""The six benchmark networks of the FR-PT paper, and a small one for scikit-learn's digits."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import nn

from frfx.errors import ModelError, nearest

Convolution = tuple[int, int, bool]
"""Output channels, kernel size, and whether a 2x2 max pool follows."""


@dataclass(frozen=True)
class NetworkSpec:
    """A plain CNN as the paper draws it: tanh convolutions, some of them pooled, then linear ops.

    A layer is one convolution or linear op with its activation and its pooling; the layers number
    from 1, and the last has no activation. Convolutions have stride 1 and no padding.

    Attributes:
        input_shape: Channels, height and width of one image.
        convolutions: Output channels, kernel size and whether a 2x2 max pool follows, per layer.
        linear: Output features per layer; the last are the logits.
        alpha: The weight of the reconstruction loss (Eq. 3) that the paper uses on this data set.

    Raises:
        ModelError: If there is no linear layer, or the feature maps shrink to nothing on the way.
    """

    input_shape: tuple[int, int, int]
    convolutions: tuple[Convolution, ...]
    linear: tuple[int, ...]
    alpha: float

    def __post_init__(self) -> None:
        if not self.linear:
            raise ModelError("a network needs at least one linear layer, the logits")
        shape = self.feature_shape
        if min(shape) < 1:
            raise ModelError(
                f"an input of shape {self.input_shape} is too small for these convolutions: "
                f"the last feature would have shape {shape}"
            )

    @property
    def n_layers(self) -> int:
        """The number of layers, the paper's L."""
        return len(self.convolutions) + len(self.linear)

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the first linear layer reads, before flattening."""
        channels, height, width = self.input_shape
        for out_channels, kernel, pool in self.convolutions:
            channels, height, width = out_channels, height - kernel + 1, width - kernel + 1
            if pool:
                height, width = height // 2, width // 2
            if min(height, width) < 1:  # two negative sizes must not look fine again further on
                break
        return channels, height, width


# The paper gives no table of its networks. These follow from the parameter counts of its Tables 1
# to 6, every one of which they reproduce (tests/test_networks.py).
_IMAGENETTE_CONVOLUTIONS = (
    (10, 25, True),
    (15, 17, True),
    (20, 11, True),
    (25, 5, True),
    (30, 3, False),
)

NETWORKS: dict[str, NetworkSpec] = {
    # Ours, not the paper's: small enough for tests and first steps, on data that need no download.
    "digits": NetworkSpec((1, 8, 8), ((8, 3, True), (16, 2, False)), (10,), alpha=0.1),
    "mnist": NetworkSpec((1, 28, 28), ((2, 5, True), (4, 5, False)), (10,), alpha=0.1),
    "cifar10": NetworkSpec(
        (3, 32, 32), ((5, 5, True), (10, 3, True), (15, 3, False)), (128, 10), alpha=0.1
    ),
    "cifar100": NetworkSpec(
        (3, 32, 32), ((10, 5, True), (15, 3, True), (20, 3, False)), (256, 100), alpha=0.7
    ),
    "tiny-imagenet": NetworkSpec(
        (3, 64, 64),
        ((10, 5, True), (25, 3, True), (35, 3, True), (45, 3, False)),
        (512, 200),
        alpha=0.7,
    ),
    "imagenette": NetworkSpec((3, 224, 224), _IMAGENETTE_CONVOLUTIONS, (128, 10), alpha=0.3),
    "imagewoof": NetworkSpec((3, 224, 224), _IMAGENETTE_CONVOLUTIONS, (128, 10), alpha=0.1),
}


def build(network: str | NetworkSpec) -> nn.Sequential:
    """Build an untrained network, initialised from torch's global generator.

    The submodules are ``conv1, tanh1, pool1, conv2, ..., flatten, fc1, ...``; ``tanh<l>`` counts
    layers, and ``conv``, ``pool`` and ``fc`` count within their own kind, a pool by its
    convolution.

    Args:
        network: A key of `NETWORKS`, or a spec of your own.

    Returns:
        A float32 module (torch's default dtype) from ``(N, C, H, W)`` to logits ``(N, classes)``.

    Raises:
        ModelError: If no network has that name.

    Source: FR-PT, Section 4 (all activations tanh; max pooling with stride = kernel).
    """
    spec = _find(network) if isinstance(network, str) else network
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    channels = spec.input_shape[0]
    for i, (out_channels, kernel, pool) in enumerate(spec.convolutions, start=1):
        modules[f"conv{i}"] = nn.Conv2d(channels, out_channels, kernel)
        modules[f"tanh{i}"] = nn.Tanh()
        if pool:
            modules[f"pool{i}"] = nn.MaxPool2d(2)
        channels = out_channels

    modules["flatten"] = nn.Flatten()
    channels, height, width = spec.feature_shape
    features = channels * height * width
    for i, out_features in enumerate(spec.linear, start=1):
        modules[f"fc{i}"] = nn.Linear(features, out_features)
        layer = len(spec.convolutions) + i
        if layer < spec.n_layers:
            modules[f"tanh{layer}"] = nn.Tanh()
        features = out_features
    return nn.Sequential(modules)


def _find(name: str) -> NetworkSpec:
    try:
        return NETWORKS[name]
    except KeyError:
        hint = nearest(name, NETWORKS)
        raise ModelError(
            f"there is no network {name!r}.{hint} The networks are {', '.join(NETWORKS)}."
        ) from None
