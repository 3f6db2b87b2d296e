"""Memory, for the benchmarks on a CPU: what an action adds to it, and a process that keeps what is freed."""

import ctypes
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CLEAR = Path("/proc/self/clear_refs")
KEPT = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
"""What tells glibc to keep freed memory. It accepts no more than 32 MiB for the second."""
GIVEN_BACK = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""What tells it to give freed memory back at once."""
AS_IT_COMES: dict[str, str] = {}


def keep_freed() -> None:
    """Starts this program again, once, in a process that keeps the memory it frees.

    glibc gives freed memory back to the system above a threshold, and the next tensor there costs a page fault for
    every 4 KiB. What is timed here is the computation without these. An arm that holds more memory has more of them.
    Elsewhere than on glibc nothing changes.
    """
    if not KEPT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEPT)


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


def in_fresh_process(settings: dict[str, str], function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in a process of its own, whose C library has these settings alone."""
    for name in KEPT:
        os.environ.pop(name, None)
    os.environ |= settings
    try:
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            return fresh.apply(function, arguments)
    finally:
        os.environ |= KEPT
