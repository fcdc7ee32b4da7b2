"""Whether token files that are there already are what is wanted."""

from pathlib import Path

from plotarmour.cli import UserError, say
from plotarmour.data.job import Job, described, digest_of
from plotarmour.data.readers import Source
from plotarmour.data.token_file import TokenFile, read_header
from plotarmour.data.tokenizer import make_tokenizer


def reusable(job: Job, replace: bool, verify: bool) -> bool:
    """Return whether all files are there and come from this text with these settings.

    Args:
        job: what is wanted.
        replace: whether other files are to be replaced; otherwise they are a mistake.
        verify: read files and texts whole, not only header, size, beginning and end.

    Raises:
        UserError: files of something else, a part missing, or, with `verify`, a damaged file.
    """
    existing = [path for path in job.targets.values() if path.exists()]
    if not existing:
        return False
    if len(existing) < len(job.targets):
        missing = [path.name for path in job.targets.values() if not path.exists()]
        if not replace:
            raise UserError(f"{existing[0]} exists, {', '.join(missing)} does not; expected all parts or none. Use "
                            "another --out, or --force to make all anew.")
        return False
    else:
        found = []
        sources = described(job.fingerprints)
        for part, path in job.targets.items():
            found = found or _differences(path, sources, {**job.policies, "part": part}, job.tokenizer,
                                         job.sources if verify else [])
    if not found:
        say(f"{', '.join(map(str, job.targets.values()))}: made from this text with these settings before"
            f"{', all of it read and compared' if verify else ''}; nothing to do (--force makes it anew)")
        return True
    if replace:
        return False
    raise UserError(f"{existing[0]} exists and was made from something else ({'; '.join(found)}); expected a new name. "
                    "Use another --out, or --force to replace it.")


def _differences(path: Path, sources: list[dict], policies: dict, tokenizer: str, whole: list[Source]) -> list[str]:
    """Return in what an existing token file differs from what is wanted; empty where it can be taken as it is.

    Args:
        path: of the file.
        sources: of the wanted one, without `sha256`.
        policies: of the wanted one.
        tokenizer: as the user names it.
        whole: texts to be compared whole, and the file with its hashes; empty for a look at the header alone.
    """
    try:
        header = read_header(path)
        data = TokenFile.open(path)
    except UserError as error:
        return [str(error)]
    found = []
    old = [{key: value for key, value in s.items() if key != "sha256"} for s in header["source"]]
    if old != sources:
        found.append(f"text {', '.join(s['name'] for s in old)} of {sum(s['bytes'] for s in old):,} bytes"
                     + (", since changed" if [s["name"] for s in old] == [s["name"] for s in sources] else ""))
    defaults = {"errors": "strict"}
    for key, value in policies.items():
        if header.get(key, defaults.get(key)) != value:
            found.append(f"{key} {header.get(key)}, now {value}")
    kind, sha256 = header["tokenizer"]["kind"], header["tokenizer"]["sha256"]
    named = tokenizer in ("gpt2", "bytes") or tokenizer.startswith("bpe:")
    if (kind != tokenizer) if named else (_sha256_of(tokenizer) != sha256):
        found.append(f"tokenizer {kind}, now {tokenizer}")
    if whole and not found:
        data.verify()
        hashes = [source.sha256() for source in whole]
        kept = [s["sha256"] for s in header["source"]]
        if hashes != kept and digest_of(hashes) not in kept:
            found.append("another text of the same size, beginning and end")
    return found


def _sha256_of(tokenizer: str) -> str:
    if tokenizer.endswith(".bin"):
        return read_header(Path(tokenizer))["tokenizer"]["sha256"]
    return make_tokenizer(tokenizer).sha256
