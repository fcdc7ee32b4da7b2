"""Dropout of BDH with counter-based random numbers: the mask is a hash of each neuron's coordinates.

    keep = hash(key, pass, batch row, head, position, neuron) ≥ p

So all three forms of BDH drop the same neurons, with any tiling, on CPU and on CUDA, and the backward pass computes the
mask again instead of storing it. `key` comes from torch's generator, which the training loop seeds with (seed, step,
micro-batch).

One 64-bit hash gives 16 bits to each of four neurons, so p is rounded to a multiple of 2^-16. Rows (all coordinates but
the neuron) and columns (groups of four neurons) are hashed by splitmix64's finalizer (Steele et al. 2014); their sum is
hashed again by two multiplications and a shift.
"""

import torch
from torch import Tensor

# Constants of splitmix64 as int64: 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB.
GOLDEN, FIRST, SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685
INT16_MIN = -(2**15)


class CounterDropout:
    """The dropout mask of one forward pass and its backward pass: `neurons` per head are dropped with probability p."""

    def __init__(self, p: float, key: int, neurons: int, device: torch.device):
        dropped = min(round(p * 2**16), 2**16 - 1)  # of 2^16
        self.threshold = INT16_MIN + dropped
        self.scale = 2**16 / (2**16 - dropped)  # factor on the neurons that remain
        self.key = torch.tensor(key, device=device)
        self.columns = _mix(torch.arange(-(-neurons // 4), device=device) * GOLDEN)

    def rows(self, level: int, batch: range, head: range, position: range) -> Tensor:
        """Hash all coordinates but the neuron: int64 (rows of the batch, heads, positions)."""
        z = self.key
        for dim, numbers in enumerate((range(level, level + 1), batch, head, position)):
            coordinate = torch.arange(numbers.start, numbers.stop, device=z.device).view(-1, *[1] * (3 - dim))
            z = _mix(z ^ (coordinate + 1) * GOLDEN)
        return z[0]

    def kept(self, rows: Tensor, first: int, last: int) -> Tensor:
        """Return the mask of neurons first..last - 1, int16 (*rows.shape, last - first): 1 keeps, 0 drops."""
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
    """Shift to the right and fill with zeros; torch's own shift fills with the sign bit."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
