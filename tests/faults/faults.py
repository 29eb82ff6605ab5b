# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is broken on purpose, a function for each fault.

A fault gets the box and breaks something for real. What it returns is called when the lab is well again, or when time
is over, to give back what recovery cannot: a cable, a switch.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from box import NODES, container, docker, endpoints, generate, lab, on, pid

Undo = Callable[[], object]
NETWORK = "homelab-box"


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Fault:
    """A fault and what is expected of its repair."""

    name: str
    what: str
    inject: Callable[[], Undo | None]
    # Whose recovery is looked for; none where nobody is to be called.
    nodes: tuple[str, ...] = ("lithium",)
    # The servers that a prober watches.
    servers: tuple[str, ...] = ("embed-2",)
    # Rungs, one of which the report has to name; empty where what is there repairs itself.
    rungs: frozenset[str] = field(default_factory=frozenset)
    # A sentence for a person that the end may be, instead of a lab that is well.
    person: str = ""
    deadline: int = 300


def container_killed() -> None:
    """The unit starts it again at once; nobody is called."""
    on("lithium", "docker kill llamacpp-embed-2")


def container_stopped_by_hand() -> None:
    on("lithium", "systemctl stop llamacpp-embed-2.service")


def container_removed() -> None:
    on("lithium", "systemctl stop llamacpp-embed-2.service; docker rm -f llamacpp-embed-2")


def server_hung() -> None:
    on("lithium", f"kill -STOP {pid('lithium', 'llamacpp-embed-2')}")


def engine_stopped() -> None:
    on("lithium", "systemctl stop docker.socket docker.service")


def engine_hung() -> None:
    on("lithium", "systemctl kill --kill-whom=main --signal=SIGSTOP docker.service")


def gateway_killed() -> None:
    on("hydrogen", "docker kill litellm")


def gateway_stopped_by_hand() -> None:
    on("hydrogen", "docker stop litellm")


def gpu_lost_at_run() -> Undo:
    """A server learns of it when somebody asks, so somebody does."""
    key, over = on("helium", "cat /etc/homelab-inference/api-key").strip(), threading.Event()
    urls = [url.removesuffix("/health") for name, url in endpoints().items() if name in ("chat", "code")]

    def use() -> None:
        while not over.wait(1):
            for url in urls:
                generate(url, key)

    threading.Thread(target=use, daemon=True).start()
    on("helium", "systemctl kill --signal=SIGKILL emulated-gpu-0; systemctl stop emulated-gpu-0")
    back = threading.Timer(45, lambda: on("helium", "systemctl start emulated-gpu-0"))
    back.start()

    def undo() -> None:
        back.join()
        over.set()

    return undo


def model_corrupted() -> Undo:
    """A file that came from the machine that deployed it, and looks as before: size and time are as noted."""
    folders = on("lithium", "docker inspect -f '{{range .Mounts}}{{.Source}} {{end}}' llamacpp-embed-2").split()
    (path,) = on("lithium", f"find {' '.join(folders)} -name '*.gguf'").split()
    on(
        "lithium",
        f"systemctl stop llamacpp-embed-2.service; touch -r {path} /tmp/before; "
        f"dd if=/dev/zero of={path} bs=64 count=1 conv=notrunc; touch -r /tmp/before {path}; rm /tmp/before",
    )
    return lambda: lab("recover")


def config_changed_by_hand() -> None:
    """Somebody made the container anew, with an option that the server does not know."""
    image = on("lithium", "docker inspect -f '{{.Config.Image}}' llamacpp-embed-2").strip()
    on(
        "lithium",
        "systemctl stop llamacpp-embed-2.service; docker rm -f llamacpp-embed-2; "
        f"docker create --name llamacpp-embed-2 {image} --no-such-option; "
        "systemctl start --no-block llamacpp-embed-2.service",
    )


def node_partitioned() -> Undo:
    docker("network", "disconnect", "--force", NETWORK, "lithium")
    back = threading.Timer(60, lambda: docker("network", "connect", "--ip", NODES["lithium"], NETWORK, "lithium"))
    back.start()
    return back.join


def node_stopped() -> None:
    docker("stop", "lithium")


def node_rebooted() -> None:
    docker("restart", "lithium")


def healer_cut_off() -> Undo:
    docker("network", "disconnect", "--force", NETWORK, "hydrogen")
    back = threading.Timer(60, lambda: docker("network", "connect", "--ip", NODES["hydrogen"], NETWORK, "hydrogen"))
    back.start()
    return back.join


def two_at_once() -> None:
    engine_hung()
    on("helium", f"systemctl stop {container('helium', 'embed')}.service")


def cold_start() -> Undo:
    """Everything at once, in any order, one node a minute late."""
    late = "lithium"
    docker("stop", *NODES)
    first = [node for node in NODES if node != late]
    random.shuffle(first)
    for node in first:
        docker("start", node)
    back = threading.Timer(60, lambda: docker("start", late))
    back.start()
    return back.join


def during_recovery() -> None:
    """The server that is being repaired hangs again."""
    server_hung()
    deadline = time.monotonic() + 120
    while "activating" not in on("hydrogen", "systemctl is-active homelab-recover@lithium || true"):
        if time.monotonic() > deadline:
            raise TimeoutError("nobody was called")
        time.sleep(0.5)
    on("lithium", "systemctl stop llamacpp-embed-2.service; docker rm -f llamacpp-embed-2 || true")


REMADE = frozenset({"restart", "kill", "recreate"})
FAULTS = [
    Fault("container-killed", "a server's container is killed", container_killed, nodes=()),
    Fault("container-stopped", "a server is stopped by hand", container_stopped_by_hand, rungs=REMADE),
    Fault("container-removed", "a server's container is removed", container_removed, rungs=REMADE),
    Fault("server-hung", "a llama-server is stopped with SIGSTOP", server_hung, rungs=frozenset({"kill"})),
    Fault(
        "engine-stopped", "a container engine is stopped", engine_stopped, rungs=frozenset({"restart the engine of"})
    ),
    Fault("engine-hung", "a dockerd is stopped with SIGSTOP", engine_hung, rungs=frozenset({"restart the engine of"})),
    Fault("gateway-killed", "the gateway is killed", gateway_killed, nodes=(), servers=("gateway",)),
    Fault(
        "gateway-stopped",
        "the gateway is stopped by hand",
        gateway_stopped_by_hand,
        nodes=("hydrogen",),
        servers=("gateway",),
        rungs=frozenset({"restart"}),
    ),
    Fault(
        "gpu-lost",
        "an emulated GPU is killed, and back after 45 s",
        gpu_lost_at_run,
        nodes=("helium",),
        servers=("chat", "code"),
        rungs=REMADE,
    ),
    Fault(
        "model-corrupted",
        "a model file is damaged that the control node has no copy of",
        model_corrupted,
        person="is missing or damaged on the node",
    ),
    Fault("config-changed", "a container is made anew by hand, wrongly", config_changed_by_hand, rungs=REMADE),
    Fault("node-partitioned", "a node is cut off for 60 s", node_partitioned, rungs=frozenset({"wake"})),
    Fault("node-stopped", "a node is switched off; its plug can switch it on", node_stopped, rungs=frozenset({"wake"})),
    Fault("node-rebooted", "a node is restarted", node_rebooted, nodes=()),
    Fault("healer-cut-off", "the control node is cut off for 60 s", healer_cut_off, nodes=(), servers=("gateway",)),
    Fault(
        "two-at-once",
        "an engine hangs, and a server of another node is stopped",
        two_at_once,
        nodes=("lithium", "helium"),
        servers=("embed",),
        rungs=frozenset({"restart the engine of", *REMADE}),
    ),
    Fault("during-recovery", "what is being repaired breaks again", during_recovery, rungs=REMADE | {"kill"}),
    Fault(
        "cold-start",
        "all nodes are off and come back in any order, one a minute late",
        cold_start,
        nodes=(),
        servers=("embed-2", "gateway"),
        deadline=420,
    ),
]
