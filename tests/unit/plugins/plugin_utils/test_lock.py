# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lock as text: what people compare in git, and what programs read again."""

from __future__ import annotations

from ansible_collections.homelab.inference.plugins.plugin_utils import lock

PART = {"where": "gpu0", "kind": "kv", "bytes": 1024, "source": "computed"}
LOCK = {
    "lock_version": 1,
    "models": {"chat": {"shape": {"block_bytes": [7] * 80, "expert_bytes": []}}},
    "instances": [{"name": "chat", "devices": ["gpu0"], "parts": [PART, PART]}],
}


def test_what_was_written_is_read_again() -> None:
    assert lock.parse(lock.render(LOCK), "lab.lock") == LOCK


def test_a_part_is_a_line_and_numbers_fill_theirs() -> None:
    lines = lock.render(LOCK).splitlines()
    assert lines.count("      - {where: gpu0, kind: kv, bytes: 1024, source: computed}") == 2
    assert len(lines) < 30
    assert "      - gpu0" in lines
