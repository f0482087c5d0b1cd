"""Provide a model hub on this machine, with the requests that huggingface_hub uses.

It has repositories, commits and large files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"  # noqa: S105 - of the hub below


class Hub:
    """Keep repositories and their commits in memory.

    Attributes:
        commits: For each repository, the commits in order: (sha, files).
        branches: For each repository and branch, the sha.
        large: The content of large files, by SHA-256.
        created: Bodies of the requests that made repositories.
        requests: Requested paths.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.large: dict[str, bytes] = {}
        self.created: list[dict[str, object]] = []
        self.requests: list[str] = []
        self.url = ""

    def create(self, repository: str) -> None:
        if repository not in self.commits:
            self.branches[repository] = {}
            self.commits[repository] = {}
            self.commit(repository, "main", {".gitattributes": b""})

    def commit(self, repository: str, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(  # noqa: S324
            repr((len(self.commits[repository]), sorted(files.items()))).encode()
        ).hexdigest()
        self.commits[repository][sha] = files
        self.branches[repository][branch] = sha
        return sha

    def find(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.branches[repository].get(revision, revision)
        found = self.commits[repository].get(sha)
        return None if found is None else (sha, found)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: object = None, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(path)
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            return self.api("/".join(parts[2:4]), parts[4:])
        if parts[2:3] == ["resolve"]:
            return self.resolve("/".join(parts[:2]), *parts[3:])
        return self.answer(404, {"error": "no such page"})

    def api(self, repository: str, rest: list[str]) -> None:
        if repository not in self.hub.commits:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        found = self.hub.find(repository, rest[1] if len(rest) > 1 else "main")
        if found is None:
            return self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        sha, files = found
        if rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": n, "size": len(c), "oid": oid(c)} for n, c in files.items()
            ]
            return self.answer(200, tree)
        siblings = [{"rfilename": n, "size": len(c), "blobId": oid(c)} for n, c in files.items()]
        return self.answer(
            200,
            {"id": repository, "modelId": repository, "sha": sha, "siblings": siblings, "tags": []},
        )

    def resolve(self, repository: str, revision: str, name: str) -> None:
        found = self.hub.find(repository, revision) if repository in self.hub.commits else None
        if found is None or name not in found[1]:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        sha, files = found
        return self.answer(200, files[name], ETag=f'"{oid(files[name])}"', X_Repo_Commit=sha)

    def do_PUT(self) -> None:
        content = self.body()
        self.hub.large[hashlib.sha256(content).hexdigest()] = content
        self.answer(200, {})

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self.body()
        self.hub.requests.append(path)
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            made = json.loads(body)
            self.hub.created.append(made)
            repository = f"{made['organization']}/{made['name']}"
            known = repository in self.hub.commits
            self.hub.create(repository)
            return self.answer(409 if known else 200, {"url": f"{self.hub.url}/{repository}"})
        return self.write(parts, body)

    def write(self, parts: list[str], body: bytes) -> None:
        if parts[-1] == "batch":
            return self.batch(json.loads(body))
        repository, action, branch = "/".join(parts[2:4]), parts[4], parts[5]
        if action == "branch":
            self.hub.branches[repository][branch] = self.hub.branches[repository]["main"]
            return self.answer(200, {})
        if action == "preupload":
            modes = [
                {
                    "path": name,
                    "uploadMode": "lfs" if name.endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for name in (entry["path"] for entry in json.loads(body)["files"])
            ]
            return self.answer(200, {"files": modes})
        files = dict(self.hub.find(repository, branch)[1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.hub.commit(repository, branch, files)
        return self.answer(
            200, {"commitUrl": f"{self.hub.url}/{repository}/commit/{sha}", "commitOid": sha}
        )

    def batch(self, asked: dict[str, list[dict[str, object]]]) -> None:
        upload = {"upload": {"href": f"{self.hub.url}/lfs", "header": {}}}
        objects = [{**entry, "actions": upload} for entry in asked["objects"]]
        self.answer(200, {"transfer": "basic", "objects": objects})


def oid(content: bytes) -> str:
    """Return the name that git gives a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
