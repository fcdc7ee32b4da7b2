import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from plotarmour import machine
from plotarmour.cli import UserError
from plotarmour.machine import dtype_for


def test_dtype_goes_by_capability():
    """Guards: a T4 sent to bfloat16, because `is_bf16_supported` says True there."""
    names = [dtype_for(*sm)[0] for sm in ((5, 2), (6, 0), (7, 5), (8, 0), (9, 0))]
    assert names == ["float32", "float16", "float16", "bfloat16", "bfloat16"]


@pytest.fixture
def gpu(monkeypatch):
    """Let torch report a GPU that is not here; its kernels are not run."""
    def report(name, capability, built, gib, count=1):
        for function, value in {"is_available": name is not None, "device_count": count, "get_arch_list": built,
                                "get_device_capability": capability, "current_device": 0,
                                "get_device_properties": SimpleNamespace(name=name, total_memory=gib * 2**30)}.items():
            monkeypatch.setattr(torch.cuda, function, lambda *_, value=value: value)
        ran = []
        monkeypatch.setattr(machine, "run_kernel", ran.append)
        return ran

    return report


CU128 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize(("name", "capability", "gib", "count", "dtype"), [
    ("Tesla T4", (7, 5), 15, 2, "float16: sm_75 has float16 but no bfloat16 in hardware"),
    ("NVIDIA A100-SXM4-40GB", (8, 0), 40, 1, "bfloat16: sm_80 computes bfloat16 in hardware")])
def test_the_report_of_a_gpu_says_what_torch_was_built_for(gpu, monkeypatch, name, capability, gib, count, dtype):
    """Guards: a T4 that computes in bfloat16; a second T4 that nobody knows of; a GPU that no kernel tried."""
    ran = gpu(name, capability, CU128, gib, count)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    text = machine.report()
    assert f"{name}, {gib} GiB\n" in text
    assert f"gpu       sm_{capability[0]}{capability[1]}, GPUs: {count}; torch has sm_75, sm_80" in text
    assert dtype in text and "training stops by itself in" in text and len(ran) == 1
    assert all(f" {what}" in text for what in ("kaggle", "cores: ", "GiB of memory", "GiB of disk", "torch 2"))


def test_a_p100_whose_torch_lacks_its_kernels_stops_the_report_with_what_mends_it(gpu, run_main):
    """Guards: minutes of downloads before the first kernel fails; a command that gives the same torch again."""
    gpu("Tesla P100-PCIE-16GB", (6, 0), CU128, 16)
    code, out, err = run_main("doctor")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("error: Tesla P100-PCIE-16GB is sm_60, and torch ") and "built for sm_75, sm_80" in err
    assert 'pip install "torch<2.15" --index-url https://download.pytorch.org/whl/cu126' in err and "GPU T4 x2" in err
    gpu("Tesla P100-PCIE-16GB", (6, 0), ["sm_50", "sm_60", "sm_70"], 16)
    assert "float16: sm_60 has float16" in machine.report()


@pytest.mark.parametrize(("where", "switch"), [("kaggle", " (Settings > Accelerator"), ("colab", " (Runtime > Change"),
                                               ("own machine", "; on two cores")])
def test_without_a_gpu_the_report_says_how_long_the_recipes_take(gpu, monkeypatch, where, switch):
    """Guards: a night on two cores because a switch was off; a limit of Colab that is met when the disk is gone."""
    gpu(None, (0, 0), [], 0, 0)
    monkeypatch.setattr(machine, "host", lambda: where)
    text = machine.report()
    assert f"gpu       none{switch}" in text and "tiny takes 1 to 2 minutes a model" in text
    assert ("session " in text) == (where != "own machine")


def test_a_kernel_that_fails_is_one_line(monkeypatch):
    """Guards: a GPU whose architecture is listed and whose first kernel fails in the middle of a notebook."""
    def fail(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available\nCUDA kernel errors might be")

    machine.run_kernel(machine.find_machine("cpu"))
    monkeypatch.setattr(torch, "ones", fail)
    with pytest.raises(UserError, match="computes nothing with torch .*no kernel image is available Install a torch"):
        machine.run_kernel(machine.find_machine("cpu"))


def test_of_kaggles_working_folder_20_gb_are_kept(monkeypatch, tmp_path):
    """Guards: results of a night that Kaggle does not keep, because its disk is larger than what it saves."""
    monkeypatch.setattr(machine, "KAGGLE", tmp_path)
    monkeypatch.setattr(machine, "KAGGLE_KEEPS", 1000)
    run = tmp_path / "working" / "run"
    run.mkdir(parents=True)
    (run / "weights").write_bytes(bytes(400))
    assert (machine.free_disk(run), machine.free_disk(tmp_path / "working")) == (600, 600)
    (run / "more").write_bytes(bytes(4000))
    assert machine.free_disk(run) == 0 < machine.free_disk(tmp_path)


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
