# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What was deployed is kept whole, without secrets, five times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ansible_collections.homelab.inference.plugins.plugin_utils import generations

LOCK = {"instances": [], "version": 1}
HOSTS = {
    "a": {
        "ansible_host": "10.0.0.1",
        "ansible_password": "x",
        "lab_models": {"chat": {}},
        "lab_secret_key": "s",
        "lab_lock_file": "x",
    },
    "b": {"node_presence": "guest", "ansible_become_password": "y", "other": 1},
}
GROUPS = {"all": ["a", "b"], "inference": ["a", "b"], "lab_rolling": ["a"], "ungrouped": []}


def test_an_inventory_holds_the_declaration_and_the_way_to_the_hosts() -> None:
    found = generations.inventory(HOSTS, GROUPS)["all"]
    assert found["hosts"] == {
        "a": {"ansible_host": "10.0.0.1", "lab_models": {"chat": {}}},
        "b": {"node_presence": "guest"},
    }
    assert found["children"] == {"inference": {"hosts": {"a": {}, "b": {}}}}


def test_the_same_is_sealed_once_and_five_are_kept(tmp_path: Path) -> None:
    home = generations.directory(tmp_path / ".lab.lock.yml")
    assert home == tmp_path / ".lab.generations" and generations.newest(home) is None
    for number in range(1, 9):
        sealed = {"all": {"hosts": {str(number): {}}}}
        assert [generations.seal(home, sealed, LOCK, "1.0.0") for _again in range(2)] == [number, number]
    assert sorted(one.name for one in home.iterdir()) == ["4", "5", "6", "7", "8", "newest"]
    newest = generations.newest(home)
    assert newest == home / "8" and (home / "newest").resolve() == newest.resolve()
    assert json.loads((newest / "inventory.json").read_text()) == {"all": {"hosts": {"8": {}}}}
    assert {one.stat().st_mode & 0o777 for one in newest.iterdir()} == {0o600}
    assert (home.stat().st_mode & 0o777, newest.stat().st_mode & 0o777) == (0o700, 0o700)


def test_a_lock_that_ansible_has_handed_over_is_written_like_any_other(tmp_path: Path) -> None:
    class Tagged(str):
        __slots__ = ()

    assert generations.seal(tmp_path / "g", {}, {Tagged("version"): 1, "instances": [Tagged("a")]}, "1.0.0") == 1
    assert generations.seal(tmp_path / "g", {}, {"version": 1, "instances": ["a"]}, "1.0.0") == 1


def test_half_a_generation_is_none(tmp_path: Path) -> None:
    home = tmp_path / ".lab.generations"
    assert generations.seal(home, {}, LOCK, "1.0.0") == 1
    (home / "2").mkdir()
    (home / "3").mkdir()
    (home / "3" / "about.json").write_text("{")
    assert generations.newest(home) == home / "1"


def test_a_full_disk_leaves_the_generation_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / ".lab.generations"
    generations.seal(home, {}, LOCK, "1.0.0")

    def full(_number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(generations.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        generations.seal(home, {"all": {}}, LOCK, "1.0.0")
    assert sorted(one.name for one in home.iterdir()) == ["1", "newest"]


def test_a_playbook_with_a_sealed_inventory_knows_whose_it_is(tmp_path: Path) -> None:
    lock = tmp_path / "box" / "lab.lock.yml"
    sealed = generations.directory(lock) / "newest" / generations.LOCK
    assert generations.origin(sealed) == lock == generations.origin(lock)
