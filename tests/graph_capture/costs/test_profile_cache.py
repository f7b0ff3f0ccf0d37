"""What is remembered of measured times."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from graph_capture.costs import profile_cache
from graph_capture.costs.profile_cache import (
    ProfileCache,
    ProfileCacheWarning,
    default_cache_dir,
)


def _file(directory: Path) -> Path:
    return directory / "profile-1.sqlite3"


def _fill(directory: Path, num_entries: int = 200) -> None:
    cache = ProfileCache(directory, "here")
    for i in range(num_entries):
        cache.put("time_ns", f"call {i}", i)
    cache.save()


def test_what_is_saved_is_known_to_the_next(tmp_path: Path) -> None:
    """A second cache on the same directory knows both kinds of figures of the same call."""
    first = ProfileCache(tmp_path / "new" / "directory", "here")
    first.put("time_ns", "mm", 17)
    first.put("scratch_bytes", "mm", 0)
    first.save()
    second = ProfileCache(tmp_path / "new" / "directory", "here")
    assert second.get("time_ns", "mm") == 17
    assert second.get("scratch_bytes", "mm") == 0
    assert second.get("time_ns", "bmm") is None


def test_environments_are_apart(tmp_path: Path) -> None:
    """Times of another machine or number of threads are not taken for these."""
    _fill(tmp_path)
    assert ProfileCache(tmp_path, "there").get("time_ns", "call 1") is None


def test_nothing_is_written_before_it_is_saved(tmp_path: Path) -> None:
    """Without anything to save there is no file."""
    ProfileCache(tmp_path, "here").save()
    assert not list(tmp_path.iterdir())


def test_entries_of_others_stay(tmp_path: Path) -> None:
    """Two caches that were opened side by side both save, and the first figure of a call stays."""
    a, b = ProfileCache(tmp_path, "here"), ProfileCache(tmp_path, "here")
    a.put("time_ns", "of a", 1)
    a.put("time_ns", "of both", 10)
    b.put("time_ns", "of b", 2)
    b.put("time_ns", "of both", 20)
    a.save()
    b.save()
    found = ProfileCache(tmp_path, "here")
    assert [found.get("time_ns", c) for c in ("of a", "of b", "of both")] == [1, 2, 10]


def _garbage(path: Path) -> None:
    path.write_bytes(b"no database at all" * 1000)


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def _overwritten(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:8192] = b"\xff" * 4096
    path.write_bytes(content)


def _other_tables(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE VIEW measured AS SELECT 'a' AS call")


def _wrong_values(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE measured SET value = 'much'")


def _negative_values(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE measured SET value = -1")


@pytest.mark.parametrize(
    "damage",
    [_garbage, _truncated, _overwritten, _other_tables, _wrong_values, _negative_values],
)
def test_a_damaged_file_is_started_again(damage, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A file that is damaged or hostile is named, thrown away, and serves again afterwards."""
    _fill(tmp_path)
    damage(_file(tmp_path))
    with pytest.warns(ProfileCacheWarning, match=r"profile-1\.sqlite3 is damaged"):
        cache = ProfileCache(tmp_path, "here")
    assert cache.get("time_ns", "call 1") is None
    cache.put("time_ns", "call 1", 5)
    cache.save()
    assert ProfileCache(tmp_path, "here").get("time_ns", "call 1") == 5


def test_a_file_that_is_damaged_meanwhile(tmp_path: Path) -> None:
    """Damage that is found when saving is handled like damage that is found when reading."""
    _fill(tmp_path)
    cache = ProfileCache(tmp_path, "here")
    _garbage(_file(tmp_path))
    cache.put("time_ns", "new", 5)
    with pytest.warns(ProfileCacheWarning, match="is damaged"):
        cache.save()
    assert ProfileCache(tmp_path, "here").get("time_ns", "new") == 5


def test_an_empty_file_is_a_new_one(tmp_path: Path) -> None:
    """A file of no bytes, as a process leaves that ended at once, is no damage."""
    _file(tmp_path).touch()
    _fill(tmp_path)
    assert ProfileCache(tmp_path, "here").get("time_ns", "call 1") == 1


_WRITER = """
import sys
from pathlib import Path
from graph_capture.costs.profile_cache import ProfileCache
for i in range(50):
    cache = ProfileCache(Path(sys.argv[1]), "here")
    cache.put("time_ns", f"{sys.argv[2]} {i}", i)
    cache.save()
"""


def test_two_processes_at_once(tmp_path: Path) -> None:
    """Two processes that write fifty times each lose nothing of each other's."""
    writers = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", _WRITER, str(tmp_path), name])
        for name in ("a", "b")
    ]
    assert [writer.wait(timeout=100) for writer in writers] == [0, 0]
    found = ProfileCache(tmp_path, "here")
    assert all(found.get("time_ns", f"{name} {i}") == i for name in "ab" for i in range(50))


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    """Where no directory can be made, all goes on in memory, and a warning names the file."""
    (tmp_path / "file").touch()
    cache = ProfileCache(tmp_path / "file" / "below", "here")
    cache.put("time_ns", "mm", 1)
    with pytest.warns(ProfileCacheWarning, match=r"below.profile-1\.sqlite3 cannot be used"):
        cache.save()
    assert cache.get("time_ns", "mm") == 1


def test_a_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that can only be read is read; saving warns and forgets nothing."""
    _fill(tmp_path)

    def refuse(path: Path, rows: object) -> None:
        raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr(profile_cache, "_write", refuse)
    cache = ProfileCache(tmp_path, "here")
    cache.put("time_ns", "new", 5)
    with pytest.warns(ProfileCacheWarning, match="readonly"):
        cache.save()
    assert cache.get("time_ns", "call 1") == 1
    assert cache.get("time_ns", "new") == 5


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_protected_directory(tmp_path: Path) -> None:
    """In a directory that is really protected the file can still be read."""
    _fill(tmp_path)
    _file(tmp_path).chmod(0o400)
    tmp_path.chmod(0o500)
    cache = ProfileCache(tmp_path, "here")
    assert cache.get("time_ns", "call 1") == 1
    cache.put("time_ns", "new", 5)
    with pytest.warns(ProfileCacheWarning):
        cache.save()
    tmp_path.chmod(0o700)


def test_a_file_that_stays_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process that holds the file for good delays planning, it does not stop it."""
    _fill(tmp_path)
    monkeypatch.setattr(profile_cache, "_WAIT_S", 0.1)
    cache = ProfileCache(tmp_path, "here")
    cache.put("time_ns", "new", 5)
    holder = sqlite3.connect(_file(tmp_path), isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.warns(ProfileCacheWarning, match="locked"):
        cache.save()
    holder.close()


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The platform's own convention, and nowhere without a home."""
    monkeypatch.setenv("XDG_CACHE_HOME", os.path.abspath("/caches"))
    assert default_cache_dir() == Path(os.path.abspath("/caches")) / "remat-planner"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache_dir() == Path.home() / ".cache" / "remat-planner"

    def homeless(*_: object) -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    assert default_cache_dir() is None
    with pytest.warns(ProfileCacheWarning, match="no home directory"):
        ProfileCache(None, "here").save()


def _flipped(tmp_path: Path, places_of: Callable[[bytes], Iterable[int]]) -> None:
    with_entry = ProfileCache(tmp_path, "e")
    with_entry.put("time_ns", "x", 5)
    with_entry.save()
    path = tmp_path / "profile-1.sqlite3"
    good = path.read_bytes()
    damaged = 0
    for place in places_of(good):
        for value in (good[place] ^ 0xFF, good[place] ^ 1, 0xAC):
            path.write_bytes(good[:place] + bytes([value]) + good[place + 1 :])
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                cache = ProfileCache(tmp_path, "e")
                cache.put("time_ns", "y", 7)
                cache.save()
            assert all(w.category is ProfileCacheWarning for w in said), place
            assert all("started again" in str(w.message) for w in said), (place, said)
            assert len(said) <= 1, place
            assert ProfileCache(tmp_path, "e").get("time_ns", "y") == 7, place
            damaged += len(said)
    assert damaged > 0


def test_any_damaged_byte_of_the_header_is_started_again(tmp_path: Path) -> None:
    """Or does no harm; no byte ends in another error or in a cache that is never used again."""
    _flipped(tmp_path, lambda content: range(0, 110, 2))


@pytest.mark.slow
def test_any_damaged_byte_is_started_again(tmp_path: Path) -> None:
    """Whatever it belongs to: text that is no UTF-8, pages, the schema, values.

    Of what pages have free, which is zeros and is not read, some bytes stand for all.
    """

    def places_of(content: bytes) -> list[int]:
        return [
            i for i in range(len(content)) if any(content[max(0, i - 2) : i + 3]) or i % 97 == 0
        ]

    _flipped(tmp_path, places_of)
