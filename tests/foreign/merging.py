"""Networks that split, gate, concatenate and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.foreign.case import CLASSES, Foreign


class DenseNetBc(nn.Module):
    """Bottleneck layers that concatenate what they add, transitions that halve it."""

    class Bottleneck(nn.Module):
        """Adds some channels to all that came before."""

        def __init__(self, planes: int, growth: int) -> None:
            super().__init__()
            self.bn1, self.conv1 = nn.BatchNorm2d(planes), nn.Conv2d(planes, 4 * growth, 1)
            self.bn2 = nn.BatchNorm2d(4 * growth)
            self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            out = self.conv1(F.relu(self.bn1(x)))
            out = self.conv2(F.relu(self.bn2(out)))
            return torch.cat([out, x], 1)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.dense1 = nn.Sequential(self.Bottleneck(6, 3), self.Bottleneck(9, 3))
        self.trans1 = nn.Sequential(nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 6, 1))
        self.dense2 = nn.Sequential(self.Bottleneck(6, 3), self.Bottleneck(9, 3))
        self.bn, self.linear = nn.BatchNorm2d(12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = F.avg_pool2d(self.trans1(self.dense1(self.conv1(x))), 2)
        out = self.dense2(out)
        out = F.avg_pool2d(F.relu(self.bn(out)), 5)
        out = out.view(out.size(0), -1)
        return self.linear(out)


class DualPathNet(nn.Module):
    """Part of the channels is added and part of them concatenated, by slices."""

    class Bottleneck(nn.Module):
        """One dual path: `d` channels are residual, the others dense."""

        def __init__(self, last: int, d: int, extra: int, stride: int, first: bool) -> None:
            super().__init__()
            self.d = d
            self.conv1, self.bn1 = nn.Conv2d(last, 8, 1, bias=False), nn.BatchNorm2d(8)
            self.conv2 = nn.Conv2d(8, 8, 3, stride, 1, groups=4, bias=False)
            self.bn2 = nn.BatchNorm2d(8)
            self.conv3, self.bn3 = nn.Conv2d(8, d + extra, 1), nn.BatchNorm2d(d + extra)
            self.shortcut = nn.Sequential()
            if first:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(last, d + extra, 1, stride), nn.BatchNorm2d(d + extra)
                )

        def forward(self, x: Tensor) -> Tensor:
            out = F.relu(self.bn1(self.conv1(x)))
            out = F.relu(self.bn2(self.conv2(out)))
            out = self.bn3(self.conv3(out))
            x = self.shortcut(x)
            d = self.d
            out = torch.cat([x[:, :d] + out[:, :d], x[:, d:], out[:, d:]], 1)
            return F.relu(out)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.layer1 = nn.Sequential(
            self.Bottleneck(6, 6, 2, 2, True), self.Bottleneck(10, 6, 2, 1, False)
        )
        self.linear = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer1(F.relu(self.bn1(self.conv1(x))))
        out = F.avg_pool2d(out, 5)
        return self.linear(out.view(out.size(0), -1))


class ShuffleNet(nn.Module):
    """Splits at a share of the channels and shuffles by view and permute."""

    class Block(nn.Module):
        """Half of the channels pass by; `int` of a size is more than symbolic tracing knows."""

        def __init__(self, planes: int, ratio: float = 0.5) -> None:
            super().__init__()
            self.ratio = ratio
            inside = int(planes * ratio)
            self.conv1, self.bn1 = nn.Conv2d(inside, inside, 1), nn.BatchNorm2d(inside)
            self.conv2 = nn.Conv2d(inside, inside, 3, padding=1, groups=inside)
            self.bn2 = nn.BatchNorm2d(inside)

        def forward(self, x: Tensor) -> Tensor:
            c = int(x.size(1) * self.ratio)
            x1, x2 = x[:, :c, :, :], x[:, c:, :, :]
            out = F.relu(self.bn1(self.conv1(x2)))
            out = torch.cat([x1, self.bn2(self.conv2(out))], 1)
            n, c, h, w = out.size()
            g = 2
            return out.view(n, g, c // g, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(self.Block(8), self.Block(8))
        self.linear = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.max_pool2d(out, 3, stride=2, padding=1)
        out = F.avg_pool2d(self.layer1(out), 5)
        out = out.view(out.size(0), -1)
        return self.linear(out)


def swish(x: Tensor) -> Tensor:
    """The activation as it was written before torch had it."""
    return x * x.sigmoid()


def drop_connect(x: Tensor, drop_ratio: float) -> Tensor:
    """Drop whole samples in place; only ever called in training."""
    keep_ratio = 1.0 - drop_ratio
    mask = torch.empty([x.shape[0], 1, 1, 1], dtype=x.dtype, device=x.device)
    mask.bernoulli_(keep_ratio)
    x.div_(keep_ratio)
    x.mul_(mask)
    return x


class EfficientNet(nn.Module):
    """Inverted residuals with a gate over a single feature, all functional."""

    class Block(nn.Module):
        """Expansion, depthwise convolution, squeeze-excite, projection."""

        def __init__(self, planes: int) -> None:
            super().__init__()
            inside = 2 * planes
            self.conv1, self.bn1 = nn.Conv2d(planes, inside, 1, bias=False), nn.BatchNorm2d(inside)
            self.conv2 = nn.Conv2d(inside, inside, 3, 1, 1, groups=inside, bias=False)
            self.bn2 = nn.BatchNorm2d(inside)
            self.se1, self.se2 = nn.Conv2d(inside, 3, 1), nn.Conv2d(3, inside, 1)
            self.conv3, self.bn3 = nn.Conv2d(inside, planes, 1), nn.BatchNorm2d(planes)

        def forward(self, x: Tensor) -> Tensor:
            out = swish(self.bn1(self.conv1(x)))
            out = swish(self.bn2(self.conv2(out)))
            gate = F.adaptive_avg_pool2d(out, (1, 1))
            out = out * self.se2(swish(self.se1(gate))).sigmoid()
            out = self.bn3(self.conv3(out))
            if self.training:
                out = drop_connect(out, 0.2)
            return out + x

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)
        self.layers = nn.Sequential(self.Block(6), self.Block(6))
        self.linear = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(swish(self.bn1(self.conv1(x))))
        out = F.adaptive_avg_pool2d(out, 1)
        out = out.view(out.size(0), -1)
        if self.training:
            out = F.dropout(out, p=0.2)
        return self.linear(out)


class CspDarknet(nn.Module):
    """Focus by strided slices, cross-stage partial blocks, a pyramid of poolings in a list."""

    class Conv(nn.Module):
        """Convolution, norm and SiLU in place."""

        def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1) -> None:
            super().__init__()
            self.conv = nn.Conv2d(c1, c2, k, s, k // 2, bias=False)
            self.bn, self.act = nn.BatchNorm2d(c2), nn.SiLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.bn(self.conv(x)))

    class Bottleneck(nn.Module):
        """A residual that is there only if it is asked for and fits."""

        def __init__(self, c1: int, c2: int, shortcut: bool = True) -> None:
            super().__init__()
            self.cv1, self.cv2 = CspDarknet.Conv(c1, c2), CspDarknet.Conv(c2, c2, 3)
            self.add = shortcut and c1 == c2

        def forward(self, x: Tensor) -> Tensor:
            return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))

    class C3(nn.Module):
        """Half of the width runs through bottlenecks, half goes past them."""

        def __init__(self, c1: int, c2: int, n: int, shortcut: bool = True) -> None:
            super().__init__()
            hidden = c2 // 2
            self.cv1, self.cv2 = CspDarknet.Conv(c1, hidden), CspDarknet.Conv(c1, hidden)
            self.cv3 = CspDarknet.Conv(2 * hidden, c2)
            self.m = nn.Sequential(
                *(CspDarknet.Bottleneck(hidden, hidden, shortcut) for _ in range(n))
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), dim=1))

    class Spp(nn.Module):
        """Poolings of several sizes beside the input."""

        def __init__(self, c1: int, c2: int, k: tuple[int, ...] = (3, 5)) -> None:
            super().__init__()
            self.cv1 = CspDarknet.Conv(c1, c1 // 2)
            self.cv2 = CspDarknet.Conv(c1 // 2 * (len(k) + 1), c2)
            self.m = nn.ModuleList([nn.MaxPool2d(x, stride=1, padding=x // 2) for x in k])

        def forward(self, x: Tensor) -> Tensor:
            x = self.cv1(x)
            return self.cv2(torch.cat([x] + [m(x) for m in self.m], 1))

    def __init__(self) -> None:
        super().__init__()
        self.focus = self.Conv(12, 6, 3)
        self.model = nn.Sequential(self.C3(6, 8, 1), self.Conv(8, 8, 3, 2), self.Spp(8, 8))
        self.pool, self.flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.linear = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        patches = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        x = self.model(self.focus(torch.cat(patches, 1)))
        return self.linear(self.flat(self.pool(x)))


class Cell(nn.Module):
    """A searched cell: a ModuleDict of candidates, states in a list, their sum by `sum`."""

    GENOTYPE = (("sep_conv", 0), ("skip", 1), ("max_pool", 0), ("sep_conv", 2))

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.ops = nn.ModuleList()
        for name, _ in self.GENOTYPE:
            candidates = nn.ModuleDict(
                {
                    "skip": nn.Identity(),
                    "max_pool": nn.MaxPool2d(3, stride=1, padding=1),
                    "sep_conv": nn.Sequential(
                        nn.ReLU(inplace=False),
                        nn.Conv2d(planes, planes, 3, padding=1, groups=planes, bias=False),
                        nn.Conv2d(planes, planes, 1, bias=False),
                        nn.BatchNorm2d(planes),
                    ),
                }
            )
            self.ops.append(candidates[name])
        self.reduce = nn.Conv2d(2 * planes, planes, 1)

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        states = [s0, s1]
        for i in range(2):
            pair = [(self.ops[k], self.GENOTYPE[k][1]) for k in (2 * i, 2 * i + 1)]
            states.append(sum(op(states[j]) for op, j in pair))
        return self.reduce(torch.cat(states[2:], dim=1))


class SearchedNet(nn.Module):
    """Every cell reads the two before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
        self.cells = nn.ModuleList([Cell(6), Cell(6)])
        self.classifier = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1)
        return self.classifier(s1.mean([2, 3]))


class Learner(nn.Module):
    """A functional network: a configuration, weights in a ParameterList, `F` for everything."""

    CONFIG = (
        ("conv2d", (6, 3, 3, 3)),
        ("bn", (6,)),
        ("relu", ()),
        ("max_pool2d", ()),
        ("conv2d", (8, 6, 3, 3)),
        ("bn", (8,)),
        ("relu", ()),
        ("flatten", ()),
        ("linear", (CLASSES, 72)),
    )

    def __init__(self) -> None:
        super().__init__()
        self.vars, self.vars_bn = nn.ParameterList(), nn.ParameterList()
        for name, size in self.CONFIG:
            if name == "bn":
                self.vars.extend([nn.Parameter(torch.rand(size) + 0.5) for _ in range(2)])
                mean, var = torch.randn(size) / 10, torch.rand(size) + 0.5
                self.vars_bn.extend([nn.Parameter(v, requires_grad=False) for v in (mean, var)])
            elif size:
                w = nn.Parameter(torch.ones(*size))
                nn.init.kaiming_normal_(w)
                self.vars.extend([w, nn.Parameter(torch.zeros(size[0]))])

    def forward(self, x: Tensor, weights: nn.ParameterList | None = None) -> Tensor:
        if weights is None:
            weights = self.vars
        idx = bn_idx = 0
        for name, _ in self.CONFIG:
            if name == "conv2d":
                w, b = weights[idx], weights[idx + 1]
                x = F.conv2d(x, w, b)
                idx += 2
            elif name == "linear":
                w, b = weights[idx], weights[idx + 1]
                x = F.linear(x, w, b)
                idx += 2
            elif name == "bn":
                w, b = weights[idx], weights[idx + 1]
                mean, var = self.vars_bn[bn_idx], self.vars_bn[bn_idx + 1]
                x = F.batch_norm(x, mean, var, weight=w, bias=b, training=False)
                idx, bn_idx = idx + 2, bn_idx + 2
            elif name == "relu":
                x = F.relu(x, inplace=True)
            elif name == "max_pool2d":
                x = F.max_pool2d(x, 2, 2, 0)
            else:
                x = x.view(x.size(0), -1)
        return x


NETWORKS = {
    "densenet_bc": Foreign(DenseNetBc, (3, 10, 10), ("conv1", "trans1", "dense2.0")),
    "dual_path": Foreign(DualPathNet, (3, 10, 10), ("relu", "layer1.0", "layer1.1.conv2")),
    "shufflenet": Foreign(ShuffleNet, (3, 10, 10), ("layer1.0",), "torch.export"),
    "efficientnet": Foreign(EfficientNet, (3, 10, 10), ("conv1", "layers.0", "layers.1.conv2")),
    "csp_darknet": Foreign(CspDarknet, (3, 12, 12), ("focus", "model.0", "model.2.cv1")),
    "searched": Foreign(SearchedNet, (3, 8, 8), ("stem", "cells.0", "cells.1")),
    "learner": Foreign(Learner, (3, 12, 12), ("conv2d", "max_pool2d", "relu_1")),
}
