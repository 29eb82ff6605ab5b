# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs model_volume with progress, and sends what lies on the controller."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure, AnsibleError
from ansible_collections.homelab.inference.plugins.plugin_utils.progress import (
    PATIENCE,
    Printer,
    ProgressActionModule,
)

# Each piece is a command of its own on the node. It should take about two seconds, so that progress shows on a slow
# link and a fast one is not slowed by starting commands.
PIECE_LEAST, PIECE_MOST = 1 << 20, 64 << 20


def next_piece(piece: int, seconds: float) -> int:
    """The size of the piece after one that took so long."""
    if seconds < 1:
        return min(piece * 2, PIECE_MOST)
    return max(piece // 2, PIECE_LEAST) if seconds > 4 else piece


class ActionModule(ProgressActionModule):
    """The module makes the volume and asks for what it lacks; that is appended to the part; then the module checks it.

    It goes over Ansible's own connection: that is always there, goes through become with its password, and can be
    continued at any byte. rsync would have to be on both sides and would need sudo without a password.
    """

    MODULE = "homelab.inference.model_volume"

    def run_module(self, module_args: dict[str, Any], task_vars: dict[str, Any]) -> dict[str, Any]:
        """Run the module, and again after the files of the controller were sent."""
        files = module_args.get("files")
        if isinstance(files, list):
            module_args["files"] = [self._located(one) if isinstance(one, dict) else one for one in files]
        first = super().run_module(module_args, task_vars)
        transfers = first.pop("transfers", [])
        if not transfers:
            return first
        sent = sum(self._send(one, self.printer(task_vars)) for one in transfers)
        second = super().run_module(module_args, task_vars)
        if second.get("failed"):
            return {**second, "changed": first["changed"]}
        if second.pop("transfers", []):
            return {"failed": True, "msg": "Files changed on the controller while they were sent. Run again."}
        digests = {one["name"]: one["sha256"] for one in second["files"]}
        return {
            **second,
            "changed": True,
            "diff": first["diff"],
            "files": [{**one, "sha256": digests[one["name"]]} for one in first["files"]],
            "fetched_bytes": first["fetched_bytes"] + second["fetched_bytes"] + sent,
            "hashed_bytes": first["hashed_bytes"] + second["hashed_bytes"],
        }

    def _located(self, entry: dict[str, Any]) -> dict[str, Any]:
        """A file entry whose controller_path is found and measured; on the controller itself it is simply a path."""
        if not entry.get("controller_path"):
            return entry
        try:
            path = Path(self._find_needle("files", str(entry["controller_path"])))
        except AnsibleError:
            if entry.get("size") in (None, ""):
                raise
            # Who repairs a lab need not have the files that it was deployed with, as long as its nodes have them.
            return entry
        if self._connection.transport.rpartition(".")[2] == "local":
            return {**{key: entry[key] for key in entry if key != "controller_path"}, "path": str(path)}
        status = path.stat()
        if entry.get("size") not in (None, "", status.st_size) and int(entry["size"]) != status.st_size:
            raise AnsibleActionFail(
                f"{path} has {status.st_size} bytes, but {entry.get('name')} is declared with {entry['size']}. "
                "Correct size, or find the file that was meant."
            )
        return {**entry, "controller_path": str(path), "size": status.st_size, "_mtime_ns": status.st_mtime_ns}

    def _send(self, transfer: dict[str, Any], printer: Printer) -> int:
        """Append to the part on the node what it lacks, and return how much that was."""
        source, part = Path(transfer["path"]), shlex.quote(transfer["part"])
        if not source.is_file():
            raise AnsibleActionFail(
                f"{transfer['name']} is missing or damaged on the node, and {source} is not on this machine. "
                "Run this where that file lies."
            )
        total = source.stat().st_size
        begin = position = transfer["done"]
        piece, reached = PIECE_LEAST, time.monotonic()
        with source.open("rb") as handle:
            while position < total:
                handle.seek(position)
                data = handle.read(piece)
                started = time.monotonic()
                try:
                    # After a broken connection the node may hold more than it told: each piece says where it begins.
                    answer = self._low_level_execute_command(
                        f"truncate -s {position} {part} && cat >> {part} && wc -c < {part}", in_data=data
                    )
                except AnsibleConnectionFailure:
                    if time.monotonic() - reached > PATIENCE:
                        raise
                    self._connection.reset()
                    time.sleep(2)
                    continue
                if answer["rc"] != 0:
                    cause = answer["stderr"].strip() or answer["stdout"].strip()
                    raise AnsibleActionFail(
                        f"{transfer['name']} could not be sent: {cause}. "
                        f"{position} bytes are kept on the node; run again to continue."
                    )
                position = int(answer["stdout"].split()[-1])
                reached = time.monotonic()
                piece = next_piece(piece, reached - started)
                phase = f"sending {transfer['name']}"
                printer.show({"phase": phase, "done": position, "total": total, "unit": "bytes"})
        return position - begin
