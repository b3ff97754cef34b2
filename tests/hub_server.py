"""A hub on this machine: the part of its HTTP interface that a push speaks, with repositories held in memory."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

MODEL = r"/api/models/([^/]+/[^/]+)"


class Hub:
    """Repositories, large objects and what was asked for."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.roles = {"hf_write": "write", "hf_read": "read"}  # of tokens
        self.owner = "someone"
        self.repos: dict[str, dict[str, Any]] = {}  # {"private": bool, "branches": {name: {file: content}}}
        self.objects: dict[str, bytes] = {}  # large ones by SHA-256
        self.refused_uploads: set[int] = set()  # which PUTs fail, counted from 1
        self.refused_commits = 0  # how many more commits fail
        self.requests: list[str] = []

    def uploads(self) -> int:
        return sum(request.startswith("PUT") for request in self.requests)

    def add(self, repo: str, *, private: bool = False, **files: bytes) -> None:
        content = {name.replace("__", "."): text for name, text in files.items()}
        self.repos[repo] = {"private": private, "branches": {"main": {".gitattributes": b"", **content}}}

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """Of a branch, without what the hub itself puts there."""
        held = self.repos[repo]["branches"][branch]
        return {name: content for name, content in held.items() if name != ".gitattributes"}


def upload_mode(path: str) -> dict[str, Any]:
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.serve()

    def do_POST(self) -> None:
        self.serve()

    def do_PUT(self) -> None:
        self.serve()

    def do_DELETE(self) -> None:
        self.serve()

    def serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(self.chunks())
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append(f"{self.command} {path}")
        if path.startswith("/large/"):
            self.put_object(path.removeprefix("/large/"), body)
            return
        role = self.hub.roles.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        if role is None:
            self.answer(401, {}, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif path == "/api/whoami-v2":
            self.answer(200, {"name": self.hub.owner, "auth": {"accessToken": {"role": role}}})
        elif path == "/api/validate-yaml":
            self.answer(200, {"warnings": [], "errors": []})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.batch(match[1], json.loads(body))
        elif match := re.fullmatch(MODEL + r"(?:/(revision|preupload|branch|commit)/(.+))?", path):
            self.model(match[1], match[2], match[3] or "main", body)
        else:
            self.answer(404, {})

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def answer(self, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
        text = json.dumps(document).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != self.hub.owner:
            self.answer(403, {"error": "no"}, {"X-Error-Message": "You don't have the rights"})
            return
        self.hub.add(repo, private=asked.get("visibility") == "private" or asked.get("private", False))
        self.answer(200, {"url": f"{self.hub.endpoint}/{repo}"})

    def model(self, repo: str, action: str | None, branch: str, body: bytes) -> None:
        found = self.hub.repos.get(repo)
        if found is None:
            self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})
            return
        branches = found["branches"]
        if action == "branch":
            if self.command == "DELETE":
                del branches[branch]
            else:
                branches[branch] = dict(branches["main"])
            self.answer(200, {})
            return
        if branch not in branches:
            self.answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        elif action == "preupload":
            asked = json.loads(body)["files"]
            self.answer(200, {"files": [upload_mode(file["path"]) for file in asked]})
        elif action == "commit":
            self.commit(repo, branch, body)
        else:
            siblings = [{"rfilename": name} for name in branches[branch]]
            self.answer(200, {"id": repo, "sha": "0" * 40, "private": found["private"], "siblings": siblings,
                              "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    def batch(self, repo: str, asked: dict[str, Any]) -> None:
        answers = []
        for each in asked["objects"]:
            if each["oid"] not in self.hub.objects:
                each["actions"] = {"upload": {"href": f"{self.hub.endpoint}/large/{each['oid']}"}}
            answers.append(each)
        self.answer(200, {"transfer": "basic", "objects": answers})

    def put_object(self, oid: str, body: bytes) -> None:
        if self.hub.uploads() in self.hub.refused_uploads:
            self.answer(403, {})
            return
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self.answer(200, {})

    def commit(self, repo: str, branch: str, body: bytes) -> None:
        if self.hub.refused_commits:
            self.hub.refused_commits -= 1
            self.answer(412, {"error": "A commit has happened since"})
            return
        held = self.hub.repos[repo]["branches"][branch]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                held[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                held[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del held[value["path"]]
        self.answer(200, {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{'1' * 40}", "commitOid": "1" * 40})


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers at `Hub.endpoint` until the body ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
