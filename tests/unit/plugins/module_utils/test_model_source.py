# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from ansible_collections.homelab.inference.plugins.module_utils import model_source
from ansible_collections.homelab.inference.tests.unit.plugins.module_utils import gguf_files as files

COMMIT = "f94c25afed0072339c5fa3b705a7b4222afe5f62"
OLDER = "0" * 40
TOKEN = "hf_of_the_owner"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class SyntheticHub:
    """A test double of the Hugging Face Hub, as far as answers are concerned that its client library expects.

    It has two addresses, as the real one has: the hub itself, and the store to which it redirects for large files.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict] = {}
        self.moved: dict[str, str] = {}
        self.ranges = True
        self.log: list[tuple[str, str, str | None]] = []  # which address, path, Authorization
        self.sent = 0
        self.hub = self._serve("hub")
        self.store = self._serve("store")

    def add(self, repo: str, contents: dict[str, bytes], **more) -> None:
        self.repos[repo] = {"files": contents, "revisions": {"main": COMMIT, COMMIT: COMMIT, "v1/x": OLDER}, **more}

    def close(self) -> None:
        for server in (self.hub, self.store):
            server.shutdown()
            server.server_close()

    def url(self, server: ThreadingHTTPServer) -> str:
        return f"http://127.0.0.1:{server.server_address[1]}"

    def _serve(self, name: str) -> ThreadingHTTPServer:
        double = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                double.log.append((name, self.path, self.headers.get("Authorization")))
                double.answer_hub(self) if name == "hub" else double.answer_store(self)

            def log_message(self, *_arguments) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    def error(self, request, status: int, code: str | None = None) -> None:
        request.send_response(status)
        if code:
            request.send_header("X-Error-Code", code)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def redirect(self, request, status: int, location: str, **headers: str) -> None:
        request.send_response(status)
        request.send_header("Location", location)
        for key, value in headers.items():
            request.send_header(key.replace("_", "-"), value)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def answer_hub(self, request) -> None:
        path = unquote(urlsplit(request.path).path)
        asks = re.match(r"^/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>.+)$", path)
        match = asks or re.match(r"^/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)$", path)
        if not match:
            return self.error(request, 404)
        name = match["repo"]
        if name in self.moved:
            return self.redirect(request, 307, request.path.replace(name, self.moved[name]))
        repo = self.repos.get(name)
        token = request.headers.get("Authorization")
        if repo is None or (repo.get("private") and token != f"Bearer {TOKEN}"):
            # Anonymous visitors learn nothing of what is private.
            return self.error(request, 404 if token else 401, "RepoNotFound")
        if "status" in repo:
            return self.error(request, repo["status"])
        if match["revision"] not in repo["revisions"]:
            return self.error(request, 404, "RevisionNotFound")
        if asks:
            blobs = urlsplit(request.path).query == "blobs=true"
            return self.listing(request, name, repo, repo["revisions"][match["revision"]], blobs)
        if repo.get("gated") and token != f"Bearer {TOKEN}":
            return self.error(request, 401 if token is None else 403, "GatedRepo")
        digest = sha256(repo["files"][match["file"]])
        location = f"{self.url(self.store)}/{name}/{match['file']}?signature=x"
        return self.redirect(request, 302, location, X_Linked_Etag=f'"{digest}"', X_Repo_Commit=match["revision"])

    def listing(self, request, name: str, repo: dict, commit: str, blobs: bool) -> None:
        siblings = []
        for file, data in repo["files"].items():
            item = {"rfilename": file}
            if blobs:
                item.update(size=len(data), blobId="0" * 40)
                if file.endswith(".gguf"):
                    item["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
            siblings.append(item)
        body = json.dumps({"id": name, "sha": commit, "gated": bool(repo.get("gated")), "siblings": siblings}).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json; charset=utf-8")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def answer_store(self, request) -> None:
        owner, repo, file = unquote(urlsplit(request.path).path).lstrip("/").split("/", 2)
        if file not in self.repos[f"{owner}/{repo}"]["files"]:
            return self.error(request, 404)
        data = self.repos[f"{owner}/{repo}"]["files"][file]
        asked = re.match(r"bytes=(\d+)-(\d+)$", request.headers.get("Range", "")) if self.ranges else None
        part = data[int(asked[1]) : int(asked[2]) + 1] if asked else data
        request.send_response(206 if asked else 200)
        if asked:
            request.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(data)}")
        request.send_header("Content-Length", str(len(part)))
        request.send_header("ETag", '"of-the-store"')
        request.end_headers()
        try:
            request.wfile.write(part)
        except (BrokenPipeError, ConnectionResetError):
            return None
        self.sent += len(part)
        return None


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    double = SyntheticHub()
    yield double
    double.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Contents of one whole model, of the shards of another, and of a projector."""
    folder = tmp_path_factory.mktemp("models")
    whole = files.write_llama(folder / "whole.gguf", tokens=40_000).read_bytes()
    files.write_llama(folder / "split.gguf", layers=4, shards=3)
    shards = {path.name: path.read_bytes() for path in sorted(folder.glob("split-*"))}
    return whole, shards, files.write_projector(folder / "mmproj.gguf").read_bytes()


def resolve(hub: SyntheticHub, source: dict, token: str | None = None):
    web = model_source.Web(hub.url(hub.hub), token, 5)
    found, problems = model_source.resolve_all([{"model": "chat", "source": source}], web)
    json.dumps([found, problems])
    return (found, [problem["error"] for problem in problems])


def test_repository_to_files(hub, models):
    whole, _shards, projector = models
    hub.add(
        "org/repo-GGUF",
        {
            "README.md": b"hello",
            "Model-Q8_0.gguf": whole,
            "Model-Q4_K_M.gguf": whole,
            "mmproj-Model-BF16.gguf": projector,
            "mmproj-Model-f16.gguf": projector,
        },
    )
    found, problems = resolve(hub, {"hf": "org/repo-GGUF", "quant": ["Q6_K", "q4_k_m", "Q8_0"], "mmproj": "auto"})
    assert problems == []
    shape, mmproj_shape = found[0].pop("shape"), found[0]["mmproj"].pop("shape")
    base = f"{hub.url(hub.hub)}/org/repo-GGUF/resolve/{COMMIT}/"
    assert found == [
        {
            "model": "chat",
            "library": None,
            "repo": "org/repo-GGUF",
            "commit": COMMIT,
            "quant": "Q4_K_M",
            "files": [
                {
                    "name": "Model-Q4_K_M.gguf",
                    "url": base + "Model-Q4_K_M.gguf",
                    "size": len(whole),
                    "sha256": sha256(whole),
                }
            ],
            "mmproj": {
                "name": "mmproj-Model-f16.gguf",
                "url": base + "mmproj-Model-f16.gguf",
                "size": len(projector),
                "sha256": sha256(projector),
            },
        }
    ]
    assert (shape["vocab_size"], shape["block_count"]) == (40_000, 2)
    assert mmproj_shape["architecture"] == "clip"
    # The header has 0.6 MiB, each file 3 MiB.
    assert hub.sent < len(whole) / 2


def test_shards_are_summed_and_flattened(hub, models):
    _whole, shards, _projector = models
    contents = {f"Q4_K_M/{name.replace('split', 'Model-Q4_K_M')}": data for name, data in shards.items()}
    hub.add("org/repo", contents)
    (found,), problems = resolve(hub, {"hf": "org/repo"})
    assert problems == []
    names = [f"Model-Q4_K_M-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert [file["name"] for file in found["files"]] == names
    assert [file["url"].rpartition(COMMIT)[2] for file in found["files"]] == [f"/Q4_K_M/{name}" for name in names]
    assert found["shape"]["weights_bytes"] < sum(file["size"] for file in found["files"])
    assert found["shape"]["block_count"] == len(found["shape"]["block_bytes"]) == 4


def test_token_goes_to_the_hub_and_never_to_the_store(hub, models):
    hub.add("org/repo", {"a-Q4_K_M.gguf": models[0]}, private=True)
    found, problems = resolve(hub, {"hf": "org/repo"}, TOKEN)
    assert (len(found), problems) == (1, [])
    assert {authorization for name, _path, authorization in hub.log if name == "hub"} == {f"Bearer {TOKEN}"}
    assert {authorization for name, _path, authorization in hub.log if name == "store"} == {None}


def test_netrc_does_not_replace_the_token(hub, models, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    hub.add("org/repo", {"a-Q4_K_M.gguf": models[0]}, private=True)
    assert resolve(hub, {"hf": "org/repo"}, TOKEN)[1] == []
    assert {authorization for name, _path, authorization in hub.log if name == "hub"} == {f"Bearer {TOKEN}"}


def test_revision_and_renamed_repository(hub, models):
    hub.add("org/new", {"a-Q4_K_M.gguf": models[0]})
    hub.repos["org/new"]["revisions"][OLDER] = OLDER
    hub.moved["org/old"] = "org/new"
    (found,), problems = resolve(hub, {"hf": "org/old", "revision": "v1/x"}, TOKEN)
    assert problems == []
    assert found["commit"] == OLDER
    assert any(path.endswith("/revision/v1%2Fx?blobs=true") for _name, path, _authorization in hub.log)


@pytest.mark.parametrize(
    ("repo", "source", "token", "sentence"),
    [
        (
            None,
            {},
            None,
            "the repository org/repo does not exist on HUB, or needs a token (401). Check its name, or set",
        ),
        (None, {}, TOKEN, "the repository org/repo does not exist on HUB (404). Check its name."),
        ({"private": True}, {}, "wrong", "the repository org/repo does not exist on HUB (404). Check its name."),
        ({"gated": True}, {}, None, "the repository org/repo is gated (401). Accept its terms, and set hf_token"),
        ({"gated": True}, {}, "wrong", "the repository org/repo is gated (403). Accept its terms, and set hf_token"),
        ({"status": 401}, {}, TOKEN, "the repository org/repo may not be read with this token (401). Check its name"),
        ({"status": 429}, {}, None, "HUB asks to wait (429). Run again later, or set hf_token"),
        ({"status": 503}, {}, None, "HUB answers 503 for the repository org/repo. Run again later."),
        ({}, {"revision": "v9"}, None, "the repository org/repo has no revision v9. Name a branch, a tag or a commit"),
        ({}, {"quant": ["Q6_K", "IQ4_XS"]}, None, "has no Q6_K or IQ4_XS. It has Q4_K_M, Q8_0."),
        ({}, {"file": "b.gguf"}, None, "has no file b.gguf. It has a-Q4_K_M.gguf, a-Q8_0.gguf."),
        ({}, {"mmproj": "auto"}, None, "has no mmproj file. Take mmproj out"),
        ({}, {"mmproj": "mmproj-x.gguf"}, None, "has no mmproj file mmproj-x.gguf. Take mmproj out"),
        ({}, {"sha256": "0" * 64}, None, "its sha256 goes with a url or a file"),
        (
            {},
            {"hf": "https://hub/org/repo"},
            None,
            "'https://hub/org/repo' is not the name of a repository. Write it as",
        ),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub, models, repo, source, token, sentence):
    if repo is not None:
        hub.add("org/repo", {"a-Q4_K_M.gguf": models[0], "a-Q8_0.gguf": models[0]}, **repo)
    found, (error,) = resolve(hub, {"hf": "org/repo", **source}, token)
    assert found == []
    assert error.startswith("Cannot resolve the model chat: ") and error.endswith(".") and "\n" not in error
    assert sentence.replace("HUB", hub.url(hub.hub)) in error


def test_all_problems_come_at_once_and_the_rest_is_resolved(hub, models):
    hub.add("org/repo", {"a-Q4_K_M.gguf": models[0], "broken-Q8_0.gguf": b"<html>" * 99})
    sources = [
        {"model": "one", "source": {"hf": "org/none"}},
        {"model": "two", "source": {"hf": "org/repo"}},
        {"model": "three", "source": {"hf": "org/repo", "quant": ["Q8_0"]}},
        {"model": "four", "source": {"library": "four.gguf"}},
        {"model": "five", "source": {}},
    ]
    found, problems = model_source.resolve_all(sources, model_source.Web(hub.url(hub.hub), None, 5))
    assert [item["model"] for item in found] == ["two", "four"]
    assert [problem["model"] for problem in problems] == ["one", "three", "five"]
    assert "it is not a GGUF file" in problems[1]["error"]
    assert found[1] == {
        "model": "four",
        "library": "four.gguf",
        "repo": None,
        "commit": None,
        "quant": None,
        "files": [],
        "mmproj": None,
        "shape": None,
    }


def test_host_that_does_not_answer_is_asked_once():
    with socket.socket() as listener:
        # It takes the connection and never says a word.
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        web = model_source.Web(f"http://127.0.0.1:{listener.getsockname()[1]}", None, 0.3)
        sources = [{"model": name, "source": {"hf": "org/repo"}} for name in ("a", "b", "c")]
        _found, problems = model_source.resolve_all(sources, web)
        assert len(problems) == 3
        assert all("cannot be reached, timed out. Check the network" in problem["error"] for problem in problems)
        listener.setblocking(False)
        listener.accept()[0].close()
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_host_that_is_no_hub(hub, models):
    hub.add("org/repo", {"a-Q4_K_M.gguf": models[0]}, revisions={"main": "no commit"})
    _found, (error,) = resolve(hub, {"hf": "org/repo"})
    assert "does not answer as a model hub for the repository org/repo. Check hf_endpoint" in error


@pytest.mark.parametrize("ranges", [True, False])
def test_url(hub, models, ranges):
    whole = models[0]
    hub.ranges = ranges
    hub.add("org/repo", {"a b.gguf": whole})
    url = f"{hub.url(hub.store)}/org/repo/a%20b.gguf?download=1"
    (found,), problems = resolve(hub, {"url": url, "sha256": sha256(whole).upper()}, TOKEN)
    assert problems == []
    file = {"name": "a b.gguf", "url": url, "size": len(whole), "sha256": sha256(whole), "etag": '"of-the-store"'}
    assert found["files"] == [file]
    assert (found["repo"], found["quant"], found["shape"]["vocab_size"]) == (None, "Q8_0", 40_000)
    assert {authorization for _name, _path, authorization in hub.log} == {None}


def test_url_of_a_hub_tells_the_digest(hub, models):
    whole = models[0]
    hub.add("org/repo", {"a.gguf": whole})
    url = f"{hub.url(hub.hub)}/org/repo/resolve/main/a.gguf"
    (found,), _problems = resolve(hub, {"url": url})
    assert found["files"][0]["sha256"] == sha256(whole)
    _found, (error,) = resolve(hub, {"url": url, "sha256": "0" * 64})
    assert f"its sha256 is not that of {url}, which is {sha256(whole)}. " in error


def test_url_of_a_shard_means_the_whole_set(hub, models):
    hub.add("org/repo", models[1])
    first, *_others = models[1]
    (found,), problems = resolve(hub, {"url": f"{hub.url(hub.store)}/org/repo/{first}"})
    assert problems == []
    assert [file["name"] for file in found["files"]] == list(models[1])
    assert found["shape"]["block_count"] == 4


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("STORE/org/repo/none.gguf", "STORE/org/repo/none.gguf does not exist on STORE (404). Check its name."),
        ("ftp://127.0.0.1/a.gguf", "leads to ftp://127.0.0.1/a.gguf. Name an http or https address."),
        ("file:///etc/passwd", "leads to file:///etc/passwd. Name an http or https address."),
        ("STORE/org/repo/text.gguf", "it is not a GGUF file"),
    ],
)
def test_url_that_is_no_model_is_one_sentence(hub, url, sentence):
    hub.add("org/repo", {"text.gguf": b"text" * 99})
    _found, (error,) = resolve(hub, {"url": url.replace("STORE", hub.url(hub.store))})
    assert sentence.replace("STORE", hub.url(hub.store)) in error


def test_no_header_costs_more_than_16_mib(hub):
    # 20 MiB of vocabulary, which a reader has to look through.
    tokens = files.string(bytes(1000)) * 20_000
    hub.add("org/repo", {"a.gguf": files.header([files.array(b"a", 8, 20_000, tokens)], [])})
    _found, (error,) = resolve(hub, {"url": f"{hub.url(hub.store)}/org/repo/a.gguf"})
    assert "needs more than 16 MiB. Fetch the file and name its path" in error
    assert 15 << 20 < hub.sent <= 16 << 20


def test_file_of_the_controller(hub, models, tmp_path):
    path = tmp_path / "mine.gguf"
    path.write_bytes(models[0])
    (found,), problems = resolve(hub, {"file": str(path)})
    assert problems == []
    assert found["files"] == [
        {"name": "mine.gguf", "controller_path": str(path), "size": len(models[0]), "sha256": sha256(models[0])}
    ]
    (found,), _problems = resolve(hub, {"file": str(path), "sha256": "A" * 64})
    assert found["files"][0]["sha256"] == "a" * 64
    _found, (error,) = resolve(hub, {"file": f"{tmp_path}/none.gguf"})
    assert f"{tmp_path}/none.gguf cannot be used, No such file or directory. " in error


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("Qwen3-0.6B-Q8_0.gguf", "Q8_0"),
        ("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "Q4_K_M"),
        ("llama-2-7b-chat.Q5_K_S.gguf", "Q5_K_S"),
        ("UD-Q4_K_XL/Qwen3-235B-A22B-UD-Q4_K_XL-00001-of-00003.gguf", "UD-Q4_K_XL"),
        ("BF16/gemma-3-27b-it-BF16-00001-of-00002.gguf", "BF16"),
        ("Llama-3.3-70B-Instruct-IQ3_M.gguf", "IQ3_M"),
        ("Llama-3.2-1B-Instruct-Q4_0_4_8.gguf", "Q4_0_4_8"),
        ("gpt-oss-120b-mxfp4-00001-of-00003.gguf", "MXFP4"),
        ("nomic-embed-text-v1.5.f16.gguf", "F16"),
        ("phi-2-fp16.gguf", "F16"),
        ("bitnet-TQ2_0.gguf", "TQ2_0"),
        ("Phi-3-mini-4k-instruct-q4.gguf", "Q4"),
        ("gemma-3-27b-it.gguf", None),
        ("Mixtral-8x7B.gguf", None),
    ],
)
def test_quant_of_a_name(name, quant):
    assert model_source.quant_of(name) == quant


GIB = 1 << 30


@pytest.mark.parametrize(
    ("sizes", "source", "names"),
    [
        # absent: Q4_K_M
        ({"a-Q3_K_M.gguf": 3, "a-Q4_0.gguf": 4, "a-Q4_K_M.gguf": 5}, {}, ["a-Q4_K_M.gguf"]),
        ({"a-Q4_0.gguf": 4, "a-UD-Q4_K_M.gguf": 5}, {}, ["a-UD-Q4_K_M.gguf"]),
        # absent, and no Q4_K_M: the smallest of at least 4 bits
        ({"a-Q3_K_M.gguf": 3, "a-IQ4_XS.gguf": 4, "a-Q4_0.gguf": 5, "a-F16.gguf": 16}, {}, ["a-IQ4_XS.gguf"]),
        ({"a-Q2_K.gguf": 2, "a-Q8_0.gguf": 8, "a-F16.gguf": 16}, {}, ["a-Q8_0.gguf"]),
        # absent, and the names say nothing
        ({"README.md": 1, "model.gguf": 4, "mmproj-F16.gguf": 1, "imatrix.gguf": 1}, {}, ["model.gguf"]),
        # in order of preference
        ({"a-Q4_K_M.gguf": 4, "a-Q5_K_M.gguf": 5}, {"quant": ["Q6_K", "Q5_K_M", "Q4_K_M"]}, ["a-Q5_K_M.gguf"]),
        ({"a-Q4_K_M.gguf": 4, "a-UD-Q4_K_M.gguf": 5}, {"quant": ["Q4_K_M"]}, ["a-Q4_K_M.gguf"]),
        ({"a-F16.gguf": 4}, {"quant": ["fp16"]}, ["a-F16.gguf"]),
        # drafts, projectors and importance matrices are no models
        ({"a-Q8_0.gguf": 8, "mtp-a-Q8_0.gguf": 1, "a-mmproj-Q8_0.gguf": 1}, {"quant": ["Q8_0"]}, ["a-Q8_0.gguf"]),
        # by name, and by the name of any shard
        ({"x/a.gguf": 4, "b.gguf": 4}, {"file": "a.gguf"}, ["x/a.gguf"]),
        (
            {"a-00001-of-00002.gguf": 4, "a-00002-of-00002.gguf": 4},
            {"file": "a-00002-of-00002.gguf"},
            ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"],
        ),
    ],
)
def test_choice_of_files(sizes, source, names):
    sizes = {name: size * GIB for name, size in sizes.items()}
    assert model_source.choose_files(sizes, "org/repo", source)[0] == names


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], "has Q4_K_M more than once. Name one with file: a-Q4_K_M.gguf, b-Q4_K_M"),
        (["a-Q2_K.gguf", "a-Q3_K_M.gguf"], "has nothing of 4 bits. Name one of Q2_K, Q3_K_M with quant"),
        (["a.safetensors"], "has no GGUF model. Name a repository that has one"),
        (["a-Q4_K_M-00001-of-00002.gguf"], "lacks a-Q4_K_M-00002-of-00002.gguf of its 2 shards. Take another quant"),
    ],
)
def test_choice_that_cannot_be_made(names, sentence):
    with pytest.raises(model_source.SourceError, match=re.escape(f"the repository org/repo {sentence}")):
        model_source.choose_files(dict.fromkeys(names, GIB), "org/repo", {})
