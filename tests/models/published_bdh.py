"""BDH as its formula stands in the paper (arXiv 2509.26507) and in the official code, operation for operation.

The reference of the tests and the other side of the benchmarks. It imports nothing of the package, keeps every
(B, H, T, N) tensor, computes phases, cosines and sines in every pass, and continues a text by a forward pass over all
of it. Parameters have the official names, so a state dict of `plotarmour.models.bdh.BDH` loads into it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PublishedBDH(nn.Module):
    def __init__(self, n_layer: int, n_embd: int, n_head: int, multiplier: int, vocab_size: int, dropout: float = 0.0):
        super().__init__()
        self.n_layer, self.width, neurons = n_layer, n_embd, multiplier * n_embd // n_head
        self.encoder = nn.Parameter(0.02 * torch.randn(n_head, n_embd, neurons))
        self.encoder_v = nn.Parameter(0.02 * torch.randn(n_head, n_embd, neurons))
        self.decoder = nn.Parameter(0.02 * torch.randn(n_head * neurons, n_embd))
        self.lm_head = nn.Parameter(0.02 * torch.randn(n_embd, vocab_size))
        self.embed, self.drop = nn.Embedding(vocab_size, n_embd), nn.Dropout(dropout)
        pair = torch.arange(neurons, dtype=torch.float32) // 2 * 2
        self.register_buffer("cycles", 1 / 2.0 ** (16 * pair / neurons) / (2 * math.pi), persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        """rope(x): pairs of neurons turned by their position."""
        phases = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * self.cycles
        angle = (phases % 1) * (2 * math.pi)
        quarter = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
        return (x * angle.cos()).to(x.dtype) + (quarter * angle.sin()).to(x.dtype)

    def features(self, inputs: Tensor) -> Tensor:
        """(B, T) ids to (B, T, n_embd)."""
        v = self.normal(self.embed(inputs)).unsqueeze(1)
        for _ in range(self.n_layer):
            x = F.relu(v @ self.encoder)
            q = self.turned(x)
            a = (q @ q.mT).tril(diagonal=-1) @ v
            y = F.relu(self.normal(a) @ self.encoder_v)
            gated = self.drop(x * y).transpose(1, 2).flatten(2).unsqueeze(1)
            v = self.normal(v + self.normal(gated @ self.decoder))
        return v.squeeze(1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.features(inputs) @ self.lm_head

    def normal(self, v: Tensor) -> Tensor:
        return F.layer_norm(v, (self.width,))
