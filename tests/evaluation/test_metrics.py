import math
import re
import subprocess
import sys

import pytest

from plotarmour.evaluation.metrics import perplexity, totals


def test_totals_by_hand():
    """Guards: bits per byte over tokens, perplexity of a mean of perplexities.

    Three stories: 3 + 5 + 8 = 16 tokens, 6 + 10 + 16 = 32 bytes. Each token costs ln 4 nats, so the loss is ln 4, the
    perplexity 4, and 16 · 2 bits over 32 bytes are 1 bit per byte.
    """
    assert totals(16 * math.log(4), 16, 32) == pytest.approx(
        {"loss": math.log(4), "perplexity": 4.0, "bits_per_byte": 1.0})


def test_a_huge_loss_and_a_text_without_bytes_give_no_error():
    """Guards: OverflowError in the log of a run that diverges; division by zero for tokens without text."""
    result = totals(3000.0, 3, 0)
    assert result == {"loss": 1000.0, "perplexity": perplexity(1000.0), "bits_per_byte": None}
    assert 1e300 < result["perplexity"] < math.inf


def test_the_formula_is_written_in_one_place(root):
    """Guards: a second copy of the metrics, which may differ from the first."""
    copies = [path.name for path in (root / "plotarmour").rglob("*.py")
              if re.search(r"log\(2(\.0)?\)|exp\(min\(|math\.exp\([a-z_.]*loss", path.read_text(encoding="utf-8"))]
    assert copies == ["metrics.py"]


def test_the_metrics_import_nothing_heavy(root):
    """Guards: a training loop, or a tool's --help, that pays for pandas or torch through the metrics."""
    code = ("import sys; import plotarmour.evaluation.metrics; "
            "print(sorted({'numpy', 'pandas', 'torch', 'scipy'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
