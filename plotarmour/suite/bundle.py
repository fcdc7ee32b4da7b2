"""What to download of a run: log, settings, ending and figures in one small zip beside its folder; no weights."""

import os
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from plotarmour.cli import UserError
from plotarmour.files import publish, unfinished
from plotarmour.training import ending
from plotarmour.training.log import read_log

FILES = ("log.csv", "log.cut.csv", "run.json", *ending.FILES)


def pack_run(run: Path) -> Path:
    """Zip what of a run is small; the same content gives the same bytes, and the same end the same name.

    Args:
        run: its folder.

    Returns:
        The path of the zip: the folder's name and the UTC time of the last row of log.csv, to the minute.

    Raises:
        UserError: a folder without a log.

    Example:
        pack_run(Path("results/tiny/bdh")) gives results/tiny/bdh_20261121-0934.zip.
    """
    end = _end(run / "log.csv")
    out = run.with_name(f"{run.name}_{end:%Y%m%d-%H%M}.zip")
    files = [path for name in FILES if (path := run / name).is_file()]
    files += sorted(path for path in (run / "figures").glob("*") if path.is_file())
    temporary = unfinished(out)
    try:
        with zipfile.ZipFile(temporary, "w") as bundle:
            for path in files:
                # Made here and not by ZipFile.write, which would put in the file's own time and permissions.
                info = zipfile.ZipInfo(f"{run.name}/{path.relative_to(run).as_posix()}", end.timetuple()[:6])
                info.create_system, info.external_attr = 3, 0o644 << 16  # as on Unix, everywhere
                info.compress_type = zipfile.ZIP_DEFLATED
                bundle.writestr(info, path.read_bytes())
        publish(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return out


def download_link(run: Path) -> Any:
    """Zip what of a run is small (see `pack_run`), and return a link to it for a notebook to show."""
    from IPython.display import FileLink

    return FileLink(os.path.relpath(pack_run(run)))  # Jupyter and Kaggle serve nothing above the working folder


def _end(log: Path) -> datetime:
    """The time of a log's last row."""
    rows = read_log(log)
    if rows.empty:
        raise UserError(f"{log} has no row yet; expected a run that has begun. Train it first.")
    return datetime.strptime(rows["utc"].iloc[-1], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
