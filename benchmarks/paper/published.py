"""The paper's own figures, transcribed from its Tables 1 to 6."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from paper.settings import STAGES

FILE = Path(__file__).with_name("published.json")


@dataclass(frozen=True)
class Published:
    """A row of the paper's tables.

    Attributes:
        parameters: The column "#paras".
        memory: The column "GPU Mem", in MB.
        accuracy: Mean and standard deviation in %, by epoch.
    """

    parameters: int
    memory: float
    accuracy: dict[int, tuple[float, float]]


def table(benchmark: str) -> dict[tuple[str, tuple[int, int]], Published]:
    """Return the paper's table of a data set by method ("BP", "FR") and pair; empty if none."""
    stored = json.loads(FILE.read_text())["tables"].get(benchmark, {"rows": []})
    found = {}
    for method, l_s, l_r, parameters, memory, *values in stored["rows"]:
        spreads = dict(zip(STAGES, zip(values[::2], values[1::2], strict=True), strict=True))
        found[method, (l_s, l_r)] = Published(parameters, memory, spreads)
    return found


def baseline(benchmark: str) -> float | None:
    """Return the accuracy of the paper's baseline in %; None for a data set that it has not."""
    stored = json.loads(FILE.read_text())["tables"].get(benchmark)
    return None if stored is None else stored["baseline"]
