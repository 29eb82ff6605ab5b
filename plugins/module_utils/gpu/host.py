# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The machine that is asked: its files, its commands, its sockets. Tests give it another root and other answers."""

from __future__ import annotations

import os
import platform
import socket
from pathlib import Path
from typing import Callable

from ansible_collections.homelab.inference.plugins.module_utils.gpu import command

# A service's PATH is short, and WSL keeps the driver's tools in a place of its own.
TOOL_FOLDERS = ("/usr/bin", "/usr/local/bin", "/usr/sbin", "/opt/bin", "/usr/lib/wsl/lib")


def connect(endpoint: str, timeout: float = 2.0) -> str | None:
    """Why nothing listens on HOST:PORT, or None."""
    name, _colon, port = endpoint.rpartition(":")
    try:
        socket.create_connection((name, int(port)), timeout).close()
    except (OSError, ValueError) as exc:
        return str(exc)
    return None


class Host:
    """One machine."""

    def __init__(
        self,
        root: str | Path = "/",
        deadline: float = 20.0,
        system: str | None = None,
        runner: Callable[[list[str], float], command.Answer] = command.run,
        connector: Callable[[str], str | None] = connect,
    ) -> None:
        self.root = Path(root)
        self.deadline = deadline
        self.system = system or platform.system()
        self.connect = connector
        self._runner = runner

    def path(self, path: str) -> Path:
        """The path below the root."""
        return self.root / path.lstrip("/")

    def run(self, argv: list[str]) -> command.Answer:
        """What a command answers within the deadline."""
        return self._runner(argv, self.deadline)

    def tool(self, name: str) -> str | None:
        """Where a program is, or None."""
        for folder in [*os.environ.get("PATH", "").split(os.pathsep), *TOOL_FOLDERS]:
            path = self.path(f"{folder}/{name}")
            if folder and os.access(path, os.X_OK):
                return str(path)
        return None

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        return self.path(path).exists()

    def read(self, path: str) -> str | None:
        """A small file's text without the blanks and NULs around it, or None."""
        try:
            return self.path(path).read_text(encoding="utf-8", errors="replace").strip(" \t\r\n\0")
        except OSError:
            return None

    def number(self, path: str) -> int | None:
        """The decimal number in a file, or None."""
        text = self.read(path)
        return int(text) if text and text.isdigit() else None

    def names(self, path: str) -> list[str]:
        """What a folder holds, sorted; nothing when there is no such folder."""
        try:
            return sorted(entry.name for entry in self.path(path).iterdir())
        except OSError:
            return []

    def target(self, path: str) -> str | None:
        """The last part of what a symbolic link points to, or None."""
        link = self.path(path)
        return link.resolve().name if link.is_symlink() else None

    def groups(self, paths: list[str]) -> list[int]:
        """The numeric groups that own these files: names do not hold inside containers."""
        return sorted({self.path(path).stat().st_gid for path in paths if self.exists(path)})

    def memory_mib(self) -> int:
        """The machine's own memory."""
        for line in (self.read("/proc/meminfo") or "").splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) // 1024
        return 0
