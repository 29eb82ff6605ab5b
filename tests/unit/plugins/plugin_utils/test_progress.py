# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What people see of a long module, and the file it is read from."""

from __future__ import annotations

import json
import os

import pytest
from ansible_collections.homelab.inference.plugins.module_utils.progress import ProgressFile
from ansible_collections.homelab.inference.plugins.plugin_utils.progress import render, size

GIB = 1 << 30


def state(phase="copying chat.gguf", done=None, total=None, unit="bytes"):
    return {"pid": 1, "phase": phase, "done": done, "total": total, "unit": unit}


@pytest.mark.parametrize(
    ("before", "now", "line"),
    [
        (None, None, ""),
        (None, state(phase=""), ""),
        (None, state(done=0, total=4 * GIB), "copying chat.gguf 0 % (0.0 of 4.0 GiB)"),
        (
            state(done=GIB, total=4 * GIB),
            state(done=2 * GIB, total=4 * GIB),
            "copying chat.gguf 50 % (2.0 of 4.0 GiB, 205 MiB/s)",
        ),
        (state(done=GIB, total=4 * GIB), state(done=GIB, total=4 * GIB), ""),
        (
            state(done=GIB, total=4 * GIB),
            state("hashing chat.gguf", GIB, 4 * GIB),
            "hashing chat.gguf 25 % (1.0 of 4.0 GiB)",
        ),
        (None, state(done=3 << 20), "copying chat.gguf (3 MiB)"),
        (None, state("waiting for chat", unit=None), "waiting for chat"),
        (None, state("loading layers", 3, 32, None), "loading layers 3 of 32"),
        (
            state("waiting for chat", 5, 900, "s"),
            state("waiting for chat", 10, 900, "s"),
            "waiting for chat 10 of 900 s",
        ),
    ],
)
def test_render(before, now, line):
    assert render(before, now, 5.0) == line


def test_the_rate_needs_time_to_have_passed():
    assert (
        render(state(done=0, total=GIB), state(done=GIB, total=GIB), 0.0) == "copying chat.gguf 100 % (1.0 of 1.0 GiB)"
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "2 KiB"), (110 << 20, "110 MiB"), (int(2.6 * GIB), "2.6 GiB")],
)
def test_size(count, text):
    assert size(count) == text


def test_progress_file_lives_as_long_as_the_work(tmp_path):
    path = tmp_path / "progress"
    with ProgressFile(str(path)) as progress:
        assert json.loads(path.read_text())["pid"] == os.getpid()
        progress.report("copying a", 1, 2, "bytes")
        assert json.loads(path.read_text()) == state("copying a", 1, 2) | {"pid": os.getpid()}
        progress.report("copying a", 2, 2, "bytes")
        assert json.loads(path.read_text())["done"] == 1, "within half a second only a new phase is written"
        progress.report("copying b", 0, 2, "bytes")
        assert json.loads(path.read_text())["phase"] == "copying b"
    assert list(tmp_path.iterdir()) == []


def test_without_a_file_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ProgressFile(None) as progress:
        progress.report("copying a", 1, 2, "bytes")
    assert list(tmp_path.iterdir()) == []


def test_work_goes_on_where_the_file_cannot_be_written(tmp_path):
    with ProgressFile(str(tmp_path / "missing" / "progress")) as progress:
        progress.report("copying a", 1, 2, "bytes")
