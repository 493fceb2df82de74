"""Memory of this machine and of a stretch of work."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time


def total_memory_bytes() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Meter:
    """Wall-clock seconds and peak resident memory of a stretch of work, as a context manager.

    The peak is sampled every 20 ms, so that it belongs to this stretch and not to the process's
    past; where /proc is missing it is the process's own maximum.
    """

    seconds = 0.0
    peak_memory_bytes = 0

    def __enter__(self) -> Meter:
        self._start = time.perf_counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while True:
            self.peak_memory_bytes = max(self.peak_memory_bytes, resident_bytes())
            if self._stop.wait(0.02):
                return

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.seconds = time.perf_counter() - self._start


def resident_bytes() -> int:
    """Resident memory of this process now."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 (hot path)
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
