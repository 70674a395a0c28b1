"""A Hub on this machine: the part of its HTTP API that huggingface_hub uses to create, fill, list and read model repositories.

    with HubServer() as server:                 # a thread; server.url is its address
        server.add("alice/model", folder)       # as if somebody had uploaded it
        server.trouble(r"PUT /lfs/", cut=1000)  # the next such request is cut off after 1000 bytes

What it keeps to: repositories by owner and name, private and gated ones, commits with parents, branches, regular files in
commits and large ones through the LFS batch API (one part or several), redirects to a store with ranges and ETags, error
codes in `X-Error-Code`. Tokens: `TOKENS`; any other is refused. It does not speak Xet, as mirrors do not.
Every request is noted in `requests`; what went up by LFS in `uploaded`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    import pytest

TOKENS = {"hf_alice": "alice", "hf_bob": "bob"}
LARGE = (".safetensors", ".png", ".bin", ".gguf")
LARGE_BYTES = 10_000_000
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class File:
    """One file of a commit; `oid` is that of the content: SHA-256 of a large file, git's SHA-1 of a regular one."""

    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    allowed: set[str] = field(default_factory=set)  # who was let in, if gated
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, File], branch: str = "main", message: str = "") -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files)} {message}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def files(self, revision: str = "main") -> dict[str, File]:
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Trouble:
    """What happens to requests ("METHOD /path") that match, `times` times and not before `after` of them have passed:
    they are cut off after so many bytes, or get a status."""

    pattern: str
    cut: int | None
    status: int | None
    times: int
    after: int

    def strikes(self, line: str) -> bool:
        if not self.times or not re.search(self.pattern, line):
            return False
        if self.after:
            self.after -= 1
            return False
        self.times -= 1
        return True


class RefusedError(Exception):
    def __init__(self, status: int, error: str, code: str | None = None):
        super().__init__(error)
        self.status, self.code = status, code


class HubServer:
    """Use as a context manager. `part_bytes`: larger files go up in several parts."""

    def __init__(self, part_bytes: int = 1 << 40):
        self.repos: dict[str, Repo] = {}
        self.store: dict[str, bytes] = {}  # what was uploaded by LFS, by SHA-256
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []
        self.uploaded: list[str] = []  # SHA-256 of each file that went up, in order
        self.troubles: list[Trouble] = []
        self.delay = 0.0  # seconds that each upload of a file takes
        self.sent = 0  # bytes of content that went out
        self.part_bytes = part_bytes
        self.lock = threading.RLock()

    def __enter__(self) -> HubServer:
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.store_url = self.url.replace("127.0.0.1", "localhost")  # another host, so the client sends no token there
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.shutdown()
        self.http.server_close()

    def add(self, name: str, folder: Path | dict[str, bytes], *, private: bool = False, gated: bool = False) -> Repo:
        """A repository with the files of a folder, or of name -> content."""
        if isinstance(folder, Path):
            paths = [f for f in sorted(folder.rglob("*")) if f.is_file()]
            folder = {str(f.relative_to(folder)): f.read_bytes() for f in paths}
        files = {path: File(content, path.endswith(LARGE)) for path, content in folder.items()}
        for file in files.values():
            if file.large:
                self.store[file.oid] = file.content
        repo = self.repos[name] = Repo(private=private, gated=gated)
        repo.commit(files, message="initial")
        return repo

    def trouble(
        self, pattern: str, *, cut: int | None = None, status: int | None = None, times: int = 1, after: int = 0
    ) -> None:
        self.troubles.append(Trouble(pattern, cut, status, times, after))

    def seen(self, pattern: str) -> list[str]:
        """The requests that match."""
        return [line for line in self.requests if re.search(pattern, line)]


def connect(server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub of this process talk to `server`, with its cache and token in `home`, and wait for nothing.

    Its settings are read from the environment when it is imported; another process gets them from `environment`.
    """
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http, disable_progress_bars

    for name, value in environment(server, home).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
    hasty = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", hasty)
    disable_progress_bars()


def environment(server: HubServer, home: Path) -> dict[str, str]:
    """What makes huggingface_hub of a new process talk to `server`."""
    return {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    timeout = 20

    def log_message(self, format: str, *args: object) -> None:
        return

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        self.cut: int | None = None
        line = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.requests.append(line)
            trouble = next((t for t in self.hub.troubles if t.strikes(line)), None)
        try:
            if trouble is not None and trouble.status is not None:
                self.body()
                raise RefusedError(trouble.status, "trouble")
            if trouble is not None:
                self.cut = trouble.cut
            for method, pattern, handler in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method.split():
                    handler(self, **found.groupdict())
                    return
            self.body()
            raise RefusedError(404, "not found")
        except RefusedError as refused:
            headers = {"X-Error-Message": str(refused)}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            self.json({"error": str(refused)}, refused.status, headers)
        except ConnectionError:
            self.close_connection = True

    # --- reading and writing ---

    def body(self) -> bytes:
        """The content of the request; cut off as a broken line would be, if there is trouble."""
        size = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            return self.chunks()
        if self.cut is not None and self.command in ("PUT", "POST"):
            self.rfile.read(min(self.cut, size))
            self.hang_up()
        return self.rfile.read(size)

    def chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
            if self.cut is not None and len(content) >= self.cut:
                self.hang_up()
        self.rfile.readline()
        return content

    def hang_up(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionResetError

    def json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with self.hub.lock:
            self.hub.sent += len(content[: self.cut])
        if self.cut is not None:
            self.wfile.write(content[: self.cut])
            self.wfile.flush()
            self.hang_up()
        self.wfile.write(content)

    # --- who asks, and for what ---

    def user(self) -> str | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        name = TOKENS.get(given.removeprefix("Bearer "))
        if name is None:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return name

    def find(self, repo: str, *, write: bool = False, content: bool = False) -> Repo:
        """The repository, if who asks may see it. `write`: if they may change it; `content`: if they may read it."""
        user, found = self.user(), self.hub.repos.get(repo)
        owner = repo.split("/")[0]
        if found is None or (found.private and user != owner):
            raise RefusedError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user != owner:
            raise RefusedError(401 if user is None else 403, f"You don't have the rights to change {repo}")
        if content and found.gated and user != owner and user not in found.allowed:
            raise RefusedError(401 if user is None else 403, "Access to model is restricted", "GatedRepo")
        return found

    def sha(self, repo: Repo, revision: str) -> str:
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # --- routes ---

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        self.json({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self) -> None:
        asked = json.loads(self.body())
        user = self.user()
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        if owner != user:
            raise RefusedError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        if name in self.hub.repos:
            raise RefusedError(409, "You already created this model repo")
        repo = self.hub.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.commit({".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, message="initial commit")
        self.json({"url": f"{self.hub.url}/{name}", "name": name})

    def validate(self) -> None:
        import yaml

        content = json.loads(self.body())["content"]
        front = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        errors = []
        try:
            parsed = yaml.safe_load(front[1]) if front else {}
            if not isinstance(parsed.get("license", ""), str):
                errors.append({"message": '"license" must be a string'})
        except yaml.YAMLError as error:
            errors.append({"message": str(error)})
        self.json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def info(self, repo: str, revision: str = "main") -> None:
        found = self.find(repo)
        sha = self.sha(found, revision)
        siblings: list[dict[str, Any]] = []
        for path, file in sorted(found.commits[sha].items()):
            entry: dict[str, Any] = {"rfilename": path}
            if "blobs" in self.query:
                entry |= {"size": len(file.content), "blobId": file.oid[:40]}
            siblings.append(entry)
        gated = "manual" if found.gated else False
        self.json(
            {"id": repo, "modelId": repo, "sha": sha, "private": found.private, "gated": gated, "siblings": siblings}
        )

    def tree(self, repo: str, revision: str) -> None:
        found = self.find(repo)
        entries = []
        for path, file in sorted(found.commits[self.sha(found, revision)].items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid[:40]}
            if file.large:
                entry["lfs"] = {"oid": file.oid, "size": len(file.content), "pointerSize": 130}
            entries.append(entry)
        self.json(entries)

    def branch(self, repo: str, revision: str) -> None:
        self.body()
        found = self.find(repo, write=True)
        if revision in found.branches:
            raise RefusedError(409, "Reference already exists")
        found.branches[revision] = found.branches["main"]
        self.json({})

    def preupload(self, repo: str, revision: str) -> None:
        asked = json.loads(self.body())
        found = self.find(repo, write=True)
        files = found.commits[self.sha(found, revision)]
        answers = []
        for entry in asked["files"]:
            path = entry["path"]
            large = path.endswith(LARGE) or entry["size"] > LARGE_BYTES
            oid = files[path].oid if path in files else None
            answers.append(
                {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        self.json({"files": answers})

    def batch(self, repo: str) -> None:
        asked = json.loads(self.body())
        self.find(repo, write=True)
        objects = []
        for entry in asked["objects"]:
            oid, size = entry["oid"], entry["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.store:
                upload: dict[str, Any] = {"href": f"{self.hub.url}/lfs/{oid}"}
                if size > self.hub.part_bytes:
                    n_parts = -(-size // self.hub.part_bytes)
                    urls = {str(n): f"{self.hub.url}/lfs/{oid}/{n}" for n in range(1, n_parts + 1)}
                    upload["header"] = {"chunk_size": str(self.hub.part_bytes), **urls}
                verify = {"href": f"{self.hub.url}/{repo}/lfs/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        self.json({"transfer": "basic", "objects": objects})

    def put(self, oid: str, part: str | None = None) -> None:
        content = self.body()
        time.sleep(self.hub.delay)
        if part is not None:
            with self.hub.lock:
                self.hub.parts.setdefault(oid, {})[int(part)] = content
            self.send(b"", headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})
            return
        self.keep(oid, content)
        self.send(b"")

    def complete(self, oid: str) -> None:
        self.body()
        parts = self.hub.parts[oid]
        self.keep(oid, b"".join(parts[n] for n in sorted(parts)))
        self.json({})

    def keep(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise RefusedError(400, "content does not have this checksum")
        with self.hub.lock:
            self.hub.store[oid] = content
            self.hub.uploaded.append(oid)

    def verify(self, repo: str) -> None:
        asked = json.loads(self.body())
        self.find(repo, write=True)
        if len(self.hub.store.get(asked["oid"], b"")) != asked["size"]:
            raise RefusedError(404, "object not found")
        self.json({})

    def commit(self, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        found = self.find(repo, write=True)
        with self.hub.lock:
            parent = self.sha(found, revision)
            wanted = lines[0]["value"].get("parentCommit", parent)
            if wanted != parent:
                raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(found.commits[parent])
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]), False)
                elif line["key"] == "lfsFile":
                    if value["oid"] not in self.hub.store:
                        raise RefusedError(400, f"LFS object {value['oid']} was never uploaded")
                    files[value["path"]] = File(self.hub.store[value["oid"]], True)
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
                else:
                    raise RefusedError(400, f"unknown operation {line['key']}")
            sha = found.commit(files, revision, lines[0]["value"]["summary"])
        self.json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self.find(repo, content=True)
        sha = self.sha(found, revision)
        if path not in found.commits[sha]:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        file = found.commits[sha][path]
        headers = {"X-Repo-Commit": sha}
        if not file.large:
            self.ranged(file.content, {**headers, "ETag": f'"{file.oid}"'})
            return
        linked = {"X-Linked-Size": str(len(file.content)), "X-Linked-Etag": f'"{file.oid}"'}
        self.send(b"", 302, {**headers, **linked, "Location": f"{self.hub.store_url}/cdn/{file.oid}"})

    def cdn(self, oid: str) -> None:
        assert self.headers.get("Authorization") is None
        self.ranged(self.hub.store[oid], {"ETag": f'"{oid}"'})

    def ranged(self, content: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers["Accept-Ranges"] = "bytes"
        if asked is None:
            self.send(content, headers=headers)
            return
        begin, end = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        if begin >= len(content):
            raise RefusedError(416, "Range Not Satisfiable")
        headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
        self.send(content[begin : end + 1], 206, headers)


ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", f"/api/models/{REPO}", Handler.info),
    ("GET", f"/api/models/{REPO}/revision/(?P<revision>.+)", Handler.info),
    ("GET", f"/api/models/{REPO}/tree/(?P<revision>.+)", Handler.tree),
    ("POST", f"/api/models/{REPO}/branch/(?P<revision>.+)", Handler.branch),
    ("POST", f"/api/models/{REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", f"/api/models/{REPO}/commit/(?P<revision>.+)", Handler.commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", Handler.put),
    ("PUT", r"/lfs/(?P<oid>\w+)/(?P<part>\d+)", Handler.put),
    ("POST", r"/lfs/(?P<oid>\w+)", Handler.complete),
    ("POST", f"/{REPO}/lfs/verify", Handler.verify),
    ("GET HEAD", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    ("GET HEAD", r"/cdn/(?P<oid>\w+)", Handler.cdn),
]
