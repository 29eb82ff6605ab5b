# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Action plugins for modules that take minutes: the module runs in the background of the node, its progress is printed.

Such a module takes the hidden option C(_progress_file) (a path) and gives it to module_utils.progress.ProgressFile.
Its result must not have the keys C(started) and C(finished): Ansible keeps them for itself.
"""

from __future__ import annotations

import json
import secrets
import shlex
import time
from typing import Any

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

display = Display()

POLL_FIRST = 0.2
POLL_MOST = 2.0
PRINT_EVERY = 5.0
# How long the node may be out of reach while its module goes on working.
PATIENCE = 300.0
# Between the end of the module's process and its written answer there is a moment, not half a minute.
GRACE = 30.0

Progress = dict[str, Any]


def size(count: float) -> str:
    """A number of bytes for people: C(2.6 GiB)."""
    unit = _unit(count)
    return f"{_scaled(count, unit)} {unit}"


def render(progress_before: Progress | None, progress_now: Progress | None, seconds: float) -> str:
    """One line for a change of progress, or nothing where there is none to tell.

    progress_before is what was printed last, seconds how long ago that was.
    """
    if not progress_now or not progress_now.get("phase"):
        return ""
    before = progress_before or {}
    if all(before.get(key) == progress_now.get(key) for key in ("phase", "done", "total")):
        return ""
    phase, done, total = progress_now["phase"], progress_now.get("done"), progress_now.get("total")
    if done is None:
        return str(phase)
    if progress_now.get("unit") != "bytes":
        return (
            f"{phase} {done}"
            + (f" of {total}" if total else "")
            + (f" {progress_now['unit']}" if progress_now.get("unit") else "")
        )
    if total:
        text = f"{phase} {done * 100 // total} % ({_scaled(done, _unit(total))} of {size(total)}"
    else:
        text = f"{phase} ({size(done)}"
    moved = done - (before.get("done") or 0)
    if before.get("phase") == phase and seconds > 0 and moved > 0:
        text += f", {size(moved / seconds)}/s"
    return text + ")"


def _unit(count: float) -> str:
    if count >= 1 << 30:
        return "GiB"
    if count >= 1 << 20:
        return "MiB"
    return "KiB" if count >= 1 << 10 else "B"


def _scaled(count: float, unit: str) -> str:
    scaled = count / {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10, "B": 1}[unit]
    return f"{scaled:.1f}" if unit == "GiB" else f"{scaled:.0f}"


class Printer:
    """Prints progress of one host, at most every five seconds and only when something changed."""

    def __init__(self, host: str, quiet: bool = False) -> None:
        self.host = host
        self.quiet = quiet
        self._shown: Progress | None = None
        self._at = time.monotonic()

    def show(self, progress: Progress | None) -> None:
        """Print what there is to tell of this state."""
        now = time.monotonic()
        if self.quiet or now - self._at < PRINT_EVERY:
            return
        line = render(self._shown, progress, now - self._at)
        if line:
            display.display(f"[{self.host}] {line}")
            self._shown, self._at = progress, now


class ProgressActionModule(ActionBase):
    """Base of an action plugin whose module, MODULE, may take long.

    The module runs detached on the node: where the controller goes away, it ends its work by itself.
    In check mode it is an ordinary call, since a detached module cannot tell what it would do.
    """

    MODULE = ""
    # A net under hung modules, not a deadline for slow ones.
    TIME_LIMIT = 7 * 24 * 3600

    def time_limit(self, module_args: dict[str, Any]) -> int:
        """Seconds after which the node ends the module. Override where an option of the task says how long."""
        return self.TIME_LIMIT

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run the module with the arguments of the task."""
        super().run(tmp, task_vars)
        return self.run_module(dict(self._task.args), task_vars or {})

    def run_module(self, module_args: dict[str, Any], task_vars: dict[str, Any]) -> dict[str, Any]:
        """Run MODULE on the node with these arguments, printing its progress, and return its result."""
        if self._task.check_mode:
            return self._execute_module(module_name=self.MODULE, module_args=module_args, task_vars=task_vars)
        async_dir = self._remote_expand_user(self.get_shell_option("async_dir", default="~/.ansible_async"))
        progress_file = f"{async_dir}/progress-{secrets.token_hex(8)}"
        job = self._start({**module_args, "_progress_file": progress_file}, task_vars)
        if "ansible_job_id" not in job:
            # It did not start, though Ansible marks what it starts in the background as changed.
            return {**job, "changed": False}
        job_file = f"{async_dir}/{job['ansible_job_id']}"
        result: dict[str, Any] = {}
        if self._watch(job_file, progress_file, self.printer(task_vars)):
            result = self._execute_module(
                module_name="ansible.legacy.async_status",
                module_args={"jid": job["ansible_job_id"], "_async_dir": async_dir},
                task_vars=task_vars,
            )
        # For a module that was killed, Ansible's wrapper answers with its own traceback and what was said until then.
        if not result or (result.get("failed") and {"cmd", "data"} <= set(result)):
            cause = (result.get("stderr") or "its process on the node is gone").strip().splitlines()[-1]
            result = {
                "failed": True,
                "msg": f"{self.MODULE} ended without an answer: {cause}. "
                "Look into the node's journal (out of memory, a restart), then run again.",
            }
        files = " ".join(shlex.quote(path) for path in (job_file, progress_file, progress_file + ".tmp"))
        self._low_level_execute_command(f"rm -f {files}")
        for key in ("ansible_job_id", "started", "finished", "results_file"):
            result.pop(key, None)
        return result

    def printer(self, task_vars: dict[str, Any]) -> Printer:
        """What prints progress of this host; silent for a task with no_log."""
        return Printer(task_vars.get("inventory_hostname", "localhost"), quiet=bool(self._task.no_log))

    def _start(self, module_args: dict[str, Any], task_vars: dict[str, Any]) -> dict[str, Any]:
        self._task.async_val = self.time_limit(module_args)
        try:
            job = self._execute_module(
                module_name=self.MODULE, module_args=module_args, task_vars=task_vars, wrap_async=True
            )
        finally:
            # With it set, Ansible would poll for the job a second time.
            self._task.async_val = 0
        # The wrapper on the node removes its own directory; those made from here on are ours to remove.
        self._cleanup_remote_tmp = True
        return job

    def _watch(self, job_file: str, progress_file: str, printer: Printer) -> bool:
        """Wait until the module's answer lies in the job file; false where its process is gone and left none."""
        pause, pid = POLL_FIRST, None
        reached = present = time.monotonic()
        while True:
            time.sleep(pause)
            pause = min(pause * 1.5, POLL_MOST)
            try:
                running, alive, progress = self._look(job_file, progress_file, pid)
            except AnsibleConnectionFailure:
                if time.monotonic() - reached > PATIENCE:
                    raise
                self._connection.reset()
                continue
            if not running:
                return True
            reached = time.monotonic()
            if alive:
                present = reached
            elif reached - present > GRACE:
                return False
            if progress:
                pid = progress["pid"]
                printer.show(progress)

    def _look(self, job_file: str, progress_file: str, pid: int | None) -> tuple[bool, bool, Progress | None]:
        """Whether the module runs, whether its process is there (as far as known), and how far it is."""
        alive = f"kill -0 {pid} 2>/dev/null && echo alive || echo gone" if pid else "echo alive"
        running = f"head -c 300 {shlex.quote(job_file)} 2>/dev/null | grep -q '\"finished\": false'"
        found = self._low_level_execute_command(
            f"{running} && echo running || echo ended; {alive}; cat {shlex.quote(progress_file)} 2>/dev/null"
        )
        lines = found["stdout"].splitlines()
        if len(lines) < 2:
            raise AnsibleConnectionFailure(f"No answer from the node: {found['stderr'].strip()}")
        try:
            progress = json.loads(lines[2]) if len(lines) > 2 else None
        except ValueError:
            progress = None
        return lines[0] == "running", lines[1] == "alive", progress
