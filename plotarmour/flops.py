"""Training compute by arithmetic alone: the FLOPs that a model's structure asks for.

Counted are matrix products, two FLOPs per multiply-add, in the formulas of `models/bdh.py` and `models/hf.py`:

    BDH, per pass       x, y and the decoder, 2·H·N·D each; scores 2·T·H·N, values 2·T·H·D
    GPT-2, per layer    four matrices of 12·D² together, 24·D²; scores and values 2·T·D each
    both, once          the unembedding, 2·D·V

BDH's weights are shared by its passes and work in each of them. Attention is counted in full, T keys for every query,
not halved for causality, as in PaLM's appendix B and in nanoGPT. Not counted: looking up embeddings, norms,
activations, softmax, rotation, biases.

These are model FLOPs, not hardware FLOPs: what backward recomputes in BDH's tiled form, the blocks above the diagonal
that it skips, and the one product it saves because its queries are its keys, change the time and not these numbers.

Source: Chowdhery et al. 2022 (PaLM), appendix B; Kaplan et al. 2020, section 2.1; nanoGPT's `estimate_mfu`.
"""

from plotarmour.models.bdh import BDHConfig
from plotarmour.models.hf import GPT2Config


def forward_flops_per_token(config: BDHConfig | GPT2Config, context_length: int) -> int:
    """Count the FLOPs of one token's forward pass in a full context.

    Args:
        config: shape of the model.
        context_length: T, tokens of a row: the keys of every query.

    Returns:
        FLOPs per token, all passes or layers and the unembedding.

    Raises:
        ValueError: a context below 1, or beyond GPT-2's positions.

    Example:
        BDH with 2 passes, D 4, 2 heads of N 8 and 5 tokens, T 3: H·N·D is 64 and H·(N + D) is 24, so a pass takes
        6 · 64 + 2 · 3 · 24 = 528; 2 · 528 + 2 · 4 · 5 = 1,096. GPT-2 with 2 layers, else the same: a layer takes
        24 · 16 + 4 · 3 · 4 = 432; 2 · 432 + 40 = 904.
    """
    _check(config, context_length)
    T, L, D, H, V = context_length, config.n_layer, config.n_embd, config.n_head, config.vocab_size
    if isinstance(config, BDHConfig):
        N = config.neurons_per_head
        level = 6 * H * N * D + 2 * T * H * (N + D)
    else:
        level = 24 * D**2 + 4 * T * D
    return L * level + 2 * D * V


def training_flops(config: BDHConfig | GPT2Config, context_length: int, tokens: int) -> int:
    """Count the model FLOPs of training: three times those of forward.

    Backward has two products for each one of forward, the gradients of both its sides.

    Args:
        config: shape of the model.
        context_length: tokens of a row; shorter rows are counted as full ones.
        tokens: that the model was trained on, those of every epoch.

    Returns:
        3 · forward FLOPs per token · tokens.

    Example:
        The GPT-2 of `forward_flops_per_token` and 1,000 tokens: 3 · 904 · 1,000 = 2,712,000.
    """
    return 3 * forward_flops_per_token(config, context_length) * tokens


def weights_used_per_token(config: BDHConfig | GPT2Config) -> int:
    """Count the weights that a token passes through, embeddings and unembedding aside.

    Returns:
        BDH: its weights, 3·H·N·D, once per pass. GPT-2: its weights, each once; biases and norms included.

    Example:
        BDH with 2 passes and 3 · 64 weights: 384.
    """
    return config.non_embedding_params * (config.n_layer if isinstance(config, BDHConfig) else 1)


def _check(config: BDHConfig | GPT2Config, context_length: int) -> None:
    if context_length < 1:
        raise ValueError(f"context_length = {context_length} must be at least 1")
    if isinstance(config, GPT2Config) and context_length > config.context_length:
        raise ValueError(f"context_length = {context_length} must be at most the {config.context_length} positions of "
                         "this GPT-2")
