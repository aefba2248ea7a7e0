"""Writing to disk so that an interrupted run leaves nothing half-written under a final name."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_new_folder(folder: Path) -> None:
    """Raise a FileExistsError if there is anything at `folder` that a result would replace."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already; name a folder that is not there or is empty.")


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write to, which becomes `folder` when the block ends well and goes away when it does not."""
    check_new_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as staging:
        staged = Path(staging) / folder.name
        staged.mkdir()
        yield staged
        if folder.exists():
            folder.rmdir()
        staged.rename(folder)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
