# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lets HAProxy send requests to servers again: ready.py SOCKET SERVER... Run by a timer on the gateway's node."""

import socket
import sys


def ask(words: str) -> str:
    """Return what HAProxy answers on its runtime socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(sys.argv[1])
        connection.sendall(f"{words}\n".encode())
        return connection.makefile().read()


# Columns: number and name of the backend, number and name of the server.
for line in ask("show servers state").splitlines():
    columns = line.split()
    if len(columns) > 3 and columns[3] in sys.argv[2:]:
        ask(f"set server {columns[1]}/{columns[3]} state ready")
