"""A hub on this machine: folders served as repositories by the protocol of huggingface.co, faults included."""

import hashlib
import http.server
import json
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSALS: dict[int | str, tuple[int, dict[str, str]]] = {
    401: (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    403: (403, {"X-Error-Message": "Your token has no such permission"}),
    "gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted"}),
    404: (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    429: (429, {}),
    "wait": (429, {"Retry-After": "3600"}),
    500: (500, {}),
}
"""Faults that are answers: status and headers."""


class LocalHub(http.server.ThreadingHTTPServer):
    """Serves `folder/models/ORGANISATION/NAME` and `folder/datasets/ORGANISATION/NAME`, each with one commit, without Xet.

    `faults[repository]` is a key of `REFUSALS`, "cut" (the connection ends in the middle of a file of weights or rows), "slow"
    (such a file comes a byte at a time), or "silent" (the API takes questions and never answers).
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: dict[str, int | str] = {}
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.sent: dict[str, int] = defaultdict(int)
        """Bytes of each file, by repository and name."""
        self.closing = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop answering."""
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub  # type: ignore[assignment]
    kinds: ClassVar = {"models": "models", "datasets": "datasets"}

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = [unquote(part) for part in urlsplit(self.path).path.split("/") if part]
        self.server.requests.append(f"{self.command} {self.path}")
        if not parts:
            return self._send(200, b"a hub")
        is_api = parts[0] == "api"
        kind = "datasets" if "datasets" in parts[:2] else "models"
        rest = [part for at, part in enumerate(parts) if at > 1 or part not in ("api", "models", "datasets")]
        name, rest = "/".join(rest[:2]), rest[2:]
        self.server.tokens.add(self.headers.get("Authorization"))
        fault = self.server.faults.get(name)
        if fault in REFUSALS:
            status, headers = REFUSALS[fault]
            return self._send(status, b'{"error": "refused"}', headers)
        folder = self.server.folder / kind / name
        if len(name.split("/")) < 2 or not folder.is_dir():
            return self._send(404, b"", REFUSALS[404][1])
        if is_api:
            if fault == "silent":
                self.server.closing.wait()
                return None
            return self._api(kind, name, folder, rest, body)
        if rest[1] not in ("main", COMMIT):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        return self._file(name, folder, "/".join(rest[2:]), fault)

    def _api(self, kind: str, name: str, folder: Path, rest: list[str], body: bytes) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if rest[:1] in ([], ["revision"]):
            if rest and rest[1] not in ("main", COMMIT):
                return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": str(path.relative_to(folder))} for path in files]
            return self._json({"_id": "0", "id": name, "sha": COMMIT, "private": False, "gated": False, "disabled": False,
                               "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})  # fmt: skip
        if rest[0] == "tree":
            under = folder.joinpath(*rest[2:])
            if not under.is_dir():
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            deep = "recursive=true" in self.path.lower() or "recursive=1" in self.path
            return self._json([_entry(folder, path) for path in sorted(under.rglob("*") if deep else under.iterdir())])
        if rest[0] == "paths-info":
            paths = [value for key, value in _form(self.headers.get("Content-Type", ""), body) if key == "paths"]
            return self._json([_entry(folder, folder / path) for path in paths if (folder / path).exists()])
        return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def _file(self, name: str, folder: Path, file: str, fault: int | str | None) -> None:
        path = folder / file
        if not path.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = path.read_bytes()
        headers = {"ETag": f'"{_digest(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if path.suffix == ".safetensors":
            headers |= {"X-Linked-Etag": f'"{_digest(path)}"', "X-Linked-Size": str(len(content))}
        status, start = 200, 0
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or len(content) - 1), len(content) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            status, content = 206, content[start:stop]
        if self.command == "HEAD" or fault not in ("cut", "slow") or path.suffix in (".json", ".jinja", ".md"):
            if self.command != "HEAD":
                self.server.sent[f"{name}/{file}"] += len(content)
            return self._send(status, content, headers)
        self._head(status, len(content), headers)
        if fault == "cut":
            self.wfile.write(content[: len(content) // 2])
        for at in range(len(content) if fault == "slow" else 0):
            if self.server.closing.wait(0.05) or self.server.faults.get(name) != "slow":
                break
            self.wfile.write(content[at : at + 1])
        self.close_connection = True
        return None

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(key, value)
        self.end_headers()

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self._head(status, len(content), headers or {})
        if self.command != "HEAD":
            self.wfile.write(content)


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()  # as git's, not a secret's


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    name = str(path.relative_to(folder))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": COMMIT, "size": 0}
    return {"type": "file", "path": name, "oid": _digest(path), "size": path.stat().st_size}


def _form(kind: str, body: bytes) -> list[tuple[str, str]]:
    from urllib.parse import parse_qsl

    if "json" in kind:
        return [("paths", path) for path in json.loads(body).get("paths", [])]
    return parse_qsl(body.decode())
