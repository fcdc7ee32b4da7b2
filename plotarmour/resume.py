"""Going on with a run: only the same run, from where it was, with every change noted."""

import dataclasses
import json
import warnings
from pathlib import Path

from plotarmour.cli import UserError
from plotarmour.config import TrainingConfig, training_settings
from plotarmour.training.checkpoint import (
    find_checkpoint,
    find_checkpoint_to_resume,
    latest_whole_step,
    record_change,
    rewind,
    step_of,
)
from plotarmour.training.distributed import check_share
from plotarmour.training.ending import DONE, Ending
from plotarmour.training.log import last_step

RUN_FORMAT = 1
LOCK = ".lock"  # a folder in the run folder while a process trains it
EXTENDABLE = training_settings("extendable")


def read_info(folder: Path) -> dict:
    """Return run.json of a run folder.

    Raises:
        UserError: not a run folder, or one of a newer version.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no run.json. Make one with tools/train.py.")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no UTF-8 or no JSON
        raise UserError(f"{path} is damaged: {error}. Restore it from a copy, or start anew with another "
                        "--out.") from None
    found = info.get("format") if isinstance(info, dict) else None
    if found is not None and found != RUN_FORMAT:
        raise UserError(f"{folder} has run format {found}; this program reads {RUN_FORMAT}. Go on with the newer "
                        "program that wrote it.")
    needed = {"format", "recipe", "tokenizer", "vocab_size", "train", "val", "dtype"}
    if not isinstance(info, dict) or not needed <= set(info):
        raise UserError(f"{folder} is not a run of this program: its run.json says nothing of "
                        f"{', '.join(sorted(needed - set(info)))}. Name another folder.")
    try:
        _identity(info)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error} is not as this program writes it. Restore it from a copy, or "
                        "start anew with another --out.") from None
    return info


def check_folder(out: Path, info: dict, resume: str, from_step: int | None, extend: bool) -> None:
    """Raise `UserError` unless a run can start or go on in this folder.

    Args:
        out: the run folder.
        info: run.json as it would be.
        resume: "auto", "never" or "must".
        from_step: to go back to.
        extend: whether the run may become longer.
    """
    if resume not in ("auto", "never", "must"):
        raise UserError(f"--resume {resume!r} is unknown; expected auto, never or must.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; expected a new or empty folder, or a run's, for --out.")
    check_share(_identity(info)["rows_per_step"], info.get("processes", 1))
    if not (out / "run.json").exists():
        asked = "--extend" if extend else f"--from-step {from_step}" if from_step is not None else "--resume must"
        if resume == "must" or from_step is not None or extend:
            raise UserError(f"{out} holds no run to go on with; {asked} expects one. Name another --out, or start a "
                            f"run without {asked}.")
        if out.is_dir() and any(not _is_ours(path) for path in out.iterdir()):
            raise UserError(f"{out} is not empty and not a run folder; expected a new or empty folder for --out.")
        return
    if resume == "never":
        raise UserError(f"{out} holds a run already; expected a new folder. Use another --out, or --resume auto.")
    before, now = _identity(read_info(out)), _identity(info)
    differing = [key for key in differences(out, info) if not (extend and key in EXTENDABLE)]
    if differing:
        told = "; ".join(f"{key} was {before.get(key)}, now {now[key]}" for key in differing)
        other = set(differing) - set(EXTENDABLE)
        remedy = "Use another --out." if other else (
            "Leave that as it was, or add --extend to go on longer, with a higher one; run.json notes the change.")
        raise UserError(f"{out} is a different run: {told}. {remedy}" if other else
                        f"{out} was begun otherwise: {told}. {remedy}")
    if from_step is None:
        _check_goes_on(out, before, now)


def differences(out: Path, info: dict) -> list[str]:
    """Return the names of what makes a run folder another run than one with this run.json.

    Args:
        out: a run folder.
        info: run.json as it would be.
    """
    before, now = _identity(read_info(out)), _identity(info)
    return [key for key in now if before.get(key) != now[key]]


def checkpoint_to_resume(out: Path, resume: str, from_step: int | None, max_steps: int) -> Path | None:
    """Return the checkpoint to go on from; None for a new run. Warns where steps are lost.

    Raises:
        UserError: there is none where there must be one, or it lies beyond `max_steps`.
    """
    checkpoint = find_checkpoint(out, from_step) if from_step is not None else find_checkpoint_to_resume(out)
    if checkpoint is not None and step_of(checkpoint) > max_steps:  # before the change is noted, or anything given up
        reached = step_of(checkpoint)
        remedy = "name an earlier step" if from_step is not None else "go back to a kept step with --from-step"
        raise UserError(f"{out} is at step {reached:,}, beyond max_steps = {max_steps:,}; set max_steps to at least "
                        f"{reached}, or {remedy}.")
    if from_step is not None:
        return checkpoint
    if checkpoint is None and resume == "must":
        raise UserError(f"{out} has no checkpoint to go on with; expected one. Start it with --resume auto.")
    reached = last_step(out / "log.csv")
    if checkpoint is None and reached:
        warnings.warn(f"{out} has no checkpoint left, although its log reaches step {reached:,}: starting from step 0.",
                      stacklevel=3)
    return checkpoint


def go_back(out: Path, step: int) -> None:
    """Go back to a kept step, and note it."""
    rewind(out, step)
    record_change(out, step, "--from-step", reached=[last_step(out / "log.csv"), step])


def note_changes(out: Path, info: dict, step: int) -> None:
    """Note in run.json how a run is longer, cut into other pieces, or on another machine or program, from a step on."""
    before, now = ({**_training(i), **_place(i)} for i in (read_info(out), info))
    changed = {key: [before.get(key), now[key]] for key in now
               if before.get(key) != now[key] and (key in EXTENDABLE or key not in training_settings("identity"))}
    if not changed:
        return
    longer, elsewhere = set(changed) & set(EXTENDABLE), [key for key in _place(info) if key in changed]
    if elsewhere:
        print("other than before, so that the same bits are not promised: "
              + "; ".join(f"{key} was {changed[key][0]}, now {changed[key][1]}" for key in elsewhere), flush=True)
    if longer - {"patience"}:
        print("the learning rate follows the new schedule from here on: it may go up again (--from-step goes back to a "
              "kept step before it fell)", flush=True)
    holds = {key: info[key] for key in ("recipe", "processes", "device", "hardware", "versions") if key in info}
    record_change(out, step, "--extend" if longer else "settings", holds, **changed)


def _check_goes_on(out: Path, before: dict, now: dict) -> None:
    """Raise `UserError` where a run has ended and what was changed would let it end right there again."""
    if all(before[key] == now[key] for key in EXTENDABLE):
        return
    ending = Ending.read(out)
    if ending is None or not ending.is_done:
        return
    key = DONE[ending.reason]
    endless = key != "max_steps" and now[key] == 0
    if not endless and now[key] <= before[key]:
        raise UserError(f"{out} has ended at step {ending.step:,}: {ending.reason}, with {key} = {before[key]:g}. It "
                        f"continues only with a higher {key}{'' if key == 'max_steps' else ' (or 0, for no limit)'}; "
                        f"found {now[key]:g}. Set it higher, or go back to a kept step with --from-step.")


def is_done(out: Path, config: TrainingConfig) -> bool:
    """Whether a run is complete: it has the checkpoint that DONE.json names, and nobody asks for more steps."""
    ending = Ending.read(out)
    if ending is None or not ending.is_done:
        return False
    trained = _training(read_info(out))
    if any(trained[key] != getattr(config, key) for key in EXTENDABLE):
        return False
    return latest_whole_step(out) == ending.step


def _training(info: dict) -> dict:
    """The training settings of a run.json; those it does not know yet have their defaults."""
    known = {field.name for field in dataclasses.fields(TrainingConfig)}
    return dataclasses.asdict(TrainingConfig(**{k: v for k, v in info["recipe"]["training"].items() if k in known}))


def _place(info: dict) -> dict[str, object]:
    """Where and by what a run.json's run is computed, flat."""
    return {"processes": info.get("processes", 1), "hardware": info.get("hardware"), **(info.get("versions") or {})}


def _identity(info: dict) -> dict[str, object]:
    """What must not change when a run goes on, flat."""
    recipe, training = info["recipe"], _training(info)
    flat = {"model": recipe["model"], "tokenizer": info["tokenizer"]["sha256"][:16],  # enough to tell them apart
            "training text": info["train"]["payload_sha256"][:16],
            "validation text": info["val"]["payload_sha256"][:16]}
    settings = {key: training[key] for key in training_settings("identity")}
    return flat | recipe["architecture"] | settings | {"dtype": info["dtype"]}  # as computed, not "auto"


def _is_ours(path: Path) -> bool:
    """Whether a start that was killed before there was a run.json left this."""
    return path.name == LOCK or (path.name.startswith(".run.json.") and path.name.endswith(".unfinished"))
