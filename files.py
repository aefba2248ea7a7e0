"""Writing to disk so that an interrupted run leaves nothing half-written under a final name."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


def check_new_folder(folder: Path) -> None:
    """Raise a FileExistsError if there is anything at `folder` that a result would replace."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already; name a folder that is not there or is empty.")


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write to, which becomes `folder` when the block ends well and goes away when it does not.

    What a killed run left is removed first.

    Raises:
        FileExistsError: something is at `folder`, or another process is making it.
    """
    check_new_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged, lock_file = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "lock"))
    try:
        with FileLock(lock_file, timeout=0):
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir()
            try:
                yield staged
                if folder.exists():
                    folder.rmdir()
                staged.rename(folder)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
                lock_file.unlink(missing_ok=True)
    except Timeout as error:
        raise FileExistsError(f"Another process is writing {folder}.") from error


def check_disk_space(folder: Path, num_bytes: int) -> None:
    """Raise an OSError if the disk that is to hold `folder` has less than `num_bytes` free."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise OSError(f"{folder} needs {num_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free.")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
