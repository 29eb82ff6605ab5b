# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What it costs to learn the shape of a model that lies on the internet: bytes that a real server has sent."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
from ansible_collections.homelab.inference.plugins.module_utils import model_source
from ansible_collections.homelab.inference.tests.unit.plugins.module_utils import gguf_files as files
from ansible_collections.homelab.inference.tests.unit.plugins.module_utils import test_model_source as hubs

from tests.models import synthetic

MOST = 16 << 20


class Contents:
    """A sparse file in the place of its bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return self.path.stat().st_size

    def __getitem__(self, part: slice) -> bytes:
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return data[part]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(hubs, "sha256", lambda _data: "0" * 64)
    double = hubs.SyntheticHub()
    yield double
    double.close()


def resolve(hub: hubs.SyntheticHub, *sources: dict) -> list[dict]:
    web = model_source.Web(hub.url(hub.hub), None, 30)
    found, problems = model_source.resolve_all([{"model": "chat", "source": source} for source in sources], web)
    assert not problems
    return found


def test_a_split_model_of_80_gb(hub: hubs.SyntheticHub, tmp_path: Path) -> None:
    synthetic.model("qwen3.5-122b-a10b", "Q4_1", tmp_path, split=16 << 30)
    paths = sorted(tmp_path.iterdir())
    hub.add("org/repo", {path.name: Contents(path) for path in paths})
    (found,) = resolve(hub, {"hf": "org/repo", "quant": ["Q4_1"]})
    assert found["shape"] == synthetic.shape("qwen3.5-122b-a10b", "Q4_1")
    assert len(found["files"]) == len(paths) == 5
    assert sum(file["size"] for file in found["files"]) > 76e9
    assert hub.sent <= MOST


def test_three_quantisations_of_a_model(hub: hubs.SyntheticHub, tmp_path: Path) -> None:
    quants = ["Q8_0", "Q6_K", "Q4_K_M"]
    paths = [synthetic.model("qwen3-coder-30b-a3b", quant, tmp_path) for quant in quants]
    hub.add("org/repo", {path.name: Contents(path) for path in paths})
    found = resolve(hub, *({"hf": "org/repo", "quant": [quant]} for quant in quants))
    assert [entry["shape"] for entry in found] == [synthetic.shape("qwen3-coder-30b-a3b", quant) for quant in quants]
    assert hub.sent <= MOST, hub.sent


def test_files_of_one_repository_with_unlike_vocabularies(hub: hubs.SyntheticHub) -> None:
    def model(token: bytes, scale: int) -> bytes:
        tokens = files.array(b"tokenizer.ggml.tokens", 8, 1000, files.string(token) * 1000)
        kinds = files.array(b"tokenizer.ggml.token_type", 5, 1000, bytes(4000))
        name = files.pair(b"general.architecture", 8, files.string(b"llama"))
        return files.header([tokens, kinds, name], [files.tensor(b"token_embd.weight", [64 * scale, 1000])]) + bytes(
            64 * scale * 4032
        )

    # The second has longer tokens, the third shorter ones: what is passed over would end inside of one, or beyond all.
    contents = {"x-Q8_0.gguf": model(b"abcd", 1), "x-Q6_K.gguf": model(b"abcdefgh", 2), "x-Q4_K_M.gguf": model(b"", 3)}
    hub.add("org/repo", contents)
    found = resolve(hub, *({"hf": "org/repo", "quant": [quant]} for quant in ("Q8_0", "Q6_K", "Q4_K_M")))
    assert [entry["shape"]["embedding_bytes"] for entry in found] == [256_000, 512_000, 768_000]
    assert [entry["shape"]["vocab_size"] for entry in found] == [1000] * 3
