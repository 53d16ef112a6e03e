"""A CUDA device that is none: its tensors say that they lie there, and are computed on the CPU.

Machines that test rarely have a GPU. What needs no kernel of ours shows on such a device, too: that
no op takes tensors of both sides, that results lie where they should, and where the host waits.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import frfx
from frfx import recording

DEVICE = torch.device("cuda", 0)
CAN_EMULATE = torch.backends.cuda.is_built() and hasattr(torch._C, "_ensureCUDADeviceGuardSet")
"""Whether this torch may name a CUDA device that has no driver: not 2.7, nor builds for CPUs."""

_READ_BACK = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select")
_BETWEEN_DEVICES = ("aten::_to_copy", "aten::copy_")
_TAKE_INDICES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")

_waits: Counter[str] = Counter()


class Remote(Tensor):
    """A tensor of that device.

    Args:
        host: Its values.
    """

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> Remote:
        host = host.resolve_conj().resolve_neg()  # which the wrapper does not tell of
        self = torch.Tensor._make_wrapper_subclass(
            cls, host.size(), host.stride(), host.storage_offset(), dtype=host.dtype
        )
        self.host = host
        return self

    def __repr__(self) -> str:
        return f"Remote({self.host})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    # To autograd and to C++ it is on the CPU: without a driver there is nothing else.
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def cpu(self) -> Tensor:
        _wait()
        return self.host.clone()

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "cpu":
            if not non_blocking:
                _wait()
            return self.host.to(dtype or self.dtype, copy=True)
        return super().to(dtype or self.dtype, copy=copy)

    def tolist(self) -> Any:
        _wait()
        return self.host.tolist()

    def numpy(self, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_as_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_as_tensors(index), value)


def _as_tensors(index: Any) -> Any:
    """Return an index with tensors for lists, which torch would make on the device itself."""
    if isinstance(index, tuple):
        return tuple(map(_as_tensors, index))
    if isinstance(index, (list, range)):
        _wait()
        return torch.tensor(list(index))
    return index


class _Device(TorchDispatchMode):
    """Makes tensors that are asked for on the device; in the key of torch's own fake tensors,
    under which no driver is looked for."""

    def __init__(self) -> None:
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE
        torch._C._ensureCUDADeviceGuardSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute an op on the CPU; its result lies where torch would put it."""
    name = func._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    remote = [tensor for tensor in tensors if isinstance(tensor, Remote)]
    here = [tensor for tensor in tensors if not isinstance(tensor, Remote) and tensor.ndim]
    if remote and name in _TAKE_INDICES:
        here = [tensor for tensor in here if tensor.dtype not in (torch.long, torch.bool)]
    if remote and here and name not in _BETWEEN_DEVICES:
        raise RuntimeError(f"expected all tensors to be on the same device: {name}")
    device = kwargs.get("device")
    if remote and (name in _READ_BACK or (name in _TAKE_INDICES and _masks(args[1]))):
        _wait()
    if name in _BETWEEN_DEVICES and here and remote and not kwargs.get("non_blocking"):
        _wait()
    values, options = tree_map(lambda t: t.host if isinstance(t, Remote) else t, (args, kwargs))
    if device is not None:
        options["device"] = torch.device("cpu")
    result = func(*values, **options)
    goes = bool(remote) if device is None else torch.device(device).type == "cuda"
    if name == "aten::copy_":
        goes = isinstance(args[0], Remote)
    if not goes:
        return result
    known = {id(tensor.host): tensor for tensor in remote}  # what is written in place stays itself

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else Remote(value)

    return tree_map(wrap, result)


def _masks(indices: Any) -> bool:
    """Tell whether some indices choose by a mask, whose size the host has to know."""
    return any(isinstance(i, Remote) and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _wait() -> None:
    """Note where the host waits: the innermost function of frfx."""
    frame = sys._getframe()
    root = str(Path(frfx.__file__).parent)
    while frame is not None and not frame.f_code.co_filename.startswith(root):
        frame = frame.f_back
    _waits[frame.f_code.co_name if frame is not None else "test"] += 1


@contextlib.contextmanager
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Let `.cuda()` and `device="cuda"` mean that device.

    Yields:
        How often the host has waited, by the function of frfx that does.
    """
    tensor = torch.tensor

    def make(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        made = data.to(**options) if isinstance(data, Tensor) else tensor(data, **options)
        return made if device is None else made.to(device)

    stub = mock.MagicMock()
    for name in ("Event", "current_stream", "device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "tensor", make)
    monkeypatch.setattr(torch, "as_tensor", make)
    monkeypatch.setattr(recording, "PLAIN", (Tensor, nn.Parameter, Remote))
    monkeypatch.setattr(recording, "_get_current_dispatch_mode", lambda: None)
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a Remote is no `.data`
    _waits.clear()
    try:
        with _Device():
            yield _waits
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
