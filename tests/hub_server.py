"""A hub on the loopback interface: serves folders as repositories and does wrong on demand.

Speaks what huggingface_hub asks a hub for: model info, the file tree, and resolve by HEAD and GET with ETag,
X-Repo-Commit, X-Linked-Size, a redirect for large files and ranges. Knows no git and stores nothing.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from urllib.parse import unquote, urlsplit

PATHS = (
    ("info", re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?")),
    ("tree", re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)")),
    ("file", re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")),
    ("large", re.compile(r"/large/(?P<repo>[^/]+/[^/]+)/(?P<name>.+)")),
)
LARGE = (".safetensors", ".bin")
"""Files that the hub keeps elsewhere: their ETag is a SHA-256, and they are redirected to."""
EXPIRED = "expired"
"""A token that the hub does not take."""


@dataclass
class Repo:
    """One repository and its faults."""

    files: dict[str, Path]
    """Name in the repository -> file that holds its content."""
    commit: str
    """What its branch main is at."""
    old: tuple[str, ...] = ()
    """Earlier commits, of the same files."""
    gated_to: str | None = None
    """The only token that may read it."""
    hidden: bool = False
    """401 for a stranger, as for a private repository or one that is not there."""
    busy: list[tuple[int, str | None]] = field(default_factory=list)
    """(status, Retry-After) of the next answers."""
    busy_at: str = "info"
    """Which requests find it busy: info, file or large."""
    cut_after: list[int] = field(default_factory=list)
    """Bytes after which the next bodies of large files break off."""
    hold_after: list[int] = field(default_factory=list)
    """Bytes after which the next bodies of large files stop, and the connection stays."""
    corrupt: int = 0
    """How many of the next bodies of large files have one byte changed."""


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    method: str
    kind: str
    repo: str
    name: str
    range: str | None
    token: str | None


@dataclass
class Hub:
    """The server's address, what it serves and what it was asked."""

    url: str
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)
    over: Event = field(default_factory=Event)
    """Lets go of what is held."""

    @property
    def large_url(self) -> str:
        """The same server by another name: a host that the hub's token is not for."""
        return self.url.replace("127.0.0.1", "localhost")

    def add(self, repo: str, folder: Path, commit: str | None = None, **files: Path) -> Repo:
        """Serve a folder's files, and further `files` under names whose dots are written `__dot__`."""
        content = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        content |= {name.replace("__dot__", "."): path for name, path in files.items()}
        self.repos[repo] = Repo(content, commit or sha1(repo.encode()).hexdigest())
        return self.repos[repo]

    def asked(self, method: str, *kinds: str) -> list[str]:
        """Return the names of the files asked for by a method, repositories for info and tree."""
        return [r.name or r.repo for r in self.requests if r.method == method and r.kind in kinds]


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub on a free port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.hub = hub  # type: ignore[attr-defined]
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        server.server_close()


@cache
def etag(path: Path, large: bool) -> str:
    """Return what the hub calls a file's content: its SHA-256, or its git hash."""
    content = path.read_bytes()
    return sha256(content).hexdigest() if large else sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        kind, found = next(
            ((kind, m.groupdict()) for kind, one in PATHS if (m := one.fullmatch(path))), ("", {})
        )
        if not kind:  # what newer clients ask about themselves
            self._refuse(404, "NotFound")
            return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        name = found.get("name") or ""
        with hub.lock:
            hub.requests.append(
                Request(self.command, kind, found["repo"], name, self.headers.get("Range"), token)
            )
            repo = hub.repos.get(found["repo"])
            busy = repo.busy.pop(0) if repo and repo.busy and repo.busy_at == kind else None
        if busy:
            self._send(busy[0], b"busy", **({"Retry-After": busy[1]} if busy[1] else {}))
        elif token == EXPIRED:
            self._refuse(401, "", **{"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repo is None or (repo.hidden and token is None):
            self._refuse(401 if token is None else 404, "RepoNotFound")
        elif repo.gated_to and kind == "file" and token != repo.gated_to:
            self._refuse(401 if token is None else 403, "GatedRepo")
        elif found.get("revision") not in (None, "main", repo.commit, *repo.old):
            self._refuse(404, "RevisionNotFound")
        else:
            self._commit = found.get("revision") if found.get("revision") in repo.old else repo.commit
            getattr(self, f"_{kind}")(hub, repo, found["repo"], name)

    def _info(self, hub: Hub, repo: Repo, repo_id: str, name: str) -> None:
        siblings = [{"rfilename": name} for name in repo.files]
        self._json({"_id": "0" * 24, "id": repo_id, "sha": self._commit, "siblings": siblings})

    def _tree(self, hub: Hub, repo: Repo, repo_id: str, name: str) -> None:
        entries = []
        for name, path in repo.files.items():
            size = path.stat().st_size
            entry = {"type": "file", "path": name, "size": size, "oid": etag(path, False)}
            if name.endswith(LARGE):
                entry["lfs"] = {"oid": etag(path, True), "size": size, "pointerSize": 134}
            entries.append(entry)
        self._json(entries)

    def _file(self, hub: Hub, repo: Repo, repo_id: str, name: str) -> None:
        if name not in repo.files:
            self._refuse(404, "EntryNotFound", **{"X-Repo-Commit": self._commit})
            return
        path, large = repo.files[name], name.endswith(LARGE)
        tag, size = etag(path, large), path.stat().st_size
        facts = {"X-Repo-Commit": self._commit, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        if large:
            facts |= {"X-Linked-ETag": f'"{tag}"', "X-Linked-Size": str(size)}
            self._send(302, b"", Location=f"{hub.large_url}/large/{repo_id}/{name}", **facts)
        else:
            self._send(200, path.read_bytes(), **facts)

    def _large(self, hub: Hub, repo: Repo, repo_id: str, name: str) -> None:
        body = bytearray(repo.files[name].read_bytes())
        cut = held = None
        if self.command == "GET":
            with hub.lock:
                cut = repo.cut_after.pop(0) if repo.cut_after else None
                held = repo.hold_after.pop(0) if repo.hold_after else None
                if repo.corrupt:
                    repo.corrupt -= 1
                    body[-1] ^= 1
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked is None:
            self._send(200, bytes(body), cut=held or cut, over=hub.over if held else None)
            return
        start, total = int(asked[1]), len(body)
        self._send(
            206, bytes(body[start:]), cut=cut, **{"Content-Range": f"bytes {start}-{total - 1}/{total}"}
        )

    def _json(self, document: object) -> None:
        self._send(200, json.dumps(document).encode(), **{"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, **headers: str) -> None:
        self._send(status, b"{}", **{"X-Error-Code": code, "X-Error-Message": code, **headers})

    def _send(
        self, status: int, body: bytes, *, cut: int | None = None, over: Event | None = None, **headers: str
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            if over:
                over.wait()
            self.close_connection = True
