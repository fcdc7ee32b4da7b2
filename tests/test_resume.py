import csv
import dataclasses
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save

from plotarmour import run as runs
from plotarmour.cli import UserError
from plotarmour.config import DataConfig, Recipe, TrainingConfig
from plotarmour.resume import check_folder, differences, note_changes, read_info
from plotarmour.run import load_run, train_run
from plotarmour.training.checkpoint import FILES, find_checkpoint, sealed_json, write_manifest
from plotarmour.training.ending import Ending
from plotarmour.training.optimizer import learning_rate

RECIPE = Recipe("small", "gpt2", DataConfig("bpe:400"),
                TrainingConfig(context_length=24, rows_per_step=4, micro_batch_size=2, max_steps=6,
                               learning_rate=3e-3, schedule="linear_tail", warmup_steps=2, log_interval=1,
                               eval_interval=2, eval_tokens=200, checkpoint_interval=3, keep_every=3),
                {"n_layer": 1, "n_embd": 16, "n_head": 2, "dropout": 0.0})


# That may be others from session to session; a dtype that was asked for counts as what is computed in.
FREE = ("device", "dtype", "max_minutes", "checkpoint_interval", "keep_every", "log_interval", "micro_batch_size")


def changed(**settings):
    return dataclasses.replace(RECIPE, training=dataclasses.replace(RECIPE.training, **settings))


def train(files, out, settings=None, **options):
    return train_run(changed(**(settings or {})), files["train"], files["val"], out, **options)


def info_of(run):
    return json.loads((run / "run.json").read_text())


def contents(folder):
    """Every file's bytes and time of change."""
    return {path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*")
            if path.is_file()}


def bits(run):
    return [(find_checkpoint(run, "latest") / name).read_bytes() for name in FILES[:2]]


def rows_of(run):
    with (run / "log.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def rates(run):
    rows = [line.split(",") for line in (run / "log.csv").read_text().splitlines()]
    at = rows[0].index("learning_rate")
    return [float(row[at]) for row in rows[1:] if row[at]]


@pytest.fixture(scope="module")
def finished(token_files, tmp_path_factory):
    """A finished run of 6 steps, never to be changed."""
    out = tmp_path_factory.mktemp("resuming") / "run"
    train(token_files, out)
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run")


def other(value):
    return not value if isinstance(value, bool) else f"{value}x" if isinstance(value, str) else value + 1


def test_what_changes_the_numbers_is_identity_and_nothing_else_is(finished):
    """Guards: two runs in one log; a run that cannot go on with another time limit, device or micro-batch."""
    info = info_of(finished)
    for field in dataclasses.fields(TrainingConfig):
        training = info["recipe"]["training"]
        now = info | {"recipe": info["recipe"] | {"training": training | {field.name: other(training[field.name])}}}
        if field.name in FREE:
            check_folder(finished, now, "auto", None, False)
        else:
            with pytest.raises(UserError, match=f": {field.name} was .*, now "):
                check_folder(finished, now, "auto", None, False)


def test_a_run_that_is_older_than_a_setting_has_its_default(run):
    """Guards: finished trainings that no tool reads any more because a setting was added."""
    info = info_of(run)
    del info["recipe"]["training"]["mask_stories"]
    (run / "run.json").write_text(json.dumps(info))
    assert read_info(run)["recipe"]["training"] == info["recipe"]["training"] | {"mask_stories": False}
    assert not differences(run, info_of(run) | {"recipe": read_info(run)["recipe"]})


def test_all_differences_are_told_at_once_and_extend_is_no_remedy_for_them(finished):
    """Guards: one difference a start; an advice to extend another run; a line full of hashes."""
    info = info_of(finished)
    recipe = info["recipe"] | {"model": "bdh", "architecture": info["recipe"]["architecture"] | {"n_embd": 32},
                               "training": info["recipe"]["training"] | {"seed": 9, "max_steps": 7}}
    dtype = {"bfloat16": "float16"}.get(info["dtype"], "bfloat16")  # another than that of this machine
    now = info | {"recipe": recipe, "dtype": dtype, "tokenizer": {"sha256": "a" * 64},
                  "train": {"payload_sha256": "b" * 64}, "val": {"payload_sha256": "c" * 64}}
    with pytest.raises(UserError) as refused:
        check_folder(finished, now, "auto", None, False)
    told = str(refused.value)
    for key, value in (("model", "bdh"), ("n_embd", 32), ("seed", 9), ("max_steps", 7), ("dtype", dtype),
                       ("tokenizer", "a" * 16), ("training text", "b" * 16), ("validation text", "c" * 16)):
        assert f"{key} was " in told and f", now {value}" in told, key
    assert told.endswith("Use another --out.") and "--extend" not in told and "a" * 17 not in told
    with pytest.raises(UserError) as refused:  # what may be extended is then no difference
        check_folder(finished, now, "auto", None, True)
    assert "max_steps" not in str(refused.value) and "seed was 0, now 9" in str(refused.value)


def test_a_longer_run_needs_extend_and_is_told_so(run, token_files):
    """Guards: a run that becomes another one by a typing mistake; a refusal that does not say how; leftovers of it."""
    before = contents(run)
    for settings in ({"max_steps": 12}, {"max_steps": 4}, {"patience": 3}, {"schedule_minutes": 5.0}):
        with pytest.raises(UserError, match=f"{next(iter(settings))} was .*, now .*--extend"):
            train(token_files, run, settings)
    assert contents(run) == before


@pytest.mark.parametrize("schedule", ["linear_tail", "cosine"])
def test_an_extended_run_goes_on_to_the_new_end_by_the_longer_schedule(schedule, token_files, tmp_path, capsys):
    """Guards: an extension that starts over, keeps the old rates or is noted anew at every start; a run.json that
    says another length than the run has."""
    run, short, long = tmp_path / "run", {"schedule": schedule}, {"schedule": schedule, "max_steps": 12}
    assert train(token_files, run, short).step == 6
    log = (run / "log.csv").read_text()
    final = train(token_files, run, long, extend=True)
    assert (final.step, final.reason) == (12, "max_steps")
    assert "continuing" in (said := capsys.readouterr().out) and "may rise again" in said
    assert (run / "log.csv").read_text().startswith(log)
    expected = [learning_rate(s, changed(**(short if s < 6 else long)).training) for s in range(12)]
    assert rates(run) == pytest.approx(expected, rel=1e-6) and expected[6] > expected[5]
    [noted] = info_of(run)["changes"]
    assert noted.pop("utc") and noted == {"step": 6, "why": "--extend", "max_steps": [6, 12]}
    before = contents(run)
    assert train(token_files, run, long) == train(token_files, run, long, extend=True) == final
    assert contents(run) == before


def test_an_extended_run_is_loaded_as_the_longer_one_it_is(run, token_files):
    """Guards: the README's example on a run whose run.json was changed; the old length in a comparison."""
    import torch

    from plotarmour.data.token_file import TokenFile

    train(token_files, run, {"max_steps": 8}, extend=True)
    loaded = load_run(run)
    story = TokenFile.open(token_files["test"]).story(0)[:20]
    logits = loaded.model(torch.tensor([story.tolist()], device=loaded.machine.device))
    assert logits.shape == (1, len(story), 400) and loaded.config.training.max_steps == 8


def test_a_run_extended_before_its_rates_fall_has_the_bits_of_one_that_was_always_that_long(run, token_files, tmp_path):
    """Guards: an extension that differs from the run it stands for; a step back that nobody can see in run.json."""
    train(token_files, tmp_path / "whole", {"max_steps": 9})
    final = train(token_files, run, {"max_steps": 9}, extend=True, from_step=3)
    assert final.step == 9 and bits(run) == bits(tmp_path / "whole")
    assert rates(run) == rates(tmp_path / "whole")
    back, longer = info_of(run)["changes"]
    assert (back["why"], back["step"], back["reached"]) == ("--from-step", 3, [6, 3])
    assert (longer["why"], longer["step"], longer["max_steps"]) == ("--extend", 3, [6, 9])


@pytest.mark.parametrize(("is_done", "from_step", "message"), [
    (True, None, "ended at step 6: max_steps, with max_steps = 6. It continues only with a higher max_steps; found 4"),
    (False, None, "is at step 6, beyond max_steps = 4; set max_steps to at least 6, or name an earlier, kept step"),
    (True, 6, "is at step 6, beyond max_steps = 4; set max_steps to at least 6, or name an earlier, kept step"),
], ids=["finished", "not finished", "gone back"])
def test_a_run_is_not_made_shorter_than_it_is(run, token_files, is_done, from_step, message):
    """Guards: a refused shortening that run.json notes all the same, so that the right command is refused from then
    on; checkpoints and DONE.json given up for it."""
    if not is_done:
        (run / "DONE.json").unlink()
    before = contents(run)
    with pytest.raises(UserError, match=message):
        train(token_files, run, {"max_steps": 4}, extend=True, from_step=from_step)
    assert contents(run) == before
    assert train(token_files, run).step == 6


def test_early_stopping_that_has_fired_is_extended_by_patience_only(token_files, tmp_path):
    """Guards: an extension that ends on the spot without a word, and a run.json that calls the run longer."""
    worse = {"learning_rate": 30.0, "warmup_steps": 0, "max_steps": 9, "eval_interval": 1, "patience": 2}
    final = train(token_files, tmp_path / "run", worse)
    assert final.reason == "early stopping" and final.step < 9
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match=r"ended at step .: early stopping, with patience = 2. .* only with a higher "
                                        r"patience \(or 0, for no limit\); found 2"):
        train(token_files, tmp_path / "run", worse | {"max_steps": 20}, extend=True)
    assert contents(tmp_path / "run") == before
    more = train(token_files, tmp_path / "run", worse | {"patience": 3}, extend=True)
    assert more.step == final.step + 1 and more.reason == "early stopping"
    assert train(token_files, tmp_path / "run", worse | {"patience": 0}, extend=True).reason == "max_steps"
    assert [change["patience"] for change in info_of(tmp_path / "run")["changes"]] == [[2, 3], [3, 0]]


def test_other_pieces_of_the_same_rows_go_on_and_are_noted(run, token_files):
    """Guards: a run bound to the memory of the machine it began on; other bits without a trace of why."""
    before = json.loads((run / "DONE.json").read_text())
    final = train(token_files, run, {"micro_batch_size": 4}, from_step=3)
    assert final.val_loss == pytest.approx(before["val_loss"], rel=1e-5)
    noted = info_of(run)["changes"][1]
    assert noted.pop("utc") and noted == {"step": 3, "why": "settings", "micro_batch_size": [2, 4]}
    assert final.micro_batch_size == load_run(run).config.training.micro_batch_size == 4


def test_a_run_that_goes_on_with_auto_takes_the_pieces_that_fit(run, token_files, monkeypatch):
    """Guards: all rows of a step at once, where memory is short, because the run began with smaller pieces."""
    monkeypatch.setattr(runs, "memory_bytes", lambda device: 0)
    assert train(token_files, run, {"micro_batch_size": "auto"}, from_step=3).micro_batch_size == 1


def test_a_change_of_processes_is_noted_once(run):
    """Guards: a change that is noted again at every start, because run.json keeps the first number."""
    info = info_of(run)
    for processes in (2, 2, 1):
        note_changes(run, info | {"processes": processes}, 6)
    assert [change["processes"] for change in info_of(run)["changes"]] == [[1, 2], [2, 1]]
    assert info_of(run)["processes"] == 1


def test_rows_that_processes_cannot_share_are_refused_first(run, tmp_path):
    """Guards: a run folder that says three processes, of a start that never trained."""
    for out in (run, tmp_path / "new"):
        with pytest.raises(UserError, match="4 rows per step cannot be shared out evenly among 3 processes; set rows_"):
            check_folder(out, info_of(run) | {"processes": 3}, "auto", None, False)


@pytest.mark.parametrize(("options", "named"), [
    ({"resume": "must"}, "--resume must"), ({"from_step": 3}, "--from-step 3"), ({"extend": True}, "--extend"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_needs_a_run_says_so(token_files, tmp_path, options, named):
    """Guards: an option that is ignored, so that days of training begin anew; a remedy for another option."""
    with pytest.raises(UserError, match=f"holds no run to continue; {named} expects one. .* without {named}"):
        train(token_files, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_going_back_takes_the_best_of_then(token_files, tmp_path):
    """Guards: a step named the best that was never evaluated, or with the validation loss of another one."""
    out, settings = tmp_path / "run", {"max_steps": 12, "keep_every": 3, "eval_interval": 5, "checkpoint_interval": 3}
    train(token_files, out, settings)
    stopped = train(token_files, out, settings | {"max_minutes": 1e-7}, from_step=3)
    assert stopped.best_step == 3  # the best was step 0, which is gone, and nothing else was evaluated by then
    assert find_checkpoint(out, "best").name == "step_00000003"

    out, settings = tmp_path / "other", settings | {"keep_every": 9, "eval_interval": 6}
    train(token_files, out, settings)
    [row] = [row for row in rows_of(out) if row["step"] == "6"]
    stopped = train(token_files, out, settings | {"max_minutes": 1e-7}, from_step=9)  # the best was 6, which is gone
    assert stopped.step == 10 and stopped.best_step == 9
    assert stopped.best_val_loss == stopped.val_loss < 6
    assert stopped.val_loss != pytest.approx(float(row["val_loss"]), abs=1e-6)


def test_another_machine_or_program_is_noted_and_said(run, capsys):
    """Guards: a run that says it was computed by one commit on one machine, where two took part."""
    info = info_of(run)
    new = info | {"hardware": "another", "versions": info["versions"] | {"torch": "9.9"}}
    new["recipe"] = info["recipe"] | {"training": info["recipe"]["training"] | {"keep_every": 0}}
    note_changes(run, new, 6)
    [noted] = info_of(run)["changes"]
    assert (noted["torch"][1], noted["hardware"][1], noted["keep_every"]) == ("9.9", "another", [3, 0])
    assert "same bits are not promised: hardware was" in capsys.readouterr().out
    assert info_of(run)["versions"]["torch"] == "9.9" and info_of(run)["hardware"] == "another"


def test_a_damaged_tokenizer_is_written_again(run, token_files):
    """Guards: a run that ends well and cannot be loaded."""
    path = run / "tokenizer.json"
    before = path.read_bytes()
    path.write_bytes(before[:100] + b"X" + before[101:])
    train(token_files, run, {"max_steps": 7}, extend=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("recipe", [{}, [], {"training": {}}, {"training": {"seed": 1}, "model": "gpt2"}])
def test_a_run_json_with_a_broken_inside_is_one_line(run, token_files, recipe):
    """Guards: a traceback from whatever key is looked up first."""
    (run / "run.json").write_text(json.dumps(info_of(run) | {"recipe": recipe}))
    with pytest.raises(UserError, match="run.json is damaged: .* Restore it from a copy"):
        train(token_files, run)


FORGED = {  # file of a run or of its latest checkpoint, changed entries or text, and what is found
    "wrong type": ("run.json", {"params": "many"}, "run.json.params is 'many', expected int"),
    "no setting": ("run.json", {"recipe": {}}, "damaged: 'data'"),
    "brackets": ("run.json", "[" * 10**5, "maximum recursion depth"),
    "another vocabulary": ("run.json", {"vocab_size": 399}, "has 400 entries; run.json expects 399"),
    "weights": ("model.safetensors", b"\0" * 50000, "damaged: .*header"),
    "moments": ("optimizer.safetensors", save({"x/step": torch.zeros(())}), "the optimizer's state of another"),
    "best step": ("state.json", {"best_step": "3"}, "state.best_step is '3', expected int"),
    "no seconds": ("state.json", {"took_s": {}}, "state.took_s.evaluation is None"),
    "no list": ("state.json", "[]", "expected dict"),
    "manifest": ("MANIFEST.json", {"files": 3}, "damaged .it is not as"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_run_folder_is_one_line(run, token_files, case):
    """Guards: a traceback, or memory without bound, for files whose checksums are right and whose content is not."""
    name, change, found = FORGED[case]
    folder = run if name == "run.json" else run / "checkpoints" / "step_00000006"
    if isinstance(change, dict):
        change = json.dumps(json.loads((folder / name).read_text()) | change)
    (folder / name).write_bytes(change if isinstance(change, bytes) else change.encode())
    if name == "MANIFEST.json":
        content = json.loads(change)
        del content["sha256"]
        (folder / name).write_text(sealed_json(content))
        shutil.rmtree(run / "checkpoints" / "step_00000003")
    elif folder != run:
        write_manifest(folder, 6)
    with pytest.raises(UserError, match=found) as refused:
        load_run(run, "latest")
        train(token_files, run, {"max_steps": 7}, extend=True)
    assert "\n" not in str(refused.value)


def test_a_model_that_the_weights_are_not_of_takes_no_memory(run, monkeypatch):
    """Guards: a run.json whose n_embd takes all memory before the weights are looked at."""
    architecture = RECIPE.architecture | {"n_embd": 2**20}
    (run / "run.json").write_text(json.dumps(info_of(run) | {"recipe": info_of(run)["recipe"] | {
        "architecture": architecture}}))
    monkeypatch.setattr(Recipe, "build_model", lambda *args: pytest.fail("the model was built"))
    with pytest.raises(UserError, match="holds fewer than the .* weights that run.json describes"):
        load_run(run)


@pytest.mark.parametrize("change", [{"best_val_loss": "a"}, {"step": None}, {"elapsed_s": [1]}])
def test_an_end_with_impossible_numbers_is_no_end(run, change):
    """Guards: a traceback where the numbers of DONE.json are printed or compared."""
    path = run / "DONE.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert Ending.read(run) is None


def test_a_file_as_run_folder_is_refused(run, token_files):
    """Guards: "Not a directory" of a file that nobody named."""
    with pytest.raises(UserError, match="log.csv is a file; expected a new or empty folder"):
        train(token_files, run / "log.csv")


def test_lost_rows_of_the_log_are_said(run, token_files, warned):
    """Guards: a log that begins in the middle, of which nobody was told."""
    text = (run / "log.csv").read_text()
    (run / "log.csv").write_text(text.splitlines()[0] + "\n")
    with warned("log.csv has lost rows: found 0 up to step 6, the checkpoint knows of 7"):
        train(token_files, run, {"max_steps": 7}, extend=True)


@pytest.mark.skipif(os.name != "posix", reason="makes symbolic links")
@pytest.mark.parametrize("name", ["log.csv", "run.json", "checkpoints", "checkpoints/step_00000006", "figures"])
def test_a_symbolic_link_in_a_run_folder_is_not_followed(run, token_files, tmp_path, name):
    """Guards: a run folder of somebody else that makes training write, or remove, files anywhere."""
    elsewhere = tmp_path / "elsewhere"
    (run / "figures").mkdir(exist_ok=True)
    (run / name).rename(elsewhere)
    (run / name).symlink_to(elsewhere)
    before = elsewhere.read_bytes() if elsewhere.is_file() else contents(elsewhere)
    with pytest.raises(UserError, match=f"{name} is a symbolic link; expected files and folders of the run's own"):
        train(token_files, run, {"max_steps": 7}, extend=True)
    assert before == (elsewhere.read_bytes() if elsewhere.is_file() else contents(elsewhere))
