# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Role prometheus from nothing to removal, with a real Prometheus. Each test goes on from the one before."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from litellm_lab import NASTY, ROOT, ansible, docker, free_port, request

from tests.integration.test_litellm_role import changed_tasks
from tests.sample import long

pytestmark = long

IMAGE = "homelab-inference/prometheus:dev"
# Where containers of any network reach what this machine listens on.
HERE = "172.17.0.1"

DIRECTORIES = "Configure | Make the directories"
KEYS = "Configure | Write the keys"
OLD_KEYS = "Configure | Remove them"
RULES = "Configure | Write the rules"
CONFIG = "Configure | Write the configuration"
NETWORK = "Run | Make the network"
VOLUME = "Run | Make the volume"
RUN = "Run | Run the container"
RELOAD = "Reload | Tell it to read them again"
NO_DOCKER = "Announce the container of a machine that has no Docker yet"


class Service:
    """A role that runs one container: its variables, and the ways to run it."""

    def __init__(self, role: str, image: str, directory: Path, network: str, **variables: Any) -> None:
        self.role = role
        self.container = f"{role}-{secrets.token_hex(4)}"
        self.volume = f"{self.container}-data"
        self.network = network
        self.directory = directory
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        own = {
            "image": image,
            "port": self.port,
            "container": self.container,
            "network": network,
            "directory": str(directory / "etc"),
            "volume": self.volume,
        }
        self.variables: dict[str, Any] = {
            "ansible_python_interpreter": sys.executable,
            **{f"{role}_{name}": value for name, value in own.items()},
            **variables,
        }

    def play(self, *flags: str, tasks_from: str = "main", **other: Any) -> subprocess.CompletedProcess[str]:
        """Run the role with other variables, and return the finished process."""
        environment = {name: other.pop(name) for name in list(other) if name.isupper()}
        role = {"name": f"homelab.inference.{self.role}", "tasks_from": tasks_from}
        play = {
            "hosts": "localhost",
            "connection": "local",
            "gather_facts": False,
            "vars": {**self.variables, **other},
            "tasks": [{"ansible.builtin.include_role": role}],
        }
        path = self.directory / "playbook.yml"
        path.write_text(json.dumps([play]))
        return ansible(["ansible-playbook", "--inventory", "localhost,", str(path), *flags], **environment)

    def apply(self, *flags: str, **other: Any) -> set[str]:
        """Run the role, which has to succeed, and return the names of the tasks that changed something."""
        done = self.play(*flags, **other)
        assert done.returncode == 0, done.stdout + done.stderr
        return changed_tasks(done.stdout)

    def started(self) -> str:
        """Which container runs, and since when."""
        return docker("inspect", "--format", "{{.Id}} {{.State.StartedAt}}", self.container)

    def shown(self) -> str:
        """All that Docker shows of it."""
        logs = subprocess.run(["docker", "logs", self.container], capture_output=True, text=True, check=False)
        return docker("inspect", self.container) + logs.stdout + logs.stderr

    def close(self) -> None:
        """Remove what was made."""
        docker("rm", "--force", self.container, check=False)
        docker("volume", "rm", self.volume, check=False)
        docker("network", "rm", self.network, check=False)


class Prometheus(Service):
    """One that can be asked."""

    def value(self, query: str, at: float | None = None) -> float | None:
        """The value of the one series that a query finds."""
        words = {"query": query, **({"time": f"{at:.3f}"} if at else {})}
        status, text = request(f"{self.url}/api/v1/query?{urllib.parse.urlencode(words)}")
        assert status == 200, text
        found = json.loads(text)["data"]["result"]
        return float(found[0]["value"][1]) if found else None

    def becomes(self, query: str, value: float, seconds: float = 20) -> bool:
        """Whether a query gets the value within the time."""
        deadline = time.monotonic() + seconds
        while self.value(query) != value:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.3)
        return True

    def alerts(self) -> set[str]:
        """The names of the rules that it has in use."""
        groups = json.loads(request(f"{self.url}/api/v1/rules")[1])["data"]["groups"]
        return {rule["name"] for group in groups for rule in group["rules"]}


class Target:
    """Something that shows metrics to who has the key; it can be stopped and started again."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.port = 0
        self.start()

    def start(self) -> None:
        """Listen, at the port of last time."""
        target = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                """Show one metric."""
                allowed = self.path == "/stats" and self.headers.get("Authorization") == f"Bearer {target.key}"
                self.send_response(200 if allowed else 401)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(b"lab_answer 42\n" if allowed else b"")

            def log_message(self, *_arguments: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer((HERE, self.port), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Listen no more."""
        self.server.shutdown()
        self.server.server_close()


def rule(name: str, expression: str = "up == 0") -> dict[str, Any]:
    """A group with one rule."""
    return {"name": name, "rules": [{"alert": name, "expr": expression, "for": "15s"}]}


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    target = Target(f"{secrets.token_hex(8)}{NASTY}")
    yield target
    target.stop()


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory, target: Target) -> Iterator[Prometheus]:
    subprocess.run([ROOT / "tests/images/prometheus/build", IMAGE], check=True)
    directory = tmp_path_factory.mktemp("prometheus")
    jobs = [
        {"job": "self", "targets": [{"address": "localhost:9090", "labels": {"node": "here"}}]},
        {"job": "keyed", "path": "/stats", "targets": [{"address": f"{HERE}:{target.port}"}]},
    ]
    service = Prometheus("prometheus", IMAGE, directory, f"prom-{secrets.token_hex(4)}", prometheus_scrape_configs=jobs)
    service.variables["prometheus_rule_groups"] = [rule("Down")]
    set_key(service, target.key)
    try:
        yield service
    finally:
        service.close()


def set_key(prometheus: Prometheus, key: str) -> None:
    """Give the job its key. A key may have braces, which are no template."""
    escaped = key.replace("{{", "{{ '{{' }}")
    prometheus.variables["prometheus_scrape_configs"][1]["bearer_key"] = escaped


def test_a_dry_run_names_what_would_be_made(prometheus: Prometheus) -> None:
    files = {DIRECTORIES, KEYS, RULES, CONFIG}
    assert prometheus.apply("--check", "--diff") == files | {NETWORK, VOLUME, RUN}
    nowhere = f"unix://{prometheus.directory}/no.sock"
    assert prometheus.apply("--check", "--diff", DOCKER_HOST=nowhere) == files | {NO_DOCKER}
    assert not (prometheus.directory / "etc").exists()
    assert docker("ps", "--all", "--quiet", "--filter", f"name={prometheus.container}") == ""
    assert docker("volume", "ls", "--quiet", "--filter", f"name={prometheus.volume}") == ""


def test_it_scrapes_its_targets(prometheus: Prometheus) -> None:
    made = prometheus.apply()
    assert made == {DIRECTORIES, KEYS, RULES, CONFIG, NETWORK, VOLUME, RUN}
    assert prometheus.becomes('up{job="self",node="here"}', 1)
    assert prometheus.becomes('up{job="keyed"}', 1)
    assert prometheus.value("lab_answer") == 42
    assert prometheus.alerts() == {"Down"}


def test_it_is_hardened_and_listens_on_loopback_alone(prometheus: Prometheus) -> None:
    (found,) = json.loads(docker("inspect", prometheus.container))
    assert found["Config"]["User"] == "10003:10003"
    assert found["HostConfig"]["CapDrop"] == ["ALL"]
    assert found["HostConfig"]["ReadonlyRootfs"] is True
    assert found["HostConfig"]["SecurityOpt"] == ["no-new-privileges:true"]
    assert found["HostConfig"]["RestartPolicy"]["Name"] == "always"
    assert [port["HostIp"] for ports in found["HostConfig"]["PortBindings"].values() for port in ports] == ["127.0.0.1"]
    # Nobody stops it, reloads it or deletes data through its port.
    for path in ("/-/reload", "/-/quit", "/api/v1/admin/tsdb/delete_series?match[]=up"):
        assert request(f"{prometheus.url}{path}", body={})[0] >= 400, path
    assert request(f"{prometheus.url}/-/ready")[0] == 200


def test_a_second_run_changes_nothing(prometheus: Prometheus) -> None:
    before = prometheus.started()
    assert prometheus.apply("--check") == set()
    assert prometheus.apply() == set()
    assert prometheus.started() == before


def test_nobody_sees_a_key_and_a_new_one_is_used_at_once(prometheus: Prometheus, target: Target) -> None:
    old = target.key[:16]
    target.key = new = secrets.token_hex(16)
    set_key(prometheus, new)
    done = prometheus.play("--diff", "-vvv")
    assert done.returncode == 0, done.stdout + done.stderr
    assert changed_tasks(done.stdout) == {KEYS, RUN}
    said = done.stdout + done.stderr + prometheus.shown()
    assert old not in said
    assert new not in said
    assert new not in request(f"{prometheus.url}/api/v1/status/config")[1]
    keys = prometheus.directory / "etc" / "keys"
    file = keys / "keyed"
    assert (file.stat().st_mode & 0o777, file.stat().st_uid, keys.stat().st_mode & 0o777) == (0o600, 10003, 0o700)
    assert prometheus.becomes('scrape_samples_scraped{job="keyed"}', 1)
    # Also when the run that wrote it did not end.
    time.sleep(1)
    target.key = secrets.token_hex(16)
    set_key(prometheus, target.key)
    assert prometheus.apply(tasks_from="configure") == {KEYS}
    assert prometheus.becomes('up{job="keyed"}', 0)
    assert prometheus.apply("--check") == {RUN}
    assert prometheus.apply() == {RUN}
    assert prometheus.becomes('up{job="keyed"}', 1)
    assert prometheus.apply() == set()


def test_a_change_is_read_without_a_restart(prometheus: Prometheus) -> None:
    before, then = prometheus.started(), time.time()
    jobs = prometheus.variables["prometheus_scrape_configs"]
    more = [*jobs, {"job": "again", "targets": [{"address": "localhost:9090"}]}]
    change = {"prometheus_scrape_configs": more, "prometheus_rule_groups": [rule("Down"), rule("Gone")]}
    assert prometheus.apply("--check", **change) == {CONFIG, RULES, "Run | Announce that it would read them"}
    assert prometheus.apply(**change) == {CONFIG, RULES, RELOAD}
    assert prometheus.becomes('up{job="again"}', 1)
    assert prometheus.alerts() == {"Down", "Gone"}
    assert prometheus.started() == before
    # A job that goes takes its key along.
    assert prometheus.apply(**{**change, "prometheus_scrape_configs": [jobs[0], more[2]]}) == {CONFIG, OLD_KEYS, RELOAD}
    assert list((prometheus.directory / "etc" / "keys").iterdir()) == []
    assert prometheus.value("lab_answer", at=then) == 42


def test_a_new_container_has_the_data_of_the_one_before(prometheus: Prometheus) -> None:
    then, before = time.time(), prometheus.started()
    assert prometheus.value('up{job="self"}', at=then) == 1
    changed = prometheus.apply(prometheus_retention="31d")
    assert changed == {CONFIG, RULES, KEYS, RUN}
    assert prometheus.started() != before
    assert prometheus.value('up{job="self"}', at=then) == 1
    prometheus.variables["prometheus_retention"] = "31d"


def test_what_promtool_refuses_does_not_replace_what_works(prometheus: Prometheus) -> None:
    files = [prometheus.directory / "etc" / name for name in ("prometheus.yml", "rules.yml")]
    before = [file.read_text() for file in files]
    done = prometheus.play(prometheus_rule_groups=[rule("Broken", "up ==")])
    assert done.returncode != 0
    assert "could not parse expression" in done.stdout
    done = prometheus.play(prometheus_alertmanagers=["http://alertmanager:9093/path"])
    assert done.returncode != 0
    assert "is not a valid hostname" in done.stdout
    done = prometheus.play(prometheus_scrape_configs=[{"job": "../up", "targets": []}])
    assert done.returncode != 0
    assert "Rename it" in done.stdout
    assert [file.read_text() for file in files] == before
    assert prometheus.apply() == set()
    assert prometheus.alerts() == {"Down"}


def test_what_an_interrupted_run_left_is_made_good(prometheus: Prometheus) -> None:
    more = [rule("Down"), rule("Later")]
    assert prometheus.apply(tasks_from="configure", prometheus_rule_groups=more) == {RULES}
    assert prometheus.alerts() == {"Down"}
    assert prometheus.apply(prometheus_rule_groups=more) == {RELOAD}
    assert prometheus.alerts() == {"Down", "Later"}


def test_a_reload_that_fails_is_told(prometheus: Prometheus) -> None:
    """As if promtool had found nothing."""
    blind = ("--extra-vars", "__prometheus_promtool=true")
    done = prometheus.play(*blind, prometheus_rule_groups=[rule("Broken", "up ==")])
    assert done.returncode != 0
    assert "it goes on with the configuration before" in done.stdout
    assert "could not parse expression" in done.stdout
    assert prometheus.alerts() == {"Down", "Later"}
    assert prometheus.apply() == {RULES, RELOAD}
    assert prometheus.alerts() == {"Down"}


def test_container_and_volume_of_somebody_else_are_left_alone(prometheus: Prometheus) -> None:
    other = f"{prometheus.container}-other"
    docker("volume", "create", other)
    docker("create", "--name", other, IMAGE)
    try:
        before = docker("inspect", "--format", "{{.Id}}", other)
        aside = {"prometheus_directory": str(prometheus.directory / "aside"), "prometheus_container": other}
        done = prometheus.play(**aside)
        assert done.returncode != 0
        assert f"container {other} on localhost was not made by this role" in done.stdout
        done = prometheus.play(prometheus_volume=other)
        assert done.returncode != 0
        assert f"volume {other} on localhost was not made by this role" in done.stdout
        aside |= {"prometheus_volume": other, "prometheus_network": "none-such", "prometheus_remove_data": True}
        assert prometheus.play(tasks_from="remove", **aside).returncode == 0
        assert docker("inspect", "--format", "{{.Id}}", other) == before
        assert docker("volume", "ls", "--quiet", "--filter", f"name={other}") == other
    finally:
        docker("rm", "--force", other)
        docker("volume", "rm", other)


def test_removal_leaves_nothing_but_the_data(prometheus: Prometheus) -> None:
    prometheus.apply(tasks_from="remove")
    assert docker("ps", "--all", "--quiet", "--filter", f"name={prometheus.container}") == ""
    assert docker("network", "ls", "--quiet", "--filter", f"name={prometheus.network}") == ""
    assert docker("volume", "ls", "--quiet", "--filter", f"name={prometheus.volume}") == prometheus.volume
    assert not (prometheus.directory / "etc").exists()
    assert prometheus.apply(tasks_from="remove") == set()
    assert prometheus.apply(tasks_from="remove", prometheus_remove_data=True) == {"Remove | Remove the data"}
    assert docker("volume", "ls", "--quiet", "--filter", f"name={prometheus.volume}") == ""
