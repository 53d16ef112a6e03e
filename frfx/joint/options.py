"""The options of joint inversion."""

from __future__ import annotations

import math
from dataclasses import dataclass

from frfx.errors import PolicyError
from frfx.rules.base import check_choice


@dataclass(frozen=True)
class JointOptions:
    """What `frfx.policy.joint` sets, and describes."""

    steps: int = 12
    margin: float = 0.01
    constraint: str = "inequality"
    classes: int = 8
    iterations: int = 100
    tolerance: float = 1e-2
    unreached: str = "warn"
    start: str | int | None = None
    regions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("constraint", self.constraint, ("inequality", "equality"))
        check_choice("unreached", self.unreached, ("warn", "raise", "ignore"))
        for name in ("steps", "classes", "iterations"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PolicyError(f"{name} is a whole number from 1 on, not {value!r}")
        for name in ("margin", "tolerance"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise PolicyError(f"{name} is a finite number above 0, not {value!r}")
        if not all(isinstance(name, str) for name in self.regions):
            raise PolicyError(f"regions are names of nodes, not {self.regions!r}")
