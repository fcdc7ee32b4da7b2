"""Set-up of a notebook: what Kaggle and Colab lack, and one line for a user's mistake; imports nothing they lack."""

import re
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import plotarmour
from plotarmour import machine
from plotarmour.cli import UserError, mistake_of

ROOT = Path(__file__).resolve().parents[2]
WORDS = {  # of command lines, in messages: what a notebook has in their place
    r"--set (\w+)=(\S+?)(?=[,.;:)]*(\s|$))": r'overrides = "\1=\2"', r"--from-step(?: (\d+))?": r"from_step \1",
    r"--(extend|unfinished)": r"\1 = True", r"--text FILE": "the parameter text", r"--out": "results (or run)",
    r"(The|the) same command|give the command that trained the run again": "Run all",
    r"tools/train\.py": "notebook 02_train", r"tools/pre_tokenize\.py": "notebook 01_pretokenize",
    r"--([a-z][a-z-]*[a-z])": lambda option: option[1].replace("-", "_")}


def set_up_notebook() -> None:
    """Prepare a notebook: install what its host lacks, show a user's mistake as one line, say where the package is."""
    from IPython.core.getipython import get_ipython

    if shell := get_ipython():
        shell.set_custom_exc((UserError, OSError), show_mistake)
    print(f"plotarmour {plotarmour.__version__} from {ROOT}")
    if machine.host() != "own machine":
        install_missing()


def show_mistake(shell, kind: type, error: Exception, traceback, tb_offset: int | None = None) -> None:
    """Show an exception of a cell: a user's mistake as one line in a notebook's words, others as always.

    The output keeps the message in the words of command lines, for whoever reads the executed notebook.
    """
    message = mistake_of(error)
    if message is not None:
        error, line = UserError(message), f"error: {notebook_words(message)}"
        error._render_traceback_ = lambda: [line]
    shell.showtraceback((type(error), error, traceback), tb_offset=tb_offset)


def notebook_words(message: str) -> str:
    """Return a message with parameters of notebooks in place of a command line's options.

    Example:
        "Use --set seed=2, or add --extend." becomes 'Use overrides = "seed=2", or add extend = True.'
    """
    for option, words in WORDS.items():
        message = re.sub(option, words, message)
    return message


def install_missing() -> None:
    """Install the packages of requirements.txt that are missing, but never another torch, and say so in one line."""
    from packaging.requirements import Requirement

    path, missing = ROOT / "requirements.txt", []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for requirement in (Requirement(text) for line in lines if (text := line.partition("#")[0].strip())):
        found = None
        with suppress(PackageNotFoundError):
            found = version(requirement.name)
        if requirement.name != "torch" and (found is None or found not in requirement.specifier):
            missing.append(str(requirement))
    if not missing:
        return
    # The torch that is there, named beside them, makes pip refuse a package that wants another one.
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--retries", "0", "--timeout", "10",
                           f"torch=={version('torch')}", *missing], capture_output=True, check=False)
    names = ", ".join(missing)
    print(f"installed {names}" if done.returncode == 0 else
          f"not installed: {names} (no internet?). What needs them says so; the rest works without.")
