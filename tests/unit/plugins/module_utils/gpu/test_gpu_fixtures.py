# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every recording says where it comes from."""

from __future__ import annotations

from ansible_collections.homelab.inference.tests.unit.plugins.module_utils.gpu.gpu_machine import FIXTURES, recorded


def test_every_fixture_is_listed_with_its_source() -> None:
    """The table in README.md and the folder hold the same files, and only synthetic ones come from nowhere."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in recorded("README.md").splitlines()]
    listed = {row[1]: (row[3], row[4]) for row in rows if len(row) == 5 and row[1].endswith(".txt")}
    assert set(listed) == {path.name for path in FIXTURES.iterdir()} - {"README.md"}
    for name, (source, kind) in listed.items():
        assert kind in ("real", "real, by another tool", "synthetic"), name
        assert (source == "typed") if kind == "synthetic" else source.startswith("https://github.com/"), name
        assert name.startswith("synthetic_") == (kind == "synthetic"), name
