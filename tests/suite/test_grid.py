"""Grids before they run: reading, checking, naming, sharing the machine."""

import nbformat
import pytest
import torch

from plotarmour.cli import UserError
from plotarmour.suite.grid import SAFE, TRAIN, _run_name, plan_grid, share_machine
from plotarmour.suite.notebooks import parameters_of

SMALL = ["corpus_stories=300", "tokenizer=bpe:400", "split=8:1:1", "n_embd=16", "max_steps=20", "warmup_steps=2",
         "eval_tokens=200", "eval_interval=5"]


@pytest.fixture
def written(tmp_path):
    def write(text, encoding="utf-8"):
        path = tmp_path / "grid.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
        return path

    return write


@pytest.fixture
def notebook(tmp_path):
    def write(source, tags=("parameters",)):
        cell = nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)})
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "n.ipynb")
        return tmp_path / "n.ipynb"

    return write


def plan(path, tmp_path, overrides=SMALL, **options):
    return plan_grid(path, "tiny", tmp_path / "out", overrides=list(overrides), **options)


def test_values_have_the_types_of_the_notebooks_defaults(written, notebook, tmp_path):
    """Guards: a number that arrives as text; a byte order mark in the first name; a comma that splits a cell."""
    path = written('\ufeffrun, rate ,n,deep,text\r\n"a",4e-3,2,TRUE,"x, ""y"""\r\n\r\nb,1,,false,\r\n')
    source = 'run = ""\nresults = ""\ntext = ""\nrate: float = 1.5\nn = -1\ndeep = False'
    a, b = plan(path, tmp_path, (), notebook=notebook(source)).rows
    assert (a.run, b.run) == ("a", "b")
    assert a.values == {"rate": 0.004, "n": 2, "deep": True, "text": 'x, "y"'}
    assert b.values == {"rate": 1.0, "deep": False} and type(b.values["rate"]) is float
    assert b.parameters == b.values | {"run": "b", "results": str((tmp_path / "out").resolve())}


def test_all_mistakes_are_reported_at_once(written, tmp_path):
    """Guards: a grid that is mended ten times, or whose ninth row is found wrong after a night."""
    path = written("model,overrides,gpus,extend\nbdh,,two,\ngpt2,n_head=5,,\nbdh,maxsteps=3,,\nbdh,,,yes\n"
                   "gtp2,,,\nbdh,seed=7,,\nbdh,seed=7,,\n,,,\nbdh,corpus_stories=9,,\nbdh,seed=2\n")
    with pytest.raises(UserError) as refused:
        plan(path, tmp_path)
    message = str(refused.value)
    for part in ("line 2: gpus = 'two' is not a whole number", "line 3: recipe tiny (gpt2): ",
                 "line 4: recipe tiny (bdh): --set maxsteps=3: expected", "line 5: extend = 'yes' is not True or False",
                 "line 6: unknown model 'gtp2' (did you mean 'gpt2'?)",
                 "line 8: an earlier row has the same run, bdh_seed-7; leave one out",
                 "line 10: other [data] settings than in the first row"):
        assert part in message, part
    assert message.count("\n") == 6 and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="nowhere.txt does not exist"):
        plan(None, tmp_path, extra_text=tmp_path / "nowhere.txt")


@pytest.mark.parametrize(("text", "message"), [
    ("", "no row; expected a row for each run below a header"), ("model\n", "no row; expected"),
    ('model,overrides\nbdh,\n"bdh,seed=1\ngpt2,\n', "unexpected end of data; expected a CSV"),
    ('model,overrides\nbdh,"seed=1"2\n', "',' expected after '\"'"), ("model\nbdh,seed=1\n", "line 2: more cells"),
    ("model\nb\xe9\n".encode("latin-1"), "expected a CSV in UTF-8"),
    ("model;overrides\nbdh;seed=1\n", "'model;overrides' in the header; expected"),
    ("model,depth,model\nbdh,1,\n", "'model', 'depth', 'model' in the header; expected a row"),
    ("results\nx\n", "'results' in the header"), ("run\na b\n", "'a b' cannot be the name of a run folder"),
    ("model,continue_from\nbdh,a\0b\n", "continue_from = 'a\\x00b' is not a text"),
    ("model,overrides\nbdh,tokenizer=a\0b\n", "'tokenizer=a\\x00b' is not a text"),
    ("model,overrides\nbdh,max_steps=1e309\n", "max_steps = '1e309' is not a whole number"),
    (f"model,overrides\nbdh,max_steps={10**30}\n", f"max_steps = {10**30} is too large"),
    ("model,overrides\nbdh,max_steps=2026-13-45\n", "max_steps = '2026-13-45' is not a whole number"),
    ("run,overrides\nA,seed=1\na,seed=2\n", "line 3: an earlier row has the same run, a; "),
])
def test_a_file_that_is_no_grid_is_one_line(written, tmp_path, text, message):
    """Guards: a traceback of the csv module; a run folder that replaces others; Run and run in one place on a Mac."""
    with pytest.raises(UserError) as refused:
        plan(written(text), tmp_path)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_every_cell_reaches_the_notebook_of_its_row(written, tmp_path):
    """Guards: a column that is checked, named in the run folder, and not passed on."""
    [row] = plan(written("model,extend,from_step\nbdh,true,10\n"), tmp_path).rows
    assert (row.parameters["extend"], row.parameters["from_step"], row.parameters["model"]) == (True, 10, "bdh")


@pytest.mark.parametrize(("source", "message"), [
    ("not a notebook", "is not a notebook with a cell tagged"),
    (("run = ''", ()), "is not a notebook with a cell tagged"),
    (("x = 1",), "has no parameters results and run"),
])
def test_a_notebook_without_parameters_is_one_line(written, notebook, tmp_path, source, message):
    """Guards: papermill started on what it cannot parameterize."""
    path = tmp_path / "n.ipynb"
    if isinstance(source, tuple):
        notebook(*source)
    else:
        path.write_text(source)
    with pytest.raises(UserError) as refused:
        plan(written("model\n1\n"), tmp_path, (), notebook=path)
    assert message in str(refused.value)
    assert parameters_of(TRAIN)["from_step"] == -1


def test_names_come_from_the_rows_own_values(written, tmp_path):
    """Guards: a run that changes its folder when a row is put before it; a name that is no folder's."""
    texts = ["gpt2,learning_rate=0.004;seed=2,", 'bdh,"seed=1",', "bdh,,"]
    names = {}
    for order in ([0, 1, 2], [2, 0], [1]):
        rows = plan(written("model,overrides,gpus\n" + "\n".join(texts[i] for i in order)), tmp_path).rows
        for i, row in zip(order, rows, strict=True):
            assert names.setdefault(i, row.run) == row.run
    assert list(names.values()) == ["gpt2_learning_rate-0.004_seed-2", "bdh_seed-1", "bdh"]
    assert _run_name({"overrides": "seed=2", "gpus": 2}, {"model": "bdh"}) == "bdh_gpus-2_seed-2"
    odd = [_run_name({"recipe": text}, {"model": "bdh"}) for text in ("/a b/é.toml", "y" * 300)]
    assert odd[0] == "bdh_recipe--a-b-.toml" and all(map(SAFE.fullmatch, odd))
    assert not any(map(SAFE.fullmatch, ("", "..", "a/b", "é")))


def test_rows_get_their_share_of_the_machine(tmp_path, monkeypatch):
    """Guards: two runs on one GPU; every run with all cores; a GPU number that means another one in the run."""
    rows = plan(None, tmp_path).rows
    monkeypatch.setattr("plotarmour.suite.grid.cores", lambda: 4)
    assert share_machine(1, rows) == [{}]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert share_machine(3, rows) == [{"OMP_NUM_THREADS": "1"}] * 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [variables["CUDA_VISIBLE_DEVICES"] for variables in share_machine(2, rows)] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5f")
    assert [variables["CUDA_VISIBLE_DEVICES"] for variables in share_machine(2, rows)] == ["3", "GPU-5f"]
    for at_once in (0, 3):
        with pytest.raises(UserError, match=f"--at-once {at_once} is out of range.*torch sees 2"):
            share_machine(at_once, rows)


def test_the_suite_is_a_grid_of_one_row_per_model(tmp_path):
    """Guards: a second preflight that checks other things, and run folders with other names."""
    grid = plan(None, tmp_path)
    assert [(row.run, row.executed.name) for row in grid.rows] == [("bdh", "02_train_bdh.ipynb"),
                                                                   ("gpt2", "02_train_gpt2.ipynb")]
    assert [row.recipe.model for row in plan(None, tmp_path, models=["bdh", "modern", "gpt2"]).rows] == [
        "bdh", "modern", "gpt2"]
    with pytest.raises(UserError, match="unknown model 'modrn' .did you mean 'modern'"):
        plan(None, tmp_path, models=["bdh", "modrn"])
    with pytest.raises(UserError) as refused:
        plan(None, tmp_path, ["corpus_stories=0"])
    assert str(refused.value).startswith("recipe tiny needs a text") and "\n" not in str(refused.value)


def test_notebook_1_gets_the_settings_of_the_data_and_no_others(written, tmp_path):
    """Guards: token files of other settings than the rows'; a shape of GPT-2 that is none for BDH; a blank after a
    semicolon that loses a setting."""
    own = "windows=stories; context_length=40"
    grid = plan(written(f"model,overrides\ngpt2,n_head=8;n_embd=24;{own}\n"), tmp_path)
    assert grid.data["overrides"] == f"corpus_stories=300;tokenizer=bpe:400;split=8:1:1;{own}"
    assert grid.rows[0].parameters["overrides"].endswith(f"eval_interval=5;n_head=8;n_embd=24;{own}")
