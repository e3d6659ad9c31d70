"""A server on 127.0.0.1 that plays the Hugging Face Hub: one commit per push, kept in memory."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class LoopbackHub(BaseHTTPRequestHandler):
    """Answers for one repository; `server.files` holds what was pushed, `server.commits` the number of pushes,
    `server.created` what was asked for when it was made."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            self.server.files, self.server.commits, self.server.created = {}, 0, json.loads(body)
            place = "spaces/" if self.server.created.get("type") == "space" else ""
            self._json({"url": f"http://{self.headers['Host']}/{place}{self._repo(self.server.created)}", "id": "1"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            regular = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self._json({"files": regular})
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.server.commits += 1
            url = f"http://{self.headers['Host']}/user/model/commit/{self._sha()}"
            self._json({"commitUrl": url, "commitOid": self._sha(), "hookOutput": "", "success": True})
        else:
            self._answer(404)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path.startswith("/api/models/") and "/tree/" in path:
            self._json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in self.server.files.items()
                ]
            )
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self._json({"id": "user/model", "sha": self._sha(), "siblings": siblings, "private": False, "tags": []})
        elif "/resolve/" in path:
            name = path.split("/resolve/")[1].partition("/")[2]
            if name in self.server.files:
                content = self.server.files[name]
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                self._answer(200, content, {"ETag": etag, "X-Repo-Commit": self._sha()})
            else:
                self._answer(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self._sha()})
        else:
            self._answer(404)

    do_HEAD = do_GET

    def log_message(self, *arguments: object) -> None:
        pass

    def _repo(self, body: dict) -> str:
        return f"{body.get('organization') or 'user'}/{body['name']}"

    def _sha(self) -> str:
        return f"{self.server.commits:040x}"

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def loopback_hub():
    """The running server; its address is `server.url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), LoopbackHub)
    server.files, server.commits, server.url = {}, 0, f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
