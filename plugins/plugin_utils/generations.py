# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keeps what was last deployed, apart from the checkout in which somebody edits: recovery works from there.

A directory beside the lock, C(.lab.generations/N/)::

    inventory.json   the declaration with everything that was templated put in, as an inventory; no secrets
    .lab.lock.yml    the lock, where a playbook with that inventory looks for it
    about.json       {"made": ISO time, "collection": version, "digest": of the two files}

A generation is there as a whole or not at all, and never changes; C(newest) is a link to the last one.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ansible_collections.homelab.inference.plugins.plugin_utils import lock as lock_module
from ansible_collections.homelab.inference.plugins.plugin_utils.lab import RUN_WORDS

KEPT, NEWEST = 5, "newest"
INVENTORY, LOCK, ABOUT = "inventory.json", ".lab.lock.yml", "about.json"
# How a host is reached. Passwords are not among them: what needs one cannot be repaired while its owner sleeps.
CONNECTION = frozenset(
    {
        *("ansible_host", "ansible_port", "ansible_user", "ansible_connection", "ansible_python_interpreter"),
        *("ansible_ssh_host", "ansible_ssh_port", "ansible_ssh_user", "ansible_private_key_file"),
        *("ansible_ssh_private_key_file", "ansible_ssh_common_args", "ansible_ssh_extra_args"),
        *("ansible_become", "ansible_become_method", "ansible_become_user", "ansible_become_exe"),
        *("ansible_become_flags", "ansible_shell_type"),
    }
)

# What an owner says to the roles that recovery uses. No secrets among them: those lie on their nodes.
ROLES = ("haproxy_", "inference_node_")
ROLE_WORDS = frozenset({"litellm_published_address", "litellm_request_timeout"})
ROLE_SECRETS = frozenset({"inference_node_api_key", "inference_node_url_token"})

# Where its lock lies it says itself; and what one run was asked for is no declaration.
LEFT_OUT = frozenset({"lab_lock_file", *RUN_WORDS})


def directory(lock_path: Path) -> Path:
    """Return where the generations of the lab with this lock are kept."""
    return lock_module.beside(lock_path, ".generations")


def origin(lock_path: Path) -> Path:
    """Return the lock of the lab that a sealed lock belongs to; any other path is returned as it is."""
    home = lock_path.parent.parent
    if not home.name.endswith(".generations"):
        return lock_path
    return home.with_name(home.name.removesuffix(".generations") + ".lock.yml")


def inventory(
    hostvars: dict[str, dict[str, Any]], groups: dict[str, list[str]], more: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return an inventory that declares the same lab and needs nothing else.

    :param hostvars: per host its variables, values already templated; of them the declaration and the way to the host
        are taken.
    :param more: names of further variables that are taken.
    """
    hosts = {
        host: {
            name: value
            for name, value in variables.items()
            if kept(name)
            or name in more
            or (name.startswith(("lab_", "node_")) and not name.startswith("lab_secret_") and name not in LEFT_OUT)
        }
        for host, variables in hostvars.items()
    }
    children = {
        name: {"hosts": {host: {} for host in members if host in hosts}}
        for name, members in groups.items()
        if name not in ("all", "ungrouped") and not name.startswith("lab_")
    }
    return {"all": {"hosts": hosts, "children": children}}


def kept(name: str) -> bool:
    """Return whether a variable is kept that is no part of the declaration."""
    return name in CONNECTION | ROLE_WORDS or (name.startswith(ROLES) and name not in ROLE_SECRETS)


def newest(home: Path) -> Path | None:
    """Return the directory of the newest generation; None where there is none.

    It is the one that C(newest) names: a control node gets those of several checkouts, each with numbers of its own.
    """
    found = _all(home)
    named = (home / NEWEST).resolve().name
    return next((one for one in found if one.name == named), found[-1] if found else None)


def seal(home: Path, sealed: dict[str, Any], lock: dict[str, Any], collection: str) -> int:
    """Keep this as the newest generation, unless it is that already; return its number.

    :param home: see directory().
    :param sealed: see inventory().
    :param collection: version of the collection.
    :raises OSError: the disk is full, or the directory may not be written.
    """
    files = {
        INVENTORY: json.dumps(sealed, indent=1, sort_keys=True, default=str) + "\n",
        # Ansible's own strings are none that YAML knows.
        LOCK: lock_module.render(json.loads(json.dumps(lock))),
    }
    digest = hashlib.sha256("".join(files.values()).encode()).hexdigest()
    before = _all(home)
    if before and about(before[-1]).get("digest") == digest:
        _point(home, before[-1].name)
        return int(before[-1].name)
    number = int(before[-1].name) + 1 if before else 1
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=".sealing-", dir=home))
    try:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        files[ABOUT] = json.dumps({"made": now, "collection": collection, "digest": digest}, indent=1) + "\n"
        for name, text in files.items():
            with (made / name).open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            (made / name).chmod(0o600)
        made.rename(home / str(number))
        _point(home, str(number))
    except OSError:
        shutil.rmtree(made, ignore_errors=True)
        raise
    for old in before[: max(len(before) + 1 - KEPT, 0)]:
        shutil.rmtree(old, ignore_errors=True)
    return number


def _point(home: Path, number: str) -> None:
    """Let C(newest) be this generation."""
    link = home / ".newest"
    link.unlink(missing_ok=True)
    link.symlink_to(number)
    link.replace(home / NEWEST)


def about(generation: Path) -> dict[str, Any]:
    """Return when and by what a generation was made."""
    try:
        return dict(json.loads((generation / ABOUT).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _all(home: Path) -> list[Path]:
    """Return the generations, oldest first; a directory that is not whole is none."""
    if not home.is_dir():
        return []
    return sorted((one for one in home.iterdir() if one.name.isdigit() and about(one)), key=lambda one: int(one.name))
