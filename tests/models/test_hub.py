"""Pushing exports, to a stand-in that speaks as much of the hub's language as an upload needs."""

import base64
import hashlib
import json
import pickle
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from toys.unet import tiny_field, tiny_student

import fewstep
from fewstep.cli import main
from fewstep.flows.fields import NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.models import hub
from fewstep.networks import MLP

TOKEN = "hf_" + "x" * 34


class Hub(ThreadingHTTPServer):
    """Repositories by name: whether they are private, and their files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[dict[str, Any]] = []


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/")
        if name not in self.server.private:
            return self.answer({"error": "Repository not found"}, 404)
        return self.answer(
            {"id": name, "modelId": name, "private": self.server.private[name], "siblings": [], "tags": []}
        )

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        content, hub = self.body(), self.server
        if self.path.startswith("/api/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if not name.startswith("me/"):
                return self.answer({"error": "You don't have the rights"}, 403)
            is_there = name in hub.files
            hub.files.setdefault(name, {})
            hub.private.setdefault(name, asked.get("private") or asked.get("visibility") == "private")
            return self.answer({"url": f"{hub.url}/{name}"}, 409 if is_there else 200)
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            mode = lambda path: "lfs" if path.endswith((".safetensors", ".onnx", ".pt2")) else "regular"  # noqa: E731
            files = [{"path": f["path"], "uploadMode": mode(f["path"])} for f in json.loads(content)["files"]]
            return self.answer({"files": [{**f, "shouldIgnore": False, "oid": None} for f in files]})
        if self.path.endswith("/info/lfs/objects/batch"):
            found = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}}
                for one in json.loads(content)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": found})
        name = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                hub.commits.append(value)
            elif line["key"] == "file":
                hub.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[name][value["path"]] = hub.objects[value["oid"]]
        return self.answer({"commitUrl": f"{hub.url}/{name}/commit/0", "commitOid": "0" * 40, "success": True})


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # or by the hub's other protocol
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return fewstep.export(tiny_student("flow"), tmp_path / "fast")


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_an_export_arrives_to_the_byte(there: Hub, export: Path) -> None:
    url = fewstep.push(export, "me/fast", private=True, message="first")
    assert url == f"{there.url}/me/fast"
    assert there.files["me/fast"] == contents(export)
    assert there.private["me/fast"] is True
    assert there.commits[0]["summary"] == "first"
    weights = (export / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert there.objects == {hashlib.sha256(weights).hexdigest(): weights}, "weights go as large files"


def test_what_arrived_loads_as_what_was_pushed(there: Hub, export: Path, tmp_path: Path) -> None:
    hub.push(export, "me/fast")
    for path, content in there.files["me/fast"].items():
        (tmp_path / "back" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / path).write_bytes(content)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(
        fewstep.sample(fewstep.load(tmp_path / "back"), x, 2), fewstep.sample(fewstep.load(export), x, 2)
    )


def test_a_second_push_replaces_files(there: Hub, export: Path) -> None:
    hub.push(export, "me/fast")
    (export / "README.md").write_text("new")
    hub.push(export, "me/fast")
    assert there.files["me/fast"]["README.md"] == b"new"
    assert there.commits[-1]["summary"] == "Upload fast with fewstep"


def test_what_tools_left_behind_stays_behind(there: Hub, export: Path) -> None:
    wanted = contents(export)
    for name in (".DS_Store", "unet/.DS_Store", "__pycache__/pipeline.cpython-311.pyc", ".git/config", ".cache/x/y"):
        (export / name).parent.mkdir(parents=True, exist_ok=True)
        (export / name).write_bytes(b"left")
    hub.push(export, "me/fast")
    assert there.files["me/fast"] == wanted


def test_the_command_says_where_it_is_and_how_to_load_it(
    there: Hub, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(export), "me/fast", "--private"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{there.url}/me/fast\n"
    line = 'diffusers.DiffusionPipeline.from_pretrained("me/fast", trust_remote_code=True)'
    assert f"next:\n  {line}\n" in said.err


def test_each_kind_of_export_is_known(tmp_path: Path, export: Path) -> None:
    made = {"pipeline": export, "model": fewstep.export(tiny_field("flow"), tmp_path / "field")}
    made["plain"] = fewstep.export(FlowMap.from_field(NetworkField(MLP(2, width=8))), tmp_path / "plain")
    for kind, mark in (("adapter", "adapter_config.json"), ("program", "config.json")):
        made[kind] = tmp_path / kind
        made[kind].mkdir()
        (made[kind] / mark).write_text(json.dumps({"_class_name": "FlowMapProgram"} if kind == "program" else {}))
    assert {kind: hub.kind_of(folder) for kind, folder in made.items()} == {kind: kind for kind in made}
    assert hub.how_to_load("me/x", "plain") == 'fewstep.load("me/x")'
    assert hub.how_to_load("me/x", "program") == "hf download me/x --local-dir x"


def test_runs_and_other_folders_are_refused(there: Hub, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: run\n")
    with pytest.raises(ValueError, match=re.escape(f"fewstep export {run} FOLDER first")):
        hub.push(run, "me/run")
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match="is no export"):
        hub.push(tmp_path / "photos", "me/photos")
    with pytest.raises(FileNotFoundError, match="no folder"):
        hub.push(tmp_path / "nothing", "me/nothing")
    assert there.files == {}


SECRETS = {
    ".env": b"A=1", "unet/.netrc": b"", "deploy.pem": b"", "hf_token": b"x", "id_ed25519": b"", ".ssh/config": b"",
    "Secrets/openai": b"x", "notes.md": b"use " + TOKEN.encode() + b" for it",
    "GITHUB.md": b"github_pat_" + b"1aB_" * 20, "key.txt": b"-----BEGIN OPENSSH PRIVATE KEY-----\n",
}  # fmt: skip


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", SECRETS)
def test_what_may_be_a_secret_is_not_uploaded(there: Hub, export: Path, name: str) -> None:
    (export / name).parent.mkdir(exist_ok=True)
    (export / name).write_bytes(SECRETS[name])
    with pytest.raises(ValueError, match=f"{re.escape(name)} in .* (secrets|token or a key)"):
        hub.push(export, "me/fast")
    assert there.files == {}


def test_tokenizers_are_no_secrets(there: Hub, export: Path) -> None:
    names = ("tokenizer/tokenizer.json", "tokenizer/special_tokens_map.json", "tokenizer/tokenizer_config.json")
    for name in names:
        (export / name).parent.mkdir(exist_ok=True)
        (export / name).write_text("{}")
    hub.push(export, "me/fast")
    assert set(names) < set(there.files["me/fast"])


@pytest.mark.parametrize("name", ["unet/weights.bin", "state.dat", "zip.dat", "model.ckpt"])
def test_pickles_are_not_uploaded_whatever_they_are_called(there: Hub, export: Path, name: str) -> None:
    if name == "zip.dat":
        torch.save({"a": torch.zeros(1)}, export / name)
    else:
        (export / name).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match=f"{re.escape(name)} in .* is a pickle"):
        hub.push(export, "me/fast")
    assert there.files == {}


@pytest.mark.parametrize(
    ("target", "where"),
    [("../other/a.txt", "out of"), ("../other", "out of"), ("../nothing", "to nothing"), ("unet", "to a folder")],
)
def test_links_lead_to_files_of_the_folder_or_are_refused(
    there: Hub, export: Path, tmp_path: Path, target: str, where: str
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("private")
    (export / "inside.md").symlink_to("README.md")
    hub.push(export, "me/fast")
    assert there.files["me/fast"]["inside.md"] == (export / "README.md").read_bytes()
    (export / "notes").symlink_to(target)
    with pytest.raises(ValueError, match=f"notes is a link {where}"):
        hub.push(export, "me/fast")


def test_a_public_repository_does_not_take_what_is_to_be_private(there: Hub, export: Path) -> None:
    there.files["me/fast"], there.private["me/fast"] = {}, False
    with pytest.raises(ValueError, match="is there already and is public"):
        hub.push(export, "me/fast", private=True)
    assert there.files["me/fast"] == {}


def test_the_hub_says_no_in_one_line(
    there: Hub, export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str) -> str:
        assert main(["push", str(export), name]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    assert "owner/name is needed, such as me/fast" in refused("fast")
    assert "may not write to you/fast" in refused("you/fast")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "hf auth login, or set HF_TOKEN" in refused("me/fast")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached, and nothing is uploaded" in refused("me/fast")
