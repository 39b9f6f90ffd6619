"""Models by name: a small server on loopback speaks the hub's file API; nothing else is ever reached."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ldm_pipe import EnvironmentFault, ModelError, hub, load

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
tiny_families = importlib.import_module("tiny_families")
COMMIT, NAME = "0123456789abcdef" * 2 + "01234567", "owner/tiny"


class Handler(BaseHTTPRequestHandler):
    """The part of the hub's API that a download needs. `server.folder`: what it serves; `server.faults`: what goes wrong."""

    server: Any

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, body: bool) -> None:
        self.server.seen.append(self.path)
        path = self.path.partition("?")[0]
        prefix = next((p for p in (f"/{NAME}/resolve/{r}/" for r in ("main", COMMIT)) if path.startswith(p)), "/ /")
        if path in (f"/api/models/{NAME}/revision/{r}" for r in ("main", COMMIT)):
            self.json({"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": n} for n in self.files()]}, body)
        elif path == f"/api/models/{NAME}/tree/{COMMIT}":
            entries = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": "a" * 40} for n, f in self.files().items()]
            self.json([e | self.lfs(e["path"]) for e in entries], body)
        elif path.removeprefix(prefix) in self.files():
            self.file(path.removeprefix(prefix), body)
        else:
            code = "RevisionNotFound" if f"/models/{NAME}/revision/" in path else "RepoNotFound"
            self.send({"X-Error-Code": code, "Content-Length": "0"}, b"", 404)

    def file(self, name: str, body: bool) -> None:
        data = self.files()[name].read_bytes()
        etag = self.lfs(name).get("lfs", {}).get("oid") or hashlib.sha1(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(data)), "Accept-Ranges": "bytes"}
        cut = body and self.server.faults.get(name) == "cut"
        self.send(headers, (data[: len(data) // 2] if cut else data) if body else b"")
        if cut:
            self.server.faults.clear()
            self.close_connection = True

    def files(self) -> dict[str, Path]:
        return {str(f.relative_to(self.server.folder)): f for f in sorted(self.server.folder.rglob("*")) if f.is_file()}

    def lfs(self, name: str) -> dict[str, Any]:
        if not name.endswith(".safetensors"):
            return {}
        digest = hashlib.sha256(self.files()[name].read_bytes()).hexdigest()
        digest = "f" * 64 if self.server.faults.get(name) == "sum" else digest
        return {"lfs": {"oid": digest, "size": self.files()[name].stat().st_size, "pointerSize": 130}}

    def json(self, found: Any, body: bool) -> None:
        data = json.dumps(found).encode()
        self.send({"Content-Type": "application/json", "Content-Length": str(len(data))}, data if body else b"")

    def send(self, headers: dict[str, str], data: bytes, code: int = 200) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_families.save("dit", tmp_path_factory.mktemp("hub") / "served")


@pytest.fixture
def server(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from huggingface_hub import constants

    found: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.folder, found.faults, found.seen = folder, {}, []
    threading.Thread(target=found.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{found.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub, "OFFLINE", False)
    yield found
    found.shutdown()
    found.server_close()


def test_a_model_is_fetched_once_and_then_lives_in_the_cache(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = load(f"{NAME}@{COMMIT}")
    assert bundle.family == "dit"
    assert any("diffusion_pytorch_model.safetensors" in path for path in server.seen)
    server.seen.clear()
    monkeypatch.setattr(hub, "OFFLINE", True)
    assert load(f"{NAME}@{COMMIT}").family == "dit"
    assert server.seen == []
    with pytest.raises(EnvironmentFault, match="'owner/other' is not in the cache and HF_HUB_OFFLINE is set"):
        load("owner/other")


def test_what_the_hub_does_not_have_is_said(server: Any) -> None:
    with pytest.raises(ModelError, match="the hub has no model 'owner/nothing'"):
        load("owner/nothing")
    with pytest.raises(ModelError, match=r"has no revision 'v9'"):
        load(f"{NAME}@v9")


def test_a_damaged_file_is_removed_and_can_be_fetched_again(server: Any) -> None:
    server.faults["vae/diffusion_pytorch_model.safetensors"] = "sum"
    with pytest.raises(ModelError, match=r"vae/diffusion_pytorch_model\.safetensors came damaged"):
        load(NAME)
    server.faults.clear()
    assert load(NAME).family == "dit"


def test_an_interrupted_download_is_taken_up_again(server: Any) -> None:
    server.faults["transformer/diffusion_pytorch_model.safetensors"] = "cut"
    with contextlib.suppress(EnvironmentFault):  # or the library itself takes it up
        load(NAME)
    assert server.faults == {}
    assert load(NAME).family == "dit"


def test_a_hub_that_cannot_be_reached(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(EnvironmentFault, match="owner/tiny"):
        load(NAME)


def test_only_names_are_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is here wins; addresses, paths and files are none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert [hub.names(n) for n in ("owner/name", "owner/name@main", "sdxl", "sdxl@v1")] == [True] * 4
    wrong = ("a/b", "nowhere", "https://example.org/m", "/a/x", "./a/x", "a/b/c", "../x/y", "a/x.safetensors", "a/..", "")
    assert [n for n in wrong if hub.names(n)] == []
