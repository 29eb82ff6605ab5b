# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Role controller: a fresh machine runs a playbook of this collection by itself, and is as before after the removal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from systemd_node import Node

from tests.sample import long

ROOT = Path(__file__).resolve().parents[2]
ANSIBLE = str(Path(sys.executable).with_name("ansible-playbook"))
HOME = "/var/lib/homelab-inference/controller"
# What a look at the machine compares: files but those of packages' own bookkeeping.
PLACES = "/etc /usr/local /var/lib/homelab-inference /root"
FILES = f"find {PLACES} -xdev -not -path '*/ld.so*' -not -path '/root/.ansible*' -not -name '*-' 2>/dev/null | sort"

pytestmark = long


@pytest.fixture(scope="module")
def machine() -> Iterator[Node]:
    with Node() as node:
        yield node


def play(node: Node, folder: Path, *flags: str, tasks_from: str = "main") -> tuple[str, int]:
    """Run the role in a stranger's playbook; what the run printed, and how many tasks changed something."""
    role = {"name": "homelab.inference.controller", "tasks_from": tasks_from}
    tasks = [{"ansible.builtin.include_role": role}]
    (folder / "play.json").write_text(json.dumps([{"hosts": "all", "gather_facts": False, "tasks": tasks}]))
    done = subprocess.run(
        [ANSIBLE, "-i", f"{node.name},", "-c", "community.docker.docker", "--diff", *flags, str(folder / "play.json")],
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-6000:]
    return output, int(output.split("changed=")[1].split()[0])


def test_a_dry_run_on_a_fresh_machine_changes_nothing(machine: Node, tmp_path: Path) -> None:
    before = machine(FILES)
    assert play(machine, tmp_path, "--check")[1] > 0
    assert machine(FILES) == before


def test_it_runs_a_playbook_of_the_collection_by_itself_and_a_second_run_changes_nothing(
    machine: Node, tmp_path: Path
) -> None:
    play(machine, tmp_path)
    output, changed = play(machine, tmp_path)
    assert changed == 0, output
    machine.write("/tmp/lab.yml", "all: {hosts: {here: {ansible_connection: local}}}\n")
    run = "venv/bin/ansible-playbook -i /tmp/lab.yml homelab.inference.validate"
    assert "failed=0" in machine(f"cd {HOME} && ANSIBLE_COLLECTIONS_PATH=collections {run}")
    modes = f"stat -c '%a %U %n' {HOME} {HOME}/id_ed25519"
    assert machine(modes).splitlines() == [f"700 root {HOME}", f"600 root {HOME}/id_ed25519"]


def test_what_is_newer_on_the_machine_that_runs_the_play_arrives_and_what_is_not_there_goes(
    machine: Node, tmp_path: Path
) -> None:
    inside = f"{HOME}/collections/ansible_collections/homelab/inference"
    machine(f"echo old >{inside}/playbooks/site.yml; touch {inside}/playbooks/gone.yml")
    assert play(machine, tmp_path)[1] == 1
    assert (
        machine(f"cat {inside}/playbooks/site.yml") == (ROOT / "playbooks/site.yml").read_text(encoding="utf-8").strip()
    )
    assert machine(f"test -e {inside}/playbooks/gone.yml || echo gone") == "gone"
    assert machine(f"ls -a {inside} | grep -E '^(tests|.git|.cache)$' || echo none") == "none"


def test_after_the_removal_nothing_of_it_is_left(machine: Node, tmp_path: Path) -> None:
    play(machine, tmp_path, tasks_from="remove")
    assert machine(f"test -e {HOME} || echo gone") == "gone"
    assert machine("command -v ping || echo gone") == "gone", "the role installed it"
    assert machine("command -v rsync") == "/usr/bin/rsync", "it was there before"
    assert play(machine, tmp_path, tasks_from="remove")[1] == 0
