"""A stand-in for Kaggle's servers: takes datasets and kernels, and runs each kernel's script on this machine."""

import json
import shutil
import subprocess
import sys
import threading
import zipfile
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil

from plotarmour.suite.multi_gpu import kill


class Account:
    """One account of the stand-in.

    Args:
        folder: for datasets and kernels.
        push: called with the number of each push, from 1; it returns None to run the kernel, "hang" to keep it running
            without running it, or the text of a refusal.
        garbled: called with the number of each question after a status; whether a page of HTML is the answer.
        quota_hours: of the week's quota that are left.
        is_known: whether the credentials are right.

    Attributes:
        kernels: by slug: the process of its script, or None for one that hangs.
        most: how many kernels were there at a time.
        pushes: number of pushes.
    """

    def __init__(self, folder, push=lambda n: None, garbled=lambda n: False, quota_hours=30.0, is_known=True):
        self.folder, self.push, self.garbled, self.quota_hours = folder, push, garbled, quota_hours
        self.is_known, self.kernels, self.blobs, self.most, self.pushes, self.questions = is_known, {}, {}, 0, 0, 0
        folder.mkdir()

    def running(self) -> list[str]:
        """Return the slugs of kernels that run or hang."""
        return [slug for slug, process in self.kernels.items() if process is None or process.poll() is None]

    def save_kernel(self, slug, text, datasetDataSources, **_):
        self.pushes += 1
        what = self.push(self.pushes)
        if what not in (None, "hang") or len(self.running()) >= 2:
            return {"error": what or "Maximum batch GPU session count of 2 reached."}
        slug = slug.split("/")[1]
        home = self.folder / slug
        (home / "working").mkdir(parents=True)
        (home / "input").mkdir()
        for source in datasetDataSources:
            name = source.split("/")[1]
            shutil.copytree(self.folder / "datasets" / name, home / "input" / name)
        (home / "script.py").write_text(text.replace("/kaggle/input", str(home / "input")))
        process = None
        if what is None:
            with (home / "log").open("w") as log:
                process = subprocess.Popen([sys.executable, str(home / "script.py")], cwd=home / "working",
                                           stdout=log, stderr=log, start_new_session=True)
        self.kernels[slug] = process
        self.most = max(self.most, len(self.running()))
        return {"ref": slug, "versionNumber": 1}

    def get_kernel_session_status(self, kernelSlug, **_):
        process = self.kernels[kernelSlug]
        if kernelSlug in self.running():
            return {"status": "RUNNING"}
        return {"status": "ERROR" if process.returncode else "COMPLETE"}

    def list_kernel_session_output(self, kernelSlug, **_):
        working = self.folder / kernelSlug / "working"
        files = [path for path in sorted(working.rglob("*")) if path.is_file() and not path.is_symlink()]
        return {"files": [{"fileName": path.relative_to(working).as_posix(), "url": f"http://127.0.0.1:{self.port}{path}"}
                          for path in files], "log": (self.folder / kernelSlug / "log").read_text()}

    def delete_kernel(self, kernelSlug, **_):
        self.kernels.pop(kernelSlug)
        kill(self.processes(kernelSlug))
        return {}

    def processes(self, slug) -> set[psutil.Process]:
        """Return what still runs of a kernel: its script, the notebooks that it started, and their descendants.

        They are found by their command lines, as a script that died leaves its notebooks behind.
        """
        found = {each for each in psutil.process_iter(["cmdline"])
                 if any(str(self.folder / slug) in part for part in each.info["cmdline"] or ())}
        for each in list(found):
            with suppress(psutil.NoSuchProcess):
                found |= set(each.children(recursive=True))
        return found

    def get_accelerator_quota_statistics(self, **_):
        return {"quotaRefreshTime": "2026-12-05T00:00:00Z", "gpuQuota": {
            "timeUsed": f"{round((30 - self.quota_hours) * 3600)}s", "totalTimeAllowed": "108000s"}}

    def get_dataset_status(self, datasetSlug, **_):
        (self.folder / "datasets" / datasetSlug).stat()
        return {"status": "READY"}

    def start_blob_upload(self, name, **_):
        token = str(len(self.blobs))
        self.blobs[token] = name
        return {"token": token, "createUrl": f"http://127.0.0.1:{self.port}/upload/{token}"}

    def create_dataset(self, slug, files, **_):
        home = self.folder / "datasets" / slug
        home.mkdir(parents=True)
        for file in files:
            name, content = self.blobs[file["token"]], self.folder / f"blob-{file['token']}"
            if name.endswith(".zip"):
                zipfile.ZipFile(content).extractall(home / name.removesuffix(".zip"))
            else:
                shutil.copyfile(content, home / name)
        return {"ref": slug, "status": "ok"}

    def delete_dataset(self, datasetSlug, **_):
        shutil.rmtree(self.folder / "datasets" / datasetSlug)
        return {}


@contextmanager
def serving(account):
    """Serve an account on a free port; gives the address."""
    class Handler(BaseHTTPRequestHandler):
        def body(self):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def answer(self, status, content, kind="application/json"):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self):
            name = "".join(f"_{c.lower()}" if c.isupper() else c for c in self.path.split("/")[-1]).strip("_")
            values = json.loads(self.body() or "{}")
            if not account.is_known:
                return self.answer(401, b'{"code": 401, "message": "Unauthenticated"}')
            if name == "get_kernel_session_status":
                account.questions += 1
                if account.garbled(account.questions):
                    return self.answer(503, b"<html>busy</html>", "text/html")
            try:
                self.answer(200, json.dumps(getattr(account, name)(**values)).encode())
            except (KeyError, FileNotFoundError):
                self.answer(404, b'{"code": 404, "message": "404 Not Found"}')

        def do_PUT(self):
            (account.folder / f"blob-{self.path.split('/')[-1]}").write_bytes(self.body())
            self.answer(200, b"{}")

        def do_GET(self):
            self.answer(200, Path(self.path).read_bytes(), "application/octet-stream")

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        account.port, server.daemon_threads = server.server_port, True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            for slug in list(account.kernels):
                account.delete_kernel(slug)
