"""Tell whether two names mean the same model, and whether an output was made with the same settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from nabla_trl.utils.files import read_object, write_whole


def same_model(one: str, other: str) -> bool:
    """Two names are equal, or lead to the same file or folder."""
    return one == other or (Path(one).exists() and Path(other).exists() and Path(one).samefile(other))


def adapter_identity(adapter: str) -> str:
    """An adapter's name; for a local folder also a hash of its weights, so that a retrained one is another."""
    return f"{adapter} ({weights_identity(Path(adapter))})" if Path(adapter).is_dir() else adapter


def weights_identity(folder: Path) -> str:
    """A hash of the weights in a folder, an adapter's or a model's."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while chunk := file.read(2**24):
                digest.update(chunk)
    return digest.hexdigest()[:12]


def claim_settings(mark: Path, settings: Mapping[str, str]) -> None:
    """Note beside an output what it is made with; refuse to add to one made with other settings.

    Several processes may claim the same settings at once.

    Raises:
        ValueError: the note is there and differs, which is told, or cannot be read.
    """
    if not mark.exists():
        write_whole(mark, json.dumps(dict(settings), indent=1))
        return
    had = read_object(mark)
    names = [name for name in {**had, **settings} if had.get(name) != settings.get(name)]
    if names:
        changed = ", ".join(f"{name} {settings.get(name)!r} (was {had.get(name)!r})" for name in names)
        raise ValueError(f"{mark.parent} was made with other settings, now {changed}: use another --output_dir")
