"""The suite as a whole, as its first user runs it."""

import csv
import json
import subprocess
import sys

import nbformat
import pytest


@pytest.fixture(scope="module")
def suite(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("suite") / "tiny"
    done = subprocess.run([sys.executable, str(root / "tools" / "run_suite.py"), "--out", str(out)], check=False,
                          capture_output=True, text=True, cwd=out.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def totals(suite):
    with (suite / "comparison" / "totals.csv").open(encoding="utf-8", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_both_tiny_models_lie_little_above_the_corpus_and_none_below(suite):
    """Guards: a leak (fewer nats than the source has), a model that does not learn, a comparison on other tokens.

    Facts are recalled late, at a moment that hangs on a seed's last digits and so on the processor: the whole may lie
    far over the corpus (at most 49 % in results/reference/tiny). All else is within 4 % there, with every seed.
    """
    rows = totals(suite)
    source = float(rows["the corpus itself"]["other_loss"])
    for name in ("bdh", "gpt2"):
        assert 0.0 <= float(rows[name]["over_corpus"]) <= 0.80
        assert source <= float(rows[name]["other_loss"]) <= 1.06 * source
        assert float(rows[name]["loss"]) < float(rows["trigram baseline"]["loss"])
        assert float(rows[name]["perplexity"]) < 3  # earlier pipelines ended at 22,000
    assert len({(row["tokens"], row["bytes"], row["stories"]) for row in rows.values()}) == 1
    assert rows["bdh"]["train_tokens"] == rows["gpt2"]["train_tokens"]
    orders = {json.loads((suite / m / "run.json").read_text())["train"]["order_sha256"] for m in ("bdh", "gpt2")}
    assert len(orders) == 1, "the same tokens in the same order"


@pytest.mark.slow
def test_the_suite_leaves_executed_notebooks_tables_and_figures(suite):
    """Guards: a batch whose results nobody can find."""
    for name in ("01_pretokenize", "02_train_bdh", "02_train_gpt2", "03_compare"):
        notebook = nbformat.read(suite / "notebooks" / f"{name}.ipynb", as_version=4)
        outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
        assert outputs and not any(o.output_type == "error" for o in outputs)
    assert {"totals.csv", "summary.txt", "stories_bdh.csv", "stories_gpt2.csv", "stories_bigram_baseline.csv",
            "perplexity.png", "training_curves.png", "report.html", "pairs.csv", "checks.csv"} <= {
                p.name for p in (suite / "comparison").iterdir()}
    assert all(json.loads((suite / m / "DONE.json").read_text())["reason"] == "max_steps" for m in ("bdh", "gpt2"))
    assert not [p for p in suite.rglob("*") if "unfinished" in p.name]


@pytest.mark.slow
def test_every_total_follows_from_the_stories(suite):
    """Guards: totals that cannot be recomputed from the per-story rows."""
    for name, row in totals(suite).items():
        path = suite / "comparison" / f"stories_{name.replace(' ', '_')}.csv"
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                nats, tokens = zip(*((float(r["nats"]), int(r["tokens"])) for r in csv.DictReader(file)), strict=True)
            assert sum(nats) / sum(tokens) == pytest.approx(float(row["loss"]), rel=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(("text", "options", "message"), [
    (b"b\xe9d\n", [], "is not UTF-8: byte 0xe9 at offset 1, line 1"),
    (b"Tom ran.\n<|endoftext|>\n" * 3, [], "holds no story"),
    (b"\n<|endoftext|>\n".join(b"Tom saw bird %d." % i for i in range(300)), ["context_length=200", "windows=stream"],
     "fewer than one context of 200"),
    (b"Tom ran.", ["n_head=5"], "must be divisible by"),
])
def test_a_suite_on_a_bad_text_gives_one_line_and_leaves_nothing(root, tmp_path, text, options, message):
    """Guards: a traceback of a notebook in a notebook; a results folder without results."""
    path = tmp_path / "t.txt"
    path.write_bytes(text)
    sets = [part for o in ["tokenizer=bytes", *options] for part in ("--set", o)]
    command = [sys.executable, str(root / "tools" / "run_suite.py"), "--text", str(path), "--out",
               str(tmp_path / "out"), *sets]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["t.txt"]
