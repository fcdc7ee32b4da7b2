import dataclasses

import pytest

from plotarmour.cli import UserError
from plotarmour.config import AUTO, Auto, DataConfig, TrainingConfig, load_recipe, recipe_names, training_settings
from plotarmour.data.stories import SEPARATORS


@pytest.mark.parametrize("name", recipe_names())
def test_both_models_of_a_recipe_match_and_see_the_same_tokens(name):
    """Guards: a comparison of unequal sizes, batches or steps. Core parameters within 5 %, equal rows per step."""
    bdh, gpt2 = (load_recipe(name, model) for model in ("bdh", "gpt2"))
    sizes = [recipe.model_config(vocab_size=100).core_params for recipe in (bdh, gpt2)]
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


def test_every_way_to_make_stories_is_a_setting():
    """Guards: token files that no run can be trained on, because their header says what a recipe may not."""
    for stories in SEPARATORS:
        assert load_recipe("tiny", "bdh", [f"stories={stories}", "corpus_stories=0"]).data.stories == stories


def test_all_complaints_come_at_once():
    """Guards: fixing one setting only to meet the next complaint."""
    with pytest.raises(UserError) as caught:
        load_recipe("tiny", "bdh", ["micro_batch_size=0", "schedule=step", "beta1=1.5"])
    assert all(word in str(caught.value) for word in ("micro_batch_size = 0", "schedule = 'step'", "beta1 = 1.5"))
    with pytest.raises(UserError) as caught:
        load_recipe("tiny", "bdh", ["max_step=5", " learning_rate=fast", "n_embd"])  # as after "; " in a notebook
    assert all(word in str(caught.value) for word in ("did you mean 'max_steps'", "'fast' is not a number",
                                                      "expected key=value"))


@pytest.mark.parametrize(("override", "complaint"), [
    (f"max_steps={10**30}", "is too large"), ("max_steps=1e309", "is not a whole number"),
    ("learning_rate=1e309", "must be positive and finite"), ("tokenizer=a\0b", "tokenizer = 'a\\x00b' holds a NUL")])
def test_values_that_no_run_can_have_are_refused(override, complaint):
    """Guards: an OverflowError of numpy in the middle of a grid; a path with a NUL, which ends in a traceback."""
    with pytest.raises(UserError) as refused:
        load_recipe("tiny", "bdh", [override])
    assert complaint in str(refused.value)


@pytest.mark.parametrize(("name", "model", "message"), [("tyny", "bdh", "did you mean 'tiny'"),
                                                        ("tiny", "gpt", "did you mean 'gpt2'")])
def test_unknown_names_are_refused_with_the_nearest(name, model, message):
    """Guards: a KeyError as an answer to a typing mistake."""
    with pytest.raises(UserError, match=message):
        load_recipe(name, model)


def test_an_impossible_shape_is_refused_before_anything_is_built():
    """Guards: a size mismatch deep inside a matrix product."""
    with pytest.raises(UserError, match="must be divisible by n_head"):
        load_recipe("tiny", "gpt2", ["n_head=5"]).build_model(100)


@pytest.mark.parametrize(("overrides", "expected"), [
    ([], (4, 4, 1)), (["rows_per_step=8"], (8, 4, 2)), (["rows_per_step=6", "micro_batch_size=2"], (6, 2, 3)),
    (["micro_batch_size=1"], (4, 1, 4)), (["micro_batch_size=auto"], (4, 4, 1)),
    (["micro_batch_size=auto", "rows_per_step=12"], (12, 12, 1)),
])
def test_the_rows_of_a_step_are_those_asked_for_and_forward_passes_follow(overrides, expected):
    """Guards: a smaller micro-batch that silently changes the rows of a step; "auto" where a number is expected."""
    t = load_recipe("tiny", "bdh", overrides).training
    assert (t.rows_per_step, t.micro_batch_rows, t.grad_accum_steps) == expected
    assert (t.micro_batch_size == AUTO) == ("micro_batch_size=auto" in overrides)


@pytest.mark.parametrize(("overrides", "complaint"), [
    (["rows_per_step=6"], "rows_per_step = 6 is not a multiple of micro_batch_size = 4: set micro_batch_size to 3 or "),
    (["rows_per_step=2"], "rows_per_step = 2 is not a multiple of micro_batch_size = 4: set micro_batch_size to 2 or "),
    (["rows_per_step=0"], "rows_per_step = 0 must be at least 1"),
    (["micro_batch_size=auto", "rows_per_step=-4"], "rows_per_step = -4 must be at least 1"),
    (["rows_per_step=many"], "rows_per_step = 'many' is not a whole number"),
    (["rows_per_step=auto"], "rows_per_step = 'auto' is not a whole number"),
    (["rows_per_step=8", "micro_batch_size=0"], "micro_batch_size = 0 must be at least 1"),
    (["micro_batch_size=most"], "micro_batch_size = 'most' is not a whole number or \"auto\""),
    (["max_minutes=soon"], "max_minutes = 'soon' is not a number or \"auto\""),
    (["max_minutes=-1"], "max_minutes = -1.0 must not be negative"),
    (["schedule_minutes=-1"], "schedule_minutes = -1.0 must not be negative"),
    (["device=tpu"], "device = 'tpu' must be one of auto, cpu, cuda"),
    (["n_layer=0"], "n_layer = 0 must be at least 1"), (["dropout=nan"], "dropout = nan must be in [0, 1)"),
])
def test_what_cannot_be_is_complained_of_once(overrides, complaint):
    """Guards: rows that are dropped or padded to fit; three complaints about one mistake."""
    with pytest.raises(UserError) as caught:
        load_recipe("tiny", "bdh", overrides)
    assert str(caught.value).startswith(f"recipe tiny (bdh): {complaint}") and "; " not in str(caught.value)


def test_minutes_may_be_automatic():
    """Guards: "auto" that is compared with a number; -1 as another word for it."""
    for overrides, expected in ([], AUTO), (["max_minutes=auto"], AUTO), (["max_minutes=0"], 0.0), (
            ["max_minutes=90"], 90.0):
        assert load_recipe("tiny", "bdh", overrides).training.max_minutes == expected
    assert load_recipe("tiny", "bdh", ["schedule_minutes=30"]).training.schedule_minutes == 30.0


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_setting_may_be_endless_or_no_number(value):
    """Guards: a learning rate of NaN, of which every comparison is false; a schedule that never ends."""
    keys = [f.name for f in dataclasses.fields(TrainingConfig) if f.type in (float, float | Auto)]
    assert len(keys) == 11
    with pytest.raises(UserError) as caught:
        load_recipe("tiny", "bdh", [f"{key}={value}" for key in keys])
    assert all(f"{key} = {value} must " in str(caught.value) for key in keys)


@pytest.mark.parametrize("value", [0, -3])
def test_sizes_below_one_are_all_told_at_once(value):
    """Guards: a division by zero hours later; a loop that does nothing; fixing one size only to meet the next."""
    keys = ["context_length", "rows_per_step", "micro_batch_size", "max_steps", "log_interval", "eval_interval",
            "eval_tokens", "checkpoint_interval", "n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier"]
    with pytest.raises(UserError) as caught:
        load_recipe("tiny", "bdh", [f"{key}={value}" for key in keys])
    assert str(caught.value).count("must be at least 1") == len(keys)
    assert all(f"{key} = {value} must be at least 1" in str(caught.value) for key in keys)


OWN = """
[data]
tokenizer = "bytes"
[training]
context_length = 8
max_steps = 5
warmup_steps = 1
learning_rate = 1
{training}
[bdh]
n_layer = 1
n_embd = 4
n_head = 1
mlp_internal_dim_multiplier = 2
dropout = 0
{more}
"""


def test_a_recipe_of_ones_own_may_say_rows_and_auto(tmp_path):
    """Guards: settings that are understood on the command line only; a dropout that can never be but whole."""
    path = tmp_path / "own.toml"
    path.write_text(OWN.format(training='rows_per_step = 6\nmicro_batch_size = "auto"\nmax_minutes = "auto"',
                               more="[bdh.training]\nrows_per_step = 4"))
    recipe = load_recipe(str(path), "bdh", ["dropout=0.1"])
    assert (recipe.training.rows_per_step, recipe.training.micro_batch_size) == (4, AUTO)
    assert recipe.architecture["dropout"] == 0.1 and recipe.training.learning_rate == 1.0
    split = load_recipe(str(path), "bdh", ["micro_batch_size=2"]).training
    assert (split.micro_batch_size, split.grad_accum_steps) == (2, 2)


@pytest.mark.parametrize(("training", "more", "complaint"), [
    ('micro_batch_size = "auto"', "", "recipe own (bdh): rows_per_step is missing in [training]."),
    ("rows_per_step = 6", "", "recipe own (bdh): micro_batch_size is missing in [training]."),
    ("rows_per_step = 2\nmicro_batch_size = 2", "bias = true", "recipe own (bdh): unknown key 'bias' in [bdh]."),
    ("", "[trainig]\nseed = 1", "unknown section or key 'trainig' (did you mean 'training'?); expected keys in the "),
    ("", "[gpt]\n[bdh.training]\n", "unknown section or key 'gpt'"),
    ("", 'training = "text"', "training in [bdh] is not a section"),
])
def test_a_recipe_of_ones_own_that_is_wrong_is_told_so_once(tmp_path, training, more, complaint):
    """Guards: a section that nobody reads because of a typing mistake; a traceback; what follows called missing."""
    path = tmp_path / "own.toml"
    path.write_text(OWN.format(training=training, more=more))
    with pytest.raises(UserError) as caught:
        load_recipe(str(path), "bdh")
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


# Every training setting, by what may change: a run continues with another value of these ...
HOW_TO_COMPUTE = {"micro_batch_size", "log_interval", "checkpoint_interval", "keep_every", "max_minutes", "device"}
WITH_EXTEND = {"max_steps", "schedule_minutes", "patience"}  # ... or of these, if the user says --extend
SAME_ARM = {"seed", "dtype"}  # only with the same value; runs of one arm may differ in it
RECIPE = {"context_length", "rows_per_step", "learning_rate", "windows", "schedule", "warmup_steps",
          "final_learning_rate_fraction", "decay_fraction", "optimizer", "keep_norm", "head_rate_fraction",
          "embedding_rate_fraction", "weight_decay", "beta1", "beta2", "grad_clip", "eval_interval",
          "eval_tokens", "mask_stories"}


def test_every_setting_is_classified():
    """Guards: a new setting that silently makes every run another run; lists of names that drift apart."""
    fields = {f.name: f for config in (DataConfig, TrainingConfig) for f in dataclasses.fields(config)}
    for name, field in fields.items():
        assert field.metadata.get("doc", "").endswith("."), f"{name}: expected a field made by config._field"
    assert set(f.name for f in dataclasses.fields(TrainingConfig)) == HOW_TO_COMPUTE | WITH_EXTEND | SAME_ARM | RECIPE
    assert set(training_settings("identity")) == WITH_EXTEND | SAME_ARM | RECIPE
    assert set(training_settings("arm")) == WITH_EXTEND | RECIPE
    assert set(training_settings("extendable")) == WITH_EXTEND


@pytest.mark.parametrize(("name", "overrides", "key"), [
    ("laptop", ["decay_fraction=0.5"], "decay_fraction"), ("tiny", ["schedule=cosine", "decay_fraction=0.35"],
                                                           "decay_fraction"),
    ("laptop", ["corpus_seed=3"], "corpus_seed"), ("tiny", ["corpus_stories=0", "corpus_max_events=9"],
                                                   "corpus_max_events"),
    ("laptop", ["windows=full", "mask_stories=true"], "mask_stories")])
def test_a_setting_without_effect_is_warned_of(name, overrides, key, warned):
    """Guards: an experiment with a setting that changes nothing, which then "makes no difference"."""
    with warned(f"^{key} is ignored: it has an effect only where ") as messages:
        load_recipe(name, "bdh", overrides)
    assert len(messages) == 1


def test_a_recipe_that_sets_what_has_no_effect_is_warned_of_unless_it_is_the_default(tmp_path, warned):
    """Guards: a line of a recipe that does nothing; warnings about a recipe that spells out a default."""
    path = tmp_path / "own.toml"
    rows = "rows_per_step = 2\nmicro_batch_size = 2\n"
    path.write_text(OWN.format(training=rows + "decay_fraction = 0.35", more=""))
    load_recipe(str(path), "bdh")
    path.write_text(OWN.format(training=rows + "decay_fraction = 0.4", more=""))
    with warned("decay_fraction is ignored"):
        load_recipe(str(path), "bdh")


@pytest.mark.parametrize("value", ["1e309", "9" * 400, "-" + "9" * 400, "9" * 5000, "2026-13-45", "[" * 3000])
def test_a_number_that_cannot_be_is_one_line(tmp_path, value):
    """Guards: a traceback about an overflow, digits or recursion, out of a recipe or of --set."""
    path = tmp_path / "own.toml"
    for name in ("seed", "weight_decay"):
        path.write_text(OWN.format(training=f"rows_per_step = 2\nmicro_batch_size = 2\n{name} = {value}", more=""))
        for recipe, overrides in ((str(path), []), ("tiny", [f"{name}={value}"])):
            with pytest.raises(UserError) as refused:
                load_recipe(recipe, "bdh", overrides)
            assert "\n" not in str(refused.value)


def test_a_recipe_that_is_no_toml_is_refused(tmp_path):
    """Guards: a traceback about a byte or a type."""
    path = tmp_path / "own.toml"
    for content, complaint in ((b"\xff\xfe", "is not TOML: 'utf-8' codec"), (b"data", "is not TOML: Expected"),
                               (b"data = 1" + b"0" * 5000, "is not TOML: Exceeds the limit"),
                               (b"data = " + b"[" * 3000, "is not TOML: maximum recursion"),
                               (b"data = 2026-02-30", "is not TOML: Invalid date"),
                               (b"data = 1", r"the section \[data\] is missing; the section \[training\] is missing")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=complaint):
            load_recipe(str(path), "bdh")


def test_a_line_break_in_an_override_stays_in_one_line():
    """Guards: an error of two lines for a value that was pasted."""
    with pytest.raises(UserError) as refused:
        load_recipe("tiny", "bdh", ["no\nkey=1"])
    assert "--set no key=1" in str(refused.value) and "\n" not in str(refused.value)
