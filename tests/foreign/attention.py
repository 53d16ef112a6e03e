"""Networks that attend and gate: over tokens, channels and positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.foreign.case import CLASSES, Foreign


class MlpMixer(nn.Sequential):
    """Patches by view and permute, token mixing by convolutions over the channels dimension."""

    class Patches(nn.Module):
        """What others write as `rearrange("b c (h p1) (w p2) -> b (h w) (p1 p2 c)")`."""

        def __init__(self, size: int) -> None:
            super().__init__()
            self.size = size

        def forward(self, x: Tensor) -> Tensor:
            b, c, h, w = x.shape
            p = self.size
            x = x.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)
            return x.reshape(b, (h // p) * (w // p), p * p * c)

    class PreNormResidual(nn.Module):
        """The norm before, the input beside."""

        def __init__(self, dim: int, fn: nn.Module) -> None:
            super().__init__()
            self.fn, self.norm = fn, nn.LayerNorm(dim)

        def forward(self, x: Tensor) -> Tensor:
            return self.fn(self.norm(x)) + x

    class Mean(nn.Module):
        """What others write as `reduce("b n c -> b c", "mean")`."""

        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dim=1)

    def __init__(self, dim: int = 8, patches: int = 9, depth: int = 2) -> None:
        def feed_forward(width: int, dense) -> nn.Sequential:  # type: ignore[no-untyped-def]
            return nn.Sequential(
                dense(width, 2 * width), nn.GELU(), nn.Dropout(0.1), dense(2 * width, width)
            )

        def conv(inputs: int, outputs: int) -> nn.Conv1d:
            return nn.Conv1d(inputs, outputs, kernel_size=1)

        super().__init__(
            self.Patches(4),
            nn.Linear(48, dim),
            *[
                nn.Sequential(
                    self.PreNormResidual(dim, feed_forward(patches, conv)),
                    self.PreNormResidual(dim, feed_forward(dim, nn.Linear)),
                )
                for _ in range(depth)
            ],
            nn.LayerNorm(dim),
            self.Mean(),
            nn.Linear(dim, CLASSES),
        )


class CausalSelfAttention(nn.Module):
    """Attention by hand: split, view, transpose, a mask in a buffer, `masked_fill`, softmax."""

    def __init__(self, width: int, heads: int, block_size: int) -> None:
        super().__init__()
        assert width % heads == 0
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.1), nn.Dropout(0.1)
        mask = torch.tril(torch.ones(block_size, block_size))
        self.register_buffer("bias", mask.view(1, 1, block_size, block_size))
        self.n_head, self.n_embd = heads, width

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        q = q.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        v = v.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        y = (att @ v).transpose(1, 2).contiguous().view(b, t, c)
        return self.resid_dropout(self.c_proj(y))


class NewGelu(nn.Module):
    """GELU in its first spelling."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


class GptBlock(nn.Module):
    """A decoder block whose feed-forward part is a lambda over a ModuleDict."""

    def __init__(self, width: int, heads: int, block_size: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, heads, block_size)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(width, 2 * width),
                "c_proj": nn.Linear(2 * width, width),
                "act": NewGelu(),
                "dropout": nn.Dropout(0.1),
            }
        )
        m = self.mlp
        self.mlpf = lambda x: m["dropout"](m["c_proj"](m["act"](m["c_fc"](x))))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlpf(self.ln_2(x))


class PixelGpt(nn.Module):
    """A decoder over embedded rows; asserts on a size, which only export follows."""

    def __init__(self, width: int = 8, block_size: int = 12) -> None:
        super().__init__()
        self.block_size = block_size
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Linear(10, width),
                "wpe": nn.Embedding(block_size, width),
                "drop": nn.Dropout(0.1),
                "h": nn.ModuleList([GptBlock(width, 2, block_size) for _ in range(2)]),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, CLASSES, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        _, t, _ = rows.size()
        assert t <= self.block_size, f"a sequence of length {t} is too long"
        pos = torch.arange(0, t, dtype=torch.long, device=rows.device).unsqueeze(0)
        x = self.transformer.wte(rows) + self.transformer.wpe(pos)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))[:, -1, :]


class ChannelGate(nn.Module):
    """Squeeze-excite with linear layers, `view` there and back, and `expand_as`."""

    def __init__(self, channel: int, reduction: int = 2) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


class SpatialGate(nn.Module):
    """A gate over positions out of the maximum and the mean of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat((torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), dim=1)
        return x * torch.sigmoid(self.conv(pooled))


class NonLocal(nn.Module):
    """Every position looks at every other: 1x1 convolutions, view, permute, matmul."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inter = channels // 2
        self.g, self.theta = nn.Conv2d(channels, self.inter, 1), nn.Conv2d(channels, self.inter, 1)
        self.phi = nn.Conv2d(channels, self.inter, 1)
        self.W = nn.Sequential(nn.Conv2d(self.inter, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        batch_size = x.size(0)
        g_x = self.g(x).view(batch_size, self.inter, -1).permute(0, 2, 1)
        theta_x = self.theta(x).view(batch_size, self.inter, -1).permute(0, 2, 1)
        phi_x = self.phi(x).view(batch_size, self.inter, -1)
        f_div_c = F.softmax(torch.matmul(theta_x, phi_x), dim=-1)
        y = torch.matmul(f_div_c, g_x).permute(0, 2, 1).contiguous()
        y = y.view(batch_size, self.inter, *x.size()[2:])
        return self.W(y) + x


class GatedCnn(nn.Module):
    """Channel gate, spatial gate and a non-local block in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.channel, self.spatial, self.nonlocal_ = ChannelGate(8), SpatialGate(), NonLocal(8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.nonlocal_(self.spatial(self.channel(self.conv(x))))
        return self.fc(x.flatten(2).max(dim=2).values)


class MobileVit(nn.Module):
    """Convolutions around a transformer over unfolded patches, the input concatenated."""

    class Attention(nn.Module):
        """Fused projections in `chunk`, heads by `unflatten`."""

        def __init__(self, dim: int, heads: int = 2) -> None:
            super().__init__()
            self.heads, self.scale = heads, (dim // heads) ** -0.5
            self.norm, self.to_qkv = nn.LayerNorm(dim), nn.Linear(dim, dim * 3, bias=False)
            self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.0))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.to_qkv(self.norm(x)).chunk(3, dim=-1)
            q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            k = k.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            v = v.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            dots = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
            out = torch.einsum("bhij,bhjd->bhid", dots.softmax(dim=-1), v)
            return self.to_out(out.transpose(1, 2).flatten(2))

    def __init__(self, dim: int = 8, patch: int = 2) -> None:
        super().__init__()
        self.ph = self.pw = patch
        self.conv1 = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.SiLU())
        self.conv2 = nn.Conv2d(6, dim, 1)
        self.attn = self.Attention(dim)
        self.ff = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.SiLU(),
                                nn.Linear(2 * dim, dim))  # fmt: skip
        self.conv3, self.conv4 = nn.Conv2d(dim, 6, 1), nn.Conv2d(12, 8, 3, padding=1)
        self.to_logits = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        y = x.clone()
        x = self.conv2(x)
        b, d, h, w = x.shape
        ph, pw = self.ph, self.pw
        x = x.reshape(b, d, h // ph, ph, w // pw, pw).permute(0, 3, 5, 2, 4, 1)
        x = x.reshape(b * ph * pw, (h // ph) * (w // pw), d)
        x = self.attn(x) + x
        x = self.ff(x) + x
        x = x.reshape(b, ph, pw, h // ph, w // pw, d).permute(0, 5, 3, 1, 4, 2)
        x = self.conv3(x.reshape(b, d, h, w))
        x = self.conv4(torch.cat((x, y), 1))
        return self.to_logits(x)


NETWORKS = {
    "mlp_mixer": Foreign(MlpMixer, (3, 12, 12), ("1", "2.0", "3.0")),
    "gpt": Foreign(
        PixelGpt,
        (12, 10),
        ("add",),
        "torch.export",
    ),
    "gated": Foreign(GatedCnn, (3, 10, 10), ("conv",), "torch.export"),
    "mobilevit": Foreign(MobileVit, (3, 16, 16), ("conv1", "conv2", "conv3")),
}
