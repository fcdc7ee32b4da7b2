"""Every tool as a user meets it: help, the way through, and one clear line for each kind of bad input."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from plotarmour.data.token_file import TokenFile, unknown_words
from plotarmour.models import KINDS
from plotarmour.report.verdict import denominators

TOOLS = sorted(path.stem for path in (Path(__file__).parents[2] / "tools").glob("*.py"))
HEAVY = ("torch", "transformers", "pandas", "matplotlib", "scipy")  # seconds to import


def call(root, tool, *args, cwd=None):
    command = [sys.executable, "-W", "ignore", str(root / "tools" / f"{tool}.py"), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize("tool", TOOLS)
def test_help_works_from_any_folder(root, tool, tmp_path):
    """Guards: a tool that needs the package installed or the right working folder."""
    done = call(root, tool, "--help", cwd=tmp_path)
    assert done.returncode == 0 and "usage:" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("tool", TOOLS)
def test_help_imports_nothing_heavy(root, tool):
    """Guards: a --help that takes eight seconds, because torch is imported before the command line is parsed."""
    code = (f"import runpy, sys\nsys.argv = ['{tool}', '--help']\n"
            f"try:\n    runpy.run_path({str(root / 'tools' / f'{tool}.py')!r}, run_name='__main__')\n"
            f"except SystemExit:\n    print('imported', sorted(set({HEAVY}) & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("imported []\n")


@pytest.mark.parametrize(("tool", "arguments"), [
    ("run_suite", ["--recipe", "tinny"]), ("run_suite", ["--text", "nowhere.txt"]), ("generate", ["nowhere"]),
    ("evaluate", ["nowhere", "--data", "x.bin", "--out", "e"]), ("compare", ["nowhere", "--data", "x", "--out", "c"])])
def test_a_mistake_is_reported_before_anything_heavy_is_imported(root, tool, arguments, tmp_path):
    """Guards: five seconds of imports before one line about a name that is mistyped."""
    code = (f"import runpy, sys\nsys.argv = {[tool, *arguments]}\n"
            f"try:\n    runpy.run_path({str(root / 'tools' / f'{tool}.py')!r}, run_name='__main__')\n"
            f"except SystemExit as end:\n    print(end.code, sorted(set({HEAVY}) & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "2 []\n" and done.stderr.count("\n") <= 2, done.stdout + done.stderr
    assert all(line.startswith("error: ") for line in done.stderr.splitlines()) and list(tmp_path.iterdir()) == []


def test_from_text_to_comparison(run_main, tmp_path):
    """Guards: a tool whose output the next one cannot read."""
    text, x, runs = tmp_path / "t.txt", tmp_path / "x.bin", [tmp_path / "b", tmp_path / "g"]
    assert run_main("tell_stories", "--out", text, "--count", 200, "--events", "0:1")[0] == 0
    assert run_main("pre_tokenize", text, "--tokenizer", "bpe:400", "--out", x, "--split", "80:10:10")[0] == 0
    assert "first story: Once upon" in run_main("pre_tokenize", "--info", tmp_path / "x.val.bin")[1]
    assert "whole" in run_main("pre_tokenize", "--verify", tmp_path / "x.val.bin")[1]
    train, val, test = (tmp_path / f"x.{part}.bin" for part in ("train", "val", "test"))
    for model, run in zip(("bdh", "gpt2"), runs, strict=True):
        options = [o for s in ("max_steps=4", "warmup_steps=1", "n_embd=16", "eval_tokens=100") for o in ("--set", s)]
        code, out, _ = run_main("train", "--recipe", "tiny", "--model", model, "--train", train, "--val", val, "--out",
                                run, *options)
        assert code == 0 and "done: all steps taken; 4 steps" in out
        assert f"next: python evaluate.py {run} --data {test} --out {run}_scores\n" in out
    code, out, _ = run_main("compare", *runs, "--data", test, "--train", train, "--facts", tmp_path / "t.facts.jsonl",
                            "--out", tmp_path / "c")
    assert code == 0 and "bigram baseline" in out and "over corpus" in out
    assert {"totals.csv", "summary.txt", "stories_b.csv", "perplexity.png", "training_curves.png"} <= {
        p.name for p in (tmp_path / "c").iterdir()}
    assert run_main("evaluate", runs[0], "--data", test, "--out", tmp_path / "e")[0] == 0
    first, second = (run_main("generate", runs[0], "--seed", 3, "--max-new-tokens", 20)[1] for _ in range(2))
    assert first == second and first.startswith("Once upon a time")


def test_standard_input_and_info(root, run_main, tmp_path):
    """Guards: a text that can be read only once, read twice for bpe:N; --info without the lengths."""
    told = "\n<|endoftext|>\n".join(f"Story {i}. " + "The dog ran. " * i for i in range(60))
    command = [sys.executable, root / "tools" / "pre_tokenize.py", "-", "--tokenizer", "bpe:280", "--out", "x.bin"]
    done = subprocess.run([*command, "--split", "60:20:20"], input=told.encode(), cwd=tmp_path, capture_output=True,
                          check=True)
    assert done.stdout.count(b" stories (") == 3
    code, out, _ = run_main("pre_tokenize", "--info", tmp_path / "x.train.bin")
    assert code == 0 and "bytes per token" in out and "median" in out and "########" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.test.bin", "x.train.bin", "x.val.bin"]
    done = subprocess.run(command, input=b"", cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 2 and b"standard input is empty" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="pipes and signals")
def test_a_reader_that_goes_away_and_ctrl_c_leave_no_traceback(root, shared, tmp_path, token_files):
    """Guards: `--info X.bin | head` that ends in a traceback; a stop that does not say how to go on."""
    tool = [sys.executable, str(root / "tools" / "pre_tokenize.py")]
    reader = subprocess.Popen([*tool, "--info", token_files["train"]], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    reader.stdout.close()
    assert b"Traceback" not in reader.stderr.read() and reader.wait() == 1
    reader.stderr.close()
    text, stories = tmp_path / "t.txt", (shared / "data" / "tinystories" / "stories_a.txt").read_bytes()
    command = [*tool, text, "--tokenizer", "bytes", "--out", tmp_path / "x.bin", "--backend", "tokenizers"]
    unfinished = tmp_path / ".x.bin.unfinished" / "x.bin"
    text.write_bytes(stories * 4)
    stopped = subprocess.Popen(command, stderr=subprocess.PIPE,  # a suite in the background inherits an ignored SIGINT
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while stopped.poll() is None and not unfinished.exists():
        time.sleep(0.01)
    stopped.send_signal(signal.SIGINT)
    said = stopped.communicate()[1].decode()
    assert stopped.returncode == 130 and "the same command continues" in said and "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.bin.unfinished", "t.txt"]


def test_the_number_of_workers_does_not_show(root, shared, tmp_path):
    """Guards: tokens that depend on threads."""
    text, made = shared / "data" / "tinystories" / "stories_b.txt", set()
    for workers in (1, 2, 5):
        for backend in ("fastokens", "tokenizers"):
            options = ["--tokenizer", shared / "gpt2", "--force", "--workers", workers, "--backend", backend]
            done = call(root, "pre_tokenize", text, "--out", tmp_path / "x.bin", *options)
            assert done.returncode == 0, done.stderr
            made.add((tmp_path / "x.bin").read_bytes())
    assert len(made) == 1


BAD_TEXTS = {
    "missing": (None, "does not exist"), "folder": ("folder", "is a folder"), "empty": (b"", "is empty"),
    "blank": (b" \n<|endoftext|>\n ", "holds no story"),
    "latin1": (b"good\nb\xe9d\n", "not UTF-8: byte 0xe9 at offset 6, line 2"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_texts_give_one_line_and_leave_nothing(run_main, tmp_path, case):
    """Guards: tracebacks, and half-written token files."""
    content, message = BAD_TEXTS[case]
    text, out = tmp_path / "t.txt", tmp_path / "out" / "x.bin"
    if content == "folder":
        text.mkdir()
    elif content is not None:
        text.write_bytes(content)
    code, _, err = run_main("pre_tokenize", text, "--tokenizer", "bytes", "--out", out)
    assert code == 2 and message in err and "Traceback" not in err
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [err.splitlines()[-1]]
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


@pytest.fixture
def files(token_files, tmp_path):
    return {**token_files, "out": tmp_path / "run", "tmp": tmp_path}


BAD_CALLS = {
    "unknown recipe": ("did you mean 'tiny'", ["--recipe", "tinny"]),
    "unknown model": ("did you mean 'gpt2'", ["--model", "gpt-2"]),
    "unknown key": ("did you mean 'max_steps'", ["--set", "maxsteps=3"]),
    "wrong type": ("is not a whole number", ["--set", "max_steps=many"]),
    "context too long": ("fewer than one context of 99,999",
                         ["--set", "context_length=99999", "--set", "windows=stream"]),
    "not a token file": ("is not a token file", ["--train", "TEXT"]),
    "truncated token file": ("is truncated", ["--train", "SHORT"]),
    "another tokenizer": ("made with another tokenizer", ["--val", "OTHER"]),
    "unwritable": ("Not a directory", ["--out", "UNDER_A_FILE"]),
    "nothing to resume": ("holds no run to continue", ["--resume", "must"]),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_training_calls_give_one_line_and_leave_nothing(run_main, files, case):
    """Guards: hours lost to a typing mistake; leftovers in the run folder."""
    from plotarmour.data.pretokenize import pre_tokenize

    message, changes = BAD_CALLS[case]
    short, under = files["tmp"] / "short.bin", files["tmp"] / "file" / "run"
    short.write_bytes(files["train"].read_bytes()[:-1])
    under.parent.write_text("a file, no folder")
    [other] = pre_tokenize([files["text"]], "bytes", files["tmp"] / "other.bin")
    named = {"TEXT": files["text"], "SHORT": short, "OTHER": other, "UNDER_A_FILE": under}
    args = {"--recipe": "tiny", "--model": "bdh", "--train": files["train"], "--val": files["val"],
            "--out": files["out"]}
    extra = []
    for option, value in zip(changes[::2], changes[1::2], strict=True):
        if option in args:
            args[option] = named.get(value, value)
        else:
            extra += [option, value]
    before = sorted(files["tmp"].rglob("*"))
    code, _, err = run_main("train", *[part for pair in args.items() for part in pair], *extra)
    assert code == 2 and message in err.replace("\n", " ") and "Traceback" not in err, err
    assert sorted(files["tmp"].rglob("*")) == before


@pytest.mark.parametrize(("tool", "args", "message"), [
    ("run_suite", ["--recipe", "laptop", "--out", "OUT"], "needs a text; expected --text FILE"),
    ("run_suite", ["--recipe", "laptop", "--text", "nowhere.txt", "--out", "OUT"], "does not exist"),
    ("evaluate", ["nowhere", "--data", "x.bin", "--out", "OUT"], "nowhere is not a run folder"),
    ("run_suite", ["--grid", "nowhere.csv", "--out", "OUT"], "nowhere.csv: No such file or directory"),
    ("run_suite", ["--grid", "g.csv", "--models", "bdh,llama", "--out", "OUT"], "expected the column model"),
    ("run_suite", ["--notebook", "n.ipynb", "--out", "OUT"], "expected --grid CSV beside it"),
    ("generate", ["nowhere"], "is not a run folder"), ("generate", ["README", "--logic", "101"], "between 0 and 100"),
    ("desk", ["nowhere"], "found 1 run folder; expected two"), ("desk", ["nowhere", "README"], "is not a run folder"),
    ("pre_tokenize", ["t.txt", "--tokenizer", "bpe:10", "--out", "x.bin"], "does not exist"),
    ("pre_tokenize", ["README", "--tokenizer", "words:4", "--out", "x.bin"], "has no usable size"),
    ("pre_tokenize", ["README", "--stories", "file", "--strip-prefix", "--out", "x.bin"], "expected --stories line"),
    ("tell_stories", ["--out", "OUT/t.txt", "--events", "4:2"], "expected least:most"),
    ("tell_stories", ["--out", "README"], "exists already"),
    ("pre_tokenize", ["TRAIN", "--tokenizer", "bytes", "--out", "x.bin"], "is a token file"),
    ("find_duplicates", ["nowhere.bin"], "does not exist"),
    ("find_duplicates", ["TRAIN", "TRAIN"], "is named twice"),
    ("find_duplicates", ["TRAIN", "--out", "OUT/d.txt"], "does not end in .csv"),
    ("find_duplicates", ["TRAIN", "--threshold", "0.2", "--out", "OUT/d.csv"], "expected 0.7 to 1"),
    ("import_bin", ["nowhere.bin", "--tokenizer", "bytes", "--out", "x.bin"], "No such file"),
    ("import_bin", ["TRAIN", "--tokenizer", "bytes", "--out", "x.bin"], "is a token file of this program"),
    ("import_bin", ["README", "--tokenizer", "bytes", "--out", "x.bin"], "expected --dtype"),
    ("doctor", ["--model", "bdh", "--set", "n_embd=8"], "--model, --set without a recipe"),
    ("doctor", ["--recipe", "tinny"], "did you mean 'tiny'"),
    ("doctor", ["--recipe", "tiny", "--set", "tokenizer=folder"], "Name the size: --vocab-size N"),
    ("doctor", ["--recipe", "tiny", "--vocab-size", "0"], "vocab_size = 0 must be at least 1"),
    ("doctor", ["--recipe", "tiny", "--device", "tpu"], "must be one of auto, cpu, cuda"),
    ("doctor", ["--recipe", "tiny", "--dtype", "int8"], "must be one of auto"),
])
def test_other_bad_calls_give_one_line(run_main, tmp_path, monkeypatch, root, token_files, tool, args, message):
    """Guards: tracebacks for the user's mistakes."""
    monkeypatch.chdir(tmp_path)
    named = {"README": root / "README.md", "TRAIN": token_files["train"]}
    code, _, err = run_main(tool, *[named.get(a, a.replace("OUT", str(tmp_path / "out"))) for a in args])
    assert code == 2 and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("changes", "message"), [
    ({"data": "train"}, "was trained on"), ({"train": "val"}, "baselines must learn from the same tokens"),
    ({"runs": [0, 0]}, "Name each run once"), ({"stride": 0}, "stride 0 must be between 1"),
])
def test_dishonest_comparisons_are_refused(run_main, two_runs, token_files, tmp_path, changes, message):
    """Guards: training stories scored as held out; baselines of another text; a stride that is ignored."""
    runs = [two_runs[i] for i in changes.get("runs", [0, 1])]
    stride = ["--stride", changes["stride"]] if "stride" in changes else []
    code, _, err = run_main("compare", *runs, "--data", token_files[changes.get("data", "test")], "--train",
                            token_files[changes.get("train", "train")], "--out", tmp_path / "out", *stride)
    assert code == 2 and message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_story_beyond_the_positions_follows_slide_to(run_main, two_runs, warned):
    """Guards: an option that is not passed on; a story that stops, or forgets its beginning, without a word."""
    options = (two_runs[1], "--temperature", 0, "--max-new-tokens", 200, "--slide-to")
    with warned("Token 161 needs more than the model's 160 positions: generation stops"):
        assert run_main("generate", *options, 0)[0] == 0
    with warned("Token 161 needs more .* the context is the last 40 to 160 tokens"):
        assert run_main("generate", *options, 40)[0] == 0
    code, _, err = run_main("generate", *options, 160)
    assert code == 2 and err == "error: slide_to 160 must be at least 0 and below the model's 160 positions.\n"


def test_a_draft_is_checked_from_what_a_run_remembers(run_main, two_runs, token_files, tmp_path):
    """Guards: a story read anew for every draft; the state of an older story, or of another run, taken for this one."""
    story, draft, state = (tmp_path / name for name in ("story.txt", "draft.txt", "story.safetensors"))
    story.write_text("Kim had a kite. It was red.")
    draft.write_text("Soon Kim\u2009lost the kite.", encoding="utf-8")
    check = ("check_draft", two_runs[0], "--draft", draft, "--state", state)
    assert "expected --story FILE" in run_main(*check)[2]
    code, out, err = run_main(*check, "--story", story, "--tokens", token_files["val"].parent)
    assert code == 0 and err == f"{state} has the story now\n" and out.startswith(("0 of 5 words", "1 of 5", "2 of 5"))
    code, out, err = run_main(*check, "--threshold", -100)
    assert code == 0 and err == "" and out.startswith("5 of 5 words do not fit the story (--threshold -100)\n")
    assert [line.split()[1] for line in out.splitlines()[1:]] == ["Soon", "Kim", "lost", "the", "kite"]
    assert run_main(*check, "--threshold", 0, "--story", story)[2] == ""
    story.write_text("Kim had a ball.")
    assert "has the story now" in run_main(*check, "--threshold", 0, "--story", story)[2]
    code, _, err = run_main("check_draft", two_runs[1], "--draft", draft, "--state", state)
    assert code == 2 and "it is of other weights" in err and err.count("\n") == 1
    story.write_bytes(b"caf\xe9")
    assert run_main(*check, "--story", story)[2] == f"error: {story} is not UTF-8 (byte 3); save it as UTF-8.\n"


def test_the_desk_looks_at_its_runs_before_it_opens_a_page(run_main, two_runs, token_files, tmp_path):
    """Guards: a page with a stack trace, or one that never ends loading; other machines let in without a word."""
    shutil.copytree(two_runs[1], tmp_path / "gpt2")
    for weights in (tmp_path / "gpt2").rglob("model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-100])
    tokens = token_files["val"].parent
    for runs, options, message in (([two_runs[0], tmp_path / "gpt2"], ["--tokens", tokens], "Whole checkpoints"),
                                   (two_runs, ["--tokens", tmp_path], "tokens.train.bin does not exist"),
                                   (two_runs, ["--tokens", tokens, "--false-alarms", "101"], "101%")):
        code, out, err = run_main("desk", *runs, *options)
        assert code == 2 and out == "" and message in err and err.count("\n") == 2 and "\nerror: " in err
    assert run_main("desk", *two_runs, "--tokens", tmp_path, "--host", "0.0.0.0")[2].startswith(
        "listening on 0.0.0.0: everybody who reaches this machine can use the desk\n")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port {port} of 127.0.0.1 cannot be used" in run_main("desk", *two_runs, "--port", port)[2]


def test_unequal_runs_are_named_in_the_summary(run_main, two_runs, token_files, tmp_path):
    """Guards: a verdict over runs of different length without a word."""
    from plotarmour.config import load_recipe
    from plotarmour.run import train_run

    longer = load_recipe("tiny", "gpt2", ["max_steps=2", "warmup_steps=0", "n_embd=16", "eval_tokens=100"])
    train_run(longer, token_files["train"], token_files["val"], tmp_path / "longer")
    code, _, _ = run_main("compare", two_runs[0], tmp_path / "longer", "--data", token_files["test"], "--out",
                          tmp_path / "out")
    assert code == 0 and "Not equal between the runs: tokens: " in (tmp_path / "out" / "summary.txt").read_text()


def test_a_run_goes_on_from_an_attached_read_only_output(token_files, two_runs, tmp_path):
    """Guards: a Kaggle session that starts from step 0 although its earlier output is attached."""
    from plotarmour.suite.steps import train_recipe

    data = tmp_path / "tokens"
    data.mkdir()
    for part in ("train", "val", "test"):
        (data / f"tokens.{part}.bin").write_bytes(token_files[part].read_bytes())
    settings = ["max_steps=1", "warmup_steps=0", "n_embd=16", "eval_tokens=100"]
    for path in [two_runs[0], *two_runs[0].rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    final = train_recipe("tiny", "bdh", data, tmp_path / "bdh", settings, continue_from=two_runs[0])
    assert final.step == 1 and (tmp_path / "bdh" / "log.csv").read_text() == (two_runs[0] / "log.csv").read_text()


def test_a_run_trained_from_text_is_known_by_its_text(run_main, token_files, tmp_path, warned):
    """Guards: baselines refused for a run on a text, and its training text scored as held out."""
    from plotarmour.data.pretokenize import pre_tokenize

    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    stories = token_files["text"].read_text().split("<|endoftext|>")
    text.write_text("<|endoftext|>".join(stories[:200]))
    other.write_text("<|endoftext|>".join(stories[200:]))
    files = [pre_tokenize([t], str(token_files["train"]), tmp_path / f"{t.stem}.bin")[0] for t in (text, other)]
    options = [o for s in ("max_steps=1", "warmup_steps=0", "n_embd=16", "eval_tokens=100") for o in ("--set", s)]
    with warned("not a token file"):
        code, _, err = run_main("train", "--recipe", "tiny", "--model", "bdh", "--train", text, "--val", other, "--out",
                                tmp_path / "run", "--tokenizer", token_files["train"], *options)
    assert code == 0, err
    arguments = ("compare", tmp_path / "run", "--train", files[0], "--out", tmp_path / "out", "--data")
    with warned("chosen on"):
        assert run_main(*arguments, files[1])[0] == 0
    code, _, err = run_main(*arguments, files[0], "--force")
    assert code == 2 and "was trained on" in err


def test_choosing_on_the_scored_stories_is_said_and_old_rows_go(run_main, two_runs, token_files, tmp_path, warned):
    """Guards: validation stories reported as held out; rows of an earlier comparison beside new totals."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stories_old.csv").write_text("story,tokens,bytes,nats\n")
    (tmp_path / "out" / "totals.csv").write_text("name,loss\nold,3.0\n")
    (tmp_path / "out" / "holiday.png").write_text("not ours")
    with warned("chosen on .*; use the test part for a result"):
        code, _, _ = run_main("evaluate", two_runs[0], "--data", token_files["val"], "--out", tmp_path / "out",
                              "--force")
    assert code == 0 and [p.name for p in (tmp_path / "out").glob("stories_*.csv")] == ["stories_bdh.csv"]
    assert (tmp_path / "out" / "holiday.png").exists()


def test_help_names_defaults_and_no_none(root):
    """Guards: "(default: None)" on required options, and a default of 0 that is hidden."""
    text = " ".join(call(root, "generate", "--help").stdout.split())
    assert "same seed, same story (default: 0)" in text and "None" not in text


def test_the_doctor_plans_for_a_gpu_that_is_not_here(run_main, monkeypatch):
    """Guards: a plan for the wrong vocabulary or device; the machine's report lost beside it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    options = ("--recipe", "kaggle_t4", "--device", "cuda")
    code, out, err = run_main("doctor", *options, "--dtype", "float16", "--memory-gib", 15)
    assert code == 0 and err == ""
    assert out.count("fits 15 GiB less 1.0 in reserve: the largest micro-batch") == len(KINDS)
    for model in ("bdh: micro-batch 32", "gpt2: micro-batch 16"):
        assert f"{model} x 512 tokens, vocabulary 50,257, float16 on cuda" in out
    code, out, err = run_main("doctor", *options)
    assert code == 2 and "--dtype float16 (T4)" in err and err.count("\n") == 1 and out == ""
    code, out, _ = run_main("doctor", "--recipe", "tiny", "--model", "bdh")
    assert code == 0 and "vocabulary 1,024, float32 on cpu" in out and "fits " in out
    assert run_main("doctor")[1].startswith("host ")


def test_parts_are_searched_for_copies(run_main, token_files, tmp_path):
    """Guards: a leak between the parts of a split; tables that replace others without a word."""
    out, files = tmp_path / "d.csv", [token_files[part] for part in ("train", "val", "test")]
    code, printed, _ = run_main("find_duplicates", *files, "--out", out, "--no-near")
    assert code == 0 and "val also in train" in printed and "d.counts.csv" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.counts.csv", "d.csv"]
    assert "normalised,val,train,31,0,0.0" in (tmp_path / "d.counts.csv").read_text()
    code, _, err = run_main("find_duplicates", *files, "--out", out)
    assert code == 2 and "exists already" in err
    assert run_main("find_duplicates", *files, "--out", out, "--no-near", "--force")[0] == 0


def test_words_of_a_text_with_prefixes_come_with_a_sentence_on_those_that_are_unknown(run_main, tmp_path):
    """Guards: losses and bits per byte of words without a word about what the tokenizer does not know."""
    text, x = tmp_path / "verses.txt", tmp_path / "x.bin"
    text.write_text("".join(f"Genesis {i}:1\tThe {'dog' if i % 9 else f'cat{i}'} said: {'Go! ' * (i % 5)}\n"
                            for i in range(300)))
    options = ["--stories", "line", "--strip-prefix", "--split", "80:10:10", "--out", x]
    code, _, err = run_main("pre_tokenize", text, "--tokenizer", "words:14", *options)
    assert code == 0 and err.count("words that the tokenizer does not know") == 3
    parts = [tmp_path / f"x.{part}.bin" for part in ("train", "val", "test")]
    printed = run_main("pre_tokenize", "--info", parts[2])[1]
    assert "first story: The " in printed and "a story by line_without_prefix" in printed and "<?>" in printed
    totals = pd.DataFrame({"tokens": [9], "stories": [2], "bytes": [30]})
    assert denominators(SimpleNamespace(table=totals, unknown=unknown_words(TokenFile.open(parts[2])))).endswith(
        "over 30 bytes of their text. " + next(line for line in printed.splitlines() if "does not know" in line))


def test_bare_ids_become_a_token_file_that_tools_read(run_main, token_files, tmp_path):
    """Guards: an import that shows nothing of what it read, or that the next tool cannot read."""
    from plotarmour.data.token_file import TokenFile

    raw, out = tmp_path / "train.bin", tmp_path / "x.bin"
    raw.write_bytes(TokenFile.open(token_files["val"]).tokens.tobytes())
    code, printed, _ = run_main("import_bin", raw, "--tokenizer", token_files["val"], "--dtype", "uint16", "--out", out)
    assert code == 0 and "0 empty stories dropped" in printed and "first story: Once upon a time" in printed
    assert "first story: Once upon" in run_main("pre_tokenize", "--info", out)[1]


def test_results_are_replaced_only_with_force(run_main, two_runs, token_files, tmp_path):
    """Guards: a mistyped --out that silently deletes the tables and figures of another comparison."""
    arguments = ("evaluate", two_runs[0], "--data", token_files["test"], "--out", tmp_path / "out")
    assert run_main(*arguments)[0] == 0
    before = (tmp_path / "out" / "totals.csv").stat().st_mtime_ns
    code, out, err = run_main(*arguments)
    assert code == 2 and out == "" and "totals.csv exists already" in err and err.count("\n") == 1
    assert (tmp_path / "out" / "totals.csv").stat().st_mtime_ns == before
    assert run_main(*arguments, "--force")[0] == 0


def test_every_tool_that_reads_a_run_takes_a_step(run_main, two_runs, token_files, tmp_path):
    """Guards: a kept checkpoint that only Python can name; generate and compare that know the best one alone."""
    scored = ("--data", token_files["test"], "--out", tmp_path / "out", "--checkpoint", 1)
    assert run_main("evaluate", two_runs[0], *scored)[0] == 0
    assert run_main("compare", *two_runs, *scored, "--force")[0] == 0
    assert run_main("generate", two_runs[0], "--checkpoint", "latest", "--max-new-tokens", 3)[0] == 0
    code, _, err = run_main("generate", two_runs[0], "--checkpoint", 12345)
    assert code == 2 and "has no step-12345 checkpoint" in err
    assert run_main("generate", two_runs[0], "--checkpoint", "last")[0] == 2


def test_an_option_means_the_same_in_all_tools(root):
    """Guards: --device in one tool and --set device= in the next; --workers for threads here and files there."""
    helps = {}
    for tool in TOOLS:
        spec = importlib.util.spec_from_file_location(tool, root / "tools" / f"{tool}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for action in module.build_parser()._actions:
            for name in {"--checkpoint", "--force", "--set", "--device", "--workers"} & set(action.option_strings):
                helps.setdefault(name, {})[tool] = action.help.removesuffix("; without it, the recipe's")
    assert all(len(set(by_tool.values())) == 1 for by_tool in helps.values()), helps
    assert helps["--checkpoint"].keys() == {"check_draft", "compare", "evaluate", "generate"}
    assert helps["--device"].keys() == helps["--checkpoint"].keys() | {"doctor", "run_suite", "train"}
    assert helps["--workers"].keys() == {"pre_tokenize"}
