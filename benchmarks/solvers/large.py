"""VGG-16 at 224x224 from its logits to the first convolution: how long, and how much memory.

Run in a process of its own, whose memory is then this network's alone.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import warnings
from typing import Any

import torch

import frfx
from frfx import models
from solvers.stopwatch import Stopwatch

BATCH, SIZE, LAYER = 16, 224, "features.0"


def measure_apart() -> dict[str, Any]:
    """Return the row, measured in a new process on a CPU."""
    threads = str(torch.get_num_threads())
    call = [sys.executable, "-m", "solvers.large", threads]
    done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(watch: Stopwatch) -> dict[str, Any]:
    """Return the row: seconds, and GiB of the process at most."""
    torch.manual_seed(0)
    model = models.load_model("torchvision:vgg16").eval()
    x = torch.randn(BATCH, 3, SIZE, SIZE)
    y = torch.randint(0, 1000, (BATCH,))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        forward = watch.once(lambda: model(x))
        before = _peak()
        inverse = frfx.invert(model, LAYER)
        first = watch.once(lambda: inverse(x, y))
        times = [watch.once(lambda: inverse(x, y)) for _ in range(2)]
    return {
        "network": "torchvision:vgg16",
        "image": SIZE,
        "batch": BATCH,
        "down to": LAYER,
        "forward_s": forward / 1e3,
        "prepare_s": (first - min(times)) / 1e3,
        "inverse_s": min(times) / 1e3,
        "before_gib": before,
        "peak_gib": _peak(),
        "factors_gib": inverse.prepare.nbytes / 2**30,
    }


def _peak() -> float:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**30 if sys.platform == "darwin" else 2**20)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps(measure(Stopwatch(torch.device("cpu"), 0))))
