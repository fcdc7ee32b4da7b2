"""A tools/train.py of which the second process alone fails, and reports it once the first one has said its line."""

ALONE_FAILS = """
import os, runpy, sys, time
sys.path.insert(0, {root!r})
from plotarmour import cli
from plotarmour import run as runs
from plotarmour.data.batches import Windows
cli.OTHERS_WAIT_S, sleep, is_second = 600.0, time.sleep, os.environ["RANK"] == "1"
def fail(*args):
    raise OSError(5, "Input/output error", "/data/t.train.bin")
def wait(seconds):
    if seconds >= 600 and not is_second:
        open({said!r}, "w").close()
    while seconds > 0 and not (seconds >= 60 and is_second and os.path.exists({said!r})):
        sleep(min(seconds, 0.1))
        seconds -= 0.1
time.sleep = wait
if is_second:
    {where} = fail
runpy.run_path({train!r}, run_name="__main__")
"""
