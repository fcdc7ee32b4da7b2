"""Run folders, tokenizers, recipes and grids whose content is changed and whose checksums are right again.

Every tool answers with success, or with one line and exit code 2. Nothing else than what the command names is written,
and no case takes 1 GB of memory or many seconds. Values are of any JSON type, but not what no program or hand writes:
numbers beyond 64 bits, half surrogates, a wrong header length; and no id of 2**31 in vocab.json, for which the library
takes all memory before this package sees the file. (Token files: tests/data/test_token_file.py.)
"""

import hashlib
import json
import shutil
import struct
import time
import tomllib
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from plotarmour.config import RECIPES, load_recipe
from plotarmour.data.tokenizer import make_tokenizer
from plotarmour.run import train_run
from plotarmour.training.checkpoint import sealed_json, write_manifest
from plotarmour.training.ending import Ending

pytestmark = pytest.mark.slow
SMALL = {"max_steps": 4, "warmup_steps": 1, "n_embd": 16, "n_head": 2, "n_layer": 1, "eval_tokens": 100,
         "eval_interval": 2, "checkpoint_interval": 2, "context_length": 24, "keep_every": 2}
SETS = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
VALUES = [None, True, False, 0, -1, 1, 2, 3, 2**31, 2**53, 2**63, 0.0, 1e-300, -0.5, 0.5, 1e308, float("inf"),
          float("nan"), "", "\0", "a\nb", "cpu", "auto", "../elsewhere/target", "a" * 5000, [], {}, [1, "a"]]


def fuzz(cases):
    """The same cases at every start, and no search for a smaller one; each gets `random`, seeded by hypothesis."""
    chosen = settings(max_examples=cases, derandomize=True, deadline=None, database=None, report_multiple_bugs=False,
                      suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate])
    return lambda test: chosen(given(st.randoms(use_true_random=True))(test))


def mutated(random, value, depth=0):
    """Return a JSON value with one place changed: replaced, removed, added or nearly the same."""
    if not (isinstance(value, dict | list) and value) or random.random() < (0.2 if depth else 0.03):
        near = [value + 1, -value, value * 1000] if type(value) in (int, float) else [f"{value}x", [value]]
        return random.choice([*VALUES, *near, *near])
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    i, act = random.randrange(len(items)), random.choice(["change"] * 6 + ["remove", "add"])
    if act == "change":
        items[i] = items[i][0], mutated(random, items[i][1], depth + 1)
    elif act == "remove":
        del items[i]
    else:
        items.insert(i, (random.choice(["new", "", "a\0b"]), random.choice([*VALUES, items[i][1]])))
    return dict(items) if isinstance(value, dict) else [each for _, each in items]


def snapshot(folder, *names_only):
    """The bytes of every file below a folder; of folders that a command may write into, the names alone."""
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))
            if not any(path.is_relative_to(name) for name in names_only)}


@pytest.fixture(scope="module")
def finished(token_files, tmp_path_factory):
    """A run of each model, never to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    for kind in ("bdh", "gpt2"):
        recipe = load_recipe("tiny", kind, [f"{key}={value}" for key, value in SMALL.items()])
        train_run(recipe, token_files["train"], token_files["val"], folder / kind)
    return folder


@pytest.fixture
def judge(run_main, warned, tmp_path, monkeypatch):
    """Run a tool: success, or one line and exit code 2; nothing is written but into folders that are named for it."""
    import plotarmour.report.compare  # noqa: F401, before memory is limited
    resource = pytest.importorskip("resource")
    monkeypatch.chdir(tmp_path)

    def run(tool, *args, writes=()):
        before, begun, limits = snapshot(tmp_path, *writes), time.monotonic(), resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (psutil.Process().memory_info().data + 2**30, limits[1]))
        try:
            with warned():
                code, out, err = run_main(tool, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, limits)
        errors = [line for line in err.splitlines() if not line.startswith("warning: ")]
        is_refused = code == 2 and "error: " in err and (len(errors) == 1 or tool == "run_suite")  # a line for each row
        assert code == 0 or is_refused or (code == 1 and "not finite" in out), (code, err)
        assert "Traceback" not in err and snapshot(tmp_path, *writes) == before and time.monotonic() - begun < 20
        return code

    return run


def as_csv(rows, quoted=False):
    """The text of changed rows: one may be a number, and so may they all."""
    lines = [row if isinstance(row, list) else [row] for row in (rows if isinstance(rows, list) else [rows])]
    text_of = (lambda cell: json.dumps(str(cell), ensure_ascii=False)) if quoted else str
    return "\n".join(",".join(map(text_of, line)) for line in lines)


def common(token_files, out, recipe="tiny"):
    return "--recipe", recipe, "--train", token_files["train"], "--val", token_files["val"], "--out", out


def change_run(random, run):
    """Change one kind of file of a run folder, and make the checksums right again. Return its name."""
    name = random.choice([*["run.json", "state.json"] * 2, "DONE.json", "log.csv", "tokenizer.json", "MANIFEST.json",
                          "model.safetensors", "optimizer.safetensors"])
    for path in sorted(run.rglob(name)):
        content = path.read_bytes()
        start = 8 + struct.unpack("<Q", content[:8])[0] if name.endswith(".safetensors") else 0
        if name == "log.csv":
            path.write_text(as_csv(mutated(random, [line.split(",") for line in content.decode().splitlines()])))
            continue
        changed = mutated(random, json.loads(content[8:start] if start else content))
        text = json.dumps(changed)
        if name == "MANIFEST.json" and isinstance(changed, dict) and changed.pop("sha256", None):
            text = sealed_json(changed)
        path.write_bytes(start and struct.pack("<Q", len(text)) + text.encode() + content[start:] or text.encode())
        if name == "tokenizer.json":
            info = json.loads((run / "run.json").read_text())
            info["tokenizer"]["sha256"] = hashlib.sha256(text.encode()).hexdigest()
            (run / "run.json").write_text(json.dumps(info))
        elif path.parent != run and name != "MANIFEST.json":
            write_manifest(path.parent, int(path.parent.name[5:]))
    return name


@fuzz(300)
def test_a_changed_run_folder_is_refused_in_one_line_or_used(finished, token_files, judge, tmp_path, random):
    """Guards: tracebacks and endless memory for a run folder of another program, hand or disk."""
    kind, tool = random.choice(["bdh", "gpt2"]), random.choice(["generate", "train", "train", "evaluate"])
    run, out = tmp_path / "run", tmp_path / "out"
    for folder in (run, out):
        shutil.rmtree(folder, ignore_errors=True)
    name = change_run(random, shutil.copytree(finished / kind, run))
    if tool == "generate":
        judge("generate", run, "--max-new-tokens", 3, "--checkpoint", random.choice(["best", "latest", 2]))
    elif tool == "evaluate":
        judge("evaluate", run, "--data", token_files["test"], "--out", out, writes=[out])
    else:
        if name != "DONE.json" and random.random() < 0.8:
            (run / "DONE.json").unlink()
            shutil.rmtree(run / "checkpoints" / "step_00000004")
        more = random.choice([[], [], ["--from-step", 2], ["--extend", "--set", "max_steps=5"]])
        judge("train", "--model", kind, *common(token_files, run), *SETS, *more, writes=[run])


@fuzz(600)
def test_a_changed_recipe_is_refused_in_one_line_or_used(finished, token_files, judge, tmp_path, monkeypatch, random):
    """Guards: tracebacks, endless loops and memory for numbers that a recipe or --set may have; nothing is trained."""
    ending = Ending.read(finished / "bdh")
    monkeypatch.setattr("plotarmour.run.Session", lambda *args: SimpleNamespace(train=lambda: ending))
    path, out, kind, sets = tmp_path / "own.toml", tmp_path / "run", random.choice(["bdh", "gpt2"]), []
    shutil.rmtree(out, ignore_errors=True)
    sections = tomllib.loads((RECIPES / "tiny.toml").read_text())
    sections["training"]["micro_batch_size"] = random.choice([4, "auto"])
    if random.random() < 0.6:
        sections = mutated(random, sections)
    else:
        key = random.choice([*sections["data"], *sections["training"], *sections[kind], "patience", ""])
        value = random.choice([*VALUES, "1e309", "-0", "1_0", "0x10", " 3 ", "1e3", "nan"])
        sets = ["--set", f"{key}={value}".replace("\0", "")]
    tables = sections if isinstance(sections, dict) else {"": sections}
    lines = [f"{json.dumps(key)} = {json.dumps(each, separators=(', ', ' = '))}" for key, each in tables.items()]
    path.write_text("\n".join(lines).replace("Infinity", "inf").replace("NaN", "nan"))  # TOML, on one line per section
    judge("train", "--model", kind, *common(token_files, out, path), *sets, writes=[out])


@fuzz(600)
def test_a_changed_grid_is_refused_in_one_line_or_used(judge, tmp_path, monkeypatch, random):
    """Guards: tracebacks for cells, columns and texts that a spreadsheet may write; no row is run."""
    monkeypatch.setattr("plotarmour.suite.runner.run_grid", lambda *arguments: [])
    rows = [["run", "model", "overrides", "seed" if random.random() < 0.1 else "recipe"],
            ["a", "bdh", "learning_rate=0.004;seed=2", "tiny"], ["", "gpt2", "", ""],
            ["c", "", "max_steps=300", "tiny"]]
    for _ in range(random.choice([1, 1, 2])):
        rows = mutated(random, rows)
    encoding = random.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "cp1252"])
    (tmp_path / "grid.csv").write_bytes(as_csv(rows, random.random() < 0.5).encode(encoding, "replace"))
    judge("run_suite", "--grid", "grid.csv", "--out", tmp_path / "out", writes=[tmp_path / "out"])


@pytest.fixture(scope="module")
def tokenizers_of_others(token_files, tmp_path_factory):
    """Paths of a small tokenizer.json of each model of the library, learned from the built-in stories."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    found, unknown, byte_level = [], {"unk_token": "[UNK]"}, pre_tokenizers.ByteLevel
    for model, trainer, options in (
            (models.BPE(), trainers.BpeTrainer, {"initial_alphabet": byte_level.alphabet()}),
            (models.Unigram(), trainers.UnigramTrainer, unknown),
            (models.WordPiece(**unknown), trainers.WordPieceTrainer, {}),
            (models.WordLevel(**unknown), trainers.WordLevelTrainer, {})):
        tokenizer, is_bpe = Tokenizer(model), trainer is trainers.BpeTrainer
        tokenizer.pre_tokenizer = byte_level(add_prefix_space=False) if is_bpe else pre_tokenizers.Whitespace()
        tokenizer.normalizer = normalizers.Sequence([] if is_bpe else [normalizers.NFC(), normalizers.Lowercase()])
        tokenizer.train([str(token_files["text"])], trainer(vocab_size=300, special_tokens=["<|endoftext|>", "[UNK]"],
                                                            show_progress=False, **options))
        found.append(json.loads(tokenizer.to_str()))
    found[0]["decoder"] = found[0]["pre_tokenizer"]
    found.append(json.loads(make_tokenizer("words:60", [token_files["text"].read_text()]).json))
    folder = tmp_path_factory.mktemp("others")
    paths = [folder / f"{i}.json" for i in range(len(found))]
    for path, content in zip(paths, found, strict=True):
        path.write_text(json.dumps(content))
    return paths


@fuzz(600)
def test_a_changed_tokenizer_is_refused_in_one_line_or_its_file_is_whole(judge, token_files, tokenizers_of_others,
                                                                         tmp_path, random):
    """Guards: panics of the library, and token files that cannot be read again."""
    folder, out = tmp_path / "tokenizer", tmp_path / "out"
    for each in (folder, out):
        shutil.rmtree(each, ignore_errors=True)
        each.mkdir()
    content = json.loads(random.choice(tokenizers_of_others).read_text())
    for _ in range(random.choice([1, 1, 2])):
        content = mutated(random, content)
    if random.random() < 0.8:
        (folder / "tokenizer.json").write_text(json.dumps(content))
    else:
        model = json.loads(tokenizers_of_others[0].read_text())["model"]
        vocabulary = json.dumps(mutated(random, model["vocab"])).replace(str(2**31), "300")
        (folder / "vocab.json").write_text(vocabulary)
        (folder / "merges.txt").write_text(as_csv(mutated(random, [" ".join(pair) for pair in model["merges"]])))
    text = tmp_path / "text.txt"
    text.write_text(token_files["text"].read_text()[:5000] + "<|endoftext|>\n\u0928\u092e, \U0001f600\n")
    if judge("pre_tokenize", text, "--tokenizer", folder, "--out", out / "x.bin", "--workers", 1, writes=[out]) == 0:
        assert judge("pre_tokenize", "--info", out / "x.bin", "--verify") == 0


@pytest.mark.parametrize("name", ["run.json", "log.csv", "log.cut.csv", "tokenizer.json", "DONE.json", "STOPPED.json",
                                  "figures", "checkpoints", "checkpoints/step_00000002",
                                  "checkpoints/step_00000004/state.json", ".lock"])
def test_a_symbolic_link_in_a_run_folder_is_never_written_through(finished, token_files, judge, tmp_path, name):
    """Guards: a run folder of somebody else that changes files outside it."""
    run, elsewhere = shutil.copytree(finished / "gpt2", tmp_path / "run"), tmp_path / "elsewhere"
    if (run / name).exists():
        (run / name).rename(elsewhere)
    else:
        elsewhere.mkdir() if name in ("figures", ".lock") else elsewhere.write_text("kept")
    (run / name).symlink_to(elsewhere)
    judge("evaluate", run, "--data", token_files["test"], "--out", tmp_path / "out", writes=[tmp_path / "out"])
    assert judge("train", "--model", "gpt2", *common(token_files, run), *SETS, "--extend", "--set", "max_steps=5",
                 writes=[run]) == 2
