"""A checkpoint that appears whole or not at all, and of which an interrupted run leaves what the next one goes on with.

Beside the output, ``<output>.partial/`` holds ``files/``, which is renamed in the end, and ``progress.json``: whose
output it is, and how much of each file has reached the disk. It is locked while a run writes to it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from fasttransfer.checkpoint_files import safetensors

_FORMAT = 1


class Output:
    """The output of one run.

    Args:
        path: A directory, or a file.
        file: Whether it is a file, which has the only name that is written.
        fingerprint: Of the run; what another run left is not used but removed.

    Raises:
        FileExistsError: There is something at ``path``, or something that is not ours beside it.
        BlockingIOError: Another run is at work on it.
    """

    def __init__(self, path: Path, file: bool, fingerprint: str) -> None:
        self.path, self._file, self._fingerprint = path, file, fingerprint
        self.work = path.with_name(path.name + ".partial")
        self.files = self.work / "files"
        self._journal = self.work / "progress.json"
        self._lock: int | None = None
        self.restarted = False  # what another run had left was removed
        self._done: dict[str, int] = {}

    def occupied(self) -> bool:
        """Whether there is something at the path: an empty directory does not count."""
        if self.path.is_dir() and not self.path.is_symlink():
            return self._file or any(self.path.iterdir())
        return os.path.lexists(self.path)

    def open(self) -> bool:
        """Take what an interrupted run left, if it was the same one; whether all was done already."""
        self.work.mkdir(parents=True, exist_ok=True)
        try:
            self._take_lock()
            return self._open()
        except OSError:
            self.release()
            if not any(self.work.iterdir()):
                self.work.rmdir()
            raise

    def _open(self) -> bool:
        record = self._record()
        ours = record.get("fingerprint") == self._fingerprint
        left = {f.name for f in self.work.iterdir()}
        if self.occupied():
            # Killed between the last rename and the end.
            if ours and not (self.files.exists() and any(self.files.iterdir())):
                self._close()
                return True
            raise FileExistsError(f"{self.path} exists; remove it, or write to another place")
        if not record and left - {"progress.json", "progress.new"}:
            raise FileExistsError(f"{self.work} is in the way, and no interrupted blend; remove it")
        if ours:
            self._done = {name: int(n) for name, n in record["done"].items()}
        else:
            self.restarted = self.files.exists()
            if self.restarted:
                shutil.rmtree(self.files)
            self._save()
        self.files.mkdir(exist_ok=True)
        return False

    def done(self, name: str) -> int:
        """Bytes of a file that are there."""
        path = self.files / name
        recorded = self._done.get(name, 0)
        return recorded if path.is_file() and path.stat().st_size >= recorded else 0

    def record(self, name: str, nbytes: int) -> None:
        """Remember that so many bytes of a file have reached the disk."""
        self._done[name] = nbytes
        self._save()

    def add(self, name: str, content: bytes) -> None:
        """Write a small file."""
        with open(self.files / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def copy(self, source: Path) -> None:
        """Copy a file as it is."""
        shutil.copyfile(source, self.files / source.name)
        with open(self.files / source.name, "rb") as file:
            os.fsync(file.fileno())

    def publish(self, names: list[str], others: list[str]) -> None:
        """Let the real loader look at the safetensors files, then give them and the other files their place."""
        for name in names:
            with safetensors().safe_open(self.files / name, framework="pt"):
                pass
        for file in self.files.iterdir():
            if file.name not in (*names, *others):
                file.unlink()  # of an interrupted run, and gone from the target since
        _sync_folder(self.files)
        if self._file:
            os.replace(self.files / names[0], self.path)
        else:
            if self.path.is_dir():
                self.path.rmdir()  # it is empty
            os.replace(self.files, self.path)
        _sync_folder(self.path.parent)
        self._close()

    def release(self) -> None:
        """Let another run in."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _close(self) -> None:
        if self.files.exists():
            self.files.rmdir()
        self._journal.unlink(missing_ok=True)
        self.release()
        self.work.rmdir()

    def _record(self) -> dict[str, Any]:
        try:
            record = json.loads(self._journal.read_bytes())
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) and record.get("format") == _FORMAT else {}

    def _save(self) -> None:
        record = {"format": _FORMAT, "fingerprint": self._fingerprint, "done": self._done}
        new = self._journal.with_suffix(".new")
        with open(new, "w") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self._journal)

    def _take_lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        self._lock = os.open(self.work, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(self._lock), os.stat(self.work))  # and not one that is gone
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise BlockingIOError(f"another run is writing to {self.work}")


def _sync_folder(path: Path) -> None:
    if os.name != "posix":
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
