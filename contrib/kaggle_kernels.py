"""Grids on Kaggle: packs rows into kernels with two T4 each, and brings their run folders back.

A kernel runs its rows by `run_plan`: by the grid's own runner, one row at a time on each GPU. The package and the token
files are a private dataset, named after their content; the checkpoints of interrupted rows are another one, which is
deleted with its kernel. A ledger in the results folder names every kernel from before it is pushed until it is deleted,
so that none goes on after this process without being known.
"""

import io
import json
import re
import shutil
import signal
import socket
import tempfile
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pandas as pd

from plotarmour.cli import UserError, duration, say, warn
from plotarmour.config import load_recipe
from plotarmour.data.token_file import TokenFile
from plotarmour.files import read_json, unfinished, write_json
from plotarmour.suite.grid import Grid, Row, share_machine
from plotarmour.suite.kaggle import install_missing
from plotarmour.suite.steps import copy_run, find_prepared
from plotarmour.training.checkpoint import latest_whole_step
from plotarmour.training.ending import Ending, Reason

AT_ONCE = 2  # GPU kernels of an account; Kaggle refuses a third
MOST_MINUTES, LEAST_MINUTES = 690.0, 15.0  # Kaggle ends a session after 12 hours
PATIENCE = 10  # unreadable answers in a row
FRUITLESS = 3  # kernels in a row that end without a step more of a row
OVER = ("COMPLETE", "ERROR", "CANCEL_ACKNOWLEDGED")
LATER = re.compile(r"session count|quota|too many|\b(408|412|429|5\d\d)\b", re.IGNORECASE)  # a refusal that passes
NO_LOGIN = ("Kaggle {}; expected those of kaggle auth login, or a token of https://www.kaggle.com/settings in "
            "KAGGLE_API_TOKEN. Log in, and give the same command.")
ERRORS = (OSError, ValueError, LookupError, AttributeError, TypeError)  # of the client, for answers it cannot read
RESUMED = (Reason.SIGINT, Reason.SIGTERM, Reason.TIME_BUDGET)
SCRIPT = """import json
import sys
from pathlib import Path

INPUTS = Path("/kaggle/input")
sys.path.insert(0, str(next(INPUTS.rglob("plotarmour/__init__.py")).parents[1]))
from contrib.kaggle_kernels import run_plan

run_plan(json.loads({plan!r}), INPUTS)
"""


def run_plan(plan: dict, inputs: Path) -> None:
    """Run the rows of a plan in a kernel, in its working folder; stop in time, so that Kaggle keeps what is saved."""
    import torch

    from plotarmour.suite.runner import run_grid

    out, scratch, rows = Path.cwd(), Path(tempfile.mkdtemp()), []
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(int(plan["seconds"]))
    links = [out / path.name for path in find_prepared(next(inputs.rglob("tokens.train.bin")).parent).values()]
    try:
        install_missing()
        for link in links:
            link.symlink_to(next(inputs.rglob(link.name)))
        for name, text in plan["files"].items():
            (scratch / name).write_text(text, encoding="utf-8")
        for run, parameters in plan["rows"].items():
            recipe, parameters = None, parameters | {"results": str(out)}
            if {"recipe", "model", "overrides"} <= set(parameters):
                if parameters["recipe"] in plan["files"]:
                    parameters["recipe"] = str(scratch / parameters["recipe"])
                recipe = load_recipe(parameters["recipe"], parameters["model"], parameters["overrides"].split(";"))
            earlier = [path.parent for path in inputs.rglob("run.json") if path.parent.name == run]
            if earlier:
                copy_run(earlier[0], out / run)
            executed = out / "notebooks" / f"{Path(plan['notebook']).stem}_{run}.ipynb"
            rows.append(Row(run, {}, parameters, out / run, executed, recipe))
        environments = share_machine(max(1, torch.cuda.device_count()), rows)
        run_grid(Grid(scratch / plan["notebook"], out, [], {}, rows, None, environments))
    except KeyboardInterrupt:
        print(f"stopped after {duration(plan['seconds'])}; another kernel continues")
    finally:
        signal.alarm(0)
        for link in links:
            link.unlink(missing_ok=True)


def _training_tokens(row: Row) -> int:
    """Return how many tokens a row trains on at most; 0 where it is unknown."""
    if row.recipe is None:
        return 0
    training = row.recipe.training
    return training.max_steps * training.rows_per_step * training.context_length


class Kaggle:
    """Pushes kernels with the waiting rows, the longest first, and collects what they leave."""

    look_s = 30.0
    later_s = 300.0  # after a refused push
    grace_s = 900.0  # that a kernel has after its minutes, before it is deleted

    def __init__(self, grid: Grid, minutes: float):
        """Log in, read the quota and the ledger.

        Args:
            grid: checked.
            minutes: after which a kernel stops its rows.
        """
        if not LEAST_MINUTES <= minutes <= MOST_MINUTES:
            raise UserError(f"--walltime {minutes:g} is out of range; expected {LEAST_MINUTES:g} to {MOST_MINUTES:g} "
                            "minutes: Kaggle ends a session after 12 hours.")
        if any(row.parameters.get("continue_from") for row in grid.rows):
            raise UserError("continue_from names a folder of this machine; expected a grid without it for --executor "
                            "kaggle. Copy the run folder into the results folder instead.")
        try:
            with redirect_stdout(io.StringIO()):  # on import it tells how to log in
                from kaggle.api.kaggle_api_extended import KaggleApi
        except ImportError:
            raise UserError("--executor kaggle needs the package kaggle. Install it: pip install "
                            "'plotarmour[kaggle]', or pip install kaggle six.") from None
        from tools import bundle_kaggle  # not where a kernel imports `run_plan`

        socket.setdefaulttimeout(120)  # the client has none
        self.grid, self.minutes, self.bundle, self.api = grid, minutes, bundle_kaggle, KaggleApi()
        self.folder, self.indexes = grid.out / "kaggle", {row.run: i for i, row in enumerate(grid.rows)}
        self.push_at, self.unreadable, self.fruitless, self.steps, self.running = 0.0, Counter(), Counter(), {}, set()
        try:
            with redirect_stdout(io.StringIO()):
                self.api.authenticate()
        except SystemExit:
            raise UserError(NO_LOGIN.format("needs credentials, and there are none, or they have expired")) from None
        self.owner = self.api.get_config_value(self.api.CONFIG_NAME_USER)
        self.kernels = read_json(self.folder / "ledger.json")  # by slug; those of a process that was killed go on
        self._minutes()

    def _ask(self, function: Callable, *arguments, **options) -> tuple[Any, str]:
        """Return an answer of Kaggle and what is wrong with it, in one line; no answer where it cannot be read."""
        try:
            with redirect_stdout(io.StringIO()):
                answer = function(*arguments, **options)
            return answer, " ".join((getattr(answer, "error", None) or "").split())[:200]
        except ERRORS as error:
            if getattr(getattr(error, "response", None), "status_code", 0) == 401:
                raise UserError(NO_LOGIN.format("refuses the credentials, which may have expired")) from None
            return None, " ".join(str(error).split())[:200] or type(error).__name__

    def start(self, waiting: list[int]) -> list[int]:
        known = {self.indexes.get(run) for kernel in self.kernels.values() for run in kernel["runs"]}
        started = [i for i in waiting if i in known]  # by a process that was killed
        rest = sorted(set(waiting) - set(started), key=lambda i: -_training_tokens(self.grid.rows[i]))
        while rest and (free := AT_ONCE - self._in_flight()) > 0 and time.monotonic() >= self.push_at:
            share = rest[::min(free, (len(rest) + 1) // 2)]  # rows for both GPUs of a kernel
            try:
                is_pushed = self._push([self.grid.rows[i] for i in share])
            except UserError as error:
                if not self._in_flight():
                    raise
                say(str(error))  # the kernels in flight go on
                is_pushed = False
            if is_pushed:
                started, rest = started + share, [i for i in rest if i not in share]
            else:
                self.push_at = time.monotonic() + self.later_s
        self.running |= set(started)
        return started

    def ended(self) -> Iterator[tuple[int, int | str]]:
        for slug, kernel in list(self.kernels.items()):
            reference, runs, why = f"{self.owner}/{slug}", kernel["runs"], ""
            answer, error = self._ask(self.api.kernels_status, reference)
            status = answer.status.name if answer else ""
            if status == "QUEUED":
                kernel["deadline"] = time.time() + kernel["seconds"] + self.grace_s
            scratch = unfinished(self.folder / slug)
            if status in OVER:
                answer, error = self._ask(self.api.kernels_output, reference, str(scratch))
                why = f"its kernel on Kaggle has ended: {status}; see {self.folder / slug}.log" if answer else ""
            self.unreadable[slug] = 0 if answer else self.unreadable[slug] + 1
            if self.unreadable[slug] == PATIENCE:
                why = f"Kaggle's answers about its kernel cannot be read: {error}"
            elif not why and time.time() > kernel["deadline"]:
                why = "its kernel on Kaggle went on after its time"
            if why:
                failed = self._collect(scratch, runs)
                self._delete(slug)
                ours = self.running & {self.indexes.get(run) for run in runs}
                self.running -= ours
                yield from ((i, self._outcome(self.grid.rows[i], failed, why)) for i in ours)
            shutil.rmtree(scratch, ignore_errors=True)

    def stop(self) -> None:
        for attempt in range(3):
            for slug in list(self.kernels):
                with suppress(UserError):  # expired credentials
                    self._delete(slug)
            if self.kernels and attempt < 2:
                time.sleep(min(10.0, self.look_s))
        for slug in self.kernels:
            warn(f"{slug} cannot be deleted and may go on; end it: kaggle kernels delete {self.owner}/{slug}")

    def _minutes(self) -> float:
        """Return how many minutes a new kernel may take by the week's GPU quota, beside those in flight."""
        answer, error = self._ask(self.api.quota_view)
        if answer is None or answer.gpu_quota is None:
            raise UserError(f"Kaggle does not tell the GPU quota ({error}); expected a verified account with GPUs. The "
                            "same command tries again.")
        left = (answer.gpu_quota.total_time_allowed - answer.gpu_quota.time_used).total_seconds()
        left = (left - sum(max(0.0, kernel["deadline"] - time.time()) for kernel in self.kernels.values())) / 60
        if left < LEAST_MINUTES and not self._in_flight():
            raise UserError(f"Kaggle's GPU quota is used up: {max(0.0, left):.0f} minutes are left until "
                            f"{answer.quota_refresh_time:%Y-%m-%d %H:%M} UTC; expected {LEAST_MINUTES:g} or more. The "
                            "same command continues then, or --executor local now.")
        return min(self.minutes, left)

    def _push(self, rows: list[Row]) -> bool:
        """Push a kernel with these rows; return whether Kaggle has taken it."""
        minutes = self._minutes()
        if minutes < LEAST_MINUTES:
            return False
        slug = f"plotarmour-{time.strftime('%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:4]}"
        runs = [row.run for row in rows]
        sources = [self._dataset(), *self._checkpoints(rows)]
        with tempfile.TemporaryDirectory() as scratch:
            kernel, script = Path(scratch) / slug, SCRIPT.format(plan=json.dumps(self._plan(rows, minutes * 60)))
            self.bundle.write_kernel(kernel, f"{self.owner}/{slug}", "run.py", script, self.bundle.ACCELERATORS["t4"],
                                     False, sources, [])
            self.kernels[slug] = {"runs": runs, "seconds": minutes * 60, "datasets": sources[1:],
                                  "deadline": time.time() + minutes * 60 + self.grace_s}
            self._save()
            timeout = str(int(minutes * 60 + self.grace_s))  # which Kaggle does not always enforce
            _, refusal = self._ask(self.api.kernels_push, str(kernel), timeout=timeout)
        if not refusal:
            say(f"pushed {self.owner}/{slug} with {', '.join(runs)}")
            return True
        self.kernels[slug]["datasets"] = []  # for the next attempt
        self._delete(slug)
        if not LATER.search(refusal):
            raise UserError(f"Kaggle refuses the kernel: {refusal}. The same command tries again.")
        say(f"Kaggle refuses a kernel now: {refusal}; trying again in {duration(self.later_s)}")
        return False

    def _plan(self, rows: list[Row], seconds: float) -> dict:
        """Return what `run_plan` needs: the rows, the texts of the notebook and of recipes that are files."""
        files = {self.grid.notebook.name: self.grid.notebook.read_text(encoding="utf-8")}
        parameters = {row.run: dict(row.parameters) for row in rows}
        for values in parameters.values():
            if (recipe := Path(str(values.get("recipe", "")))).suffix == ".toml":
                values["recipe"], files[recipe.name] = recipe.name, recipe.read_text(encoding="utf-8")
        return {"notebook": self.grid.notebook.name, "files": files, "rows": parameters, "seconds": seconds}

    def _dataset(self) -> str:
        """Return the dataset of the package and the token files, whose name is made of their content."""
        digest = 0
        for path in self.bundle.packed_files():
            digest = zlib.crc32(path.read_bytes(), digest)
        for path in find_prepared(self.grid.out).values():
            header = TokenFile.open(path).header["payload_sha256"] if path.suffix == ".bin" else ""
            digest = zlib.crc32(f"{path.name} {header}".encode(), digest)
        slug = f"plot-armour-{digest:08x}"
        return self._upload(slug, lambda folder: self.bundle.write_dataset(folder, self.owner, slug, self.grid.out))

    def _checkpoints(self, rows: list[Row]) -> list[str]:
        """Return the dataset of the run folders that have checkpoints, if there are any."""
        steps = {row.run: step for row in rows if (step := latest_whole_step(row.folder)) is not None}
        slug = f"plot-armour-runs-{zlib.crc32(f'{self.folder.resolve()} {steps}'.encode()):08x}"

        def write(folder: Path) -> None:
            for run in steps:
                shutil.make_archive(str(folder / run), "zip", self.grid.out, run)
            write_json(folder / self.bundle.DATASET, {"title": self.bundle.title_of(slug), "licenses": [{
                "name": "other"}], "id": f"{self.owner}/{slug}"})

        return [self._upload(slug, write)] if steps else []

    def _upload(self, slug: str, write: Callable[[Path], None]) -> str:
        """Make a dataset unless Kaggle has it, and wait until it is unpacked there; return its reference."""
        reference, until = f"{self.owner}/{slug}", time.monotonic() + 3600
        status, error = self._ask(self.api.dataset_status, reference)
        if status is None:
            say(f"uploading the dataset {reference}")
            with tempfile.TemporaryDirectory() as scratch:
                write(Path(scratch) / slug)
                _, error = self._ask(self.api.dataset_create_new, str(Path(scratch) / slug), quiet=True)
        while status != "ready":
            if error or status == "failed" or time.monotonic() > until:
                raise UserError(f"Kaggle has no dataset {reference}: {error or status}. The same command tries again.")
            time.sleep(min(10.0, self.look_s))
            status, _ = self._ask(self.api.dataset_status, reference)
        return reference

    def _collect(self, scratch: Path, runs: list[str]) -> set[str]:
        """Move what a kernel left to the results; return the runs that failed by themselves."""
        for row in (row for row in self.grid.rows if row.run in runs):
            folder, executed = scratch / row.run, scratch / "notebooks" / row.executed.name
            if folder.is_dir() and (latest_whole_step(folder) or 0) >= (latest_whole_step(row.folder) or 0):
                shutil.rmtree(row.folder, ignore_errors=True)
                shutil.move(folder, row.folder)
            if executed.exists():
                shutil.move(executed, row.executed)
        for log in scratch.glob("*.log"):
            shutil.move(log, self.folder / log.name)
        if not (scratch / "summary.csv").exists():
            return set()
        table = pd.read_csv(scratch / "summary.csv", dtype=str, keep_default_na=False)
        return set(table["run"][table["status"] == "failed"])

    def _outcome(self, row: Row, failed: set[str], why: str) -> int | str:
        """Return what `Executor.ended` gives: a text where the row is to go on in another kernel."""
        ending, run = Ending.read(row.folder), row.run
        if run in failed or (ending and ending.reason not in RESUMED):
            return int(run in failed)
        before, self.steps[run] = self.steps.get(run, ""), latest_whole_step(row.folder)
        self.fruitless[run] = self.fruitless[run] + 1 if before == self.steps[run] else 1
        if self.fruitless[run] < FRUITLESS:
            return why
        say(f"{run} has not come a step further in {FRUITLESS} kernels: {why}")
        return 1

    def _delete(self, slug: str) -> None:
        """Delete a kernel and the dataset of its checkpoints; where that fails, the ledger keeps it for later."""
        kernel, errors = self.kernels[slug], []
        for delete, *name in [(self.api.kernels_delete, f"{self.owner}/{slug}"), *(
                (self.api.dataset_delete, *reference.split("/")) for reference in kernel["datasets"])]:
            _, error = self._ask(delete, *name, no_confirm=True)
            errors += [error] if error and not re.search(r"\b40[34]\b", error) else []  # those are gone
        if errors:
            self.kernels[slug] = kernel | {"runs": [], "deadline": 0.0}
        else:
            del self.kernels[slug]
        self._save()

    def _in_flight(self) -> int:
        return sum(bool(kernel["runs"]) for kernel in self.kernels.values())

    def _save(self) -> None:
        write_json(self.folder / "ledger.json", self.kernels)
