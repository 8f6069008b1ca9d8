"""A model hub on the loopback interface: repositories in memory, and the addresses that ``huggingface_hub`` uses."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from loopback import LoopbackHandler, LoopbackServer

TOKEN = "hf_loopback"


@dataclass
class Repository:
    """Commits by hash, each a table of files; branches point to them."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        content = json.dumps({name: hashlib.sha1(body).hexdigest() for name, body in files.items()})
        commit = hashlib.sha1(f"{len(self.commits)} {content}".encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit

    def find(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


@dataclass
class HubServer(LoopbackServer):
    """The hub; use it as a context.

    Attributes:
        repositories: by ``owner/name``.
        uploads: large files by SHA-256.
        requests: (method, path) in order of arrival.
        spoilt: names of files that arrive with other bytes than they have.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    spoilt: set[str] = field(default_factory=set)


class _Handler(LoopbackHandler):
    owner: HubServer

    def do_GET(self) -> None:
        self._read("GET")

    def do_HEAD(self) -> None:
        self._read("HEAD")

    def do_PUT(self) -> None:
        body = self._body("PUT")
        self.owner.uploads[self.path.rsplit("/", 1)[1]] = body
        self._answer(200, b"")

    def do_POST(self) -> None:
        body = self._body("POST")
        path = unquote(urlsplit(self.path).path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._say(401, {"error": "Invalid username or password."})
        elif path == "/api/validate-yaml":
            self._say(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        else:
            repository, action, branch = self._split(path)
            {"preupload": self._preupload, "commit": self._commit, "branch": self._branch}[action](
                repository, branch, body
            )

    def _split(self, path: str) -> tuple[str, str, str]:
        """``/api/models/OWNER/NAME/ACTION/REVISION`` in parts."""
        parts = path.removeprefix("/api/models/").split("/")
        return "/".join(parts[:2]), parts[2] if len(parts) > 2 else "", "/".join(parts[3:])

    def _create(self, content: dict[str, Any]) -> None:
        name = f"{content.get('organization') or 'loopback'}/{content['name']}"
        status = 409 if name in self.owner.repositories else 200
        private = bool(content.get("private") or content.get("visibility") == "private")
        if status == 200:
            self.owner.repositories[name] = Repository(private=private)
            self.owner.repositories[name].commit({})
        self._say(status, {"url": f"{self.owner.url}/{name}", "name": name})

    def _preupload(self, repository: str, branch: str, body: bytes) -> None:
        files = json.loads(body)["files"]
        answers = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        self._say(200, {"files": answers})

    def _batch(self, content: dict[str, Any]) -> None:
        objects = [
            {
                **wanted,
                "actions": {"upload": {"href": f"{self.owner.url}/storage/{wanted['oid']}"}},
            }
            for wanted in content["objects"]
        ]
        self._say(200, {"transfer": "basic", "objects": objects})

    def _branch(self, repository: str, branch: str, body: bytes) -> None:
        table = self.owner.repositories[repository]
        status = 409 if branch in table.branches else 201
        table.branches.setdefault(branch, table.branches["main"])
        self._say(status, {})

    def _commit(self, repository: str, branch: str, body: bytes) -> None:
        table = self.owner.repositories[repository]
        files = dict(table.commits[table.branches[branch]])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.owner.uploads[value["oid"]]
        commit = table.commit(files, branch)
        url = f"{self.owner.url}/{repository}/commit/{commit}"
        self._say(200, {"commitOid": commit, "commitUrl": url, "hookOutput": "", "success": True})

    def _read(self, method: str) -> None:
        self.owner.requests.append((method, self.path))
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/"):
            repository, _, revision = self._split(path)
            self._information(repository, revision or "main")
        else:
            owner, name, _, *rest = path.strip("/").split("/")
            self._file(f"{owner}/{name}", rest)

    def _seen(self, repository: str) -> Repository | None:
        table = self.owner.repositories.get(repository)
        allowed = table is not None and (not table.private or self.headers.get("Authorization") == f"Bearer {TOKEN}")
        if not allowed:
            self._say(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return table if allowed else None

    def _information(self, repository: str, revision: str) -> None:
        table = self._seen(repository)
        if table is None:
            return
        commit = table.find(revision)
        if commit is None:
            self._say(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = []
        for name, body in table.commits[commit].items():
            large = {"lfs": {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 130}}
            siblings.append(
                {"rfilename": name, "size": len(body), "blobId": hashlib.sha1(body).hexdigest()}
                | (large if name.endswith(".safetensors") else {})
            )
        self._say(200, {"_id": "1", "id": repository, "modelId": repository, "sha": commit, "siblings": siblings})

    def _file(self, repository: str, rest: list[str]) -> None:
        table = self._seen(repository)
        if table is None:
            return
        name = rest[-1]
        commit = table.find("/".join(rest[:-1]))
        body = None if commit is None else table.commits[commit].get(name)
        if commit is None or body is None:
            code = "RevisionNotFound" if commit is None else "EntryNotFound"
            self._say(404, {"error": code}, {"X-Error-Code": code})
            return
        etag = hashlib.sha256(body).hexdigest()
        sent = body[:-1] + bytes([body[-1] ^ 1]) if name in self.owner.spoilt else body
        self._answer(
            200, sent, {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Content-Type": "application/octet-stream"}
        )

    def _body(self, method: str) -> bytes:
        self.owner.requests.append((method, self.path))
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _say(self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self._answer(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


HubServer.handler = _Handler
