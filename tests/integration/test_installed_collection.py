# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The collection as its users have it: built, installed, called by name beside nothing but an inventory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# What a called playbook may read; everything else of an installed collection could be missing.
KEPT = ("MANIFEST.json", "FILES.json", "meta", "plugins", "roles", "playbooks")
INVENTORY = """
all:
  children:
    control: {hosts: {nuc: {}}}
    inference: {hosts: {forge: {}, attic: {}}}
  hosts:
    nuc: {ansible_host: 192.0.2.5}
    forge:
      ansible_host: 192.0.2.20
      node_memory_mib: 16384
      node_gpus: [{id: gpu0, vendor: nvidia, name: Quadro RTX 5000, memory_mib: 16384, memory_kind: dedicated}]
    attic: {ansible_host: 192.0.2.30, node_memory_mib: 8192, node_gpus: []}
  vars:
    lab_models:
      tiny: {source: {file: tiny.gguf}, context: 512, replicas: 2, categories: [chat]}
    lab_services:
      litellm: {node: nuc}
"""


def run(directory: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of Ansible's programs in a directory, with the installed collection and nothing of the checkout."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
    command = [str(BIN / words[0]), *words[1:]]
    return subprocess.run(
        command, cwd=directory, env={**clean, **environment}, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the collection from the files that git knows, install it, and leave only what playbooks may read."""
    work = tmp_path_factory.mktemp("installed")
    source = work / "source"
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    for name in filter(None, names.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    built = run(work, "ansible-galaxy", "collection", "build", str(source), "--output-path", str(work))
    assert built.returncode == 0, built.stderr
    (archive,) = work.glob("homelab-inference-*.tar.gz")
    result = run(
        work, "ansible-galaxy", "collection", "install", "--offline", str(archive), "-p", str(work / "collections")
    )
    assert result.returncode == 0, result.stdout + result.stderr
    collection = work / "collections" / "ansible_collections" / "homelab" / "inference"
    for entry in collection.iterdir():
        if entry.name not in KEPT:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return work / "collections"


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """Return a directory with an inventory and one small model file."""
    (tmp_path / "lab.yml").write_text(INVENTORY, encoding="utf-8")
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_context_length(2048)
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_tensor("token_embd.weight", numpy.zeros((32, 64), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path


def test_validate_and_plan_by_name(installed: Path, empty: Path) -> None:
    words = ("-i", "lab.yml", "-e", "lab_offline=true")
    validated = run(
        empty, "ansible-playbook", "homelab.inference.validate", *words, ANSIBLE_COLLECTIONS_PATH=str(installed)
    )
    assert validated.returncode == 0, validated.stdout + validated.stderr
    planned = run(empty, "ansible-playbook", "homelab.inference.plan", *words, ANSIBLE_COLLECTIONS_PATH=str(installed))
    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert "tiny    forge  gpu0" in planned.stdout
    lock = yaml.safe_load((empty / ".lab.lock.yml").read_text(encoding="utf-8"))
    assert [(one["name"], one["node"], one["devices"], one["port"]) for one in lock["instances"]] == [
        ("tiny", "forge", ["gpu0"], 8080),
        ("tiny-2", "attic", [], 8080),
    ]
    assert lock["images"]["litellm_image"].startswith("ghcr.io/")
    before = (empty / ".lab.lock.yml").read_bytes()
    again = run(empty, "ansible-playbook", "homelab.inference.plan", *words, ANSIBLE_COLLECTIONS_PATH=str(installed))
    assert "changed=0" in again.stdout and (empty / ".lab.lock.yml").read_bytes() == before


def test_a_plan_is_made_again_from_the_lock_when_nothing_answers(installed: Path, empty: Path) -> None:
    words = ("-i", "lab.yml", "-e", "lab_offline=true")
    assert (
        run(
            empty, "ansible-playbook", "homelab.inference.plan", *words, ANSIBLE_COLLECTIONS_PATH=str(installed)
        ).returncode
        == 0
    )
    before = (empty / ".lab.lock.yml").read_bytes()
    (empty / "tiny.gguf").unlink()
    again = run(empty, "ansible-playbook", "homelab.inference.plan", *words, ANSIBLE_COLLECTIONS_PATH=str(installed))
    assert again.returncode == 0, again.stdout
    assert (empty / ".lab.lock.yml").read_bytes() == before


def test_a_corrupt_model_file_is_refused_by_name_and_the_rest_is_planned(installed: Path, empty: Path) -> None:
    (empty / "broken.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    inventory = INVENTORY.replace(
        "lab_services:", "  broken: {source: {file: broken.gguf}, categories: [code]}\n    lab_services:"
    )
    (empty / "lab.yml").write_text(inventory, encoding="utf-8")
    words = ("-i", "lab.yml", "-e", "lab_offline=true")
    result = run(empty, "ansible-playbook", "homelab.inference.plan", *words, ANSIBLE_COLLECTIONS_PATH=str(installed))
    assert result.returncode == 2
    assert "NOT PLANNED broken:" in result.stdout and "broken.gguf" in result.stdout
    lock = yaml.safe_load((empty / ".lab.lock.yml").read_text(encoding="utf-8"))
    assert {one["model"] for one in lock["instances"]} == {"tiny"}
    assert [refusal["model"] for refusal in lock["refused"]] == ["broken"]
