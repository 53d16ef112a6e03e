"""Times of the process, which other processes disturb little."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds of the process that a block took."""

    seconds = 0.0


@contextmanager
def clocked() -> Iterator[Clock]:
    """Measure a block."""
    gc.collect()
    clock, start = Clock(), time.process_time()
    yield clock
    clock.seconds = time.process_time() - start
