# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Maintenance ends by itself, and a file that cannot be read takes nothing out of service."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from ansible_collections.homelab.inference.plugins.plugin_utils import maintenance

NOW = datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.timezone.utc)


def test_it_lies_beside_the_lock() -> None:
    assert maintenance.path(Path("/labs/box/lab.lock.yml")) == Path("/labs/box/lab.maintenance.json")
    assert maintenance.path(Path("/labs/.lab.lock.yml")) == Path("/labs/.lab.maintenance.json")


def test_what_is_over_does_not_count(tmp_path: Path) -> None:
    file = tmp_path / "lab.maintenance.json"
    file.write_text('{"rig": "2026-01-01T12:00:01+00:00", "forge": "2026-01-01T12:00:00+00:00"}', encoding="utf-8")
    assert maintenance.read(file, NOW) == {"rig": "2026-01-01T12:00:01+00:00"}


@pytest.mark.parametrize("text", ["", "[1]", "null", '{"rig": 1}', '{"rig": "soon"}', '{"rig": "2026-01-01T13:00:00"}'])
def test_what_cannot_be_read_is_no_maintenance(tmp_path: Path, text: str) -> None:
    file = tmp_path / "lab.maintenance.json"
    file.write_text(text, encoding="utf-8")
    assert maintenance.read(file, NOW) == {}
    assert maintenance.read(tmp_path / "none", NOW) == {}
