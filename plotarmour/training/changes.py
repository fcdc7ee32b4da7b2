"""What changed on a run's way, by choice or need: the list `changes` in run.json."""

import json
from datetime import UTC, datetime
from pathlib import Path

from plotarmour.files import write_json


def record_change(run: Path, step: int, why: str, holds: dict | None = None, **changed: list) -> None:
    """Append to the list of changes in run.json.

    Args:
        run: the run folder.
        step: from which the change holds.
        why: such as "--extend" or "out of memory".
        holds: entries of run.json, such as the recipe, that hold from now on.
        changed: [before, after] by setting.
    """
    path = run / "run.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    utc = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    info.setdefault("changes", []).append({"utc": utc, "step": step, "why": why} | changed)
    write_json(path, info | (holds or {}))
