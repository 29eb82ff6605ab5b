# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Model files in a directory: what is there, what is missing, and fetching that without ever showing half a file.

Beside C(chat.gguf) lies C(.chat.gguf.sha256.json): its digest, and the size, mtime and inode that it was taken at.
While it is being fetched there are C(.chat.gguf.part) and C(.chat.gguf.part.json), which says what it is a part of.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import http.client
import json
import os
import ssl
import stat
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from ansible_collections.homelab.inference.plugins.module_utils.progress import ProgressFile

# One step of a local copy, after which progress is told and the hasher may follow; and of a download.
STEP = 16 << 20
RECEIVE = 1 << 20
# How far the copy may run ahead of the hasher: what is hashed should still be in memory.
AHEAD = 1 << 30
# Written data is sent to the disk this often, beside the copying, instead of all at the end.
FLUSH_EVERY = 256 << 20
# What the hasher reads at a time.
READ = 1 << 20
ZEROS = memoryview(bytes(READ))
# Seconds of silence after which a download is taken for dead, and the pauses between attempts that bring nothing new.
SILENCE = 60
RETRY_PAUSES = (1, 2, 4, 8, 16)


class ModelFilesError(Exception):
    """A sentence for people: what failed, why, and what to do."""


class Interrupted(Exception):
    """The download stopped; another attempt may go on from there."""


@dataclass(frozen=True)
class Wanted:
    """A file as the task asks for it. kind is url, path or controller_path."""

    name: str
    kind: str
    source: str
    sha256: str | None = None
    size: int | None = None
    # Only for controller_path, whose source cannot be seen from the node.
    mtime_ns: int | None = None


@dataclass(frozen=True)
class Found:
    """A file as it lies there. sha256 is what was recorded of it; fresh: size, mtime and inode are still the same."""

    size: int
    sha256: str | None
    fresh: bool


def check_names(names: list[str]) -> None:
    """Refuse names that leave the volume, and those that are kept for parts and digests."""
    for name in names:
        parts = name.split("/")
        if PurePosixPath(name).is_absolute() or "" in parts or "\0" in name:
            raise ModelFilesError(f"File name {name!r} is not relative to the volume. Write it like sub/chat.gguf.")
        if any(part.startswith(".") for part in parts):
            raise ModelFilesError(
                f"File name {name!r} has a part that begins with a dot: those lead out of the volume or are kept for "
                "unfinished files. Choose another name."
            )
    for name in names:
        if names.count(name) > 1:
            raise ModelFilesError(f"File name {name!r} is listed twice. Give each file its own name.")


def decide(wanted: Wanted, found: Found | None, verify: str) -> str:
    """Return C(keep), C(fetch), or C(hash) where only the content can tell."""
    if found is None or wanted.size not in (None, found.size):
        return "fetch"
    expected = wanted.sha256 or found.sha256
    if expected and verify == "always":
        return "hash"
    if found.fresh:
        return "keep" if found.sha256 == expected else "fetch"
    return "hash" if expected and verify == "changed" else "keep"


def space_problem(directory: str, needed: int, free: int) -> str | None:
    """Return the sentence for a disk that is too small."""
    if needed <= free:
        return None
    return (
        f"Not enough space in {directory}: {needed} bytes are still to be written, {free} bytes are free. "
        f"Free at least {needed - free} bytes."
    )


def shown(url: str) -> str:
    """A source for messages and files: a URL without user, password and query, where secrets travel."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        return url
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class LocalSource:
    """A file of this machine."""

    verb = "copying"

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ModelFilesError(f"{path} cannot be read: {error.strerror}. Check path.") from error
        self._stat = os.fstat(self._fd)
        if not stat.S_ISREG(self._stat.st_mode):
            self.close()
            raise ModelFilesError(f"{path} is not a file. Check path.")
        self.total = self._stat.st_size
        self.allocated = min(self.total, self._stat.st_blocks * 512)
        self.sparse = self.allocated < self.total
        self._data_end = 0 if self.sparse else self.total
        # Shares the blocks instead of copying them where the file system can.
        self._in_kernel = hasattr(os, "copy_file_range")
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def identity(self) -> dict[str, Any]:
        """What a part must have been taken from to be continued."""
        return {"path": self.path, "size": self.total, "mtime_ns": self._stat.st_mtime_ns}

    def start(self, offset: int) -> int:
        """A local file can be continued anywhere."""
        return offset

    def send(self, part: int, position: int) -> int:
        """Copy one step to the part and return its length; 0 at the end. A hole stays a hole."""
        if self.sparse and position >= self._data_end:
            data, self._data_end = data_after(self._fd, position, self.total)
            if data > position:
                os.ftruncate(part, data)
                return data - position
        length = min(STEP, self._data_end - position)
        if length <= 0:
            return 0
        if self._in_kernel:
            try:
                return os.copy_file_range(self._fd, part, length, position, position)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                    raise
                self._in_kernel = False
        os.lseek(part, position, os.SEEK_SET)
        return os.sendfile(part, self._fd, position, length)

    def finish(self) -> None:
        """Refuse what was changed while it was read."""
        now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            raise ModelFilesError(f"{self.path} was changed while it was read. Run again when it is at rest.")

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Takes the token along within one origin only: the storage behind a hub must not get it, and refuses it."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        token = req.unredirected_hdrs.get("Authorization")
        if new and token and urlsplit(newurl)[:2] == urlsplit(req.full_url)[:2]:
            new.add_unredirected_header("Authorization", token)
        return new


class Download:
    """A file behind a URL, continued with Range where the server can."""

    verb = "downloading"
    sparse = False

    def __init__(self, url: str, token: str | None = None) -> None:
        if urlsplit(url).scheme not in ("http", "https"):
            raise ModelFilesError(f"{shown(url)} is not an http or https URL. Check url.")
        self.url = url
        self.name = shown(url)
        self._token = token
        self._opener = urllib.request.build_opener(_Redirects)
        self._response: Any = None
        self._buffer = memoryview(bytearray(RECEIVE))
        self.total: int | None = None
        self.validator: str | None = None

    def identity(self) -> dict[str, Any]:
        """What a part must have been taken from to be continued; the server has the last word on the validator."""
        return {"url": self.name}

    def start(self, offset: int) -> int:
        """Ask for the file from this offset and return the offset that the server starts at: 0 where it begins anew."""
        self.close()
        request = urllib.request.Request(self.url)
        if self._token:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        if offset:
            request.add_header("Range", f"bytes={offset}-")
            # A weak validator must not be used with If-Range; it is compared below.
            if self.validator and not self.validator.startswith("W/"):
                request.add_header("If-Range", self.validator)
        try:
            self._response = self._opener.open(request, timeout=SILENCE)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and offset:
                # Nothing behind the offset: the part is longer than the file, or the server cannot do better.
                return self.start(0)
            raise self._refusal(error.code, error.reason) from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise ModelFilesError(
                    f"Download of {self.name} failed: {error.reason.verify_message}. Check the node's certificates."
                ) from error
            raise Interrupted(str(error.reason)) from error
        except (OSError, http.client.HTTPException) as error:
            raise Interrupted(str(error) or type(error).__name__) from error
        headers = self._response.headers
        validator = headers.get("ETag") or headers.get("Last-Modified")
        partial = self._response.status == 206
        if partial and self.validator and validator != self.validator:
            self.validator = None
            return self.start(0)
        self.validator = validator
        if not partial:
            length = headers.get("Content-Length")
            self.total = int(length) if length else None
            return 0
        span, _slash, total = headers.get("Content-Range", "").rpartition("/")
        self.total = int(total) if total.isdigit() else None
        if span.replace(" ", "").partition("-")[0] != f"bytes{offset}":
            raise ModelFilesError(f"Download of {self.name} failed: the server answers another range than asked for.")
        return offset

    def _refusal(self, code: int, reason: str) -> Exception:
        if code in (408, 425, 429) or code >= 500:
            return Interrupted(f"HTTP {code} {reason}")
        advice = "Check the URL."
        if code in (401, 403):
            advice = "Set url_token, or accept the model's terms at the hub."
        return ModelFilesError(f"Download of {self.name} failed: HTTP {code} {reason}. {advice}")

    def send(self, part: int, position: int) -> int:
        """Write one step to the part and return its length; 0 at the end."""
        try:
            count = self._response.readinto(self._buffer)
        except (OSError, http.client.HTTPException) as error:
            raise Interrupted(str(error) or type(error).__name__) from error
        write(part, self._buffer[:count], position)
        return count

    def finish(self) -> None:
        """The digest tells the rest."""

    def close(self) -> None:
        """Close the connection."""
        if self._response is not None:
            self._response.close()
            self._response = None


class Digest:
    """SHA-256 of a file that may still be growing, taken in a thread: hashlib and the copying leave each other alone.

    It reads what was written, out of memory as a rule, so that an earlier part is hashed while the rest is fetched.
    """

    def __init__(self, path: Path, sparse: bool) -> None:
        self.position = 0
        self._sha = hashlib.sha256()
        self._sparse = sparse
        self._limit = 0
        self._closed = False
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def grow(self, limit: int) -> None:
        """The file may be read up to here."""
        with self._changed:
            self._limit = limit
            self._changed.notify_all()

    def wait(self, position: int, seconds: float | None = None) -> bool:
        """Wait until the file is hashed up to here."""
        with self._changed:
            self._changed.wait_for(lambda: self.position >= position or self._error, seconds)
            if self._error:
                raise self._error
            return self.position >= position

    def hexdigest(self) -> str:
        """The digest of all up to the limit, after wait()."""
        return self._sha.hexdigest()

    def close(self) -> None:
        """End the thread, wherever it is."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _run(self) -> None:
        try:
            buffer = memoryview(bytearray(READ))
            data_end = 0
            while self._next():
                if self._sparse and self.position >= data_end:
                    data, data_end = data_after(self._fd, self.position, self._limit)
                    self._zeros(data - self.position)
                    continue
                end = min(data_end if self._sparse else self._limit, self.position + READ)
                count = os.preadv(self._fd, [buffer[: end - self.position]], self.position)
                if not count:
                    raise ModelFilesError("A file was cut short while it was read. Run again.")
                self._sha.update(buffer[:count])
                self._advance(count)
        except Exception as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self.position < self._limit)
            return not self._closed

    def _zeros(self, count: int) -> None:
        while count and not self._closed:
            length = min(count, len(ZEROS))
            self._sha.update(ZEROS[:length])
            self._advance(length)
            count -= length

    def _advance(self, count: int) -> None:
        with self._changed:
            self.position += count
            self._changed.notify_all()


def data_after(fd: int, position: int, total: int) -> tuple[int, int]:
    """Where the next data of a file with holes begins and ends."""
    try:
        data = os.lseek(fd, position, os.SEEK_DATA)
        return min(data, total), min(os.lseek(fd, data, os.SEEK_HOLE), total)
    except OSError as error:
        # Only a hole is left; or a file system that cannot tell, where all counts as data.
        return (total, total) if error.errno == errno.ENXIO else (position, total)


def write(fd: int, view: memoryview, position: int) -> None:
    """Write all of it there."""
    while view:
        count = os.pwrite(fd, view, position)
        view, position = view[count:], position + count


class Store:
    """The model files in one directory."""

    def __init__(self, directory: str, progress: ProgressFile | None = None, token: str | None = None) -> None:
        self.directory = Path(directory)
        self.progress = progress or ProgressFile(None)
        self.hashed_bytes = 0
        self.fetched_bytes = 0
        self._token = token

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs out; a run whose controller went away may still be at work."""
        handle = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.progress.report("waiting for another run that writes to the same volume")
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def path(self, name: str, ending: str | None = None) -> Path:
        """Where a file lies, or with an ending what lies beside it."""
        target = self.directory / name
        return target if ending is None else target.with_name(f".{target.name}.{ending}")

    def find(self, name: str) -> Found | None:
        """What lies there under this name."""
        try:
            status = self.path(name).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if stat.S_ISDIR(status.st_mode):
            raise ModelFilesError(f"{self.path(name)} is a directory, not a file. Choose another name or remove it.")
        if not stat.S_ISREG(status.st_mode):
            return None
        record = _load(self.path(name, "sha256.json"))
        return Found(status.st_size, record.get("sha256"), _identity(status).items() <= record.items())

    def good(self, wanted: Wanted, verify: str, remember: bool = True) -> bool:
        """Whether the file is there as wanted. remember writes down a digest that had to be taken."""
        found = self.find(wanted.name)
        decision = decide(wanted, found, verify)
        if decision != "hash" or found is None:
            return decision == "keep"
        path = self.path(wanted.name)
        digest = self._digest(wanted.name, path)
        if digest != (wanted.sha256 or found.sha256):
            return False
        if remember and not found.fresh:
            self._record(wanted.name, digest)
        return True

    def size(self, wanted: Wanted) -> int | None:
        """The size of what is wanted, None where only the server can tell. Refuses one that cannot be right."""
        if wanted.kind != "path":
            return wanted.size
        source = LocalSource(wanted.source)
        source.close()
        self._require_size(wanted, source.total)
        return source.total

    def missing(self, wanted: Wanted) -> int | None:
        """Bytes still to be fetched, None where only the server can tell."""
        size = self.size(wanted)
        done = self.resumable(wanted)
        return None if size is None else max(0, size - done)

    def resumable(self, wanted: Wanted) -> int:
        """Bytes of an earlier attempt that can be continued."""
        part = self.path(wanted.name, "part")
        state = _load(self.path(wanted.name, "part.json"))
        try:
            length = part.lstat().st_size
        except OSError:
            return 0
        if state.get("sha256"):
            return length if state["sha256"] == wanted.sha256 else 0
        return length if state.get("source") == self._identity_of(wanted) else 0

    def check_space(self, wanted: list[Wanted]) -> None:
        """Refuse at once what cannot fit."""
        needed = sum(self._space_for(one) for one in wanted)
        self._require(needed)

    def fetch(self, wanted: Wanted) -> None:
        """Fetch from a URL or a path of this machine, from where an earlier attempt stopped."""
        source = self._source(wanted)
        try:
            self._prepare(wanted)
            part = os.open(self.path(wanted.name, "part"), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                state = _load(self.path(wanted.name, "part.json"))
                digest = state.get("sha256") or self._receive(wanted, source, part, state)
                os.fchmod(part, 0o644)
                os.fsync(part)
            finally:
                os.close(part)
            source.finish()
        finally:
            source.close()
        self._install(wanted, digest)

    def await_part(self, wanted: Wanted) -> int | None:
        """For a file of the controller: put it in place if its part is complete, else return the bytes there are."""
        self._prepare(wanted)
        done = self.resumable(wanted)
        if done != wanted.size:
            return done
        state = _load(self.path(wanted.name, "part.json"))
        part = self.path(wanted.name, "part")
        digest = state.get("sha256") or self._digest(wanted.name, part)
        part.chmod(0o644)
        self._install(wanted, digest)
        return None

    def _require_size(self, wanted: Wanted, total: int | None) -> None:
        if None not in (total, wanted.size) and total != wanted.size:
            raise ModelFilesError(
                f"{shown(wanted.source)} has {total} bytes, but {wanted.name} is declared with {wanted.size}. "
                "Correct size, or find the file that was meant."
            )

    def _space_for(self, wanted: Wanted) -> int:
        if wanted.kind == "path":
            source = LocalSource(wanted.source)
            source.close()
            size = source.allocated
        else:
            size = wanted.size or 0
        try:
            # Continued or thrown away, the space of an earlier part serves again.
            return max(0, size - self.path(wanted.name, "part").lstat().st_blocks * 512)
        except OSError:
            return size

    def _require(self, needed: int) -> None:
        disk = os.statvfs(self.directory)
        problem = space_problem(str(self.directory), needed, disk.f_bavail * disk.f_frsize)
        if problem:
            raise ModelFilesError(problem)

    def _identity_of(self, wanted: Wanted) -> dict[str, Any]:
        if wanted.kind == "controller_path":
            return {"controller_path": wanted.source, "size": wanted.size, "mtime_ns": wanted.mtime_ns}
        source = self._source(wanted)
        source.close()
        return source.identity()

    def _source(self, wanted: Wanted) -> LocalSource | Download:
        return LocalSource(wanted.source) if wanted.kind == "path" else Download(wanted.source, self._token)

    def _prepare(self, wanted: Wanted) -> None:
        """Make the directories and a part that can be continued, empty where there is none."""
        folder = self.path(wanted.name).parent
        missing = [one for one in (folder, *folder.parents) if not one.exists() and not one.is_symlink()]
        for one in reversed(missing):
            one.mkdir()
            one.chmod(0o755)
        if not folder.resolve().is_relative_to(self.directory.resolve()):
            raise ModelFilesError(f"{folder} leads out of the volume by a symbolic link. Remove the link.")
        if self.resumable(wanted):
            return
        part = self.path(wanted.name, "part")
        for leftover in (self.path(wanted.name, "part.json"), part):
            leftover.unlink(missing_ok=True)
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644))
        _store(self.path(wanted.name, "part.json"), {"source": self._identity_of(wanted)})

    def _receive(self, wanted: Wanted, source: LocalSource | Download, part: int, state: dict[str, Any]) -> str:
        """Complete the part and return its digest."""
        position = os.fstat(part).st_size
        if isinstance(source, Download):
            source.validator = state.get("validator")
            # Without a validator and a digest nothing would tell whether the rest belongs to this part.
            if (not source.validator and not wanted.sha256) or (wanted.size is not None and position > wanted.size):
                position = 0
        digest = Digest(self.path(wanted.name, "part"), source.sparse)
        failures, best = 0, position
        try:
            while position != wanted.size:
                try:
                    begin = source.start(position)
                    if begin != position:
                        digest.close()
                        digest = Digest(self.path(wanted.name, "part"), source.sparse)
                    os.ftruncate(part, begin)
                    self._expect(wanted, source, state, begin)
                    self._copy(wanted, source, part, begin, digest)
                    break
                except Interrupted as error:
                    position = os.fstat(part).st_size
                    failures = 0 if position > best else failures + 1
                    best = max(best, position)
                    if failures > len(RETRY_PAUSES):
                        raise ModelFilesError(
                            f"Download of {shown(wanted.source)} failed: {error}. "
                            f"{position} bytes are kept; run again to continue."
                        ) from error
                    time.sleep(RETRY_PAUSES[max(0, failures - 1)])
            size = os.fstat(part).st_size
            self._require_size(wanted, size)
            return self._finish(digest, size, f"checking {wanted.name}")
        finally:
            digest.close()

    def _copy(self, wanted: Wanted, source: LocalSource | Download, part: int, position: int, digest: Digest) -> None:
        """Write the part from this position to its end; the hasher follows."""
        total = wanted.size if source.total is None else source.total
        flush: Future[None] | None = None
        flushed = position
        digest.grow(position)
        with ThreadPoolExecutor(1) as flushing:
            while True:
                self.progress.report(f"{source.verb} {wanted.name}", position, total, "bytes")
                count = self._send(source, part, position)
                if not count:
                    break
                position += count
                self.fetched_bytes += count
                digest.grow(position)
                while isinstance(source, LocalSource) and not digest.wait(position - AHEAD, 0.5):
                    self.progress.report(f"checking {wanted.name}", digest.position, position, "bytes")
                if position - flushed >= FLUSH_EVERY and (flush is None or flush.done()):
                    if flush:
                        flush.result()
                    flush, flushed = flushing.submit(os.fdatasync, part), position
            if flush:
                flush.result()
        # The hasher catches up meanwhile.
        os.fsync(part)
        if isinstance(source, Download) and total is not None and position < total:
            raise Interrupted(f"the connection ended after {position} of {total} bytes")

    def _send(self, source: LocalSource | Download, part: int, position: int) -> int:
        try:
            return source.send(part, position)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ModelFilesError(
                f"{self.directory} is full: {os.fstat(part).st_size} bytes of this file are written and kept. "
                "Free space, then run again to continue."
            ) from error

    def _finish(self, digest: Digest, size: int, phase: str) -> str:
        """Wait for the hasher."""
        digest.grow(size)
        while not digest.wait(size, 0.5):
            self.progress.report(phase, digest.position, size, "bytes")
        self.hashed_bytes += size
        return digest.hexdigest()

    def _expect(self, wanted: Wanted, source: LocalSource | Download, state: dict[str, Any], position: int) -> None:
        """Before the first byte: does the source offer what is wanted, and does it fit?"""
        self._require_size(wanted, source.total)
        if isinstance(source, Download):
            if source.total is not None:
                self._require(source.total - position)
            state["validator"] = source.validator
            _store(self.path(wanted.name, "part.json"), state)

    def _digest(self, name: str, path: Path) -> str:
        """Hash a file that lies in the volume."""
        status = path.lstat()
        digest = Digest(path, status.st_blocks * 512 < status.st_size)
        try:
            return self._finish(digest, status.st_size, f"checking {name}")
        finally:
            digest.close()

    def _install(self, wanted: Wanted, digest: str) -> None:
        """Put the complete part in the place of the file, if it is what was wanted."""
        part, target = self.path(wanted.name, "part"), self.path(wanted.name)
        if wanted.sha256 not in (None, digest):
            state = _load(self.path(wanted.name, "part.json"))
            _store(self.path(wanted.name, "part.json"), {**state, "sha256": digest})
            raise ModelFilesError(
                f"{wanted.name} was not put in place: {shown(wanted.source)} has SHA-256 {digest}, declared is "
                f"{wanted.sha256}. Correct sha256 or the source. What was fetched is kept as {part} until the next "
                "run, which uses it if sha256 then fits and else starts over."
            )
        part.replace(target)
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._record(wanted.name, digest)
        self.path(wanted.name, "part.json").unlink(missing_ok=True)

    def _record(self, name: str, digest: str) -> None:
        _store(self.path(name, "sha256.json"), {"sha256": digest, **_identity(self.path(name).lstat())})


def _identity(status: os.stat_result) -> dict[str, int]:
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}


def _load(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _store(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(state), encoding="utf-8")
    partial.replace(path)
