"""Networks over several scales, points, sequences and pairs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from tests.foreign.case import CLASSES, Foreign


class DoubleConv(nn.Module):
    """Twice convolution, norm and ReLU in place."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Up(nn.Module):
    """Upsampling, padding by the difference of the sizes, concatenation with the skip."""

    def __init__(self, inputs: int, outputs: int, bilinear: bool) -> None:
        super().__init__()
        if bilinear:
            self.up: nn.Module = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        else:
            self.up = nn.ConvTranspose2d(inputs // 2, inputs // 2, kernel_size=2, stride=2)
        self.conv = DoubleConv(inputs, outputs)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        x1 = self.up(x1)
        diff_y = x2.size()[2] - x1.size()[2]
        diff_x = x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [diff_x // 2, diff_x - diff_x // 2, diff_y // 2, diff_y - diff_y // 2])
        return self.conv(torch.cat([x2, x1], dim=1))


class UNet(nn.Module):
    """Long skips from the way down to the way up; odd sizes; a class for the whole image."""

    def __init__(self) -> None:
        super().__init__()
        self.inc = DoubleConv(3, 4)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(4, 6))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(6, 6))
        self.up1, self.up2 = Up(12, 4, bilinear=False), Up(8, 4, bilinear=True)
        self.outc = nn.Conv2d(4, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x = self.up1(x3, x2)
        x = self.up2(x, x1)
        return self.outc(x).mean(dim=(-2, -1))


class HourGlass(nn.Module):
    """Modules under composed names, found again by recursion."""

    def __init__(self, depth: int, features: int) -> None:
        super().__init__()
        self.depth = depth
        for level in range(depth, 0, -1):
            for kind in ("b1_", "b2_", "b3_"):
                self.add_module(kind + str(level), self._block(features))
        self.add_module("b2_plus_1", self._block(features))

    @staticmethod
    def _block(features: int) -> nn.Module:
        return nn.Sequential(
            nn.BatchNorm2d(features), nn.ReLU(True), nn.Conv2d(features, features, 3, padding=1)
        )

    def _forward(self, level: int, inp: Tensor) -> Tensor:
        up1 = self._modules["b1_" + str(level)](inp)
        low1 = F.avg_pool2d(inp, 2, stride=2)
        low1 = self._modules["b2_" + str(level)](low1)
        low2 = self._forward(level - 1, low1) if level > 1 else self._modules["b2_plus_1"](low1)
        low3 = self._modules["b3_" + str(level)](low2)
        up2 = F.interpolate(low3, scale_factor=2, mode="nearest")
        return up1 + up2

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self.depth, x)


class StackedHourGlass(nn.Module):
    """Two hourglasses; the second reads the sum of what the first read and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.num_modules = 2
        for i in range(self.num_modules):
            self.add_module("m" + str(i), HourGlass(2, 6))
            self.add_module("bl" + str(i), nn.Conv2d(6, 6, 1))
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        previous = F.relu(self.conv1(x), True)
        outputs = []
        for i in range(self.num_modules):
            hg = self._modules["m" + str(i)](previous)
            previous = previous + self._modules["bl" + str(i)](hg)
            outputs.append(previous)
        return self.fc(F.adaptive_max_pool2d(outputs[-1], 1).flatten(1))


class MultiResolution(nn.Module):
    """Branches of several resolutions in lists, each made of all: ModuleLists of ModuleLists."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.transition = nn.ModuleList([nn.Identity(), nn.Conv2d(4, 6, 3, 2, 1)])
        self.branches = nn.ModuleList([DoubleConv(4, 4), DoubleConv(6, 6)])
        up = nn.Sequential(nn.Conv2d(6, 4, 1), nn.Upsample(scale_factor=2, mode="nearest"))
        down = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6))
        self.fuse_layers = nn.ModuleList([nn.ModuleList([None, up]), nn.ModuleList([down, None])])
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        xs = [transition(x) for transition in self.transition]
        for i, branch in enumerate(self.branches):
            xs[i] = branch(xs[i])
        fused = []
        for i in range(len(self.fuse_layers)):
            y = xs[0] if i == 0 else self.fuse_layers[i][0](xs[0])
            for j in range(1, len(xs)):
                y = y + (xs[j] if i == j else self.fuse_layers[i][j](xs[j]))
            fused.append(F.relu(y))
        return self.head(torch.cat([y.mean((2, 3)) for y in fused], 1))


class TNet(nn.Module):
    """Predicts a transform of the points, beginning at the identity."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(k, 8, 1), nn.Conv1d(8, 12, 1)
        self.fc1, self.fc2 = nn.Linear(12, 8), nn.Linear(8, k * k)
        self.bn1, self.bn2, self.bn4 = nn.BatchNorm1d(8), nn.BatchNorm1d(12), nn.BatchNorm1d(8)
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = torch.max(x, 2, keepdim=True)[0]
        x = x.view(-1, 12)
        x = self.fc2(F.relu(self.bn4(self.fc1(x))))
        iden = torch.from_numpy(np.eye(self.k).flatten().astype(np.float32)).view(1, self.k**2)
        x = x + iden
        return x.view(-1, self.k, self.k)


class PointNet(nn.Module):
    """Points turned by a predicted transform (`bmm`), then a maximum over them; log-softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.stn = TNet(3)
        self.conv1, self.conv2 = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 12, 1)
        self.bn1, self.bn2 = nn.BatchNorm1d(8), nn.BatchNorm1d(12)
        self.fc, self.dropout = nn.Linear(12, CLASSES), nn.Dropout(p=0.3)

    def forward(self, x: Tensor) -> Tensor:
        trans = self.stn(x)
        x = x.transpose(2, 1)
        x = torch.bmm(x, trans)
        x = x.transpose(2, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x = torch.max(x, 2, keepdim=True)[0]
        x = x.view(-1, 12)
        return F.log_softmax(self.fc(self.dropout(x)), dim=1)


class Chomp1d(nn.Module):
    """Cuts off what padding has added at the end."""

    def __init__(self, chomp_size: int) -> None:
        super().__init__()
        self.chomp_size = chomp_size

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.chomp_size].contiguous()


class TemporalBlock(nn.Module):
    """Causal dilated convolutions of normed weights, the whole in one Sequential."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        padding = 2 * dilation
        self.conv1 = weight_norm(nn.Conv1d(inputs, outputs, 3, padding=padding, dilation=dilation))
        self.chomp1, self.relu1, self.dropout1 = Chomp1d(padding), nn.ReLU(), nn.Dropout(0.2)
        self.conv2 = weight_norm(nn.Conv1d(outputs, outputs, 3, padding=padding, dilation=dilation))
        self.chomp2, self.relu2, self.dropout2 = Chomp1d(padding), nn.ReLU(), nn.Dropout(0.2)
        self.net = nn.Sequential(
            *[self.conv1, self.chomp1, self.relu1, self.dropout1],
            *[self.conv2, self.chomp2, self.relu2, self.dropout2],
        )
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        res = x if self.downsample is None else self.downsample(x)
        return self.relu(out + res)


class Tcn(nn.Module):
    """A temporal convolutional network that is read at its last step."""

    def __init__(self) -> None:
        super().__init__()
        widths = (4, 6, 6)
        layers = [TemporalBlock(widths[i], widths[i + 1], 2**i) for i in range(2)]
        self.network, self.linear = nn.Sequential(*layers), nn.Linear(6, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        y1 = self.network(inputs)
        o = self.linear(y1[:, :, -1])
        return F.log_softmax(o, dim=1)


class Highway(nn.Module):
    """Gated layers in ModuleLists, weights of bounded norm, and an LSTM cell written out."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.embed = spectral_norm(nn.Linear(10, size))
        self.nonlinear = nn.ModuleList([nn.Linear(size, size) for _ in range(2)])
        self.gate = nn.ModuleList([nn.Linear(size, size) for _ in range(2)])
        self.i2h, self.h2h = nn.Linear(size, 4 * size), nn.Linear(size, 4 * size)
        self.size, self.out = size, nn.Linear(size, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for nonlinear, gate in zip(self.nonlinear, self.gate, strict=True):
            g = torch.sigmoid(gate(x))
            x = g * F.leaky_relu(nonlinear(x), 0.1) + (1 - g) * x
        h = x.new_zeros(x.shape[0], self.size)
        c = torch.zeros_like(h)
        for xt in torch.unbind(x, dim=1)[:4]:
            gates = self.i2h(xt) + self.h2h(h)
            i, f, g, o = gates.chunk(4, 1)
            c = c * torch.sigmoid(f) + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.out(h)


class Siamese(nn.Module):
    """Two images through one network, compared by the absolute difference."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 6, 3),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 6, 3),
            nn.ReLU(),
        )
        self.liner = nn.Sequential(nn.Linear(6 * 9, 12), nn.Sigmoid())
        self.out = nn.Linear(12, CLASSES)

    def forward_one(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x.view(x.size()[0], -1)
        return self.liner(x)

    def forward(self, pair: Tensor) -> Tensor:
        out1, out2 = self.forward_one(pair[:, :1]), self.forward_one(pair[:, 1:])
        dis = torch.abs(out1 - out2)
        return self.out(dis)


NETWORKS = {
    "unet": Foreign(UNet, (3, 13, 13), ("inc", "down1", "up2.conv")),
    "hourglass": Foreign(StackedHourGlass, (3, 8, 8), ("relu", "m0.b2_2", "add")),
    "multi_resolution": Foreign(MultiResolution, (3, 8, 8), ("stem", "cat")),
    "pointnet": Foreign(PointNet, (3, 9), ("x", "relu", "stn.relu_2")),
    "tcn": Foreign(Tcn, (4, 12), ("inputs", "network.0", "network")),
    "highway": Foreign(Highway, (4, 10), ("add",), "torch.export"),
    "siamese": Foreign(Siamese, (2, 12, 12), ("conv.2", "liner.0", "sub")),
}
