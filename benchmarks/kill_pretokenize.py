#!/usr/bin/env python3
"""Kill the pretokenizer at random moments after it has saved once, start it again, and compare the bytes."""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pretokenize import ROOT, repeat


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("x*.bin"))}


# The tool saves more rarely: its texts are larger than that of this benchmark.
COMMAND = """
import sys
root, text, tokenizer, out, split, save_bytes, force = sys.argv[1:]
sys.path.insert(0, root)
from pathlib import Path
from plotarmour.data.pretokenize import pre_tokenize
pre_tokenize([Path(text)], tokenizer, Path(out), split or None, force=bool(force), save_bytes=int(save_bytes))
"""


def main() -> None:
    shared = Path(os.environ.get("PLOTARMOUR_TEST_DATA", ROOT.parent / "shared"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path, help="text to repeat",
                        default=[shared / "data" / "tinystories" / f"stories_{x}.txt" for x in "ab"])
    parser.add_argument("--tokenizer", default=str(shared / "gpt2"))
    parser.add_argument("--mb", type=float, default=50, help="size of the text, 10^6 bytes")
    parser.add_argument("--save-mb", type=float, default=5, help="text between two saves, 10^6 bytes")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--split", default="90:5:5", help="empty: one file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, wrong, kills, went_on = random.Random(args.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder, text = Path(name) / "out", Path(name) / "text.txt"
        folder.mkdir()
        repeat(args.text, text, args.mb * 1e6)
        command = [sys.executable, "-c", COMMAND, str(ROOT), str(text), args.tokenizer, str(folder / "x.bin"),
                   args.split, str(int(args.save_mb * 1e6)), ""]
        without_saves = [*command[:-2], str(2**40), ""]
        subprocess.run(without_saves, check=True, capture_output=True)
        expected, saved = digests(folder), folder / ".x.bin.unfinished" / "saved.json"
        start = time.perf_counter()
        subprocess.run([*command[:-1], "force"], check=True, capture_output=True)
        whole = time.perf_counter() - start
        assert digests(folder) == expected, "the files depend on the saves"
        for path in folder.glob("x*.bin"):
            path.unlink()
        while kills < args.kills:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            while process.poll() is None and not saved.exists():
                time.sleep(0.001)
            time.sleep(draw.random() * whole)
            process.send_signal(signal.SIGKILL)
            said = process.communicate()[1]
            if process.returncode == -signal.SIGKILL:
                kills += 1
                done = subprocess.run(command, capture_output=True, text=True)
                went_on += "going on" in done.stderr
                said = done.stderr
            left = sorted(p.name for p in folder.iterdir())
            if digests(folder) != expected or left != sorted(expected):
                wrong += 1
                print(f"kill {kills}: {left} differ or are left over\n{said}")
                for path in sorted(folder.rglob("*"), reverse=True):
                    path.unlink() if path.is_file() else path.rmdir()
            for path in folder.glob("x*.bin"):
                path.unlink()
    print(f"{kills} kills, each followed by one start: {wrong} ended with other bytes or leftovers; {went_on} went on "
          "from a save, the others had been complete")


if __name__ == "__main__":
    main()
