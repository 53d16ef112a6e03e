"""Measures functions side by side: on a CPU by the thread's own time, on a GPU by events."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

Functions = dict[str, Callable[[], Any]]


class Stopwatch:
    """Measures functions in turns, and keeps the least time of each, in milliseconds.

    On one thread of a CPU it is the thread's own time, whatever else the machine is doing.

    Args:
        device: Where the functions run.
        seconds: How long to go on for every function.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self.now = time.process_time if alone else time.perf_counter

    def __call__(self, functions: Functions) -> dict[str, float]:
        """Return the time of each as Python calls it."""
        best = dict.fromkeys(functions, math.inf)
        end = time.perf_counter() + self.seconds * len(functions)
        rounds = 0
        while rounds < 3 or time.perf_counter() < end:
            for name, function in functions.items():
                elapsed = self.once(function)
                if rounds:  # the first round warms up
                    best[name] = min(best[name], elapsed)
            rounds += 1
        return best

    def once(self, function: Callable[[], Any]) -> float:
        """Return how long one call takes."""
        self._wait()
        start = self.now()
        function()
        self._wait()
        return 1e3 * (self.now() - start)

    def captured(self, functions: Functions, repeats: int = 10) -> dict[str, float]:
        """Return the time of each in a CUDA graph, which leaves the host out.

        A graph holds the function several times, so that its own launch does not count. What
        cannot be captured is left out.
        """
        graphs = {name: _capture(function, repeats) for name, function in functions.items()}
        replays = {name: graph.replay for name, graph in graphs.items() if graph is not None}
        return {name: ms / repeats for name, ms in self(replays).items()}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _capture(function: Callable[[], Any], repeats: int) -> torch.cuda.CUDAGraph | None:
    """Return a graph of several calls; None if something in them waits for the device."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                function()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph
