# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Role alertmanager from nothing to removal, with a real Prometheus. Each test goes on from the one before."""

from __future__ import annotations

import json
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from litellm_lab import ROOT, docker, free_port, request

from tests.integration.test_litellm_role import changed_tasks
from tests.integration.test_prometheus_role import (
    CONFIG,
    DIRECTORIES,
    HERE,
    IMAGE,
    KEYS,
    NETWORK,
    NO_DOCKER,
    OLD_KEYS,
    RUN,
    VOLUME,
    Prometheus,
    Service,
    Target,
)
from tests.sample import long

pytestmark = long

RELOAD = "Reload | Tell it to read it again"


class Receiver:
    """A program that is told of alerts, and remembers what it was told."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                """Take a message."""
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                key = self.headers.get("Authorization")
                receiver.messages.append({"at": time.monotonic(), "path": self.path, "key": key, "body": body})
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_arguments: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer((HERE, 0), Handler)
        self.url = f"http://{HERE}:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def wait(self, wanted: Callable[[dict[str, Any]], bool], seconds: float) -> dict[str, Any]:
        """The first message that is wanted."""
        deadline = time.monotonic() + seconds
        while True:
            for message in list(self.messages):
                if wanted(message):
                    return message
            assert time.monotonic() < deadline, self.messages
            time.sleep(0.2)


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.server.shutdown()


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    target = Target("the-key")
    yield target
    target.stop()


@pytest.fixture(scope="module")
def network() -> str:
    return f"alert-{secrets.token_hex(4)}"


@pytest.fixture(scope="module")
def alertmanager(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver, network: str) -> Iterator[Service]:
    subprocess.run([ROOT / "tests/images/prometheus/build", IMAGE], check=True)
    service = Service("alertmanager", IMAGE, tmp_path_factory.mktemp("alertmanager"), network)
    channel = secrets.token_hex(16)
    service.variables["alertmanager_receivers"] = [
        {"name": "recovery", "webhook": {"url": f"{receiver.url}/alerts", "bearer_key": secrets.token_hex(16)}},
        {"name": "people", "discord": {"webhook_url": f"{receiver.url}/discord/{channel}"}},
    ]
    service.variables["alertmanager_routes"] = [
        {"receiver": "people", "matchers": ['severity="critical"'], "continue": True},
        {"receiver": "recovery"},
    ]
    try:
        yield service
    finally:
        service.close()


@pytest.fixture(scope="module")
def prometheus(
    tmp_path_factory: pytest.TempPathFactory, alertmanager: Service, target: Target, network: str
) -> Iterator[Prometheus]:
    job = {"job": "server", "path": "/stats", "bearer_key": "the-key"}
    job["targets"] = [{"address": f"{HERE}:{target.port}", "labels": {"node": "helium"}}]
    down = {"alert": "ServerDown", "expr": "up == 0", "for": "15s", "labels": {"severity": "critical"}}
    service = Prometheus("prometheus", IMAGE, tmp_path_factory.mktemp("prometheus"), network)
    service.variables["prometheus_scrape_configs"] = [job]
    service.variables["prometheus_alertmanagers"] = [f"{alertmanager.container}:9093"]
    service.variables["prometheus_rule_groups"] = [{"name": "recovery", "rules": [down]}]
    try:
        yield service
    finally:
        service.close()


def secrets_of(alertmanager: Service) -> list[str]:
    """What nobody may see."""
    receivers = alertmanager.variables["alertmanager_receivers"]
    return [receivers[0]["webhook"]["bearer_key"], receivers[1]["discord"]["webhook_url"].rpartition("/")[2]]


def silences(alertmanager: Service) -> list[str]:
    """The comments of the silences that it knows."""
    return [one["comment"] for one in json.loads(request(f"{alertmanager.url}/api/v2/silences")[1])]


def in_use(alertmanager: Service) -> str:
    """The configuration that it works by."""
    return json.loads(request(f"{alertmanager.url}/api/v2/status")[1])["config"]["original"]


def test_a_dry_run_names_what_would_be_made(alertmanager: Service) -> None:
    files = {DIRECTORIES, KEYS, CONFIG}
    done = alertmanager.play("--check", "--diff", "-vvv")
    assert done.returncode == 0, done.stdout + done.stderr
    assert changed_tasks(done.stdout) == files | {NETWORK, VOLUME, RUN}
    assert not [one for one in secrets_of(alertmanager) if one in done.stdout + done.stderr]
    nowhere = f"unix://{alertmanager.directory}/no.sock"
    assert alertmanager.apply("--check", "--diff", DOCKER_HOST=nowhere) == files | {NO_DOCKER}
    assert not (alertmanager.directory / "etc").exists()
    assert docker("ps", "--all", "--quiet", "--filter", f"name={alertmanager.container}") == ""


def test_the_first_run_and_the_second(alertmanager: Service) -> None:
    done = alertmanager.play("--diff", "-vvv")
    assert done.returncode == 0, done.stdout + done.stderr
    assert changed_tasks(done.stdout) == {DIRECTORIES, KEYS, CONFIG, NETWORK, VOLUME, RUN}
    said = done.stdout + done.stderr + alertmanager.shown() + in_use(alertmanager)
    assert not [one for one in secrets_of(alertmanager) if one in said]
    before = alertmanager.started()
    assert alertmanager.apply("--check") == set()
    assert alertmanager.apply() == set()
    assert alertmanager.started() == before


def test_it_is_hardened_and_listens_on_loopback_alone(alertmanager: Service) -> None:
    (found,) = json.loads(docker("inspect", alertmanager.container))
    assert found["Config"]["User"] == "10004:10004"
    assert found["HostConfig"]["CapDrop"] == ["ALL"]
    assert found["HostConfig"]["ReadonlyRootfs"] is True
    assert found["HostConfig"]["SecurityOpt"] == ["no-new-privileges:true"]
    assert found["HostConfig"]["RestartPolicy"]["Name"] == "always"
    assert [port["HostIp"] for ports in found["HostConfig"]["PortBindings"].values() for port in ports] == ["127.0.0.1"]
    keys = alertmanager.directory / "etc" / "keys"
    assert {file.name for file in keys.iterdir()} == {"recovery.webhook", "people.discord"}
    for file in keys.iterdir():
        assert (file.stat().st_mode & 0o777, file.stat().st_uid) == (0o600, 10004)
    assert keys.stat().st_mode & 0o777 == 0o700
    # No cluster.
    assert json.loads(request(f"{alertmanager.url}/api/v2/status")[1])["cluster"]["status"] == "disabled"


def test_a_server_that_goes_is_told_within_45_seconds(
    alertmanager: Service, prometheus: Prometheus, receiver: Receiver, target: Target
) -> None:
    prometheus.apply()
    assert prometheus.becomes('up{job="server"}', 1)
    key, channel = secrets_of(alertmanager)
    stopped = time.monotonic()
    target.stop()
    told = receiver.wait(lambda message: message["path"] == "/alerts", 60)
    print(f"told after {told['at'] - stopped:.1f} s")
    assert told["at"] - stopped < 45
    assert told["key"] == f"Bearer {key}"
    body = told["body"]
    assert (body["version"], body["status"], body["receiver"]) == ("4", "firing", "recovery")
    assert body["groupLabels"] == {"alertname": "ServerDown", "node": "helium"}
    (alert,) = body["alerts"]
    assert alert["labels"]["instance"] == f"{HERE}:{target.port}"
    assert alert["labels"]["job"] == "server"
    # People are told as well.
    told = receiver.wait(lambda message: message["path"] == f"/discord/{channel}", 10)
    assert "ServerDown" in json.dumps(told["body"])


def test_and_that_it_is_back(receiver: Receiver, target: Target) -> None:
    target.start()
    told = receiver.wait(lambda message: message["body"].get("status") == "resolved", 60)
    assert told["body"]["alerts"][0]["status"] == "resolved"


def test_a_change_is_read_without_a_restart_and_silences_stay(alertmanager: Service) -> None:
    before = alertmanager.started()
    silence = {
        "matchers": [{"name": "node", "value": "lithium", "isRegex": False}],
        "startsAt": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "endsAt": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 3600)),
        "createdBy": "test",
        "comment": "repair",
    }
    assert request(f"{alertmanager.url}/api/v2/silences", body=silence)[0] == 200
    rules = [{"source_matchers": ["a=b"], "target_matchers": ["c=d"], "equal": ["node"]}]
    change = {"alertmanager_inhibit_rules": rules, "alertmanager_repeat_interval": 600}
    assert alertmanager.apply("--check", **change) == {CONFIG, "Run | Announce that it would read it"}
    assert alertmanager.apply(**change) == {CONFIG, RELOAD}
    assert "target_matchers" in in_use(alertmanager)
    assert "repeat_interval: 10m" in in_use(alertmanager)
    assert alertmanager.started() == before
    assert silences(alertmanager) == ["repair"]
    # Another container has them as well.
    port = free_port()
    assert alertmanager.apply(alertmanager_port=port) == {CONFIG, RUN}
    assert alertmanager.started() != before
    alertmanager.url = f"http://127.0.0.1:{port}"
    assert silences(alertmanager) == ["repair"]
    alertmanager.variables["alertmanager_port"] = port
    assert alertmanager.apply() == set()


def test_what_amtool_refuses_does_not_replace_what_works(alertmanager: Service) -> None:
    file = alertmanager.directory / "etc" / "alertmanager.yml"
    before = file.read_text()
    done = alertmanager.play(alertmanager_routes=[{"receiver": "nobody-knows"}])
    assert done.returncode != 0
    assert "undefined receiver" in done.stdout
    two = alertmanager.variables["alertmanager_receivers"][:1] * 2
    done = alertmanager.play(alertmanager_receivers=two)
    assert done.returncode != 0
    assert "Rename it" in done.stdout
    assert file.read_text() == before
    assert request(f"{alertmanager.url}/-/ready")[0] == 200
    assert alertmanager.apply() == set()


def test_what_an_interrupted_run_left_is_made_good(alertmanager: Service) -> None:
    change = {"alertmanager_group_interval": 77}
    assert alertmanager.apply(tasks_from="configure", **change) == {CONFIG}
    assert "1m17s" not in in_use(alertmanager)
    assert alertmanager.apply(**change) == {RELOAD}
    assert "1m17s" in in_use(alertmanager)
    alertmanager.variables |= change


def test_a_reload_that_fails_is_told(alertmanager: Service) -> None:
    """As if amtool had found nothing."""
    blind = ("--extra-vars", "__alertmanager_amtool=true")
    done = alertmanager.play(*blind, alertmanager_routes=[{"receiver": "nobody-knows"}])
    assert done.returncode != 0
    assert "it goes on with the configuration before" in done.stdout
    assert "nobody-knows" not in in_use(alertmanager)
    assert alertmanager.apply() == {CONFIG, RELOAD}


def test_a_new_key_needs_no_reload_and_an_old_one_goes(alertmanager: Service, receiver: Receiver) -> None:
    before = alertmanager.started()
    receivers = alertmanager.variables["alertmanager_receivers"]
    receivers[0]["webhook"]["bearer_key"] = new = secrets.token_hex(16)
    done = alertmanager.play("--diff", "-vvv")
    assert changed_tasks(done.stdout) == {KEYS}
    assert new not in done.stdout + done.stderr
    alert = {"labels": {"alertname": "ByHand", "node": "here"}}
    assert request(f"{alertmanager.url}/api/v2/alerts", body=[alert])[0] == 200
    told = receiver.wait(lambda message: message["body"].get("groupLabels") == alert["labels"], 20)
    assert told["key"] == f"Bearer {new}"
    changed = alertmanager.apply(alertmanager_receivers=receivers[:1], alertmanager_routes=[])
    assert changed == {CONFIG, OLD_KEYS, RELOAD}
    assert [file.name for file in (alertmanager.directory / "etc" / "keys").iterdir()] == ["recovery.webhook"]
    assert alertmanager.started() == before
    # Without any receiver alerts are kept and shown, and told to nobody.
    alertmanager.variables |= {"alertmanager_receivers": [], "alertmanager_routes": []}
    assert alertmanager.apply() == {CONFIG, OLD_KEYS, RELOAD}


def test_a_container_of_somebody_else_is_left_alone(alertmanager: Service) -> None:
    other = f"{alertmanager.container}-other"
    docker("volume", "create", other)
    docker("create", "--name", other, IMAGE)
    try:
        before = docker("inspect", "--format", "{{.Id}}", other)
        aside = {"alertmanager_directory": str(alertmanager.directory / "aside"), "alertmanager_container": other}
        done = alertmanager.play(**aside)
        assert done.returncode != 0
        assert f"container {other} on localhost was not made by this role" in done.stdout
        done = alertmanager.play(alertmanager_volume=other)
        assert done.returncode != 0
        assert f"volume {other} on localhost was not made by this role" in done.stdout
        aside |= {"alertmanager_volume": other, "alertmanager_network": "none-such", "alertmanager_remove_data": True}
        assert alertmanager.play(tasks_from="remove", **aside).returncode == 0
        assert docker("inspect", "--format", "{{.Id}}", other) == before
        assert docker("volume", "ls", "--quiet", "--filter", f"name={other}") == other
    finally:
        docker("rm", "--force", other)
        docker("volume", "rm", other)


def test_removal_leaves_nothing(alertmanager: Service, prometheus: Prometheus) -> None:
    alertmanager.apply(tasks_from="remove")
    # Its network is in use until Prometheus goes.
    assert docker("network", "ls", "--quiet", "--filter", f"name={alertmanager.network}") != ""
    prometheus.apply(tasks_from="remove", prometheus_remove_data=True)
    assert docker("network", "ls", "--quiet", "--filter", f"name={alertmanager.network}") == ""
    assert docker("ps", "--all", "--quiet", "--filter", f"name={alertmanager.container}") == ""
    assert not (alertmanager.directory / "etc").exists()
    assert alertmanager.apply(tasks_from="remove") == set()
    assert alertmanager.apply(tasks_from="remove", alertmanager_remove_data=True) == {"Remove | Remove the data"}
    assert docker("volume", "ls", "--quiet", "--filter", f"name={alertmanager.volume}") == ""
