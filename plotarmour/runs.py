"""The run folder: the one place that knows all kinds of models, and puts a run together from its folder.

    run.json            resolved recipe, seed, versions, device, fingerprints, parameter counts, git commit
    tokenizer.json      the tokenizer, so that the folder is all one needs
    log.csv             see plotarmour.training.runlog
    checkpoints/        see plotarmour.training.checkpoint
    DONE.json or STOPPED.json
"""

import json
import warnings
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from plotarmour.config import DataConfig, Recipe, TrainingConfig
from plotarmour.errors import UserError
from plotarmour.files import write_json, write_text
from plotarmour.machine import Machine, find_machine, versions
from plotarmour.models.bdh import BDH, BDHConfig
from plotarmour.models.gpt2 import GPT2, GPT2Config
from plotarmour.text.batches import Windows
from plotarmour.text.memory import TokensInMemory
from plotarmour.text.overlap import disjoint_by_construction, overlapping_stories
from plotarmour.text.tokenfile import TokenFile, looks_like_token_file
from plotarmour.text.tokenizers import Tokenizer, make_tokenizer
from plotarmour.text.unfinished import locked
from plotarmour.text.unfinished import tidy as tidy_lock
from plotarmour.training.checkpoint import (
    find_checkpoint,
    find_checkpoint_to_resume,
    latest_whole_step,
    load_model,
    rewind,
    step_of,
    tidy,
)
from plotarmour.training.loop import train
from plotarmour.training.runlog import last_step

RUN_FORMAT = 1
LOCK = ".lock"  # a folder in the run folder while a process trains it
# Settings that change where or how long a run computes, not what it computes.
NOT_IDENTITY = ("device", "max_minutes", "keep_every")


@dataclass(frozen=True)
class Run:
    """A trained run: `load_run(folder)` gives one.

    Attributes:
        folder: of the run.
        model: in evaluation mode, on `machine.device`.
        tokenizer: that the model was trained with.
        config: the resolved recipe.
        info: run.json.
        step: of the loaded checkpoint.
        machine: where the model is.
    """

    folder: Path
    model: nn.Module
    tokenizer: Tokenizer
    config: Recipe
    info: dict
    step: int
    machine: Machine

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def context_length(self) -> int:
        return self.config.training.context_length


def model_config(recipe: Recipe, vocab_size: int) -> BDHConfig | GPT2Config:
    """Return the shape of a recipe's model.

    Raises:
        UserError: an impossible shape.
    """
    try:
        if recipe.model == "bdh":
            return BDHConfig(vocab_size=vocab_size, **recipe.architecture)
        return GPT2Config(vocab_size=vocab_size, context_length=recipe.training.context_length, **recipe.architecture)
    except (ValueError, TypeError) as error:
        raise UserError(f"recipe {recipe.name} ({recipe.model}): {error}.") from None


def build_model(recipe: Recipe, vocab_size: int) -> nn.Module:
    """Build the untrained model of a recipe; its weights follow from the recipe's seed alone."""
    config = model_config(recipe, vocab_size)
    torch.manual_seed(recipe.training.seed)
    return BDH(config) if recipe.model == "bdh" else GPT2(config)


def open_data(path: Path, tokenizer: str | None = None, stories: str = "endoftext") -> TokenFile | TokensInMemory:
    """Open a token file, or, slowly and with a warning, a text.

    Args:
        path: of either.
        tokenizer: for a text: "gpt2", "bytes", a folder, or another token file's path.

    Raises:
        UserError: neither, or a text without a tokenizer.
    """
    is_text = path.is_file() and not looks_like_token_file(path)
    if is_text and not tokenizer:
        raise UserError(f"{path} is not a token file; make one with tools/pre_tokenize.py, or name a --tokenizer to "
                        "train on the text as it is, slowly.")
    if tokenizer and not is_text:
        warnings.warn(f"--tokenizer {tokenizer} is ignored: {path} brings its own.", stacklevel=2)
    if is_text:
        made = (TokenFile.open(tokenizer).tokenizer() if tokenizer.endswith(".bin") else make_tokenizer(tokenizer))
        return TokensInMemory(path, made, stories)
    return TokenFile.open(path)


def train_run(recipe: Recipe, train_path: Path, val_path: Path, out: Path, resume: str = "auto",
              from_step: int | None = None, tokenizer: str | None = None) -> dict:
    """Start a run, or go on with one that stopped.

    Args:
        recipe: resolved.
        train_path, val_path: token files of one tokenizer (or texts, with `tokenizer`).
        out: the run folder.
        resume: "auto" (go on if there is a checkpoint), "never" (refuse an existing run) or "must".
        from_step: go back to a kept checkpoint of this step.
        tokenizer: only for texts instead of token files.

    Returns:
        The content of DONE.json or STOPPED.json.

    Raises:
        UserError: data that do not fit each other or the recipe, validation stories that stand in the training text,
            a run folder of another run or one that another process trains, or a disk that does not take a checkpoint.
    """
    train_data, val_data = (open_data(path, tokenizer, recipe.data.stories) for path in (train_path, val_path))
    made = train_data.tokenizer()
    check_same_tokenizer(val_data, made.sha256, str(train_path))
    if val_data.header["payload_sha256"] == train_data.header["payload_sha256"]:
        raise UserError(f"{val_path} is the training text itself; expected held-out stories, such as the val part of "
                        "tools/pre_tokenize.py --split.")
    _check_held_out(train_data, val_data)
    t = recipe.training
    windows = Windows(train_data, t.context_length, t.windows, t.seed, t.rows_per_step)
    val_windows = Windows(val_data, t.context_length, t.windows, t.seed, t.rows_per_step)
    machine = find_machine(t.device, t.dtype)
    model = build_model(recipe, made.vocab_size)
    info = {
        "format": RUN_FORMAT, "started": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "recipe": recipe.to_dict(),
        "versions": versions(), "hardware": machine.hardware, "device": machine.device.type,
        "dtype": str(machine.dtype).removeprefix("torch."), "dtype_reason": machine.reason,
        "params": sum(p.numel() for p in model.parameters()),
        "params_non_embedding": model.config.non_embedding_params,
        "vocab_size": made.vocab_size, "tokenizer": {"kind": made.kind, "sha256": made.sha256},
        "train": _fingerprint(train_path, train_data), "val": _fingerprint(val_path, val_data),
    }
    _check_folder(out, info, resume, from_step)  # before anything is written into it
    if from_step is None and _is_done(out):
        with suppress(OSError):  # a folder that may be read only
            tidy_lock(out / LOCK, out)  # of a start that was killed right after its last word
        return _done(out)
    with locked(out / LOCK, out):
        checkpoint = _checkpoint_to_resume(out, resume, from_step)
        if from_step is None and _is_done(out):  # by now: its index was damaged
            return _done(out)
        if from_step is not None:
            rewind(out, from_step)
        tidy(out, t.keep_every)
        if checkpoint is None:
            write_json(out / "run.json", info)
            write_text(out / "tokenizer.json", made.json)
        else:
            print(f"continuing {out} from {checkpoint.name}")
        return train(out, model.to(machine.device), windows, val_windows, made.token_bytes, t, machine, checkpoint)


def load_run(folder: str | Path, which: str | int = "best", device: str = "auto") -> Run:
    """Load a run with nothing but its folder at hand.

    Args:
        folder: of the run.
        which: the checkpoint: "best" by validation loss, "latest", or a step.
        device: "auto", "cpu" or "cuda".

    Raises:
        UserError: no run folder, one of a newer version, or a damaged checkpoint.
    """
    folder = Path(folder)
    info = read_info(folder)
    stored = info["recipe"]
    recipe = Recipe(stored["name"], stored["model"], DataConfig(**stored["data"]),
                    TrainingConfig(**stored["training"]), stored["architecture"])
    tokenizer_text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = Tokenizer(tokenizer_text, info["tokenizer"]["kind"])
    if tokenizer.sha256 != info["tokenizer"]["sha256"]:
        raise UserError(f"{folder / 'tokenizer.json'} is not the tokenizer that run.json names; restore it.")
    checkpoint = find_checkpoint(folder, which)
    if device == "auto" and recipe.training.device == "cpu":
        device = "cpu"  # as it was trained: there may be a GPU that this torch has no kernels for
    machine = find_machine(device)
    if machine.device.type == "cuda":  # a CPU scores any run in float32
        machine = find_machine(device, recipe.training.dtype)
    model = build_model(recipe, info["vocab_size"])
    load_model(checkpoint, model)
    step = step_of(checkpoint)
    if not (folder / "DONE.json").exists():
        warnings.warn(f"{folder} is not finished: this is its checkpoint of step {step:,}. Go on with the command that "
                      "started it.", stacklevel=2)
    return Run(folder, model.to(machine.device).eval(), tokenizer, recipe, info, step, machine)


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
        raise UserError(f"{folder} has run format {found}; this program reads {RUN_FORMAT}.")
    needed = {"format", "recipe", "tokenizer", "vocab_size", "train", "val", "dtype"}
    if not isinstance(info, dict) or not needed <= set(info):
        raise UserError(f"{folder} is not a run of this program: its run.json says nothing of "
                        f"{', '.join(sorted(needed - set(info)))}. Name another folder.")
    return info


def check_same_tokenizer(data: TokenFile | TokensInMemory, sha256: str, owner: str) -> None:
    """Raise `UserError` unless the tokens were made with the tokenizer of this hash."""
    found = data.header["tokenizer"]
    if found["sha256"] != sha256:
        raise UserError(f"{data.path} was made with another tokenizer ({found['kind']}, {found['sha256'][:12]}) than "
                        f"{owner} ({sha256[:12]}); make it again with --tokenizer {owner}.")


def _check_held_out(train_data: TokenFile | TokensInMemory, val_data: TokenFile | TokensInMemory) -> None:
    """Raise `UserError` where a story stands in both: every choice rests on the validation loss."""
    if disjoint_by_construction(train_data.header, val_data.header):
        return
    found = overlapping_stories(train_data, val_data)
    if found.n_stories:
        raise UserError(f"{found.n_stories:,} of {val_data.n_stories:,} stories of {val_data.path} also stand in "
                        f"{train_data.path} (first: story {found.first:,}, there story {found.first_in_other:,}); "
                        "expected none. Make the validation file again with --exclude TRAIN_TEXT, or both files from "
                        "one text with --split.")


def _fingerprint(path: Path, data: TokenFile | TokensInMemory) -> dict:
    return {"file": path.name, "n_tokens": data.n_tokens, "n_stories": data.n_stories,
            "payload_sha256": data.header["payload_sha256"]}


def _identity(info: dict) -> dict[str, object]:
    """What must not change when a run goes on, flat."""
    recipe = info["recipe"]
    flat = {"model": recipe["model"], "tokenizer": info["tokenizer"]["sha256"],
            "train tokens": info["train"]["payload_sha256"], "val tokens": info["val"]["payload_sha256"]}
    settings = {k: v for k, v in recipe["training"].items() if k not in NOT_IDENTITY}
    return flat | recipe["architecture"] | settings | {"dtype": info["dtype"]}  # as computed, not "auto"


def _check_folder(out: Path, info: dict, resume: str, from_step: int | None) -> None:
    """Raise `UserError` unless a run can start or go on in this folder."""
    if resume not in ("auto", "never", "must"):
        raise UserError(f"--resume {resume!r} is unknown; expected auto, never or must.")
    if not (out / "run.json").exists():
        if resume == "must" or from_step is not None:
            raise UserError(f"{out} holds no run to go on with; expected a run folder. Start it with --resume auto.")
        if out.is_dir() and any(not _is_ours(path) for path in out.iterdir()):
            raise UserError(f"{out} is not empty and not a run folder; expected a new or empty folder for --out.")
        return
    if resume == "never":
        raise UserError(f"{out} holds a run already; expected a new folder. Use another --out, or --resume auto.")
    before, now = _identity(read_info(out)), _identity(info)
    differing = [f"{key} was {before.get(key)}, now {now.get(key)}" for key in now if before.get(key) != now.get(key)]
    if differing:
        raise UserError(f"{out} is a different run: {'; '.join(differing)}. Use another --out.")


def _is_ours(path: Path) -> bool:
    """Whether a start that was killed before there was a run.json left this."""
    return path.name == LOCK or (path.name.startswith(".run.json.") and path.name.endswith(".unfinished"))


def _checkpoint_to_resume(out: Path, resume: str, from_step: int | None) -> Path | None:
    if from_step is not None:
        return find_checkpoint(out, from_step)
    checkpoint = find_checkpoint_to_resume(out)
    if checkpoint is None and resume == "must":
        raise UserError(f"{out} has no checkpoint to go on with; expected one. Start it with --resume auto.")
    reached = last_step(out / "log.csv")
    if checkpoint is None and reached:
        warnings.warn(f"{out} has no checkpoint left, although its log reaches step {reached:,}: starting from step 0.",
                      stacklevel=3)
    return checkpoint


def _is_done(out: Path) -> bool:
    """Whether DONE.json stands beside the whole checkpoint that it speaks of."""
    try:
        step = json.loads((out / "DONE.json").read_text(encoding="utf-8"))["step"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # a damaged one is written again
        return False
    return latest_whole_step(out) == step


def _done(out: Path) -> dict:
    print(f"{out} is done already: nothing to do.")
    return json.loads((out / "DONE.json").read_text(encoding="utf-8"))
