# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab lock is one run's at a time, and nobody's when that run has ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from ansible_collections.homelab.inference.plugins.plugin_utils import exclusive


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def test_it_is_free_when_its_holder_was_killed(tmp_path: Path) -> None:
    file = exclusive.path(tmp_path / ".lab.lock.yml")
    assert file == tmp_path / ".lab.running"
    with sleeper() as other:
        try:
            assert exclusive.take(file, "site.yml", other.pid) is None
            assert exclusive.take(file, "site.yml", other.pid) is None, "a playbook takes it in several plays"
            holder = exclusive.take(file, "recover.yml", os.getpid())
            assert holder is not None and (holder["what"], holder["pid"]) == ("site.yml", other.pid)
        finally:
            other.kill()
    assert exclusive.take(file, "recover.yml", os.getpid()) is None
    assert file.stat().st_mode & 0o777 == 0o600


def test_another_process_with_the_same_number_is_not_the_holder(tmp_path: Path) -> None:
    file = tmp_path / ".lab.running"
    file.write_text(json.dumps({"pid": os.getpid(), "began": "long ago", "what": "site.yml", "since": "x"}))
    with sleeper() as other:
        try:
            assert exclusive.take(file, "restart.yml", other.pid) is None
        finally:
            other.kill()


def test_a_file_that_cannot_be_read_is_nobodys(tmp_path: Path) -> None:
    file = tmp_path / ".lab.running"
    file.write_text('{"pid": 1, "beg')
    assert exclusive.take(file, "site.yml", os.getpid()) is None


def test_of_many_at_once_one_gets_it(tmp_path: Path) -> None:
    file = tmp_path / ".lab.running"
    others = [sleeper() for _number in range(4)]
    found = []
    threads = [
        threading.Thread(target=lambda pid=other.pid: found.append(exclusive.take(file, "site.yml", pid)))
        for other in others
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert [one is None for one in found].count(True) == 1
