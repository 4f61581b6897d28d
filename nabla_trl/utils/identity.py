"""Tell whether two names mean the same model, and whether an output was made with the same settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from nabla_trl.utils.files import read_json_file, write_atomic


def is_same_model(first: str, second: str) -> bool:
    """Two names are equal, or lead to the same file or folder."""
    return first == second or (Path(first).exists() and Path(second).exists() and Path(first).samefile(second))


def identify_adapter(adapter: str) -> str:
    """An adapter's name; for a local folder also a hash of its weights, so that a retrained one is another."""
    return f"{adapter} ({hash_weights(Path(adapter))})" if Path(adapter).is_dir() else adapter


def hash_weights(folder: Path) -> str:
    """A hash of the weights in a folder, an adapter's or a model's."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while chunk := file.read(2**24):
                digest.update(chunk)
    return digest.hexdigest()[:12]


def claim_settings(settings_file: Path, settings: Mapping[str, str]) -> None:
    """Note beside an output what it is made with; refuse to add to one made with other settings.

    Several processes may claim the same settings at once.

    Raises:
        ValueError: the note is there and differs, which is told, or cannot be read.
    """
    if not settings_file.exists():
        write_atomic(settings_file, json.dumps(dict(settings), indent=1))
        return
    had = read_json_file(settings_file)
    names = [name for name in {**had, **settings} if had.get(name) != settings.get(name)]
    if names:
        changed = ", ".join(f"{name} {settings.get(name)!r} (was {had.get(name)!r})" for name in names)
        raise ValueError(
            f"{settings_file.parent} was made with other settings, now {changed}: use another --output_dir"
        )
