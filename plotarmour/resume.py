"""Continuing a run: only the same run, from where it was, with every change recorded in run.json."""

from dataclasses import asdict
from pathlib import Path

from plotarmour.cli import UserError, require_run, warn
from plotarmour.config import restored, training_settings
from plotarmour.files import check_types, content_of, read_json
from plotarmour.training.checkpoint import find_checkpoint, find_latest_whole, latest_whole_step, rewind, step_of
from plotarmour.training.distributed import check_share
from plotarmour.training.ending import DONE, Ending
from plotarmour.training.log import last_step, record_change

RUN_FORMAT = 1
LOCK = ".lock"  # a folder in the run folder while a process trains it
EXTENDABLE = training_settings("extendable")
TEXT = {"file": str, "payload_sha256": str}
INFO = {  # what this program reads of run.json, beside the recipe
    "vocab_size": int, "tokenizer": {"kind": str, "sha256": str}, "train": TEXT | {"order_sha256": str}, "val": TEXT,
    "params": int, "core_params": int, "hardware": str, "device": str, "processes": int, "dtype": str, "versions": dict,
    "changes": list | None}


def read_info(folder: Path) -> dict:
    """Return the content of a run folder's run.json.

    Raises:
        UserError: it is not a run folder, is damaged, or is of a newer version.
    """
    path = folder / "run.json"
    require_run(folder)
    info = read_json(path)
    if (version := info.get("format")) != RUN_FORMAT:
        raise UserError(f"{folder} has run format {version!r:.60}; this program reads {RUN_FORMAT}. Continue with the "
                        "program that wrote it, or name another folder.")
    with content_of(path):
        check_types(info, INFO, "run.json")
        info["recipe"] = asdict(restored(info["recipe"]))  # with defaults of settings that are newer than the run
    return info


def check_folder(out: Path, info: dict, resume: str, from_step: int | None, extend: bool) -> Ending | None:
    """Check that a run can start or continue in a folder.

    Args:
        out: the run folder.
        info: run.json as it would be.
        resume: "auto", "never" or "must".
        from_step: to go back to.
        extend: whether the run may become longer.

    Returns:
        How the run ended where it is complete, with its last checkpoint; None where there are steps to take.

    Raises:
        UserError: it cannot; nothing has changed.
    """
    if resume not in ("auto", "never", "must"):
        raise UserError(f"--resume {resume!r} is unknown; expected auto, never or must.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; expected a new or empty folder, or a run's, for --out.")
    if link := next((path for path in out.rglob("*") if path.is_symlink()), None):
        raise UserError(f"{link} is a symbolic link; expected files and folders of the run's own, because a run writes "
                        f"only below {out}. Put what it names in its place, or use another --out.")
    check_share(info["recipe"]["training"]["rows_per_step"], info["processes"])
    if not (out / "run.json").exists():
        option = "--extend" if extend else f"--from-step {from_step}" if from_step is not None else "--resume must"
        if resume == "must" or from_step is not None or extend:
            raise UserError(f"{out} holds no run to continue; {option} expects one. Name another --out, or start a run "
                            f"without {option}.")
        # A start that is killed before it has written run.json leaves two names.
        if out.is_dir() and any(not path.name.startswith((LOCK, ".run.json.")) for path in out.iterdir()):
            raise UserError(f"{out} is not empty and not a run folder; expected a new or empty folder for --out.")
        return None
    if resume == "never":
        raise UserError(f"{out} holds a run already; expected a new folder. Use another --out, or --resume auto.")
    before, now = _identity(read_info(out)), _identity(info)
    differing = [key for key in now if before.get(key) != now[key] and not (extend and key in EXTENDABLE)]
    if differing:
        found = "; ".join(f"{key} was {before.get(key)}, now {now[key]}" for key in differing)
        if set(differing) - set(EXTENDABLE):
            raise UserError(f"{out} is a different run: {found}. Use another --out.")
        raise UserError(f"{out} was begun otherwise: {found}. Leave that as it was, or add --extend to make the run "
                        "longer, with a higher value; run.json records the change.")
    ending = Ending.read(out)
    if from_step is not None or ending is None or not ending.is_done:
        return None
    if all(before[key] == now[key] for key in EXTENDABLE):
        return ending if latest_whole_step(out) == ending.step else None
    key = DONE[ending.reason]
    is_unlimited = key != "max_steps" and now[key] == 0
    if not is_unlimited and now[key] <= before[key]:  # the run would end at once again
        raise UserError(f"{out} has ended at step {ending.step:,}: {ending.reason}, with {key} = {before[key]:g}. It "
                        f"continues only with a higher {key}{'' if key == 'max_steps' else ' (or 0, for no limit)'}; "
                        f"found {now[key]:g}. Set it higher, or go back to a kept step with --from-step.")
    return None


def differences(out: Path, info: dict) -> list[str]:
    """Return the names of the settings, texts and tokenizer that differ between a run folder and another's run.json."""
    before, now = _identity(read_info(out)), _identity(info)
    return [key for key in now if before.get(key) != now[key]]


def checkpoint_to_resume(out: Path, resume: str, from_step: int | None, max_steps: int) -> Path | None:
    """Return the checkpoint to continue from, after going back to `from_step`; None for a new run.

    Warns where steps are lost.

    Raises:
        UserError: there is none where there must be one, or it is beyond `max_steps`.
    """
    checkpoint = find_checkpoint(out, from_step) if from_step is not None else find_latest_whole(out)
    log = out / "log.csv"
    if checkpoint is None:
        if resume == "must":
            raise UserError(f"{out} has no checkpoint to continue from; expected one. Start it with --resume auto.")
        if reached := last_step(log):
            warn(f"{out} has no checkpoint left, although its log reaches step {reached:,}: starting from "
                 "step 0.")
        return None
    reached = step_of(checkpoint)
    if reached > max_steps:
        raise UserError(f"{out} is at step {reached:,}, beyond max_steps = {max_steps:,}; set max_steps to at least "
                        f"{reached}, or name an earlier, kept step with --from-step.")
    if from_step is not None:
        rewind(out, from_step)
        record_change(out, from_step, "--from-step", reached=[last_step(log), from_step])
    return checkpoint


def note_changes(out: Path, info: dict, step: int) -> None:
    """Record in run.json which settings, processes, hardware or versions are different from a step on."""
    before, now = ({**i["recipe"]["training"], **_circumstances(i)} for i in (read_info(out), info))
    changed = {key: [before.get(key), now[key]] for key in now if before.get(key) != now[key]}
    if not changed:
        return
    longer, elsewhere = set(changed) & set(EXTENDABLE), [key for key in _circumstances(info) if key in changed]
    if elsewhere:
        print("different from before, so that the same bits are not promised: "
              + "; ".join(f"{key} was {changed[key][0]}, now {changed[key][1]}" for key in elsewhere), flush=True)
    if longer - {"patience"}:
        print("the learning rate follows the new schedule from here on: it may rise again (--from-step goes back to a "
              "kept step before it fell)", flush=True)
    holds = {key: info[key] for key in ("recipe", "processes", "device", "hardware", "versions")}
    record_change(out, step, "--extend" if longer else "settings", holds, **changed)


def _identity(info: dict) -> dict[str, object]:
    """Return what must stay the same when a run continues, flat."""
    recipe = info["recipe"]
    flat = {"model": recipe["model"], "tokenizer": info["tokenizer"]["sha256"][:16],  # enough to tell them apart
            "training text": info["train"]["payload_sha256"][:16],
            "validation text": info["val"]["payload_sha256"][:16]}
    settings = {key: recipe["training"][key] for key in training_settings("identity")}
    return flat | recipe["architecture"] | settings | {"dtype": info["dtype"]}  # as computed, not "auto"


def _circumstances(info: dict) -> dict[str, object]:
    """Return the number of processes, the hardware and the versions of a run, flat."""
    return {"processes": info["processes"], "hardware": info["hardware"], **info["versions"]}
