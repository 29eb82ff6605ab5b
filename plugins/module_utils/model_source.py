# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From a declared source to exact files: commit, names, sizes, digests and shape, without fetching weights."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urljoin, urlsplit

from ansible.module_utils.urls import open_url
from ansible_collections.homelab.inference.plugins.module_utils import gguf
from ansible_collections.homelab.inference.plugins.module_utils.model_library import DIGEST, file_digest

ENDPOINT = "https://huggingface.co"
DEFAULT_QUANT = "Q4_K_M"
LEAST_BITS = 4
HEADER_BUDGET = 16 << 20  # bytes that reading the shape of one model may fetch
MAX_LISTING = 32 << 20
MAX_REDIRECTS = 5

REPO = re.compile(r"^[\w.-]+(?:/[\w.-]+)?$")
COMMIT = re.compile(r"^[0-9a-f]{7,64}$")
QUANT = re.compile(
    r"(?<![A-Z0-9])(?:UD-)?(?:I?Q[1-8](?:_(?:[01]|K|XXS|XS|XL|S|M|L|NL|[48]_[48]))*|TQ[12]_0|MXFP4(?:_MOE)?|NVFP4|BF16|FP?(?:16|32))"
    r"(?![A-Z0-9])"
)
# Files of a repository that are no model by themselves.
SIDECAR = re.compile(r"(?:^|[-_.])(?:mmproj|imatrix)(?:[-_.]|$)|^(?:mtp|ggml-vocab)-", re.IGNORECASE)
PROJECTORS = ("F16", "BF16", "F32", "Q8_0")


class SourceError(Exception):
    """The source cannot be resolved; the message says why, as what follows "Cannot resolve the model NAME: "."""


def resolve_all(sources: list[dict[str, Any]], web: Web) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Resolve each source; return the models, and a sentence for each that cannot be."""
    models, problems = [], []
    for item in sources:
        try:
            models.append(resolve(item["model"], item["source"], web))
        except (SourceError, gguf.GGUFError) as error:
            problems.append({"model": item["model"], "error": f"Cannot resolve the model {item['model']}: {error}."})
    return models, problems


def resolve(model: str, source: dict[str, Any], web: Web) -> dict[str, Any]:
    """Resolve one source to its files and shape."""
    web.left = HEADER_BUDGET
    digest = source.get("sha256")
    if digest and not DIGEST.match(digest.lower()):
        raise SourceError("its sha256 is not 64 hexadecimal digits. Write the whole digest")
    if digest and (source.get("hf") or source.get("library")):
        raise SourceError("its sha256 goes with a url or a file, other sources have their own. Take sha256 out")
    result = {"model": model, "library": None, "repo": None, "commit": None, "quant": None, "mmproj": None}
    if source.get("hf"):
        return {**result, **_resolve_hub(source, web)}
    if source.get("url"):
        return {**result, **_resolve_url(model, source, web)}
    if source.get("file"):
        return {**result, **_resolve_file(source)}
    if source.get("library"):
        # Only the caller has the indexes of the nodes' libraries.
        return {**result, "library": source["library"], "files": [], "shape": None}
    raise SourceError("its source names none of hf, url, file and library. Name one of them")


# Hugging Face Hub


def _resolve_hub(source: dict[str, Any], web: Web) -> dict[str, Any]:
    repo, revision = source["hf"], source.get("revision") or "main"
    if not REPO.match(repo):
        raise SourceError(f"{repo!r} is not the name of a repository. Write it as owner/name")
    listing = web.listing(repo, revision)
    files = {item["rfilename"]: item for item in listing["siblings"]}
    names, quant = choose_files({name: item.get("size") for name, item in files.items()}, repo, source)
    projector = choose_projector(list(files), repo, source.get("mmproj") or "none")

    def remote(name: str) -> tuple[dict[str, Any], gguf.Header]:
        url = f"{web.endpoint}/{repo}/resolve/{listing['sha']}/{quote(name)}"
        what, size = f"the repository {repo}", files[name].get("size")
        try:
            with _Remote(web, url, what) as found:
                header = gguf.read_header(found, size or found.size, like=web.siblings.get(repo))
        except gguf.GGUFError:
            if repo not in web.siblings:
                raise
            with _Remote(web, url, what) as found:
                header = gguf.read_header(found, size or found.size)
        if header.texts:
            web.siblings[repo] = header
        digest = (files[name].get("lfs") or {}).get("sha256")
        entry = {
            "name": PurePosixPath(name).name,
            "url": url,
            "size": size or found.size,
            "sha256": digest if digest and DIGEST.match(digest) else found.sha256,
        }
        return entry, header

    parts = [remote(name) for name in names]
    shape = gguf.shape([header for _entry, header in parts])
    mmproj = None
    if projector:
        entry, header = remote(projector)
        mmproj = {**entry, "shape": gguf.shape([header])}
    return {
        "repo": repo,
        "commit": listing["sha"],
        "quant": quant or shape["quant"],
        "files": [entry for entry, _header in parts],
        "mmproj": mmproj,
        "shape": shape,
    }


def quant_of(name: str) -> str | None:
    """The quantisation that a file's path names, in the one spelling used here."""
    found = QUANT.findall(re.sub(r"-\d{5}-OF-\d{5}\.GGUF$", "", name.upper()))
    return _spelling(found[-1]) if found else None


def _spelling(quant: str) -> str:
    return quant.upper().replace("FP16", "F16").replace("FP32", "F32")


def bits_of(quant: str) -> int:
    """How many bits a weight has, without the scales."""
    return int(re.findall(r"\d+", quant)[0])


def choose_files(sizes: dict[str, int | None], repo: str, source: dict[str, Any]) -> tuple[list[str], str | None]:
    """The files of one model in a repository (name to size), and their quantisation by name."""
    models = [name for name in sizes if name.lower().endswith(".gguf") and not SIDECAR.search(PurePosixPath(name).name)]
    wanted = source.get("file")
    if wanted:
        named = [name for name in models if wanted in (name, PurePosixPath(name).name)]
        if not named:
            raise SourceError(f"the repository {repo} has no file {wanted}. It has {_listed(models)}")
        return _whole_set(named[0], sizes, repo), quant_of(named[0])
    # The first shard stands for its set.
    heads = sorted(name for name in models if _shards(name)[0] == name)
    by_quant: dict[str | None, list[str]] = {}
    for name in heads:
        by_quant.setdefault(quant_of(name), []).append(name)
    quant = _choose_quant(by_quant, sizes, repo, source.get("quant") or [])
    if len(by_quant[quant]) > 1:
        raise SourceError(
            f"the repository {repo} has {quant} more than once. Name one with file: {_listed(by_quant[quant])}"
        )
    return _whole_set(by_quant[quant][0], sizes, repo), quant


def _choose_quant(
    by_quant: dict[str | None, list[str]], sizes: dict[str, int | None], repo: str, wanted: list[str]
) -> str | None:
    there = sorted(quant for quant in by_quant if quant)
    for want in wanted or [DEFAULT_QUANT]:
        name = _spelling(want)
        # UD- marks the mixtures of one publisher, who offers most of them under no other name.
        for spelling in (name, f"UD-{name}"):
            if spelling in by_quant:
                return spelling
    if wanted:
        raise SourceError(f"the repository {repo} has no {' or '.join(wanted)}. It has {_listed(there)}")

    def total(quant: str) -> float:
        known = sum(sizes.get(shard) or 0 for shard in _shards(by_quant[quant][0]))
        return known or float("inf")

    enough = [quant for quant in there if bits_of(quant) >= LEAST_BITS]
    if enough:
        return min(enough, key=lambda quant: (total(quant), quant))
    if len(by_quant) == 1:
        return next(iter(by_quant))
    if not by_quant:
        raise SourceError(f"the repository {repo} has no GGUF model. Name a repository that has one")
    raise SourceError(
        f"the repository {repo} has nothing of {LEAST_BITS} bits. Name one of {_listed(there)} with quant"
    )


def choose_projector(names: list[str], repo: str, mmproj: str) -> str | None:
    """The multimodal projector to take: none, the repository's best, or the one that is named."""
    if mmproj == "none":
        return None
    there = [name for name in names if name.lower().endswith(".gguf") and "mmproj" in PurePosixPath(name).name.lower()]
    if mmproj != "auto":
        there = [name for name in there if mmproj in (name, PurePosixPath(name).name)]
    if not there:
        what = "mmproj file" if mmproj == "auto" else f"mmproj file {mmproj}"
        raise SourceError(f"the repository {repo} has no {what}. Take mmproj out, or name a repository that has it")

    def rank(name: str) -> tuple[int, str]:
        quant = quant_of(name)
        return (PROJECTORS.index(quant) if quant in PROJECTORS else len(PROJECTORS), name)

    return min(there, key=rank)


def _shards(name: str) -> list[str]:
    path = PurePosixPath(name)
    try:
        return [str(path.with_name(other)) for other in gguf.shard_names(path.name)]
    except gguf.GGUFError:
        return [name]


def _whole_set(name: str, sizes: dict[str, int | None], repo: str) -> list[str]:
    shards = _shards(name)
    missing = [shard for shard in shards if shard not in sizes]
    if missing:
        raise SourceError(
            f"the repository {repo} lacks {_listed(missing)} of its {len(shards)} shards. Take another quant"
        )
    return shards


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return (", ".join(names[:12]) or "none") + more


# A URL, a file of the controller


def _resolve_url(model: str, source: dict[str, Any], web: Web) -> dict[str, Any]:
    url, digest = source["url"], (source.get("sha256") or "").lower()
    name = unquote(PurePosixPath(urlsplit(url).path).name)
    names = gguf.shard_names(name) if name.lower().endswith(".gguf") else [f"{model}.gguf"]
    if len(names) > 1 and digest:
        raise SourceError(f"its sha256 is one digest, and {url} is one of {len(names)} files. Take sha256 out")
    files, headers = [], []
    for shard in names:
        address = urljoin(url, quote(shard)) if len(names) > 1 else url
        with _Remote(web, address, address) as remote:
            if digest and remote.sha256 and remote.sha256 != digest:
                raise SourceError(
                    f"its sha256 is not that of {address}, which is {remote.sha256}. Correct the one that is wrong"
                )
            headers.append(gguf.read_header(remote, remote.size))
        files.append(
            {"name": shard, "url": address, "size": remote.size, "sha256": digest or remote.sha256, "etag": remote.etag}
        )
    shape = gguf.shape(headers)
    return {"quant": shape["quant"], "files": files, "shape": shape}


def _resolve_file(source: dict[str, Any]) -> dict[str, Any]:
    path = Path(os.path.expandvars(source["file"])).expanduser()
    digest = (source.get("sha256") or "").lower()
    try:
        paths = gguf.shard_paths(path)
        if len(paths) > 1 and digest:
            raise SourceError(f"its sha256 is one digest, and {path} is one of {len(paths)} files. Take sha256 out")
        shape = gguf.shape([gguf.read_file(shard) for shard in paths])
        files = [
            {
                "name": shard.name,
                "controller_path": str(shard.absolute()),
                "size": shard.stat().st_size,
                "sha256": digest or file_digest(shard),
            }
            for shard in paths
        ]
    except gguf.GGUFError as error:
        raise SourceError(f"{path} cannot be used, {error}") from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read, {error.strerror or error}. Check who may read it") from error
    return {"quant": shape["quant"], "files": files, "shape": shape}


# The network


class Web:
    """GET requests that follow redirects, send the token to the hub alone, and ask a dead host only once."""

    def __init__(self, endpoint: str | None = None, token: str | None = None, timeout: float = 30) -> None:
        self.endpoint = (endpoint or ENDPOINT).rstrip("/")
        self.left = HEADER_BUDGET
        self.siblings: dict[str, gguf.Header] = {}  # by repository one of its files, whose vocabulary the others have
        self._token = token
        self._timeout = timeout
        self._dead: dict[str, str] = {}

    def listing(self, repo: str, revision: str) -> dict[str, Any]:
        """What the hub says of a repository at a revision: its commit and files."""
        url = f"{self.endpoint}/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true"
        try:
            with self.get(url, {}, f"the repository {repo}", revision) as response:
                answer = json.loads(response.read(MAX_LISTING))
            siblings = [item for item in answer["siblings"] if isinstance(item["rfilename"], str)]
            if not COMMIT.match(answer["sha"]):
                raise ValueError("no commit")
        except (ValueError, KeyError, TypeError) as error:
            raise SourceError(
                f"{self.endpoint} does not answer as a model hub for the repository {repo}. Check hf_endpoint"
            ) from error
        return {"sha": answer["sha"], "siblings": siblings}

    def get(self, url: str, headers: dict[str, str], what: str, revision: str = "main") -> Any:
        """Answer of the first address that does not redirect; what it had been told on the way is in its headers."""
        linked = None
        for _redirect in range(MAX_REDIRECTS + 1):
            origin = urlsplit(url)[:2]
            if origin[0] not in ("http", "https"):
                raise SourceError(f"{what} leads to {url[:200]}. Name an http or https address")
            host = "://".join(origin)
            if host in self._dead:
                raise SourceError(self._dead[host])
            sent = dict(headers)
            if self._token and origin == urlsplit(self.endpoint)[:2]:
                sent["Authorization"] = f"Bearer {self._token}"
            try:
                # A password in ~/.netrc would replace the token.
                netrc = "Authorization" not in sent
                response = open_url(url, headers=sent, timeout=self._timeout, follow_redirects="none", use_netrc=netrc)
            except HTTPError as error:
                location = error.headers.get("Location")
                if error.code in (301, 302, 303, 307, 308) and location:
                    linked = linked or error.headers.get("X-Linked-Etag")
                    url = urljoin(url, location)
                    continue
                raise SourceError(self._refused(error, host, what, revision)) from error
            except (URLError, http.client.HTTPException, OSError, ValueError) as error:
                reason = getattr(error, "reason", None) or error
                self._dead[host] = (
                    f"{host} cannot be reached, {reason}. Check the network, or set hf_endpoint to a mirror"
                )
                raise SourceError(self._dead[host]) from error
            response.linked_etag = linked or response.headers.get("X-Linked-Etag")
            return response
        raise SourceError(f"{what} redirects more than {MAX_REDIRECTS} times. Check the address")

    def _refused(self, error: HTTPError, host: str, what: str, revision: str) -> str:
        code = error.headers.get("X-Error-Code")
        if code == "RevisionNotFound":
            return f"{what} has no revision {revision}. Name a branch, a tag or a commit that it has"
        if code == "GatedRepo":
            return f"{what} is gated ({error.code}). Accept its terms, and set hf_token to a token that may read it"
        if error.code in (401, 403) and host != "://".join(urlsplit(self.endpoint)[:2]):
            return f"{host} refuses {what} ({error.code}). Name an address that needs no login"
        if error.code == 401 and not self._token:
            # The hub answers this for what does not exist as for what is private.
            return f"{what} does not exist on {host}, or needs a token ({error.code}). Check its name, or set hf_token"
        if error.code in (401, 403):
            return f"{what} may not be read with this token ({error.code}). Check its name, its terms and hf_token"
        if error.code == 404:
            return f"{what} does not exist on {host} ({error.code}). Check its name"
        if error.code == 429:
            return f"{host} asks to wait ({error.code}). Run again later, or set hf_token for a higher limit"
        return f"{host} answers {error.code} for {what}. Run again later"


class _Remote(io.RawIOBase):
    """A file behind HTTP as a seekable stream, fetched by ranges where the server knows them."""

    def __init__(self, web: Web, url: str, what: str) -> None:
        super().__init__()
        self._web, self._url, self._what = web, url, what
        self._at = 0
        self._whole: Any = None  # the running answer of a server without ranges
        self.size: int | None = None
        self.etag: str | None = None
        self.sha256: str | None = None
        self._ahead = self._fetch(gguf.FIRST_CHUNK)

    def _fetch(self, count: int) -> bytes:
        if self.size is not None:
            count = min(count, self.size - self._at)
        if count <= 0:
            return b""
        count = min(count, self._web.left)
        if not count:
            raise SourceError(
                f"the header of {self._url} needs more than {HEADER_BUDGET >> 20} MiB. Fetch the file and name its path"
            )
        if self._whole is not None:
            piece = self._read(self._whole, count)
        else:
            headers = {"Range": f"bytes={self._at}-{self._at + count - 1}", "Accept-Encoding": "identity"}
            response = self._web.get(self._url, headers, self._what)
            self._note(response)
            if response.status == 206:
                with response:
                    piece = self._read(response, count)
            elif self._at:
                response.close()
                raise SourceError(f"{self._url} stopped answering ranges. Run again")
            else:
                self._whole = response
                piece = self._read(response, count)
        self._web.left -= len(piece)
        return piece

    def _read(self, response: Any, count: int) -> bytes:
        try:
            return response.read(count)
        except (http.client.HTTPException, OSError) as error:
            raise SourceError(f"{self._url} broke off, {error}. Run again") from error

    def _note(self, response: Any) -> None:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        if response.status == 200:
            total = response.headers.get("Content-Length", "")
        self.size = int(total) if total.isdigit() else self.size
        self.etag = response.headers.get("ETag")
        linked = (response.linked_etag or "").strip('"')
        self.sha256 = linked if DIGEST.match(linked) else None

    def readable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        if self._ahead:
            piece, self._ahead = self._ahead, b""
        else:
            piece = self._fetch(count)
        self._at += len(piece)
        return piece

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go forward, as reading a header does."""
        if whence != os.SEEK_CUR or self._ahead:
            raise io.UnsupportedOperation("only forward from where it is")
        if self._whole is None:
            self._at += offset
        while self._whole is not None and offset > 0:
            piece = self._fetch(min(offset, gguf.LAST_CHUNK))
            if not piece:
                break
            self._at += len(piece)
            offset -= len(piece)
        return self._at

    def close(self) -> None:
        if self._whole is not None:
            self._whole.close()
        super().close()
