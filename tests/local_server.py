"""A local web server with chosen faults, for tests of downloads."""

import hashlib
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site:
    """Files by path, and the faults of the server.

    Args:
        files: path to bytes, e.g. {"/a.txt": b"..."}.
        drops: after how many bytes of the body the first, second, ... GET breaks off.
        refuse: statuses of the first, second, ... request, e.g. [503].
        hub: send the headers of the Hugging Face Hub: the commit, and the SHA-256 as ETag.

    Attributes:
        requests: (method, path, Range) of each request.
    """

    def __init__(self, files, drops=(), refuse=(), hub=False):
        self.files, self.drops, self.refuse, self.hub, self.requests = files, list(drops), list(refuse), hub, []


@contextmanager
def serving(site):
    """Serve a site on a free port; yields its address."""
    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            span = self.headers.get("Range")
            site.requests.append((self.command, self.path, span))
            if site.refuse:
                return self.send_error(site.refuse.pop(0))
            if self.path not in site.files:
                return self.send_error(404)
            content = site.files[self.path]
            sha256, start = hashlib.sha256(content).hexdigest(), 0
            if span:
                start = int(span.removeprefix("bytes=").rstrip("-"))
                if start >= len(content):
                    return self.send_error(416)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("ETag", f'"{sha256}"')
            if site.hub:
                self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if self.command == "GET":
                drop = site.drops.pop(0) if site.drops else None
                self.wfile.write(content[start:][:drop])

        do_GET = do_HEAD = answer

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
