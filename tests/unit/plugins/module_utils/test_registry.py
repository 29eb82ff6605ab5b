# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""References as the engine reads them; the distribution API of a small registry (a double: one image, and tokens)."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator

import pytest
from ansible_collections.homelab.inference.plugins.module_utils import registry

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("ghcr.io/ggml-org/llama.cpp:server-b9014", ("ghcr.io", "ggml-org/llama.cpp", "server-b9014")),
        ("10.0.0.1:5000/ghcr.io/x/y:1", ("10.0.0.1:5000", "ghcr.io/x/y", "1")),
        ("localhost/x", ("localhost", "x", "latest")),
        ("debian", (registry.DOCKER_HUB, "library/debian", "latest")),
        ("homelab/thing:2", (registry.DOCKER_HUB, "homelab/thing", "2")),
        (f"ghcr.io/x/y:1@{DIGEST}", ("ghcr.io", "x/y", DIGEST)),
    ],
)
def test_references_are_read_as_the_engine_reads_them(image: str, parts: tuple[str, str, str]) -> None:
    assert registry.split(image) == parts


def test_a_pinned_reference_keeps_registry_and_path_and_drops_the_tag() -> None:
    assert registry.pinned("10.0.0.1:5000/ghcr.io/x/y:1", DIGEST) == f"10.0.0.1:5000/ghcr.io/x/y@{DIGEST}"
    assert registry.pinned("10.0.0.1:5000/x", DIGEST) == f"10.0.0.1:5000/x@{DIGEST}"
    assert registry.pinned("x/y:1", None) == "x/y:1"
    assert registry.pinned(f"x/y@{DIGEST}", "sha256:other") == f"x/y@{DIGEST}"


class Double(http.server.BaseHTTPRequestHandler):
    """Knows open/image:1, and secret/image:1 for those who fetched a token."""

    def do_HEAD(self) -> None:
        if self.path == "/v2/secret/image/manifests/1" and self.headers.get("Authorization") != "Bearer t0ken":
            self.send_response(401)
            host = self.headers["Host"]
            self.send_header(
                "WWW-Authenticate",
                f'Bearer realm="http://{host}/token",service="here",scope="repository:secret/image:pull"',
            )
        elif self.path in ("/v2/open/image/manifests/1", "/v2/secret/image/manifests/1"):
            self.send_response(200 if "oci.image.index" in self.headers["Accept"] else 406)
            self.send_header("Docker-Content-Digest", DIGEST)
        else:
            self.send_response(404)
        self.end_headers()

    def do_GET(self) -> None:
        good = self.path == "/token?service=here&scope=repository%3Asecret%2Fimage%3Apull"
        self.send_response(200 if good else 403)
        self.end_headers()
        self.wfile.write(json.dumps({"token": "t0ken"}).encode())

    def log_message(self, *words: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Double)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_digest_comes_with_and_without_a_token(host: str) -> None:
    assert registry.digest(f"{host}/open/image:1", [host], 5) == DIGEST
    assert registry.digest(f"{host}/secret/image:1", [host], 5) == DIGEST
    assert registry.digest(f"ghcr.io/x/y@{DIGEST}", [], 5) == DIGEST


def test_an_image_that_is_not_there_is_named(host: str) -> None:
    with pytest.raises(
        registry.RegistryError, match=r"open/image:2: 127.0.0.1:\d+ answers 404. Check its name and tag"
    ):
        registry.digest(f"{host}/open/image:2", [host], 5)


def test_a_registry_that_does_not_answer_is_named() -> None:
    with pytest.raises(registry.RegistryError, match=r"x/y:1: 127.0.0.1:1 does not answer"):
        registry.digest("127.0.0.1:1/x/y:1", ["127.0.0.1:1"], 2)
