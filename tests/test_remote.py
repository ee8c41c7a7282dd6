"""Shards in a store: the same records as from a disk, in bounded room, whatever the store does.

The store is a real HTTP server on this machine that answers ranges, and that can be told to fail, to be
slow, to cut answers short and to change a file.
"""

import json
import os
import pickle
import random
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from test_packing import record, told

from data import remote
from data.container_base import stamp_of
from data.encode import Encoder
from data.mixture import datasets_of
from data.readers import Folder
from data.remote import ShardCache, StoreError, store_address
from data.sample import Faults
from data.steps import Batches
from data.stream import Documents

MIB = 1 << 20


@dataclass
class Store:
    """What the server holds, how it misbehaves, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    version: int = 0
    failures: int = 0  # answers to come that are errors
    short: int = 0  # answers to come that lack their last byte
    delay: float = 0.0
    gets: list[str] = field(default_factory=list)
    port: int = 0

    def address(self, name: str) -> str:
        return f"ranges://127.0.0.1:{self.port}/{name}"


class Answers(BaseHTTPRequestHandler):
    """HEAD, and GET with a range; "/" lists the names."""

    protocol_version = "HTTP/1.0"
    store: Store

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        store = self.store
        time.sleep(store.delay)
        name = self.path.lstrip("/")
        if store.failures:
            store.failures -= 1
            return self.send_error(503)
        body = store.files.get(name)
        if name == "":
            body = "\n".join(store.files).encode()
        if body is None:
            return self.send_error(404)

        size = len(body)
        wanted = self.headers.get("Range")
        if wanted:
            start, end = wanted.removeprefix("bytes=").split("-")
            body = body[int(start) : int(end) + 1]
            store.gets.append(name)
        if with_body and wanted and store.short:
            store.short -= 1
            body = body[:-1]
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f"v{store.version}")
        self.send_header("X-Size", str(size))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *words) -> None:
        """Quiet."""


class Ranges(fsspec.AbstractFileSystem):
    """The file system of that server."""

    protocol = "ranges"
    cachable = False

    def ask(self, path: str, method: str = "GET", headers=None):
        host, _, name = self._strip_protocol(path).partition("/")
        request = urllib.request.Request(f"http://{host}/{name}", method=method)
        for key, value in (headers or {}).items():
            request.add_header(key, value)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise FileNotFoundError(path) from error
            raise OSError(f"status {error.code}") from error

    def info(self, path: str, **_) -> dict:
        path = self._strip_protocol(path)
        if "/" not in path.rstrip("/"):
            return {"name": path, "size": 0, "type": "directory"}
        headers, _ = self.ask(path, "HEAD")
        size = int(headers["X-Size"])
        return {"name": path, "size": size, "ETag": headers["ETag"], "type": "file"}

    def ls(self, path: str, detail: bool = True, **_) -> list:
        host = self._strip_protocol(path).partition("/")[0]
        names = self.ask(f"{host}/")[1].decode().split()
        found = [f"{host}/{name}" for name in names]
        return [self.info(name) for name in found] if detail else found

    def cat_file(self, path: str, start=None, end=None, **_) -> bytes:
        return self.ask(path, headers={"Range": f"bytes={start}-{end - 1}"})[1]


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    monkeypatch.setattr(remote, "CHUNK", 1 << 16)
    fsspec.register_implementation("ranges", Ranges, clobber=True)
    held = Store()
    handler = type("Bound", (Answers,), {"store": held})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    held.port = server.server_port
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield held
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> ShardCache:
    """Its indexes are this test's own, too."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return ShardCache(tmp_path / "cache", 64 * MIB, patience=2.0)


def lines(name: str, count: int = 40) -> bytes:
    rows = [record("?" + "x" * (i * 7 % 50), f"{name}{i}", "") for i in range(count)]
    for row in rows:
        row.pop("image", None)
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def rows_of(folder: Folder, config, tokenizer, state=None, steps: int = 8):
    """(rows of some steps, the state behind them)."""
    documents = Documents(folder.stream({}, 0), Encoder(tokenizer, config), Faults())
    batches = Batches(documents, 128, 4, 1, 0)
    if state:
        batches.load_state_dict(state)
    rows = [told(next(batches)) for _ in range(steps)]
    return rows, json.loads(json.dumps(batches.state_dict()))


def used(cache: ShardCache) -> int:
    """Bytes of all files in the cache. Under the lock nobody makes room, takes any or renames a file; it
    may be removed."""
    total = 0
    with remote.locked(cache.place() / "lock"):
        for file in cache.place().glob("*/data/*"):
            try:
                total += file.stat().st_size
            except FileNotFoundError:
                continue
    return total


# ----------------------------------------------------------------------------------- the same records


def test_records_rows_and_resume_are_those_of_a_disk(
    store, cache, tmp_path, config, tokenizer, monkeypatch
):
    """Three shards through a cache with room for one and a half: copied again and again, a resume in
    the middle, and every row as from files."""
    (tmp_path / "data").mkdir()
    for name in "abc":
        store.files[f"{name}.jsonl"] = lines(name)
        (tmp_path / "data" / f"{name}.jsonl").write_bytes(lines(name))
    monkeypatch.setattr("data.stream.RUN", 4)
    small = ShardCache(cache.directory, int(1.5 * len(lines("a"))))
    local = Folder(tmp_path / "data")
    away = Folder(store.address("*.jsonl"), cache=small)
    assert len(away) == len(local) == 120 and away.tasks() == local.tasks()
    want, _ = rows_of(local, config, tokenizer, steps=8)
    first, state = rows_of(away, config, tokenizer, steps=4)
    again = Folder(store.address("*.jsonl"), cache=small)
    second, _ = rows_of(again, config, tokenizer, state, steps=4)
    assert first + second == want
    assert again.identity() == away.identity() != local.identity()
    assert len(store.gets) > 6 and used(small) <= small.limit


def test_an_address_survives_being_a_path():
    for address in ("s3://bucket/a/b.tar", "hdfs://name:8020/a.parquet", "ranges://h:1/x"):
        assert remote.is_remote(Path(address)) and store_address(Path(address)) == address
    assert not any(map(remote.is_remote, ("C:/data", "data/a.tar", "/a:/b", "a.tar")))


def test_a_mixture_file_reaches_a_store_only_if_its_owner_allows_it(store, cache, tmp_path):
    store.files["a.jsonl"] = lines("a")
    mix = tmp_path / "mix.json"
    mix.write_text(json.dumps({"datasets": {"a": {"data": store.address("a.jsonl")}}}))
    with pytest.raises(ValueError, match="--allow-outside opens such files"):
        datasets_of(mix)
    assert len(Folder(mix, allow_outside=True, cache=cache)) == 40


def test_without_the_package_one_line_says_what_to_install(cache, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fsspec.core", None)
    with pytest.raises(ValueError, match="pip install -r requirements/remote.txt"):
        Folder("s3://bucket/a.jsonl", cache=cache)


# ------------------------------------------------------------------------------------ a bad store


def test_failures_and_short_answers_are_asked_again(store, cache):
    body = random.Random(0).randbytes(200_000)
    store.files["a.tar"] = body
    store.failures = 3
    cache.renew(Path(store.address("a.tar")))
    store.short = 3
    with cache.held(Path(store.address("a.tar"))) as here:
        assert here.read_bytes() == body and here.name == "a.tar"
    assert store.short == store.failures == 0 and len(store.gets) == 4 + 3


def test_a_store_that_stays_away_ends_the_run_and_blames_no_record(store, cache, config, tokenizer):
    store.files["a.jsonl"] = lines("a")
    folder = Folder(store.address("a.jsonl"), cache=cache)
    want, _ = rows_of(folder, config, tokenizer, steps=2)
    for file in Path(cache.directory).glob("*/data/*"):
        file.unlink()
    store.failures = 10**6
    faults = Faults()
    documents = Documents(folder.stream({}, 0), Encoder(tokenizer, config), faults)
    with pytest.raises(StoreError, match="a.jsonl: OSError status 503, 5 times; the run can go on"):
        next(Batches(documents, 128, 4, 1, 0))
    assert not faults.counts
    store.failures = 0
    assert rows_of(folder, config, tokenizer, steps=2)[0] == want
    kept = pickle.loads(pickle.dumps(StoreError("away")))
    assert isinstance(kept, StoreError) and str(kept) == "away"


def test_a_store_that_says_nothing_is_not_waited_for_without_end(store, tmp_path):
    store.files["a.tar"] = b"x" * 10
    store.delay = 1.0
    quick = ShardCache(tmp_path / "cache", MIB, patience=0.05)
    with pytest.raises(StoreError, match="TimeoutError no answer within 0.05 s, 5 times"):
        quick.renew(Path(store.address("a.tar")))


def test_a_file_that_changed_is_refused_and_a_new_run_reads_it(store, cache, config, tokenizer):
    store.files["a.jsonl"] = lines("a")
    folder = Folder(store.address("a.jsonl"), cache=cache)
    store.files["a.jsonl"] = lines("b")
    store.version = 1
    # the copy is still the file that the run began with
    assert folder[0].messages[1].parts == ("a0",)
    for file in Path(cache.directory).glob("*/data/*"):
        file.unlink()
    with pytest.raises(StoreError, match=r"changed while it was used: \d+ bytes \(v1\)"):
        folder[0]
    assert Folder(store.address("a.jsonl"), cache=cache)[0].messages[1].parts == ("b0",)


def test_a_file_that_is_not_there_is_an_error_at_once(store, cache):
    with pytest.raises(StoreError, match="none.jsonl: FileNotFoundError"):
        Folder(store.address("none.jsonl"), cache=cache)
    store.files["a.txt"] = b"x"
    with pytest.raises(ValueError, match="no such file, folder or pattern|none of"):
        Folder(store.address("*.jsonl"), cache=cache)


# ------------------------------------------------------------------------------------- the cache


def test_what_was_used_longest_ago_goes_first(store, tmp_path):
    for name in "abcd":
        store.files[f"{name}.tar"] = name.encode() * 1000
    cache = ShardCache(tmp_path / "cache", 3000)

    def use(name: str) -> None:
        with cache.held(Path(store.address(f"{name}.tar"))) as here:
            assert here.read_bytes() == name.encode() * 1000
        time.sleep(0.01)

    for name in "abca" + "d" + "ac":
        use(name)
    assert store.gets == ["a.tar", "b.tar", "c.tar", "d.tar"]
    use("b")
    assert store.gets[-1] == "b.tar" and used(cache) == 3000
    with pytest.raises(ValueError, match="4000 bytes, and the cache may hold 3000: raise --cache-"):
        store.files["e.tar"] = b"e" * 4000
        use("e")


def test_using_a_copy_does_not_look_like_a_change(store, cache):
    """What readers keep of a file (row groups, headers) they keep by its time of change."""
    store.files["a.tar"] = b"a"
    stamps = []
    for _ in range(2):
        with cache.held(Path(store.address("a.tar"))) as here:
            stamps.append(stamp_of(here))
        time.sleep(0.01)
    assert stamps[0] == stamps[1]


def test_a_shard_that_is_read_is_not_removed(store, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "CROWD", 0.3)
    for name in "ab":
        store.files[f"{name}.tar"] = name.encode() * 1000
    cache = ShardCache(tmp_path / "cache", 1500)
    with cache.held(Path(store.address("a.tar"))) as here:
        with pytest.raises(StoreError, match="all shards are in use"):
            with cache.held(Path(store.address("b.tar"))):
                raise AssertionError("no room")
        assert here.read_bytes() == b"a" * 1000
    with cache.held(Path(store.address("b.tar"))) as here:
        assert here.read_bytes() == b"b" * 1000


def test_several_processes_share_a_cache_that_is_too_small(store, tmp_path):
    """Four readers, six shards, room for three, readers killed in the middle of copies: whole files
    only, never over the limit, and what a killed one left behind is cleared away."""
    names = [f"{i}.tar" for i in range(6)]
    for i, name in enumerate(names):
        store.files[name] = bytes([i]) * 150_000
    cache = ShardCache(tmp_path / "cache", 450_000)

    def read(seed: int, count: int) -> None:
        rng = random.Random(seed)
        for _ in range(count):
            i = rng.randrange(6)
            with cache.held(Path(store.address(names[i]))) as here:
                assert here.read_bytes() == bytes([i]) * 150_000
            assert used(cache) <= cache.limit

    def fork(seed: int, count: int) -> int:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                read(seed, count)
                status = 0
            finally:
                os._exit(status)
        return child

    # some are killed while they copy
    store.delay = 0.02
    for seed in range(3):
        child = fork(seed, 100)
        time.sleep(0.15)
        os.kill(child, 9)
        os.waitpid(child, 0)
    store.delay = 0.0
    children = [fork(10 + seed, 25) for seed in range(4)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    read(99, 12)
    whole = [f for f in Path(cache.directory).glob("*/data/*") if not f.name.startswith("part-")]
    assert all(file.stat().st_size == 150_000 for file in whole)


def test_one_lock_is_waited_for_and_not_for_ever(tmp_path):
    file = tmp_path / "lock"
    with remote.locked(file, patience=1.0):
        with pytest.raises(StoreError, match="another process has held it for 0.05 s"):
            with remote.locked(file, shared=True, patience=0.05):
                raise AssertionError("it was held")


# ----------------------------------------------------------------------------------- object storage


@pytest.mark.slow
def test_a_run_reads_from_an_object_store(tmp_path, monkeypatch, config, tokenizer):
    """S3's protocol, spoken by s3fs to moto's server."""
    pytest.importorskip("s3fs")
    server_of = pytest.importorskip("moto.server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=port)
    server.start()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    try:
        system = fsspec.filesystem("s3", skip_instance_cache=True)
        system.mkdir("shards")
        (tmp_path / "data").mkdir()
        for name in "ab":
            system.pipe_file(f"shards/deep/{name}.jsonl", lines(name))
            (tmp_path / "data" / f"{name}.jsonl").write_bytes(lines(name))
        want, _ = rows_of(Folder(tmp_path / "data"), config, tokenizer)
        cache = ShardCache(tmp_path / "cache", MIB)
        for address in ("s3://shards/deep", "s3://shards/deep/*.jsonl"):
            away = Folder(address, cache=cache)
            assert rows_of(away, config, tokenizer)[0] == want
        system.pipe_file("shards/deep/a.jsonl", lines("c"))
        for file in Path(cache.directory).glob("*/data/*"):
            file.unlink()
        with pytest.raises(StoreError, match="was changed while it was used"):
            rows_of(away, config, tokenizer)
    finally:
        server.stop()
