"""Whether a checkpoint is whole: its MANIFEST.json names every file with size and SHA-256, and guards itself.

    {"format": 1, "step": 6, "files": {"model.safetensors": {"bytes": 412, "sha256": "..."}, ...}, "sha256": "..."}

The closing SHA-256 is that of the JSON without it, and the bytes must be those that `write_sealed` would write. So a
flipped bit, a dropped entry or a lost last byte of the manifest is noticed like one in the weights. `format` and the
closing `sha256` stay in all later formats: that tells a newer checkpoint from a damaged one.
"""

import hashlib
import json
from pathlib import Path

from plotarmour.cli import UserError
from plotarmour.files import write_text

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


class Damaged(ValueError):
    """A sealed file that is missing, cannot be read or is not what was written."""


def write_manifest(folder: Path, step: int) -> None:
    """Name the files of a checkpoint that is about to be published.

    The hashes are of what is read back, not of what was in memory: what the library did to the bytes on their way is in
    them as well, and no second copy of the optimizer's state is held. A write that failed has raised by now, and
    `save_checkpoint` has compared what can be read with what it saved.
    """
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in FILES}
    write_sealed(folder / "MANIFEST.json", {"format": FORMAT, "step": step, "files": files})


def damage_of(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint, after reading every byte of it; None: it is whole.

    Raises:
        UserError: it is whole as far as this program can tell, and of a newer format.
    """
    try:
        manifest = read_sealed(folder / "MANIFEST.json", unsealed=set(FILES))
    except Damaged as damaged:
        return str(damaged)
    if "sha256" in manifest:
        if manifest.get("format") != FORMAT:
            raise UserError(f"{folder} has checkpoint format {manifest.get('format')}; this program reads {FORMAT}. Go "
                            "on with the newer program that wrote it.")
        if f"step_{manifest['step']:08d}" != folder.name:
            return f"{folder / 'MANIFEST.json'} is damaged (it is that of step {manifest['step']:,})"
        expected = {name: file["sha256"] for name, file in manifest["files"].items()}
    else:  # before formats had numbers: {"model.safetensors": "its SHA-256", ...}
        expected = manifest
    if set(expected) != set(FILES):
        return f"{folder / 'MANIFEST.json'} is damaged (it names {', '.join(sorted(expected))})"
    for name in FILES:
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        try:
            if sha256_of(path) != expected[name]:
                return f"{path} is damaged (its SHA-256 is not the manifest's)"
        except OSError as error:  # a bad block of the disk
            return f"{path} is damaged ({error.strerror})"
    return None


def write_sealed(path: Path, value: dict) -> None:
    """Replace a JSON file atomically, closed by the SHA-256 of what it says."""
    write_text(path, _rendered(value | {"sha256": _seal(value)}))


def read_sealed(path: Path, unsealed: set[str]) -> dict:
    """Return what `write_sealed` wrote, with its `sha256`.

    Args:
        path: of the file.
        unsealed: the exact keys of the form from before there were seals, which is read as well.

    Raises:
        Damaged: the file is missing, or any byte of it is not what was written.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        value = json.loads(text)
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except OSError as error:
        raise Damaged(f"{path} is damaged ({error.strerror})") from None
    except (ValueError, RecursionError):  # no UTF-8 or no JSON
        raise Damaged(f"{path} is damaged (no JSON)") from None
    if not isinstance(value, dict) or _rendered(value) != text:
        raise Damaged(f"{path} is damaged (not as this program writes it)")
    if set(value) != unsealed and value.get("sha256") != _seal({k: v for k, v in value.items() if k != "sha256"}):
        raise Damaged(f"{path} is damaged (its SHA-256 is not that of what it says)")
    return value


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rendered(value: dict) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _seal(value: dict) -> str:
    return hashlib.sha256(_rendered(value).encode()).hexdigest()
