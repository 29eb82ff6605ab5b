# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The start gate between real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ansible_collections.homelab.inference.plugins.module_utils import gate

# Holds the lock until its standard input ends; prints when it has it, and, while it waits, who has it.
HOLDER = f"""
import sys
sys.path.insert(0, {str(Path(gate.__file__).parent)!r})
import gate, pathlib
say = lambda text: print(text, flush=True)
with gate.start_gate(pathlib.Path(sys.argv[1]), sys.argv[2], "start", 20, lambda other: say(gate.describe(other))):
    say("taken")
    sys.stdin.read()
"""


def hold(path: Path, name: str) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", HOLDER, str(path), name], **pipes)


def said(process: subprocess.Popen[str]) -> str:
    return process.stdout.readline().strip()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "start.lock"


def test_one_at_a_time_and_the_waiter_is_told_who_has_it(path: Path) -> None:
    with hold(path, "chat") as chat:
        assert said(chat) == "taken"
        assert gate.holder_of(path)["holder"] == "chat"
        with hold(path, "code") as code:
            assert said(code).startswith("chat holds it to start since 20")
            chat.stdin.close()
            assert said(code) == "taken"
            assert gate.holder_of(path)["holder"] == "code"
            code.stdin.close()
    assert gate.holder_of(path) is None


def test_a_killed_holder_leaves_nothing_behind(path: Path) -> None:
    with hold(path, "chat") as chat:
        assert said(chat) == "taken"
        chat.kill()
        chat.wait()
        assert gate.holder_of(path) is None
        with gate.start_gate(path, "code", "start", 5, print):
            pass


def test_waiting_ends_at_the_deadline_and_names_the_holder(path: Path) -> None:
    with hold(path, "chat") as chat:
        assert said(chat) == "taken"
        refused = pytest.raises(gate.GateError, match=r"chat holds it to start since .* for more than 0\.3 s")
        with refused, gate.start_gate(path, "code", "start", 0.3, lambda other: None):
            pytest.fail("two hold the lock")
        chat.stdin.close()


def test_the_lock_is_free_again_after_a_failure_inside(path: Path) -> None:
    with pytest.raises(ValueError, match="broken"), gate.start_gate(path, "chat", "start", 5, print):
        raise ValueError("broken")
    assert gate.holder_of(path) is None


def test_nobody_holds_a_lock_that_was_never_taken(path: Path) -> None:
    assert gate.holder_of(path) is None
