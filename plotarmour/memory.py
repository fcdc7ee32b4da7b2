"""The memory that training needs, by arithmetic: no model is built and nothing is allocated.

Memory is fullest at one of three moments; parameters and the optimizer's two states are held at each of them:

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
from plotarmour.config import AUTO, Recipe
from plotarmour.loss import loss_bytes
from plotarmour.machine import find_machine, memory_bytes
from plotarmour.training.out_of_memory import largest_divisor
from plotarmour.training.step import EVALUATION_ROWS

FLOAT32 = 4  # bytes of a weight, a gradient and each of AdamW's two states
RESERVE = 2**30  # bytes left free for what the sums leave out: a CUDA context takes 0.5 GiB, torch on a CPU 0.4
LEFT_OUT = {"cuda": "CUDA's context", "cpu": "Python, torch and the text"}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that training holds at its fullest moment.

    Attributes:
        moment: backward, loss or evaluation.
        weights: parameters in float32.
        optimizer: AdamW's two states.
        gradients: of the parameters.
        activations: of the model.
        loss: chunk of logits, gradients of features and unembedding.
    """

    moment: str
    weights: int
    optimizer: int
    gradients: int = 0
    activations: int = 0
    loss: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.gradients + self.activations + self.loss


def plan_training(recipe: Recipe, vocab_size: int, dtype: torch.dtype, device: str) -> MemoryPlan:
    """Return what `training.loop.train` holds at its fullest moment.

    Args:
        recipe: of one model.
        vocab_size: entries of the tokenizer.
        dtype: float32, or float16 or bfloat16 under autocast.
        device: "cpu" or "cuda".

    Raises:
        UserError: impossible hyperparameters.
    """
    config, t = recipe.model_config(vocab_size), recipe.training
    weights, core = FLOAT32 * config.params, FLOAT32 * config.core_params
    earlier = weights if t.grad_accum_steps > 1 else 0  # gradients of earlier micro-batches; new ones come beside them
    activations = config.activation_bytes(t.micro_batch_rows, t.context_length, dtype, device)
    eval_rows = min(EVALUATION_ROWS, math.ceil(t.eval_tokens / t.context_length))

    def loss(rows: int, with_gradient: bool) -> int:
        return loss_bytes(rows * t.context_length, config.n_embd, vocab_size, dtype, with_gradient)

    moments = [
        MemoryPlan("backward", weights, 2 * weights, earlier + core if earlier else weights, activations),
        MemoryPlan("loss", weights, 2 * weights, earlier, activations, loss(t.micro_batch_rows, True)),
        MemoryPlan("evaluation", weights, 2 * weights, loss=loss(eval_rows, False)),
    ]
    return max(moments, key=lambda moment: moment.total)


def largest_micro_batch(recipe: Recipe, vocab_size: int, dtype: torch.dtype, device: str, budget: int) -> int:
    """Return the most rows that divide rows_per_step and whose plan needs at most `budget` bytes; 0 if none do."""
    t = recipe.training
    for rows in range(t.rows_per_step, 0, -1):
        if t.rows_per_step % rows == 0:
            smaller = replace(recipe, training=replace(t, micro_batch_size=rows))
            if plan_training(smaller, vocab_size, dtype, device).total <= budget:
                return rows
    return 0


def describe(recipe: Recipe, vocab_size: int, dtype: torch.dtype, device: str, memory: int) -> str:
    """Return in words what training needs, part by part, and which micro-batch fits.

    Args:
        recipe: of one model.
        vocab_size: entries of the tokenizer.
        dtype: float32, or float16 or bfloat16 under autocast.
        device: "cpu" or "cuda".
        memory: bytes of the device; RESERVE of them stays free.
    """
    t, plan = recipe.training, plan_training(recipe, vocab_size, dtype, device)
    parts = {"weights": plan.weights, "optimizer state": plan.optimizer, "gradients": plan.gradients,
             "activations": plan.activations, "loss": plan.loss}
    lines = [f"{recipe.model}: micro-batch {t.micro_batch_rows} x {t.context_length:,} tokens, vocabulary "
             f"{vocab_size:,}, {str(dtype).removeprefix('torch.')} on {device}",
             f"estimated at the fullest moment, {plan.moment}:"]
    lines += [f"  {name:<15} {size / 2**20:>9,.0f} MiB" for name, size in parts.items()]
    lines.append(f"  {'sum':<15} {plan.total / 2**20:>9,.0f} MiB = {plan.total / 2**30:.2f} GiB, without "
                 f"{LEFT_OUT[device]}, and gaps between blocks")
    room = f"{memory / 2**30:.3g} GiB less {RESERVE / 2**30:.1f} in reserve"
    rows = largest_micro_batch(recipe, vocab_size, dtype, device, memory - RESERVE)
    if plan.total <= memory - RESERVE:
        lines.append(f"fits {room}: the largest micro-batch of {t.rows_per_step} rows per step is {rows}; the recipe's "
                     f"is {t.micro_batch_rows}")
    elif rows:
        lines.append(f"does not fit {room}: set micro_batch_size={rows}, which keeps {t.tokens_per_step:,} tokens a "
                     "step")
    else:
        lines.append(f"does not fit {room}, not even a row at a time: set a shorter context_length or a smaller model")
    return "\n".join(lines)


def describe_here(recipe: Recipe, vocab_size: int, memory_gib: float | None = None, processes: int = 1) -> str:
    """Return in words what training needs on the device that a recipe names, which need not be in this machine.

    Args:
        recipe: of one model.
        vocab_size: entries of the tokenizer.
        memory_gib: of the device; None for this GPU's memory, or the RAM available now.
        processes: that share every step's rows, one per GPU, or all on this CPU. The description is of each of them.

    Raises:
        UserError: the GPU is not in this machine, and its dtype or memory is not given.
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
    if memory_gib is not None and not 0 < memory_gib < math.inf:
        raise UserError(f"--memory-gib {memory_gib:g} is not a size; expected the device's memory in GiB, such as 15.")
    memory = memory_bytes(torch.device(device)) if memory_gib is None else int(memory_gib * 2**30)
    if device == "cpu":
        memory //= processes  # every GPU has its own memory
    share = max(1, t.rows_per_step // processes)
    each = replace(recipe, training=replace(t, rows_per_step=share,
                                            micro_batch_size=largest_divisor(share, t.micro_batch_rows)))
    if t.micro_batch_size == AUTO:
        rows = largest_micro_batch(each, vocab_size, dtype, device, memory - RESERVE) or 1
        each = replace(each, training=replace(each.training, micro_batch_size=rows))
    text = describe(each, vocab_size, dtype, device, memory)
    return text if processes == 1 else f"each of {processes} processes, with its share of every step:\n{text}"
