# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The alert door of a lab.

`receive` is run by webhook, as a user without rights: it reads Alertmanager's message and leaves an empty file in the
spool for each node that has to be recovered. `start` is run by systemd when there is something in the spool, as root:
it has systemd start the recoveries. Root takes nothing from the other side but the names of files that it knows.
`hold` is for whoever changes the lab from elsewhere: no recovery starts any more, and it waits for those that run.
`release` ends that, as does half an hour without another `hold`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS = Path("/etc/homelab-inference/healer.json")
SPOOL = Path("/run/homelab-healer")
STATE = Path("/var/lib/homelab-inference/healer/state.json")
# There while somebody changes the lab from elsewhere, and for so many seconds after the last word of it.
HOLD = Path("/run/homelab-healer-hold")
HOLD_S = 1800
NODE = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
MESSAGE_BYTES = 1024 * 1024
MESSAGE_ALERTS = 1000
SPOOL_FILES = 1000
# Why a request starts nothing. The first three are told by `receive`, the others by `start`.
REASONS = ("message", "no_node", "unknown_node", "held", "running", "cooldown", "budget", "failed")


class Refused(Exception):
    """A message that is not Alertmanager's."""


def say(text: str) -> None:
    print(text, flush=True)


def shown(value: object) -> str:
    """A value from outside, so that it cannot forge a line of the log."""
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:200] + "..."


# --- receive ----------------------------------------------------------------------------------------------------------


def alerts(data: bytes) -> list[dict[str, Any]]:
    """The firing alerts of a message."""
    if len(data) > MESSAGE_BYTES:
        raise Refused(f"it is longer than {MESSAGE_BYTES} bytes")
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        raise Refused("it is not JSON") from None
    if not isinstance(message, dict) or message.get("version") != "4":
        raise Refused("it is not a message of Alertmanager, version 4")
    found = message.get("alerts")
    if not isinstance(found, list) or len(found) > MESSAGE_ALERTS:
        raise Refused(f"it has no list of at most {MESSAGE_ALERTS} alerts")
    if not all(isinstance(alert, dict) and isinstance(alert.get("labels"), dict) for alert in found):
        raise Refused("an alert in it has no labels")
    return [alert for alert in found if alert.get("status") == "firing"]


def leave(name: str) -> None:
    """Put a file into the spool. One that is there already says the same."""
    os.close(os.open(SPOOL / name, os.O_CREAT | os.O_WRONLY, 0o600))


def refuse(reason: str, text: str) -> None:
    """Say it, and have it counted."""
    say(text)
    if sum(1 for dummy in SPOOL.iterdir()) < SPOOL_FILES:
        leave(f"refused:{reason}:{secrets.token_hex(8)}")


def receive(path: Path) -> None:
    with path.open("rb") as file:
        data = file.read(MESSAGE_BYTES + 1)
    try:
        firing = alerts(data)
    except Refused as why:
        refuse("message", f"The message starts nothing: {why}.")
        return
    known = json.loads(SETTINGS.read_text(encoding="utf-8"))["nodes"]
    seen: list[object] = []
    for alert in firing:
        name = alert["labels"].get("node")
        if name in seen:
            continue
        seen.append(name)
        if name is None:
            refuse("no_node", f"Alert {shown(alert['labels'].get('alertname'))} starts nothing: it has no label node.")
        elif not isinstance(name, str) or name not in known:
            refuse("unknown_node", f"Node {shown(name)} starts nothing: it is not one of healer_nodes.")
        else:
            leave(f"node:{name}")
            say(f"Recovery of {name} was asked for.")
    if not firing:
        say("No alert is firing, nothing to start.")


# --- start ------------------------------------------------------------------------------------------------------------


def unit_of(node: str) -> str:
    """A node's name needs no escaping: all its characters may stand in the name of a unit."""
    return f"homelab-recover@{node}.service"


def systemctl(*words: str) -> subprocess.CompletedProcess[str]:
    command = ["/usr/bin/systemctl", *words]
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "systemd does not answer within 60 s")


def state_of(unit: str) -> dict[str, str]:
    keys = "ActiveState,InvocationID,InactiveEnterTimestampMonotonic,Job"
    lines = systemctl("show", "--property", keys, unit).stdout.splitlines()
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    # No job is an empty word, or nought in older versions of systemd.
    return {key: "" if key == "Job" and value == "0" else value for key, value in found.items()}


def held() -> bool:
    try:
        return time.time() - HOLD.stat().st_mtime < HOLD_S
    except OSError:
        return False


def hold() -> None:
    HOLD.touch()
    # What was about to start when it was looked last has started then.
    time.sleep(1)
    told = False
    while True:
        running = systemctl("list-units", "--plain", "--no-legend", "--state=activating", "homelab-recover@*")
        if running.returncode or not running.stdout.strip():
            return
        if not told:
            say(f"Waiting for {', '.join(line.split()[0] for line in running.stdout.splitlines())}.")
            told = True
        time.sleep(1)
        HOLD.touch()


def start_node(node: str, settings: dict[str, Any]) -> str:
    """Have systemd start a recovery. Returns why it was not, or nothing."""
    if held():
        say(f"Recovery of {node} was not started: the lab is being changed.")
        return "held"
    unit = unit_of(node)
    before = state_of(unit)
    if before.get("ActiveState") in ("activating", "active", "deactivating") or before.get("Job"):
        say(f"Recovery of {node} was not started again: it is running.")
        return "running"
    ended = int(before.get("InactiveEnterTimestampMonotonic") or 0) / 1e6
    since = time.monotonic() - ended
    if ended and since < settings["cooldown"]:
        pause = settings["cooldown"]
        say(f"Recovery of {node} was not started: one ended {since:.0f} s ago, and {pause} s lie between two.")
        return "cooldown"
    asked = systemctl("start", "--no-block", unit)
    if asked.returncode:
        say(f"Recovery of {node} was not started: {shown(asked.stdout.strip())}")
        return "failed"
    # The limit is looked at when the job runs.
    deadline = time.monotonic() + 10
    now = state_of(unit)
    while now.get("InvocationID") == before.get("InvocationID") and time.monotonic() < deadline:
        if not now.get("Job") and now.get("ActiveState") != "activating":
            break
        time.sleep(0.1)
        now = state_of(unit)
    if now.get("InvocationID") != before.get("InvocationID"):
        say(f"Recovery of {node} was started. What it does: journalctl -u homelab-recover@{node}")
        return ""
    # Result tells of the limit only where no recovery failed before.
    if now.get("ActiveState") == "failed":
        say(
            f"Recovery of {node} was not started: {settings['budget']} in {settings['interval']} s are used up. "
            f"See why they did not help (journalctl -u homelab-recover@{node}), mend it, "
            f"then run: systemctl reset-failed homelab-recover@{node}"
        )
        return "budget"
    say(f"Recovery of {node} was not started: read `systemctl status homelab-recover@{node}`.")
    return "failed"


def take() -> list[str]:
    """Empty the spool. Its owner may put anything there, so nothing in it is opened."""
    taken = []
    for path in sorted(SPOOL.iterdir()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
            continue
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            path.unlink()
            taken.append(path.name)
    return taken


def write(path: Path, text: str) -> None:
    """Nobody ever sees half of it."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.chmod(0o644)
    new.replace(path)


def metrics(state: dict[str, dict[str, float]]) -> str:
    accepted = "homelab_healer_recovery_started_timestamp_seconds"
    refused = "homelab_healer_requests_refused_total"
    lines = [f"# HELP {accepted} When the last recovery of a node was started.", f"# TYPE {accepted} gauge"]
    lines += [f'{accepted}{{node="{node}"}} {when:.0f}' for node, when in sorted(state["started"].items())]
    lines += [f"# HELP {refused} Requests that started no recovery, by reason.", f"# TYPE {refused} counter"]
    lines += [f'{refused}{{reason="{reason}"}} {state["refused"].get(reason, 0):.0f}' for reason in REASONS]
    return "\n".join(lines) + "\n"


def remembered() -> dict[str, dict[str, float]]:
    try:
        state = json.loads(STATE.read_text(encoding="utf-8"))
        return {"started": dict(state["started"]), "refused": dict(state["refused"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"started": {}, "refused": {}}


def start() -> None:
    # A storm of alerts is one look into the spool.
    time.sleep(1)
    settings = json.loads(SETTINGS.read_text(encoding="utf-8"))
    state = remembered()
    reasons = []
    for name in take():
        kind, dummy, rest = name.partition(":")
        if kind == "node" and rest in settings["nodes"] and NODE.fullmatch(rest):
            reason = start_node(rest, settings)
            if not reason:
                state["started"][rest] = time.time()
            reasons.append(reason)
        elif kind == "refused":
            reasons.append(rest.partition(":")[0])
    for reason in reasons:
        if reason in REASONS:
            state["refused"][reason] = state["refused"].get(reason, 0) + 1
    state["started"] = {node: when for node, when in state["started"].items() if node in settings["nodes"]}
    try:
        write(STATE, json.dumps(state))
        write(Path(settings["metrics"]) / "healer.prom", metrics(state))
    except OSError as error:
        say(f"Writing the metrics failed: {error}.")


def main() -> int:
    if sys.argv[1:] == ["receive"]:
        receive(Path(os.environ["HEALER_MESSAGE"]))
    elif sys.argv[1:] == ["start"]:
        start()
    elif sys.argv[1:] == ["hold"]:
        hold()
    elif sys.argv[1:] == ["release"]:
        HOLD.unlink(missing_ok=True)
    else:
        say("healer.py receive | start | hold | release")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
