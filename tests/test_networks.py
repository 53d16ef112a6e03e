"""The benchmark networks against the paper's own parameter counts, and their shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from frfx.networks import NETWORKS, NetworkSpec, build

# The column "#paras" of Tables 1 to 6 of the paper: the parameters of layers l_S+1 to l_R. Row l_R
# counted from 1, entry l_S counted from 0. Each count stands twice in the paper, in a BP and in an
# FR line, and the two agree.
TABLE_1_MNIST = (
    (52,),
    (256, 204),
    (2826, 2774, 2570),
)
TABLE_2_CIFAR10 = (
    (380,),
    (840, 460),
    (2205, 1825, 1365),
    (33053, 32673, 32213, 30848),
    (34343, 33963, 33503, 32138, 1290),
)
TABLE_3_CIFAR100 = (
    (760,),
    (2125, 1365),
    (4845, 4085, 2720),
    (87021, 86261, 84896, 82176),
    (112721, 111961, 110596, 107876, 25700),
)
TABLE_4_TINY_IMAGENET = (
    (760,),
    (3035, 2275),
    (10945, 10185, 7910),
    (25165, 24405, 22130, 14220),
    (394317, 393557, 391282, 383372, 369152),
    (496917, 496157, 493882, 485972, 471752, 102600),
)
TABLE_5_IMAGENETTE = (
    (18760,),
    (62125, 43365),
    (98445, 79685, 36320),
    (110970, 92210, 48845, 12525),
    (117750, 98990, 55625, 19305, 6780),
    (179318, 160558, 117193, 80873, 68348, 61568),
    (180608, 161848, 118483, 82163, 69638, 62858, 1290),
)
TABLE_6_IMAGEWOOF = (
    (18760,),
    (62125, 43365),
    (98445, 79685, 36320),
    (110970, 92210, 48845, 12525),
    (117750, 98990, 55625, 19305, 6780),
    (179318, 160558, 117193, 80873, 68348, 61568),
    (180608, 161848, 118483, 82163, 69638, 62858, 1290),
)
# With each table the loss coefficient in its caption.
PAPER = {
    "mnist": (TABLE_1_MNIST, 0.1),
    "cifar10": (TABLE_2_CIFAR10, 0.1),
    "cifar100": (TABLE_3_CIFAR100, 0.7),
    "tiny-imagenet": (TABLE_4_TINY_IMAGENET, 0.7),
    "imagenette": (TABLE_5_IMAGENETTE, 0.3),
    "imagewoof": (TABLE_6_IMAGEWOOF, 0.1),
}


def layer_sizes(network: nn.Module) -> list[int]:
    """Parameters per layer, a layer being one convolution or linear op."""
    return [
        sum(parameter.numel() for parameter in module.parameters())
        for module in network.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]


@pytest.mark.parametrize("name", PAPER)
def test_parameter_counts_are_those_of_the_papers_tables(name: str) -> None:
    table, _ = PAPER[name]
    sizes = layer_sizes(build(name))
    for l_r, row in enumerate(table, start=1):
        assert tuple(sum(sizes[l_s:l_r]) for l_s in range(l_r)) == row, f"l_R = {l_r}"
    assert len(sizes) == len(table)


@pytest.mark.parametrize("name", PAPER)
def test_alpha_is_that_of_the_papers_captions(name: str) -> None:
    assert NETWORKS[name].alpha == PAPER[name][1]


def test_only_the_digits_network_is_not_the_papers() -> None:
    assert set(NETWORKS) - set(PAPER) == {"digits"}


@pytest.mark.parametrize(
    ("name", "features", "classes"),
    [
        ("digits", 64, 10),
        ("mnist", 256, 10),
        ("cifar10", 240, 10),
        ("cifar100", 320, 100),
        ("tiny-imagenet", 720, 200),
        ("imagenette", 480, 10),
        ("imagewoof", 480, 10),
    ],
)
def test_forward_shapes(name: str, features: int, classes: int) -> None:
    spec, network = NETWORKS[name], build(name)
    x = torch.randn(2, *spec.input_shape)
    flat = network[: list(dict(network.named_children())).index("flatten") + 1]
    assert flat(x).shape == (2, features)
    assert torch.Size(spec.feature_shape).numel() == features
    logits = network(x)
    assert logits.shape == (2, classes)
    assert logits.dtype == torch.float32
    assert len(layer_sizes(network)) == spec.n_layers


def test_submodules_have_readable_names_in_order() -> None:
    assert " ".join(dict(build("cifar10").named_children())) == (
        "conv1 tanh1 pool1 conv2 tanh2 pool2 conv3 tanh3 flatten fc1 tanh4 fc2"
    )
    assert " ".join(dict(build("mnist").named_children())) == (
        "conv1 tanh1 pool1 conv2 tanh2 flatten fc1"
    )


def test_convolutions_and_pools_are_as_the_paper_sets_them() -> None:
    network = build("imagenette")
    convolutions = [m for m in network if isinstance(m, nn.Conv2d)]
    assert all(m.stride == (1, 1) and m.padding == (0, 0) for m in convolutions)
    pools = [m for m in network if isinstance(m, nn.MaxPool2d)]
    assert [(m.kernel_size, m.stride) for m in pools] == [(2, 2)] * 4


def test_the_seed_decides_the_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(build("digits").parameters())

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_a_spec_of_your_own() -> None:
    spec = NetworkSpec((2, 9, 7), ((3, 2, True),), (5, 4), alpha=0.5)
    assert spec.n_layers == 3
    assert spec.feature_shape == (3, 4, 3)
    assert build(spec)(torch.zeros(1, 2, 9, 7)).shape == (1, 4)


def test_a_spec_without_convolutions() -> None:
    network = build(NetworkSpec((1, 2, 3), (), (4,), alpha=0.5))
    assert list(dict(network.named_children())) == ["flatten", "fc1"]
    assert network(torch.zeros(1, 1, 2, 3)).shape == (1, 4)


def test_unknown_name_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(ValueError, match="there is no network 'cifar-10'") as caught:
        build("cifar-10")
    message = str(caught.value)
    assert "Did you mean 'cifar10'" in message
    assert all(name in message for name in NETWORKS)


@pytest.mark.parametrize("kernels", [(5,), (4, 4), (5, 5, 5)])
def test_convolutions_that_do_not_fit_are_refused(kernels: tuple[int, ...]) -> None:
    convolutions = tuple((2, kernel, True) for kernel in kernels)
    with pytest.raises(ValueError, match=r"\(1, 4, 8\) is too small"):
        NetworkSpec((1, 4, 8), convolutions, (10,), alpha=0.1)


def test_no_linear_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one linear layer"):
        NetworkSpec((1, 8, 8), ((2, 3, False),), (), alpha=0.1)
