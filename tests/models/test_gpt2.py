import pytest
import torch
from transformers import GPT2Config as HFConfig
from transformers import GPT2LMHeadModel

from plotarmour.loss import summed_nats
from plotarmour.models.gpt2 import GPT2, GPT2Config


def test_loss_equals_that_of_transformers():
    """Guards: targets shifted twice. `transformers` shifts inside its own loss; ours takes shifted targets."""
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(HFConfig(vocab_size=97, n_positions=48, n_embd=32, n_layer=3, n_head=4, resid_pdrop=0.0,
                                     embd_pdrop=0.0, attn_pdrop=0.0, loss_type="ForCausalLM"))
    ours = GPT2(GPT2Config(3, 32, 4, vocab_size=97, context_length=48, dropout=0.0))
    ours.hf.load_state_dict(plain.state_dict())
    ids = torch.randint(0, 97, (3, 40))
    expected = plain(input_ids=ids, labels=ids).loss
    found = summed_nats(ours.features(ids[:, :-1])[0], ours.unembedding, ids[:, 1:]) / (3 * 39)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_more_tokens_than_positions_are_refused():
    """Guards: an index error deep inside the position table."""
    model = GPT2(GPT2Config(1, 8, 1, vocab_size=10, context_length=4))
    with pytest.raises(ValueError, match="5 tokens, but this GPT-2 has 4 positions"):
        model.features(torch.zeros(1, 5, dtype=torch.int64))


def test_attention_goes_through_sdpa():
    """Guards: the slow path that holds (B, heads, T, T) in memory."""
    assert GPT2(GPT2Config(1, 8, 1, vocab_size=10, context_length=4)).hf.config._attn_implementation == "sdpa"
