import hashlib
import os
import subprocess
import sys

import pytest
from local_server import Site, serving

NAME = "TinyStoriesV2-GPT4-valid.txt"
CONTENT = b"Tom ran.\n<|endoftext|>\n" * 800_000  # 18 MB: the library keeps whole blocks of 10 MiB
FOLDER = "/datasets/roneneldan/TinyStories/resolve/main/"


@pytest.fixture
def download(root, tmp_path):
    """Call the tool in `tmp_path` against a hub at `url`; returns the finished process."""
    def run(url, *args):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hub"), "NO_PROXY": "127.0.0.1"}
        return subprocess.run([sys.executable, str(root / "tools" / "download_tinystories.py"), "--out", "d", *args],
                              cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    return run


def test_a_dropped_connection_is_resumed_and_the_next_command_printed(download, tmp_path):
    """Guards: gigabytes that start from zero after a dropped connection; a file with a seam; a wrong next command."""
    site = Site({FOLDER + NAME: CONTENT}, drops=[15_000_000], hub=True)
    with serving(site) as url:
        done = download(url)
    assert done.returncode == 0, done.stderr
    spans = [span for method, path, span in site.requests if (method, path) == ("GET", FOLDER + NAME)]
    assert spans == [None, f"bytes={10 * 2**20}-"]
    first, last = done.stdout.splitlines()
    path = os.path.join("d", NAME)
    assert first == f"{path}: {len(CONTENT):,} bytes, SHA-256 {hashlib.sha256(CONTENT).hexdigest()}"
    assert last.endswith(f"pre_tokenize.py d/{NAME} --tokenizer bpe:4096 --split 90:5:5 "
                         "--out d/TinyStoriesV2-GPT4-valid.bin")
    assert (tmp_path / path).read_bytes() == CONTENT


def test_an_existing_file_is_kept_and_force_replaces_it(download, tmp_path):
    """Guards: a file of the user replaced without --force, or one of 2 GB downloaded twice."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / NAME).write_bytes(b"mine")
    site = Site({FOLDER + NAME: CONTENT}, hub=True)
    with serving(site) as url:
        done = download(url)
        assert done.returncode == 0 and "existed already" in done.stdout and site.requests == [], done.stderr
        assert (tmp_path / "d" / NAME).read_bytes() == b"mine"
        done = download(url, "--force")
    assert done.returncode == 0 and (tmp_path / "d" / NAME).read_bytes() == CONTENT, done.stderr


def test_a_hub_without_the_file_is_one_line_that_says_where_to_put_it(download, tmp_path):
    """Guards: a traceback for a wrong mirror; no word on how to go on without a network."""
    with serving(Site({}, hub=True)) as url:
        done = download(url)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "404" in done.stderr and f"at {os.path.join('d', NAME)}." in done.stderr and "HF_ENDPOINT" in done.stderr
    assert not (tmp_path / "d" / NAME).exists()
