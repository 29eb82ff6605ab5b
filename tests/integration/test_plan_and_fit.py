# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""plan.yml with its page and its JSON, and fit.yml: on declared hardware, against a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))
import synthetic_hub  # noqa: E402

# Addresses of documentation, where no host is; lab_offline asks none anyway.
INVENTORY = """
all:
  children:
    control: {hosts: {nuc: {}}}
    inference: {hosts: {forge: {}, mac: {}}}
  hosts:
    nuc: {ansible_host: 192.0.2.5}
    forge:
      ansible_host: 192.0.2.20
      node_memory_mib: 65536
      node_gpus: [{id: gpu0, vendor: nvidia, name: NVIDIA GeForce RTX 3090, memory_mib: 24576, memory_kind: dedicated}]
    mac:
      ansible_host: 192.0.2.30
      node_runtime: native
      node_memory_mib: 98304
      node_gpus:
        - {id: gpu0, vendor: apple, name: Apple M3 Ultra, memory_mib: 98304, memory_kind: unified, cap_mib: 73728}
  vars:
    lab_models:
      coder:
        source: {hf: unsloth/Qwen3-Coder-30B-A3B-Instruct-GGUF, quant: [Q4_K_M]}
        nodes: forge
        context: [32768, 16384]
        slots: 1
        priority: 90
      gpt-oss-120b: {source: {hf: ggml-org/gpt-oss-120b-GGUF, quant: MXFP4}, nodes: mac, context: 32768, slots: 1}
    lab_services:
      litellm: {node: nuc}
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """Serve synthetic models."""
    server = synthetic_hub.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """Return a directory with the inventory."""
    (tmp_path / "lab.yml").write_text(INVENTORY, encoding="utf-8")
    return tmp_path


def play(lab: Path, hub: str, name: str, *words: str) -> str:
    """Run a playbook there and return what it printed; its exit status is part of that."""
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "lab.yml"]
    result = subprocess.run(
        [*command, str(ROOT / "playbooks" / f"{name}.yml"), "-e", "lab_offline=true", *words],
        cwd=lab,
        env={
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(ROOT / ".cache"),
            "HF_ENDPOINT": hub,
            "PWD": str(lab),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return f"{result.stdout}{result.stderr}\nrc={result.returncode}"


def test_a_plan_is_written_as_page_and_for_programs(lab: Path, hub: str) -> None:
    said = play(lab, hub, "plan", "-e", "lab_plan_html=plan.html", "-e", "lab_plan_json=plan.json")
    assert "rc=0" in said and "AGAINST THE PLAN IN FORCE" not in said
    document = json.loads((lab / "plan.json").read_text(encoding="utf-8"))
    assert [(one["server"], one["node"]) for one in document["servers"]] == [
        ("coder", "forge"),
        ("gpt-oss-120b", "mac"),
    ]
    for device in document["devices"]:
        parts = ("planned_mib", "reserved_mib", "others_mib", "left_mib")
        assert sum(device[part] for part in parts) == device["size_mib"]
        assert device["over_mib"] == 0
    page = (lab / "plan.html").read_text(encoding="utf-8")
    root = ElementTree.fromstring(page.split("\n", 1)[1])
    pictures = [one for one in root.iter("svg") if one.get("role") == "img"]
    assert len(pictures) == len(document["devices"])
    again = play(lab, hub, "plan", "-e", "lab_plan_html=plan.html")
    assert "AGAINST THE PLAN IN FORCE\n  Nothing moves." in again and "rc=0" in again


def test_what_moves_is_said_before_the_lock_is_written(lab: Path, hub: str) -> None:
    assert "rc=0" in play(lab, hub, "plan")
    lock = (lab / ".lab.lock.yml").read_bytes()
    text = INVENTORY.replace("context: [32768, 16384]", "context: 16384").replace("nodes: mac, context", "context")
    (lab / "lab.yml").write_text(text, encoding="utf-8")
    said = play(lab, hub, "plan", "--check")
    assert "coder on forge gpu0 changes: ctx-size 32768 -> 16384" in " ".join(said.split())
    assert (lab / ".lab.lock.yml").read_bytes() == lock


def test_fit_answers_and_writes_nothing(lab: Path, hub: str) -> None:
    assert "rc=0" in play(lab, hub, "plan")
    before = {path.name: path.read_bytes() for path in lab.iterdir()}
    said = play(lab, hub, "fit", "-e", "model=bartowski/Llama-3.3-70B-Instruct-GGUF")
    assert "rc=0" in said and "changed=0" in said and "unreachable=0" in said
    assert "Llama-3.3-70B-Instruct (llama, trained for 131072 tokens)" in said
    # Of the quantisations that are looked at the repository has four.
    told = said[said.index("FILE ") : said.index("Llama-3.3-70B-Instruct fits")]
    assert {line.split()[0] for line in told.splitlines()[1:] if " gpu0" in line and "GiB" in line} == {
        "Q8_0",
        "Q6_K",
        "Q4_K_M",
        "Q2_K",
    }
    assert "instead of gpt-oss-120b" in " ".join(said.split())
    assert {path.name: path.read_bytes() for path in lab.iterdir()} == before


def test_fit_plans_a_lab_that_does_not_exist_yet(lab: Path, hub: str) -> None:
    assert "rc=0" in play(lab, hub, "plan")
    without = play(lab, hub, "fit", "-e", "without=mac")
    assert "THE LAB without mac" in without and "rc=0" in without
    assert "gpt-oss-120b has no place any more: it may run on mac alone" in without
    plus = play(
        lab, hub, "fit", "-e", "model=ggml-org/gpt-oss-120b-GGUF", "-e", 'plus={"node":"forge","memory":"96GiB"}'
    )
    assert "THE LAB with a card of 96GiB as gpu1 of forge" in plus and "rc=0" in plus
    assert "gpt-oss-120b fits beside what runs: MXFP4 on forge gpu1 with 32768 tokens" in " ".join(plus.split())


def test_fit_needs_no_lock(lab: Path, hub: str) -> None:
    said = play(lab, hub, "fit", "-e", "model=coder")
    assert "rc=0" in said and "coder fits beside what runs" in said
    assert not (lab / ".lab.lock.yml").exists()


def test_a_question_that_cannot_be_answered_ends_in_a_sentence(lab: Path, hub: str) -> None:
    for words, told in (
        (["model=codr"], "did you mean coder?"),
        (["model=no/such"], "the repository no/such does not exist"),
        (["without=mak"], "did you mean mac?"),
        ([], "Nothing is asked."),
    ):
        said = play(lab, hub, "fit", *[part for word in words for part in ("-e", word)])
        assert "rc=2" in said and told in " ".join(said.split()), said
