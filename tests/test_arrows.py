"""Rooms and the arrows between them, as the README's map draws them."""

import ast
import subprocess
import sys

import pytest

BASIC = {"cli", "files", "machine"}
MAY_KNOW = {
    "cli": set(), "files": {"cli"}, "config": {"cli", "files", "models"},
    "machine": {"cli"}, "loss": set(),
    "data": BASIC | {"loss"}, "models": set(),
    "training": BASIC | {"config", "loss", "data", "evaluation"},  # of it metrics alone
    "evaluation": BASIC | {"config", "loss", "data"},
    # follows their constants instead of copying them
    "memory": {"config", "cli", "loss", "machine", "models", "training"},
    "resume": {"cli", "files", "config", "training"},
    "run": BASIC | {"config", "memory", "resume", "data", "training", "evaluation"},
    "report": BASIC | {"config", "data", "training", "evaluation", "run", "resume", "models"},
    "suite": BASIC | {"config", "loss", "data", "models", "training", "evaluation", "report", "run",
                      "resume", "memory"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from ([f"{node.module}.{alias.name}" for alias in node.names] if node.module == "plotarmour"
                        else [node.module])


def wrong_arrows(root):
    for path in sorted((root / "plotarmour").rglob("*.py")):
        room = path.relative_to(root / "plotarmour").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] in ("benchmarks", "contrib", "tools", "notebooks"):
                yield f"{path.name} imports {name}"
            if parts[0] == "plotarmour" and len(parts) > 1 and parts[1] not in MAY_KNOW[room] | {room}:
                yield f"{room} must not know {parts[1]} ({path.name})"


def test_arrows_point_one_way(root):
    """Guards: rooms that grow together until nothing can be tested alone."""
    assert list(wrong_arrows(root)) == []


def test_a_wrong_arrow_is_noticed(tmp_path):
    """Guards: the test above passing because it looks at nothing."""
    room = tmp_path / "plotarmour" / "models"
    room.mkdir(parents=True)
    (room / "bdh.py").write_text("def f():\n    from plotarmour.data.batches import Windows\n    import tools.train\n")
    assert len(list(wrong_arrows(tmp_path))) == 2


@pytest.mark.parametrize("module", ["plotarmour.config", "plotarmour.data.pretokenize", "plotarmour.memory",
                                    "plotarmour.suite.steps"])
def test_importing_a_module_does_nothing(module, root, tmp_path):
    """Guards: device probing, folders and output at import."""
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import {module}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == "" and list(tmp_path.iterdir()) == []
