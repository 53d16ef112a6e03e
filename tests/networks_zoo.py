"""Networks that tests share, and `snapshot`: all that is observable of a model's state."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 4
SHAPE = (3, 6, 6)


def batch(count: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return images for the subjects below, and labels."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.arange(count) % CLASSES


class Cnn(nn.Module):
    """A small network: `stem`, which cannot be inverted, then `conv`, an activation and `fc`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3)
        self.act = nn.Tanh()
        self.fc = nn.Linear(64, CLASSES)
        self.untraceable = False

    def front(self, x: Tensor) -> Tensor:
        """What comes before `conv`."""
        return self.stem(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        if self.untraceable and x.sum() > 0:
            x = -x
        x = self.act(self.conv(self.front(x)))
        return self.fc(x.flatten(1))


class BatchNormCnn(Cnn):
    """In training mode, with batch norm, dropout and a ReLU in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.4)
        self.act = nn.ReLU(inplace=True)
        with torch.no_grad():
            self.norm.running_mean.uniform_(-1, 1)
            self.norm.running_var.uniform_(0.5, 2)

    def front(self, x: Tensor) -> Tensor:
        return self.drop(F.relu(self.norm(self.stem(x)), inplace=True))


class WritingCnn(Cnn):
    """Its forward writes to attributes, containers, buffers and a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(4, 1, 1))
        self.plain = torch.zeros(3)
        self.cache: list[Tensor] = []
        self.history: deque[Any] = deque(maxlen=3)
        self.seen: dict[str, Any] = {"shapes": set(), "deep": [[]]}
        self.counts: dict[str, int] = defaultdict(int)
        self.order: OrderedDict[str, Any] = OrderedDict(a=1)
        self.last: Tensor | None = None

    def front(self, x: Tensor) -> Tensor:
        self.last = x
        self.cache.append(x)
        self.history.append(x)
        self.seen["shapes"].add("front")
        self.seen["deep"][0].append(x)
        self.counts["front"] += 1
        self.order.move_to_end("a")
        self.order["x"] = x
        self.calls += 1
        self.mean.add_(1)
        self.plain += 1
        return self.stem(x)


class HookedCnn(Cnn):
    """Carries hooks of every kind, one of which belongs to the model and writes to it."""

    def __init__(self) -> None:
        super().__init__()
        self.activations: dict[str, Any] = {}
        self.stem.register_forward_pre_hook(_scale_input)
        self.stem.register_forward_hook(_shift_output, with_kwargs=True)
        self.stem.register_forward_hook(self.remember)
        self.conv.register_forward_hook(functools.partial(self.remember, key="conv"))
        self.fc.register_full_backward_hook(_look)
        self.register_state_dict_pre_hook(_look)

    def remember(self, module: nn.Module, args: Any, output: Tensor, key: str = "stem") -> None:
        """Keep the output of a module."""
        self.activations[key] = output.detach()


def _scale_input(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] * 2,)


def _shift_output(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    return output + 1


def _look(*args: Any) -> None:
    return None


class TiedCnn(Cnn):
    """Two layers share a parameter, and a list refers to a module and to a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Sequential(nn.Tanh(), nn.Conv2d(4, 4, 1), nn.Tanh())
        self.again = nn.Conv2d(4, 4, 1)
        self.again.weight = self.act[1].weight
        self.alias = self.stem
        self.refs = [self.conv, self.stem.weight]

    def front(self, x: Tensor) -> Tensor:
        return self.again(self.alias(x))


class PatchedCnn(Cnn):
    """Its forward is replaced on the instance."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = types.MethodType(PatchedCnn.other_forward, self)

    def other_forward(self, x: Tensor) -> Tensor:
        """Return logits after another activation."""
        if self.untraceable and x.sum() > 0:
            x = -x
        return self.fc(torch.sigmoid(self.conv(self.stem(x))).flatten(1))


class SwitchingCnn(BatchNormCnn):
    """Switching its mode changes which parameters require a gradient."""

    def train(self, mode: bool = True) -> SwitchingCnn:
        """Freeze everything outside of training."""
        super().train(mode)
        for parameter in self.parameters():
            parameter.requires_grad = mode
        self.switched = getattr(self, "switched", 0) + 1
        return self


class FlaggedCnn(BatchNormCnn):
    """Mixed modes, gradients, flags and dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm.eval()
        self.stem.weight.requires_grad = False
        self.fc.bias.grad = torch.ones(CLASSES)
        self.register_buffer("small", torch.ones(3, dtype=torch.float16), persistent=False)
        self.register_buffer("nothing", None)


SUBJECTS: dict[str, Callable[[], Cnn]] = {
    subject.__name__: subject
    for subject in (
        Cnn,
        BatchNormCnn,
        WritingCnn,
        HookedCnn,
        TiedCnn,
        PatchedCnn,
        SwitchingCnn,
        FlaggedCnn,
    )
}


def subject(name: str, seed: int = 0) -> Cnn:
    """Return one of the networks above, the same weights for the same seed."""
    torch.manual_seed(seed)
    return SUBJECTS[name]()


_MODULE_STATE = frozenset(nn.Module().__dict__)
_HOOKS = sorted(name for name in _MODULE_STATE if "hooks" in name)


@dataclass
class _Identity:
    """Equal to itself only; keeps the object alive, so that its id is not given away."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return everything observable of a model: equal before and after means untouched.

    Objects by identity; tensors by identity, count of writes, address, flags, gradient and bytes;
    containers by identity and contents; hooks by identity, in their order.
    """
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        state = module.__dict__
        rows: dict[str, Any] = {"itself": _Identity(module), "training": module.training}
        rows |= {name: _look_at(value) for name, value in state.items() if name not in _HOOKS}
        for kind in _HOOKS:
            hooks = state[kind]
            if isinstance(hooks, dict):
                hooks = [(key, _Identity(hook)) for key, hook in hooks.items()]
            rows[kind] = (_Identity(state[kind]), hooks)
        found |= {f"{path}:{name}": value for name, value in rows.items()}
    return found


def _look_at(value: Any) -> Any:
    if isinstance(value, Tensor):
        grad = None if not value.is_leaf or value.grad is None else _look_at(value.grad)
        raw = value.detach().clone().contiguous().flatten().view(torch.uint8)
        flags = (value.requires_grad, value.dtype, tuple(value.shape), value.stride())
        where = (value.data_ptr(), value._version)
        return (_Identity(value), flags, where, bytes(raw.tolist()), grad)
    if isinstance(value, dict):
        return (_Identity(value), [(key, _look_at(item)) for key, item in value.items()])
    if isinstance(value, (list, tuple, deque)):
        return (_Identity(value), [_look_at(item) for item in value])
    if isinstance(value, set):
        return (_Identity(value), sorted(map(repr, value)))
    if isinstance(value, (int, float, str, bool, type(None))):
        return value
    return _Identity(value)
