"""The Hub on 127.0.0.1: the part of its HTTP interface that the real client uses.

Large files are served from another address, as the Hub's CDN does, so that a token sent there
would be seen.
"""

import base64
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qs

import yaml

from tests.hub.connection import Handler, RefusedError
from tests.hub.store import Hub, described, git_oid, is_large, sha256


def model(h: Handler, name: str, revision: str = "") -> None:
    """What a repository is and holds."""
    commit = h.commit_of(name, revision or "main")
    repository = h.hub.repositories[name]
    files = [{"rfilename": path} for path in commit.files]
    if "blobs" in h.query:
        files = [
            {"rfilename": path, "blobId": git_oid(data), "size": len(data)}
            | ({"lfs": _pointer(data)} if is_large(path) else {})
            for path, data in commit.files.items()
        ]
    facts: dict[str, object] = {"id": name, "sha": commit.sha, "siblings": files, "tags": []}
    facts |= {"private": repository.private, "gated": "auto" if repository.gated else False}
    card = commit.files.get("README.md", b"").decode()
    if front := re.match(r"---\n(.*?)\n---\n", card, re.DOTALL):
        facts["cardData"] = yaml.safe_load(front[1])
    h.answer(facts)


def _pointer(data: bytes) -> dict[str, object]:
    return {"sha256": sha256(data), "size": len(data), "pointerSize": 134}


def refs(h: Handler, name: str) -> None:
    """Branches."""
    found = h.visible(name).refs.items()
    branches = [{"name": k, "ref": f"refs/heads/{k}", "targetCommit": sha} for k, sha in found]
    h.answer({"branches": branches, "tags": [], "converts": []})


def tree(h: Handler, name: str, revision: str, path: str = "") -> None:
    """Files below a folder."""
    files = h.commit_of(name, revision).files
    h.answer([described(p, data) for p, data in files.items() if p.startswith(path)])


def paths_info(h: Handler, name: str, revision: str) -> None:
    """Some files by name."""
    files = h.commit_of(name, revision).files
    given = h.content.decode()
    wanted = json.loads(given)["paths"] if given.startswith("{") else parse_qs(given)["paths"]
    h.answer([described(path, files[path]) for path in wanted if path in files])


def resolve(h: Handler, name: str, revision: str, path: str) -> None:
    """The bytes of a file; large ones from elsewhere."""
    commit = h.commit_of(name, revision, files=True)
    if path not in commit.files:
        raise RefusedError(404, "Entry not found", "EntryNotFound")
    data, headers = commit.files[path], {"X-Repo-Commit": commit.sha}
    if not is_large(path):
        h.send_file(data, {**headers, "ETag": f'"{git_oid(data)}"'})
        return
    h.hub.blobs[sha256(data)] = data
    headers |= {"X-Linked-ETag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
    headers["Location"] = f"{h.hub.cdn}/cdn/{sha256(data)}"
    if xet := h.hub.xet.get(sha256(data)):
        where = f"{h.base}/api/models/{name}/xet-read-token/{commit.sha}"
        headers |= {"X-Xet-Hash": xet, "Link": f'<{where}>; rel="xet-auth"'}
    h.start(302, 0, headers)


def cdn(h: Handler, oid: str) -> None:
    """A large file."""
    h.send_file(h.hub.blobs[oid], {"ETag": f'"{oid}"'})


def xet_token(h: Handler, name: str, revision: str) -> None:
    """Where the chunks of large files are, and the right to read or write them for an hour."""
    h.commit_of(name, revision)
    until = str(int(time.time()) + 3600)
    h.answer(
        {"casUrl": h.hub.cas, "accessToken": "t", "exp": int(until)},
        X_Xet_Cas_Url=h.hub.cas,
        X_Xet_Access_Token="t",
        X_Xet_Token_Expiration=until,
    )


def whoami(h: Handler) -> None:
    """Whose token it is."""
    h.answer({"name": h.member(), "type": "user", "orgs": [{"name": "team"}]})


def create(h: Handler) -> None:
    """A new repository."""
    user, given = h.member(), json.loads(h.content)
    name = f"{given.get('organization') or user}/{given['name']}"
    if name.partition("/")[0] not in (user, "team"):
        raise RefusedError(403, "You don't have the rights to create a model under this namespace")
    if name in h.hub.repositories:
        h.answer({"error": "You already created this model repo", "url": f"{h.base}/{name}"}, 409)
        return
    private = given.get("private") or given.get("visibility") == "private"
    repository = h.hub.create(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
    repository.private, repository.readers = bool(private), {user}
    h.answer({"url": f"{h.base}/{name}", "name": name, "id": name})


def check_card(h: Handler) -> None:
    """Every front matter is good."""
    h.answer({"errors": [], "warnings": []})


def preupload(h: Handler, name: str, revision: str) -> None:
    """Which files go to large storage, and what is there of them already."""
    files = h.commit_of(name, revision).files

    def one(path: str) -> dict[str, object]:
        data = files.get(path)
        oid = None if data is None else sha256(data) if is_large(path) else git_oid(data)
        mode = "lfs" if is_large(path) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    h.answer({"files": [one(file["path"]) for file in json.loads(h.content)["files"]]})


def batch(h: Handler, name: str) -> None:
    """Where large files are sent."""
    h.member()
    objects = json.loads(h.content)["objects"]
    for one in objects:
        if one["oid"] not in h.hub.blobs:
            one["actions"] = {"upload": {"href": f"{h.base}/lfs/{one['oid']}"}}
    h.answer({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")


def store(h: Handler, oid: str) -> None:
    """Take in a large file."""
    if sha256(h.content) != oid:
        raise RefusedError(400, "oid mismatch")
    h.hub.blobs[oid] = h.content
    h.answer({})


def commit(h: Handler, name: str, revision: str) -> None:
    """A commit, or a pull request with one."""
    h.member()
    base, repository = h.commit_of(name, revision), h.hub.repositories[name]
    files, title = dict(base.files), ""
    for line in h.content.splitlines():
        given = json.loads(line)
        value = given["value"]
        if given["key"] == "header":
            title = value["summary"]
        elif given["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif given["key"] == "lfsFile":
            files[value["path"]] = h.hub.blobs[value["oid"]]
        else:
            raise RefusedError(400, f"no operation {given['key']}")
    number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
    asked = "create_pr" in h.query
    sha = repository.commit(files, title, f"refs/pr/{number}" if asked else revision)
    facts = {"success": True, "commitOid": sha, "commitUrl": f"{h.base}/{name}/commit/{sha}"}
    if asked:
        facts["pullRequestUrl"] = f"{h.base}/{name}/discussions/{number}"
    h.answer(facts)


REPOSITORY = r"(?P<name>[^/]+/[^/]+)"
API = f"/api/models/{REPOSITORY}"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (API, model),
    (f"{API}/revision/(?P<revision>[^/]+)", model),
    (f"{API}/refs", refs),
    (f"{API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", tree),
    (f"{API}/paths-info/(?P<revision>[^/]+)", paths_info),
    (f"{API}/preupload/(?P<revision>[^/]+)", preupload),
    (f"{API}/commit/(?P<revision>[^/]+)", commit),
    (f"{API}/xet-(?:read|write)-token/(?P<revision>[^/]+)", xet_token),
    ("/api/whoami-v2", whoami),
    ("/api/repos/create", create),
    ("/api/validate-yaml", check_card),
    (f"/{REPOSITORY}.git/info/lfs/objects/batch", batch),
    ("/lfs/(?P<oid>[0-9a-f]{64})", store),
    ("/cdn/(?P<oid>[0-9a-f]{64})", cdn),
    (f"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
]


class Server(ThreadingHTTPServer):
    """One that says nothing of clients that were killed."""

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


@contextmanager
def serving(hub: Hub) -> Iterator[None]:
    """A server of this hub, and one of its large files, for as long as the block runs."""
    handler = type("HubHandler", (Handler,), {"hub": hub, "routes": ROUTES})
    servers = [Server(("127.0.0.1", 0), handler) for _ in range(2)]
    hub.address, hub.cdn = (f"http://127.0.0.1:{one.server_address[1]}" for one in servers)
    threads = [threading.Thread(target=one.serve_forever, args=(0.02,)) for one in servers]
    for server, thread in zip(servers, threads, strict=True):
        server.daemon_threads = True
        thread.start()
    try:
        yield
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()
