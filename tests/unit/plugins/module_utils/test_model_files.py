# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fetching files into a directory: real files, a real HTTP server, no Docker."""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from ansible_collections.homelab.inference.plugins.module_utils import model_files
from ansible_collections.homelab.inference.plugins.module_utils.model_files import (
    Found,
    ModelFilesError,
    Store,
    Wanted,
    check_names,
    decide,
    shown,
    space_problem,
)
from hypothesis import given, settings
from hypothesis import strategies as st

CONTENT = random.Random(7).randbytes(3_000_000)
SHA = hashlib.sha256(CONTENT).hexdigest()
OTHER = "0" * 64


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small steps, so that small files take many; no waiting between attempts."""
    monkeypatch.setattr(model_files, "STEP", 100_000)
    monkeypatch.setattr(model_files, "RECEIVE", 70_000)
    monkeypatch.setattr(model_files, "FLUSH_EVERY", 500_000)
    monkeypatch.setattr(model_files, "RETRY_PAUSES", (0, 0, 0))


@pytest.fixture
def volume(tmp_path):
    directory = tmp_path / "volume"
    directory.mkdir()
    return directory


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.gguf"
    path.write_bytes(CONTENT)
    return path


def interrupt(volume, source, length, name="chat.gguf"):
    """What a killed run leaves: a part, and what it is a part of."""
    (volume / f".{name}.part").write_bytes(source.read_bytes()[:length])
    identity = {"path": str(source), "size": source.stat().st_size, "mtime_ns": source.stat().st_mtime_ns}
    (volume / f".{name}.part.json").write_text(json.dumps({"source": identity}))


# --- names, decisions, sentences


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "..", "../chat.gguf", "a/../../b", "a//b", "a/", "./a", ".a", "a/.b/c", "a\0b"]
)
def test_names_that_leave_the_volume_are_refused(name):
    with pytest.raises(ModelFilesError, match="File name"):
        check_names([name])


def test_a_name_is_given_once():
    check_names(["chat-00001-of-00002.gguf", "sub/chat-00001-of-00002.gguf"])
    with pytest.raises(ModelFilesError, match="listed twice"):
        check_names(["a", "b", "a"])


@given(st.text(alphabet="ab./\\ \0é", max_size=12))
@settings(deadline=None, max_examples=300)
def test_no_accepted_name_leads_out(name):
    try:
        check_names([name])
    except ModelFilesError:
        return
    path = os.path.normpath(f"/volume/{name}")
    assert path.startswith("/volume/")
    assert "/." not in path


@pytest.mark.parametrize(
    ("sha256", "size", "found", "changed", "always", "never"),
    [
        (SHA, 5, None, "fetch", "fetch", "fetch"),
        (SHA, 5, Found(6, SHA, True), "fetch", "fetch", "fetch"),
        (SHA, 5, Found(5, SHA, True), "keep", "hash", "keep"),
        (SHA, 5, Found(5, SHA, False), "hash", "hash", "keep"),
        (SHA, 5, Found(5, None, False), "hash", "hash", "keep"),
        (SHA, 5, Found(5, OTHER, True), "fetch", "hash", "fetch"),
        (SHA, None, Found(5, OTHER, False), "hash", "hash", "keep"),
        (None, 5, Found(5, SHA, True), "keep", "hash", "keep"),
        (None, 5, Found(5, SHA, False), "hash", "hash", "keep"),
        (None, None, Found(5, None, False), "keep", "keep", "keep"),
    ],
)
def test_decide(sha256, size, found, changed, always, never):
    wanted = Wanted("chat.gguf", "path", "/x", sha256, size)
    assert [decide(wanted, found, verify) for verify in ("changed", "always", "never")] == [changed, always, never]


def test_space_problem():
    assert space_problem("/v", 100, 100) is None
    assert space_problem("/v", 100, 40) == (
        "Not enough space in /v: 100 bytes are still to be written, 40 bytes are free. Free at least 60 bytes."
    )


def test_a_shown_url_has_no_secrets():
    assert shown("https://me:pw@hub.example.net:8443/a/b.gguf?token=x#y") == "https://hub.example.net:8443/a/b.gguf"
    assert shown("/srv/what?.gguf") == "/srv/what?.gguf"


# --- from a path


def test_a_file_is_copied_and_then_left_alone(volume, source):
    wanted = Wanted("sub/dir/chat.gguf", "path", str(source), SHA, len(CONTENT))
    store = Store(volume)
    assert not store.good(wanted, "changed")
    assert store.missing(wanted) == len(CONTENT)
    store.fetch(wanted)
    target = volume / "sub/dir/chat.gguf"
    assert target.read_bytes() == CONTENT
    assert (target.stat().st_mode & 0o777, target.parent.stat().st_mode & 0o777) == (0o644, 0o755)
    assert sorted(one.name for one in target.parent.iterdir()) == [".chat.gguf.sha256.json", "chat.gguf"]
    assert (store.fetched_bytes, store.hashed_bytes) == (len(CONTENT), len(CONTENT))

    second = Store(volume)
    assert second.good(wanted, "changed")
    assert second.good(wanted, "never")
    assert second.hashed_bytes == 0
    assert second.good(wanted, "always")
    assert second.hashed_bytes == len(CONTENT)


def test_modes_do_not_depend_on_the_umask(volume, source):
    before = os.umask(0o077)
    try:
        Store(volume).fetch(Wanted("sub/chat.gguf", "path", str(source)))
    finally:
        os.umask(before)
    assert (volume / "sub/chat.gguf").stat().st_mode & 0o777 == 0o644
    assert (volume / "sub").stat().st_mode & 0o777 == 0o755


def test_touched_file_is_hashed_once_and_kept(volume, source):
    wanted = Wanted("chat.gguf", "path", str(source), SHA)
    Store(volume).fetch(wanted)
    os.utime(volume / "chat.gguf")
    check = Store(volume)
    assert check.good(wanted, "changed", remember=False)
    assert check.hashed_bytes == len(CONTENT)
    first, second = Store(volume), Store(volume)
    assert first.good(wanted, "changed")
    assert second.good(wanted, "changed")
    assert (first.hashed_bytes, second.hashed_bytes) == (len(CONTENT), 0)


@pytest.mark.parametrize("sha256", [SHA, None])
def test_a_file_that_was_altered_in_the_volume_is_fetched_again(volume, source, sha256):
    wanted = Wanted("chat.gguf", "path", str(source), sha256)
    Store(volume).fetch(wanted)
    with (volume / "chat.gguf").open("r+b") as handle:
        handle.seek(1_000_000)
        handle.write(b"rot")
    store = Store(volume)
    assert store.good(wanted, "never")
    assert not store.good(wanted, "changed")
    store.fetch(wanted)
    assert (volume / "chat.gguf").read_bytes() == CONTENT


def test_the_record_survives_garbage(volume, source):
    wanted = Wanted("chat.gguf", "path", str(source), SHA)
    Store(volume).fetch(wanted)
    (volume / ".chat.gguf.sha256.json").write_bytes(b"[\xff")
    store = Store(volume)
    assert store.good(wanted, "changed")
    assert store.hashed_bytes == len(CONTENT)


@pytest.mark.parametrize("length", [0, 1, 99_999, 1_234_567, len(CONTENT)])
def test_an_interrupted_copy_is_continued(volume, source, length):
    interrupt(volume, source, length)
    wanted = Wanted("chat.gguf", "path", str(source), SHA, len(CONTENT))
    store = Store(volume)
    assert store.missing(wanted) == len(CONTENT) - length
    store.fetch(wanted)
    assert store.fetched_bytes == len(CONTENT) - length
    assert store.hashed_bytes == len(CONTENT)
    assert (volume / "chat.gguf").read_bytes() == CONTENT
    assert sorted(one.name for one in volume.iterdir()) == [".chat.gguf.sha256.json", "chat.gguf"]


def test_a_part_of_something_else_is_thrown_away(volume, source):
    interrupt(volume, source, 2_000_000)
    os.utime(source, ns=(1, 1))
    store = Store(volume)
    store.fetch(Wanted("chat.gguf", "path", str(source), SHA))
    assert store.fetched_bytes == len(CONTENT)


def test_a_wrong_digest_keeps_the_old_file_and_the_part(volume, source):
    (volume / "chat.gguf").write_bytes(b"old")
    wrong, right = Wanted("chat.gguf", "path", str(source), OTHER), Wanted("chat.gguf", "path", str(source), SHA)
    for _attempt in range(2):
        store = Store(volume)
        with pytest.raises(ModelFilesError, match=f"SHA-256 {SHA}, declared is {OTHER}") as error:
            store.fetch(wrong)
        assert str(volume / ".chat.gguf.part") in str(error.value)
        assert store.fetched_bytes == len(CONTENT), "a part that was found wrong is not continued"
        assert (volume / "chat.gguf").read_bytes() == b"old"
        assert (volume / ".chat.gguf.part").read_bytes() == CONTENT
    store = Store(volume)
    store.fetch(right)
    assert store.fetched_bytes == 0, "once the declared digest is corrected, what was fetched serves"
    assert (volume / "chat.gguf").read_bytes() == CONTENT


def test_a_wrong_size_is_told_before_a_byte_is_written(volume, source):
    wanted = Wanted("chat.gguf", "path", str(source), SHA, 17)
    store = Store(volume)
    with pytest.raises(ModelFilesError, match="has 3000000 bytes, but chat.gguf is declared with 17"):
        store.missing(wanted)
    with pytest.raises(ModelFilesError, match="declared with 17"):
        store.fetch(wanted)
    assert store.fetched_bytes == 0
    assert not (volume / "chat.gguf").exists()


@pytest.mark.parametrize("what", ["missing", "directory"])
def test_a_source_that_is_no_file(volume, tmp_path, what):
    (tmp_path / "directory").mkdir()
    with pytest.raises(ModelFilesError, match="Check path"):
        Store(volume).fetch(Wanted("chat.gguf", "path", str(tmp_path / what)))


def test_a_source_that_changes_while_it_is_read(volume, source, monkeypatch):
    send = model_files.LocalSource.send

    def touching(self, part, position):
        os.utime(source, ns=(position, position))
        return send(self, part, position)

    monkeypatch.setattr(model_files.LocalSource, "send", touching)
    with pytest.raises(ModelFilesError, match="was changed while it was read"):
        Store(volume).fetch(Wanted("chat.gguf", "path", str(source)))
    assert not (volume / "chat.gguf").exists()


def test_copying_works_where_the_kernel_cannot_copy_by_itself(volume, source, monkeypatch):
    def refuse(*_args):
        raise OSError(model_files.errno.EXDEV, "other file system")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    Store(volume).fetch(Wanted("chat.gguf", "path", str(source), SHA))
    assert (volume / "chat.gguf").read_bytes() == CONTENT


@pytest.mark.parametrize("begin", [0, 1_500_000, 20_000_000])
def test_holes_stay_holes_and_count_for_the_digest(volume, tmp_path, begin):
    source = tmp_path / "sparse.gguf"
    with source.open("wb") as handle:
        handle.write(CONTENT[:1_000_000])
        handle.truncate(16_000_000)
        handle.seek(16_000_000)
        handle.write(CONTENT[:1_000_000])
        handle.truncate(40_000_000)
    if begin:
        (volume / ".chat.gguf.part").touch()
        interrupt(volume, source, begin)
    content = source.read_bytes()
    wanted = Wanted("chat.gguf", "path", str(source), hashlib.sha256(content).hexdigest())
    store = Store(volume)
    store.check_space([wanted])
    store.fetch(wanted)
    target = volume / "chat.gguf"
    assert target.read_bytes() == content
    if not begin:
        assert target.stat().st_blocks * 512 < 4_000_000
        assert store.good(wanted, "always")
        assert store.hashed_bytes == 2 * len(content)


def test_an_empty_file(volume, tmp_path):
    (tmp_path / "empty").touch()
    wanted = Wanted("empty", "path", str(tmp_path / "empty"), hashlib.sha256().hexdigest(), 0)
    store = Store(volume)
    store.fetch(wanted)
    assert store.good(wanted, "always")
    assert (volume / "empty").read_bytes() == b""


def test_a_symbolic_link_does_not_lead_out(volume, source, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "chat.gguf").write_bytes(b"theirs")
    (volume / "sub").symlink_to(tmp_path / "outside")
    with pytest.raises(ModelFilesError, match="leads out of the volume"):
        Store(volume).fetch(Wanted("sub/chat.gguf", "path", str(source)))
    (volume / "chat.gguf").symlink_to(tmp_path / "outside" / "chat.gguf")
    (volume / ".chat.gguf.part").symlink_to(tmp_path / "outside" / "chat.gguf")
    Store(volume).fetch(Wanted("chat.gguf", "path", str(source), SHA))
    assert not (volume / "chat.gguf").is_symlink()
    assert (tmp_path / "outside" / "chat.gguf").read_bytes() == b"theirs"


def test_a_disk_that_is_too_small_is_told_with_numbers(volume, source):
    huge = Wanted("chat.gguf", "url", "http://localhost/chat.gguf", None, 1 << 60)
    with pytest.raises(ModelFilesError, match=f"Not enough space in {volume}: {1 << 60} bytes are still to be written"):
        Store(volume).check_space([huge])


def test_another_run_is_waited_for(volume, tmp_path):
    order = []
    store = Store(volume, model_files.ProgressFile(str(tmp_path / "progress")))

    def second():
        with store.lock():
            order.append("second")

    with Store(volume).lock():
        thread = threading.Thread(target=second)
        thread.start()
        while "waiting for another run" not in (
            (tmp_path / "progress").read_text() if (tmp_path / "progress").exists() else ""
        ):
            pass
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


# --- from the controller: the action plugin sends, the store says what it lacks


def test_a_file_of_the_controller(volume):
    wanted = Wanted("chat.gguf", "controller_path", "/home/owner/chat.gguf", SHA, len(CONTENT), 42)
    store = Store(volume)
    assert store.missing(wanted) == len(CONTENT)
    assert store.await_part(wanted) == 0
    part = volume / ".chat.gguf.part"
    part.write_bytes(CONTENT[:1000])
    assert store.await_part(wanted) == 1000
    part.write_bytes(CONTENT)
    assert store.await_part(wanted) is None
    assert (volume / "chat.gguf").read_bytes() == CONTENT
    assert store.good(wanted, "changed")


def test_another_file_of_the_controller_starts_over(volume):
    store = Store(volume)
    store.await_part(Wanted("chat.gguf", "controller_path", "/home/owner/chat.gguf", None, 5, 42))
    (volume / ".chat.gguf.part").write_bytes(b"abc")
    assert store.await_part(Wanted("chat.gguf", "controller_path", "/home/owner/chat.gguf", None, 5, 43)) == 0


# --- from a URL


class Server(ThreadingHTTPServer):
    """Serves CONTENT; ways of going wrong are switched on by the tests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges = True
        self.etag = '"one"'
        self.length = True
        self.content = CONTENT
        self.cut_after = []
        self.replaced_by = None
        self.fail = []
        self.token = None
        self.redirect = None
        self.requests = []
        self.url = f"http://127.0.0.1:{self.server_port}/chat.gguf"

    def wanted(self, sha256=SHA, size=None):
        return Wanted("chat.gguf", "url", self.url, sha256, size)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    def log_message(self, *_args):
        """Nothing to print."""

    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        if server.fail:
            self.send_error(server.fail.pop(0))
            return
        if server.token and self.headers.get("Authorization") != f"Bearer {server.token}":
            self.send_error(401)
            return
        if server.redirect:
            self.send_response(302)
            self.send_header("Location", server.redirect)
            self.end_headers()
            return
        begin = 0
        wanted = self.headers.get("Range")
        if wanted and server.ranges and self.headers.get("If-Range") in (None, server.etag):
            begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if begin >= len(server.content) and begin:
            self.send_error(416)
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(server.content) - 1}/{len(server.content)}")
        if server.length:
            self.send_header("Content-Length", str(len(server.content) - begin))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        body = server.content[begin:]
        self.wfile.write(body[: server.cut_after.pop(0)] if server.cut_after else body)
        if server.replaced_by:
            server.content, server.etag = server.replaced_by


@pytest.fixture
def server():
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def test_download(volume, server):
    store = Store(volume)
    assert store.missing(server.wanted()) is None
    assert store.missing(server.wanted(size=len(CONTENT))) == len(CONTENT)
    store.fetch(server.wanted())
    assert (volume / "chat.gguf").read_bytes() == CONTENT
    assert (store.fetched_bytes, store.hashed_bytes) == (len(CONTENT), len(CONTENT))
    assert sorted(one.name for one in volume.iterdir()) == [".chat.gguf.sha256.json", "chat.gguf"]


def test_download_without_a_length(volume, server):
    server.length = False
    Store(volume).fetch(server.wanted())
    assert (volume / "chat.gguf").read_bytes() == CONTENT


def test_a_cut_download_goes_on_where_it_was_cut(volume, server):
    server.cut_after = [1_000_000, 500_000]
    store = Store(volume)
    store.fetch(server.wanted())
    assert (volume / "chat.gguf").read_bytes() == CONTENT
    assert [one.get("Range") for one in server.requests] == [None, "bytes=1000000-", "bytes=1500000-"]
    assert [one.get("If-Range") for one in server.requests] == [None, '"one"', '"one"']
    assert (store.fetched_bytes, store.hashed_bytes) == (len(CONTENT), len(CONTENT))


@pytest.mark.parametrize("declared", [SHA, None])
def test_a_cut_download_without_ranges_starts_over(volume, server, declared):
    server.ranges, server.etag, server.cut_after = False, None, [1_000_000]
    Store(volume).fetch(server.wanted(declared))
    assert (volume / "chat.gguf").read_bytes() == CONTENT


def test_a_download_that_brings_nothing_new_fails_and_is_continued_by_the_next_run(volume, server):
    server.cut_after = [1_000_000] + [0] * 20
    with pytest.raises(
        ModelFilesError, match="1000000 of 3000000 bytes. 1000000 bytes are kept; run again to continue"
    ):
        Store(volume).fetch(server.wanted())
    assert len(server.requests) == 1 + 4
    server.cut_after = []
    store = Store(volume)
    store.fetch(server.wanted())
    assert store.fetched_bytes == len(CONTENT) - 1_000_000
    assert (volume / "chat.gguf").read_bytes() == CONTENT


@pytest.mark.parametrize(("first", "second"), [('"one"', '"two"'), ('W/"one"', 'W/"two"'), ('"one"', None)])
def test_another_file_at_the_same_url_is_not_appended(volume, server, first, second):
    server.etag, server.cut_after = first, [1_000_000] + [0] * 20
    with pytest.raises(ModelFilesError):
        Store(volume).fetch(server.wanted())
    server.cut_after, server.etag, server.requests = [], second, []
    store = Store(volume)
    store.fetch(server.wanted())
    assert store.fetched_bytes == len(CONTENT)
    assert (volume / "chat.gguf").read_bytes() == CONTENT


def test_a_file_that_is_replaced_between_two_attempts(volume, server):
    server.content, server.cut_after = bytes(len(CONTENT)), [1_000_000]
    server.replaced_by = (CONTENT, '"two"')
    store = Store(volume)
    store.fetch(server.wanted())
    assert (volume / "chat.gguf").read_bytes() == CONTENT
    assert store.fetched_bytes == 1_000_000 + len(CONTENT)


def test_a_part_without_validator_and_digest_is_not_continued(volume, server):
    server.etag, server.cut_after = None, [1_000_000] + [0] * 20
    with pytest.raises(ModelFilesError):
        Store(volume).fetch(server.wanted(None))
    server.cut_after = []
    store = Store(volume)
    store.fetch(server.wanted(None))
    assert store.fetched_bytes == len(CONTENT)


def test_a_part_that_is_complete_is_not_asked_for(volume, server):
    (volume / ".chat.gguf.part").write_bytes(CONTENT)
    (volume / ".chat.gguf.part.json").write_text(json.dumps({"source": {"url": server.url}, "validator": '"one"'}))
    Store(volume).fetch(server.wanted(size=len(CONTENT)))
    assert server.requests == []
    assert (volume / "chat.gguf").read_bytes() == CONTENT


def test_a_part_that_is_too_long_starts_over(volume, server):
    (volume / ".chat.gguf.part").write_bytes(CONTENT + b"more")
    (volume / ".chat.gguf.part.json").write_text(json.dumps({"source": {"url": server.url}, "validator": '"one"'}))
    Store(volume).fetch(server.wanted())
    assert [one.get("Range") for one in server.requests] == [f"bytes={len(CONTENT) + 4}-", None]
    assert (volume / "chat.gguf").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (404, "failed: HTTP 404 Not Found. Check the URL."),
        (403, "failed: HTTP 403 Forbidden. Set url_token, or accept the model's terms at the hub."),
    ],
)
def test_http_errors_are_one_sentence(volume, server, code, sentence):
    server.fail = [code]
    with pytest.raises(ModelFilesError) as error:
        Store(volume).fetch(server.wanted())
    assert str(error.value) == f"Download of {server.url} {sentence}"
    assert len(server.requests) == 1


def test_a_busy_server_is_asked_again(volume, server):
    server.fail = [503, 429, 500]
    Store(volume).fetch(server.wanted())
    assert (volume / "chat.gguf").read_bytes() == CONTENT


def test_nobody_there(volume, server):
    server.server_close()
    with pytest.raises(ModelFilesError, match="Connection refused. 0 bytes are kept"):
        Store(volume).fetch(server.wanted())


def test_a_size_that_the_server_does_not_offer(volume, server):
    with pytest.raises(ModelFilesError, match="has 3000000 bytes, but chat.gguf is declared with 17"):
        Store(volume).fetch(server.wanted(size=17))
    assert (volume / ".chat.gguf.part").stat().st_size == 0


def test_other_schemes_are_refused(volume, source):
    with pytest.raises(ModelFilesError, match="not an http or https URL"):
        Store(volume).fetch(Wanted("chat.gguf", "url", f"file://{source}"))


def test_the_token_is_sent_to_its_host_alone(volume, server):
    storage = Server()
    thread = threading.Thread(target=storage.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        server.token, server.redirect = "hf_secret", storage.url
        with pytest.raises(ModelFilesError, match="Set url_token"):
            Store(volume).fetch(server.wanted())
        Store(volume, token="hf_secret").fetch(server.wanted())
        assert (volume / "chat.gguf").read_bytes() == CONTENT
        assert "Authorization" not in storage.requests[0]
        assert "hf_secret" not in "".join(one.read_text("latin-1") for one in volume.iterdir() if one.suffix == ".json")
    finally:
        storage.shutdown()
        storage.server_close()
        thread.join()


def test_the_token_goes_along_within_one_host(volume, server):
    server.token = "hf_secret"
    requests = []

    class Renamed(Handler):
        def do_GET(self):
            requests.append(self.path)
            self.server.redirect = "/renamed.gguf" if self.path == "/chat.gguf" else None
            super().do_GET()

    server.RequestHandlerClass = Renamed
    Store(volume, token="hf_secret").fetch(server.wanted())
    assert requests == ["/chat.gguf", "/renamed.gguf"]
    assert (volume / "chat.gguf").read_bytes() == CONTENT
