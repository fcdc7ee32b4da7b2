"""The registry of kinds: nothing outside it, a model's own file and a recipe names a kind."""

import subprocess
import sys
from dataclasses import replace

import pytest

from plotarmour.cli import UserError
from plotarmour.config import load_recipe
from plotarmour.models import KINDS, Kind
from plotarmour.run import load_run, train_run

RECIPE = """
[data]
tokenizer = "bpe:400"
[training]
context_length = 24
rows_per_step = 2
micro_batch_size = 2
max_steps = 2
warmup_steps = 1
learning_rate = 1e-3
eval_tokens = 100
device = "cpu"
[bigram]
n_embd = 8
"""


@pytest.fixture
def bigram(monkeypatch, tmp_path):
    """A recipe of a third kind, registered by one entry."""
    monkeypatch.setitem(KINDS, "bigram", Kind("Bigram", ("#009E73",), "third_kind:BigramConfig", "third_kind:Bigram"))
    path = tmp_path / "bigram.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return load_recipe(str(path), "bigram")


def test_a_third_kind_needs_one_entry_and_a_recipe(bigram, token_files, tmp_path):
    """Guards: kinds that are also listed in config, figures or memory; a third one touched nine files."""
    final = train_run(bigram, token_files["train"], token_files["val"], tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert final.step == 2 and run.config.model == "bigram"
    assert run.info["core_params"] == run.model.config.core_params == 72


def test_a_kind_that_cannot_mask_stories_is_named_before_anything_is_written(bigram, token_files, tmp_path):
    """Guards: a mask that is silently off."""
    masked = replace(bigram, training=replace(bigram.training, mask_stories=True))
    with pytest.raises(UserError, match="^the model bigram cannot keep .* expected mask_stories=false, or"):
        train_run(masked, token_files["train"], token_files["val"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_third_kind_has_a_memory_plan(bigram):
    """Guards: a plan that only knows the kinds of this package, or takes GPT-2's for another model."""
    import torch

    from plotarmour.memory import plan_training
    plan = plan_training(bigram, 400, torch.float32, "cpu")
    weights = plan.parts["weights"]
    assert weights == 4 * bigram.model_config(400).params and plan.total > 4 * weights


def test_a_field_that_the_config_class_lacks_is_one_line(tmp_path):
    """Guards: a TypeError of a dataclass for a typo in a recipe."""
    path = tmp_path / "typo.toml"
    path.write_text(RECIPE.replace("[bigram]", "[bdh]") + "n_heads = 2\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"^recipe typo \(bdh\): unknown key 'n_heads' in \[bdh\] \(did you mean "):
        load_recipe(str(path), "bdh")


def test_the_registry_is_read_without_torch(root):
    """Guards: `--help` that takes seven seconds."""
    code = (f"import sys; sys.path.insert(0, {str(root)!r}); import plotarmour.config, plotarmour.models; "
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_recipe_is_checked_without_transformers(root):
    """Guards: six seconds before a mistake in a recipe is reported, most of them spent on importing transformers."""
    code = (f"import sys; sys.path.insert(0, {str(root)!r})\nfrom plotarmour.config import load_recipe\n"
            "from plotarmour.models import KINDS\n"
            "for kind in KINDS:\n    load_recipe('tiny', kind)\n"
            "sys.exit('transformers' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
