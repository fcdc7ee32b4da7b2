import importlib.util
import sys

import pytest


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
