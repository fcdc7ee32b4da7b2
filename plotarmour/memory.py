"""The memory that training needs, by arithmetic: no model is built and nothing is allocated.

Memory is fullest at one of three moments; parameters and the optimizer's states are held at each of them:

    backward      gradients, and the activations that the model's config states (`ModelConfig.activation_bytes`)
    loss          activations, a chunk of logits, and the gradients of features and unembedding (`loss.loss_bytes`)
    evaluation    a chunk of logits

The sums are of tensors, as torch counts them. They are estimates within 20 %, mostly on the high side;
`benchmarks/memory_plan.py` compares them with what torch allocates.
"""

import math
from dataclasses import dataclass, replace

import torch

from plotarmour.cli import UserError
from plotarmour.config import AUTO, Recipe, largest_divisor
from plotarmour.loss import loss_bytes
from plotarmour.machine import find_machine, memory_bytes
from plotarmour.training.step import EVALUATION_ROWS

FLOAT32 = 4  # bytes of a weight, a gradient, each of AdamW's two states and Muon's one
RESERVE = 2**30  # bytes left free for what the sums leave out: a CUDA context takes 0.5 GiB, torch on a CPU 0.4


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that training holds at its fullest moment."""

    moment: str  # backward, loss or evaluation
    parts: dict[str, int]  # bytes of the weights, the optimizer's states, and what else is held

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def plan_training(recipe: Recipe, vocab_size: int, dtype: torch.dtype, device: str) -> MemoryPlan:
    """Return what `training.loop.Session` holds at its fullest moment with a recipe of one model.

    Args:
        vocab_size: entries of the tokenizer.
        dtype: float32, or float16 or bfloat16 under autocast.
        device: "cpu" or "cuda".
    """
    config, t = recipe.model_config(vocab_size), recipe.training
    weights, core = FLOAT32 * config.params, FLOAT32 * config.core_params
    earlier = weights if t.grad_accum_steps > 1 else 0  # gradients of earlier micro-batches; new ones come beside them
    activations = config.activation_bytes(t.micro_batch_rows, t.context_length, dtype, device)
    if t.mask_stories:  # a transformer's mask; the others hold less
        activations += dtype.itemsize * t.micro_batch_rows * t.context_length**2
    eval_rows = min(EVALUATION_ROWS, math.ceil(t.eval_tokens / t.context_length))
    loss, eval_loss = (loss_bytes(rows * t.context_length, config.n_embd, vocab_size, dtype, with_gradient)
                       for rows, with_gradient in ((t.micro_batch_rows, True), (eval_rows, False)))
    held = {"weights": weights, "optimizer state": 2 * weights - (core if t.optimizer == "muon" else 0)}
    moments = [
        MemoryPlan("backward", held | {"gradients": weights + (core if earlier else 0),
                                       "activations": activations}),
        MemoryPlan("loss", held | {"gradients": earlier, "activations": activations, "loss": loss}),
        MemoryPlan("evaluation", held | {"loss": eval_loss}),
    ]
    return max(moments, key=lambda moment: moment.total)


def largest_micro_batch(recipe: Recipe, vocab_size: int, dtype: torch.dtype, device: str, budget: float) -> int:
    """Return the most rows that divide rows_per_step and whose plan needs at most `budget` bytes; 0 if none do."""
    t = recipe.training
    for rows in (n for n in range(t.rows_per_step, 0, -1) if t.rows_per_step % n == 0):
        smaller = replace(recipe, training=replace(t, micro_batch_size=rows))
        if plan_training(smaller, vocab_size, dtype, device).total <= budget:
            return rows
    return 0


def describe_memory(recipe: Recipe, vocab_size: int, memory_gib: float | None = None, processes: int = 1) -> str:
    """Return a description of the memory that training needs, and of the micro-batch that fits.

    Args:
        recipe: of one model. If its GPU is not in this machine, its dtype and memory must be given (`UserError`).
        vocab_size: entries of the tokenizer.
        memory_gib: of the device; None for this GPU's memory, or the RAM available now.
        processes: that share every step's rows, one per GPU, or all on this CPU. The description is of each of them.
    """
    t = recipe.training
    if t.device == "cuda" and not torch.cuda.is_available():
        if t.dtype == "auto" or memory_gib is None:
            raise UserError("this machine has no GPU to ask; expected its dtype and memory: --dtype float16 (T4) or "
                            "bfloat16 (newer), and --memory-gib G.")
        device, dtype = "cuda", getattr(torch, t.dtype)
    else:
        machine = find_machine(t.device, t.dtype)
        device, dtype = machine.device.type, machine.dtype
    gib = memory_bytes(torch.device(device)) / 2**30 if memory_gib is None else memory_gib
    gib /= processes if device == "cpu" else 1  # every GPU has its own memory
    t, budget = replace(t, rows_per_step=t.rows_per_step // processes), gib * 2**30 - RESERVE
    largest = largest_micro_batch(replace(recipe, training=t), vocab_size, dtype, device, budget)
    rows = largest or 1 if t.micro_batch_size == AUTO else largest_divisor(t.rows_per_step, t.micro_batch_size)
    plan = plan_training(replace(recipe, training=replace(t, micro_batch_size=rows)), vocab_size, dtype, device)
    lines = [f"each of {processes} processes, with its share of every step:"] * (processes > 1)
    lines += [f"{recipe.model}: micro-batch {rows} x {t.context_length:,} tokens, vocabulary {vocab_size:,}, "
              f"{str(dtype).removeprefix('torch.')} on {device}",
              f"estimated at the fullest moment, {plan.moment}:"]
    lines += [f"  {name:<15} {size / 2**20:>9,.0f} MiB" for name, size in (plan.parts | {"sum": plan.total}).items()]
    room = f"{gib:.3g} GiB less {RESERVE / 2**30:.1f} in reserve"
    if plan.total <= budget:
        advice = (f"fits {room}: the largest micro-batch of {t.rows_per_step} rows per step is {largest}; the recipe's "
                  f"is {rows}")
    elif largest:
        advice = f"does not fit {room}: set micro_batch_size={largest}, which keeps {t.tokens_per_step:,} tokens a step"
    else:
        advice = f"does not fit {room}, not even a row at a time: set a shorter context_length or a smaller model"
    return "\n".join([*lines, advice])
