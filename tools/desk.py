#!/usr/bin/env python3
"""Open the writing desk in a browser: two trained runs, one slider, and a check of a draft against its story.

Without run folders, it takes the pair of results/tiny, and trains it first where there is none (3 to 6 minutes). It
serves one page, by voila, on this machine only.
"""

import argparse
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from plotarmour.cli import HelpFormatter, UserError, as_path, require_run, run_command, say

# The page follows the browser's colour scheme; voila's own light theme is the other one.
HEAD = """<style>@media (prefers-color-scheme: dark) { html:root { color-scheme: dark; --jp-layout-color0: #111;
 --jp-layout-color1: #1c1c1c; --jp-layout-color2: #333; --jp-border-color1: #666; --jp-ui-font-color1: #eee;
 --jp-content-font-color0: #fff; --jp-content-font-color1: #eee; } }</style>
<h2>Writing desk</h2><p>Two models continue your prompt, each alone and both blended by the slider. <b>Check</b> marks
the words of your draft that do not fit your story.</p>"""
PAGE = """import sys
sys.path.insert(0, {root!r})
from IPython.display import HTML, display
from plotarmour.run import load_run
from plotarmour.suite.desk import Pair, writing_desk
display(HTML({head!r}))
writing_desk(Pair(load_run({logic!r}), load_run({creativity!r})), {threshold!r})"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("runs", type=as_path, nargs="*", metavar="RUN", help="two run folders of one tokenizer: the "
                        "slider's end at 100 %% (logic), which also checks drafts, and its end at 0 %% (creativity)")
    parser.add_argument("--tokens", type=as_path, metavar="FOLDER", help="folder of tokens.val.bin, from which the "
                        "check learns how much misfit is usual (default: the folder that holds the first run)")
    parser.add_argument("--false-alarms", type=float, default=1, metavar="PERCENT", help="how many of the words that "
                        "fit the check may mark; more alarms find more contradictions")
    parser.add_argument("--port", type=int, default=8866, help="of the page's address")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; anything else than 127.0.0.1 lets "
                        "other machines write with your models")
    parser.add_argument("--no-browser", action="store_true", help="open no browser")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if len(args.runs) not in (0, 2):
        raise UserError(f"found {len(args.runs)} run folder; expected two, or none for the pair of results/tiny.")
    try:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        socket.create_server((args.host, args.port), family=family).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"port {args.port} of {args.host} cannot be used ({error}); name a free one: --port.") from None
    try:
        import voila  # noqa: F401
    except ImportError:
        raise UserError("the page needs voila; install it with: pip install voila. Notebook 04_desk shows the desk "
                        "without it.") from None
    tiny = ROOT / "results" / "tiny"
    logic, creativity = args.runs or (tiny / "bdh", tiny / "gpt2")
    if not args.runs and not (tiny / "comparison" / "summary.txt").exists():
        say("no pair in results/tiny yet: training it first")
        if code := subprocess.call([sys.executable, str(ROOT / "tools" / "run_suite.py")]):
            sys.exit(code)
    for folder in (logic, creativity):
        require_run(folder)
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        say(f"listening on {args.host}: everybody who reaches this machine can use the desk")
    import nbformat

    from plotarmour.run import load_run
    from plotarmour.suite.desk import Pair, calibrated

    say("loading the models, and what misfit is usual in validation stories ...")
    threshold = calibrated(Pair(load_run(logic), load_run(creativity)).logic, args.tokens, args.false_alarms / 100)
    with tempfile.TemporaryDirectory(prefix="plotarmour_desk_") as folder:
        page = Path(folder) / "desk.ipynb"
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(PAGE.format(
            root=str(ROOT), head=HEAD, logic=str(logic.resolve()), creativity=str(creativity.resolve()),
            threshold=threshold))])
        notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
        nbformat.write(notebook, page)
        say(f"the desk: http://{args.host}:{args.port} (Ctrl-C ends it)")
        command = [sys.executable, "-m", "voila", str(page), f"--Voila.ip={args.host}", f"--port={args.port}",
                   "--Voila.log_level=WARN", "--MappingKernelManager.cull_idle_timeout=600"]  # of tabs that are closed
        sys.exit(subprocess.call(command + ["--no-browser"] * args.no_browser))


if __name__ == "__main__":
    run_command(main)
