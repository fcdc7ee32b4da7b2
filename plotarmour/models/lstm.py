"""LSTM (Hochreiter & Schmidhuber 1997): torch's own, behind the protocol of `plotarmour.models`.

    v = dropout(embedding)                      (B, T, D)
    h = LSTM(v)                                 n_layer layers of width hidden_size, (B, T, H), dropout between them
    features = dropout(h) · projection          (B, T, D)
    logits = features · head                    the head is tied to the embedding, or not
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from plotarmour.models import ModelConfig, State, check_dimensions, check_ids, check_state, story_starts


@dataclass(frozen=True)
class LSTMConfig(ModelConfig):
    """Hyperparameters of an LSTM."""

    n_layer: int = 2
    n_embd: int = 256
    hidden_size: int = 1024
    vocab_size: int = 50257
    dropout: float = 0.1
    tied_head: bool = True

    def __post_init__(self):
        check_dimensions(self)

    @property
    def matrices(self) -> int:
        """Number of weights in matrices: 4·H·(inputs + H) per layer, where the first layer has D inputs, and H·D."""
        D, H = self.n_embd, self.hidden_size
        return 4 * H * (D + H) + (self.n_layer - 1) * 8 * H**2 + H * D

    @property
    def core_params(self) -> int:
        """Number of parameters in matrices, and of two biases for each of four gates per layer."""
        return self.matrices + self.n_layer * 8 * self.hidden_size

    def flops_per_token(self, context_length: int) -> int:
        """Return the forward FLOPs per token (`ModelConfig.flops_per_token`): 2 per weight in a matrix, 2·D·V."""
        return 2 * self.matrices + 2 * self.n_embd * self.vocab_size

    def activation_bytes(self, batch_size: int, length: int, dtype: torch.dtype, device: str) -> int:
        """Return about how many bytes torch's LSTM holds in backward (`ModelConfig.activation_bytes`), in float32.

        As measured on a CPU: 20 values per layer, token and unit (gates and states, their gradients and copies).
        """
        return 4 * batch_size * length * (self.n_layer * 20 * self.hidden_size + 6 * self.n_embd)


@dataclass
class LSTMState(State):
    """The state after some tokens; its size does not depend on their number."""

    hidden: Tensor  # (n_layer, B, hidden_size)
    cell: Tensor  # the same shape
    position: int = 0

    @property
    def layout(self) -> tuple:
        return "LSTMState", tuple(self.hidden.shape), self.hidden.dtype, self.hidden.device

    def tensors(self) -> dict[str, Tensor]:
        return {"hidden": self.hidden, "cell": self.cell, "position": torch.tensor(self.position)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "LSTMState":
        return cls(tensors["hidden"], tensors["cell"], int(tensors["position"]))


class LSTM(nn.Module):
    """An LSTM behind the protocol `plotarmour.models.LanguageModel`."""

    context_length = None  # any length works
    story_start: int | None = None
    penalty = None

    def __init__(self, config: LSTMConfig):
        super().__init__()
        self.config, c = config, config
        self.embed = nn.Embedding(c.vocab_size, c.n_embd)
        self.layers = nn.LSTM(c.n_embd, c.hidden_size, c.n_layer, batch_first=True,
                              dropout=c.dropout if c.n_layer > 1 else 0.0)
        self.projection = nn.Linear(c.hidden_size, c.n_embd, bias=False)
        nn.init.normal_(self.embed.weight, std=0.1)  # with 0.02 the gates hardly see the token, and learning is slow
        self.lm_head = None if c.tied_head else nn.Parameter(torch.empty(c.vocab_size, c.n_embd).normal_(std=0.02))

    @property
    def unembedding(self) -> Tensor:
        """The (vocab_size, n_embd) matrix that gives logits."""
        return self.embed.weight if self.lm_head is None else self.lm_head

    def initial_state(self, batch_size: int) -> LSTMState:
        """Return the state before the first token: zeros."""
        c, weight = self.config, self.embed.weight
        hidden, cell = weight.new_zeros(2, c.n_layer, batch_size, c.hidden_size)
        return LSTMState(hidden, cell.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        """Map token ids, int64 (B, T), to logits (B, T, vocab_size)."""
        return self.features(inputs)[0] @ self.unembedding.T

    def features(self, inputs: Tensor, state: LSTMState | None = None) -> tuple[Tensor, LSTMState | None]:
        """Map token ids to features (`LanguageModel.features`)."""
        c, weight = self.config, self.embed.weight
        check_ids(inputs, c.vocab_size, self.training)
        if state is not None:
            check_state(state, ("LSTMState", (c.n_layer, len(inputs), c.hidden_size), weight.dtype, weight.device))
        v = F.dropout(self.embed(inputs), c.dropout, self.training)
        with torch.autocast(v.device.type, enabled=False):  # not every CPU has an LSTM in half precision
            starts = story_starts(inputs, self.story_start, state)
            if starts is None:
                h, after = self.layers(v, None if state is None else (state.hidden, state.cell))
            else:
                h = self._by_story(v, starts)
        features = self.projection(F.dropout(h, c.dropout, self.training))
        return features, None if state is None else LSTMState(*after, state.position + inputs.shape[1])

    def _by_story(self, v: Tensor, starts: Tensor) -> Tensor:
        """Return h (B, T, H) of stories that are sequences of their own, each from a state of zeros.

        A `PackedSequence` has the first token of each story, longer stories first, then the second of each, and so on.
        """
        starts = F.pad(starts[:, 1:], (1, 0), value=True).flatten()  # a row begins a sequence, too
        story = starts.cumsum(0) - 1
        place = torch.arange(len(starts), device=v.device) - starts.nonzero().squeeze(1)[story]
        rank = story.bincount().argsort(descending=True).argsort()
        order = (place * len(rank) + rank[story]).argsort()
        packed = PackedSequence(v.flatten(0, 1)[order], place.bincount().cpu())
        return self.layers(packed)[0].data[order.argsort()].unflatten(0, v.shape[:2])
