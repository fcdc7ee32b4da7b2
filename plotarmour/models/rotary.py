"""Rotary position of BDH: pairs of neurons (2i, 2i + 1) turn by their own frequency, as one complex product.

A pair is read as the complex number x[2i] + i·x[2i+1]; at position t it is multiplied by exp(2πi · t · f_i), where
f_i = theta^(-2i / N) / 2π cycles per position. The products t · f_i are made and reduced in float64, so phases are
exact to 10^6 positions and more. Turning back is a product with the conjugate.
"""

import math

import torch
from torch import Tensor

THETA = 2.0**16
ROWS = 256  # the kept table holds a multiple of so many positions


class Rotation:
    """Unit complex numbers of positions and pairs; the table of positions 0, 1, 2, ... is made once and kept."""

    def __init__(self, neurons: int):
        self.neurons = neurons
        self._kept: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def table(self, start: int, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the factors of positions start, ..., start + length - 1.

        Args:
            start: first position.
            length: number of positions.
            device: where.
            dtype: of the neurons; float64 gives complex128, all others complex64.

        Returns:
            Complex (length, N / 2). From a start other than 0 it is row 'start' times the kept table: phases add.
        """
        exact = torch.complex128 if dtype == torch.float64 else torch.complex64
        if length == 1 and start:
            return self._factors(start, 1, exact).to(device)
        kept = self._kept.get((device, exact))
        if kept is None or len(kept) < length:
            kept = self._factors(0, -(-length // ROWS) * ROWS, exact).to(device)
            self._kept[device, exact] = kept
        return kept[:length] * self._factors(start, 1, exact).to(device) if start else kept[:length]

    def _factors(self, start: int, length: int, dtype: torch.dtype) -> Tensor:
        pair = torch.arange(0, self.neurons, 2, dtype=torch.float32)
        cycles = 1.0 / (THETA ** (pair / self.neurons)) / (2 * math.pi)  # float32, as published; one per pair
        factors = torch.empty(length, self.neurons // 2, dtype=dtype)
        for row in range(0, length, ROWS):  # in pieces: float64 in between is four times what stays
            position = torch.arange(start + row, start + min(row + ROWS, length), dtype=torch.float64)
            angle = (position[:, None] * cycles.double() % 1.0) * (2 * math.pi)
            factors[row:row + ROWS] = torch.polar(torch.ones_like(angle), angle).to(dtype)
        return factors


def rotate(x: Tensor, factors: Tensor) -> Tensor:
    """Turn x (..., T, N) by factors (T, N / 2); float32 or wider. Differentiable."""
    return torch.view_as_real(_pairs(x) * factors).flatten(-2)


def rotate_into(out: Tensor, x: Tensor, factors: Tensor) -> Tensor:
    """As `rotate`, into `out` (..., T, N), float32 or wider. Returns it."""
    torch.mul(_pairs(x), factors, out=_pairs(out))
    return out


def _pairs(x: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
