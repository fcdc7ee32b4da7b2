"""A throw-away third kind of model: the least that training and scoring need.

It predicts from the last token alone. Generation also needs `initial_state`.
"""

from dataclasses import dataclass

from torch import nn

from plotarmour.models import ModelConfig


@dataclass(frozen=True)
class BigramConfig(ModelConfig):
    n_embd: int = 8
    vocab_size: int = 256

    tied_head = True

    @property
    def core_params(self) -> int:
        return self.n_embd**2 + self.n_embd

    def flops_per_token(self, context_length: int) -> int:
        return 2 * self.n_embd**2 + 2 * self.n_embd * self.vocab_size

    def activation_bytes(self, batch_size: int, length: int, dtype, device: str) -> int:
        return 4 * 4 * batch_size * length * self.n_embd


class Bigram(nn.Module):
    context_length = None
    penalty = None

    def __init__(self, config: BigramConfig):
        super().__init__()
        self.config, self.embed = config, nn.Embedding(config.vocab_size, config.n_embd)
        self.core = nn.Linear(config.n_embd, config.n_embd)

    @property
    def unembedding(self):
        return self.embed.weight

    def features(self, inputs, state=None):
        return self.core(self.embed(inputs)), state

    def forward(self, inputs):
        return self.features(inputs)[0] @ self.unembedding.T
