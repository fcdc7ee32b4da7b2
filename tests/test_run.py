import dataclasses
from pathlib import Path

import pytest

from contrib.import_bin import import_bin
from plotarmour import run as runs
from plotarmour.cli import UserError
from plotarmour.config import load_recipe
from plotarmour.data.pretokenize import pre_tokenize
from plotarmour.data.token_file import TokenFile
from plotarmour.data.tokenizer import make_tokenizer
from plotarmour.evaluation.scoring import evaluate_run, story_tokens
from plotarmour.run import load_run, train_run

SEPARATOR = "\n<|endoftext|>\n"


@pytest.fixture
def overlapping(token_files, tmp_path):
    """A validation text of which one story of five stands in the training text, and its token file."""
    data = TokenFile.open(token_files["train"])
    made = data.tokenizer()
    text = tmp_path / "val.txt"
    text.write_text(SEPARATOR.join(["A new tale."] * 3 + [made.decode(data.story(7)), "And the last one."]))
    return text, *pre_tokenize([text], str(token_files["train"]), tmp_path / "val.bin")


def test_a_validation_set_that_stands_in_the_training_set_is_refused(token_files, overlapping, small_recipe, tmp_path):
    """Guards: choices that rest on memorised stories."""
    _, val = overlapping
    with pytest.raises(UserError) as refused:
        train_run(small_recipe, token_files["train"], val, tmp_path / "run")
    message = str(refused.value)
    assert "1 of 5 stories" in message and "first: story 3, there story 7" in message and "--exclude" in message
    assert "\n" not in message and not (tmp_path / "run").exists()


def test_a_run_on_imported_ids_is_loaded_again(token_files, tmp_path):
    """Guards: a run.json that says of its stories what no recipe may say, and is refused as damaged."""
    for part in ("train", "val"):
        TokenFile.open(token_files[part]).tokens.astype("<u2").tofile(tmp_path / part)
        import_bin(tmp_path / part, str(token_files["train"]), tmp_path / f"{part}.bin", "uint16")
    recipe = load_recipe("tiny", "gpt2", ["max_steps=1", "warmup_steps=0", "n_embd=16", "eval_tokens=100"])
    train_run(recipe, tmp_path / "train.bin", tmp_path / "val.bin", tmp_path / "run")
    assert load_run(tmp_path / "run").step == 1


def test_texts_are_looked_through_too(token_files, overlapping, small_recipe, tmp_path, warned):
    """Guards: a text instead of a token file as a way around the check."""
    text, _ = overlapping
    with warned("tokenized at every start"), pytest.raises(UserError, match="1 of 5 stories"):
        train_run(small_recipe, token_files["text"], text, tmp_path / "run", tokenizer=str(token_files["train"]))
    with warned(), pytest.raises(UserError, match="is the training text itself"):
        train_run(small_recipe, text, text, tmp_path / "run", tokenizer=str(token_files["train"]))
    with pytest.raises(UserError, match="name a --tokenizer that exists"):
        train_run(small_recipe, token_files["text"], text, tmp_path / "run", tokenizer="bpe:300")
    assert not (tmp_path / "run").exists()


def test_of_a_complete_run_nothing_is_built_and_searched(token_files, overlapping, small_recipe, tmp_path, monkeypatch):
    """Guards: a minute of work, and a model in memory, to find out that there is nothing to do."""
    [whole] = pre_tokenize([token_files["text"]], str(token_files["train"]), tmp_path / "whole.bin")
    [other] = pre_tokenize([overlapping[0]], str(token_files["train"]), tmp_path / "other.bin")
    monkeypatch.setattr(runs, "overlapping_stories", lambda *files: [])
    ending = train_run(small_recipe, whole, other, tmp_path / "run")
    for module, name in ((runs, "overlapping_stories"), (runs, "Windows"), (type(small_recipe), "build_model")):
        monkeypatch.setattr(module, name, lambda *args: pytest.fail("there is nothing to do"))
    assert train_run(small_recipe, whole, other, tmp_path / "run") == ending


@pytest.mark.parametrize(("content", "message"), [
    (b'{"name": "a run of another program"}', "has run format None; this program reads 1. Continue with the program"),
    (b"[1, 2]", "run.json is damaged"), (b'{"format": 1}', "run.json is damaged: run.json.vocab_size is None"),
    (b'{"format": 2}', "has run format 2; this program reads 1"), (b'{"format": 1', "run.json is damaged"),
    (b"\xff\xfe", "run.json is damaged"),
])
def test_a_run_folder_of_another_program_is_refused(token_files, small_recipe, tmp_path, content, message):
    """Guards: a traceback about a missing key; files written into somebody else's folder."""
    (tmp_path / "run.json").write_bytes(content)
    for use in (load_run, lambda out: train_run(small_recipe, token_files["train"], token_files["val"], out)):
        with pytest.raises(UserError, match=message):
            use(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.fixture
def lines(token_files, tmp_path, monkeypatch):
    """Token files of which each line is a story, in a home folder, by paths as people type them."""
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    (tmp_path / "tales.txt").write_text("".join(f"{i} dogs ran home, and {2 * i} cats did not.\n" for i in range(300)))
    pre_tokenize(["~/tales.txt"], str(token_files["train"]), "~/lines.bin", "80:10:10", "line")
    return "~/lines.train.bin", "~/lines.val.bin"


def test_from_python_a_run_is_trained_and_used_by_plain_names(lines, small_recipe, tmp_path, monkeypatch, capsys):
    """Guards: AttributeError for a path that is text; a folder named ~; settings of a recipe that say how other token
    files were made; a repr of two screens."""
    train_run(small_recipe, *lines, "~/results/run")
    run = load_run("~/results/run")
    assert run.folder == tmp_path / "results" / "run" and not Path("~").exists()
    data = run.config.data
    assert (data.stories, data.split, data.tokenizer) == ("line", "80:10:10", "bpe:400")
    assert TokenFile.open(lines[0]).n_stories > 200 and run.log["step"].iloc[-1] == 6
    assert repr(run).startswith(f"Run({run.folder}: {small_recipe.model} with ") and "\n" not in repr(run)
    assert repr(run).endswith(f" of 6, on {run.machine.device})")
    story = run.generate("7 dogs", max_new_tokens=3, seed=1)
    assert story.startswith("7 dogs") and story == run.generate("7 dogs", max_new_tokens=3, seed=1)
    with pytest.raises(UserError, match="holds bytes that are not UTF-8"):
        run.generate("caf\udce9")
    assert run.generate("7 dogs", run, 0.25, max_new_tokens=3, seed=1) == story
    with pytest.raises(UserError, match="different tokenizers; expected one for both"):
        run.generate("7 dogs", dataclasses.replace(run, tokenizer=make_tokenizer("bytes")))
    capsys.readouterr()
    monkeypatch.setattr(runs, "stream", lambda *args, **options: iter([]))
    assert run.generate("7 dogs") == "7 dogs"
    assert "first token that the model chose is end-of-text" in capsys.readouterr().err


@pytest.mark.parametrize(("model", "windows"), [("bdh", "stories"), ("gpt2", "packed"), ("gpt2", "left_pad")])
def test_a_masked_run_is_validated_on_what_its_stories_are_scored_with(model, windows, token_files, tmp_path,
                                                                       monkeypatch):
    """Guards: a setting that does not reach the model, or stays on when it is scored; stories validated twice."""
    trained, session = [], runs.Session
    monkeypatch.setattr(runs, "Session", lambda out, model, *rest: trained.append(model) or session(out, model, *rest))
    recipe = load_recipe("tiny", model, ["max_steps=8", "warmup_steps=0", "learning_rate=0.02", "n_embd=16",
                                         "eval_tokens=1000000", "context_length=130", f"windows={windows}",
                                         "device=cpu", "mask_stories=true"])
    data = TokenFile.open(token_files["val"])
    assert story_tokens(data).max() <= 130  # so that none is cut
    val_loss = train_run(recipe, token_files["train"], token_files["val"], tmp_path / "run").val_loss
    run = load_run(tmp_path / "run")
    assert trained[0].story_start == data.header["end_of_text_id"] and run.model.story_start is None
    stories, _, _ = evaluate_run(run, data)
    assert val_loss == pytest.approx(stories["nats"].sum() / stories["tokens"].sum(), rel=1e-6)
