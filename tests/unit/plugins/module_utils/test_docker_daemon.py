# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json

import pytest
from ansible_collections.homelab.inference.plugins.module_utils.docker_daemon import (
    DockerDaemonError,
    changed_keys,
    keys_in_flags,
    merge,
    needs_restart,
    parse,
    render,
    take_back,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SETTINGS = {"log-driver": "json-file", "log-opts": {"max-size": "10m", "max-file": "3"}, "live-restore": True}
ADDITIONS = {"insecure-registries": ["192.0.2.10:5000"]}


def record(merged):
    return {"settings": merged.settings, "additions": merged.additions}


def test_our_keys_stand_beside_the_owners():
    merged = merge({"data-root": "/srv/docker", "insecure-registries": ["nas:5000"]}, {}, SETTINGS, ADDITIONS)
    assert merged.config == {
        "data-root": "/srv/docker",
        "insecure-registries": ["nas:5000", "192.0.2.10:5000"],
        **SETTINGS,
    }
    assert merged.additions == ADDITIONS
    assert merged.settings == SETTINGS
    assert merged.kept == []


def test_a_key_of_the_owner_is_kept_and_named():
    merged = merge({"live-restore": False}, {}, SETTINGS, {})
    assert merged.config["live-restore"] is False
    assert "live-restore" not in merged.settings
    assert merged.kept == [{"key": "live-restore", "wanted": "true", "why": "it is set to false"}]


def test_what_the_owner_already_has_like_that_stays_the_owners():
    merged = merge({"live-restore": True, "insecure-registries": ["192.0.2.10:5000"]}, {}, SETTINGS, ADDITIONS)
    assert "live-restore" not in merged.settings
    assert merged.additions == {}
    assert take_back(merged.config, merged.settings, merged.additions) == {
        "live-restore": True,
        "insecure-registries": ["192.0.2.10:5000"],
    }


@pytest.mark.parametrize("flags", [[], ["log-driver"]])
def test_log_opts_never_go_to_another_log_driver(flags):
    owner = {} if flags else {"log-driver": "journald"}
    merged = merge(owner, {}, SETTINGS, {}, flags)
    assert "log-opts" not in merged.config
    assert {"log-driver", "log-opts"} == {item["key"] for item in merged.kept}


def test_a_key_on_the_command_line_stays_out_of_the_file():
    flags = keys_in_flags(
        ["/usr/sbin/dockerd", "-H", "fd://", "--live-restore", "--insecure-registry=a:5000", "--log-opt", "max-size=1m"]
    )
    merged = merge({}, {}, SETTINGS, ADDITIONS, flags)
    assert merged.config == {"log-driver": "json-file"}
    assert {item["key"] for item in merged.kept} == {"live-restore", "log-opts", "insecure-registries"}


def test_exec_opts_of_the_owner_win_over_ours_of_the_same_name():
    merged = merge(
        {"exec-opts": ["native.cgroupdriver=systemd"]}, {}, {}, {"exec-opts": ["native.cgroupdriver=cgroupfs"]}
    )
    assert merged.config == {"exec-opts": ["native.cgroupdriver=systemd"]}
    assert merged.kept == [
        {"key": "exec-opts", "wanted": "native.cgroupdriver=cgroupfs", "why": "it has native.cgroupdriver=systemd"}
    ]


def test_an_entry_is_added_to_a_dictionary_of_the_owner():
    merged = merge({"features": {"buildkit": True}}, {}, {}, {"features": {"cdi": True}})
    assert merged.config == {"features": {"buildkit": True, "cdi": True}}
    assert take_back(merged.config, {}, merged.additions) == {"features": {"buildkit": True}}


def test_an_owners_value_of_another_type_is_left_alone():
    merged = merge({"insecure-registries": "nas:5000"}, {}, {}, ADDITIONS)
    assert merged.config == {"insecure-registries": "nas:5000"}
    assert merged.kept[0]["key"] == "insecure-registries"


def test_a_changed_wish_replaces_our_old_value():
    first = merge({"debug": True}, {}, SETTINGS, ADDITIONS)
    second = merge(
        first.config,
        record(first),
        {**SETTINGS, "log-opts": {"max-size": "1g"}},
        {"insecure-registries": ["198.51.100.7:5000"]},
    )
    assert second.config["log-opts"] == {"max-size": "1g"}
    assert second.config["insecure-registries"] == ["198.51.100.7:5000"]
    assert second.config["debug"] is True
    assert second.kept == []


def test_a_value_changed_by_hand_belongs_to_who_changed_it():
    first = merge({}, {}, SETTINGS, {})
    edited = {**first.config, "log-driver": "local"}
    second = merge(edited, record(first), SETTINGS, {})
    assert second.config["log-driver"] == "local"
    assert "log-driver" not in second.settings
    assert take_back(second.config, second.settings, second.additions) == {"log-driver": "local"}


def test_order_of_keys_and_items_stays():
    current = {"z": 1, "insecure-registries": ["192.0.2.10:5000", "nas:5000"], "live-restore": True, "a": 2}
    recorded = {"settings": {"live-restore": True}, "additions": ADDITIONS}
    merged = merge(current, recorded, SETTINGS, ADDITIONS)
    assert list(merged.config)[:4] == list(current)
    assert merged.config["insecure-registries"] == current["insecure-registries"]
    assert changed_keys(current, merged.config) == ["log-driver", "log-opts"]


def test_only_reloadable_keys_that_are_still_there_need_no_restart():
    assert needs_restart(
        ["live-restore", "log-driver", "insecure-registries"], {"live-restore": True, "log-driver": "x"}
    ) == ["insecure-registries", "log-driver"]


@pytest.mark.parametrize("text", ['{"a": 1,}', "[1]", "nonsense", '"x"'])
def test_a_broken_file_is_an_error_that_names_it(text):
    with pytest.raises(DockerDaemonError, match="Reading /etc/docker/daemon.json failed: .* nothing was changed"):
        parse(text, "/etc/docker/daemon.json")


def test_an_empty_file_is_an_empty_object():
    assert parse(" \n", "x") == {}


@pytest.mark.parametrize("indent", [1, 2, 4, "\t"])
def test_the_indentation_of_the_file_stays(indent):
    text = json.dumps({"a": {"b": 1}}, indent=indent) + "\n"
    assert render({"a": {"b": 1}}, text) == text


KEYS = st.sampled_from(
    ["log-driver", "log-opts", "live-restore", "debug", "insecure-registries", "features", "exec-opts"]
)
ITEMS = st.sampled_from(["a:1", "b:2", "x=1", "x=2"])
OWNERS = st.dictionaries(
    KEYS,
    st.one_of(
        st.booleans(),
        st.sampled_from(["json-file", "journald"]),
        st.lists(ITEMS, min_size=1, unique=True),
        st.just({"cdi": False}),
    ),
)
WANTED = st.fixed_dictionaries(
    {},
    optional={"insecure-registries": st.lists(ITEMS), "exec-opts": st.lists(ITEMS), "features": st.just({"cdi": True})},
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(OWNERS, WANTED, WANTED)
def test_whatever_was_there_is_there_again_afterwards(owner, wanted, then):
    first = merge(owner, {}, SETTINGS, wanted)
    assert merge(first.config, record(first), SETTINGS, wanted) == first
    second = merge(first.config, record(first), {"live-restore": True}, then)
    assert take_back(second.config, second.settings, second.additions) == owner
