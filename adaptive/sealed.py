"""The manifest of an exported folder, sealed: a digest of itself, and of every file that it names.

The first line of `manifest.json` holds the sha256 of all bytes behind it; those hold the sha256 of every other file.
Whatever was truncated, swapped or edited is found before it is used, and so is what came to lie beside it and could be
imported in place of a library. This tells damage, not deceit: whoever can write to the folder can write a manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from importlib.machinery import all_suffixes
from pathlib import Path

MANIFEST, FORMAT = "manifest.json", 3
_FIRST = re.compile(rb'\{"sha256": "([0-9a-f]{64})",\n')


def seal(folder: Path, record: dict) -> None:
    """Writes the manifest: `record`, with the digests of all other files in the folder."""
    files = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    body = json.dumps({"format": FORMAT, **record, "files": files}, indent=1, allow_nan=False).encode()
    body = body.removeprefix(b"{\n") + b"\n"
    temporary = folder / (MANIFEST + ".tmp")
    temporary.write_bytes(b'{"sha256": "%s",\n' % hashlib.sha256(body).hexdigest().encode() + body)
    os.replace(temporary, folder / MANIFEST)


def unseal(folder: Path) -> dict:
    """Returns the manifest of a folder all of whose files are as they were written.

    Raises:
        ValueError: see `read`; files that are missing or were changed.
    """
    record = read(folder)
    check(folder, record["files"])
    return record


def read(folder: Path) -> dict:
    """Returns the manifest of a folder, whose files are not read.

    Raises:
        ValueError: no manifest, one that was changed or is of another format, foreign files that Python could import.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"'{folder}' has no readable {MANIFEST} ({error.strerror}); give a folder written by `python -m "
            "adaptive.export`"
        ) from None
    first = _FIRST.match(raw)
    body = raw[first.end() :] if first else b""
    if not first or hashlib.sha256(body).hexdigest().encode() != first[1]:
        raise ValueError(f"'{path}' was changed or cut since it was written; export the model again")
    record = json.loads(b"{" + body)
    if record["format"] != FORMAT:
        raise ValueError(
            f"'{path}' has format {record['format']}, this runtime reads {FORMAT}; use the runtime.py that lies in "
            "the folder"
        )
    if code := [name for name in foreign(folder, record["files"]) if _importable(folder / name)]:
        raise ValueError(
            f"'{folder}' holds {', '.join(code)}, which the export did not write and Python could import from there; "
            "move that elsewhere"
        )
    return record


def foreign(folder: Path, files: Iterable[str]) -> list[str]:
    """Returns the names of what lies in a folder and is none of its `files`, nor the manifest, nor Python's cache."""
    return sorted({path.name for path in folder.iterdir()} - {*files, MANIFEST, "__pycache__"})


def _importable(path: Path) -> bool:
    """Returns whether a path is a module, or a package that would hide an installed one."""
    names = (inner.name for inner in path.glob("__init__.*")) if path.is_dir() else [path.name]
    return any(name.endswith(tuple(all_suffixes())) for name in names)


def check(folder: Path, files: dict[str, str]) -> None:
    """Refuses files that are missing or were changed.

    Args:
        folder: that they lie in.
        files: their digests, by name.

    Raises:
        ValueError: naming all of them.
    """
    problems = []
    for name, digest in files.items():
        try:
            if sha256(folder / name) != digest:
                problems.append(f"{name} was changed")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    if problems:
        raise ValueError(f"'{folder}': " + "; ".join(problems) + "; restore the files or export the model again")


def sha256(path: Path) -> str:
    """Returns the sha256 of a file."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            found.update(piece)
    return found.hexdigest()
