"""Backends by name, and what is said where one cannot be had."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch

from frfx.errors import BackendError
from frfx.linalg import Convolution, Solver
from frfx.linalg.backend import BACKENDS, get_backend, torch_backend
from tests.oracles import normal, relative

OPERATORS = {
    "matrix": Convolution(normal(0, 3, 2, 3, 3).float(), (6, 6)),
    "dft": Convolution(normal(1, 3, 5, 3, 3).float(), (14, 14)),
    "fft": Convolution(normal(2, 3, 5, 3, 3).float(), (40, 38)),
    "depthwise": Convolution(normal(3, 6, 1, 3, 3).float(), (20, 20), groups=6),
    "strided": Convolution(normal(4, 3, 5, 3, 3).float(), (21, 20), stride=(2, 2)),
    "refined": Convolution(normal(5, 16, 4, 3, 3).float(), (40, 40), padding=((1, 1), (1, 1))),
}


def test_auto_is_torch():
    assert get_backend("auto") is get_backend("torch") is torch_backend


def test_copies_are_the_backend_itself():
    assert copy.deepcopy(torch_backend) is torch_backend
    assert pickle.loads(pickle.dumps(torch_backend)) is torch_backend


def test_an_unknown_backend_is_answered_with_the_known_ones():
    shown = re.escape(", ".join(map(repr, BACKENDS)))
    with pytest.raises(BackendError, match=f"there is no backend 'jax'; there are {shown}"):
        get_backend("jax")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cupy_without_a_device_or_without_cupy_says_which():
    with pytest.raises(BackendError, match=r"needs CuPy: install|needs a CUDA device"):
        get_backend("cupy")


@pytest.mark.gpu
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_cupy_solves_as_torch_does(operator):
    pytest.importorskip("cupy")
    on_device = operator.with_kernel(operator.kernel.cuda())
    residual = normal(6, 7, *operator.out_shape).float().cuda()
    by_torch = Solver().prepare(on_device).solve(residual)
    by_cupy = Solver().prepare(on_device, get_backend("cupy")).solve(residual)
    assert by_cupy.device == residual.device
    assert relative(by_cupy.cpu(), by_torch.cpu()) < 1e-5
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        again = Solver().prepare(on_device, get_backend("cupy")).solve(residual)
    side.synchronize()
    assert relative(again.cpu(), by_torch.cpu()) < 1e-5
