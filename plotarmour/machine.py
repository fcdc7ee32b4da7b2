"""What this machine is: device, dtype, host, versions; each with its reason, as a report to print."""

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import plotarmour
from plotarmour.cli import UserError
from plotarmour.limits import available_memory


@dataclass(frozen=True)
class Machine:
    """Where to compute, in which dtype, and why."""

    device: torch.device
    dtype: torch.dtype
    reason: str  # for the dtype
    hardware: str

    @property
    def autocast(self) -> torch.autocast:
        """Context for forward passes: does nothing in float32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


def find_machine(device: str = "auto", dtype: str = "auto") -> Machine:
    """Choose device and dtype.

    The dtype goes by compute capability: bfloat16 from sm_80, where it is done in hardware (a T4 also answers True
    to `torch.cuda.is_bf16_supported`, and emulates it slowly); float16 from sm_60; float32 below and on the CPU.

    Raises:
        UserError: a device that is not there, or whose GPU this torch has no kernels for.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {device!r} is unknown; expected auto, cpu or cuda.")
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UserError("device cuda was asked for, but torch sees no GPU; use device=cpu, or turn the GPU on.")
    if device == "cpu" or not cuda:
        chosen, reason = torch.float32, "the CPU computes float32 fastest"
        found, hardware = torch.device("cpu"), f"CPU, {torch.get_num_threads()} threads ({_processor()})"
    else:
        found = _own_gpu()
        name = torch.cuda.get_device_name(found)
        major, minor = torch.cuda.get_device_capability(found)
        built = torch.cuda.get_arch_list()
        numbers = [int(n) for arch in built if (n := arch.removeprefix("sm_").removeprefix("compute_")).isdigit()]
        if numbers and 10 * major + minor < min(numbers):
            raise UserError(f"{name} is sm_{major}{minor}, but this torch was built for {', '.join(built)}: its first "
                            "kernel would fail. Install a torch with that architecture (for sm_60: a cu126 wheel).")
        chosen, reason = dtype_for(major, minor)
        hardware = f"{name}, {torch.cuda.get_device_properties(found).total_memory / 2**30:.0f} GiB"
    if dtype != "auto":
        chosen, reason = getattr(torch, dtype), "asked for"
        if found.type == "cpu" and chosen == torch.float16:
            raise UserError("dtype float16 needs a GPU; use float32 on the CPU.")
    return Machine(found, chosen, reason, hardware)


def _own_gpu() -> torch.device:
    """The current GPU, or this process's own where torchrun started one process per GPU."""
    processes, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > count:  # said by all of them, so that the first one says it
        raise UserError(f"{processes} processes were started for {count} GPUs; expected at most one each (torchrun "
                        f"--nproc-per-node {count}).")
    if "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda", torch.cuda.current_device())


def dtype_for(major: int, minor: int) -> tuple[torch.dtype, str]:
    """Return dtype and reason for a CUDA compute capability."""
    sm = f"sm_{major}{minor}"
    if major >= 8:
        return torch.bfloat16, f"{sm} computes bfloat16 in hardware"
    if major >= 6:
        return torch.float16, f"{sm} has float16 but no bfloat16 in hardware"
    return torch.float32, f"{sm} has no fast float16"


def host() -> str:
    """Return "kaggle", "colab" or "own machine"."""
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE") or Path("/kaggle/working").is_dir():
        return "kaggle"
    return "colab" if "COLAB_RELEASE_TAG" in os.environ or "google.colab" in sys.modules else "own machine"


def peak_memory_mib(device: torch.device) -> float | None:
    """Peak memory in MiB: allocated on the GPU since its last reset, or resident in this process's whole life.

    None where it cannot be told.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def peak_memory(device: torch.device) -> str:
    """Say the peak memory and its share of all there is, for people."""
    peak = peak_memory_mib(device)
    if peak is None:
        return "peak memory unknown"
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        import psutil

        total = psutil.virtual_memory().total
    return f"peak memory {peak / 2**10:.1f} of {total / 2**30:.1f} GiB ({peak * 2**20 / total:.0%})"


def unused(device: torch.device, processes: int, can_grow: bool) -> str:
    """Say what would use GPUs better, or nothing.

    Args:
        device: that computes.
        processes: that train together, one per GPU.
        can_grow: whether a larger micro-batch would still be part of a step.
    """
    if device.type != "cuda":
        return ""
    advice, idle = [], torch.cuda.device_count() - processes
    if idle > 0:
        advice.append(f"{idle} more GPU{'s are' * (idle > 1) or ' is'} idle: gpus = {processes + idle} in notebook 02, "
                      f"or torchrun --standalone --nproc-per-node {processes + idle} tools/train.py")
    share = torch.cuda.max_memory_allocated(device) / torch.cuda.get_device_properties(device).total_memory
    if can_grow and share < 0.5:
        advice.append(f"{1 - share:.0%} of the GPU's memory is free: micro_batch_size=auto takes larger pieces")
    return "; ".join(advice)


def memory_bytes(device: torch.device) -> int:
    """Return memory in bytes: all that the GPU has, or what this process may still take of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return available_memory()


def versions() -> dict[str, str | None]:
    """Versions that a result depends on, and the git commit of the checkout if there is one."""
    import numpy
    import tokenizers
    import transformers

    return {"plotarmour": plotarmour.__version__, "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "tokenizers": tokenizers.__version__,
            "numpy": numpy.__version__, "git_commit": _git_commit()}


def report() -> str:
    """Describe the machine in a few lines, for people."""
    try:
        machine = find_machine()
        hardware, dtype = machine.hardware, f"{str(machine.dtype).removeprefix('torch.')}: {machine.reason}"
    except UserError as error:
        hardware, dtype = str(error), "float32 on the CPU, with device=cpu"
    rows = {"host": f"{host()}, {platform.system()} {platform.machine()}", "hardware": hardware, "dtype": dtype,
            "versions": ", ".join(f"{k} {v}" for k, v in versions().items() if v)}
    return "\n".join(f"{key:<9} {value}" for key, value in rows.items())


def _git_commit() -> str | None:
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return None
    try:
        run = subprocess.run(["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
                             capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
