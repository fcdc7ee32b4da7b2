"""The training loop: one step is one attempted optimizer update over `rows_per_step` rows.

Everything random in a step follows from (seed, step): which rows it reads, and the dropout of each micro-batch. So a
run that stops and resumes needs no replay and ends with the same bits (float32 on a CPU).
"""

import math
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn

from plotarmour.cli import duration, progress, say
from plotarmour.config import TrainingConfig
from plotarmour.data.batches import Windows
from plotarmour.evaluation.metrics import totals
from plotarmour.machine import Machine, peak_memory, peak_memory_mib
from plotarmour.training.checkpoint import load_training, record_change, save_checkpoint
from plotarmour.training.distributed import ALONE, LostProcess, Ranks
from plotarmour.training.ending import Ending, Reason, forget_ending
from plotarmour.training.log import RunLog
from plotarmour.training.out_of_memory import is_out_of_memory, release, too_large, warn_of_low_disk
from plotarmour.training.progress import TIMED_STEPS, Pace, unused_hardware
from plotarmour.training.schedule import learning_rate
from plotarmour.training.step import EVALUATION_ROWS, Update, Updates, evaluate_windows
from plotarmour.training.stopping import StopRequest, session_minutes

NON_FINITE_IN_A_ROW = 10


def train(run: Path, model: nn.Module, windows: Windows, val_windows: Windows, token_bytes: np.ndarray | None,
          config: TrainingConfig, machine: Machine, resume_from: Path | None = None, ranks: Ranks = ALONE,
          begin_with: int | None = None, on_row: Callable[[], None] | None = None) -> Ending:
    """Train until the schedule ends, early stopping fires, or something stops the run.

    Args:
        run: folder for log.csv, checkpoints, DONE.json or STOPPED.json.
        model: on the machine's device, float32.
        windows: of the training tokens.
        val_windows: of the validation tokens; the first `eval_tokens` of them, in order, are evaluated.
        token_bytes: int32 (vocab_size,), bytes that each id stands for; None where that is not exact.
        config: the training part of a recipe.
        machine: device and dtype.
        resume_from: a checkpoint folder to go on from.
        ranks: which of several processes this is; the first one alone writes the run folder.
        begin_with: rows per micro-batch of a new run, if fewer than the recipe's.
        on_row: called after every row of log.csv, such as to draw it.

    Returns:
        How the run ended, as DONE.json or STOPPED.json holds it.

    Raises:
        UserError: rows that cannot be shared out, a step that does not fit into memory even one row at a time, a disk
            that does not take a checkpoint.
        LostProcess: another process of this run has died, and this one is not the first.
    """
    session = _Session(run, model, windows, val_windows, token_bytes, config, machine, resume_from, ranks, begin_with,
                       on_row)
    with StopRequest() as stop:
        try:
            return session.end(session.train(stop))
        except LostProcess:
            ending = session.end(Reason.LOST_PROCESS)
            # Printed here, while SIGTERM only sets a flag: torchrun sends it as soon as it sees the dead process, and
            # after this block it would end the process without a word.
            print("another process of this run has died; the same command continues from the latest checkpoint",
                  file=sys.stderr, flush=True)
            if not ranks.is_first:
                raise
            return ending
        finally:
            session.updates.close()


class _Session:
    """One process's stretch of a run: from its start or a checkpoint to where it ends or stops."""

    def __init__(self, run: Path, model: nn.Module, windows: Windows, val_windows: Windows,
                 token_bytes: np.ndarray | None,
                 config: TrainingConfig, machine: Machine, resume_from: Path | None, ranks: Ranks,
                 begin_with: int | None, on_row: Callable[[], None] | None):
        self.run, self.model, self.windows, self.val_windows = run, model, windows, val_windows
        self.token_bytes, self.config, self.machine, self.ranks = token_bytes, config, machine, ranks
        self.on_row = on_row
        self.updates = Updates(model, windows, config, machine, ranks)
        self.state = {"tokens_seen": 0, "elapsed_s": 0.0, "skipped_steps": 0, "scaler_overflows": 0,
                      "best_val_loss": math.inf, "best_step": 0, "evaluations_without_improvement": 0,
                      "val_loss": None, "train_loss": None, "since_row": [0.0, 0], "non_finite_in_a_row": 0}
        self.step, self.saved, self.is_new = 0, None, resume_from is None
        if resume_from is not None:
            self._load(resume_from)
        self.minutes, self.has_forecast = session_minutes(config.max_minutes), False
        self.pace = Pace(config, self.minutes, self.state["elapsed_s"], self.state.pop("evaluation_s", 0.0),
                         self.state.pop("save_s", 0.0))
        self.val_rows, self.evaluation_rows = val_windows.first_rows(config.eval_tokens), EVALUATION_ROWS
        if machine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(machine.device)
        if ranks.is_first:
            forget_ending(run)
            warn_of_low_disk(run, model, self.step, config)
            self.log = RunLog(run / "log.csv", -1 if self.is_new else self.step, self.state.pop("log_rows", None))
        asked, used = self.state.pop("split", (None, None))
        # A split that memory has forced holds as long as the recipe asks for the same: the bits depend on it.
        self.updates.begin(self.step, used if asked == config.micro_batch_size else
                           begin_with or config.micro_batch_rows)

    def train(self, stop: StopRequest) -> Reason:
        """Take steps until there is a reason not to; return it."""
        with progress(self.config.max_steps, "steps", self.run.name, self.step, is_timed=False,
                      is_shown=self.ranks.is_first) as self.bar:
            if self.is_new:
                self.write_row(None, None, self.evaluate())
                self.save()
            elif self.state["best_val_loss"] == math.inf:  # went back to a step not evaluated, the best is gone
                self.evaluate()
            self.model.train()
            reason = self._reached_end()  # killed after the last checkpoint, before DONE.json
            if reason and self.state["evaluated_step"] != self.step:
                self.write_row(None, None, self.evaluate())  # this was not known to be the last step
                self.save()
            if reason is None and self._out_of_patience():
                reason = Reason.EARLY_STOPPING
            while reason is None:
                rate, update = self.take_step()
                end = self._reached_end()
                evaluated = self.evaluate() if end or self.step % self.config.eval_interval == 0 else {}
                if evaluated or self.step % self.config.log_interval == 0:
                    self.write_row(rate, update.norm, evaluated)
                best = bool(evaluated) and self.state["best_step"] == self.step
                reason = self._reason_to_stop(end, bool(evaluated), stop.asked)
                due = reason or self.step % self.config.checkpoint_interval == 0
                if best or (due and reason != Reason.NON_FINITE):
                    self.save()
                if reason is None:
                    self._print_forecast()
        return reason

    def take_step(self) -> tuple[float, Update]:
        """Attempt one update; return its learning rate and what came of it."""
        begun, size = time.perf_counter(), self.updates.micro_batch_size
        rate = learning_rate(self.step, self.config, self._schedule_s())
        update = self.updates.take(self.step, rate)
        if self.updates.micro_batch_size < size:
            self._note_split(size, self.updates.micro_batch_size)
        self.step += 1
        state = self.state
        state["tokens_seen"] += update.n_tokens
        if math.isfinite(update.loss):
            nats, count = state["since_row"]
            state["since_row"] = [nats + update.loss * update.n_tokens, count + update.n_tokens]
        state["scaler_overflows"] += update.overflowed
        state["skipped_steps"] += update.skipped
        state["non_finite_in_a_row"] = state["non_finite_in_a_row"] + 1 if update.skipped else 0
        self.pace.count(update.n_tokens, time.perf_counter() - begun)
        left = f", {duration(self.pace.session_left_s(self.step))} left" if self.pace.steps else ""
        self.bar.set_postfix_str(f"loss {update.loss:.3f}, {self.pace.rate():,.0f} tokens/s{left}", refresh=False)
        self.bar.update()
        return rate, update

    def evaluate(self) -> dict:
        """Score the validation windows; return the columns of the log that say so."""
        state = self.state
        with self.pace.timing("evaluation_s"):
            share = self._evaluate_share()
            failed, nats, n_tokens, n_bytes = self.ranks.sum(share is None, *(share or (0, 0, 0)))
        if failed:  # said by all processes, so that the first one says it
            raise too_large("evaluation")
        result = totals(nats, n_tokens, n_bytes)
        state["val_loss"], state["evaluated_step"] = result["loss"], self.step
        loss = state["val_loss"]
        if loss < state["best_val_loss"]:
            state.update(best_val_loss=loss, best_step=self.step, evaluations_without_improvement=0)
        else:
            state["evaluations_without_improvement"] += 1
        return {f"val_{name}": value for name, value in result.items()}

    def write_row(self, rate: float | None, norm: float | None, measured: dict) -> None:
        """Log what was measured since the row before."""
        state = self.state
        nats, count = state["since_row"]
        if count:
            state["train_loss"] = nats / count
        state["since_row"] = [0.0, 0]
        if not self.ranks.is_first:
            return
        self.log.append(
            utc=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), step=self.step, learning_rate=rate, grad_norm=norm,
            epoch=self.windows.epoch_of(self.step), tokens_seen=state["tokens_seen"], elapsed_s=self.pace.elapsed_s,
            train_loss=state["train_loss"] if count else None, tokens_per_s=self.pace.rate(),
            peak_memory_mib=peak_memory_mib(self.machine.device), skipped_steps=state["skipped_steps"],
            scaler_overflows=state["scaler_overflows"], **measured)
        if self.on_row is not None:
            self.on_row()

    def save(self) -> None:
        """Publish a checkpoint of the step reached."""
        if self.ranks.is_first:
            scaler = self.updates.scaler
            extra = {"scaler": scaler.state_dict()} if scaler.is_enabled() else {}
            extra |= {"elapsed_s": self.pace.elapsed_s} | self.pace.took
            extra["log_rows"] = self.log.n_rows
            extra["split"] = [self.config.micro_batch_size, self.updates.micro_batch_size]
            with self.pace.timing("save_s"):
                save_checkpoint(self.run, self.step, self.model, self.updates.optimizer, self.state | extra,
                                self.config.keep_every)
        self.saved = self.step

    def end(self, reason: Reason) -> Ending:
        """Write DONE.json or STOPPED.json, and return its content."""
        state = self.state
        ending = Ending(
            reason, self.step, state["tokens_seen"], round(self.pace.elapsed_s, 2), state["train_loss"],
            state["val_loss"], state["best_step"], state["best_val_loss"], state["skipped_steps"],
            state["scaler_overflows"], peak_memory_mib(self.machine.device), self.saved or 0,
            self.updates.micro_batch_size, round(self.updates.waited_s, 2))
        if self.ranks.is_first:
            ending.write(self.run)
        return ending

    def _load(self, checkpoint: Path) -> None:
        self.state = load_training(checkpoint, self.model, self.updates.optimizer)
        self.step = self.saved = self.state.pop("step")
        if not (self.run / "checkpoints" / f"step_{self.state['best_step']:08d}").is_dir():  # after going back
            known = self.state["evaluated_step"] == self.step
            self.state.update(best_step=self.step, best_val_loss=self.state["val_loss"] if known else math.inf)
        if self.updates.scaler.is_enabled():
            self.updates.scaler.load_state_dict(self.state["scaler"])

    def _evaluate_share(self) -> tuple[float, int, int] | None:
        """Score this process's share of the validation rows, in smaller batches where memory runs out; None: no use."""
        rows = self.val_rows[self.ranks.rank::self.ranks.size]  # whatever size memory leaves to a process
        while self.evaluation_rows:
            batches = [rows[i:i + self.evaluation_rows] for i in range(0, len(rows), self.evaluation_rows)]
            try:
                return evaluate_windows(self.model, self.val_windows, batches, self.token_bytes, self.machine)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self.evaluation_rows //= 2
            release()
        return None

    def _reached_end(self) -> Reason | None:
        """Why the schedule has ended, if it has."""
        if self.step >= self.config.max_steps:
            return Reason.MAX_STEPS
        minutes = self.config.schedule_minutes
        return Reason.SCHEDULE_MINUTES if minutes and self._schedule_s() >= 60 * minutes else None

    def _reason_to_stop(self, end: Reason | None, evaluated: bool, signal_name: str | None) -> Reason | None:
        limit = 60 * self.minutes - self._ahead_s()
        over = bool(self.minutes) and self.ranks.is_first and self.pace.session_s > limit
        asked, over = self.ranks.sum(signal_name is not None, over)
        if self.state["non_finite_in_a_row"] >= NON_FINITE_IN_A_ROW:
            return Reason.NON_FINITE
        if evaluated:  # the time that it took may have been the last
            end = end or self._reached_end()
        if end:
            return end
        if evaluated and self._out_of_patience():
            return Reason.EARLY_STOPPING
        if asked:
            return Reason(f"signal {signal_name or 'to another process'}")
        return Reason.TIME_BUDGET if over else None

    def _out_of_patience(self) -> bool:
        patience = self.config.patience
        return bool(patience) and self.state["evaluations_without_improvement"] >= patience

    def _schedule_s(self) -> float:
        """Seconds by which the schedule goes: what has passed and what must still fit before it ends.

        By the first process's clock, so that all decide alike.
        """
        if not self.config.schedule_minutes:
            return 0.0
        return self.ranks.sum(self.pace.elapsed_s + self._ahead_s() if self.ranks.is_first else 0.0)[0]

    def _ahead_s(self) -> float:
        """Seconds from one decision to go on until the next one is carried out: save, step, evaluation, save."""
        return self.pace.step_s + self.pace.took["evaluation_s"] + 2 * self.pace.took["save_s"]

    def _note_split(self, before: int, now: int) -> None:
        self.pace.forget()
        if self.ranks.is_first:
            share = self.updates.share
            record_change(self.run, self.step, "out of memory", micro_batch_size=[before, now])
            say(f"{self.run.name}: out of memory at step {self.step + 1}: {share // now} micro-batches of {now} rows "
                f"instead of {share // before} of {before}")

    def _print_forecast(self) -> None:
        """Print once, after some timed steps, when the run will end and what it uses of the machine."""
        if self.has_forecast or self.pace.steps < TIMED_STEPS or not self.ranks.is_first:
            return
        self.has_forecast, device = True, self.machine.device
        waited = self.updates.waited_s / max(self.pace.session_s, 1e-9)
        can_grow = self.updates.micro_batch_size < self.updates.share
        parts = [self.pace.forecast(self.step), peak_memory(device), f"{waited:.1%} of the time waiting for batches",
                 unused_hardware(device, self.ranks.size, can_grow)]
        say(f"{self.run.name}: {'; '.join(part for part in parts if part)}")
