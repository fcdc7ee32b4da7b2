"""The run folder: start a run, continue it, load it.

    run.json            resolved recipe, seed, versions, device, fingerprints, parameter counts, git commit
    tokenizer.json      the tokenizer, so that the folder is all one needs
    log.csv             see plotarmour.training.log
    checkpoints/        see plotarmour.training.checkpoint
    DONE.json or STOPPED.json
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from plotarmour.cli import AnyPath, UserError, as_path, say, warn
from plotarmour.config import AUTO, Recipe, restored
from plotarmour.data.batches import Windows
from plotarmour.data.duplicates import overlapping_stories
from plotarmour.data.pretokenize import pre_tokenize
from plotarmour.data.stories import SEPARATORS
from plotarmour.data.token_file import TokenFile, Tokens, looks_like_token_file
from plotarmour.data.tokenizer import LEARNED, Tokenizer
from plotarmour.evaluation.generation import NewToken, generate, stream
from plotarmour.files import locked, write_json, write_text
from plotarmour.machine import Machine, find_machine, memory_bytes, versions
from plotarmour.memory import RESERVE, largest_micro_batch
from plotarmour.resume import LOCK, RUN_FORMAT, check_folder, checkpoint_to_resume, note_changes, read_info
from plotarmour.training.checkpoint import find_checkpoint, load_model, step_of, tidy
from plotarmour.training.distributed import joined
from plotarmour.training.ending import Ending, is_complete
from plotarmour.training.log import read_log, utc_now
from plotarmour.training.loop import Session
from plotarmour.training.step import within_memory

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Run:
    """A trained run: `load_run(folder)` gives one."""

    folder: Path
    model: nn.Module  # in evaluation mode, on `machine.device`
    tokenizer: Tokenizer  # of the training text
    config: Recipe  # resolved
    info: dict  # the content of run.json
    step: int  # of the loaded checkpoint
    machine: Machine  # device and dtype of the model

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def context_length(self) -> int:
        return self.config.training.context_length

    @property
    def log(self) -> "pd.DataFrame":
        """The rows of log.csv; see `plotarmour.training.log.read_log`."""
        return read_log(self.folder / "log.csv")

    def __repr__(self) -> str:
        return (f"Run({self.folder}: {self.config.model} with {self.info['params']:,} parameters, step {self.step:,} "
                f"of {self.config.training.max_steps:,}, on {self.machine.device})")

    def generate(self, prompt: str = "Once upon a time", other: "Run | None" = None, share: float = 0.5,
                 **options) -> str:
        """Continue a prompt, alone or blended with another run; print why, if nothing follows it.

        Args:
            prompt: how the story begins.
            other: run of the same tokenizer whose probabilities are blended with those of this one.
            share: of this run in the blend, 0 to 1.
            options: see `plotarmour.evaluation.generation.stream`, such as `max_new_tokens`, `top_p` and `seed`.

        Returns:
            The prompt and what follows it.

        Raises:
            UserError: a prompt that is not text, options out of range, or different tokenizers.
        """
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError(f"the prompt {prompt!r} holds bytes that are not UTF-8; expected text. Type it again, in a "
                            "terminal whose encoding is UTF-8.") from None
        ids = self.tokenizer.encode(prompt)
        with self.machine.autocast:  # one context for all tokens, so that autocast casts the weights once
            new = [token.id for token in self.stream(ids, other, share, **options)]
        if not new:
            say("nothing follows the prompt, because the first token that the model chose is end-of-text: it takes "
                f"the prompt for a whole story. In its training text a story is made by {self.config.data.stories}. "
                "Use another seed, or a prompt with which such a story begins.")
        return self.tokenizer.decode([*ids, *new])

    def stream(self, prompt: list[int], other: "Run | None" = None, share: float = 0.5, **options
               ) -> Iterator[NewToken]:
        """Continue a prompt of ids, one token after the other; see `generate`, and `generation.stream` for the options.

        Raises:
            UserError: different tokenizers, or options out of range.
        """
        models, shares = [self.model], [1.0]
        if other is not None:
            check_one_tokenizer(self, other)
            models, shares = [self.model, other.model], [share, 1 - share]
        return stream(models, shares, prompt, self.tokenizer.end_of_text_id, self.machine, **options)


def check_one_tokenizer(a: Run, b: Run) -> None:
    """Raise `UserError` unless two runs have one tokenizer, without which their probabilities cannot be blended."""
    if a.tokenizer.sha256 != b.tokenizer.sha256:
        raise UserError(f"{a.name} and {b.name} have different tokenizers; expected one for both. Use runs that were "
                        "trained on the same token files.")


def open_data(path: Path, tokenizer: str | None, stories: str) -> TokenFile:
    """Open a token file, or make one of a text, which is removed when this process ends.

    Args:
        path: of the token file or text.
        tokenizer: for a text: "gpt2", "bytes", a folder, or another token file's path; None for a token file.
        stories: what makes a story of a text.

    Raises:
        UserError: it is neither, or a text without a tokenizer.
    """
    if path.is_file() and not looks_like_token_file(path):
        if not tokenizer or tokenizer.startswith(LEARNED):  # each text would learn one of its own
            raise UserError(f"{path} is not a token file; make one with tools/pre_tokenize.py, or name a --tokenizer "
                            "that exists, to train on the text as it is, tokenized at every start.")
        warn(f"{path} is not a token file: it is tokenized at every start. Make a token file once with: "
             f"python tools/pre_tokenize.py {path} --tokenizer {tokenizer} --out {path.stem}.bin")
        folder = Path(tempfile.mkdtemp(prefix="plotarmour_"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        [path] = pre_tokenize([path], tokenizer, folder / f"{path.name}.bin", stories=stories)
    elif tokenizer:
        warn(f"--tokenizer {tokenizer} is ignored: {path} brings its own.")
    return TokenFile.open(path)


def train_run(recipe: Recipe, train_path: AnyPath, val_path: AnyPath, out: AnyPath, resume: str = "auto",
              from_step: int | None = None, tokenizer: str | None = None, extend: bool = False,
              on_row: Callable[[], None] | None = None) -> Ending:
    """Start a run, or continue one that stopped.

    Args:
        recipe: the resolved recipe.
        train_path, val_path: token files of one tokenizer (or texts, with `tokenizer`).
        out: the run folder.
        resume: "auto" (continue if there is a checkpoint), "never" (refuse an existing run) or "must".
        from_step: go back to a kept checkpoint of this step.
        tokenizer: only for texts instead of token files.
        extend: whether `max_steps`, `schedule_minutes` and `patience` may differ from those the run began with.
        on_row: called after every row of log.csv.

    Returns:
        How the run ended, as DONE.json or STOPPED.json holds it.

    Raises:
        UserError: data that do not fit each other or the recipe, validation stories that are also training stories, a
            run folder of another run or one that another process trains, too little memory, or a disk that cannot hold
            a checkpoint.
        LostProcess: under torchrun, in all processes but the first: another one has died.
    """
    train_path, val_path, out = as_path(train_path), as_path(val_path), as_path(out)
    train_data, val_data = (open_data(path, tokenizer, recipe.data.stories) for path in (train_path, val_path))
    shared_tokenizer = train_data.tokenizer()
    check_same_tokenizer(val_data, shared_tokenizer.sha256, str(train_path))
    if val_data.header["payload_sha256"] == train_data.header["payload_sha256"]:
        raise UserError(f"{val_path} is the training text itself; expected held-out stories, such as the val part of "
                        "tools/pre_tokenize.py --split.")
    # The token files were made with settings of their own; ids of other programs have stories, but no rule for them.
    stories = train_data.header.get("stories")
    made_with = {"stories": stories if stories in SEPARATORS else recipe.data.stories,
                 "split": train_data.header.get("split") or ""}
    recipe = replace(recipe, data=replace(recipe.data, tokenizer=shared_tokenizer.kind, **made_with))
    t = recipe.training
    machine = find_machine(t.device, t.dtype)

    def build() -> nn.Module:
        return within_memory("the model", lambda: recipe.build_model(shared_tokenizer.vocab_size))

    # Before `joined`: importing transformers, as building a model may do, keeps alive a process group that exists by
    # then, and with it the connections of a process that has failed, so that the others would not notice.
    model = build() if os.environ.get("WORLD_SIZE", "1") != "1" else None
    with joined(machine.device.type) as ranks, ExitStack() as lock:
        info = {
            "format": RUN_FORMAT, "started": utc_now(), "recipe": asdict(recipe), "versions": versions(),
            "hardware": machine.hardware,
            "device": machine.device.type, "processes": ranks.size,
            "dtype": str(machine.dtype).removeprefix("torch."), "dtype_reason": machine.reason,
            "vocab_size": shared_tokenizer.vocab_size,
            "tokenizer": {"kind": shared_tokenizer.kind, "sha256": shared_tokenizer.sha256},
            "train": _fingerprint(train_path, train_data), "val": _fingerprint(val_path, val_data),
        }
        # Before the work that only training needs.
        ending = ranks.first(lambda: check_folder(out, info, resume, from_step, extend))
        if ending is not None:
            if ranks.is_first:
                if (out / LOCK).exists():  # of a process that was killed after it had written DONE.json
                    with suppress(OSError, UserError), locked(out / LOCK, out):
                        pass
                print(f"{out} is done already: nothing to do.")
            return ending
        windows, val_windows = (Windows(data, t.context_length, t.windows, t.seed, t.rows_per_step)
                                for data in (train_data, val_data))
        model = model or build()
        if t.mask_stories:
            if not hasattr(model, "story_start"):
                raise UserError(f"the model {recipe.model} cannot keep a token from seeing other stories; expected "
                                "mask_stories=false, or another model.")
            model.story_start = train_data.header["end_of_text_id"]
        if t.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
            raise UserError(f"optimizer=muon needs torch 2.9 or newer; found {torch.__version__}. Set optimizer=adamw, "
                            "or install a newer torch.")
        info |= {"params": sum(p.numel() for p in model.parameters()),
                 "core_params": model.config.core_params}
        info["train"] |= {"order_sha256": windows.order_sha256(), "padding_share": round(windows.cut.padding_share, 4)}

        def claim() -> tuple[Path | None, int]:
            """Lock the run folder and write into it; return the checkpoint, and the rows per micro-batch."""
            _check_held_out(train_data, val_data)
            lock.enter_context(locked(out / LOCK, out))
            checkpoint = checkpoint_to_resume(out, resume, from_step, t.max_steps)
            tidy(out, checkpoint, t.keep_every)
            if checkpoint is None:
                write_json(out / "run.json", info)
            else:
                print(f"continuing {out} from {checkpoint.name}", flush=True)
                note_changes(out, info, step_of(checkpoint))
            write_text(out / "tokenizer.json", shared_tokenizer.json)  # again, because it may have been damaged
            return checkpoint, _first_rows(recipe, shared_tokenizer.vocab_size, machine, ranks.size)

        prompt, n_new = val_data.story(0)[:4].tolist(), min(40, t.context_length - 5)

        def sample() -> str:
            """Continue the beginning of the validation text, in one line."""
            new = generate(model, prompt, shared_tokenizer.end_of_text_id, machine, n_new, top_p=0.95)
            return "".join(c if c.isprintable() else " " for c in shared_tokenizer.decode([*prompt, *new]))

        checkpoint, first_rows = ranks.first(claim)
        # A step is split where it does not fit; the weights and the optimizer's state cannot be.
        return within_memory("training", lambda: Session(
            out, model.to(machine.device), windows, val_windows, shared_tokenizer.token_bytes, t, machine, checkpoint,
            ranks, first_rows, on_row, sample if n_new > 0 else None).train())


def load_run(folder: AnyPath, checkpoint: str | int = "best", device: str = "auto") -> Run:
    """Load a run from its folder, which is all that is needed.

    Args:
        folder: the run folder.
        checkpoint: "best" by validation loss, "latest", or a step.
        device: "auto", "cpu" or "cuda".

    Raises:
        UserError: no run folder, one of a newer version, a damaged checkpoint, or too little memory.
    """
    folder = as_path(folder)
    info = read_info(folder)
    recipe = restored(info["recipe"])
    tokenizer_text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = Tokenizer(tokenizer_text, info["tokenizer"]["kind"])
    if tokenizer.sha256 != info["tokenizer"]["sha256"]:
        raise UserError(f"{folder / 'tokenizer.json'} is not the tokenizer that run.json names; restore it.")
    if tokenizer.vocab_size != info["vocab_size"]:
        raise UserError(f"{folder / 'tokenizer.json'} has {tokenizer.vocab_size:,} entries; run.json expects "
                        f"{info['vocab_size']:,}. Restore both from a copy.")
    checkpoint_folder = find_checkpoint(folder, checkpoint, files=["model.safetensors"])
    if device == "auto" and recipe.training.device == "cpu":
        device = "cpu"  # as in training: this torch may have no kernels for the GPU
    machine = find_machine(device)
    if machine.device.type == "cuda":  # a CPU scores any run in float32
        machine = find_machine(device, recipe.training.dtype)

    weights, expected = checkpoint_folder / "model.safetensors", recipe.model_config(info["vocab_size"]).params
    if weights.stat().st_size < 4 * expected:  # before memory is taken for a model that run.json describes wrongly
        raise UserError(f"{weights} holds fewer than the {expected:,} weights that run.json describes; restore the run "
                        "from a copy.")

    def load() -> nn.Module:
        model = recipe.build_model(info["vocab_size"])
        load_model(checkpoint_folder, model)
        return model.to(machine.device).eval()

    model = within_memory("the model", load)
    step = step_of(checkpoint_folder)
    if not is_complete(folder):
        warn(f"{folder} is not finished: this is its checkpoint of step {step:,}. Continue it with the "
             "command that started it.")
    return Run(folder, model, tokenizer, recipe, info, step, machine)


def check_same_tokenizer(data: Tokens, sha256: str, owner: str) -> None:
    """Raise `UserError` unless the tokens are of the tokenizer with this hash; `owner` names what has that one."""
    found = data.header["tokenizer"]
    if found["sha256"] != sha256:
        raise UserError(f"{data.path} was made with another tokenizer ({found['kind']}, {found['sha256'][:12]}) than "
                        f"{owner} ({sha256[:12]}); make it again with --tokenizer {owner}.")


def _check_held_out(train_data: Tokens, val_data: Tokens) -> None:
    """Raise `UserError` where a story is in both files: every choice rests on the validation loss."""
    overlap = overlapping_stories(train_data, val_data)
    if len(overlap):
        raise UserError(f"{len(overlap):,} of {val_data.n_stories:,} stories of {val_data.path} are also in "
                        f"{train_data.path} (first: story {overlap[0, 0]:,}, there story {overlap[0, 1]:,}); "
                        "expected none. Make the validation file again with --exclude TRAIN_TEXT, or both files from "
                        "one text with --split.")


def _fingerprint(path: Path, data: Tokens) -> dict:
    """Return what run.json holds of a token file."""
    return {"file": path.name, "n_tokens": data.n_tokens, "n_stories": data.n_stories,
            "payload_sha256": data.header["payload_sha256"]}


def _first_rows(recipe: Recipe, vocab_size: int, machine: Machine, processes: int) -> int:
    """Return the rows per micro-batch to begin with: the recipe's, or for "auto" those that should fit."""
    if recipe.training.micro_batch_size != AUTO:
        return recipe.training.micro_batch_size
    sharing = processes if machine.device.type == "cpu" else 1  # each GPU has memory of its own
    budget = memory_bytes(machine.device) // sharing - RESERVE
    return largest_micro_batch(recipe, vocab_size, machine.dtype, machine.device.type, budget) or 1
