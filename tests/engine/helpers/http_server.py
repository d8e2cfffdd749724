"""A local HTTP server whose answers a test chooses."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Served:
    """The requests that a server received, and its URL."""

    def __init__(self, answer):
        self.answer, self.requests, self.headers, self.lock = answer, [], [], threading.Lock()
        self.url = ""


@contextmanager
def serving(answer, *, by_path=False):
    """Serve `answer(body, number)`, which returns (status, content, headers), on a free port until the end of the block.

    The body is decoded from JSON. With `by_path`, call `answer(path, content, number)` with the bytes that were received.
    """
    served = Served(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            given = self._content()
            body = given if by_path else json.loads(given)
            with served.lock:
                served.requests.append(body)
                served.headers.append(dict(self.headers))
                number = len(served.requests)
            arguments = (self.path, body, number) if by_path else (body, number)
            status, content, headers = served.answer(*arguments)
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def _content(self):
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
