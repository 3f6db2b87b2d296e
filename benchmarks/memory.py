"""What an action adds at most to the memory of a process, for the benchmarks on a CPU (Linux alone tells)."""

import ctypes
import gc
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

CLEAR = Path("/proc/self/clear_refs")


def told() -> bool:
    """Whether this system tells the highest resident size, and lets it be reset."""
    return os.access(CLEAR, os.W_OK)


def resident(line: str) -> int:
    """The bytes that a line of /proc/self/status tells: VmRSS, the resident size; VmHWM, the highest since a reset."""
    return int(Path("/proc/self/status").read_text().partition(f"{line}:")[2].split()[0]) * 1024


def added_by(action: Callable[[], Any]) -> int:
    """The bytes by which the resident size rises at most while `action` runs. Call it `in_fresh_process`."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")  # the highest size is now this one
    standing = resident("VmRSS")
    action()
    return resident("VmHWM") - standing


def in_fresh_process(function: Callable[..., int], *arguments: Any) -> int:
    """What `function` returns in a process of its own, which gives freed memory back at once."""
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        return fresh.apply(function, arguments)
