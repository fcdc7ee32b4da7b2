import os
import subprocess
import sys

import psutil
import pytest
import torch

from plotarmour import machine
from plotarmour.machine import dtype_for


def test_dtype_goes_by_capability():
    """Guards: a T4 sent to bfloat16, because `is_bf16_supported` says True there."""
    names = [dtype_for(*sm)[0] for sm in ((5, 2), (6, 0), (7, 5), (8, 0), (9, 0))]
    assert names == ["float32", "float16", "float16", "bfloat16", "bfloat16"]



@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
@pytest.mark.parametrize(("files", "expected"), [
    ({}, 6), ({"cpu.max": "max 100000"}, 6), ({"cpu.max": "250000 100000"}, 3),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 6),
    ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2)])
def test_cores_are_those_of_the_affinity_and_the_quota(monkeypatch, tmp_path, files, expected):
    """Guards: 32 threads on 2 cores, because the machine has 64 and a container may use 2."""
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n", encoding="ascii")
    assert machine.cores() == expected


@pytest.mark.parametrize(("files", "expected"), [
    ({}, 8000), ({"memory.max": "max", "memory.current": "10"}, 8000),
    ({"memory.max": "5000", "memory.current": "1000"}, 4000),
    ({"memory/memory.limit_in_bytes": "3000", "memory/memory.usage_in_bytes": "1000"}, 2000)])
def test_memory_is_what_the_container_may_still_take(monkeypatch, tmp_path, files, expected):
    """Guards: a plan for the machine's memory in a container that is killed at a fraction of it."""
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 8000}))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n", encoding="ascii")
    assert machine.memory_bytes(torch.device("cpu")) == expected


def test_the_machine_is_imported_without_torch(root):
    """Guards: `--help` that takes seconds; workers of the pretokenizer that each load torch to count cores."""
    code = (f"import sys; sys.path.insert(0, {str(root)!r}); import plotarmour.machine as m; "
            "import plotarmour.data.tokenizer; m.cores(); sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
