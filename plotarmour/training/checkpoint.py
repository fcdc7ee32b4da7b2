"""Checkpoints: all that a run needs to continue, published whole and verified before use. No pickle.

    checkpoints/step_00001200/   model.safetensors, optimizer.safetensors, state.json, MANIFEST.json

MANIFEST.json holds the SHA-256 of the other files and, at its end, that of its own content. So a flipped bit or a lost
byte of the manifest is noticed like one in the weights:

    {"format": 1, "step": 6, "files": {"model.safetensors": "...", ...}, "sha256": "..."}

`format` and the closing `sha256` stay in all later formats: they tell a newer checkpoint from a damaged one.

The folders say which checkpoint is which: `latest` is the highest step; `best` is `best_step` in its state.json. A save
writes a hidden folder, renames it, and only then removes the checkpoints that are no longer kept. What a killed process
leaves is removed at the next start (`tidy`).
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plotarmour.cli import UserError
from plotarmour.files import publish, sync_file, sync_folder, unfinished, write_json, write_text
from plotarmour.training import ending

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
ALWAYS_KEPT = 3  # the latest, the one before and the best
SLACK_BYTES = 2 << 20  # beside the tensors: headers, state.json, manifest, some rows of the log


def save_checkpoint(run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict,
                    keep_every: int) -> Path:
    """Write the checkpoint of a step, then remove those that are no longer kept.

    Args:
        run: the run folder.
        step: updates attempted so far.
        model, optimizer: at that step.
        state: values for JSON: counters, scaler and the like; `best_step` is the step of the lowest validation loss.
        keep_every: steps that are multiples of this stay; 0 for none.

    Returns:
        The folder of the checkpoint.

    Raises:
        UserError: the disk is full or a write fails. Earlier checkpoints are as they were.
    """
    folder = run / "checkpoints" / _name(step)
    tensors = {"model.safetensors": model_tensors(model), "optimizer.safetensors": _optimizer_tensors(model, optimizer)}
    try:
        _write(run, folder, tensors, state | {"step": step})
    except (OSError, SafetensorError) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{folder} cannot be written: {what}. Earlier checkpoints are intact: free some disk space, or "
                        "mend the disk or its permissions, and give the same command again.") from None
    _prune(folder, keep_every)
    return folder


def rewind(run: Path, step: int) -> None:
    """Go back to a kept step: remove the later checkpoints, the highest step first.

    A process killed on the way leaves the run at a step between, never at the end that was given up.
    """
    for folder in checkpoint_folders(run):
        if step_of(folder) > step:
            _remove(folder)
    sync_folder(run / "checkpoints")
    ending.forget_ending(run)


def tidy(run: Path, checkpoint: Path | None, keep_every: int) -> None:
    """Remove what a killed process left: unfinished files, and checkpoints that are no longer kept.

    Only for the holder of the run's lock, with the checkpoint that it continues from (None: a new run). Later ones,
    which are damaged, stay until the next save.
    """
    written = ("run.json", "tokenizer.json", "log.csv", "log.cut.csv", *ending.FILES)
    leftovers = [path for name in written for path in run.glob(f".{name}.*.unfinished")]
    for path in [*leftovers, *(run / "checkpoints").glob(".*.unfinished")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if checkpoint is not None and checkpoint == checkpoint_folders(run)[0]:
        _prune(checkpoint, keep_every)


def find_checkpoint(run: Path, which: str | int, files: Sequence[str] = FILES) -> Path:
    """Return the folder of one verified checkpoint; never that of another one instead.

    Args:
        run: the run folder.
        which: "latest", "best" or a step.
        files: to verify: those that will be loaded.

    Raises:
        UserError: there is none, it is damaged, or of a newer format.
    """
    folders, damage = checkpoint_folders(run), None
    folder = run / "checkpoints" / _name(which) if isinstance(which, int) else folders[0] if folders else None
    if which == "best" and folder is not None:
        damage = damage_of(folder, ["state.json"])
        folder = folder if damage else _best_of(folder)
    if folder is None or not folder.is_dir():
        raise UserError(f"{run} has no {which if isinstance(which, str) else f'step-{which}'} checkpoint; found "
                        f"{', '.join(sorted(path.name for path in folders)) or 'none'}." + " Kept are the latest two, "
                        "the best, and multiples of keep_every, if that is set." * isinstance(which, int))
    damage = damage or damage_of(folder, files)
    if damage is None:
        return folder
    whole = [path for path in folders if path != folder and damage_of(path, files) is None]
    if not whole:
        remedy = "Restore the folder from a copy, or start anew with another --out"
    elif which == "best" and folders[0] in whole:
        remedy = "The latest is: tools/evaluate.py --checkpoint latest scores it"
    elif which in ("latest", "best"):
        remedy = "Give the command that trained it again: it goes on from the one before"
    else:
        remedy = "Name one of these"
    raise UserError(f"{damage}. Whole checkpoints: {', '.join(path.name for path in whole) or 'none'}. {remedy}.")


def find_checkpoint_to_resume(run: Path) -> Path | None:
    """Return the latest whole checkpoint, with a warning of damaged later ones; None for a run without any.

    Raises:
        UserError: there are checkpoints, but none is whole, or one is of a newer format.
    """
    checkpoint, damages = _latest_whole(run)
    damage = "; ".join(damages)
    if damage and checkpoint is None:
        raise UserError(f"{run} has no whole checkpoint: {damage}. Restore the folder from a copy, or start anew with "
                        "another --out.")
    if damage:
        warnings.warn(f"{damage}: going on from the checkpoint of step {step_of(checkpoint):,} instead.", stacklevel=2)
    return checkpoint


def latest_whole_step(run: Path) -> int | None:
    """Return the step of the latest whole checkpoint; None for a run without any."""
    checkpoint, _ = _latest_whole(run)
    return step_of(checkpoint) if checkpoint else None


def checkpoint_folders(run: Path) -> list[Path]:
    """Return the folders of checkpoints, whole or not, the highest step first."""
    return sorted((run / "checkpoints").glob("step_" + "[0-9]" * 8), reverse=True)


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
    """Load weights and optimizer state; return the content of state.json."""
    load_model(folder, model)
    tensors = load_file(folder / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        values = {key.split("/", 1)[1]: value for key, value in tensors.items() if key.split("/", 1)[0] == name}
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in values.items()}
    return _state_of(folder)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters by name, tied ones once, contiguous."""
    return {name: p.detach().contiguous() for name, p in model.named_parameters()}


def write_manifest(folder: Path, step: int) -> None:
    """Write MANIFEST.json, with hashes of the bytes on disk: no second copy of the optimizer's state is needed."""
    hashes = {name: _sha256_of(folder / name) for name in FILES}
    write_text(folder / "MANIFEST.json", sealed_json({"format": FORMAT, "step": step, "files": hashes}))


def damage_of(folder: Path, files: Sequence[str] = FILES) -> str | None:
    """Describe what is wrong with a checkpoint; None if nothing is.

    Args:
        folder: of the checkpoint.
        files: to verify, beside the manifest.

    Raises:
        UserError: the manifest is whole, and of a newer format.
    """
    path = folder / "MANIFEST.json"
    try:
        text = path.read_bytes().decode("utf-8")
        manifest = json.loads(text)
        is_whole = sealed_json({key: value for key, value in manifest.items() if key != "sha256"}) == text
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} is damaged ({error.strerror})"
    except (ValueError, RecursionError, AttributeError):
        return f"{path} is damaged (not UTF-8, or not a JSON object)"
    if not is_whole:
        return f"{path} is damaged (its closing SHA-256 is not that of its content)"
    if manifest.get("format") != FORMAT:
        raise UserError(f"{folder} has checkpoint format {manifest.get('format')}; this program reads {FORMAT}. Go "
                        "on with the newer program that wrote it.")
    if _name(manifest["step"]) != folder.name or set(manifest["files"]) != set(FILES):
        return f"{path} is damaged (it is of step {manifest['step']:,} and names {', '.join(manifest['files'])})"
    for name in files:
        try:
            if _sha256_of(folder / name) != manifest["files"][name]:
                return f"{folder / name} is damaged (its SHA-256 is not the manifest's)"
        except FileNotFoundError:
            return f"{folder / name} is missing"
        except OSError as error:  # a bad block of the disk
            return f"{folder / name} is damaged ({error.strerror})"
    return None


def sealed_json(value: dict) -> str:
    """Return a JSON object that ends with the SHA-256 of its own content."""
    seal = hashlib.sha256(json.dumps(value, indent=2).encode()).hexdigest()
    return json.dumps(value | {"sha256": seal}, indent=2) + "\n"


def record_change(run: Path, step: int, why: str, holds: dict | None = None, **changed: list) -> None:
    """Append to the list `changes` in run.json.

    Args:
        run: the run folder.
        step: from which the change holds.
        why: such as "--extend" or "out of memory".
        holds: entries of run.json, such as the recipe, that hold from now on.
        changed: [before, after] by setting.
    """
    path = run / "run.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    utc = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    info.setdefault("changes", []).append({"utc": utc, "step": step, "why": why} | changed)
    write_json(path, info | (holds or {}))


def _write(run: Path, folder: Path, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
    """Write a checkpoint under a hidden name, then rename it, in place of an earlier one of that step."""
    temporary, replaced = unfinished(folder), unfinished(folder)
    try:
        _check_space(folder.parent, tensors)
        temporary.mkdir()
        for name, values in tensors.items():
            save_file(values, temporary / name)
            with safe_open(temporary / name, "pt") as file:  # also compares the header's sizes with the file's
                if set(file.keys()) != set(values):
                    raise OSError(None, f"{name} was not written whole")
        (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        for name in tensors:  # safetensors writes files that only their owner can read
            with suppress(OSError):
                shutil.copymode(temporary / "state.json", temporary / name)
        for name in FILES:
            sync_file(temporary / name)
        write_manifest(temporary, state["step"])  # syncs it, and the folder
        if (run / "log.csv").exists():
            sync_file(run / "log.csv")  # after a loss of power, its rows reach as far as the checkpoint
        if folder.exists():  # a damaged one, or one that is saved again with another state
            os.replace(folder, replaced)
        publish(temporary, folder)
    finally:
        if replaced.exists() and not folder.exists():
            with suppress(OSError):
                os.replace(replaced, folder)
        for path in (temporary, replaced):
            shutil.rmtree(path, ignore_errors=True)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {f"{name}/{key}": value.contiguous() for name, p in model.named_parameters()
            for key, value in optimizer.state.get(p, {}).items()}


def _check_space(folder: Path, tensors: dict[str, dict[str, Tensor]]) -> None:
    needed = SLACK_BYTES + sum(t.nbytes for values in tensors.values() for t in values.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(None, f"the disk has {free / 1e6:,.0f} MB left, and it needs {needed / 1e6:,.0f} MB")


def _latest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """Return the latest whole checkpoint, if there is one, and what is wrong with each later one."""
    damages = []
    for folder in checkpoint_folders(run):
        damage = damage_of(folder)
        if damage is None:
            return folder, damages
        damages.append(damage)
    return None, damages


def _best_of(latest: Path) -> Path:
    """Return the best checkpoint by the latest's state.json; the latest itself where the best is gone."""
    best = latest.with_name(_name(_state_of(latest)["best_step"]))
    return best if best.is_dir() else latest


def _prune(latest: Path, keep_every: int) -> None:
    """Remove all but the latest, the one before, the best, and multiples of `keep_every`; later ones are damaged."""
    folders = checkpoint_folders(latest.parents[1])
    before = folders[folders.index(latest) + 1:]
    kept = {latest, *before[:1], _best_of(latest), *(p for p in before if keep_every and not step_of(p) % keep_every)}
    for folder in folders:
        if folder not in kept:
            try:
                _remove(folder)
            except OSError as error:  # the new checkpoint is safe: training continues, and the next save tries again
                warnings.warn(f"{folder} cannot be removed: {error.strerror}.", stacklevel=2)


def _remove(folder: Path) -> None:
    """Remove a checkpoint; a process killed half-way leaves no folder with a checkpoint's name."""
    hidden = unfinished(folder)
    os.replace(folder, hidden)
    shutil.rmtree(hidden)


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _state_of(folder: Path) -> dict:
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
