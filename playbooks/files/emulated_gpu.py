# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""An emulated GPU: one endpoint whose clients each get a ggml-rpc-server of their own.

    emulated_gpu.py ADDRESS PORT ROOT

ggml-rpc-server serves one client at a time and lets the next one wait; a GPU serves several processes at once. All of
them live in the unit's memory limit, which is the memory of the GPU, and die with the unit, which is a lost GPU.
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import subprocess
import sys
import threading
import time

# The engine's bridge, on whose address this listens, comes later than this unit and may go and come again.
IP_FREEBIND = 15
START_SECONDS = 10.0


class Endpoint(socketserver.ThreadingTCPServer):
    """Listens for llama-servers."""

    allow_reuse_address = True
    daemon_threads = True

    def server_bind(self) -> None:
        """Bind to an address that need not be there yet."""
        self.socket.setsockopt(socket.SOL_IP, IP_FREEBIND, 1)
        super().server_bind()


class Client(socketserver.BaseRequestHandler):
    """One llama-server."""

    def handle(self) -> None:
        """Start a ggml-rpc-server and pass everything on until one of the two hangs up."""
        # A probe connects and says nothing: no process for it.
        if not self.request.recv(1, socket.MSG_PEEK):
            return
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = ["/usr/bin/ggml-rpc-server", "--host", "127.0.0.1", "--port", str(port), "--threads", "1"]
        command = ["chroot", sys.argv[3], *server]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
            try:
                with connect(port, process) as device:
                    back = threading.Thread(target=pump, args=(device, self.request), daemon=True)
                    back.start()
                    pump(self.request, device)
                    back.join()
            finally:
                process.kill()


def connect(port: int, process: subprocess.Popen[bytes]) -> socket.socket:
    """Wait until the new server listens."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def pump(source: socket.socket, target: socket.socket) -> None:
    """Pass bytes on until the source ends, then end both, so that the other direction ends too."""
    for connection in (source, target):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):
        while block := source.recv(1 << 20):
            target.sendall(block)
    for connection in (source, target):
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    with Endpoint((sys.argv[1], int(sys.argv[2])), Client) as endpoint:
        endpoint.serve_forever()
