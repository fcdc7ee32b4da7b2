"""The hidden folder of unfinished work beside an output: one process at a time, and a journal to go on from."""

import json
import os
from contextlib import suppress
from pathlib import Path

from plotarmour.cli import UserError, say
from plotarmour.files import locked

KEPT = ("stream_", "lock", "owner")  # what `empty` leaves: copies of what can be read only once, and the lock


def unfinished_folder(out: Path) -> Path:
    """Return the folder of an output's unfinished work."""
    return out.with_name(f".{out.name}.unfinished")


def all_but_named(work: Path, wanted: str) -> bool:
    """Whether an earlier start was killed while it gave complete files their names."""
    try:
        journal = json.loads((work / "journal.json").read_text(encoding="utf-8"))
        return "complete" in journal and journal["wanted"] == wanted
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_journal(work: Path, wanted: str, force: bool) -> dict:
    """What an earlier start noted, if it can be continued; otherwise nothing, and an empty `work`."""
    path = work / "journal.json"
    try:
        journal = json.loads(path.read_text(encoding="utf-8"))
        if not force and journal["wanted"] == wanted:
            return journal
        reason = "--force" if force else "the text or the settings are others now"
    except FileNotFoundError:
        empty(work)  # killed before anything was noted, or while it cleared up
        return {}
    except (ValueError, KeyError, TypeError):
        reason = "its journal is damaged"
    say(f"an earlier start was stopped and cannot be continued ({reason}): starting over")
    empty(work)
    return {}


def write_journal(work: Path, journal: dict) -> None:
    """Not synced: after a loss of power the hashes in it tell whether it and the files agree."""
    temporary = work / "journal.part"
    temporary.write_text(json.dumps(journal), encoding="utf-8")
    os.replace(temporary, work / "journal.json")


def empty(work: Path) -> None:
    """Remove what a job left in its folder, but for copies of streams and the lock."""
    for path in sorted(work.iterdir(), key=lambda path: path.name == "journal.json"):  # the journal last
        if not path.name.startswith(KEPT):
            path.unlink()


def tidy(work: Path, out: Path) -> None:
    """Remove what a start left that was killed while it cleared up; unless another process is at it."""
    if work.exists():
        with suppress(UserError), locked(work, out):
            empty(work)
