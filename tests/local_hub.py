"""A Hub on this machine: as much of its protocol as huggingface_hub's client speaks when it uploads
a model and loads it again, and the ways in which it fails."""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

CANARY = "hf_CanaryCanaryCanary0123456789abcd"
"""The token of the tests, which may turn up nowhere."""

PART = 8_000
"""Size of a part, where the server asks for large files in parts."""


@dataclass
class Fault:
    """The next `times` requests whose `METHOD path` matches fail in this way."""

    pattern: str
    how: int | str
    """A status, `timeout`, `reset` (in the middle of the body) or `lost` (done, but no answer)."""
    times: int = 1
    message: str = "no, says the Hub"


@dataclass
class Repo:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)
    pulls: int = 0

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f"{branch}{len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class LocalHub:
    """The state of the server, and its address."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.role = "write"
        self.orgs: dict[str, str] = {}
        """Organization -> role in it."""
        self.scopes: list[dict[str, Any]] | None = None
        """What a fine-grained token may do; None for a plain one."""
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.collections: dict[str, list[str]] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.multipart = False
        self.corrupt = False
        """What is uploaded arrives with a flipped bit."""
        self.server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self})
        )
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        found = self.repos[repo]
        return found.commits[found.branches[branch]]

    def fault(self, line: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, line):
                fault.times -= 1
                return fault
        return None


class Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def handle_any(self) -> None:
        self.place = urlparse(self.path)
        line = f"{self.command} {unquote(self.place.path)}"
        self.hub.requests.append(line)
        fault = self.hub.fault(line)
        if fault and fault.how == "reset":
            sent = "Transfer-Encoding" in self.headers  # a GET has no body to wait for
            self.rfile.read(min(int(self.headers.get("Content-Length") or sent), 1000))
            return self.reset()
        self.body = self.read_body()
        if fault and fault.how == "timeout":
            threading.Event().wait(0.8)  # time.sleep is patched, so that the client does not wait
            return self.reset()
        if fault and isinstance(fault.how, int):
            return self.answer({"error": fault.message}, fault.how)
        self.silent = bool(fault and fault.how == "lost")
        for method, pattern, action in ROUTES:
            if method == self.command and (
                found := re.fullmatch(pattern, unquote(self.place.path))
            ):
                return action(self, *found.groups())
        self.missing("RepoNotFound")

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def reset(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.close_connection = True

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().strip(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if getattr(self, "silent", False):
            return self.reset()
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(value, bytes) else "application/json"
        for name, text in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, code: str) -> None:
        self.answer({"error": code}, 404, {"X-Error-Code": code, "X-Error-Message": code})

    def allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return True
        self.answer({"error": "Invalid username or password."}, 401)
        return False

    def repo(self, name: str) -> Repo | None:
        found = self.hub.repos.get(name)
        if found is None:
            self.missing("RepoNotFound")
        elif not found.private or self.allowed():
            return found
        return None

    def at(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]] | None:
        oid = repo.branches.get(revision, revision)
        if oid in repo.commits:
            return oid, repo.commits[oid]
        self.missing("RevisionNotFound")
        return None

    # --- the account, repositories

    def whoami(self) -> None:
        if self.allowed():
            token = {"displayName": "test", "role": self.hub.role}
            if self.hub.scopes is not None:
                token |= {"role": "fineGrained", "fineGrained": {"scoped": self.hub.scopes}}
            orgs = [{"name": name, "roleInOrg": role} for name, role in self.hub.orgs.items()]
            who = {"type": "user", "name": "me", "orgs": orgs, "auth": {"accessToken": token}}
            self.answer(who)

    def may_write(self, name: str) -> None:
        if self.allowed() and self.repo(name):
            self.answer({})

    def create(self) -> None:
        if not self.allowed():
            return
        asked = json.loads(self.body)
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        body = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repos:
            return self.answer(body | {"error": "You already created this model repo"}, 409)
        self.hub.repos[name] = Repo(asked.get("visibility") == "private")
        self.hub.repos[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer(body)

    def info(self, name: str, revision: str = "main") -> None:
        if (repo := self.repo(name)) and (found := self.at(repo, revision)):
            siblings = [
                {"rfilename": path} | self.entry(repo, path, content)
                for path, content in found[1].items()
            ]
            self.answer(
                {
                    "id": name,
                    "sha": found[0],
                    "private": repo.private,
                    "siblings": siblings,
                    "tags": [],
                }
            )

    def branch(self, name: str, branch: str) -> None:
        if self.allowed() and (repo := self.repo(name)):
            if branch in repo.branches:
                return self.answer({"error": "exists"}, 409)
            repo.commit(branch, repo.commits[repo.branches["main"]])
            self.answer({})

    def collect(self, slug: str) -> None:
        if self.allowed():
            item = json.loads(self.body)["item"]
            self.hub.collections.setdefault(slug, []).append(item["id"])
            self.answer(collection(slug))

    def look_at_collection(self, slug: str) -> None:
        if self.allowed():
            if slug in self.hub.collections:
                self.answer(collection(slug))
            else:
                self.missing("CollectionNotFound")

    # --- files

    def entry(self, repo: Repo, path: str, content: bytes) -> dict[str, Any]:
        facts: dict[str, Any] = {"size": len(content), "blobId": blob_id(content)}
        if path in repo.lfs:
            sha = hashlib.sha256(content).hexdigest()
            facts["lfs"] = {"oid": sha, "sha256": sha, "size": len(content), "pointerSize": 134}
        return facts

    def tree(self, name: str, revision: str, folder: str = "") -> None:
        if (repo := self.repo(name)) and (found := self.at(repo, revision)):
            if folder:
                return self.missing("EntryNotFound")
            self.answer(
                [
                    {"type": "file", "path": path, "oid": blob_id(content)}
                    | self.entry(repo, path, content)
                    for path, content in found[1].items()
                ]
            )

    def paths(self, name: str, revision: str) -> None:
        if (repo := self.repo(name)) and (found := self.at(repo, revision)):
            asked = parse_qs(self.body.decode()).get("paths") or json.loads(self.body)["paths"]
            self.answer(
                [
                    {"type": "file", "path": path, "oid": blob_id(found[1][path])}
                    | self.entry(repo, path, found[1][path])
                    for path in asked
                    if path in found[1]
                ]
            )

    def validate(self) -> None:
        self.answer({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        if not (
            self.allowed() and (repo := self.repo(name)) and (found := self.at(repo, revision))
        ):
            return
        answers = []
        for file in json.loads(self.body)["files"]:
            large, there = file["path"].endswith(".safetensors"), found[1].get(file["path"])
            oid = None
            if there is not None:
                oid = hashlib.sha256(there).hexdigest() if large else blob_id(there)
            mode = "lfs" if large else "regular"
            answers.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            )
        self.answer({"files": answers})

    def batch(self, name: str) -> None:
        if not self.allowed():
            return
        answers = []
        for item in json.loads(self.body)["objects"]:
            oid, size = item["oid"], item["size"]
            if oid not in self.hub.objects:
                upload: dict[str, Any] = {
                    "href": f"{self.hub.url}/lfs/{oid}?X-Amz-Signature=signed"
                }
                if self.hub.multipart and size > PART:
                    count = -(-size // PART)
                    upload["header"] = {"chunk_size": str(PART)} | {
                        str(part): f"{self.hub.url}/part/{oid}/{part}"
                        for part in range(1, count + 1)
                    }
                verify = {"href": f"{self.hub.url}/verify/{oid}"}
                item = {**item, "actions": {"upload": upload, "verify": verify}}
            answers.append(item)
        self.answer({"transfer": "basic", "objects": answers})

    def store(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.objects[oid] = self.body
        self.answer({})

    def part(self, oid: str, number: str) -> None:
        self.hub.parts.setdefault(oid, {})[int(number)] = self.body
        self.answer({}, headers={"ETag": f'"{number}"'})

    def complete(self, oid: str) -> None:
        parts = self.hub.parts.pop(oid)
        content = b"".join(parts[part["partNumber"]] for part in json.loads(self.body)["parts"])
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.objects[oid] = content
        self.answer({})

    def verify(self, oid: str) -> None:
        self.answer({}, 200 if oid in self.hub.objects else 404)

    def commit(self, name: str, revision: str) -> None:
        if not (
            self.allowed() and (repo := self.repo(name)) and (found := self.at(repo, revision))
        ):
            return
        files = dict(found[1])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.answer({"error": "LFS object is missing"}, 400)
                content = self.hub.objects[value["oid"]]
                files[value["path"]] = content[:-1] + b"!" if self.hub.corrupt else content
                repo.lfs.add(value["path"])
        pull = None
        if parse_qs(self.place.query).get("create_pr"):
            repo.pulls += 1
            revision = f"refs/pr/{repo.pulls}"
            pull = f"{self.hub.url}/{name}/discussions/{repo.pulls}"
        oid = repo.commit(revision, files)
        url = f"{self.hub.url}/{name}/commit/{oid}"
        self.answer({"success": True, "commitUrl": url, "commitOid": oid, "pullRequestUrl": pull})

    def resolve(self, name: str, revision: str, path: str) -> None:
        if not ((repo := self.repo(name)) and (found := self.at(repo, revision))):
            return
        if path not in found[1]:
            return self.missing("EntryNotFound")
        content = found[1][path]
        tag = hashlib.sha256(content).hexdigest() if path in repo.lfs else blob_id(content)
        headers = {
            "ETag": f'"{tag}"',
            "X-Repo-Commit": found[0],
            "X-Linked-Size": str(len(content)),
        }
        self.answer(content, headers=headers)


def collection(slug: str) -> dict[str, Any]:
    return {
        "slug": slug,
        "title": slug,
        "owner": {"name": "me"},
        "items": [],
        "position": 0,
        "private": True,
        "theme": "blue",
        "lastUpdated": "2026-01-01T00:00:00.000Z",
        "description": None,
        "upvotes": 0,
    }


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", f"/api/models/{NAME}", Handler.info),
    ("GET", f"/api/models/{NAME}/revision/(.+)", Handler.info),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)", Handler.tree),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)/(.+)", Handler.tree),
    ("POST", f"/api/models/{NAME}/paths-info/(.+)", Handler.paths),
    ("POST", f"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", f"/api/models/{NAME}/commit/(.+)", Handler.commit),
    ("POST", f"/api/models/{NAME}/branch/(.+)", Handler.branch),
    ("GET", f"/api/models/{NAME}/auth-check/write", Handler.may_write),
    ("POST", "/api/collections/(.+)/items", Handler.collect),
    ("GET", "/api/collections/(.+)", Handler.look_at_collection),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/lfs/(\w+)", Handler.store),
    ("POST", r"/lfs/(\w+)", Handler.complete),
    ("PUT", r"/part/(\w+)/(\d+)", Handler.part),
    ("POST", r"/verify/(\w+)", Handler.verify),
    ("HEAD", f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
