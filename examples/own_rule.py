"""Teach frfx ops that it does not know: a function of single entries, and a module of your own."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import frfx
from frfx.ops import Op
from frfx.rules import Inversion, Rule


class Whiten(nn.Module):
    """Rotates the channels by an orthogonal matrix."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation, _ = torch.linalg.qr(torch.randn(channels, channels))
        self.register_buffer("rotation", rotation)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ij,nj...->ni...", self.rotation, x)


class Unrotate(Inversion):
    """Rotates back."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        return torch.einsum("ji,nj...->ni...", self.module.rotation, target)


@frfx.register_rule(Whiten)
@dataclass(frozen=True)
class WhitenRule(Rule):
    """The transpose of an orthogonal matrix is its inverse."""

    equation = "x = Q^T y, the inverse of an orthogonal Q"
    accuracy = "exact"

    def build(self, op: Op) -> Inversion:
        return Unrotate(op.module)


frfx.register_elementwise((torch.exp, "exp"), inverse=torch.log, range=(0, math.inf))


class Net(nn.Module):
    """A network with both of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.whiten = nn.Conv2d(3, 8, 3), Whiten(8)
        self.head = nn.Linear(8 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.exp(self.whiten(self.conv(x))).flatten(1))


torch.manual_seed(0)
inverse = frfx.invert(Net(), upto_layer="conv", policy="minimal")
x, y = torch.randn(64, 3, 8, 8), torch.randint(10, (64,))
print(inverse.code)
print(frfx.measure(inverse, x, y))
