"""Comparisons as their reader gets them: arms, intervals, checks, one page."""

import json
import re
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_docs import described_tables
from transformers import GPT2Config, GPT2LMHeadModel

from plotarmour import run
from plotarmour.cli import UserError
from plotarmour.config import load_recipe
from plotarmour.data.pretokenize import pre_tokenize
from plotarmour.data.token_file import HEADER_BYTES, TokenFile
from plotarmour.data.token_writer import header_block
from plotarmour.report import compare
from plotarmour.report.compare import check_together, compare_runs
from plotarmour.report.verdict import readable_table, text_table
from plotarmour.run import train_run
from plotarmour.suite.steps import find_all_runs

SETTINGS = ["max_steps=2", "warmup_steps=0", "n_embd=16", "eval_tokens=100"]


def train(token_files, folder, model, *settings):
    train_run(load_recipe("tiny", model, [*SETTINGS, *settings]), token_files["train"], token_files["val"], folder)
    return folder


@pytest.fixture(scope="module")
def runs(token_files, tmp_path_factory):
    """Two seeds of each model, of two steps."""
    folder = tmp_path_factory.mktemp("results")
    return [train(token_files, folder / f"{model}_seed-{seed}", model, f"seed={seed}")
            for model in ("bdh", "gpt2") for seed in (1, 2)]


@pytest.fixture(scope="module")
def compared(runs, token_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    compare_runs(runs, token_files["test"], out, token_files["train"], token_files["facts"], title="made-up stories")
    return out


def test_totals_are_those_of_plain_transformers(runs, compared, token_files):
    """Guards: a scoring that only we believe in. Every test story, one by one, through GPT2LMHeadModel, float32."""
    weights = load_file(runs[2] / "checkpoints" / "step_00000002" / "model.safetensors")
    test = TokenFile.open(token_files["test"])
    V = test.header["vocab_size"]
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=160, n_embd=16, n_layer=3, n_head=4))
    missing = plain.load_state_dict({k.removeprefix("hf."): v for k, v in weights.items()}, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}  # tied
    plain.tie_weights()
    plain.eval()
    nats, end = [], test.header["end_of_text_id"]
    for i in range(test.n_stories):
        ids = torch.tensor([end, *test.story(i).tolist(), end])
        with torch.no_grad():
            logits = plain(ids[None, :-1]).logits[0]
        nats.append(F.cross_entropy(logits, ids[1:], reduction="sum").item())
    ours = pd.read_csv(compared / "stories_gpt2_seed-1.csv")
    assert ours["nats"].tolist() == pytest.approx(nats, rel=1e-5)
    total = pd.read_csv(compared / "totals.csv").set_index("name").loc["gpt2_seed-1"]
    assert total["nats"] == pytest.approx(sum(nats), rel=1e-5)
    assert total["tokens"] == sum(len(test.story(i)) + 1 for i in range(test.n_stories))


def test_seeds_are_put_together_and_pairs_have_intervals(compared, token_files):
    """Guards: six rows where two recipes were compared; a difference without its interval."""
    arms = pd.read_csv(compared / "arms.csv").set_index("name")
    assert arms.loc["bdh", "seeds"] == "1, 2" and arms.loc["gpt2", "seeds"] == "1, 2"
    totals = pd.read_csv(compared / "totals.csv").set_index("name")
    both = totals.loc[["bdh_seed-1", "bdh_seed-2"]]
    assert arms.loc["bdh", "loss"] == pytest.approx(both["nats"].sum() / both["tokens"].sum(), rel=1e-6)
    assert {"trigram baseline", "the corpus itself"} <= set(arms.index)
    counted = TokenFile.open(token_files["train"]).n_tokens  # baselines state how many training tokens they count
    assert arms.loc["trigram baseline", "train_tokens"] == totals.loc["trigram baseline", "train_tokens"] == counted
    pairs = pd.read_csv(compared / "pairs.csv")
    assert pairs["speaks_of"].tolist() == ["recipes", "checkpoints", "checkpoints"]
    assert (pairs["loss_difference_low"] < pairs["loss_difference"]).all()
    assert (pairs["loss_difference"] < pairs["loss_difference_high"]).all()
    assert pairs["matched"].str.contains("training tokens").all()
    positions = pd.read_csv(compared / "positions.csv")
    for name in ("bdh_seed-1", "gpt2_seed-2"):
        own = positions[positions["run"] == name]
        assert own["nats"].sum() == pytest.approx(totals.loc[name, "nats"], rel=1e-6)
        assert own["tokens"].sum() == totals.loc[name, "tokens"]


def test_the_report_stands_alone(compared):
    """Guards: a page that needs the network, has no alt texts, or does not fit a phone."""
    page = (compared / "report.html").read_text(encoding="utf-8")
    assert "http" not in page and "<script" not in page and 'name="viewport"' in page
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) >= 4 and all('src="data:image/png;base64,' in i and 'alt="' in i for i in images)
    for said in ("95 % interval", "What is not claimed", "Few seeds make it wide", "sum of probabilities",
                 "sign test"):
        assert said in page, said
    summary = (compared / "summary.txt").read_text(encoding="utf-8")
    assert "95 % interval" in summary and " leak checks passed" in summary and "This comparison has one" not in summary


def test_one_seed_each_opens_with_what_that_can_show(token_files, runs, tmp_path):
    """Guards: a percentage with an interval, shown to a newcomer first, of a run that cannot tell which is better;
    lines that a terminal cuts inside words."""
    for facts, shown in ((token_files["facts"], "and generated tales: it shows that everything works, not which"),
                         (None, "each: it shows which of these checkpoints predicts these stories better, not which")):
        compare_runs(runs[:3:2], token_files["test"], tmp_path, token_files["train"], facts)
        summary = (tmp_path / "summary.txt").read_text(encoding="utf-8")
        summary_words = " ".join(summary.split())
        opening = r"better than the \w+ baseline \(perplexity [\d.]+\)\. (.*)This comparison has one seed each"
        stable = r"^Where a story .* within \d*[05] % of the .* \(loss on facts: BDH [\d.]+, GPT-2 [\d.]+\)"
        between = re.search(opening, summary_words)[1].replace(", seed 1", "")
        assert bool(re.search(stable, between)) is bool(facts) and shown in summary_words
        assert max(map(len, summary.splitlines())) <= 80
        page = " ".join((tmp_path / "report.html").read_text(encoding="utf-8").split())
        assert shown in page and "these checkpoints is to be expected" in page and "results with another seed" in page


def test_the_report_explains_its_words_and_says_what_its_figures_show(compared):
    """Guards: "over corpus" explained nowhere; an alt text that repeats the caption; a caption against its curve."""
    page = (compared / "report.html").read_text(encoding="utf-8")
    for said in ("&#34;Over corpus&#34; is", "&#34;Loss on facts&#34; is", "A baseline predicts from counts",
                 "Core params are"):
        assert said in page.replace('"', "&#34;"), said
    alts = dict(zip(("differences", "curves", "perplexity", "positions", "shares"), re.findall('alt="([^"]*)"', page),
                    strict=True))
    by_arm = pd.read_csv(compared / "arms.csv").set_index("name")
    positions = pd.read_csv(compared / "positions.csv")
    assert "perplexity on held-out stories is" in alts["differences"]
    assert f"BDH {by_arm.loc['bdh', 'perplexity']:,.3f}" in alts["perplexity"]
    assert re.fullmatch(r"Last validation loss: BDH \d+\.\d{3}, GPT-2 \d+\.\d{3}\.", alts["curves"])
    assert re.search(r"BDH against GPT-2 \d+ to \d+ %\.", alts["shares"])
    middle, early, late = re.match(r"Mean loss up to position (\d+), and after it: BDH ([\d.]+), then ([\d.]+);",
                                   alts["positions"]).groups()
    own = positions[positions["run"].str.startswith("bdh_") & (positions["position"] <= int(middle))]
    assert float(early) == pytest.approx(own["nats"].sum() / own["tokens"].sum(), abs=1e-3) and float(late) > 0
    assert "harder to predict" not in page


def test_the_report_fits_screens_and_has_one_name_for_an_arm(compared):
    """Guards: a table cut without a cue; `gpt2` in a table and "GPT-2" in a figure; a white page at night."""
    page = (compared / "report.html").read_text(encoding="utf-8")
    assert "@media (prefers-color-scheme: dark)" in page and "min-width: 34rem" not in page
    tables = re.findall(r'<div class="scroll"><table><thead>(.*?)</thead>', page)
    assert len(tables) == page.count("<table>") == 7 and all(header.count("<th") <= 9 for header in tables)
    assert ">BDH</td>" in page and ">bdh</td>" not in page and ">GPT-2</th>" in page and ">gpt2</t" not in page
    assert pd.read_csv(compared / "win_shares.csv")["pair"].unique().tolist() == ["BDH against GPT-2"]


@pytest.mark.parametrize("name", ["tiny", "models_2200/comparison"])
def test_the_table_of_the_summary_fits_a_terminal(root, name):
    """Guards: a table of 170 characters, which a terminal of 80 columns wraps into rubble."""
    totals = pd.read_csv(root / "results" / "reference" / name / "totals.csv")
    table = text_table(readable_table(totals))
    assert max(map(len, table.splitlines())) <= 80 and "\\" not in table
    blocks = table.count("\n\n") + 1  # a row in each
    assert all(table.count(run) == blocks for run in ("BDH, seed 2  ", "trigram baseline"))
    assert all(title in table for title in ("perplexity", "bits/byte", "core params", "trained on", "seconds"))
    own = totals[totals["name"].str.contains("^(?:bdh|gpt2)_seed-1$|baseline")]
    own = own.replace({"name": "_seed-1"}, "", regex=True)
    own = text_table(readable_table(own.drop(columns=["over_corpus", "recall_loss", "other_loss"], errors="ignore")))
    assert own.count("trigram baseline") == 1 and "trained on" in own, "no second block for one column"


def test_nothing_in_the_report_is_taken_for_markup(runs, token_files, tmp_path):
    """Guards: a title, a story or a file name that ends a tag, or runs a script, in the page."""
    title = "<script>alert('x')</script> & \"more\" $x$"
    compare_runs(runs[:3:2], token_files["test"], tmp_path, title=title)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; ") == 2


def test_each_run_is_loaded_once(runs, token_files, tmp_path, monkeypatch):
    """Guards: weights read and hashed again for the examples and for the samples; paths that must be a Path."""
    loaded, load_model = [], run.load_model
    monkeypatch.setattr(run, "load_model", lambda checkpoint, model: loaded.append(checkpoint) or load_model(
        checkpoint, model))
    compare_runs([str(folder) for folder in runs[:3]], str(token_files["test"]), str(tmp_path / "out"))
    assert [checkpoint.parents[1] for checkpoint in loaded] == runs[:3]


@pytest.mark.slow
def test_several_kinds_give_a_ladder_and_the_strongest_opponent_stands_first(runs, token_files, tmp_path):
    """Guards: a verdict that begins with the weakest baseline; a step from an arm that had more tokens."""
    others = [train(token_files, tmp_path / "llama", "llama", "seed=1", "max_steps=6", "learning_rate=1e-2"),
              *(train(token_files, tmp_path / kind, kind, "seed=1") for kind in ("modern", "lstm"))]
    out = tmp_path / "out"
    compare_runs([runs[0], runs[2], *others], token_files["test"], out)
    pairs, ladder = (pd.read_csv(out / f"{name}.csv") for name in ("pairs", "ladder"))
    loss = pd.read_csv(out / "totals.csv").set_index("name")["loss"]
    assert pairs["b"].iloc[0] == "llama" and [*zip(ladder["a"], ladder["b"], strict=True)] == [
        ("modern", "gpt2_seed-1"), ("bdh_seed-1", "modern")]
    differences = [loss[step.a] - loss[step.b] for step in ladder.itertuples()]
    assert ladder["loss_difference"].tolist() == pytest.approx(differences)
    prose = re.split(r"of\s+their\s+text\.\n\n", (out / "summary.txt").read_text(encoding="utf-8"))[1]
    answer = " ".join(prose.split("\n\n")[0].split())
    assert re.search(r"that of Llama,.*that of GPT-2, seed 1,", answer) and "Modern" not in answer
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Loss, step by step: " in page and "Last differences in validation loss: " in page


def test_runs_that_have_not_ended_are_refused_or_labelled(token_files, runs, tmp_path, warned):
    """Guards: a checkpoint of half a run taken for the recipe's result."""
    half = train(token_files, tmp_path / "half", "gpt2", "max_minutes=0.00001", "max_steps=50")
    with pytest.raises(UserError, match="half: not finished, no DONE.json.*--unfinished"):
        compare_runs([runs[0], half], token_files["test"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with warned("half is not finished"):
        compare_runs([runs[0], half], token_files["test"], tmp_path / "out", unfinished=True)
    assert "NOT FINISHED: time budget" in (tmp_path / "out" / "summary.txt").read_text(encoding="utf-8")


def test_runs_of_different_tokenizers_are_refused(token_files, runs, tmp_path):
    """Guards: perplexities per token of two vocabularies side by side."""
    parts = pre_tokenize([token_files["text"]], "bytes", tmp_path / "bytes.bin", "80:10:10")
    other = train(dict(zip(("train", "val", "test"), parts, strict=True)), tmp_path / "other", "gpt2")
    with pytest.raises(UserError, match="different tokenizers .*bytes.*bits_per_byte"):
        compare_runs([runs[0], other], token_files["test"], tmp_path / "out")


def test_too_few_stories_to_compare_on_are_refused(token_files, runs, tmp_path):
    """Guards: an interval over a single story, which has no width."""
    text = tmp_path / "one.txt"
    text.write_text("A new tale, and the only one.")
    [one] = pre_tokenize([text], str(token_files["train"]), tmp_path / "one.bin")
    with pytest.raises(UserError, match="one.bin holds 1 stories; expected test stories, at least two"):
        compare_runs(runs[:2], one, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def near_train(token_files, tmp_path_factory):
    """A test file of 20 training stories with another first word, whose header says that it is the test part."""
    data, folder = TokenFile.open(token_files["train"]), tmp_path_factory.mktemp("near")
    texts = [data.tokenizer().decode(data.story(i)).replace("Once", "Twice", 1) for i in range(20)]
    (folder / "near.txt").write_text("\n<|endoftext|>\n".join(texts))
    return pre_tokenize([folder / "near.txt"], str(token_files["train"]), folder / "near.bin")[0]


def as_test_part(path, train, out):
    """Copy a token file with the header's source, split and part of the test part that belongs to `train`."""
    header = {key: TokenFile.open(train).header[key] for key in ("source", "split", "stories")} | {"part": "test"}
    out.write_bytes(header_block(TokenFile.open(path).header | header) + path.read_bytes()[HEADER_BYTES:])
    return out


def test_training_stories_are_refused_whatever_the_header_says(token_files, runs, tmp_path):
    """Guards: held-out stories that were not; a header that claims another part of the same split."""
    data = TokenFile.open(token_files["train"])
    (tmp_path / "mixed.txt").write_text("\n<|endoftext|>\n".join(
        ["A new tale."] * 3 + [data.tokenizer().decode(data.story(7))]))
    [mixed] = pre_tokenize([tmp_path / "mixed.txt"], str(token_files["train"]), tmp_path / "mixed.bin")
    for path in (mixed, as_test_part(mixed, token_files["train"], tmp_path / "forged.bin")):
        with pytest.raises(UserError, match="all runs, held out: found 1 stories of 4, expected 0 stories"):
            compare_runs(runs[:1], path, tmp_path / "out", token_files["train"])
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["checks.csv"]
    with pytest.raises(UserError, match="1 of 4 stories of .*forged.bin are also in"):
        train({"train": token_files["train"], "val": tmp_path / "forged.bin"}, tmp_path / "run", "bdh")


def test_the_verdict_begins_with_what_makes_it_worthless(token_files, runs, near_train, tmp_path):
    """Guards: a difference in bold type on stories that differ from training stories in one word, or between models
    that are no better than counting."""
    compare_runs(runs[:3:2], near_train, tmp_path, token_files["train"])
    first = re.search(r"<strong>(.*?)</strong>", (tmp_path / "report.html").read_text(encoding="utf-8"))[1]
    assert re.match(r"NOT HELD OUT: 20 stories of 20 \(100.0%\) have half of their tokens, in one piece, in one "
                    r"training story, so a model can recall them. \S+find_duplicates.py lists .* NO BETTER ", first)
    [arms] = re.findall(r"COUNTING: (.*) are not better than the \w+ baseline \(perplexity [\d.]+\)\. ", first)
    assert "BDH" in arms and " and " in arms and "GPT-2" in arms
    assert "perplexity on test stories is " in first.split(arms)[1]
    summary = (tmp_path / "summary.txt").read_text(encoding="utf-8")
    assert first.replace("&#39;", "'") in " ".join(summary.split())


def test_a_long_overlap_is_a_check_that_did_not_pass(token_files, runs, near_train, tmp_path, capsys):
    """Guards: "12 leak checks passed" of 13, without a word of the one that did not."""
    compare_runs(runs[:3:2], near_train, tmp_path, token_files["train"])
    n, sentence = len(pd.read_csv(tmp_path / "checks.csv")), r"{} of {} leak checks passed; long overlap did not"
    sentence = sentence.format(n - 1, n)
    for text in (capsys.readouterr().out, *((tmp_path / name).read_text(encoding="utf-8")
                                            for name in ("summary.txt", "report.html"))):
        assert sentence in " ".join(text.split()) and "held-out" not in text


def test_a_run_and_its_copy_are_refused_whatever_run_json_says(token_files, runs, tmp_path):
    """Guards: an interval over "seeds" that are copies of one run."""
    shutil.copytree(runs[0], tmp_path / "copy")
    info = json.loads((tmp_path / "copy" / "run.json").read_text())
    info["recipe"]["training"]["seed"] = 7
    (tmp_path / "copy" / "run.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="bdh_seed-1 and copy have the same weights; expected runs that were trained"):
        compare_runs([*runs, tmp_path / "copy"], token_files["test"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_how_runs_ended_is_told_in_words():
    """Guards: "end: max_steps (bdh)" in a sentence for readers."""
    training = load_recipe("tiny", "bdh").training
    info = {"train": {"payload_sha256": "abc"}, "hardware": "CPU", "dtype": "float32", "processes": 1}
    runs = [SimpleNamespace(name=name, info=info, config=SimpleNamespace(model="bdh", training=training))
            for name in ("bdh", "late", "cut")]
    ended = {"bdh": "max_steps", "late": "schedule_minutes", "cut": "unfinished"}
    budgets = {name: {"train_tokens": 9, "hardware": "CPU", "ended": end} for name, end in ended.items()}
    assert compare._differences(runs, budgets, same_order=True) == [
        "end: all steps taken (bdh), the minutes of the schedule are over (late), unfinished (cut)"]


def test_runs_of_one_seed_that_have_learned_nothing_are_told_why_they_are_equal(monkeypatch, tmp_path):
    """Guards: "the same weights" without a reason, of two runs that diverged and whose best step is 0."""
    for name in ("low", "high"):
        folder = tmp_path / name / "checkpoints" / "step_00000000"
        folder.mkdir(parents=True)
        (folder / "MANIFEST.json").write_text('{"files": {"model.safetensors": "abc"}}')
    monkeypatch.setattr(compare, "find_checkpoint", lambda folder, *_: folder / "checkpoints" / "step_00000000")
    with pytest.raises(UserError, match="weights of step 0, which the seed decides: no later evaluation was"):
        compare._check_different_weights([tmp_path / "low", tmp_path / "high"], "best")


@pytest.mark.parametrize(("one", "other", "message"), [
    ("my run", "my_run", "found 'my run' and 'my_run'"), ("Run", "run", "found 'Run' and 'run'"),
    ("bdh", "bdh_unbounded", "found 'bdh_unbounded' and 'bdh unbounded'"), ("bdh", "gpt2  Unbounded", "like a row of"),
    ("bdh", "trigram baseline", "like a row of"), ("Uniform_baseline", "bdh", "'Uniform_baseline' and 'uniform base"),
    ("the corpus itself", "bdh", "like a row of")])
def test_names_that_lead_to_the_same_rows_or_files_are_refused(runs, tmp_path, one, other, message):
    """Guards: a file that two runs share; a run whose scores are those of another run's unbounded row."""
    for name in (one, other):
        (tmp_path / "runs" / name).mkdir(parents=True)
        shutil.copy(runs[0] / "run.json", tmp_path / "runs" / name)
    with pytest.raises(UserError, match=re.escape(message)):
        check_together([tmp_path / "runs" / name for name in (one, other)])


def test_every_column_that_a_comparison_writes_is_described(compared, root):
    """Guards: a column without a meaning or a unit, a description of a column that is gone."""
    tables = {path.name: list(pd.read_csv(path)) for path in compared.glob("*.csv")}
    stories = [tables.pop(name) for name in list(tables) if name.startswith("stories_")]
    tables["stories_NAME.csv"] = max(stories, key=len)
    described = described_tables(root)
    assert {name: described[name] for name in tables} == tables
    assert all(columns == tables["stories_NAME.csv"][:len(columns)] for columns in stories)


def test_one_run_has_no_tables_about_pairs(runs, token_files, tmp_path):
    """Guards: pairs.csv and samples.csv of one byte, which pandas refuses to read; a user's file that is removed."""
    (tmp_path / "stories_mine.csv").write_text("not ours")
    compare_runs(runs[:1], token_files["test"], tmp_path)
    assert (tmp_path / "stories_mine.csv").read_text() == "not ours"
    (tmp_path / "stories_mine.csv").unlink()
    tables = sorted(path.name for path in tmp_path.glob("*.csv"))
    assert tables == ["arms.csv", "checks.csv", "positions.csv", "stories_bdh_seed-1.csv", "totals.csv"]
    assert all(len(pd.read_csv(tmp_path / name)) for name in tables)
    summary = (tmp_path / "summary.txt").read_text(encoding="utf-8")
    assert "One arm only" in summary and "Without a training file (--train), nothing says" in summary


def test_runs_are_found_by_name_path_or_all(runs, tmp_path):
    """Guards: notebook 3 comparing what nobody meant."""
    folder = runs[0].parent
    assert find_all_runs(folder, "tiny") == sorted(runs)
    assert find_all_runs(folder, "tiny", ["gpt2_seed-2", str(runs[0])]) == [runs[3], runs[0]]
    with pytest.raises(UserError, match="holds no run folder"):
        find_all_runs(tmp_path, "tiny")
