"""Checkpoints: everything a run needs to go on, published whole, verified before use. No pickle.

    checkpoints/step_00001200/   model.safetensors, optimizer.safetensors, state.json, MANIFEST.json (SHA-256 of each)
    checkpoints/index.json       latest, previous and best; replaced last, atomically
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plotarmour.errors import UserError
from plotarmour.files import publish, sync_folder, unfinished, write_json


def save_checkpoint(run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict,
                    best: bool, keep_every: int) -> Path:
    """Write the checkpoint of a step, point the index at it, and remove those that nothing points at any more.

    Args:
        run: the run folder.
        step: updates attempted so far.
        model, optimizer: at that step.
        state: JSON: counters, scaler, best value and the like.
        best: whether this step has the lowest validation loss so far.
        keep_every: steps that are multiples of this stay; 0 for none.

    Returns:
        The folder of the checkpoint.
    """
    folder = run / "checkpoints" / f"step_{step:08d}"
    temporary = unfinished(folder)
    try:
        temporary.mkdir()
        save_file(model_tensors(model), temporary / "model.safetensors")
        save_file(_optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
        write_json(temporary / "state.json", state | {"step": step})
        manifest = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
        write_json(temporary / "MANIFEST.json", manifest)
        for file in temporary.iterdir():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        sync_folder(temporary)
        if folder.exists():  # published, but the run was killed before the index named it
            shutil.rmtree(folder)
        publish(temporary, folder)
    except SafetensorError as error:
        raise UserError(f"{folder} cannot be written: {error}. Free some disk space; earlier checkpoints are "
                        "intact.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    index = read_index(run)
    if index.get("latest") != folder.name:
        index["previous"], index["latest"] = index.get("latest"), folder.name
    if best:
        index["best"] = folder.name
    write_json(run / "checkpoints" / "index.json", index)
    for other in (run / "checkpoints").glob("step_*"):
        kept = keep_every and int(other.name.removeprefix("step_")) % keep_every == 0
        if other.name not in index.values() and not kept:
            shutil.rmtree(other)
    return folder


def rewind(run: Path, step: int) -> None:
    """Go back to a kept step: the index names it, what came later goes. `best` stays if it is not later."""
    for name in ("DONE.json", "STOPPED.json"):
        (run / name).unlink(missing_ok=True)
    best = read_index(run).get("best")
    chosen = f"step_{step:08d}"
    kept = best if best and best <= chosen else chosen
    write_json(run / "checkpoints" / "index.json", {"previous": None, "latest": chosen, "best": kept})
    for folder in (run / "checkpoints").glob("step_*"):
        if folder.name > chosen:
            shutil.rmtree(folder)


def read_index(run: Path) -> dict[str, str | None]:
    """Return names of the checkpoint folders that are `latest`, `previous` and `best`; empty for a new run."""
    path = run / "checkpoints" / "index.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def find_checkpoint(run: Path, which: str | int) -> Path:
    """Return the folder of a verified checkpoint.

    Args:
        run: the run folder.
        which: "latest", "best" or a step.

    Raises:
        UserError: there is none, or it is damaged.
    """
    name = f"step_{which:08d}" if isinstance(which, int) else read_index(run).get(which)
    folder = run / "checkpoints" / name if name else None
    if folder is None or not folder.is_dir():
        kept = sorted(p.name for p in (run / "checkpoints").glob("step_*"))
        raise UserError(f"{run} has no {which if isinstance(which, str) else f'step-{which}'} checkpoint; "
                        f"found {', '.join(kept) or 'none'}.")
    manifest = json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))
    for file, sha256 in manifest.items():
        if not (folder / file).is_file() or _sha256(folder / file) != sha256:
            raise UserError(f"{folder / file} is damaged (its SHA-256 is not the manifest's). Continue from another "
                            "checkpoint with --from-step.")
    return folder


def load_model(folder: Path, model: nn.Module) -> None:
    """Load the weights of a checkpoint into a model of the same shape."""
    tensors = load_file(folder / "model.safetensors")
    parameters = dict(model.named_parameters())
    if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in parameters.items()}:
        raise UserError(f"{folder} holds the weights of another model than its run.json describes.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def load_training(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Load weights and optimizer state; return the rest of the state."""
    load_model(folder, model)
    tensors = load_file(folder / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        values = {key.split("/", 1)[1]: value for key, value in tensors.items() if key.split("/", 1)[0] == name}
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in values.items()}
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, tied ones once, contiguous."""
    return {name: p.detach().contiguous() for name, p in model.named_parameters()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {f"{name}/{key}": value.contiguous() for name, p in model.named_parameters()
            for key, value in optimizer.state.get(p, {}).items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
