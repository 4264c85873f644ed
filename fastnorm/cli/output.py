"""The folder that a command's results go to: complete, or not there at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from fastnorm.cli.arguments import Folder, UsageError

ALLOWED = Folder().allowed


def default_folder(name: str) -> Path:
    """`runs/<name>-<time>`, with -2, -3, … where that is taken by a run of the same second."""
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    folder, number = Path("runs", stem), 1
    while folder.exists() or _staging(folder).exists():
        number += 1
        folder = Path("runs", f"{stem}-{number}")
    return folder


@contextmanager
def results_folder(folder: Path) -> Iterator[Path]:
    """Yields a staging folder; what is written there is in `folder` after a block that ends well.

    An exception, Ctrl-C included, removes the staging folder and every parent made for it. Staging
    is a sibling of `folder` and takes its name at the end; where `folder` exists already (it may be
    a mount, which cannot be replaced) it lies inside, and its files move up.

    Raises:
        UsageError: `folder` has files in it, cannot be written, or another run is writing to it.
    """
    folder = folder.resolve()
    made: list[Path] = []
    try:
        staging = _make_staging(folder, made)
    except OSError as error:
        _remove(made)
        reason = f"cannot write {error.filename!r}, {error.strerror}"
        raise UsageError(f"argument --out: {reason} (allowed: {ALLOWED})") from None
    try:
        yield staging
        if staging.parent == folder:
            for path in staging.iterdir():
                path.rename(folder / path.name)
            staging.rmdir()
        else:
            staging.rename(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        _remove(made)
        raise


def _staging(folder: Path) -> Path:
    name = f".{folder.name}.partial"
    return folder / name if folder.exists() else folder.parent / name


def _make_staging(folder: Path, made: list[Path]) -> Path:
    """Makes the staging folder and its missing parents, which it appends to `made`."""
    staging = _staging(folder)
    if staging.exists():
        raise UsageError(
            f"argument --out: another run is writing to {str(folder)!r} (allowed: {ALLOWED}); "
            f"if that run was killed, remove {str(staging)!r}"
        )
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"argument --out: {str(folder)!r} has files in it (allowed: {ALLOWED})")
    missing = [parent for parent in staging.parents if not parent.exists()]
    for parent in reversed(missing):
        parent.mkdir()
        made.append(parent)
    staging.mkdir()
    return staging


def _remove(made: list[Path]) -> None:
    """Removes the folders, innermost first, up to one that somebody else has used since."""
    for path in reversed(made):
        try:
            path.rmdir()
        except OSError:
            return
