"""Products of large matrices in single, by the faster of the two ways that torch has for them.

On a CPU torch multiplies with MKL, which leaves half of every AVX-512 register empty on processors
that are not Intel's. oneDNN, which convolves for torch, does not: large products take half the time
where whole registers are computed with at once, and up to a third less where both halves are in
turn. On a GPU torch has cuBLAS add a bias to the product itself, for which it takes other kernels:
of sums over 4096 products and 128 samples they take half as long again (docs/solvers.md). In
TensorFloat-32 they do not.
"""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from frfx.recording import is_recorded

_ENTRIES = {True: 1 << 16, False: 1 << 17}
"""Entries of the larger matrix, for every thread, from which a call of oneDNN's is worth it, on
processors that compute with whole registers and on those that do with halves."""

_LONG = 1 << 11
"""Products in a sum from which on a GPU the bias is better added afterwards."""

_ZEN_5 = 26
"""The family of the first processors of AMD's that compute with whole registers."""


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return `a @ b`.

    Args:
        a: Shape (..., m, k).
        b: Shape (..., k, n), with leading dimensions that broadcast with those of `a`.
        out: Contiguous, where it is written to; nothing records it then.
    """
    if a.ndim != b.ndim or not _serves(a, b):
        return torch.matmul(a, b, out=out)
    if a.ndim == 2 and out is None:
        return _by_onednn(a, b)
    if out is None:
        out = a.new_empty(*a.shape[:-1], b.shape[-1])
    pairs = (t.reshape(-1, *t.shape[-2:]).unbind(0) for t in (a, b, out))
    for left, right, product in zip(*pairs, strict=True):
        product.copy_(_by_onednn(left, right))
    return out


def addmm(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return `x + a @ b` of single matrices."""
    return x + _by_onednn(a, b) if _serves(a, b) else torch.addmm(x, a, b)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return what `torch.nn.functional.linear` does."""
    autocast = torch.is_autocast_enabled(x.device.type)
    if x.ndim == 2 and not autocast and not is_recorded(x, weight, bias):
        if _serves(x, weight.mT) and (bias is None or _is_plain(bias, weight)):
            return _by_onednn(x, weight.mT, bias)
        if bias is not None and x.is_cuda and x.dtype == torch.float32 and x.shape[1] >= _LONG:
            return F.linear(x, weight, bias) if _in_tf32() else (x @ weight.mT).add_(bias)
    return F.linear(x, weight, bias)


def _by_onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.mT, bias, "none", [], None)


def _in_tf32() -> bool:
    """Tell whether a GPU multiplies matrices in TensorFloat-32, however that was asked for."""
    matmul = torch.backends.cuda.matmul
    try:
        return bool(matmul.allow_tf32)
    except RuntimeError:  # by the newer setting, of which this one does not know
        return bool(matmul.fp32_precision == "tf32")


def _is_plain(bias: Tensor, weight: Tensor) -> bool:
    """Tell whether a bias is what oneDNN takes it for: it asks for no strides and no sizes."""
    plain = bias.is_cpu and bias.is_contiguous() and bias.dtype == weight.dtype
    return plain and bias.shape == weight.shape[:1]


def _serves(a: Tensor, b: Tensor) -> bool:
    if torch.compiler.is_compiling():  # nothing that follows may be asked
        return False
    larger = max(a.shape[-2] * a.shape[-1], b.shape[-2] * b.shape[-1])
    return (
        larger >= _ENTRIES[has_whole_registers()] * torch.get_num_threads()
        and a.shape[:-2] == b.shape[:-2]
        and a.shape[-1] == b.shape[-2]
        and min(a.numel(), b.numel()) > 0
        and a.is_cpu
        and b.is_cpu
        and a.dtype == b.dtype == torch.float32
        and a.is_contiguous()  # of anything else than whole matrices oneDNN is slow beyond measure
        and (b.is_contiguous() or b.mT.is_contiguous())
        and bool(torch.backends.mkldnn.enabled)
        and onednn_is_faster()
        and not is_recorded(a, b)
    )


@functools.cache
def onednn_is_faster() -> bool:
    """Tell whether oneDNN has wider registers than MKL on this processor."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and "AuthenticAMD" in _processor()
    )


@functools.cache
def has_whole_registers() -> bool:
    """Tell whether this is a processor of AMD's that computes with a whole register at once."""
    family = re.search(r"family\s*:?\s*(\d+)", _processor(), re.IGNORECASE)
    return family is not None and int(family[1]) >= _ZEN_5


def _processor() -> str:
    """Return what the system says of the processor."""
    known = Path("/proc/cpuinfo")
    return known.read_text(errors="replace") if known.exists() else platform.processor()
