# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How long a client waits after a model server was killed, by our unit and by Docker's `restart: always`.

    python3 tests/bench/crash.py [ROUNDS]

Needs the box (./lab up). A server of lithium and a twin of it, the same container with `--restart always`, are killed
with SIGKILL in turn; nothing of the controller runs meanwhile. A prober asks four times a second from outside for an
embedding. Printed is the time from the kill to the first answer.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

BOX = Path(__file__).resolve().parents[2] / ".cache" / "box"
ADDRESS, NODE = "172.30.99.13", "lithium"
SERVER, TWIN = "llamacpp-embed-2", "bench-twin"
SPARE_PORT = 18081
# A container that ran for less than ten seconds Docker starts again later each time.
CALM_S, PROBE_S, DEADLINE_S = 12, 0.25, 120
ALLOWED_S = 2


def on(script: str) -> str:
    """Run a script on the node as root, and return its output."""
    login = ["-i", str(BOX / "ssh/id_ed25519"), "-o", f"UserKnownHostsFile={BOX}/ssh/known_hosts", f"lab@{ADDRESS}"]
    words = ["ssh", *login, "sudo", "sh", "-s"]
    return subprocess.run(words, input=script, check=True, capture_output=True, text=True, timeout=300).stdout


def answers(port: int, key: str) -> bool:
    """Return whether the server on a port gives an embedding."""
    url = f"http://{ADDRESS}:{port}/v1/embeddings"
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, b'{"input": "x"}', headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def wait(port: int, key: str) -> float:
    """Return the seconds until it answers."""
    began = time.monotonic()
    while not answers(port, key):
        if time.monotonic() - began > DEADLINE_S:
            raise SystemExit(f"{ADDRESS}:{port} does not answer within {DEADLINE_S} s")
        time.sleep(PROBE_S)
    return time.monotonic() - began


def outage(name: str, port: int, key: str) -> float:
    """Kill a server, and return the seconds until it answers again."""
    time.sleep(CALM_S)
    on(f"kill -9 $(docker inspect -f '{{{{.State.Pid}}}}' {name})")
    return wait(port, key)


def main() -> int:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    key = on("cat /etc/homelab-inference/api-key").strip()
    found = json.loads(on(f"docker inspect {SERVER}"))[0]
    ((inside, ((published,),)),) = [(port, (bound,)) for port, bound in found["HostConfig"]["PortBindings"].items()]
    mounts = " ".join(
        f"-v {one.get('Name') or one['Source']}:{one['Destination']}:{'rw' if one['RW'] else 'ro'}"
        for one in found["Mounts"]
    )
    words = " ".join(f"'{word}'" for word in found["Args"])
    network = found["HostConfig"]["NetworkMode"]
    on(
        f"docker run -d --name {TWIN} --restart always -p {SPARE_PORT}:{inside} --network {network} {mounts}"
        f" --user '{found['Config']['User']}' --entrypoint {found['Path']} {found['Image']} {words}"
    )
    took: dict[str, list[float]] = {"our unit": [], "restart: always": []}
    try:
        wait(SPARE_PORT, key)
        for _round in range(rounds):
            # Three crashes in ten minutes are as many as a unit may have.
            on(f"systemctl reset-failed {SERVER}.service")
            took["our unit"].append(outage(SERVER, int(published["HostPort"]), key))
            took["restart: always"].append(outage(TWIN, SPARE_PORT, key))
    finally:
        on(f"docker rm -f {TWIN}")
    for name, seconds in took.items():
        print(
            f"{name:16} median {statistics.median(seconds):5.2f} s, worst {max(seconds):5.2f} s, {len(seconds)} kills"
        )
    late = statistics.median(took["our unit"]) - statistics.median(took["restart: always"])
    print(f"later by {late:.2f} s (allowed {ALLOWED_S} s)")
    return 0 if late <= ALLOWED_S else 1


if __name__ == "__main__":
    sys.exit(main())
