"""How many bytes training needs, by arithmetic alone: no model is built and nothing is allocated.

Memory is fullest at one of a few moments. Each is written down here as the buffers that live then, after
`models/tiled.py`, `models/recurrent.py`, `loss.py`, `training/step.py` and `transformers`' GPT-2:

    evaluation    no gradients, at most EVALUATION_ROWS rows
    loss          what forward keeps, a chunk of logits, the gradients of features and unembedding
    backward      what forward keeps, scratch, new gradients beside those of earlier micro-batches
    token table   its gradient, (V, D), comes last

Forward itself needs less than backward, and the optimizer's step less than any: its states are always there, and it
works in place. Sums are of tensors, as torch's own counters give them: `benchmarks/memory_plan.py` compares the two.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch

from plotarmour.cli import UserError
from plotarmour.config import AUTO, Recipe, TrainingConfig
from plotarmour.loss import CHUNK_LOGITS
from plotarmour.machine import find_machine, memory_bytes
from plotarmour.models.bdh import BDHConfig
from plotarmour.models.hf import GPT2Config
from plotarmour.models.recurrent import CHUNK
from plotarmour.models.rotary import ROWS
from plotarmour.models.tiled import Tiling
from plotarmour.training.out_of_memory import largest_divisor
from plotarmour.training.step import EVALUATION_ROWS

WIDE = 4  # bytes of a float32: weights, gradients, optimizer state, and all sums
RESERVE = 2**30  # kept free for what is not counted: a CUDA context takes some 0.5 GiB, torch on a CPU 0.4
NOT_COUNTED = {"cuda": "CUDA's context", "cpu": "Python, torch and the text"}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes held at the fullest moment of training.

    Attributes:
        moment: which it is.
        weights: parameters in float32; for BDH with the table of its rotations.
        optimizer: AdamW's two states.
        gradients: of earlier micro-batches, and those being made.
        saved: what forward keeps for backward.
        scratch: buffers of forward and backward, copies in half precision included.
        loss: logits of a chunk, gradients of features and unembedding.
    """

    moment: str
    weights: int
    optimizer: int
    gradients: int = 0
    saved: int = 0
    scratch: int = 0
    loss: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.gradients + self.saved + self.scratch + self.loss


def plan_training(recipe: Recipe, vocab_size: int, dtype: torch.dtype, device: str) -> MemoryPlan:
    """Plan what `training.loop.train` holds at its fullest moment.

    Args:
        recipe: resolved, of one model.
        vocab_size: entries.
        dtype: float32, or float16 or bfloat16 under autocast.
        device: "cpu" or "cuda".

    Returns:
        The fullest moment, in bytes of tensors.

    Raises:
        UserError: an impossible shape, or a kind of model without a plan.
    """
    shape, t = recipe.model_config(vocab_size), recipe.training
    read_rows = min(EVALUATION_ROWS, -(-t.eval_tokens // t.context_length))
    planner = {BDHConfig: _bdh, GPT2Config: _gpt2}.get(type(shape))
    if planner is None:
        raise UserError(f"recipe {recipe.name} ({recipe.model}): no memory plan for this model; expected one in "
                        "memory.py: set micro_batch_size to a number.")
    moments = planner(shape, t, read_rows, dtype.itemsize, device)
    return max(moments, key=lambda moment: moment.total)


def largest_micro_batch(recipe: Recipe, vocab_size: int, dtype: torch.dtype, device: str, budget: int) -> int:
    """Return the most rows whose plan stays within `budget` bytes, all else as in the recipe; 0 where none does."""
    def fits(rows: int) -> bool:
        changed = replace(recipe, training=replace(recipe.training, micro_batch_size=rows))
        return plan_training(changed, vocab_size, dtype, device).total <= budget

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_split(recipe: Recipe, vocab_size: int, dtype: torch.dtype, device: str, budget: int) -> Recipe | None:
    """Return the recipe with the largest micro-batch within `budget` bytes that keeps its rows per step; else None."""
    t = recipe.training
    for rows in range(t.rows_per_step, 0, -1):
        if t.rows_per_step % rows == 0:
            changed = replace(recipe, training=replace(t, micro_batch_size=rows))
            if plan_training(changed, vocab_size, dtype, device).total <= budget:
                return changed
    return None


def describe(recipe: Recipe, vocab_size: int, dtype: torch.dtype, device: str, memory: int) -> str:
    """Tell what training needs, part by part, and which micro-batches fit, for people.

    Args:
        recipe: resolved, of one model.
        vocab_size: entries.
        dtype: float32, or float16 or bfloat16 under autocast.
        device: "cpu" or "cuda".
        memory: bytes that the device has; RESERVE of them is left free.
    """
    t, plan = recipe.training, plan_training(recipe, vocab_size, dtype, device)
    parts = {"weights": plan.weights, "optimizer state": plan.optimizer, "gradients": plan.gradients,
             "kept by forward": plan.saved, "scratch": plan.scratch, "loss": plan.loss}
    lines = [f"{recipe.model}: micro-batch {t.micro_batch_rows} x {t.context_length:,} tokens, vocabulary "
             f"{vocab_size:,}, {str(dtype).removeprefix('torch.')} on {device}",
             f"held at the fullest moment, {plan.moment}:"]
    lines += [f"  {name:<15} {held / 2**20:>9,.0f} MiB" for name, held in parts.items()]
    lines.append(f"  {'sum':<15} {plan.total / 2**20:>9,.0f} MiB = {plan.total / 2**30:.2f} GiB, not counting "
                 f"{NOT_COUNTED[device]}, and gaps between blocks")
    budget = memory - RESERVE
    room = f"{memory / 2**30:.3g} GiB less {RESERVE / 2**30:.1f} in reserve"
    most = largest_micro_batch(recipe, vocab_size, dtype, device, budget)
    if plan.total <= budget:
        lines.append(f"fits {room}: largest micro-batch {most:,}; the recipe's is {t.micro_batch_rows}")
    elif split := largest_split(recipe, vocab_size, dtype, device, budget):
        lines.append(f"does not fit {room}: largest micro-batch {most:,}; set "
                     f"micro_batch_size={split.training.micro_batch_size}, which keeps {t.tokens_per_step:,} "
                     "tokens a step")
    else:
        lines.append(f"does not fit {room}, not even a row at a time: set a shorter context_length or a smaller model")
    return "\n".join(lines)


def describe_here(recipe: Recipe, vocab_size: int, memory_gib: float | None = None, processes: int = 1) -> str:
    """Tell what training needs on the device that a recipe asks for, which need not be here.

    Args:
        recipe: resolved, of one model.
        vocab_size: entries.
        memory_gib: that the device has; None for this GPU's memory, or the RAM available now.
        processes: that share every step's rows, one per GPU, or all on this CPU: what each of them holds is told.

    Raises:
        UserError: a GPU that is not here, of which too little is said.
    """
    t = recipe.training
    if t.device == "cuda" and not torch.cuda.is_available():
        if t.dtype == "auto" or memory_gib is None:
            raise UserError("no GPU is here to ask; expected its dtype and memory: --dtype float16 (T4) or "
                            "bfloat16 (newer), and --memory-gib G.")
        device, dtype = "cuda", getattr(torch, t.dtype)
    else:
        machine = find_machine(t.device, t.dtype)
        device, dtype = machine.device.type, machine.dtype
    if memory_gib is not None and not 0 < memory_gib < math.inf:
        raise UserError(f"--memory-gib {memory_gib:g} is no size; expected the device's memory in GiB, such as 15.")
    memory = memory_bytes(torch.device(device)) if memory_gib is None else int(memory_gib * 2**30)
    if device == "cpu":
        memory //= processes  # GPUs have their own memory each
    share = max(1, t.rows_per_step // processes)
    rows = largest_divisor(share, t.micro_batch_rows)
    each = replace(recipe, training=replace(t, micro_batch_size=rows, rows_per_step=share))
    if t.micro_batch_size == AUTO:
        each = largest_split(each, vocab_size, dtype, device, memory - RESERVE) or each
    told = describe(each, vocab_size, dtype, device, memory)
    return told if processes == 1 else f"each of {processes} processes, with its share of every step:\n{told}"


def _bdh(shape: BDHConfig, t: TrainingConfig, read_rows: int, size: int, device: str) -> list[MemoryPlan]:
    """The moments of `models/tiled.py`. `size` is that of the products' dtype; letters as in `models/bdh.py`."""
    B, T = t.micro_batch_rows, t.context_length
    L, D, H, N, V = shape.n_layer, shape.n_embd, shape.n_head, shape.neurons_per_head, shape.vocab_size
    half, dropout, core = size < WIDE, shape.dropout > 0, shape.core_params
    table, v, read_v = WIDE * V * D, WIDE * B * T * D, WIDE * read_rows * T * D
    parameters = WIDE * core + 2 * table
    before = parameters if t.grad_accum_steps > 1 else 0  # gradients of the micro-batches before
    rotation = -(-T // ROWS) * ROWS * N * WIDE  # complex64, (T, N / 2)
    at = partial(MemoryPlan, weights=parameters + rotation, optimizer=2 * parameters)

    def tiling(rows: int) -> Tiling:
        return Tiling.for_shape(rows, T, N, torch.device(device))

    def scores(rows: int, length: int) -> int:
        """Of one head and pass: the blocks on and under the diagonal."""
        ends = [*range(tiling(rows).positions, length, tiling(rows).positions), length]
        return WIDE * rows * sum((j - i) * j for i, j in zip([0, *ends], ends, strict=False))

    def scratch(rows: int, backward: bool) -> tuple[int, int]:
        """What stays from tile to tile and pass to pass, and what comes and goes."""
        G, n = tiling(rows).rows, tiling(rows).neurons
        whole, tile, narrow = G * T * N, G * T * n, G * T * D
        stay = size * (whole + tile * (1 + dropout)) + WIDE * (tile + narrow)  # x; y, the mask; q, a
        go = (WIDE + half * size) * narrow + half * size * tile  # LN(a), the q before
        go += WIDE * max((half or dropout) * tile, half * n * D)  # x made wide, a hash, or a product
        if backward:
            stay += size * (whole + 3 * tile) + WIDE * (tile + narrow)  # through gate; dg, g, dq; turned, d LN(a)
            stay += WIDE * T * (n + G * T)  # conjugate, d scores
            go += 3 * WIDE * narrow + half * size * (G * T * T + tile)  # da; d scores and the dx before
        return stay, go

    def copies(n: int, rows: int) -> int:
        """In half precision: the weights, and v and its gradient."""
        return half * size * (core + n * rows * T * D)

    saved = 2 * v + L * (2 * v + H * scores(B, T))  # the embedding, v and m of every pass, the last v
    stay, go = scratch(B, True)
    piece = T if T <= CHUNK + 4 * D else CHUNK  # as `recurrent.read` chooses; the past is then in a state
    reading = scores(tiling(read_rows).rows, piece) + (WIDE * read_rows * H * N * D if piece < T else 0)
    return [
        at("evaluation", scratch=copies(1, read_rows) + 5 * read_v + reading + sum(scratch(read_rows, False))),
        at("evaluation", scratch=copies(0, 0) + read_v, loss=_loss(read_rows * T, D, V, size, False)),
        at("loss", gradients=before, saved=saved, loss=_loss(B * T, D, V, size, True)),
        at("backward", gradients=(before or table) + WIDE * core, saved=saved,  # in a pass, or between two
           scratch=stay + max(copies(2, B) + (4 + dropout) * v + go, copies(0, 0) + 7 * v)),
        at("token table", gradients=(before or parameters - table) + table, saved=v, scratch=2 * v),
    ]


def _gpt2(shape: GPT2Config, t: TrainingConfig, read_rows: int, size: int, device: str) -> list[MemoryPlan]:
    """The moments of `transformers`' GPT-2 with `scaled_dot_product_attention`."""
    B, T = t.micro_batch_rows, t.context_length
    L, D, H, V = shape.n_layer, shape.n_embd, shape.n_head, shape.vocab_size
    half, dropout, cuda = size < WIDE, shape.dropout > 0, device == "cuda"
    table, v, wide, read_v = WIDE * V * D, WIDE * B * T * D, 4 * B * T * D, WIDE * read_rows * T * D
    parameters = WIDE * (shape.core_params + (V + shape.context_length) * D)
    before = parameters if t.grad_accum_steps > 1 else 0
    at = partial(MemoryPlan, weights=parameters, optimizer=2 * parameters)
    copies = half * size * 12 * D**2  # of a layer's matrices; kept for backward
    # The fused kernel keeps queries, keys, values and a sum per row. There is none on a CPU with dropout, and on CUDA
    # for heads of odd width: the formula keeps all three in float32, and scores before and after dropout with its mask.
    fused = D // H % (8 if half else 4) == 0 if cuda else not dropout
    scores = 0 if fused else WIDE * B * H * T * T
    attention = 3 * size * B * T * D + WIDE * B * H * T if fused else 3 * (v + scores)
    # gelu_new keeps its input, its tanh, 1 + tanh, half its input, and its output for the next product. CUDA's autocast
    # takes the cube in float32, and so all that follows.
    middle = WIDE if half and cuda else size
    gelu = (3 * middle + 2 * size) * wide
    mask = dropout * (1 if cuda else size) * B * T * D
    # Two layer norms keep their input and two numbers a row; three products their input.
    layer = 2 * (v + 2 * WIDE * B * T) + 3 * size * B * T * D + attention + gelu + 2 * mask + copies
    saved = L * layer + v + mask * WIDE // size
    return [
        at("evaluation", scratch=L * copies + 3 * read_v + 4 * middle * 4 * read_rows * T * D),  # gelu_new
        at("evaluation", scratch=L * copies + read_v, loss=_loss(read_rows * T, D, V, size, False)),
        at("loss", gradients=before, saved=saved, scratch=0 if half else v, loss=_loss(B * T, D, V, size, True)),
        # The unembedding's gradient waits for that of the same table as embedding.
        at("backward", gradients=(before or WIDE * 4 * D**2) + table, saved=saved,  # through the last gelu_new
           scratch=2 * v + (3 * middle - size) * wide),
        at("backward", gradients=(before or WIDE * 8 * D**2) + table, saved=saved - gelu,  # the last attention
           scratch=4 * v + 3 * scores),
        at("token table", gradients=(before + table if before else parameters) + table, scratch=2 * v),
    ]


def _loss(n_tokens: int, D: int, V: int, size: int, gradient: bool) -> int:
    """`loss.summed_nats`: copies in half precision, gradients, and the fullest chunk."""
    half = size < WIDE
    n = min(n_tokens, max(1, CHUNK_LOGITS // V))
    logit = size + (1 + half) * WIDE  # beside it the same in float32, and a log-probability
    chunk = V * n * logit
    if gradient:
        following = min(n_tokens - n, n)  # beside the unembedding's gradient that the first chunk has begun
        first = V * max(n * logit, n * size + (size + half * WIDE) * D)
        later = V * (max(following * logit, following * size + size * D) + WIDE * D) if following else 0
        chunk = max(first, later) + size * n_tokens * D
    return chunk + half * size * (n_tokens + V) * D
