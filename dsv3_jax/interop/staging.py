"""A folder that appears complete or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dsv3_jax.config import ConfigError


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yields a folder beside `target` to write into, and renames it to `target` when the block ends well.

    All is on disk before the rename. After an error the folder is removed; after a kill the next attempt removes it.

    Raises:
      ConfigError: `target` exists, or another process is writing it.
    """
    target = target.absolute()
    if target.exists():
        raise ConfigError(f"target {target} exists: choose another folder, or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{partial} is being written by another process: wait for it, or choose another "
                              "target") from error
        try:
            for left in partial.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield partial
            _to_disk(partial)
            os.rename(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _sync(target.parent)
    finally:
        os.close(lock)


def _to_disk(folder: Path) -> None:
    """Waits until every file below `folder`, and every folder, is on disk."""
    for path, _, files in os.walk(folder):
        for name in (*files, "."):
            _sync(Path(path, name))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
