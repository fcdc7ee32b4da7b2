"""Dropout by counter: whether a neuron is dropped is a function of its place alone, not of who asks in what order.

    keep = hash(key, pass, batch row, head, position, neuron) ≥ p

So the parallel, tiled and recurrent forms drop the same neurons, whatever their tiles, on CPU and on CUDA, and the
backward pass makes the mask again instead of keeping it. `key` is drawn from torch's generator, which the training loop
seeds with (seed, step, micro-batch).

One 64-bit hash serves four neurons with 16 bits each, so p is rounded to a multiple of 2^-16. Rows (everything but the
neuron) and columns (four neurons) are hashed well, by splitmix64's finalizer (Steele et al. 2014), their sum once more
by two multiplications and a shift.
"""

import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64, as all below
FIRST, SECOND = -4658895280553007687, -7723592293110705685  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
INT16_MIN = -(2**15)


class CounterDropout:
    """The mask of one forward pass and of its backward pass."""

    def __init__(self, p: float, key: int, neurons: int, device: torch.device):
        dropped = min(round(p * 2**16), 2**16 - 1)  # of 2^16
        self.threshold = INT16_MIN + dropped
        self.scale = 2**16 / (2**16 - dropped)  # what is kept grows by this
        self.key = torch.tensor(key, device=device)
        self.columns = _mix(torch.arange(-(-neurons // 4), device=device) * GOLDEN)

    def rows(self, level: int, batch: Tensor, head: Tensor, position: Tensor) -> Tensor:
        """Hash all but the neuron; int64 tensors that broadcast against each other, and so does the result."""
        z = self.key
        for coordinate in (torch.tensor(level, device=batch.device), batch, head, position):
            z = _mix(z ^ (coordinate + 1) * GOLDEN)
        return z

    def kept(self, rows: Tensor, first: int, last: int) -> Tensor:
        """Return int16 (*rows.shape, last - first): 1 where neurons first..last - 1 stay, 0 where they go."""
        begin, end = first // 4, -(-last // 4)
        z = rows.unsqueeze(-1) + self.columns[begin:end]
        z.mul_(FIRST)
        z.bitwise_xor_(z >> 32)
        z.mul_(SECOND)
        bits = z.view(torch.int16)[..., first - 4 * begin:last - 4 * begin]
        return bits.ge_(self.threshold)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * FIRST
    z = (z ^ _shift(z, 27)) * SECOND
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch shifts the sign in."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
