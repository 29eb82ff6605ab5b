#!/usr/bin/python
# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Puts keys into Docker's daemon.json beside the owner's, and takes them out again."""

from __future__ import annotations

DOCUMENTATION = r"""
module: docker_daemon_config
short_description: Merge keys into Docker's daemon.json and take them out again
version_added: 0.1.0
author: homelab.inference contributors (!UNKNOWN)
description:
  - Puts the wanted keys into C(daemon.json) beside those that are there already.
    A key that somebody else has set is never touched, and reported as RV(kept).
  - Notes in a record what it put there, so that O(state=absent) takes out exactly that.
    A value that somebody changed by hand since then is theirs.
  - Keys that the engine is given on its command line are left out, because it refuses to start with both.
  - Has the file checked by C(dockerd --validate) where the engine can do that (23 and newer).
  - Tells a running engine to read its file again. What it cannot take over so is reported as RV(restart_required),
    in later runs too, until it was restarted. The module restarts nothing.
extends_documentation_fragment:
  - homelab.inference.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
    details: Shows only the keys that change, since the owner's keys may hold the password of a proxy.
  idempotent:
    support: full
options:
  path:
    description: The configuration file of the engine.
    type: path
    default: /etc/docker/daemon.json
  record_path:
    description: Where the module notes which keys it has put into the file.
    type: path
    default: /etc/homelab-inference/docker-daemon.json
  settings:
    description: Keys with their whole values, for example C(log-driver).
    type: dict
    default: {}
  additions:
    description: Lists and dictionaries to which items are added, for example C(insecure-registries) or C(features).
    type: dict
    default: {}
  state:
    description:
      - V(absent) takes out of the file what the record says.
      - It removes the file when the module made it and nothing else is in it.
    type: str
    choices: [present, absent]
    default: present
seealso:
  - name: The daemon.json reference
    description: All keys of the file.
    link: https://docs.docker.com/reference/cli/dockerd/#daemon-configuration-file
"""

EXAMPLES = r"""
- name: Rotate the logs of containers, and keep them running while the engine restarts
  homelab.inference.docker_daemon_config:
    settings:
      log-driver: json-file
      log-opts: {max-size: 10m, max-file: "3"}
      live-restore: true
    additions:
      insecure-registries: ["192.0.2.10:5000"]

- name: Take our keys out again
  homelab.inference.docker_daemon_config:
    state: absent
"""

RETURN = r"""
kept:
  description: Keys that stay as the machine's owner has them although another value is wanted.
  type: list
  elements: dict
  returned: always
  sample: [{"key": "log-driver", "wanted": "json-file", "why": "it is set to journald"}]
changed_keys:
  description: Keys of the file that this run changes.
  type: list
  elements: str
  returned: always
  sample: [live-restore, log-driver]
restart_required:
  description: Whether the running engine has yet to be restarted for keys that this module changed.
  type: bool
  returned: always
  sample: true
restart_keys:
  description: The keys that wait for the restart.
  type: list
  elements: str
  returned: always
  sample: [log-driver]
"""

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.homelab.inference.plugins.module_utils.docker_daemon import (
    DockerDaemonError,
    Merged,
    changed_keys,
    keys_in_flags,
    merge,
    needs_restart,
    parse,
    render,
    take_back,
)

PIDFILE = Path("/run/docker.pid")


def running_engine() -> tuple[int, str, list[str]] | None:
    """Process id, a mark that no other engine ever has, and the command line of the machine's engine."""
    try:
        pid = int(PIDFILE.read_text(encoding="ascii"))
        process = Path("/proc") / str(pid)
        if process.joinpath("comm").read_text(encoding="utf-8").strip() != "dockerd":
            return None
        started = process.joinpath("stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
        argv = process.joinpath("cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except (OSError, ValueError, IndexError):
        return None
    return pid, f"{pid}:{started}", argv


def read(path: Path) -> str | None:
    """The text of a file, None where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeError) as exc:
        raise DockerDaemonError(f"Reading {path} failed: {exc}. Nothing was changed.") from exc


def write(module: AnsibleModule, path: Path, text: str) -> None:
    """Replaces the file in one step; its owner and mode stay."""
    handle, temporary = tempfile.mkstemp(dir=module.tmpdir)
    with os.fdopen(handle, "w", encoding="utf-8") as out:
        out.write(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    module.atomic_move(temporary, str(path))


def check_with_engine(module: AnsibleModule, path: Path, text: str) -> None:
    """Asks dockerd what it thinks of the file. Engines before 23 do not know the question."""
    dockerd = shutil.which("dockerd", path="/usr/bin:/usr/sbin:/usr/local/bin:/usr/local/sbin:/snap/bin")
    if dockerd is None:
        return
    with tempfile.NamedTemporaryFile("w", dir=module.tmpdir, suffix=".json", encoding="utf-8") as candidate:
        candidate.write(text)
        candidate.flush()
        rc, dummy, err = module.run_command([dockerd, "--validate", "--config-file", candidate.name])
    if rc != 0 and "unknown flag" not in err:
        cause = (
            err.strip().splitlines()[-1].replace(candidate.name, str(path)) if err.strip() else f"it ended with {rc}"
        )
        raise DockerDaemonError(
            f"Changing {path} failed: dockerd --validate refuses it ({cause}). "
            "Correct the settings; nothing was changed."
        )


def run(module: AnsibleModule) -> dict[str, Any]:
    """Compares, and outside of check mode writes the record and then the file."""
    # A link stays a link: the file behind it is the one that changes.
    path = Path(module.params["path"]).resolve()
    record_path = Path(module.params["record_path"])
    text = read(path)
    before = parse(text or "", str(path))
    record_text = read(record_path)
    recorded = parse(record_text or "", str(record_path))
    engine = running_engine()
    for key, value in module.params["additions"].items():
        if not isinstance(value, (list, dict)):
            raise DockerDaemonError(
                f"Adding to {key} failed: only a list or a dictionary can be added to. "
                "Give it as a list, or under settings."
            )

    if module.params["state"] == "present":
        flags = keys_in_flags(engine[2]) if engine else set()
        target = merge(before, recorded, module.params["settings"], module.params["additions"], flags)
    else:
        target = Merged(take_back(before, recorded.get("settings", {}), recorded.get("additions", {})))
    changed = changed_keys(before, target.config)

    waiting: set[str] = set()
    if engine:
        waiting = set(needs_restart(changed, target.config))
        if recorded.get("waiting", {}).get("engine") == engine[1]:
            waiting |= set(recorded["waiting"]["keys"])

    made = recorded.get("made", text is None)
    if module.params["state"] == "absent":
        record = None
        record_changed = record_text is not None
    else:
        record = {"made": made, "settings": target.settings, "additions": target.additions}
        if waiting and engine:
            record["waiting"] = {"engine": engine[1], "keys": sorted(waiting)}
        # That a restart has happened makes the old note void, which is no change of its own.
        noted = {key: value for key, value in recorded.items() if key != "waiting" or waiting}
        record_changed = record_text is None or record != noted
    remove_file = record is None and made and text is not None and not target.config

    result = {
        "changed": bool(changed) or record_changed or remove_file,
        "kept": target.kept,
        "changed_keys": changed,
        "restart_required": bool(waiting),
        "restart_keys": sorted(waiting),
        "diff": {
            "before_header": str(path),
            "after_header": str(path),
            "before": render({key: before[key] for key in changed if key in before}, ""),
            "after": render({key: target.config[key] for key in changed if key in target.config}, ""),
        },
    }
    if changed and not remove_file:
        check_with_engine(module, path, render(target.config, text or ""))
    if module.check_mode:
        return result

    # The record comes first: cut off in between, the next run finds nothing of ours in the file and goes on.
    if record is not None and record_changed:
        write(module, record_path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    if remove_file:
        path.unlink()
    elif changed:
        write(module, path, render(target.config, text or ""))
    if record is None:
        record_path.unlink(missing_ok=True)
    if changed and engine:
        os.kill(engine[0], signal.SIGHUP)
    return result


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "default": "/etc/docker/daemon.json"},
            "record_path": {"type": "path", "default": "/etc/homelab-inference/docker-daemon.json"},
            "settings": {"type": "dict", "default": {}},
            "additions": {"type": "dict", "default": {}},
            "state": {"type": "str", "default": "present", "choices": ["present", "absent"]},
        },
        supports_check_mode=True,
    )
    try:
        result = run(module)
    except DockerDaemonError as exc:
        module.fail_json(msg=str(exc))
    except OSError as exc:
        module.fail_json(
            msg=f"Changing {module.params['path']} failed: {exc}. Free space or correct the rights and run again."
        )
    module.exit_json(**result)


if __name__ == "__main__":
    main()
