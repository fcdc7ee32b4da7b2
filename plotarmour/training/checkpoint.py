"""Checkpoints: all that a run needs to continue, published whole and verified before use. No pickle.

    checkpoints/step_00001200/   model.safetensors, optimizer.safetensors, state.json, MANIFEST.json

MANIFEST.json holds the SHA-256 of the other files and, at its end, that of its own content. So a flipped bit or a lost
byte of the manifest is noticed like one in the weights:

    {"format": 1, "step": 6, "files": {"model.safetensors": "...", ...}, "sha256": "..."}

`format` and the closing `sha256` stay in all later formats: they tell a newer checkpoint from a damaged one.

The latest checkpoint is the one of the highest step, and its state.json names the step of the best one. Saving writes
a hidden folder, renames it, and only then removes the checkpoints that are no longer kept. The next start removes what
a killed process leaves behind (`tidy`).
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn

from plotarmour.cli import UserError, warn
from plotarmour.config import TrainingConfig
from plotarmour.files import (
    WRONG_CONTENT,
    check_types,
    content_of,
    publish,
    read_json,
    sha256_of,
    sync,
    unfinished,
    write_text,
)
from plotarmour.machine import free_disk
from plotarmour.training.ending import forget_ending

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@dataclass
class TrainState:
    """The numbers that a run needs to continue: a checkpoint's state.json."""

    step: int = 0  # attempted updates
    tokens_seen: int = 0
    elapsed_s: float = 0.0  # of training, over all sessions
    skipped_steps: int = 0  # without an update, because loss or gradients were not finite
    scaler_overflows: int = 0  # steps without an update, because float16 overflowed
    non_finite_in_a_row: int = 0  # skipped steps since the last update
    val_loss: float | None = None
    evaluated_step: int | None = None  # of val_loss
    best_val_loss: float = math.inf
    best_step: int = 0
    evaluations_without_improvement: int = 0
    train_loss: float | None = None  # of the last row of log.csv with one
    nats: float = 0.0  # summed over the finite steps since the last row
    n_targets: int = 0  # of these steps
    log_rows: int | None = None  # rows in log.csv
    micro_batch_setting: int | str | None = None  # the recipe's micro_batch_size
    micro_batch_rows: int | None = None  # what memory allowed
    took_s: dict = field(default_factory=lambda: {"evaluation": 0.0, "save": 0.0})  # the last one of each
    scaler: dict = field(default_factory=dict)  # of torch's GradScaler; empty without float16


STATE = {field.name: field.type for field in fields(TrainState)} | {"took_s": {"evaluation": float, "save": float}}


def save_checkpoint(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState,
                    keep_every: int) -> None:
    """Write the checkpoint of a step, then remove those that are no longer kept.

    Where the disk is full or a write fails, `UserError` is raised, and earlier checkpoints are unchanged.
    """
    folder = checkpoint_of(run, state.step)
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}  # tied ones once
    moments = {f"{name}/{key}": value.contiguous() for name, p in model.named_parameters()
               for key, value in optimizer.state.get(p, {}).items()}
    tensors = {"model.safetensors": weights, "optimizer.safetensors": moments}
    try:
        _write(folder, tensors, state)
    except (OSError, SafetensorError) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{folder} cannot be written: {what}. Earlier checkpoints are intact: free some disk space, or "
                        "mend the disk or its permissions, and give the same command again.") from None
    _prune(folder, keep_every)


def warn_of_low_disk(run: Path, model: nn.Module, step: int, config: TrainingConfig) -> None:
    """Warn where the disk has no room for all the checkpoints that the rest of a run will hold at once."""
    each = 3 * sum(p.nbytes for p in model.parameters()) + 2**21  # AdamW has two numbers per weight; 2 MiB for the rest
    kept = config.max_steps // config.keep_every - step // config.keep_every if config.keep_every else 0
    # The latest, the one before, the best, and one that is being written; some of them exist already.
    wanted = kept + 4 - min(3, len(checkpoint_folders(run)))
    free = free_disk(run)
    if free < wanted * each:
        warn(f"{run} will need up to {wanted * each / 1e6:,.0f} MB more for its checkpoints "
             f"({each / 1e6:,.0f} MB each), and the disk has {free / 1e6:,.0f} MB left: free some, or keep "
             "fewer checkpoints (keep_every). When the disk is full, training stops with what is saved.")


def rewind(run: Path, step: int) -> None:
    """Go back to a kept step: remove the later checkpoints, the highest step first.

    If the process is killed on the way, the run is at a step between, and its old end is gone.
    """
    for folder in checkpoint_folders(run):
        if step_of(folder) > step:
            _remove(folder)
    sync(run / "checkpoints")
    forget_ending(run)


def tidy(run: Path, checkpoint: Path | None, keep_every: int) -> None:
    """Remove what a killed process left: unfinished files, and checkpoints that are no longer kept.

    Only the holder of the run's lock may call this, with the checkpoint that it continues from (None: a new run).
    Later checkpoints, which are damaged, stay until the next save.
    """
    for path in [*run.glob(".*.unfinished"), *(run / "checkpoints").glob(".*.unfinished")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if checkpoint is not None and checkpoint == checkpoint_folders(run)[0]:
        _prune(checkpoint, keep_every)


def find_checkpoint(run: Path, which: str | int, files: Sequence[str] = FILES) -> Path:
    """Return the folder of one verified checkpoint; never another one instead.

    Args:
        run: the run folder.
        which: "latest", "best" or a step.
        files: the files to verify: those that will be loaded.

    Raises:
        UserError: it does not exist, is damaged, or has a newer format.
    """
    folders, files = checkpoint_folders(run), ["state.json", *files]
    folder = checkpoint_of(run, which) if isinstance(which, int) else folders[0] if folders else None
    if which == "best" and folder is not None and damage_of(folder, ["state.json"]) is None:
        folder = _best_of(folder)
    if folder is None or not folder.is_dir():
        raise UserError(f"{run} has no {which if isinstance(which, str) else f'step-{which}'} checkpoint; found "
                        f"{', '.join(sorted(path.name for path in folders)) or 'none'}. Kept are the latest two, the "
                        "best, and multiples of keep_every, if that is set.")
    damage = damage_of(folder, files)
    if damage is None:
        return folder
    whole = [path.name for path in folders if path != folder and damage_of(path, files) is None]
    raise UserError(f"{damage}. Whole checkpoints: {', '.join(whole) or 'none'}. Name a whole one (with --checkpoint "
                    "or --from-step), give the command that trained the run again, which continues from the latest "
                    "whole one, or restore the folder from a copy.")


def find_latest_whole(run: Path) -> Path | None:
    """Return the latest whole checkpoint, with a warning about later damaged ones; None for a run without any.

    Raises:
        UserError: there are checkpoints, but none is whole, or one has a newer format.
    """
    damages = []
    for folder in checkpoint_folders(run):
        damage = damage_of(folder)
        if damage is None:
            if damages:
                warn(f"{'; '.join(damages)}: continuing from the checkpoint of step {step_of(folder):,} "
                     "instead.")
            return folder
        damages.append(damage)
    if damages:
        raise UserError(f"{run} has no whole checkpoint: {'; '.join(damages)}. Restore the folder from a copy, or "
                        "start anew with another --out.")
    return None


def latest_whole_step(run: Path) -> int | None:
    """Return the step of the latest whole checkpoint; None for a run without any."""
    return next((step_of(folder) for folder in checkpoint_folders(run) if damage_of(folder) is None), None)


def checkpoint_folders(run: Path) -> list[Path]:
    """Return the folders of checkpoints, whole or not, the highest step first."""
    return sorted((run / "checkpoints").glob("step_" + "[0-9]" * 8), reverse=True)


def checkpoint_of(run: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step, whether it exists or not."""
    return run / "checkpoints" / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step_"))


def load_model(folder: Path, model: nn.Module) -> None:
    """Load the weights of a checkpoint into a model of the same shape."""
    tensors, parameters = _read_tensors(folder / "model.safetensors"), dict(model.named_parameters())
    if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in parameters.items()}:
        raise UserError(f"{folder} holds the weights of another model than its run.json describes.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def load_training(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Load weights and optimizer state; return the content of state.json."""
    load_model(folder, model)
    parameters, moments = dict(model.named_parameters()), _read_tensors(folder / "optimizer.safetensors")
    expected = {f"{name}/{entry}": () if entry == "step" else parameter.shape for name, parameter in parameters.items()
                for entries in (("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",))  # of AdamW, of Muon
                if f"{name}/{entries[0]}" in moments for entry in entries}  # none: it had no gradient
    if {key: value.shape for key, value in moments.items()} != expected:
        raise UserError(f"{folder} holds the optimizer's state of another model than its run.json describes.")
    for key, value in moments.items():
        name, entry = key.rsplit("/", 1)
        optimizer.state[parameters[name]][entry] = value.to(parameters[name].device, torch.float32)
    return _state_of(folder)


def write_manifest(folder: Path, step: int) -> None:
    """Write MANIFEST.json, with the hashes of the files on disk."""
    hashes = {name: sha256_of(folder / name) for name in FILES}
    write_text(folder / "MANIFEST.json", sealed_json({"format": FORMAT, "step": step, "files": hashes}))


def damage_of(folder: Path, files: Sequence[str] = FILES) -> str | None:
    """Describe what is wrong with a checkpoint's manifest or some of its files; None if nothing is.

    A whole manifest of a newer format raises `UserError`.
    """
    path = folder / "MANIFEST.json"
    try:
        text = path.read_bytes().decode("utf-8")
        manifest = json.loads(text)
        if sealed_json({key: value for key, value in manifest.items() if key != "sha256"}) != text:
            return f"{path} is damaged (its SHA-256 is not that of its content)"
        if manifest["format"] != FORMAT:
            raise UserError(f"{folder} has checkpoint format {manifest['format']!r:.60}; this program reads {FORMAT}. "
                            "Continue with the newer program that wrote it.")
        if manifest["step"] != step_of(folder):
            return f"{path} is damaged (it is of step {manifest['step']!r:.60})"
        for name in files:
            path = folder / name
            if sha256_of(path) != manifest["files"][name]:
                return f"{path} is damaged (its SHA-256 is not the manifest's)"
    except OSError as error:
        return f"{path} is damaged ({error.strerror})"
    except UserError:
        raise
    except WRONG_CONTENT:
        return f"{path} is damaged (it is not as this program writes it)"
    return None


def sealed_json(value: dict) -> str:
    """Return a JSON object that ends with the SHA-256 of its own content."""
    seal = hashlib.sha256(json.dumps(value, indent=2).encode()).hexdigest()
    return json.dumps(value | {"sha256": seal}, indent=2) + "\n"


def _write(folder: Path, tensors: dict[str, dict[str, Tensor]], state: TrainState) -> None:
    """Write a checkpoint under a hidden name, then rename it."""
    temporary = unfinished(folder)
    try:
        temporary.mkdir()
        for name, values in tensors.items():
            save_file(values, temporary / name)
        (temporary / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
        for name in FILES:
            with suppress(OSError):  # safetensors writes files that only their owner can read
                shutil.copymode(temporary / "state.json", temporary / name)
            sync(temporary / name)
        write_manifest(temporary, state.step)  # syncs the folder, too
        log = folder.parents[1] / "log.csv"
        if log.exists():
            sync(log)  # so that, after a loss of power, its rows reach as far as the checkpoint
        if folder.exists():  # damaged, or the same step with another state
            _remove(folder)
        publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; it is read as a whole where its mount has no shared mappings."""
    with suppress(OSError, SafetensorError):
        return load_file(path)
    with content_of(path, SafetensorError):
        return load(path.read_bytes())


def _best_of(latest: Path) -> Path:
    """Return the best checkpoint by the latest's state.json; the latest itself where the best is gone."""
    best = checkpoint_of(latest.parents[1], _state_of(latest).best_step)
    return best if best.is_dir() else latest


def _prune(latest: Path, keep_every: int) -> None:
    """Remove all but the latest, the one before, the best, and multiples of `keep_every`; later ones are damaged.

    The untrained weights of step 0 are kept only as the best: the seed gives them again.
    """
    folders = checkpoint_folders(latest.parents[1])
    before = [folder for folder in folders[folders.index(latest) + 1:] if step_of(folder)]
    kept = {latest, *before[:1], _best_of(latest), *(p for p in before if keep_every and not step_of(p) % keep_every)}
    for folder in folders:
        if folder not in kept:
            try:
                _remove(folder)
            except OSError as error:  # training continues, and the next save tries again
                warn(f"{folder} cannot be removed: {error.strerror}.")


def _remove(folder: Path) -> None:
    """Remove a checkpoint; a process killed on the way leaves no folder with a checkpoint's name."""
    hidden = unfinished(folder)
    os.replace(folder, hidden)
    shutil.rmtree(hidden)


def _state_of(folder: Path) -> TrainState:
    path = folder / "state.json"
    values = vars(TrainState()) | read_json(path) | {"step": step_of(folder)}
    with content_of(path):
        check_types(values, STATE, "state")
    return TrainState(**{name: values[name] for name in STATE})
