"""A folder served on this machine as a dataset on the Hugging Face Hub is: what `datasets` asks for when it streams."""

import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SHA = "0123456789" * 4
"""The revision of everything there is."""
LICENCE = "cc0-1.0"


@contextmanager
def hub(folder: Path, name: str) -> Iterator[str]:
    """The address of a Hub that has one dataset, until the block ends."""

    class Handler(_Hub):
        root = folder
        dataset = name

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class _Hub(http.server.BaseHTTPRequestHandler):
    root: Path
    dataset: str

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        """What the Hub answers."""
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        api, files = f"/api/datasets/{self.dataset}", f"/datasets/{self.dataset}/resolve/{SHA}/"
        if path in (api, f"{api}/revision/{SHA}"):
            siblings = [{"rfilename": str(p.relative_to(self.root))} for p in sorted(self.root.rglob("*")) if p.is_file()]
            self._json({"id": self.dataset, "sha": SHA, "cardData": {"license": LICENCE}, "siblings": siblings})
        elif path.startswith(f"{api}/tree/{SHA}"):
            below = self.root / path.removeprefix(f"{api}/tree/{SHA}").strip("/")
            self._json([self._entry(p) for p in sorted(below.glob("*"))])
        elif path.startswith(files):
            self._file(self.root / path.removeprefix(files))
        else:
            self._json({"error": "Repository not found"}, status=404, code="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def _entry(self, path: Path) -> dict[str, Any]:
        kind = "file" if path.is_file() else "directory"
        return {"type": kind, "oid": "0" * 40, "size": path.stat().st_size, "path": str(path.relative_to(self.root))}

    def _file(self, path: Path) -> None:
        if not path.is_file():
            self._json({"error": "Entry not found"}, status=404, code="EntryNotFound")
            return
        data = path.read_bytes()
        headers = {"X-Repo-Commit": SHA, "ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted is None:
            self._send(200, data, headers)
            return
        first, last = wanted.removeprefix("bytes=").split("-")
        part = data[int(first) : int(last) + 1 if last else None]
        self._send(206, part, {**headers, "Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"})

    def _json(self, value: Any, *, status: int = 200, code: str | None = None) -> None:
        headers = {"Content-Type": "application/json", "X-Repo-Commit": SHA, **({"X-Error-Code": code} if code else {})}
        self._send(status, json.dumps(value).encode(), headers)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
