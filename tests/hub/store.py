"""Repositories in memory: commits, branches, large files, as a Hub keeps them."""

import hashlib
import time
from dataclasses import dataclass, field

# What the Hub keeps outside git, by the end of the name.
LARGE = (".safetensors", ".bin", ".gguf")


@dataclass(frozen=True)
class Commit:
    """The files at one point in time."""

    sha: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """One model repository; only users in `readers` may read one that is private or gated."""

    name: str
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], title: str = "files", ref: str = "main") -> str:
        """Put a state of all files at the head of a branch; its sha."""
        parts = [self.name, title, str(len(self.commits))]
        parts += [f"{path} {sha256(data)}" for path, data in sorted(files.items())]
        sha = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        self.commits.append(Commit(sha, title, dict(files)))
        self.refs[ref] = sha
        return sha

    def at(self, revision: str) -> Commit | None:
        """The commit of a branch, a tag or a sha."""
        sha = self.refs.get(revision, revision)
        return next((commit for commit in self.commits if commit.sha == sha), None)

    @property
    def head(self) -> Commit:
        """The newest commit of main."""
        found = self.at("main")
        assert found
        return found


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose path holds `path`.

    A status is answered with `headers`; `cut` sends so many bytes of a body and hangs up; `pause`
    waits so many seconds after every piece of a body, `silence` before any answer.
    """

    path: str
    times: int = 1
    status: int = 0
    method: str = "GET"
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    pause: float = 0.0
    silence: float = 0.0


@dataclass(frozen=True)
class Request:
    """One request as it came, and how many bytes of a body went out for it."""

    method: str
    path: str
    range: str | None
    agent: str
    token: str | None
    sent: int


class Hub:
    """Every repository, the users' tokens, uploaded large files, and what was asked for.

    Large files whose sha256 is in `xet` are under that name in the store at `cas`.
    """

    def __init__(self) -> None:
        self.address = ""
        self.cdn = ""
        self.repositories: dict[str, Repository] = {}
        self.tokens: dict[str, str] = {}
        self.blobs: dict[str, bytes] = {}
        self.cas = ""
        self.xet: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.begun = 0

    def create(self, name: str, files: dict[str, bytes] | None = None, **facts: bool) -> Repository:
        """A new repository, with a first commit where files are given."""
        repository = self.repositories[name] = Repository(name, **facts)
        if files is not None:
            repository.commit(files)
        return repository

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets; it is used up once."""
        for fault in self.faults:
            if fault.times > 0 and fault.path in path and fault.method == method:
                fault.times -= 1
                return fault
        return None

    def forget(self) -> None:
        """Start a new record of requests."""
        self.asked()
        self.requests, self.begun = [], 0

    def asked(self, part: str = "") -> list[Request]:
        """The requests whose path holds a word, once all that were begun are answered."""
        while len(self.requests) < self.begun:
            time.sleep(0.01)
        return [request for request in self.requests if part in request.path]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_oid(data: bytes) -> str:
    """The name git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith(LARGE)


def described(path: str, data: bytes) -> dict[str, object]:
    """A file as the Hub's tree lists it."""
    facts: dict[str, object] = {"type": "file", "path": path, "size": len(data)}
    facts["oid"] = git_oid(data)
    if is_large(path):
        facts["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
    return facts
