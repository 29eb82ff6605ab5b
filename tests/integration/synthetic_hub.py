# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A test double of a model hub on this machine: repositories of well-known models, headers of true shape, no weights.

python3 tests/integration/synthetic_hub.py    serves until it is stopped; use it with HF_ENDPOINT=http://127.0.0.1:PORT
"""

from __future__ import annotations

import json
import re
import sys
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.models import synthetic

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Per repository: the synthetic model, how its files are called, and which quantisations it has.
REPOSITORIES = {
    "nomic-ai/nomic-embed-text-v1.5-GGUF": ("nomic-embed-text-v1.5", "nomic-embed-text-v1.5.{}.gguf", ("F16", "Q8_0")),
    "bartowski/Qwen2.5-7B-Instruct-GGUF": (
        "qwen2.5-7b",
        "Qwen2.5-7B-Instruct-{}.gguf",
        ("F16", "Q8_0", "Q6_K", "Q4_K_M", "Q3_K_M"),
    ),
    "bartowski/Qwen2.5-32B-Instruct-GGUF": (
        "qwen2.5-32b",
        "Qwen2.5-32B-Instruct-{}.gguf",
        ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_M", "Q2_K"),
    ),
    "Qwen/Qwen3-Embedding-8B-GGUF": ("qwen3-embedding-8b", "Qwen3-Embedding-8B-{}.gguf", ("F16", "Q8_0", "Q4_K_M")),
    "ggml-org/gpt-oss-120b-GGUF": ("gpt-oss-120b", "gpt-oss-120b-{}.gguf", ("MXFP4",)),
    "unsloth/Qwen3-Coder-30B-A3B-Instruct-GGUF": (
        "qwen3-coder-30b-a3b",
        "Qwen3-Coder-30B-A3B-Instruct-{}.gguf",
        ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K"),
    ),
    "ggml-org/gemma-3-27b-it-GGUF": ("gemma-3-27b", "gemma-3-27b-it-{}.gguf", ("F16", "Q8_0", "Q4_K_M")),
    "bartowski/Llama-3.3-70B-Instruct-GGUF": (
        "llama-3.3-70b",
        "Llama-3.3-70B-Instruct-{}.gguf",
        ("Q8_0", "Q6_K", "Q4_K_M", "IQ3_M", "Q2_K"),
    ),
}


@cache
def header(model: str, quant: str) -> tuple[bytes, int]:
    """Return the header of a file and the size that the file has."""
    return synthetic.header(model, quant)


class Handler(BaseHTTPRequestHandler):
    """Answers as far as module model_source_info asks."""

    def do_GET(self) -> None:
        asks = re.match(r"^/api/models/([^/]+/[^/]+)/revision/", self.path)
        file = re.match(r"^/([^/]+/[^/]+)/resolve/[^/]+/(.+)$", self.path)
        repository = (asks or file)[1] if asks or file else ""
        if repository not in REPOSITORIES:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        model, pattern, quants = REPOSITORIES[repository]
        files = {pattern.format(quant): quant for quant in quants}
        if asks:
            entries = [{"rfilename": name, "size": header(model, quant)[1]} for name, quant in files.items()]
            self.reply(200, json.dumps({"sha": COMMIT, "siblings": entries}).encode())
            return
        data, size = header(model, files[file[2]])
        first, last = map(int, re.match(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        last = min(last, size - 1)
        part = data[first : last + 1].ljust(last - first + 1, b"\0")
        self.reply(206, part, {"Content-Range": f"bytes {first}-{last}/{size}"})

    def reply(self, status: int, body: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(more or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        """Say nothing."""


def start() -> ThreadingHTTPServer:
    """Serve on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


if __name__ == "__main__":
    running = start()
    print(f"HF_ENDPOINT=http://127.0.0.1:{running.server_address[1]}", flush=True)
    threading.Event().wait()
