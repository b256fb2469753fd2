"""The manifest of a checkpoint: every file's size and checksum. Written last, it makes it valid."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import xxhash

NAME = "manifest.json"
_CHUNK_BYTES = 1 << 20

Manifest = dict[str, dict]
"""File name -> {"size": bytes, "xxh3": checksum}."""


def describe(directory: Path, names: Iterable[str]) -> Manifest:
    """The manifest's entries for files `names` of `directory`."""
    return {
        name: {"size": (directory / name).stat().st_size, "xxh3": _checksum(directory / name)}
        for name in names
    }


def write_manifest(directory: Path, entries: Manifest) -> None:
    with (directory / NAME).open("w") as file:
        json.dump(entries, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(directory: Path) -> Manifest | str:
    """The manifest of `directory`, or what is wrong with it."""
    if not directory.is_dir():
        return "there is no such folder"
    if not (directory / NAME).is_file():
        return f"{NAME} is missing"
    try:
        entries = json.loads((directory / NAME).read_text())
        return {name: {"size": e["size"], "xxh3": e["xxh3"]} for name, e in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):  # whatever stands there instead
        return f"{NAME} is damaged"


def first_fault(directory: Path, entries: Manifest, with_checksums: bool) -> str | None:
    """The first file that is not as `entries` say, and how; None when all are."""
    for name, entry in sorted(entries.items()):
        file = directory / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != entry["size"]:
            return f"{name} has {size} bytes for {entry['size']}"
        if with_checksums and _checksum(file) != entry["xxh3"]:
            return f"{name} was altered (its checksum is another)"
    return None


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_64()
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
