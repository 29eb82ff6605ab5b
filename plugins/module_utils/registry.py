# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Asks container registries for the digest behind a tag, by the OCI distribution API. No engine is needed."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.parse

from ansible.module_utils.urls import ConnectionError as AnsibleConnectionError
from ansible.module_utils.urls import open_url

# An image for several processors is an index; its digest is the one that every engine can pull by.
MANIFESTS = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
DOCKER_HUB = "registry-1.docker.io"


class RegistryError(Exception):
    """A registry gave no digest; the message names the image, the cause and what to do."""


def split(image: str) -> tuple[str, str, str]:
    """Return C((registry, repository, tag or digest)) of an image reference, as the Docker engine reads it."""
    name, _at, digest = image.partition("@")
    first, slash, rest = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        registry, path = first, rest
    else:
        registry, path = DOCKER_HUB, name if slash else f"library/{name}"
    repository, colon, tag = path.rpartition(":")
    if not colon:
        repository, tag = path, "latest"
    return registry, repository, digest or tag


def pinned(image: str, digest: str | None) -> str:
    """Return the reference by which an engine pulls exactly this digest; without one the image as it is."""
    if not digest or "@" in image:
        return image
    head, slash, last = image.rpartition("/")
    return f"{head}{slash}{last.partition(':')[0]}@{digest}"


def digest(image: str, plain_http: list[str], timeout: float) -> str:
    """Return the digest of an image.

    :param plain_http: registries, as C(HOST) or C(HOST:PORT), that speak plain HTTP.
    :param timeout: seconds for each request.
    :raises RegistryError: the registry was not reached, or does not have the image.
    """
    registry, repository, reference = split(image)
    if reference.startswith("sha256:"):
        return reference
    scheme = "http" if registry in plain_http else "https"
    url = f"{scheme}://{registry}/v2/{repository}/manifests/{reference}"
    try:
        try:
            found = _head(url, None, timeout)
        except urllib.error.HTTPError as error:
            if error.code != 401:
                raise
            found = _head(url, _token(error.headers.get("WWW-Authenticate", ""), timeout), timeout)
    except urllib.error.HTTPError as error:
        raise RegistryError(
            f"Cannot find the digest of {image}: {registry} answers {error.code}. Check its name and tag."
        ) from error
    except (OSError, ValueError, AnsibleConnectionError) as error:
        cause = getattr(error, "reason", None) or error
        raise RegistryError(
            f"Cannot find the digest of {image}: {registry} does not answer ({cause}). Plan again when it does."
        ) from error
    if not found:
        raise RegistryError(f"Cannot find the digest of {image}: {registry} tells none. Give the image by digest.")
    return found


def _head(url: str, token: str | None, timeout: float) -> str | None:
    headers = {"Accept": ", ".join(MANIFESTS), **({"Authorization": f"Bearer {token}"} if token else {})}
    return open_url(url, method="HEAD", headers=headers, timeout=timeout).headers.get("Docker-Content-Digest")


def _token(challenge: str, timeout: float) -> str | None:
    """Return a token for anonymous pulls, as the challenge of a 401 says where to get one."""
    words = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    realm = words.pop("realm", None)
    if not realm:
        return None
    answer = json.load(open_url(f"{realm}?{urllib.parse.urlencode(words)}", timeout=timeout))
    return answer.get("token") or answer.get("access_token")
