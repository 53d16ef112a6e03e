"""The blocks of torchvision's models, solved as regions, against dense linear algebra."""

from __future__ import annotations

import functools
import importlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch import Tensor, nn

import frfx
from frfx import vocabulary
from tests.networks_zoo import snapshot
from tests.oracles import jacobian, normal, relative


def _module(name: str) -> Any:
    """Return a module of torchvision.models that a function of the same name may hide."""
    return importlib.import_module(f"torchvision.models.{name}")


convnext, densenet, googlenet, resnet = map(
    _module, ("convnext", "densenet", "googlenet", "resnet")
)
efficientnet, inception, mobilenet = map(_module, ("efficientnet", "inception", "mobilenetv3"))
shufflenet, squeezenet, swin, vit = map(
    _module, ("shufflenetv2", "squeezenet", "swin_transformer", "vision_transformer")
)


class Region(NamedTuple):
    """A part of a block that is solved at once.

    Attributes:
        start: The node that it is a function of.
        end: The node that it computes.
        function: The block and the value of `start` to the value of `end`.
    """

    start: str
    end: str
    function: Callable[[Any, Tensor], Tensor]


class Block(NamedTuple):
    """A kind of block: how one is made, the shape of its feature, and its regions."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    regions: tuple[Region, ...]


def _whole(end: str) -> tuple[Region, ...]:
    """Return the region that is the whole block."""
    return (Region("stem", end, lambda block, z: block(z)),)


def _strided() -> nn.Module:
    shortcut = nn.Sequential(resnet.conv1x1(4, 6, 2), nn.BatchNorm2d(6))
    return resnet.BasicBlock(4, 6, 2, shortcut)


def _inverted() -> nn.Module:
    config = mobilenet.InvertedResidualConfig(8, 3, 8, 8, True, "HS", 1, 1, 1.0)
    return mobilenet.InvertedResidual(config, nn.BatchNorm2d)


def _mbconv() -> nn.Module:
    return efficientnet.MBConv(efficientnet.MBConvConfig(2, 3, 1, 8, 8, 1), 0.1, nn.BatchNorm2d)


def _inception_a() -> nn.Module:
    def narrow(inputs: int, outputs: int, **options: Any) -> nn.Module:
        width = inputs if inputs < 16 else inputs // 16  # its own widths are 48 to 96
        return inception.BasicConv2d(width, outputs // 16, **options)

    return inception.InceptionA(4, 32, narrow)


def _basic(b: Any, z: Tensor) -> Tensor:
    y = b.bn2(b.conv2(torch.relu(b.bn1(b.conv1(z)))))
    return y + (z if b.downsample is None else b.downsample(z))


def _bottleneck(b: Any, z: Tensor) -> Tensor:
    y = torch.relu(b.bn2(b.conv2(torch.relu(b.bn1(b.conv1(z))))))
    return b.bn3(b.conv3(y)) + z


def _attend(b: Any, z: Tensor) -> Tensor:
    y = b.ln_1(z)
    return z + b.self_attention(y, y, y)[0]


def _halves(b: Any, z: Tensor) -> Tensor:
    left, right = z.chunk(2, 1)
    return torch.cat([left, b.branch2(right)], 1)


def _expand(b: Any, z: Tensor) -> Tensor:
    return torch.relu(torch.cat([b.expand1x1(z), b.expand3x3(z)], 1))


BLOCKS = {
    "basic": Block(
        lambda: resnet.BasicBlock(4, 4), (4, 4, 4), (Region("stem", "block.add", _basic),)
    ),
    "basic_strided": Block(_strided, (4, 4, 4), (Region("stem", "block.add", _basic),)),
    "bottleneck": Block(
        lambda: resnet.Bottleneck(8, 2), (8, 3, 3), (Region("stem", "block.add", _bottleneck),)
    ),
    "inverted_residual": Block(_inverted, (8, 3, 3), _whole("block.add")),
    "mbconv": Block(_mbconv, (8, 3, 3), _whole("block.add")),
    "inception_a": Block(_inception_a, (4, 3, 3), _whole("block.cat")),
    "inception": Block(
        lambda: googlenet.Inception(6, 2, 2, 3, 2, 3, 2), (6, 3, 3), _whole("block.cat")
    ),
    "dense": Block(lambda: densenet._DenseBlock(2, 4, 2, 3, 0.0), (4, 3, 3), _whole("block.cat")),
    "convnext": Block(lambda: convnext.CNBlock(4, 0.5, 0.1), (4, 4, 4), _whole("block.add")),
    "swin": Block(
        lambda: swin.SwinTransformerBlock(4, 2, [2, 2], [1, 1]),
        (4, 4, 4),
        (
            Region("stem", "block.add", lambda b, z: z + b.attn(b.norm1(z))),
            Region("block.add", "block.add_1", lambda b, z: z + b.mlp(b.norm2(z))),
        ),
    ),
    "swin_v2": Block(
        lambda: swin.SwinTransformerBlockV2(4, 2, [2, 2], [1, 1]),
        (4, 4, 4),
        (
            Region("stem", "block.add", lambda b, z: z + b.norm1(b.attn(z))),
            Region("block.add", "block.add_1", lambda b, z: z + b.norm2(b.mlp(z))),
        ),
    ),
    "encoder": Block(
        lambda: vit.EncoderBlock(2, 6, 8, 0.0, 0.0),
        (5, 6),
        (
            Region("stem", "block.add", _attend),
            Region("block.add", "block.add_1", lambda b, z: z + b.mlp(b.ln_2(z))),
        ),
    ),
    "shuffle": Block(
        lambda: shufflenet.InvertedResidual(6, 6, 1),
        (6, 3, 3),
        (Region("stem", "block.cat", _halves),),
    ),
    "shuffle_strided": Block(
        lambda: shufflenet.InvertedResidual(4, 8, 2),
        (4, 4, 4),
        (Region("stem", "block.cat", lambda b, z: torch.cat([b.branch1(z), b.branch2(z)], 1)),),
    ),
    "fire": Block(
        lambda: squeezenet.Fire(6, 3, 4, 4),
        (6, 3, 3),
        (Region("block.squeeze_activation", "block.cat", _expand),),
    ),
}


def network(name: str, shift: float = 0.0) -> nn.Sequential:
    """Return a stem of no effect and a block, in float64, with norms as of a trained network.

    Args:
        name: A key of `BLOCKS`.
        shift: The mean bias of the batch norms; the lower, the more ReLUs are dead.
    """
    torch.manual_seed(0)
    block = BLOCKS[name].build().double()
    for module in block.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, shift, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return nn.Sequential(OrderedDict(stem=nn.Identity(), block=block)).eval().requires_grad_(False)


def problem(name: str, count: int = 3, shift: float = 0.0) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Return a network, a batch, and targets near to its outputs."""
    model = network(name, shift)
    x = normal(1, count, *BLOCKS[name].shape)
    output = model(x)
    return model, x, output + 0.3 * normal(2, *output.shape)


def jacobians(function: Callable[[Tensor], Tensor], x: Tensor) -> list[np.ndarray]:
    """Return the Jacobian of a function by sample, as dense float64 matrices."""
    return [jacobian(function, sample[None]) for sample in x]


def exact(branches: Any = "region", damping: float = 0.0) -> frfx.policy.Policy:
    """Return the minimal policy with regions solved down to rounding."""
    policy = frfx.policy.minimal(branches=branches)
    return policy.override(op=vocabulary.region, damping=damping, tolerance=1e-13, max_steps=3000)


def solved(
    name: str, nodes: frfx.compiler.inverse.Reconstruction, block: nn.Module
) -> list[tuple[Region, list[np.ndarray], np.ndarray, np.ndarray]]:
    """Return of every region its Jacobians, what its target asks for, and what it answered."""
    found = []
    for region in BLOCKS[name].regions:
        start, end = nodes[region.start], nodes[region.end]
        function = functools.partial(region.function, block)
        with torch.no_grad():
            assert relative(function(start.forward), end.forward) < 1e-12
        asked = (end.target - end.forward).flatten(1).numpy()
        moved = (start.target - start.forward).flatten(1).numpy()
        assert np.linalg.norm(asked) > 0.1
        found.append((region, jacobians(function, start.forward), asked, moved))
    return found


@pytest.mark.parametrize("name", BLOCKS)
def test_a_region_is_solved_by_the_pseudo_inverse_of_its_jacobian(name):
    model, x, target = problem(name)
    before = snapshot(model)
    inverse = frfx.invert(model, "stem", policy=exact())
    nodes = inverse.reconstruct(x, target)
    for region, matrices, asked, moved in solved(name, nodes, model.block):
        expected = [
            np.linalg.pinv(j, rcond=1e-11) @ r for j, r in zip(matrices, asked, strict=True)
        ]
        assert relative(moved, expected) < 1e-6, region
    assert relative(inverse(x, target), nodes.feature) < 1e-12
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["basic_strided", "inception", "shuffle", "shuffle_strided"])
def test_dead_units_are_not_moved(name):
    """Where ReLUs are dead, the Jacobian has neither full row rank nor full column rank."""
    model, x, target = problem(name, shift=-1.0)
    nodes = frfx.invert(model, "stem", policy=exact()).reconstruct(x, target)
    for region, matrices, asked, moved in solved(name, nodes, model.block):
        ranks = [np.linalg.matrix_rank(j, tol=1e-11 * np.linalg.norm(j, 2)) for j in matrices]
        assert min(ranks) < min(matrices[0].shape), region
        expected = [
            np.linalg.pinv(j, rcond=1e-11) @ r for j, r in zip(matrices, asked, strict=True)
        ]
        assert relative(moved, expected) < 1e-6, region


def damped(matrix: np.ndarray, asked: np.ndarray, length: float) -> tuple[np.ndarray, float]:
    """Return the damped least-squares solution of a given length, and its Tikhonov parameter."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    seen = left.T @ asked

    def solution(shift: float) -> np.ndarray:
        return right.T @ (values * seen / (values**2 + shift))

    top = values[0] ** 2
    excess = lambda power: np.linalg.norm(solution(10**power)) - length  # noqa: E731
    shift = 10 ** brentq(excess, np.log10(top) - 12, np.log10(top) + 12, xtol=1e-14, rtol=1e-14)
    return solution(shift), shift / top


@pytest.mark.parametrize("damping", [1e-4, 1e-1])
@pytest.mark.parametrize("name", BLOCKS)
def test_damping(name, damping):
    """Damped least squares, by the square of a singular value that is estimated from below."""
    model, x, target = problem(name)
    nodes = frfx.invert(model, "stem", policy=exact(damping=damping)).reconstruct(x, target)
    for region, matrices, asked, moved in solved(name, nodes, model.block):
        for sample in zip(matrices, asked, moved, strict=True):
            expected, parameter = damped(*sample[:2], np.linalg.norm(sample[2]))
            assert relative(sample[2], expected) < 1e-6, region
            assert 0.5 * damping < parameter < (1 + 1e-6) * damping, region


@pytest.mark.parametrize("branches", ["region", "rules"])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_forward_output_gives_the_feature_back(name, branches):
    model, x, _ = problem(name)
    inverse = frfx.invert(model, "stem", policy=exact(branches))
    assert relative(inverse(x, model(x)), x) < 1e-12


@pytest.mark.parametrize("name", BLOCKS)
def test_a_sample_gets_what_it_gets_alone(name):
    model, x, target = problem(name)
    inverse = frfx.invert(model, "stem", policy=exact())
    alone = [inverse(x[i : i + 1], target[i : i + 1]) for i in range(len(x))]
    assert relative(inverse(x, target), torch.cat(alone)) < 1e-7


@pytest.mark.parametrize("name", ["basic", "dense", "swin", "encoder"])
def test_single_precision(name):
    model, x, target = problem(name)
    expected = frfx.invert(model, "stem", policy=exact())(x, target)
    policy = exact().override(op=vocabulary.region, tolerance=1e-5)
    found = frfx.invert(model.float(), "stem", policy=policy)(x.float(), target.float())
    assert found.dtype == torch.float32
    assert relative(found - x, expected - x) < 1e-3


@pytest.mark.parametrize("branches", ["region", "rules"])
def test_a_shortcut_that_the_cut_does_not_reach_is_held(branches):
    """Below the first convolution, all that the sum misses is asked of the one branch."""
    model, x, target = problem("bottleneck")
    b = model.block
    nodes = frfx.invert(model, "block.conv1", policy=exact(branches)).reconstruct(x, target)
    add, last = nodes["block.add"], nodes["block.bn3"]
    assert relative(last.target - last.forward, add.target - add.forward) < 1e-12
    branch = nn.Sequential(
        nn.Identity(), b.bn1, nn.ReLU(), b.conv2, b.bn2, nn.ReLU(), b.conv3, b.bn3
    )
    alone = frfx.invert(branch.eval(), "0", policy=exact())
    assert relative(nodes.feature, alone(nodes["block.conv1"].forward, last.target)) < 1e-9


def test_a_region_with_a_held_input():
    """The features that are concatenated to the reconstructed ones stay as they are."""
    model, x, target = problem("dense")
    b = model.block
    nodes = frfx.invert(model, "block.denselayer1.conv2", policy=exact()).reconstruct(x, target)
    feature = nodes["block.denselayer1.conv2"].forward
    for i, sample in enumerate(x):

        def rest(new: Tensor, sample: Tensor = sample) -> Tensor:
            both = [sample[None], new]
            return torch.cat([*both, b.denselayer2(both)], 1)

        asked = (target[i] - model(x)[i]).numpy().ravel()
        expected = np.linalg.pinv(jacobian(rest, feature[i : i + 1])) @ asked
        assert relative((nodes.feature - feature)[i], expected) < 1e-6


class Fan(nn.Module):
    """Linear branches out of one feature, which are added or concatenated; one is the identity."""

    def __init__(self, seed: int, size: int, branches: int, merge: str) -> None:
        super().__init__()
        self.stem, self.merge = nn.Identity(), merge
        self.branches = nn.ModuleList(nn.Linear(size, size) for _ in range(branches))
        for i, branch in enumerate(self.branches):
            branch.weight = nn.Parameter(normal(seed + i, size, size), False)
            branch.bias = nn.Parameter(normal(seed + 50 + i, size), False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        parts = [x, *(branch(x) for branch in self.branches)]
        if self.merge == "cat":
            return torch.cat(parts, 1)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


FANS = {
    "seed": st.integers(0, 10**6),
    "size": st.integers(1, 5),
    "branches": st.integers(1, 3),
}


@given(**FANS)
def test_answers_to_a_fan_out_are_averaged(seed, size, branches):
    """The mean of the answers is the least-squares solution of the fan-out x -> (x, ..., x)."""
    model = Fan(seed, size, branches, "cat").eval()
    x, asked = normal(seed + 7, 3, size), normal(seed + 8, 3, (branches + 1) * size)
    inverse = frfx.invert(model, "stem", policy=exact("rules"))
    found = inverse(x, model(x) + asked)
    parts = asked.numpy().reshape(3, branches + 1, size)
    answers = [parts[:, 0]]
    for i, branch in enumerate(model.branches):
        answers.append(parts[:, i + 1] @ np.linalg.pinv(branch.weight.numpy()).T)
    fan_out = np.kron(np.ones((branches + 1, 1)), np.eye(size))
    expected = np.linalg.lstsq(fan_out, np.concatenate(answers, 1).T, rcond=None)[0].T
    assert relative(found - x, expected) < 1e-7


@given(**FANS, merge=st.sampled_from(["add", "cat"]))
def test_a_region_leaves_no_more_than_the_rules(seed, size, branches, merge):
    """On linear branches a region is the least-squares solution: nothing comes nearer."""
    model = Fan(seed, size, branches, merge).eval()
    x = normal(seed + 7, 3, size)
    output = model(x)
    target = output + normal(seed + 8, *output.shape)
    left = {}
    for way in ("region", "rules"):
        found = frfx.invert(model, "stem", policy=exact(way))(x, target)
        left[way] = (model(found) - target).norm(dim=1)
    assert bool((left["region"] <= left["rules"] * (1 + 1e-9) + 1e-9).all())


@given(**FANS)
def test_answers_that_agree_are_met_exactly(seed, size, branches):
    model = Fan(seed, size, branches, "cat").eval()
    x, wanted = normal(seed + 7, 3, size), normal(seed + 8, 3, size)
    for way in ("region", "rules"):
        found = frfx.invert(model, "stem", policy=exact(way))(x, model(wanted))
        assert relative(found, wanted) < 1e-6


def test_a_residual_block_by_rules():
    """The sum is shared in halves; the shortcut and the branch answer, and their mean is taken."""
    model, x, target = problem("basic")
    b = model.block
    nodes = frfx.invert(model, "stem", policy=exact("rules")).reconstruct(x, target)
    half = (nodes["block.add"].target - nodes["block.add"].forward) / 2
    branch = nn.Sequential(nn.Identity(), b.conv1, b.bn1, nn.ReLU(), b.conv2, b.bn2).eval()
    alone = frfx.invert(branch, "0", policy=exact())
    expected = (x + half + alone(x, branch(x) + half)) / 2
    assert relative(nodes.feature, expected) < 1e-12
