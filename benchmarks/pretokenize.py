#!/usr/bin/env python3
"""Time, memory and opening of token files: the whole command against a plain script and against libraries alone.

The plain script is what one writes first: tokenizers.encode_batch over stories, then np.memmap. Each command runs in a
process of its own, in turn; MB are 10^6 bytes of text.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PLAIN = """
import sys
import numpy as np
from tokenizers import Tokenizer
text, vocabulary, out = sys.argv[1:]
tokenizer = Tokenizer.from_file(vocabulary)
stories = [s.strip() for s in open(text, encoding="utf-8", newline="").read().split("<|endoftext|>") if s.strip()]
rows = []
for start in range(0, len(stories), 1000):
    for encoding in tokenizer.encode_batch(stories[start:start + 1000]):
        rows.append(np.array(encoding.ids + [50256], dtype=np.uint16))
tokens = np.memmap(out, dtype=np.uint16, mode="w+", shape=(sum(map(len, rows)),))
at = 0
for row in rows:
    tokens[at:at + len(row)] = row
    at += len(row)
tokens.flush()
"""

# The library alone: the same chunks, already in memory as lists of strings, their ids thrown away.
RAW = """
import json, sys, time
root, text, vocabulary, library = sys.argv[1:]
sys.path.insert(0, root)
from pathlib import Path
from plotarmour.data.readers import Source, read_whole
source = Source(Path(text), "text")
if library == "fastokens":
    import fastokens
    encode = fastokens.Tokenizer.from_json_str(Path(vocabulary).read_text()).encode_batch_flat
elif library == "tokie":
    import tokie
    backend = tokie.Tokenizer.from_json(vocabulary)
    encode = lambda texts: backend.encode_batch_flat(texts, add_special_tokens=False)
elif library == "tiktoken":
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks as ranks
    folder, letters = Path(vocabulary).parent, r"'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+"
    pattern = letters + r"| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
    backend = tiktoken.Encoding("gpt2", pat_str=pattern, special_tokens={"<|endoftext|>": 50256},
                                mergeable_ranks=ranks(str(folder / "merges.txt"), str(folder / "vocab.json")))
    encode = backend.encode_ordinary_batch
else:
    from tokenizers import Tokenizer
    encode = Tokenizer.from_file(vocabulary).encode_batch
spent = done = 0
for chunk in read_whole(source):
    start = time.perf_counter()
    encode(chunk.texts)
    spent += time.perf_counter() - start
    done += sum(chunk.sizes)
    if library in ("tokenizers", "tiktoken") and done > 30e6:
        break
print(json.dumps({"mb_per_s": done / 1e6 / spent}))
"""

# What the format asks of anybody, whatever encodes: read and hash the text; hash, check and write the tokens.
FORMAT = """
import hashlib, json, os, sys, time, zlib
text, out, n_tokens = sys.argv[1:]
start = time.perf_counter()
read, payload, crc, done, block = hashlib.sha256(), hashlib.sha256(), 0, 0, bytes(2**19)
with open(text, "rb", buffering=0) as file:
    while data := file.read(2**20):
        read.update(data)
        done += len(data)
with open(out, "wb", buffering=0) as file:
    for _ in range(0, 2 * int(n_tokens), len(block)):
        payload.update(block)
        crc = zlib.crc32(block, crc)
        file.write(block)
    os.fsync(file.fileno())
print(json.dumps({"mb_per_s": done / 1e6 / (time.perf_counter() - start)}))
"""

SAME = """
import sys
root, ours, plain = sys.argv[1:]
sys.path.insert(0, root)
import numpy as np
from plotarmour.data.token_file import TokenFile
print(np.array_equal(TokenFile.open(ours).tokens, np.memmap(plain, np.uint16, "r")))
"""

OPEN = """
import json, sys, time
root, path = sys.argv[1:]
sys.path.insert(0, root)
from plotarmour.data.token_file import TokenFile
def rss():  # MiB, Linux
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024
before = rss()
start = time.perf_counter()
data = TokenFile.open(path)
opened = time.perf_counter()
data.story(data.n_stories // 2)
first = time.perf_counter()
print(json.dumps({"open_ms": 1000 * (opened - start), "first_story_ms": 1000 * (first - opened),
                  "added_mib": rss() - before}))
"""


def run(command: list) -> tuple[float, float, str]:
    """Run a process. Returns wall seconds, peak RSS in MiB, and its output."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024, output


def repeat(texts: list[Path], to: Path, n_bytes: float) -> int:
    """Write the texts again and again until there are `n_bytes`."""
    joined = b"".join(text.read_bytes().rstrip() + b"\n<|endoftext|>\n" for text in texts)  # a few MB
    written = 0
    with to.open("wb") as file:
        while written < n_bytes:
            written += file.write(joined)
    return written


def main() -> None:
    shared = Path(os.environ.get("PLOTARMOUR_TEST_DATA", ROOT.parent / "shared"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path, help="TinyStories text to repeat",
                        default=[shared / "data" / "tinystories" / f"stories_{x}.txt" for x in "ab"])
    parser.add_argument("--vocabulary", type=Path, default=shared / "gpt2" / "tokenizer.json", help="GPT-2's")
    parser.add_argument("--mb", type=float, nargs="+", default=[200, 1000, 2000], help="sizes of text, 10^6 bytes")
    parser.add_argument("--rounds", type=int, default=3, help="of the smallest size; medians are printed")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "pretokenize.csv")
    args = parser.parse_args()
    rows = []

    def note(what: str, mb: float, mb_per_s: float | None = None, rss: float | None = None, **more: float) -> None:
        rows.append({"what": what, "mb": round(mb), "mb_per_s": mb_per_s, "peak_rss_mib": rss, **more})
        print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items() if v is not None}),
              flush=True)

    with tempfile.TemporaryDirectory() as folder:
        text, out, plain_out = Path(folder) / "text.txt", Path(folder) / "x.bin", Path(folder) / "plain.bin"
        speeds: dict[str, list[float]] = {}
        for mb in sorted(args.mb):
            size = repeat(args.text, text, mb * 1e6)
            ours = [ROOT / "tools" / "pre_tokenize.py", text, "--tokenizer", args.vocabulary, "--out", out, "--force"]
            for turn in range(args.rounds):
                seconds, rss, _ = run(ours)
                note("ours", size / 1e6, size / 1e6 / seconds, rss)
                speeds.setdefault(f"ours {mb:g}", []).append(rows[-1]["mb_per_s"])
                for library in ("fastokens", "tokie"):
                    try:
                        _, _, said = run(["-c", RAW, ROOT, text, args.vocabulary, library])
                    except SystemExit:
                        continue
                    note(f"{library} alone", size / 1e6, json.loads(said)["mb_per_s"])
                    speeds.setdefault(f"{library} {mb:g}", []).append(rows[-1]["mb_per_s"])
                if mb == min(args.mb) and turn == 0:
                    for library in ("tokenizers", "tiktoken"):
                        try:
                            _, _, said = run(["-c", RAW, ROOT, text, args.vocabulary, library])
                        except SystemExit:
                            continue
                        note(f"{library} alone", 30, json.loads(said)["mb_per_s"])
                    seconds, rss, _ = run(["-c", PLAIN, text, args.vocabulary, plain_out])
                    note("plain script", size / 1e6, size / 1e6 / seconds, rss)
                    speeds["plain"] = [rows[-1]["mb_per_s"]]
                    _, _, said = run(["-c", SAME, ROOT, out, plain_out])
                    print(f"the plain script's tokens are ours: {said.strip()}", flush=True)
                    plain_out.unlink()
            _, _, said = run(["-c", FORMAT, text, plain_out, out.stat().st_size // 2])
            note("the format's own work, one core", size / 1e6, json.loads(said)["mb_per_s"])
            plain_out.unlink()
            seconds, rss, _ = run([*ours, "--split", "90:5:5"])
            note("ours with --split", size / 1e6, size / 1e6 / seconds, rss)
            for part in ("train", "val", "test"):
                (Path(folder) / f"x.{part}.bin").unlink()
        # 1 GB of tokens: the bytes tokenizer gives two bytes for each byte of text
        repeat(args.text, text, 5e8)
        run([ROOT / "tools" / "pre_tokenize.py", text, "--tokenizer", "bytes", "--out", out, "--force"])
        _, _, said = run(["-c", OPEN, ROOT, out])
        note("open", out.stat().st_size / 1e6, **json.loads(said))
    middle = {name: statistics.median(found) for name, found in speeds.items()}
    for mb in args.mb:
        print(f"{mb:g} MB: ours {middle[f'ours {mb:g}']:.0f} MB/s, "
              f"{middle[f'ours {mb:g}'] / middle['plain']:.1f} times the plain script, "
              f"{middle[f'ours {mb:g}'] / middle[f'fastokens {mb:g}']:.2f} of fastokens alone (medians)")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).round(2).to_csv(args.out, index=False, lineterminator="\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
