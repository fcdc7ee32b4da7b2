"""The page of tools/desk.py in a real browser: for tests, and as a command that makes the pictures of docs/desk.md:

    python tests/desk_page.py results/tiny/bdh results/tiny/gpt2
"""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def missing() -> list[str]:
    """Return what this machine lacks of a browser, a driver for it, and a server for the page."""
    return [*([] if CHROMIUM else ["chromium"]),
            *(name for name in ("playwright", "voila") if importlib.util.find_spec(name) is None)]


@contextmanager
def served(*arguments):
    """Run tools/desk.py while the block runs, and end it as Ctrl-C does; gives the page's address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "tools" / "desk.py", *arguments, "--port", port, "--no-browser"]
    with tempfile.TemporaryFile("w+") as log:
        # A session of its own, for Ctrl-C; the pytest of a background job ignores SIGINT, and its children would, too.
        desk = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, start_new_session=True,
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        try:
            until = time.monotonic() + 120
            while desk.poll() is None and time.monotonic() < until:
                with socket.socket() as page:
                    if not page.connect_ex(("127.0.0.1", port)):
                        break
                time.sleep(0.2)
            else:
                log.seek(0)
                raise RuntimeError(f"no page at port {port}: {log.read()[-2000:]}")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(desk.pid, signal.SIGINT)
            desk.wait(60)


@contextmanager
def browser():
    """Run Chromium while the block runs. The driver uses the system's, and never one of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield chromium
        finally:
            chromium.close()


def opened(chromium, address, width=1000, colors="light"):
    """Return the desk's page in a new tab, loaded."""
    page = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=colors).new_page()
    page.set_default_timeout(120_000)
    page.goto(address)
    page.get_by_role("button", name="Check").wait_for()
    return page


def press(page, name):
    """Press a button, and wait until what the page shows has changed and the buttons work again."""
    before = page.inner_text("body")
    page.get_by_role("button", name=name).click()
    page.wait_for_function("""before => document.body.innerText != before && [...document.querySelectorAll("button")]
                              .every(button => button.disabled == (button.innerText == "Stop"))""", arg=before)
    return page.inner_text("body")


def main() -> None:
    """Draw docs/images/desk_*.png with the desk of the arguments."""
    images = ROOT / "docs" / "images"
    images.mkdir(exist_ok=True)
    with served(*sys.argv[1:]) as address, browser() as chromium:
        page = opened(chromium, address)

        def picture(name):
            page.mouse.click(1, 1)  # away from the fields, so that no cursor blinks
            end = page.evaluate("Math.max(...[...document.querySelectorAll('.jupyter-widgets, .desk')]"
                                ".map(each => each.getBoundingClientRect().bottom))")
            page.set_viewport_size({"width": 1000, "height": round(end) + 20})
            page.screenshot(path=images / f"desk_{name}.png")

        page.get_by_label("prompt").fill("Once upon a time there was a brave girl named Lily. Lily lived near the old "
                                         "mill with a little cat. One morning she found her dear ball at the old mill.")
        page.get_by_label("seed").fill("6")  # where the models of recipe tiny disagree
        picture("start")
        press(page, "Write")
        picture("generated")
        page.get_by_label("story").fill(
            "Once upon a time there was a shy girl named Lily. Lily lived near the old park with a little dog. One "
            "morning she found her dear kite at the old park.")
        page.get_by_label("draft").fill("Soon the little cat danced softly near the old mill.")
        press(page, "Check")
        picture("contradiction")


if __name__ == "__main__":
    main()
