# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Role node_exporter from nothing to removal, on a machine with systemd. Each test goes on from the one before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from systemd_node import Node, until

from tests.integration.test_litellm_role import changed_tasks
from tests.sample import long

pytestmark = long

ANSIBLE = str(Path(sys.executable).with_name("ansible-playbook"))
DROPIN = "/etc/systemd/system/prometheus-node-exporter.service.d"
METRICS = "/var/lib/homelab-inference/metrics"
NOTE = "/etc/homelab-inference/node-exporter-package"

DIRECTORIES = "Configure | Make the directories"
OPTIONS = "Configure | Write the options of its unit"
RUN = "Run | Run it with its options"
ENGINE = {"Configure | Write the unit that asks the container engine", "Run | Ask the container engine from now on"}
ENGINE_GONE = {"Engine | Ask it no more", "Engine | Remove its unit", "Engine | Remove what it wrote"}
INSTALLATION = {
    "Install | Make the directory for notes",
    "Install | Note that it comes from this role",
    "Install | Install the package",
}
REMOVED_OPTIONS = "Remove | Remove the options"
RESTORED = "Remove | Run the exporter that was there before with its own options"
REMOVED_NOTE = "Remove | Remove the note"
REMOVED_ABOVE = "Remove | Remove the directories above when nobody else keeps something in them"


class Host(Node):
    """A machine that the role is run on."""

    def play(self, *flags: str, tasks_from: str = "main", **variables: Any) -> subprocess.CompletedProcess[str]:
        """Run the role, and return the finished process."""
        role = {"name": "homelab.inference.node_exporter", "tasks_from": tasks_from}
        play = {"hosts": "all", "gather_facts": False, "tasks": [{"ansible.builtin.include_role": role}]}
        reached = {"ansible_connection": "community.docker.docker", "ansible_python_interpreter": "/usr/bin/python3"}
        inventory = {"all": {"hosts": {self.name: reached}}}
        for name, content in (("play.yml", [play]), ("hosts.yml", inventory)):
            (self.directory / name).write_text(json.dumps(content))
        return subprocess.run(
            [
                *(ANSIBLE, "--inventory", str(self.directory / "hosts.yml"), str(self.directory / "play.yml")),
                *("--diff", "--extra-vars", json.dumps(variables), *flags),
            ],
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, "ANSIBLE_PIPELINING": "true", "ANSIBLE_NOCOLOR": "1"},
            capture_output=True,
            text=True,
            timeout=400,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def apply(self, *flags: str, **other: Any) -> set[str]:
        """Run the role, which has to succeed, and return the names of the tasks that changed something."""
        done = self.play(*flags, **other)
        assert done.returncode == 0, done.stdout + done.stderr
        return changed_tasks(done.stdout)

    def metrics(self, port: int = 9100) -> str:
        """What the exporter shows."""
        return self(f"curl -sf http://127.0.0.1:{port}/metrics")

    def started(self) -> str:
        """Since when the exporter runs."""
        return self("systemctl show --property MainPID,ActiveEnterTimestampMonotonic prometheus-node-exporter.service")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with Host() as machine:
        machine.directory = tmp_path_factory.mktemp("node")
        yield machine


def test_a_dry_run_names_what_would_be_made(host: Host) -> None:
    unit = "Configure | Write the unit that asks the container engine"
    assert host.apply("--check") == {DIRECTORIES, OPTIONS, unit, "Install | Say what would be installed"}
    host(f"! ls {DROPIN} && ! ls {METRICS} && ! ls /usr/bin/prometheus-node-exporter")


def test_it_shows_the_machine_and_the_metrics_of_others(host: Host) -> None:
    assert host.apply() == {DIRECTORIES, OPTIONS} | INSTALLATION | ENGINE
    host(f"echo 'lab_answer 42' >{METRICS}/lab.prom.new && mv {METRICS}/lab.prom.new {METRICS}/lab.prom")
    shown = host.metrics()
    for name in ("node_memory_MemAvailable_bytes", "node_cpu_seconds_total", "node_filesystem_avail_bytes"):
        assert f"\n{name}" in shown, name
    assert "\nlab_answer 42\n" in shown
    # And nothing that was not asked for.
    assert 'node_scrape_collector_success{collector="textfile"} 1' in shown
    assert 'collector="netstat"' not in shown
    assert host("systemctl is-enabled prometheus-node-exporter") == "enabled"
    assert host("ps -o user= -C prometheus-node-exporter").startswith("prometh")


def test_a_second_run_changes_nothing(host: Host) -> None:
    before = host.started()
    assert host.apply("--check") == set()
    assert host.apply() == set()
    assert host.started() == before


def test_it_tells_whether_the_container_engine_answers(host: Host) -> None:
    until("an engine that answers", lambda: "\nhomelab_container_engine_up 1\n" in host.metrics())
    host("systemctl kill --kill-whom=main --signal=SIGSTOP docker.service")
    until("one that hangs", lambda: "\nhomelab_container_engine_up 0\n" in host.metrics())
    host("systemctl kill --kill-whom=main --signal=SIGCONT docker.service")
    until("one that answers again", lambda: "\nhomelab_container_engine_up 1\n" in host.metrics())
    assert host.apply(node_exporter_container_engine=False) == ENGINE_GONE
    assert "homelab_container_engine_up" not in host.metrics()
    assert host.apply() == ENGINE


def test_a_change_takes_effect_also_after_an_interrupted_run(host: Host) -> None:
    change = {"node_exporter_address": "127.0.0.1", "node_exporter_port": 9109}
    assert host.apply("--check", **change) == {OPTIONS, RUN}
    assert host.apply(tasks_from="configure", **change) == {OPTIONS}
    assert "lab_answer 42" in host.metrics()
    assert host.apply(**change) == {RUN}
    assert "lab_answer 42" in host.metrics(9109)
    assert "9100" not in host("ss -tln")
    assert host.apply() == {OPTIONS, RUN}


def test_one_that_does_not_start_is_told_with_its_reason(host: Host) -> None:
    done = host.play(node_exporter_collectors=["cpu", "no_such_collector"])
    assert done.returncode != 0
    assert "does not answer at http://127.0.0.1:9100/metrics" in done.stdout
    assert "no_such_collector" in done.stdout.split("last words:")[1]
    host("systemctl reset-failed prometheus-node-exporter")
    assert host.apply() == {OPTIONS, RUN}


def test_removal_takes_what_the_role_installed(host: Host) -> None:
    planned = host.apply("--check", tasks_from="remove")
    assert planned == {"Remove | Announce that the package would go", REMOVED_OPTIONS, REMOVED_NOTE} | ENGINE_GONE
    assert host(f"cat {NOTE}") == "prometheus-node-exporter"
    removed = host.apply(tasks_from="remove")
    assert (
        removed >= {"Remove | Remove the package that this role installed", REMOVED_OPTIONS, REMOVED_NOTE} | ENGINE_GONE
    )
    # What other programs left there is theirs.
    assert host(f"ls {METRICS}; cat {METRICS}/lab.prom").split("\n") == ["lab.prom", "lab_answer 42"]
    host(f"rm {METRICS}/lab.prom")
    assert host.apply(tasks_from="remove") == {REMOVED_ABOVE}
    host(f"! ls /usr/bin/prometheus-node-exporter && ! ls {DROPIN} && ! ls /etc/default/prometheus-node-exporter")
    host("! ls /var/lib/homelab-inference && ! ls /etc/homelab-inference")
    assert host.apply(tasks_from="remove") == set()


def test_one_that_was_there_before_stays_and_runs_as_before(host: Host) -> None:
    host("DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends prometheus-node-exporter")
    until("its start", lambda: host.run("curl -sf http://127.0.0.1:9100/metrics", check=False).returncode == 0)
    assert "node_netstat" in host.metrics()
    assert host.apply() == {DIRECTORIES, OPTIONS, RUN} | ENGINE
    assert "node_netstat" not in host.metrics()
    assert host.apply() == set()
    assert host.apply(tasks_from="remove") >= {REMOVED_OPTIONS, RESTORED, REMOVED_ABOVE} | ENGINE_GONE
    until("its start", lambda: host.run("curl -sf http://127.0.0.1:9100/metrics", check=False).returncode == 0)
    assert "node_netstat" in host.metrics()
    assert host.apply(tasks_from="remove") == set()


def test_one_with_options_of_somebody_else_is_left_alone(host: Host) -> None:
    host("sed -i 's/^ARGS=.*/ARGS=\"--no-collector.hwmon\"/' /etc/default/prometheus-node-exporter")
    before = host.started()
    for flags in (("--check",), ()):
        done = host.play(*flags)
        assert done.returncode != 0
        assert "somebody has given it options" in done.stdout
    host(f"! ls {DROPIN} && ! ls {METRICS}")
    assert host.started() == before
