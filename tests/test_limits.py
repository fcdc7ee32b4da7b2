import os

import psutil
import pytest

from plotarmour import limits


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
@pytest.mark.parametrize(("files", "expected"), [
    ({}, 6), ({"cpu.max": "max 100000"}, 6), ({"cpu.max": "250000 100000"}, 3),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 6),
    ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2)])
def test_cores_are_those_of_the_affinity_and_the_quota(monkeypatch, tmp_path, files, expected):
    """Guards: 32 threads on 2 cores, because the machine has 64 and a container may use 2."""
    monkeypatch.setattr(limits, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n", encoding="ascii")
    assert limits.cores() == expected


@pytest.mark.parametrize(("files", "expected"), [
    ({}, 8000), ({"memory.max": "max", "memory.current": "10"}, 8000),
    ({"memory.max": "5000", "memory.current": "1000"}, 4000),
    ({"memory/memory.limit_in_bytes": "3000", "memory/memory.usage_in_bytes": "1000"}, 2000)])
def test_memory_is_what_the_container_may_still_take(monkeypatch, tmp_path, files, expected):
    """Guards: a plan for the machine's memory in a container that is killed at a fraction of it."""
    monkeypatch.setattr(limits, "CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 8000}))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n", encoding="ascii")
    assert limits.available_memory() == expected
