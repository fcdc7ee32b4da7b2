"""How many cores and how much memory this process may use: by the machine, and by the limits of its container."""

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # where Linux shows a container its own limits


def cores() -> int:
    """Return how many CPU cores this process may use: by its affinity and its cgroup's quota, at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_numbers("cpu.max")
    quota = quota or _cgroup_numbers("cpu/cpu.cfs_quota_us") + _cgroup_numbers("cpu/cpu.cfs_period_us")
    if len(quota) == 2 and quota[0] > 0:
        count = min(count, math.ceil(quota[0] / quota[1]))
    return max(1, count)


def available_memory() -> int:
    """Return how many bytes of memory this process may still take: on the machine and in its cgroup."""
    import psutil

    available = psutil.virtual_memory().available
    for names in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        limit, used = map(_cgroup_numbers, names)
        if limit and used:
            available = min(available, max(0, limit[0] - used[0]))
    return available


def _cgroup_numbers(name: str) -> list[int]:
    """Read the numbers of a cgroup file (version 2, or a controller's file of version 1); [] without a limit."""
    try:
        words = (CGROUP / name).read_text(encoding="ascii").split()
        return [int(word) for word in words] if words[0] != "max" else []
    except (OSError, ValueError, IndexError):
        return []
