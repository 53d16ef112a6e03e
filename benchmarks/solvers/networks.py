"""Whole networks beside one training step of the same network."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

import frfx
from frfx import models
from solvers.stopwatch import Stopwatch


@dataclass(frozen=True)
class Case:
    """A network, a batch, and how far it is inverted.

    Attributes:
        name: As `frfx.models.load_model` takes it.
        size: Of the image.
        batch: How many of them.
        layer: Down to which.
        policy: The policy's name.
        options: For its convolutions.
        small: Whether it takes little time and memory.
        tf32: What a GPU computes in TensorFloat-32: torch convolves in it unless told otherwise.
    """

    name: str
    size: int
    batch: int
    layer: str | int
    policy: str = "paper"
    options: dict[str, Any] = field(default_factory=dict)
    small: bool = True
    tf32: Literal["nothing", "convolutions", "all"] = "convolutions"


def cases(device: torch.device) -> Iterator[Case]:
    """Yield what is measured; a GPU takes larger batches of the large network."""
    for policy in ("paper", "minimal"):
        for layer in (3, 2, 1, 0):
            yield Case("paper:cifar10", 32, 256, layer, policy)
    batch = 32 if device.type == "cpu" else 128
    vgg = Case("torchvision:vgg11", 64, batch, "features.0", small=False)
    once = replace(vgg, options={"solver": "spectral", "damping": 1e-2})
    yield once
    if device.type == "cuda":
        yield replace(once, tf32="nothing")
        yield replace(once, tf32="all")
    yield vgg


@contextlib.contextmanager
def _tf32(what: str) -> Iterator[None]:
    """Let a GPU compute in TensorFloat-32: nothing, convolutions or all."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, what == "all"
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=what != "nothing"):
            yield
    finally:
        matmul.allow_tf32 = before


def measure(case: Case, watch: Stopwatch, backend: str) -> dict[str, Any]:
    """Return the row of a network, in milliseconds."""
    torch.manual_seed(0)
    model = models.load_model(case.name).eval().to(watch.device)
    x = torch.randn(case.batch, 3, case.size, case.size, device=watch.device)
    y = torch.randint(0, 10, (case.batch,), device=watch.device)
    policy = getattr(frfx.policy, case.policy)()
    if case.options:
        policy = policy.override(op=nn.Conv2d, **case.options)
    inverse = frfx.invert(model, case.layer, policy=policy, backend=backend)

    def step() -> None:
        with torch.enable_grad():
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()

    functions: dict[str, Callable[[], Any]] = {
        "inverse": lambda: inverse(x, y),
        "forward": lambda: model(x),
        "step": step,
    }
    with warnings.catch_warnings(), torch.no_grad(), _tf32(case.tf32):
        warnings.simplefilter("ignore")
        first = watch.once(lambda: inverse(x, y))
        found = watch(functions)
        captured = watch.captured(functions) if watch.device.type == "cuda" else {}
    row = {
        "network": case.name,
        "image": case.size,
        "batch": case.batch,
        "down to": str(case.layer),
        "policy": case.policy,
        "options": ", ".join(f"{k}={v}" for k, v in case.options.items()),
        "tf32": case.tf32 if watch.device.type == "cuda" else "",
        "backend": backend,
        "inverse_ms": found["inverse"],
        "to_step": found["inverse"] / found["step"],
        "forward_to_step": found["forward"] / found["step"],
        "prepare_to_step": (first - found["inverse"]) / found["step"],
        "factors_mib": inverse.prepare.nbytes / 2**20,
    }
    if "inverse" in captured:
        row |= {
            "graph_ms": captured["inverse"],
            "graph_to_step": captured["inverse"] / captured["step"],
            "graph_forward_to_step": captured["forward"] / captured["step"],
        }
    return row
