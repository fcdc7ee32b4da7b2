"""Rotary position embedding of BDH: each pair of neurons (2i, 2i + 1) is rotated by an angle of its own.

A pair is treated as the complex number x[2i] + i·x[2i+1]. At position t it is multiplied by exp(2πi · t · f_i), with
f_i = theta^(-2i / N) / 2π in cycles per position. The phases t · f_i are computed modulo 1 in float64, which keeps them
exact to positions beyond 10^6. The inverse rotation multiplies by the conjugate.
"""

import math

import torch
from torch import Tensor

THETA = 2.0**16
ROWS = 256  # the cached table grows in steps of this many positions


class Rotation:
    """Rotation factors by position and pair; the table of the first positions is computed once and cached."""

    def __init__(self, neurons: int):
        self.neurons = neurons
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def table(self, start: int, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the factors of positions start, ..., start + length - 1, complex (length, N / 2).

        They are complex128 for neurons of dtype float64, otherwise complex64. For start > 0 this is the table from 0
        times the row `start`, because phases add.
        """
        dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
        if length == 1 and start:
            return self._factors(start, 1, dtype).to(device)
        table = self._tables.get((device, dtype))
        if table is None or len(table) < length:
            table = self._tables[device, dtype] = self._factors(0, -(-length // ROWS) * ROWS, dtype).to(device)
        return table[:length] * self._factors(start, 1, dtype).to(device) if start else table[:length]

    def _factors(self, start: int, length: int, dtype: torch.dtype) -> Tensor:
        pair = torch.arange(0, self.neurons, 2, dtype=torch.float32)
        cycles = 1.0 / (THETA ** (pair / self.neurons)) / (2 * math.pi)  # per pair; float32 as published
        factors = torch.empty(length, self.neurons // 2, dtype=dtype)
        for row in range(0, length, ROWS):  # in blocks, because float64 needs four times the memory
            position = torch.arange(start + row, start + min(row + ROWS, length), dtype=torch.float64)
            angle = (position[:, None] * cycles.double() % 1.0) * (2 * math.pi)
            factors[row:row + ROWS] = torch.polar(torch.ones_like(angle), angle).to(dtype)
        return factors


def rotate(x: Tensor, factors: Tensor) -> Tensor:
    """Rotate x (..., T, N) by factors (T, N / 2), in float32 or float64; differentiable."""
    return torch.view_as_real(_pairs(x) * factors).flatten(-2)


def rotate_into(out: Tensor, x: Tensor, factors: Tensor) -> Tensor:
    """Write `rotate(x, factors)` to `out` (..., T, N), float32 or float64, and return it."""
    torch.mul(_pairs(x), factors, out=_pairs(out))
    return out


def _pairs(x: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
