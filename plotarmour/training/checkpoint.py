"""Checkpoints: everything a run needs to go on, published whole, verified before use. No pickle.

    checkpoints/step_00001200/   model.safetensors, optimizer.safetensors, state.json, MANIFEST.json (SHA-256 of each)
    checkpoints/index.json       latest, previous and best; replaced last, atomically

A save makes a hidden folder, gives it its name, then writes the index, and only then removes what the index named
before. Wherever it ends, the index names whole checkpoints; what is left over goes at the next start (`tidy`).
"""

import json
import os
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plotarmour.cli import UserError
from plotarmour.files import publish, sync_file, unfinished
from plotarmour.training.manifest import Damaged, damage_of, read_sealed, write_manifest, write_sealed

NAMED = ("latest", "previous", "best")
SLACK_BYTES = 2 << 20  # beside the tensors: headers, state.json, manifest, index, some rows of the log


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

    Raises:
        UserError: the disk is full or does not take it. Earlier checkpoints are as they were.
    """
    folder = run / "checkpoints" / _name(step)
    tensors = {"model.safetensors": model_tensors(model), "optimizer.safetensors": _optimizer_tensors(model, optimizer)}
    named, temporary, replaced, aside = read_index(run), None, False, unfinished(folder)
    if named.get("latest") != folder.name:
        named["previous"], named["latest"] = named.get("latest"), folder.name
    if best:
        named["best"] = folder.name
    try:
        temporary = unfinished(folder)
        _check_space(folder.parent, tensors)
        temporary.mkdir()
        for name, values in tensors.items():
            save_file(values, temporary / name)
            _check_readable(temporary / name, values)
        (temporary / "state.json").write_text(json.dumps(state | {"step": step}, indent=2) + "\n", encoding="utf-8")
        for name in tensors:  # safetensors lets nobody else read them
            with suppress(OSError):
                shutil.copymode(temporary / "state.json", temporary / name)
        for name in (*tensors, "state.json"):
            sync_file(temporary / name)
        write_manifest(temporary, step)  # synced, and the folder with it
        if (run / "log.csv").exists():
            sync_file(run / "log.csv")  # after a loss of power, the rows up to here are there like the checkpoint
        replaced = True
        if folder.exists():  # what an earlier start left of this step
            os.replace(folder, aside)
        publish(temporary, folder)
        _write_index(run, named)
    except (OSError, SafetensorError) as error:
        if replaced and folder.name not in _named_on_disk(run):
            shutil.rmtree(folder, ignore_errors=True)
        if aside.exists() and not folder.exists():
            with suppress(OSError):
                os.replace(aside, folder)
        what = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{folder} cannot be written: {what}. Earlier checkpoints are intact: free some disk space, or "
                        "mend the disk or its permissions, and give the same command again.") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)
    _prune(run, keep_every)
    return folder


def rewind(run: Path, step: int) -> None:
    """Go back to a kept step: the index names it, what came later goes. `best` is what was the best then."""
    for name in ("DONE.json", "STOPPED.json"):
        (run / name).unlink(missing_ok=True)
    chosen = _name(step)
    _write_index(run, _index_from(run, [run / "checkpoints" / chosen]))
    for folder in checkpoint_folders(run):
        if folder.name > chosen:
            _remove(folder)


def tidy(run: Path, keep_every: int) -> None:
    """Remove what a killed start left: unfinished files, and checkpoints that the index does not name.

    Only for the holder of the run's lock, after `find_checkpoint_to_resume`. What was found to be damaged stays until
    the next checkpoint is saved.
    """
    written = ("run.json", "tokenizer.json", "log.csv", "log.cut.csv", "DONE.json", "STOPPED.json")
    leftovers = [path for name in written for path in run.glob(f".{name}.*.unfinished")]
    for path in [*leftovers, *(run / "checkpoints").glob(".*.unfinished")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    latest = read_index(run).get("latest")
    later = [folder for folder in checkpoint_folders(run) if latest and folder.name > latest]
    for folder in later:  # killed before the index named it, or a future that --from-step gave up
        if damage_of(folder) is None:
            _remove(folder)
    if latest and not later:
        _prune(run, keep_every)


def read_index(run: Path) -> dict[str, str | None]:
    """Return names of the checkpoint folders that are `latest`, `previous` and `best`; empty for a new run.

    Where the index is damaged or missing, it is made again from the checkpoints that are whole, with a warning.
    """
    path = run / "checkpoints" / "index.json"
    try:
        index = read_sealed(path, unsealed=set(NAMED))
        return {name: index[name] for name in NAMED}
    except Damaged as damaged:
        if not path.exists() and not checkpoint_folders(run):
            return {}
        whole = [folder for folder in checkpoint_folders(run) if damage_of(folder) is None]
        if not whole:
            raise UserError(f"{damaged}, and none of {run}'s checkpoints is whole: {_complaints(run)}. Restore the "
                            "folder from a copy, or start anew with another --out.") from None
        index = _index_from(run, whole)
        warnings.warn(f"{damaged}: made again from the checkpoints that are whole: "
                      f"{', '.join(f'{name} {index[name]}' for name in NAMED if index[name])}.", stacklevel=2)
        return index


def find_checkpoint(run: Path, which: str | int) -> Path:
    """Return the folder of a verified checkpoint, and of no other one.

    Args:
        run: the run folder.
        which: "latest", "best" or a step.

    Raises:
        UserError: there is none, it is damaged, or of a newer format.
    """
    name = _name(which) if isinstance(which, int) else read_index(run).get(which)
    folder = run / "checkpoints" / name if name else None
    if folder is None or not folder.is_dir():
        kept = sorted(p.name for p in checkpoint_folders(run))
        raise UserError(f"{run} has no {which if isinstance(which, str) else f'step-{which}'} checkpoint; "
                        f"found {', '.join(kept) or 'none'}." + " Kept are the latest two, the best, and multiples of "
                        "keep_every, if that is set." * isinstance(which, int))
    damage = damage_of(folder)
    if damage:
        others = [p.name for p in checkpoint_folders(run) if p != folder and damage_of(p) is None]
        if not others:
            remedy = "Restore the folder from a copy, or start anew with another --out"
        elif which == "best" and read_index(run).get("latest") in others:
            remedy = "The latest is: tools/evaluate.py --checkpoint latest scores it"
        elif which in ("latest", "best"):
            remedy = "Give the command that trained it again: it goes on from the one before"
        else:
            remedy = "Name one of these"
        raise UserError(f"{damage}. Whole checkpoints: {', '.join(others) or 'none'}. {remedy}.")
    return folder


def find_checkpoint_to_resume(run: Path) -> Path | None:
    """Return the latest whole checkpoint, and make the index say so; None for a run without any.

    Where the latest is damaged, the newest whole one before it is taken, with a warning that names what is damaged and
    the step that training goes on from.

    Raises:
        UserError: there are checkpoints, but none is whole, or one is of a newer format.
    """
    index = read_index(run)
    if not index:
        return None
    latest = run / "checkpoints" / index["latest"]
    damage = damage_of(latest) if latest.is_dir() else f"{latest} is missing"
    if damage is None:
        if _named_on_disk(run) != list(index.values()):  # it was made again
            _write_index(run, index)
        return latest
    # Later ones than the latest are what a killed --from-step has left of the future that it gave up.
    whole = [folder for folder in checkpoint_folders(run) if folder.name < latest.name and damage_of(folder) is None]
    if not whole:
        raise UserError(f"{run} has no whole checkpoint: {_complaints(run)}. Restore the folder from a copy, or start "
                        "anew with another --out.")
    _write_index(run, _index_from(run, whole))
    warnings.warn(f"{damage}: going on from the checkpoint of step {step_of(whole[0]):,} instead.", stacklevel=2)
    return whole[0]


def latest_whole_step(run: Path) -> int | None:
    """Return the step of the latest checkpoint, or None where it, or the index, is missing or damaged."""
    latest = (_named_on_disk(run) or [None])[0]
    folder = run / "checkpoints" / (latest or "none")
    return step_of(folder) if folder.is_dir() and damage_of(folder) is None else None


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step_"))


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


def _check_space(folder: Path, tensors: dict[str, dict[str, Tensor]]) -> None:
    needed = SLACK_BYTES + sum(t.nbytes for values in tensors.values() for t in values.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(None, f"the disk has {free / 1e6:,.0f} MB left, and it needs {needed / 1e6:,.0f} MB")


def _check_readable(path: Path, values: dict[str, Tensor]) -> None:
    with safe_open(path, "pt") as file:  # also compares the header's sizes with the file's
        if set(file.keys()) != set(values):
            raise OSError(None, f"{path.name} was not written whole")


def _name(step: int) -> str:
    return f"step_{step:08d}"


def checkpoint_folders(run: Path) -> list[Path]:
    """Return the folders of checkpoints, whole or not, the newest first."""
    return sorted((run / "checkpoints").glob("step_" + "[0-9]" * 8), reverse=True)


def _index_from(run: Path, whole: list[Path]) -> dict[str, str | None]:
    """What the index says where these checkpoints are the whole ones, the newest first."""
    state = json.loads((whole[0] / "state.json").read_text(encoding="utf-8"))
    best = run / "checkpoints" / _name(state.get("best_step", 0))
    return {"latest": whole[0].name, "previous": whole[1].name if len(whole) > 1 else None,
            "best": best.name if best.is_dir() else whole[0].name}  # as the loop takes it after going back


def _named_on_disk(run: Path) -> list[str | None]:
    try:
        index = read_sealed(run / "checkpoints" / "index.json", unsealed=set(NAMED))
        return [index[name] for name in NAMED]
    except Damaged:
        return []


def _write_index(run: Path, index: dict[str, str | None]) -> None:
    write_sealed(run / "checkpoints" / "index.json", {name: index.get(name) for name in NAMED})


def _complaints(run: Path) -> str:
    damages = [damage_of(folder) or f"{folder.name} is whole" for folder in checkpoint_folders(run)]
    return "; ".join(damages) or "there is none"


def _remove(folder: Path) -> None:
    """Remove a checkpoint; killed half-way, it leaves no folder with a checkpoint's name."""
    aside = unfinished(folder)
    os.replace(folder, aside)
    shutil.rmtree(aside)


def _prune(run: Path, keep_every: int) -> None:
    named = read_index(run).values()
    for folder in checkpoint_folders(run):
        if folder.name not in named and not (keep_every and step_of(folder) % keep_every == 0):
            try:
                _remove(folder)
            except OSError as error:  # the new checkpoint is safe: no reason to stop; the next save tries again
                warnings.warn(f"{folder} cannot be removed: {error.strerror}.", stacklevel=2)
