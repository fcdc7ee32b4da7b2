"""A local server that misbehaves on demand."""

import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site:
    """Files by path, and how the server treats whoever asks.

    Args:
        files: path to bytes, e.g. {"/a.txt": b"..."}.
        drops: after how many bytes of the body the first, second, ... answer breaks off.
        ranges: whether Range is understood.
        if_range: whether If-Range is.
        etag: from path and content to the ETag, or to None.
        refuse: statuses for the first, second, ... request, e.g. [503].
        pause_s: seconds between blocks of 16 KiB.
    """

    def __init__(self, files, drops=(), ranges=True, if_range=True, etag=lambda path, content: f'"{hash(content)}"',
                 refuse=(), pause_s=0.0, headers=()):
        self.files, self.drops, self.ranges, self.if_range, self.etag = files, list(drops), ranges, if_range, etag
        self.refuse, self.pause_s, self.headers, self.asked, self.sent = list(refuse), pause_s, dict(headers), [], 0
        self.after_drop = lambda: None


@contextmanager
def serving(site):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            site.asked.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
            if site.refuse:
                return self.send_error(site.refuse.pop(0))
            if self.path not in site.files:
                return self.send_error(404)
            content = site.files[self.path]
            etag, span, start = site.etag(self.path, content), self.headers.get("Range"), 0
            if span and site.ranges and (not site.if_range or self.headers.get("If-Range") == etag):
                start = int(span.removeprefix("bytes=").rstrip("-"))
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content) - start))
            for name, value in ({"ETag": etag} if etag else {}).items() | site.headers.items():
                self.send_header(name, value)
            self.end_headers()
            drop = site.drops.pop(0) if site.drops else None
            body = content[start:][:drop]
            try:
                for at in range(0, len(body), 2**14):
                    self.wfile.write(body[at:at + 2**14])
                    site.sent += len(body[at:at + 2**14])
                    time.sleep(site.pause_s)
            except OSError:
                pass  # whoever asked has gone
            if drop is not None:
                site.after_drop()

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
