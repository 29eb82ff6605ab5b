# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from ansible_collections.homelab.inference.plugins.module_utils.model_library import Index
from ansible_collections.homelab.inference.tests.unit.plugins.module_utils import gguf_files as files

COMMIT = "f94c25afed0072339c5fa3b705a7b4222afe5f62"


def index(*libraries: Path, paths: tuple[Path, ...] = (), digest: bool = False) -> Index:
    result = Index(digest)
    for library in libraries:
        result.add_library(str(library))
    result.add_files([str(path) for path in paths])
    json.dumps([result.files, result.problems])
    return result


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_plain_file(tmp_path):
    path = files.write_llama(tmp_path / "sub.gguf")
    os.utime(path, (1, 1700000000.9))
    (entry,) = index(tmp_path).files
    shape = entry.pop("shape")
    assert shape["name"] == "tiny"
    assert entry == {
        "library": str(tmp_path),
        "path": "sub.gguf",
        "name": "sub.gguf",
        "size": path.stat().st_size,
        "mtime": 1700000000,
        "shards": [],
        "mmproj": False,
        "repo": None,
        "commit": None,
        "sha256": None,
    }
    (entry,) = index(tmp_path, digest=True).files
    assert entry["sha256"] == sha256(path)


def test_split_set_is_one_entry(tmp_path):
    files.write_llama(tmp_path / "big.gguf", layers=4, shards=3)
    (entry,) = index(tmp_path, digest=True).files
    names = [f"big-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert (entry["name"], entry["path"], entry["sha256"]) == (names[0], names[0], None)
    assert [(shard["name"], shard["sha256"]) for shard in entry["shards"]] == [
        (name, sha256(tmp_path / name)) for name in names
    ]
    assert entry["size"] == sum((tmp_path / name).stat().st_size for name in names)
    assert entry["shape"]["block_count"] == len(entry["shape"]["block_bytes"]) == 4


def test_split_set_is_found_by_any_of_its_shards(tmp_path):
    files.write_llama(tmp_path / "big.gguf", layers=4, shards=3)
    third = tmp_path / "big-00003-of-00003.gguf"
    (entry,) = index(paths=(third, third)).files
    assert entry["library"] is None
    assert entry["path"] == str(tmp_path / "big-00001-of-00003.gguf")


def test_incomplete_set_is_one_problem_that_names_what_is_missing(tmp_path):
    files.write_llama(tmp_path / "big.gguf", layers=4, shards=3)
    (tmp_path / "big-00001-of-00003.gguf").unlink()
    found = index(tmp_path)
    assert found.files == []
    second = str(tmp_path / "big-00002-of-00003.gguf")
    assert found.problems == [
        {
            "path": second,
            "error": f"Cannot use {second}: of its 3 shards 1 are missing, first big-00001-of-00003.gguf. "
            "Fetch the whole set.",
        }
    ]


def test_cache_of_hugging_face(tmp_path):
    repo = tmp_path / "hub" / "models--ggml-org--gemma--3-GGUF"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    large = files.write_llama(repo / "blobs" / "large")
    large = large.rename(repo / "blobs" / sha256(large))
    small = files.write_projector(repo / "blobs" / ("0" * 40))
    (snapshot / "gemma-Q4_K_M.gguf").symlink_to(f"../../blobs/{large.name}")
    (snapshot / "mmproj-F16.gguf").symlink_to(f"../../blobs/{small.name}")
    # A file that the hub did not have leaves an empty one of its name here.
    (repo / ".no_exist" / COMMIT).mkdir(parents=True)
    (repo / ".no_exist" / COMMIT / "other.gguf").touch()
    found = index(tmp_path)
    assert found.problems == []
    assert [(entry["name"], entry["mmproj"], entry["sha256"]) for entry in found.files] == [
        ("gemma-Q4_K_M.gguf", False, large.name),
        ("mmproj-F16.gguf", True, None),
    ]
    assert {(entry["repo"], entry["commit"]) for entry in found.files} == {("ggml-org/gemma--3-GGUF", COMMIT)}
    assert index(tmp_path, digest=True).files[1]["sha256"] == sha256(small)


@pytest.mark.parametrize(
    ("library", "repo"),
    [(".lmstudio/models", "qwen/Qwen3-GGUF"), (".cache/lm-studio/models", "qwen/Qwen3-GGUF"), ("models", None)],
)
def test_directories_of_lm_studio(tmp_path, library, repo):
    folder = tmp_path / library / "qwen" / "Qwen3-GGUF"
    folder.mkdir(parents=True)
    files.write_llama(folder / "Qwen3-Q8_0.gguf")
    (entry,) = index(tmp_path / library).files
    assert (entry["path"], entry["repo"]) == ("qwen/Qwen3-GGUF/Qwen3-Q8_0.gguf", repo)


def test_what_cannot_be_used_is_a_problem_and_the_rest_is_indexed(tmp_path):
    good = files.write_llama(tmp_path / "good.gguf")
    (tmp_path / "broken.gguf").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo.gguf")
    (tmp_path / "half.gguf").write_bytes(good.read_bytes()[:-10])
    (tmp_path / "text.gguf").write_text("<html>")
    (tmp_path / "folder.gguf").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.gguf")).write_bytes(b"")
    (tmp_path / "notes.txt").touch()
    missing = tmp_path / "missing"
    found = index(missing, tmp_path)
    assert [entry["name"] for entry in found.files] == ["good.gguf"]
    errors = {problem["path"]: problem["error"] for problem in found.problems}
    assert errors[str(missing)] == (
        f"Cannot index {missing}: No such file or directory. Check the path and who may read it."
    )
    names = {Path(path).name: error for path, error in errors.items()}
    assert set(names) == {"missing", "broken.gguf", "fifo.gguf", "half.gguf", "text.gguf", "\\udcff.gguf"}
    assert all("\n" not in error and error.endswith(".") for error in names.values())


def test_links_in_a_circle_end(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    files.write_llama(folder / "model.gguf")
    (folder / "loop").symlink_to(tmp_path)
    (tmp_path / "z").symlink_to(folder)
    found = index(tmp_path)
    assert len(found.files) == 1
    assert found.problems == []


def test_order_is_that_of_the_libraries_and_then_of_the_paths(tmp_path):
    model = files.write_llama(tmp_path / "x")
    for name in ("two/b.gguf", "two/a/z.gguf", "one/c.gguf", "one/B.gguf"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(model, tmp_path / name)
    found = index(tmp_path / "two", tmp_path / "one")
    assert [entry["path"] for entry in found.files] == ["a/z.gguf", "b.gguf", "B.gguf", "c.gguf"]


def test_hundreds_of_files_take_a_second_at_most(tmp_path):
    model = files.write_llama(tmp_path / "model-0.gguf", tokens=4096)
    for number in range(1, 300):
        os.link(model, tmp_path / f"model-{number}.gguf")
    started = time.process_time()
    assert len(index(tmp_path).files) == 300
    assert time.process_time() - started < 1
