"""The machine: host, device, dtype with its reason, what a container and a session may use, versions. Without torch."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import plotarmour
from plotarmour.cli import UserError

if TYPE_CHECKING:
    import torch

CGROUP = Path("/sys/fs/cgroup")  # where Linux shows a container its own limits
KAGGLE = Path("/kaggle")  # input/ has what is attached, working/ is kept as the output
KAGGLE_KEEPS = 20 * 2**30  # bytes of working/
# Kaggle ends sessions after 9 hours (interactive) or 12 (batch); the rest is for what comes after training.
KAGGLE_MINUTES = {"Interactive": 510.0, "Batch": 660.0}


REMEDY = (  # cu126 wheels have sm_60 up to torch 2.14
    'Install a torch that has it: pip install "torch<2.15" --index-url https://download.pytorch.org/whl/cu126, then '
    "restart; or choose a T4 (on Kaggle: Settings > Accelerator > GPU T4 x2); or hide the GPU with the environment "
    "variable CUDA_VISIBLE_DEVICES=-1.")


@dataclass(frozen=True)
class Machine:
    """Where and in which dtype to compute."""

    device: torch.device
    dtype: torch.dtype  # of forward passes
    reason: str  # for the dtype
    hardware: str  # name and size of the device

    @property
    def autocast(self) -> torch.autocast:
        """Return the context for forward passes. It does nothing in float32."""
        import torch

        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


def find_machine(device: str = "auto", dtype: str = "auto") -> Machine:
    """Choose device and dtype.

    Args:
        device: auto (the GPU if there is one), cpu or cuda.
        dtype: auto (float32 on the CPU; on a GPU see `dtype_for`), float32, bfloat16 or float16.

    Raises:
        UserError: this machine has no such device, or this torch has no kernels for its GPU.
    """
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {device!r} is unknown; expected auto, cpu or cuda.")
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise UserError("device cuda was asked for, but torch sees no GPU; use device=cpu, or turn the GPU on.")
    if device == "cpu" or not has_gpu:
        if dtype == "float16":
            raise UserError("dtype float16 needs a GPU; use float32 on the CPU.")
        machine = Machine(torch.device("cpu"), torch.float32, "the CPU computes float32 fastest",
                          f"CPU, threads: {torch.get_num_threads()} ({_processor()})")
    else:
        machine = _find_gpu()
    return machine if dtype == "auto" else replace(machine, dtype=getattr(torch, dtype), reason="asked for")


def _find_gpu() -> Machine:
    """Return the current GPU, or this process's own where torchrun started one process per GPU."""
    import torch
    from torch import cuda

    processes, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), cuda.device_count()
    if processes > count:  # every process raises this, so that the first one reports it
        raise UserError(f"{processes} processes were started for {count} GPUs; expected at most one each (torchrun "
                        f"--nproc-per-node {count}).")
    if "LOCAL_RANK" in os.environ:
        cuda.set_device(int(os.environ["LOCAL_RANK"]))
    gpu, (major, minor), built = cuda.get_device_properties(), cuda.get_device_capability(), cuda.get_arch_list()
    numbers = [int(n) for arch in built if (n := arch.removeprefix("sm_").removeprefix("compute_")).isdigit()]
    if numbers and 10 * major + minor < min(numbers):
        raise UserError(f"{gpu.name} is sm_{major}{minor}, and torch {torch.__version__} was built for "
                        f"{', '.join(built)}: its first kernel would fail. {REMEDY}")
    dtype, reason = dtype_for(major, minor)
    return Machine(torch.device("cuda", cuda.current_device()), getattr(torch, dtype), reason,
                   f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")


def dtype_for(major: int, minor: int) -> tuple[str, str]:
    """Return the name of the fastest dtype for a CUDA compute capability, and the reason."""
    if major >= 8:
        return "bfloat16", f"sm_{major}{minor} computes bfloat16 in hardware"
    if major >= 6:  # a T4 (sm_75) emulates bfloat16 slowly, although `torch.cuda.is_bf16_supported` is True there
        return "float16", f"sm_{major}{minor} has float16 but no bfloat16 in hardware"
    return "float32", f"sm_{major}{minor} has no fast float16"


def host() -> str:
    """Return "kaggle", "colab" or "own machine"."""
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE") or (KAGGLE / "working").is_dir():
        return "kaggle"
    return "colab" if "COLAB_RELEASE_TAG" in os.environ or "google.colab" in sys.modules else "own machine"


def cores() -> int:
    """Return how many CPU cores this process may use: by its affinity and its cgroup's quota, at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    version_1 = _cgroup_numbers("cpu/cpu.cfs_quota_us") + _cgroup_numbers("cpu/cpu.cfs_period_us")
    quota = _cgroup_numbers("cpu.max") or version_1
    has_quota = len(quota) == 2 and quota[0] > 0
    return max(1, min(count, math.ceil(quota[0] / quota[1])) if has_quota else count)


def memory_bytes(device: torch.device) -> int:
    """Return bytes of memory: all of a GPU's, or what this process may still take of the machine's or cgroup's RAM."""
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    available = psutil.virtual_memory().available
    for names in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        limit, used = map(_cgroup_numbers, names)
        if limit and used:
            available = min(available, max(0, limit[0] - used[0]))
    return available


def peak_memory_mib(device: torch.device) -> float | None:
    """Return the peak memory in MiB; None where the system does not count it.

    On a GPU: allocated by torch since the last reset. On a CPU: resident, since this process started.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def peak_memory(device: torch.device) -> str:
    """Return the peak memory in words, with a GPU's memory; "" where the system does not count it."""
    peak = peak_memory_mib(device)
    size = f" of {memory_bytes(device) / 2**30:.1f}" if device.type == "cuda" else ""
    return "" if peak is None else f"peak memory {peak / 2**10:.1f}{size} GiB"


def versions() -> dict[str, str | None]:
    """Return the versions that a result depends on, and the git commit of the checkout if there is one."""
    import torch

    root, commit = Path(__file__).resolve().parents[1], None
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return {"plotarmour": plotarmour.__version__, "python": platform.python_version(), "torch": torch.__version__,
            **{name: version(name) for name in ("transformers", "tokenizers", "numpy")}, "git_commit": commit}


def session_minutes(max_minutes: float | str = "auto") -> float:
    """Return how many minutes this session may train from now on; 0 for no limit.

    Args:
        max_minutes: of the recipe. "auto" is no limit except on Kaggle, where the session's clock also runs while text
            is prepared.
    """
    import psutil

    if max_minutes != "auto":
        return max_minutes
    if host() != "kaggle":
        return 0.0
    limit = KAGGLE_MINUTES.get(os.environ.get("KAGGLE_KERNEL_RUN_TYPE", ""), min(KAGGLE_MINUTES.values()))
    process = psutil.Process()
    # The oldest ancestor, because a notebook's kernel may have been restarted and a command started late.
    began = min(ancestor.create_time() for ancestor in (process, *process.parents()))
    return max(1.0, limit - (time.time() - began) / 60)


def free_disk(folder: Path) -> int:
    """Return how many bytes may still be written to a folder; of Kaggle's working folder only 20 GB are kept."""
    free, working = shutil.disk_usage(folder).free, KAGGLE / "working"
    if host() != "kaggle" or working not in (folder.resolve(), *folder.resolve().parents):
        return free
    taken = sum(path.stat().st_size for path in working.rglob("*") if path.is_file())
    return max(0, min(free, KAGGLE_KEEPS - taken))


def run_kernel(machine: Machine) -> None:
    """Multiply two matrices on the device and wait for the result; raise `UserError` where that fails."""
    import torch

    try:
        ones = torch.ones(64, 64, device=machine.device, dtype=machine.dtype)
        (ones @ ones).sum().item()
    except RuntimeError as error:
        raise UserError(f"{machine.hardware} computes nothing with torch {torch.__version__}: "
                        f"{str(error).splitlines()[0]} {REMEDY}") from None


def report() -> str:
    """Return a description of the machine in a few lines, after a product was computed on its device.

    Raises:
        UserError: this torch has no kernels for the GPU.
    """
    import torch

    machine, where = find_machine(), host()
    run_kernel(machine)
    if machine.device.type == "cuda":
        capability = "".join(map(str, torch.cuda.get_device_capability()))
        gpu = f"sm_{capability}, GPUs: {torch.cuda.device_count()}; torch has {', '.join(torch.cuda.get_arch_list())}"
    else:
        switch = {"kaggle": " (Settings > Accelerator > GPU T4 x2)",
                  "colab": " (Runtime > Change runtime type > T4 GPU)"}.get(where, "")
        gpu = f"none{switch}; on two cores recipe tiny takes 1 to 2 minutes a model, laptop 6 to 20"
    free = (memory_bytes(torch.device("cpu")) / 2**30, free_disk(Path.cwd()) / 2**30)
    session = {"kaggle": f"training stops by itself in {session_minutes():.0f} minutes, before Kaggle ends it",
               "colab": "ends after at most 12 h, and its disk with it; results on Google Drive stay"}
    rows = {"host": f"{where}, {platform.system()} {platform.machine()}, cores: {cores()}; free: {free[0]:.1f} GiB of "
                    f"memory, {free[1]:.1f} GiB of disk",
            "hardware": machine.hardware, "gpu": gpu,
            "dtype": f"{str(machine.dtype).removeprefix('torch.')}: {machine.reason}",
            "session": session.get(where), "versions": ", ".join(f"{k} {v}" for k, v in versions().items() if v)}
    return "\n".join(f"{key:<9} {value}" for key, value in rows.items() if value)


def _cgroup_numbers(name: str) -> list[int]:
    """Read the numbers of a cgroup file (version 2, or a controller's file of version 1); [] without a limit."""
    try:
        return [int(word) for word in (CGROUP / name).read_text(encoding="ascii").split()]
    except (OSError, ValueError):  # there is no such file, or it begins with "max"
        return []


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    match = re.search(r"^model name\s*: (.+)", text, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()
