import pytest
import torch
from transformers import GPT2Config as HFConfig
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from plotarmour.loss import summed_nats
from plotarmour.models.hf import CacheState, HFModel
from plotarmour.models.hf_kinds import GPT2Config


def test_loss_equals_that_of_transformers():
    """Guards: targets shifted twice. `transformers` shifts inside its own loss; ours takes shifted targets."""
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(HFConfig(vocab_size=97, n_positions=48, n_embd=32, n_layer=3, n_head=4, resid_pdrop=0.0,
                                     embd_pdrop=0.0, attn_pdrop=0.0, loss_type="ForCausalLM"))
    ours = HFModel(GPT2Config(3, 32, 4, vocab_size=97, context_length=48, dropout=0.0))
    ours.hf.load_state_dict(plain.state_dict())
    ids = torch.randint(0, 97, (3, 40))
    expected = plain(input_ids=ids, labels=ids).loss
    found = summed_nats(ours.features(ids[:, :-1])[0], ours.unembedding, ids[:, 1:]) / (3 * 39)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_more_tokens_than_positions_are_refused():
    """Guards: an index error deep inside the position table."""
    model = HFModel(GPT2Config(1, 8, 1, vocab_size=10, context_length=4))
    with pytest.raises(ValueError, match="5 tokens, but this model has 4 positions"):
        model.features(torch.zeros(1, 5, dtype=torch.int64))


@torch.no_grad()
def test_positions_that_the_past_has_used_up_are_counted():
    """Guards: an index error at the first token beyond the table, with half of the layers written."""
    model = HFModel(GPT2Config(1, 8, 1, vocab_size=10, context_length=4)).eval()
    _, state = model.features(torch.zeros(1, 3, dtype=torch.int64), model.initial_state(1))
    with pytest.raises(ValueError, match="5 tokens, but this model has 4 positions"):
        model.features(torch.zeros(1, 2, dtype=torch.int64), state)
    _, state = model.features(torch.zeros(1, 1, dtype=torch.int64), state)
    assert state.position == 4


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_state_goes_on_only_under_the_autocast_that_made_it(dtype):
    """Guards: a cache of half and float32 keys side by side, which grows to float32 without a word."""
    model = HFModel(GPT2Config(2, 16, 2, vocab_size=50, context_length=64, dropout=0.0)).eval()
    inputs, states = torch.randint(0, 50, (2, 12)), {}
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            _, states[enabled] = model.features(inputs[:, :4], model.initial_state(2))
            features, _ = model.features(inputs[:, 4:], states[enabled].copy())
            whole = model.features(inputs)[0][:, 4:]
        assert states[enabled].tensors()["keys.1"].dtype == (dtype if enabled else torch.float32)
        torch.testing.assert_close(features, whole, rtol=0.0, atol=0.05 if enabled else 1e-5)
    for enabled in (False, True):
        refusal = pytest.raises(ValueError, match="CacheState .* device and autocast setting")
        with torch.autocast("cpu", dtype=dtype, enabled=enabled), refusal:
            model.features(inputs[:, 4:], states[not enabled])


@torch.no_grad()
def test_autocast_leaves_a_float64_models_state_alone():
    """Guards: a state refused by the very model that made it: autocast does not touch float64."""
    model = HFModel(GPT2Config(2, 16, 2, vocab_size=50, context_length=64, dropout=0.0)).double().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, state = model.features(torch.zeros(1, 3, dtype=torch.int64), model.initial_state(1))
        assert model.features(torch.zeros(1, 3, dtype=torch.int64), state)[1].position == 6


def test_attention_goes_through_sdpa():
    """Guards: the slow path that holds (B, heads, T, T) in memory."""
    assert HFModel(GPT2Config(1, 8, 1, vocab_size=10, context_length=4)).hf.config._attn_implementation == "sdpa"


class TinyLlama:
    """What `HFModel` needs of a config."""

    vocab_size = 50

    def build_hf(self):
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=6, attn_implementation="sdpa", bos_token_id=None, eos_token_id=None))


@torch.no_grad()
def test_another_class_of_transformers_needs_a_config_only():
    """Guards: a wrapper that knows GPT-2's names, its limit of positions, or as many heads of keys as of queries."""
    torch.manual_seed(0)
    model, inputs = HFModel(TinyLlama()).eval(), torch.randint(0, 50, (3, 40))
    torch.testing.assert_close(model(inputs), model.hf(inputs).logits)
    state, pieces = model.initial_state(3), []
    for piece in inputs.split([7, 1, 32], dim=1):
        features, state = model.features(piece, CacheState.from_tensors(state.tensors()))
        pieces.append(features)
    torch.testing.assert_close(torch.cat(pieces, 1), model.features(inputs)[0], rtol=1e-4, atol=1e-5)
    assert state.shape == (3, 2, 2, 6) and state.tensors()["keys.1"].shape == (3, 2, 40, 6)
    assert model.context_length is None
