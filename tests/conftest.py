import importlib.util
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package works without being installed
if "PYTEST_XDIST_WORKER" in os.environ:  # workers with several threads each slow each other down many times
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from plotarmour.models import KINDS, SUITE, build_model, model_config  # noqa: E402


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real texts and reference numbers; tests that need them skip where they are not at hand."""
    folder = Path(os.environ.get("PLOTARMOUR_TEST_DATA", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("needs texts and numbers of others: set PLOTARMOUR_TEST_DATA to their folder (see CONTRIBUTING.md)")
    return folder


@pytest.fixture(scope="session")
def token_files(tmp_path_factory) -> dict[str, Path]:
    """Token files of 300 short built-in stories in BPE-400, with their text and facts."""
    from plotarmour.data.pretokenize import pre_tokenize
    from plotarmour.suite.steps import tell_corpus

    folder = tmp_path_factory.mktemp("tokens")
    text, facts = tell_corpus(folder / "built-in.txt", 300, 0, (0, 1))
    parts = pre_tokenize([text], "bpe:400", folder / "tokens.bin", "80:10:10")
    return {"text": text, "facts": facts} | dict(zip(("train", "val", "test"), parts, strict=True))


@pytest.fixture(scope="session")
def two_runs(token_files, tmp_path_factory) -> list[Path]:
    """The run folders of a BDH and a GPT-2 of one step."""
    from plotarmour.config import load_recipe
    from plotarmour.run import train_run

    folder = tmp_path_factory.mktemp("runs")
    for model in ("bdh", "gpt2"):
        recipe = load_recipe("tiny", model, ["max_steps=1", "warmup_steps=0", "n_embd=16", "eval_tokens=100"])
        train_run(recipe, token_files["train"], token_files["val"], folder / model)
    return [folder / "bdh", folder / "gpt2"]


@pytest.fixture(autouse=True)
def warned(monkeypatch):
    """A context whose block may warn, and which gives the warnings; with a regular expression, one of them must match.

    A warning outside such a block fails the test.
    """
    from plotarmour import cli

    say, unexpected = cli.say, []
    messages = unexpected

    def listen(line):
        if line.startswith("warning: "):
            messages.append(line.removeprefix("warning: "))
        say(line)

    @contextmanager
    def expect(pattern=None):
        nonlocal messages
        cli.warn.cache_clear()  # it prints each warning once
        messages = expected = []
        try:
            yield expected
        finally:
            messages = unexpected
        assert pattern is None or any(re.search(pattern, message) for message in expected), expected

    cli.warn.cache_clear()
    monkeypatch.setattr(cli, "say", listen)
    yield expect
    assert not unexpected, f"unexpected warnings: {unexpected}"


@pytest.fixture
def run_main(root, monkeypatch, capsys):
    """Call a tool's main in this process (a fresh one costs seconds of imports): returns exit code, stdout, stderr."""
    from plotarmour.cli import run_command

    def run(tool, *args):
        spec = importlib.util.spec_from_file_location(f"tool_{tool}", root / "tools" / f"{tool}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [tool, *map(str, args)])
        code = 0
        try:
            run_command(module.main)
        except SystemExit as ended:
            code = ended.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


# A small architecture of every kind.
TINY = {"bdh": {"n_layer": 2, "n_embd": 16, "n_head": 2, "mlp_internal_dim_multiplier": 8, "dropout": 0.1},
        "bdh_plus": {"n_layer": 2, "n_embd": 16, "n_head": 2, "mlp_internal_dim_multiplier": 8, "dropout": 0.1,
                     "weights_per_pass": True, "decay": 0.1, "differential": True, "init_std": 0.3},
        "gpt2": {"n_layer": 2, "n_embd": 16, "n_head": 2, "dropout": 0.1},
        "gpt2_rope": {"n_layer": 2, "n_embd": 16, "n_head": 2, "dropout": 0.1},
        "llama": {"n_layer": 2, "n_embd": 16, "n_head": 2, "intermediate_size": 24},
        "modern": {"n_layer": 2, "n_embd": 16, "n_head": 2},
        "moe": {"n_layer": 2, "n_embd": 16, "n_head": 2, "intermediate_size": 12, "n_experts": 4},
        "lstm": {"n_layer": 2, "n_embd": 16, "hidden_size": 20, "dropout": 0.1}}


@pytest.fixture(params=[pytest.param(kind, marks=() if kind in SUITE else pytest.mark.slow) for kind in KINDS])
def small_recipe(request):
    """A recipe of each kind that trains in a second."""
    from plotarmour.config import DataConfig, Recipe, TrainingConfig

    training = TrainingConfig(context_length=24, rows_per_step=4, micro_batch_size=2, max_steps=6,
                              learning_rate=3e-3, warmup_steps=2, log_interval=1, eval_interval=2, eval_tokens=200,
                              checkpoint_interval=3, keep_every=3)
    return Recipe("small", request.param, DataConfig("bpe:400"), training, TINY[request.param])


@pytest.fixture(params=list(KINDS))
def small_model(request):
    """An untrained model of each kind with 50 tokens, without dropout."""
    without_dropout = {name: 0.0 if name == "dropout" else value for name, value in TINY[request.param].items()}
    config = model_config(request.param, without_dropout, vocab_size=50, context_length=64)
    return build_model(request.param, config, seed=0)
