# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Comparison and decisions. The inspected containers were made by this module and read back from real engines."""

from __future__ import annotations

import copy
import json
import os
import socket
import stat
from pathlib import Path

import pytest
from ansible_collections.homelab.inference.plugins.module_utils import container
from ansible_collections.homelab.inference.plugins.module_utils.container import ContainerError

FIXTURES = Path(__file__).parents[2] / "fixtures" / "docker_inspect"
RECORDED = {path.stem: json.loads(path.read_text()) for path in sorted(FIXTURES.glob("*.json"))}


@pytest.fixture(params=sorted(RECORDED))
def recorded(request):
    return copy.deepcopy(RECORDED[request.param])


def wanted(recorded, **changes):
    sealed = recorded["container"]["Config"]["Labels"].get(container.CONFIG)
    instance = {**recorded["instance"], **changes}
    # The recordings are from before the command line said how much is logged.
    options = {**instance["server_options"], "verbosity": None}
    return container.desired({**instance, "server_options": options}, recorded["image"], sealed)


def differing(recorded, after):
    return container.differences(container.observed(recorded["container"], recorded["image"]), after)


def test_the_recordings_are_of_two_engines_and_two_backends():
    assert sorted(RECORDED) == ["cuda-20.10.24", "cuda-26.1.5", "rocm-20.10.24", "rocm-26.1.5"]


def test_what_an_engine_gives_back_is_what_was_wanted(recorded):
    assert differing(recorded, wanted(recorded)) == []


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"alias": "other"}, ["command"]),
        ({"server_options": {"ctx-size": 1}}, None),
        ({"env": {"TZ": "UTC"}}, ["env"]),
        ({"labels": {"team": "y"}}, ["labels"]),
        ({"volume": "other"}, ["mounts"]),
        ({"published_address": "127.0.0.1"}, ["published_ports"]),
        ({"port": 8081}, ["command", "healthcheck", "published_ports"]),
        ({"memory_mib": None}, ["memory_mib"]),
        ({"cpus": 1.5}, ["cpus"]),
        ({"stop_timeout": 6}, ["stop_timeout"]),
        ({"ready_timeout": 61}, []),
    ],
)
def test_a_change_of_the_instance_is_found_where_it_is(recorded, changes, names):
    found = differing(recorded, wanted(recorded, **changes))
    assert "command" in found if names is None else found == names


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        (("HostConfig", "RestartPolicy", "Name"), "always", "restart_policy"),
        (("HostConfig", "Memory"), 1 << 30, "memory_mib"),
        (("HostConfig", "ReadonlyRootfs"), False, "read_only"),
        (("HostConfig", "CapDrop"), None, "cap_drop"),
        (("HostConfig", "SecurityOpt"), None, "security_opts"),
        (("HostConfig", "Mounts", 0, "ReadOnly"), False, "mounts"),
        (("Image",), "sha256:0", "image"),
        (("Config", "Labels", container.CONFIG), "0", "api_key"),
        (("Config", "Entrypoint"), ["sh"], "entrypoint"),
    ],
)
def test_a_change_of_the_container_is_found(recorded, path, value, name):
    place = recorded["container"]
    for step in path[:-1]:
        place = place[step]
    after = wanted(recorded)
    place[path[-1]] = value
    assert name in differing(recorded, after)


def test_another_card_or_another_order_of_cards_is_another_container():
    recorded = copy.deepcopy(RECORDED["cuda-20.10.24"])
    recorded["instance"]["devices"].reverse()
    assert differing(recorded, wanted(recorded)) == ["device_requests", "env"]


def test_what_the_image_brings_is_not_compared():
    recorded = copy.deepcopy(RECORDED["cuda-20.10.24"])
    assert container.observed(recorded["container"], recorded["image"])["env"] == {
        "CUDA_VISIBLE_DEVICES": "GPU-1b2e,GPU-0a1f",
        "TZ": "Europe/Berlin",
    }
    assert "LLAMA_ARG_HOST=0.0.0.0" in recorded["container"]["Config"]["Env"]


def test_without_the_image_a_change_is_foreseen(recorded):
    after = container.desired(recorded["instance"], None, None)
    assert "image" in differing(recorded, after)
    assert "env" not in after


def test_the_request_asks_for_what_is_compared(recorded):
    values = wanted(recorded)
    body = container.body(values, recorded["instance"])
    made = {"Image": values["image"], "Config": body, "HostConfig": body["HostConfig"]}
    again = container.observed(made, None)
    assert {key: again[key] for key in values if key != "env"} == {key: values[key] for key in values if key != "env"}
    assert all(request["Count"] == 0 for request in body["HostConfig"]["DeviceRequests"])


def test_a_diff_shows_an_option_per_line_and_no_secret(recorded):
    values = wanted(recorded)
    shown = container.shown({**values, "api_key": "0123456789abcdef"}, "llama.cpp:1", ["command", "image", "api_key"])
    assert "--port 8080" in shown["command"]
    assert shown["image"] == f"llama.cpp:1 ({values['image'][:19]})"
    assert shown["api_key"] == "sealed as 01234567"


def test_a_seal_follows_content_and_key(tmp_path, monkeypatch):
    monkeypatch.setattr(container, "LABEL_KEY", tmp_path / "node" / "label.key")
    secret = tmp_path / "key"
    assert container.seal(None, False) is None
    assert container.seal(str(secret), True) == "not known yet"
    with pytest.raises(ContainerError, match="is missing on the node"):
        container.seal(str(secret), False)
    secret.write_text("sk-one\n")
    assert container.seal(str(secret), True) == "not known yet"
    assert not container.LABEL_KEY.exists()
    one = container.seal(str(secret), False)
    assert container.seal(str(secret), True) == container.seal(str(secret), False) == one
    assert stat.S_IMODE(container.LABEL_KEY.stat().st_mode) == 0o600
    assert [path.name for path in container.LABEL_KEY.parent.iterdir()] == ["label.key"]
    assert "sk-one" not in one
    secret.write_text("sk-two\n")
    assert container.seal(str(secret), False) != one
    secret.write_text("sk-one\n")
    container.LABEL_KEY.unlink()
    assert container.seal(str(secret), False) != one


@pytest.mark.parametrize(
    ("current", "previous", "serves", "matches", "step"),
    [
        (True, False, False, False, ""),
        (False, False, False, False, ""),
        (False, True, False, False, "restore"),
        (True, True, True, True, "keep"),
        (True, True, True, False, "keep"),
        (True, True, False, True, "resume"),
        (True, True, False, False, "discard"),
    ],
)
def test_how_an_interrupted_replacement_ends(current, previous, serves, matches, step):
    assert container.recovery(current, previous, serves, matches) == step


@pytest.mark.parametrize(
    ("state", "current", "differing", "started", "recovering", "expected"),
    [
        ("started", True, [], True, "", []),
        ("started", True, [], False, "", ["start"]),
        ("started", False, [], False, "", ["create", "start"]),
        ("started", True, ["image"], True, "", ["replace", "start"]),
        ("present", True, [], False, "", []),
        ("present", False, [], False, "", ["create"]),
        ("present", True, ["image"], True, "", ["replace"]),
        ("absent", True, [], True, "", ["remove"]),
        ("absent", False, [], False, "", []),
        ("started", True, [], False, "restore", ["restore previous", "start"]),
        ("started", True, ["image"], False, "discard", ["restore previous", "replace", "start"]),
        ("started", True, [], True, "keep", ["remove previous"]),
        ("started", True, ["image"], True, "keep", ["remove previous", "replace", "start"]),
        ("started", True, [], False, "resume", ["start", "remove previous"]),
        ("present", True, [], False, "resume", ["remove previous"]),
    ],
)
def test_what_is_done(state, current, differing, started, recovering, expected):
    assert container.actions(state, current, differing, started, recovering) == expected


def test_listeners_are_read_from_the_kernel():
    with socket.socket() as four, socket.socket(socket.AF_INET6) as six:
        four.bind(("127.0.0.1", 0))
        six.bind(("::1", 0))
        for one in (four, six):
            one.listen()
        found = container.listeners(Path("/proc/net/tcp").read_text())
        found += container.listeners(Path("/proc/net/tcp6").read_text())
        inodes = {(address, port): inode for address, port, inode in found}
        assert ("::1", six.getsockname()[1]) in inodes
        inode = inodes["127.0.0.1", four.getsockname()[1]]
        assert container._process_of(inode).endswith(f"(pid {os.getpid()})")


def test_addresses_that_get_in_each_others_way():
    assert container._overlap("0.0.0.0", "10.0.0.1")
    assert container._overlap("::", "10.0.0.1")
    assert container._overlap("10.0.0.1", "10.0.0.1")
    assert not container._overlap("127.0.0.1", "10.0.0.1")


def test_a_missing_sdk_is_named(monkeypatch):
    monkeypatch.setattr(container, "docker", None)
    with pytest.raises(ContainerError, match="python3-docker"):
        container.connect()
