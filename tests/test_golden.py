"""Numbers that tidying must not move, recorded before the package was laid out anew (commit d1f914a).

Token files are equal to the byte everywhere. Losses and nats follow from sums whose last bits depend on the processor,
and training amplifies them: the unchanged commit differs by up to 6e-4 between two processors after twenty steps. To
the bit they are compared only where CPU capability and torch version are those of the recording.
"""

import csv
import hashlib
import json

import pytest
import torch

from plotarmour.config import load_recipe
from plotarmour.data.pretokenize import pre_tokenize
from plotarmour.report.compare import compare_runs
from plotarmour.run import train_run
from plotarmour.suite.steps import tell_corpus

WORDS = ("Tom", "the", "dragon", "sang", "café", "—", "old", "moon", "ran", "home")
STORIES = [" ".join(WORDS[(i * j + j) % 10] for j in range(3, 9 + i % 7)) + "." for i in range(400)]
TEXTS = {"endoftext": "\n<|endoftext|>\n".join(STORIES), "line": "\n".join(STORIES),
         "jsonl": "".join(json.dumps({"text": story}) + "\n" for story in STORIES)}
ARITHMETIC = [torch.__version__, torch.backends.cpu.get_cpu_capability()]

PROCESSORS = 3e-3  # relative difference that two processors may make


@pytest.fixture(scope="module")
def golden(root):
    return json.loads((root / "tests" / "golden.json").read_text(encoding="utf-8"))


def token_file_hashes(folder):
    hashes = {}
    for name, text in TEXTS.items():
        path = folder / f"{name}.{'jsonl' if name == 'jsonl' else 'txt'}"
        path.write_text(text, encoding="utf-8", newline="\n")
        for tokenizer in ("bpe:280", "bytes"):
            parts = pre_tokenize([path], tokenizer, folder / f"{name}_{tokenizer[:3]}.bin", "80:10:10",
                                 "line" if name == "line" else "endoftext")
            for part in parts:
                hashes[part.name] = hashlib.sha256(part.read_bytes()).hexdigest()
    return hashes


def twenty_steps(folder):
    """Train 20 steps of recipe tiny for both models on a small corpus, then compare them on its test part."""
    text, facts = tell_corpus(folder / "built-in.txt", 300, 0, (2, 4))
    train, val, test = pre_tokenize([text], "bpe:400", folder / "tokens.bin", "80:10:10")
    settings = ["max_steps=20", "warmup_steps=2", "log_interval=1", "eval_interval=10", "eval_tokens=500", "device=cpu"]
    numbers = {}
    for model in ("bdh", "gpt2"):
        train_run(load_recipe("tiny", model, settings), train, val, folder / model)
        with (folder / model / "log.csv").open(encoding="utf-8", newline="") as file:
            numbers[model] = [row["train_loss"] for row in csv.DictReader(file)]
        weights = folder / model / "checkpoints" / "step_00000020" / "model.safetensors"
        numbers[f"{model} weights"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    compare_runs([folder / "bdh", folder / "gpt2"], test, folder / "comparison", train, facts)
    with (folder / "comparison" / "pairs.csv").open(encoding="utf-8", newline="") as file:
        [pair] = csv.DictReader(file)
    # Seconds and memory differ from run to run.
    numbers["pair"] = {key: value for key, value in pair.items() if "train_s" not in key and "time" not in key
                       and key != "matched"}
    return numbers


def test_token_files_are_equal_to_the_byte(golden, tmp_path):
    """Guards: a refactoring of readers, tokenizers or the writer that changes what is written."""
    assert token_file_hashes(tmp_path) == golden["token_files"]


@pytest.fixture
def one_thread():
    """Sums of several threads add up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_twenty_steps_and_their_comparison_give_the_recorded_numbers(golden, tmp_path, one_thread):
    """Guards: a refactoring of batches, models, loss, optimizer, scoring or statistics that moves a number."""
    numbers, recorded = twenty_steps(tmp_path), golden["twenty_steps"]
    if golden["arithmetic"] == ARITHMETIC:
        for key in ("bdh", "gpt2", "bdh weights", "gpt2 weights"):
            assert numbers[key] == recorded[key], key
    for model in ("bdh", "gpt2"):
        losses, expected = ([float(loss or "nan") for loss in each[model]] for each in (numbers, recorded))
        assert losses == pytest.approx(expected, rel=PROCESSORS, nan_ok=True)
    for key, expected in recorded["pair"].items():
        try:
            assert float(numbers["pair"][key]) == pytest.approx(float(expected), rel=PROCESSORS, abs=1e-9), key
        except ValueError:
            assert numbers["pair"][key] == expected, key
