import pytest

from plotarmour.config import load_recipe, recipe_names
from plotarmour.errors import UserError
from plotarmour.machine import dtype_for
from plotarmour.shapes import build_model, model_config


@pytest.mark.parametrize("name", recipe_names())
def test_both_models_of_a_recipe_match_and_see_the_same_tokens(name):
    """Guards: a comparison of unequal sizes, batches or steps. Core parameters within 5 %, equal rows per step."""
    bdh, gpt2 = (load_recipe(name, model) for model in ("bdh", "gpt2"))
    sizes = [model_config(recipe, vocab_size=100).non_embedding_params for recipe in (bdh, gpt2)]
    assert abs(sizes[0] / sizes[1] - 1) < 0.05
    for key in ("context_length", "rows_per_step", "max_steps", "seed", "windows", "eval_tokens"):
        assert getattr(bdh.training, key) == getattr(gpt2.training, key), key
    assert bdh.data == gpt2.data


def test_a_recipe_states_its_arithmetic_and_outcome():
    """Guards: recipes that are bare numbers."""
    from plotarmour.config import RECIPES

    for name in recipe_names():
        comment = (RECIPES / f"{name}.toml").read_text(encoding="utf-8").split("[data]")[0]
        assert "3 · " in comment and "Steps" in comment and "Batch" in comment, name


def test_overrides_reach_data_training_and_architecture():
    """Guards: an override that is parsed and ignored."""
    recipe = load_recipe("tiny", "bdh", ["max_steps=500", "n_embd=32", "learning_rate=1e-3", "tokenizer=bytes"])
    assert (recipe.training.max_steps, recipe.architecture["n_embd"]) == (500, 32)
    assert (recipe.training.learning_rate, recipe.data.tokenizer) == (1e-3, "bytes")


def test_all_complaints_come_at_once():
    """Guards: fixing one setting only to meet the next complaint."""
    with pytest.raises(UserError) as caught:
        load_recipe("tiny", "bdh", ["micro_batch_size=0", "schedule=step", "beta1=1.5"])
    assert all(word in str(caught.value) for word in ("micro_batch_size = 0", "schedule = 'step'", "beta1 = 1.5"))
    with pytest.raises(UserError) as caught:
        load_recipe("tiny", "bdh", ["max_step=5", "learning_rate=fast", "n_embd"])
    assert all(word in str(caught.value) for word in ("did you mean 'max_steps'", "'fast' is not a number",
                                                      "expected key=value"))


@pytest.mark.parametrize(("name", "model", "message"), [("tyny", "bdh", "did you mean 'tiny'"),
                                                        ("tiny", "gpt", "did you mean 'gpt2'")])
def test_unknown_names_are_refused_with_the_nearest(name, model, message):
    """Guards: a KeyError as an answer to a typing mistake."""
    with pytest.raises(UserError, match=message):
        load_recipe(name, model)


def test_an_impossible_shape_is_refused_before_anything_is_built():
    """Guards: a size mismatch deep inside a matrix product."""
    with pytest.raises(UserError, match="must be divisible by n_head"):
        build_model(load_recipe("tiny", "gpt2", ["n_head=5"]), 100)


def test_dtype_goes_by_capability():
    """Guards: a T4 sent to bfloat16, because `is_bf16_supported` says True there."""
    names = [str(dtype_for(*sm)[0]) for sm in ((5, 2), (6, 0), (7, 5), (8, 0), (9, 0))]
    assert names == ["torch.float32", "torch.float16", "torch.float16", "torch.bfloat16", "torch.bfloat16"]
