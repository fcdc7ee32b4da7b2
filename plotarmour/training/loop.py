"""The training loop: one step is one attempted optimizer update over `rows_per_step` rows.

Everything random in a step follows from (seed, step): which rows it reads, and the dropout of each micro-batch. So a
run that stops and resumes replays nothing and ends with the same bits (float32 on a CPU, without `schedule_minutes`, by
which the learning rate follows the clock).
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from plotarmour.cli import duration, progress, say, warn
from plotarmour.config import TrainingConfig
from plotarmour.data.batches import Windows
from plotarmour.evaluation.metrics import totals
from plotarmour.machine import Machine, peak_memory, peak_memory_mib, session_minutes
from plotarmour.training.checkpoint import TrainState, checkpoint_of, load_training, save_checkpoint, warn_of_low_disk
from plotarmour.training.distributed import LostProcess, Ranks
from plotarmour.training.ending import Ending, Reason, StopRequest, forget_ending
from plotarmour.training.log import RunLog, add_sample, record_change, utc_now
from plotarmour.training.optimizer import learning_rate, progress_of
from plotarmour.training.progress import TIMED_STEPS, Pace, unused_hardware
from plotarmour.training.step import EVALUATION_ROWS, Updates, evaluate_windows, too_large, try_to_fit

NON_FINITE_IN_A_ROW = 10  # skipped steps that end a run


@dataclass
class Session:
    """One process's part of a run: from its start, or a checkpoint, to where it ends or stops."""

    run: Path  # folder for log.csv, checkpoints, DONE.json or STOPPED.json
    model: nn.Module  # on the machine's device, float32
    windows: Windows  # of the training tokens
    val_windows: Windows  # of the validation tokens; the first `eval_tokens` of them, in order, are evaluated
    token_bytes: np.ndarray | None  # int32 (vocab_size,), bytes that each id stands for; None where that is not exact
    config: TrainingConfig  # the training part of a recipe
    machine: Machine  # device and dtype
    resume_from: Path | None  # the checkpoint folder to continue from; None for a new run
    ranks: Ranks  # which of several processes this is; only the first one writes into the run folder
    first_micro_batch_size: int  # rows per micro-batch to begin with
    on_row: Callable[[], None] | None  # called after every row of log.csv, for example to draw it
    sample: Callable[[], str] | None  # continues a prompt with the model, which is in evaluation mode meanwhile

    def __post_init__(self) -> None:
        run, config, ranks = self.run, self.config, self.ranks
        self.updates = Updates(self.model, self.windows, config, self.machine, ranks)
        self.state = state = TrainState() if self.resume_from is None else self._load(self.resume_from)
        self.last_checkpoint = state.step
        self.pace = Pace(config, session_minutes(config.max_minutes), state.elapsed_s, state.took_s)
        self.val_rows, self.evaluation_rows = self.val_windows.first_rows(config.eval_tokens), EVALUATION_ROWS
        if self.machine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.machine.device)
        if ranks.is_first:
            forget_ending(run)
            warn_of_low_disk(run, self.model, state.step, config)
            self.log = RunLog(run / "log.csv", -1 if self.resume_from is None else state.step, state.log_rows)
        # What memory allowed stays in force while the recipe's setting is the same: the bits depend on it.
        allowed = state.micro_batch_rows if state.micro_batch_setting == config.micro_batch_size else None
        self.updates.begin(state.step, allowed or self.first_micro_batch_size)

    def train(self) -> Ending:
        """Train until the schedule ends, early stopping fires, or something stops the run.

        Returns:
            How the run ended, as DONE.json or STOPPED.json holds it.

        Raises:
            UserError: a step that does not fit into memory even one row at a time, a disk that cannot hold a
                checkpoint.
            LostProcess: another process of this run has died, and this one is not the first.
        """
        with StopRequest() as stop:
            try:
                return self.end(self.take_steps(stop))
            except LostProcess:
                ending = self.end(Reason.LOST_PROCESS)
                # Printed here, where SIGTERM only sets a flag. torchrun sends it as soon as it sees the dead process;
                # after this block it would end the process before it could print anything.
                print("another process of this run has died; the same command continues from the latest checkpoint",
                      file=sys.stderr, flush=True)
                if not self.ranks.is_first:
                    raise
                return ending
            finally:
                self.updates.close()

    def take_steps(self, stop: StopRequest) -> Reason:
        """Take steps until there is a reason to stop, and return it."""
        state, config = self.state, self.config
        with progress(config.max_steps, "steps", self.run.name, state.step, is_timed=False,
                      is_shown=self.ranks.is_first) as self.bar:
            # A new run, or one that was killed between its last checkpoint and DONE.json.
            if state.evaluated_step is None or (state.evaluated_step != state.step and self._end()):
                self.write_row(None, None, self.evaluate())
                self.save()
            elif state.best_val_loss == math.inf:  # --from-step to a step without an evaluation; the best one is gone
                self.evaluate()
            self.model.train()
            reason = self._end()
            while reason is None:
                rate, norm = self.take_step()
                end = self._end()
                measured = self.evaluate() if end or state.step % config.eval_interval == 0 else {}
                if measured or state.step % config.log_interval == 0:
                    self.write_row(rate, norm, measured)
                if self.sample and self.ranks.is_first and self.pace.is_sample_due(state.step, end is not None):
                    self.write_sample()
                if measured:  # it may have used up the schedule's minutes, or the patience
                    end = end or self._end()
                reason = self._reason_to_stop(end, stop.asked)
                is_best = bool(measured) and state.best_step == state.step
                is_due = reason or state.step % config.checkpoint_interval == 0
                if is_best or (is_due and reason != Reason.NON_FINITE):
                    self.save()
                if reason is None:
                    self._print_forecast()
        return reason

    def take_step(self) -> tuple[float, float]:
        """Attempt one update; return its learning rate and the norm of its gradient."""
        state, updates, begun = self.state, self.updates, time.perf_counter()
        schedule_s, size = self._schedule_s(), updates.micro_batch_size
        rate = learning_rate(state.step, self.config, schedule_s)
        self.model.progress = progress_of(state.step, self.config, schedule_s)
        update = updates.take(state.step, rate)
        if updates.micro_batch_size < size:
            self._record_split(size, updates.micro_batch_size)
        state.step += 1
        state.tokens_seen += update.n_tokens
        if math.isfinite(update.loss):
            state.nats += update.loss * update.n_tokens
            state.n_targets += update.n_tokens
        state.scaler_overflows += update.overflowed
        state.skipped_steps += update.skipped
        state.non_finite_in_a_row = state.non_finite_in_a_row + 1 if update.skipped else 0
        self.pace.count(update.n_tokens, time.perf_counter() - begun)
        left = f", {duration(self.pace.session_left_s(state.step))} left" if self.pace.steps else ""
        self.bar.set_postfix_str(f"loss {update.loss:.3f}, {self.pace.rate():,.0f} tokens/s{left}", refresh=False)
        self.bar.update()
        return rate, update.norm

    def evaluate(self) -> dict:
        """Score the validation windows; return the columns of the log that result."""
        state = self.state
        with self.pace.timing("evaluation"):
            share = self._evaluate_share()
            n_failed, nats, n_tokens, n_bytes = self.ranks.sum(share is None, *(share or (0, 0, 0)))
        if n_failed:  # raised in all processes, so that the first one reports it
            raise too_large("one row of an evaluation")
        result = totals(nats, n_tokens, n_bytes)
        state.val_loss, state.evaluated_step = result["loss"], state.step
        if state.val_loss < state.best_val_loss:
            state.best_val_loss, state.best_step, state.evaluations_without_improvement = state.val_loss, state.step, 0
        else:
            state.evaluations_without_improvement += 1
        return {f"val_{name}": value for name, value in result.items()}

    def write_row(self, rate: float | None, norm: float | None, measured: dict) -> None:
        """Write a row of log.csv, with the training loss since the row before."""
        state, is_measured = self.state, self.state.n_targets > 0
        if is_measured:
            state.train_loss = state.nats / state.n_targets
        state.nats, state.n_targets = 0.0, 0
        if not self.ranks.is_first:
            return
        self.log.append(
            utc=utc_now(), step=state.step, epoch=self.windows.epoch_of(state.step), tokens_seen=state.tokens_seen,
            elapsed_s=self.pace.elapsed_s, learning_rate=rate, grad_norm=norm,
            train_loss=state.train_loss if is_measured else None, tokens_per_s=self.pace.rate(),
            peak_memory_mib=peak_memory_mib(self.machine.device), skipped_steps=state.skipped_steps,
            scaler_overflows=state.scaler_overflows, **measured)
        if self.on_row is not None:
            self.on_row()

    def write_sample(self) -> None:
        """Write down how the model continues a prompt now; nothing random in training changes."""
        self.model.eval()
        with self.pace.timing("samples"):
            try:
                add_sample(self.run, self.state.step, text := self.sample())
                say(f"{self.run.name} writes at step {self.state.step:,}: {text}")
            except Exception as error:  # of any kind: training goes on without it
                warn(f"no sample at step {self.state.step:,} ({type(error).__name__}: {error})")
        self.model.train()

    def save(self) -> None:
        """Write a checkpoint of the current step."""
        state = self.state
        if self.ranks.is_first:
            state.elapsed_s, state.log_rows = self.pace.elapsed_s, self.log.n_rows
            state.micro_batch_setting = self.config.micro_batch_size
            state.micro_batch_rows = self.updates.micro_batch_size
            state.scaler = self.updates.scaler.state_dict()
            with self.pace.timing("save"):
                save_checkpoint(self.run, self.model, self.updates.optimizer, state, self.config.keep_every)
        self.last_checkpoint = state.step

    def end(self, reason: Reason) -> Ending:
        """Write DONE.json or STOPPED.json, and return its content."""
        state = self.state
        ending = Ending(
            reason, state.step, state.tokens_seen, round(self.pace.elapsed_s, 2), state.train_loss, state.val_loss,
            state.best_step, state.best_val_loss, state.skipped_steps, state.scaler_overflows,
            peak_memory_mib(self.machine.device), self.last_checkpoint, self.updates.micro_batch_size,
            round(self.updates.waited_s, 2))
        if self.ranks.is_first:
            ending.write(self.run)
        return ending

    def _load(self, checkpoint: Path) -> TrainState:
        """Load weights, optimizer state and numbers of a checkpoint."""
        state = load_training(checkpoint, self.model, self.updates.optimizer)
        if not checkpoint_of(self.run, state.best_step).is_dir():  # after --from-step
            is_evaluated = state.evaluated_step == state.step
            state.best_step, state.best_val_loss = state.step, state.val_loss if is_evaluated else math.inf
        if self.updates.scaler.is_enabled():
            self.updates.scaler.load_state_dict(state.scaler)
        return state

    def _evaluate_share(self) -> tuple[float, int, int] | None:
        """Score this process's share of the validation rows, in smaller batches where memory runs out.

        None: even one row at a time does not fit.
        """
        rows, share = self.val_rows[self.ranks.rank::self.ranks.size], None
        while share is None and self.evaluation_rows:
            batches = [rows[i:i + self.evaluation_rows] for i in range(0, len(rows), self.evaluation_rows)]
            share = try_to_fit(lambda: evaluate_windows(self.model, self.val_windows, batches, self.token_bytes,
                                                        self.machine))
            if share is None:
                self.evaluation_rows //= 2
        return share

    def _end(self) -> Reason | None:
        """Return why the run is complete; None where it is not."""
        t = self.config
        if self.state.step >= t.max_steps:
            return Reason.MAX_STEPS
        if t.schedule_minutes and self._schedule_s() >= 60 * t.schedule_minutes:
            return Reason.SCHEDULE_MINUTES
        return Reason.EARLY_STOPPING if 0 < t.patience <= self.state.evaluations_without_improvement else None

    def _reason_to_stop(self, end: Reason | None, asked: Reason | None) -> Reason | None:
        """Return why to stop after this step, the same in all processes; None to go on."""
        is_over = bool(self.pace.minutes) and self.pace.session_s > 60 * self.pace.minutes - self._ahead_s()
        n_asked, is_over = self.ranks.sum(asked is not None, is_over and self.ranks.is_first)
        if self.state.non_finite_in_a_row >= NON_FINITE_IN_A_ROW:
            return Reason.NON_FINITE
        if end:
            return end
        if n_asked:
            return asked or Reason.SIGNAL_ELSEWHERE
        return Reason.TIME_BUDGET if is_over else None

    def _schedule_s(self) -> float:
        """Seconds of the schedule that are used: those that have passed, and those that its end will take.

        All processes go by the first one's clock.
        """
        if not self.config.schedule_minutes:
            return 0.0
        return self.ranks.sum(self.pace.elapsed_s + self._ahead_s() if self.ranks.is_first else 0.0)[0]

    def _ahead_s(self) -> float:
        """Seconds from one decision to continue until the next one is carried out: save, step, evaluation, save."""
        return self.pace.step_s + self.pace.took_s["evaluation"] + 2 * self.pace.took_s["save"]

    def _record_split(self, before: int, now: int) -> None:
        """Record and print that steps consist of smaller micro-batches from now on."""
        self.pace.forget()
        if self.ranks.is_first:
            share, step = self.updates.share, self.state.step
            record_change(self.run, step, "out of memory", micro_batch_size=[before, now])
            say(f"{self.run.name}: out of memory at step {step + 1}: {share // now} micro-batches of {now} rows "
                f"instead of {share // before} of {before}")

    def _print_forecast(self) -> None:
        """Print, after some timed steps of one size, when the run will end and what it uses of the machine."""
        if self.pace.steps != TIMED_STEPS or not self.ranks.is_first:
            return
        device, waited = self.machine.device, self.updates.waited_s / max(self.pace.session_s, 1e-9)
        can_grow = self.updates.micro_batch_size < self.updates.share
        parts = [self.pace.forecast(self.state.step), peak_memory(device),
                 f"{waited:.1%} of the time waiting for batches", unused_hardware(device, self.ranks.size, can_grow)]
        say(f"{self.run.name}: {'; '.join(part for part in parts if part)}")
