"""Residual networks: shortcuts of every make, functional calls, modules that are called again."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.foreign.case import CLASSES, Foreign


class CifarBlock(nn.Module):
    """The basic block of the CIFAR repositories: an empty Sequential is the identity."""

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class CifarResNet(nn.Module):
    """ResNet for CIFAR: functional activations and pooling, `view` with `size(0)`."""

    def __init__(self) -> None:
        super().__init__()
        self.in_planes = 6
        self.conv1 = nn.Conv2d(3, 6, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.layer1 = self._make_layer(6, 2, 1)
        self.layer2 = self._make_layer(8, 2, 2)
        self.linear = nn.Linear(8, CLASSES)

    def _make_layer(self, planes: int, blocks: int, stride: int) -> nn.Sequential:
        layers = []
        for step in [stride] + [1] * (blocks - 1):
            layers.append(CifarBlock(self.in_planes, planes, step))
            self.in_planes = planes
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer2(self.layer1(out))
        out = F.avg_pool2d(out, 6)
        out = out.view(out.size(0), -1)
        return self.linear(out)


class LambdaLayer(nn.Module):
    """A module around a function, as the parameter-free shortcut ("option A") is written."""

    def __init__(self, function) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class OptionAResNet(nn.Module):
    """A shortcut that strides by slicing and pads channels, and a head that reads shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.block1, self.block2 = CifarBlock(6, 6), CifarBlock(6, 10, 2)
        self.block2.shortcut = LambdaLayer(
            lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), "constant", 0)
        )
        self.linear = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block2(self.block1(F.relu(self.bn1(self.conv1(x)))))
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


class WideBlock(nn.Module):
    """The pre-activated block of wide residual networks: the first ReLU may be shared."""

    def __init__(self, in_planes: int, out_planes: int, stride: int, drop_rate: float) -> None:
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(in_planes), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_planes, out_planes, 3, stride, 1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(out_planes), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_planes, out_planes, 3, 1, 1, bias=False)
        self.drop_rate, self.equal = drop_rate, in_planes == out_planes
        self.shortcut = (
            None if self.equal else nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.equal:
            x = self.relu1(self.bn1(x))
            out = self.relu2(self.bn2(self.conv1(x)))
        else:
            out = self.relu2(self.bn2(self.conv1(self.relu1(self.bn1(x)))))
        if self.drop_rate > 0:
            out = F.dropout(out, p=self.drop_rate, training=self.training)
        out = self.conv2(out)
        return torch.add(x if self.equal else self.shortcut(x), out)


class WideResNet(nn.Module):
    """Pre-activation, functional dropout with `self.training`, `torch.add` as the merge."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, 1, 1, bias=False)
        self.block1 = nn.Sequential(WideBlock(6, 8, 1, 0.3), WideBlock(8, 8, 1, 0.3))
        self.block2 = nn.Sequential(WideBlock(8, 8, 1, 0.0))
        self.bn1, self.relu = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.fc, self.channels = nn.Linear(8, CLASSES), 8

    def forward(self, x: Tensor) -> Tensor:
        out = self.block2(self.block1(self.conv1(x)))
        out = F.avg_pool2d(self.relu(self.bn1(out)), 12)
        return self.fc(out.view(-1, self.channels))


class PyramidBlock(nn.Module):
    """A block that widens, with zeros concatenated to its shortcut as the shapes ask for it."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_planes), nn.Conv2d(in_planes, planes, 3, stride, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), nn.Conv2d(planes, planes, 3, 1, 1)
        self.bn3, self.relu = nn.BatchNorm2d(planes), nn.ReLU(inplace=True)
        self.downsample = nn.AvgPool2d(2, 2, ceil_mode=True) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.bn1(x))
        out = self.bn3(self.conv2(self.relu(self.bn2(out))))
        shortcut = x if self.downsample is None else self.downsample(x)
        featuremap_size = shortcut.size()[2:4]
        batch_size, residual_channel = out.size()[0], out.size()[1]
        shortcut_channel = shortcut.size()[1]
        if residual_channel != shortcut_channel:
            zeros = torch.zeros(
                batch_size, residual_channel - shortcut_channel, *featuremap_size, dtype=x.dtype
            )
            out += torch.cat((shortcut, zeros), 1)
        else:
            out += shortcut
        return out


class PyramidNet(nn.Module):
    """Branches on shapes, which symbolic tracing cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(PyramidBlock(4, 6, 1), PyramidBlock(6, 6, 1))
        self.layer2 = nn.Sequential(PyramidBlock(6, 9, 2))
        self.bn_final, self.fc = nn.BatchNorm2d(9), nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.bn1(self.conv1(x))))
        x = F.adaptive_avg_pool2d(torch.relu_(self.bn_final(x)), (1, 1))
        return self.fc(x.view(x.size(0), -1))


class RecurrentConv(nn.Module):
    """A recurrent convolution unrolled in time: the same modules called again and again."""

    def __init__(self, planes: int, steps: int = 2) -> None:
        super().__init__()
        self.steps = steps
        self.conv = nn.Sequential(
            nn.Conv2d(planes, planes, 3, 1, 1), nn.BatchNorm2d(planes), nn.ReLU(inplace=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.steps):
            if i == 0:
                x1 = self.conv(x)
            x1 = self.conv(x + x1)
        return x1


class RecurrentCnn(nn.Module):
    """Two recurrent convolutions in a residual block, as in recurrent residual U-Nets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.rcnn = nn.Sequential(RecurrentConv(6), RecurrentConv(6))
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(6 * 36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.rcnn(x)
        return self.fc(torch.flatten(self.pool(x), 1))


class RepBlock(nn.Module):
    """A re-parametrisable block: three branches, the identity among them where it fits."""

    def __init__(self, in_planes: int, planes: int) -> None:
        super().__init__()
        self.rbr_identity = nn.BatchNorm2d(in_planes) if in_planes == planes else None
        self.rbr_dense = nn.Sequential()
        self.rbr_dense.add_module("conv", nn.Conv2d(in_planes, planes, 3, padding=1, bias=False))
        self.rbr_dense.add_module("bn", nn.BatchNorm2d(planes))
        self.rbr_1x1 = nn.Sequential()
        self.rbr_1x1.add_module("conv", nn.Conv2d(in_planes, planes, 1, bias=False))
        self.rbr_1x1.add_module("bn", nn.BatchNorm2d(planes))
        self.se, self.nonlinearity = nn.Identity(), nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        identity = 0 if self.rbr_identity is None else self.rbr_identity(inputs)
        return self.nonlinearity(self.se(self.rbr_dense(inputs) + self.rbr_1x1(inputs) + identity))


class RepVgg(nn.Module):
    """Stages in a loop over a ModuleList, and `0 +` where a branch is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.stage0 = RepBlock(3, 6)
        self.stage1 = nn.ModuleList([RepBlock(6, 6), RepBlock(6, 8)])
        self.gap, self.linear = nn.AdaptiveAvgPool2d(output_size=1), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.stage0(x)
        for block in self.stage1:
            out = block(out)
        out = self.gap(out)
        return self.linear(out.view(out.size(0), -1))


class ConvMixer(nn.Sequential):
    """Convolutions alone, as one nested Sequential with a residual wrapper."""

    class Residual(nn.Module):
        """The input beside any module."""

        def __init__(self, fn: nn.Module) -> None:
            super().__init__()
            self.fn = fn

        def forward(self, x: Tensor) -> Tensor:
            return self.fn(x) + x

    def __init__(self, dim: int = 8, depth: int = 2, kernel_size: int = 3) -> None:
        def tail(conv: nn.Module) -> nn.Sequential:
            return nn.Sequential(conv, nn.GELU(), nn.BatchNorm2d(dim))

        super().__init__(
            *tail(nn.Conv2d(3, dim, 2, stride=2)),
            *[
                nn.Sequential(
                    self.Residual(
                        tail(nn.Conv2d(dim, dim, kernel_size, groups=dim, padding="same"))
                    ),
                    *tail(nn.Conv2d(dim, dim, 1)),
                )
                for _ in range(depth)
            ],
            nn.AdaptiveAvgPool2d((1, 1)),
            nn.Flatten(),
            nn.Linear(dim, CLASSES),
        )


NETWORKS = {
    "cifar_resnet": Foreign(CifarResNet, (3, 12, 12), ("relu", "layer1", "layer2.0")),
    "option_a_resnet": Foreign(OptionAResNet, (3, 12, 12), ("relu", "block1", "block2.conv1")),
    "wide_resnet": Foreign(WideResNet, (3, 12, 12), ("conv1", "block1.0", "block2")),
    "pyramidnet": Foreign(PyramidNet, (3, 12, 12), ("layer1.0",), "torch.export"),
    "recurrent_cnn": Foreign(RecurrentCnn, (3, 12, 12), ("stem", "rcnn.0", "add")),
    "repvgg": Foreign(RepVgg, (3, 12, 12), ("stage0", "stage1.0", "stage1.1")),
    "convmixer": Foreign(ConvMixer, (3, 12, 12), ("2", "3.0", "4")),
}
