"""What README shows is what happens."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

import frfx
from frfx import networks

TEXT = (Path(__file__).parent.parent / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def block(start: str) -> str:
    """Return the only block of Python that begins so."""
    (found,) = (code for code in PYTHON if code.startswith(start))
    return found


def run(code: str, **names: object) -> tuple[dict, str]:
    """Execute a block; return its names and what it printed."""
    space = {"frfx": frfx, "torch": torch, **names}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, space)
    return space, printed.getvalue()


def vgg() -> nn.Module:
    torch.manual_seed(0)
    features = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.Tanh(),
        nn.AvgPool2d(2), nn.Conv2d(5, 4, 1), nn.Tanh(),
    )  # fmt: skip
    parts = [("features", features), ("flatten", nn.Flatten()), ("fc", nn.Linear(16, 5))]
    return nn.Sequential(OrderedDict(parts)).eval()


def test_the_prompt():
    (session,) = re.findall(r"```\n(>>> .*?)```", TEXT, re.DOTALL)
    test = doctest.DocTestParser().get_doctest(session, {"frfx": frfx}, "README", None, 0)
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
    assert result.attempted
    assert not result.failed


def test_invert_and_judge():
    x, labels = torch.randn(4, 3, 14, 14), torch.arange(4)
    space, printed = run(block("import frfx"), model=vgg(), x=x, labels=labels)
    assert space["a_star"].shape == (4, 4, 2, 2)
    for text in ("def forward(self, x, target)", "features.7", "consistency"):
        assert text in printed


def test_policies():
    space, _ = run(block("policy = "))
    inverse = frfx.invert(vgg(), 0, policy=space["policy"])
    assert inverse(torch.randn(2, 3, 14, 14), torch.arange(2)).shape == (2, 3, 14, 14)


def test_layers_before_anything_is_compiled():
    model = nn.Sequential(
        OrderedDict(layer3=nn.Sequential(nn.Tanh(), nn.Linear(4, 4)), fc=nn.ReLU())
    )
    _, printed = run(block("print(frfx.layers(model, upto"), model=model)
    assert "inverted by" in printed


def test_post_train():
    torch.manual_seed(0)
    model, images = networks.build("mnist"), torch.randn(40, 1, 28, 28)
    batches = [(images, torch.arange(40) % 10)]
    code = (
        block("history = ").replace("upto_layer=4", "upto_layer=2").replace("epochs=10", "epochs=2")
    )
    space, _ = run(code, model=model, loader=batches, val_loader=batches)
    assert len(space["history"]) == 2
