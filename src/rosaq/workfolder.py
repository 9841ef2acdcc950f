"""The hidden folder beside the output where a run keeps what it has done, so that the same command can go on after any end.

A record is written under another name, flushed to disk and renamed, so it is there whole or not at all, and it carries
a SHA-256 of its content. The folder says which run it belongs to; one process at a time works in it. When the
checkpoint in it is whole, that is renamed to the output's name, and the folder is removed.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from rosaq.distributed import Ranks
from rosaq.new_folders import missing_parents, remove_empty
from rosaq.safetensors_folder import raw_bytes, read_json

CHECKPOINT, DISTILLED, STATE, LOCK = "checkpoint", "distilled", "state.json", "lock"
UNFINISHED = "tmp-"  # begins the name of a file that is being written


class WorkFolder:
    """What a run has done, on disk; use as a context manager.

    Args:
        destination: the output; the folder is `.NAME.partial` beside it.
        identity: what the result follows from, JSON-able: model, recipe, calibration, version, device.
        ranks: the processes that work together; the first one holds the lock.
        force: forget what is there and start over.

    Raises:
        ValueError: another run is at work in it, it belongs to a run that differs (says in what), or it cannot be written.
    """

    def __init__(self, destination: Path, identity: Mapping[str, Any], ranks: Ranks, force: bool = False) -> None:
        """Nothing is touched yet."""
        self.destination, self.path = destination, work_path(destination)
        self.checkpoint, self.distilled = self.path / CHECKPOINT, self.path / DISTILLED
        self._identity, self._ranks, self._force = json.loads(json.dumps(identity)), ranks, force
        self._lock: int | None = None
        self._made = missing_parents(self.path)
        self._pool: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None

    def __enter__(self) -> "WorkFolder":
        """Take the folder: make it, or find that it is this run's."""
        if self._ranks.first:
            with disk_errors(self.path):
                self._lock = _locked(self.path)
            try:
                self._claim()
            except BaseException:
                os.close(self._lock)
                raise
        self._pool = ThreadPoolExecutor(1)
        try:
            claimed = self._ranks.agree(str(self.path.stat().st_ino) if self._ranks.first else "")
            if not self.path.is_dir() or (os.stat(self.path).st_ino != int(claimed)):
                raise ValueError(f"{self.path}: not on a file system that all ranks see")
        except BaseException as error:  # an interrupt while the others are waited for, too
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Keep what is done, and say so; nothing stays where nothing was done."""
        assert self._pool is not None
        self._pool.shutdown(wait=True)
        if self._lock is None:
            return
        if error is not None and self.path.is_dir():
            if any(self.path.glob("*-*.*")):
                error.add_note(f"what is done is kept in {self.path}: the same command goes on from there, with --force it starts over")
            elif not self.published:
                _remove(self.path, *self._made)
        os.close(self._lock)

    def _claim(self) -> None:
        state = self.path / STATE
        if self._force:
            for entry in self.path.iterdir():
                if entry.name != LOCK:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if state.exists():
            known = read_json(state)
            differing = _differences(known, self._identity)
            if differing:
                raise ValueError(f"{self.path}: belongs to another run: {'; '.join(differing)}; give the same as before, or --force to start over")
        for unfinished in (*self.path.glob(f"{UNFINISHED}*"), *self.checkpoint.glob(f"{UNFINISHED}*")):
            unfinished.unlink()
        if not state.exists() and not self.published:
            self.note("state", self._identity)

    @property
    def published(self) -> bool:
        """Whether the checkpoint has its name already, and only this folder was left to remove."""
        return self.destination.is_dir() and any(self.destination.iterdir())

    def later(self, job: Callable[..., None], *arguments: Any) -> None:
        """Do something in the background, one thing after the other; waits for what was asked for before.

        Raises:
            Exception: of what was asked for before.
        """
        assert self._pool is not None
        self.settle()
        self._last = self._pool.submit(job, *arguments)

    def settle(self) -> None:
        """Wait until everything asked for is done."""
        if self._last is not None:
            self._last.result()
            self._last = None

    def has(self, name: str) -> bool:
        """Whether there is a record of tensors of this name."""
        return (self.path / f"{name}.safetensors").is_file()

    def save(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make a record of tensors."""
        kept = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        self._write(f"{name}.safetensors", save(kept, {"sha256": tensors_hash(kept)}))

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a record.

        Raises:
            ValueError: it is damaged; names the file.
        """
        path = self.path / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as record:
                tensors = {key: record.get_tensor(key).clone() for key in record.keys()}  # noqa: SIM118  (not a mapping)
                recorded = (record.metadata() or {}).get("sha256")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: damaged: {error}; --force starts over") from error
        if tensors_hash(tensors) != recorded:
            raise ValueError(f"{path}: damaged: its SHA-256 is not the one that was written; --force starts over")
        return tensors

    def remove(self, name: str) -> None:
        """Remove a record of tensors if it is there."""
        (self.path / f"{name}.safetensors").unlink(missing_ok=True)

    def note(self, name: str, value: dict[str, Any]) -> None:
        """Make a record of a JSON object."""
        self._write(f"{name}.json", (json.dumps(value, indent=2) + "\n").encode())

    def noted(self, name: str) -> dict[str, Any] | None:
        """The JSON object of a record, or None where there is no such record."""
        path = self.path / f"{name}.json"
        return read_json(path) if path.is_file() else None

    def _write(self, name: str, content: bytes) -> None:
        with disk_errors(self.path):
            write_whole(self.path / name, content)

    def place(self) -> None:
        """Give the checkpoint, the distilled one where there is one, its name."""
        with disk_errors(self.destination):
            if not self.published:
                if self.destination.exists():
                    self.destination.rmdir()
                made = self.checkpoint
                if self.distilled.is_dir():
                    shutil.rmtree(self.checkpoint, ignore_errors=True)
                    made = self.distilled
                made.rename(self.destination)
                flush(self.destination.parent)

    def publish(self) -> None:
        """Give the checkpoint its name, and remove this folder."""
        self.place()
        with disk_errors(self.destination):
            _remove(self.path)


def work_path(destination: Path) -> Path:
    """The work folder of an output."""
    return destination.parent / f".{destination.name}.partial"


def check_destination(destination: Path) -> None:
    """Refuse an output that exists and is not an empty folder, unless a run has just given it its name.

    A link or a mount point is refused too: the finished folder is renamed to its place, which neither can be.

    Raises:
        ValueError: says what it is.
    """
    if destination.is_symlink():
        raise ValueError(f"{destination}: output is a symbolic link, not a folder; name the folder itself")
    if os.path.ismount(destination):
        raise ValueError(f"{destination}: output is a mount point; name a folder inside it")
    if destination.is_dir():
        work = work_path(destination)
        only_to_clean = work.is_dir() and not (work / CHECKPOINT).exists()
        if any(destination.iterdir()) and not only_to_clean:
            raise ValueError(f"{destination}: output folder is not empty; name another or empty it")
    elif destination.exists():
        raise ValueError(f"{destination}: output is not a folder")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say what a disk refuses as a `ValueError` that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


def flush(path: Path) -> None:
    """Have a file or folder on disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(file: Path, content: bytes) -> None:
    """Write a file at once: a reader sees the whole of it or what was there before, and it survives a crash.

    Raises:
        OSError: it cannot be written.
    """
    partial = file.with_name(f"{UNFINISHED}{os.getpid()}-{file.name}")
    with partial.open("wb") as unfinished:
        unfinished.write(content)
        unfinished.flush()
        os.fsync(unfinished.fileno())
    partial.rename(file)
    flush(file.parent)


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of tensors on the CPU: their names and bytes in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        if tensors[name].numel():
            digest.update(raw_bytes(tensors[name].contiguous()))
    return digest.hexdigest()


def _locked(folder: Path) -> int:
    """Make the folder and lock it for this process, however that ends."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise ValueError(f"{folder}: another run is at work on this output") from error
        try:
            if os.stat(folder / LOCK).st_ino == os.fstat(handle).st_ino:
                return handle
        except FileNotFoundError:  # the run that held it has just ended and removed the folder
            pass
        os.close(handle)


def _remove(folder: Path, *above: Path) -> None:
    """Remove a work folder, what tells whose it is last, and those above it if they are empty then."""
    for entry in sorted(folder.iterdir(), key=lambda entry: (entry.name == STATE, entry.name == LOCK)):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
    folder.rmdir()
    remove_empty(above)


def _differences(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between two nested mappings, in words: "recipe bits was 4, is 3"."""

    def flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from flat(inner, f"{name} {key}".strip())
        else:
            yield name, value

    before, now = dict(flat(known, "")), dict(flat(wanted, ""))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name} was {before.get(name, 'absent')}, is {now.get(name, 'absent')}" for name in names[:3]]
