# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Breaks the box on purpose, lets the alert door work without a hand, and writes down what a client saw of it.

    ./lab break --list
    ./lab break [NAME ...]        without a name: all of them

Needs the box (./lab up) with somebody who watches it; ./lab break sees to that. Times are seconds. An outage begins
with the first question of a prober that is not answered and ends with the first that is again; it asks four times a
second.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from box import BOX, NODES, endpoints, on, plugs, reports, well
from faults import FAULTS, Fault

PROBE_S = 0.25
# How long nothing may be wrong before that counts as the end.
CALM_S = 6
RESULTS = BOX / "faults.json"


@dataclass
class Prober:
    """Asks one thing four times a second."""

    url: str
    first: float = 0.0
    last: float = 0.0
    failed: int = 0
    asked: int = 0
    answers: bool = True
    stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._ask, daemon=True)
        self.thread.start()

    def _ask(self) -> None:
        while not self.stopped.wait(PROBE_S):
            sent = time.time()
            self.answers = well(self.url)
            self.asked += 1
            if not self.answers:
                self.failed += 1
                self.first = self.first or sent
                self.last = 0.0
            elif self.first and not self.last:
                self.last = time.time()

    @property
    def outage(self) -> float | None:
        """Seconds from the first failed to the first answered question; None while it lasts."""
        if not self.first:
            return 0.0
        return self.last - self.first if self.last else None

    def stop(self) -> None:
        """Ask no more."""
        self.stopped.set()
        self.thread.join(10)


def began(nodes: tuple[str, ...], since: float) -> float | None:
    """Return when the first recovery of one of the nodes began after a moment; None where none has."""
    units = " ".join(f"homelab-recover@{node}" for node in nodes)
    text = on(
        "hydrogen", f"for unit in {units}; do systemctl show --timestamp=unix -P ExecMainStartTimestamp $unit; done"
    )
    moments = [float(line.removeprefix("@")) for line in text.split() if line.startswith("@")]
    return min((moment for moment in moments if moment >= since - 1), default=None)


def idle() -> bool:
    """Return whether no recovery runs."""
    return not on("hydrogen", "systemctl list-units --plain --no-legend --state=activating 'homelab-recover@*'").strip()


def firing() -> list[str]:
    """Return the names of the alerts that fire."""
    text = on(
        "hydrogen",
        "python3 -c \"import urllib.request as u; print(u.urlopen('http://127.0.0.1:9090/api/v1/alerts').read().decode())\"",
    )
    return [
        f"{one['labels']['alertname']}({one['labels'].get('node')})"
        for one in json.loads(text)["data"]["alerts"]
        if one["state"] == "firing"
    ]


def calm(urls: dict[str, str], deadline: float) -> bool:
    """Wait until everything answers, no alert fires and no recovery runs, for a while."""
    since = 0.0
    while time.time() < deadline:
        try:
            fine = all(well(url) for url in urls.values()) and not firing() and idle()
        except (subprocess.SubprocessError, OSError, ValueError):
            fine = False
        since = (since or time.time()) if fine else 0.0
        if since and time.time() - since > CALM_S:
            return True
        time.sleep(1)
    return False


def suffer(fault: Fault) -> dict[str, Any]:
    """Break one thing; return what was seen."""
    urls = endpoints()
    if not calm(urls, time.time() + 180):
        raise SystemExit(f"The box is not well before {fault.name}: {firing()}. Look at ./lab health.")
    for node in NODES:
        on("hydrogen", f"systemctl reset-failed homelab-recover@{node} 2>/dev/null || true")
    before = len(reports())
    probers = {name: Prober(urls[name]) for name in (*fault.servers, "gateway")}
    time.sleep(1)
    at = time.time()
    undo = fault.inject()
    called: float | None = None
    seen: set[str] = set()
    deadline = at + fault.deadline
    try:
        while time.time() < deadline:
            try:
                called = called or (began(fault.nodes, at) if fault.nodes else None)
                now = firing()
                seen.update(now)
                served = all(prober.outage is not None and prober.answers for prober in probers.values())
                if time.time() - at > 5 and not now and idle() and (called or not fault.nodes) and served:
                    break
                if fault.person and called and idle() and any(one["persons"] for one in reports()[before:]):
                    break
            except (subprocess.SubprocessError, OSError, ValueError):
                pass  # the control node is away
            time.sleep(0.5)
        ended = calm(urls, max(deadline, time.time() + 90)) if not fault.person else False
    finally:
        if undo:
            undo()
        for prober in probers.values():
            prober.stop()
    told = reports()[before:]
    steps = [f"{step['rung']} {step['name']}: {step['after']}" for one in told for step in one["steps"]]
    persons = [sentence for one in told for sentence in one["persons"]]
    outages = {name: prober.outage for name, prober in probers.items()}
    worst = max(
        (prober for name, prober in probers.items() if name in fault.servers),
        key=lambda one: math.inf if one.outage is None else one.outage,
    )
    right = ended and (not fault.rungs or any(step["rung"] in fault.rungs for one in told for step in one["steps"]))
    return {
        "name": fault.name,
        "detection": round(called - at, 1) if called else None,
        "outage": None if worst.outage is None else round(worst.outage, 1),
        "repair": round(worst.last - called, 1) if called and worst.last else None,
        "failed": {name: f"{prober.failed} of {prober.asked}" for name, prober in probers.items()},
        "outages": {name: None if one is None else round(one, 1) for name, one in outages.items()},
        "alerts": sorted(seen),
        "steps": steps,
        "persons": persons,
        "healthy": ended,
        "as_expected": bool(right or (fault.person and any(fault.person in one for one in persons))),
    }


def shown(value: float | None) -> str:
    """Return seconds for the table."""
    return "-" if value is None else f"{value:.1f}"


def table(results: list[dict[str, Any]]) -> str:
    """Return the table that people read."""
    lines = [
        "| fault | detected | repaired after that | outage | gateway | repairs | end |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in results:
        end = "healthy" if one["healthy"] else "; ".join(one["persons"]) or "NOT WELL"
        lines.append(
            f"| {one['name']} | {shown(one['detection'])} | {shown(one['repair'])} | {shown(one['outage'])} "
            f"| {one['failed']['gateway']} failed | {'; '.join(one['steps']) or '-'} | {end} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Break what is asked for, and print what was seen."""
    parser = argparse.ArgumentParser(prog="./lab break", description="Break the box on purpose, and see it repaired.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults; all of them without")
    parser.add_argument("--list", action="store_true", help="name the faults, one a line")
    words = parser.parse_args()
    known = {fault.name: fault for fault in FAULTS}
    if words.list:
        for fault in FAULTS:
            print(f"{fault.name:20} {fault.what}")
        return 0
    unknown = [name for name in words.names if name not in known]
    if unknown:
        parser.error(f"there is no fault {', '.join(unknown)}; ./lab break --list names them")
    results = []
    with plugs():
        for fault in [known[name] for name in words.names] or FAULTS:
            print(f"{fault.name}: {fault.what}", flush=True)
            result = suffer(fault)
            results.append(result)
            print(json.dumps(result, indent=1), flush=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    return 0 if all(one["as_expected"] for one in results) else 1


if __name__ == "__main__":
    sys.exit(main())
