"""Hashes and settings that tell if two models, data sets or runs are the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from nabla_trl.utils.files import read_json_file, write_atomic
from nabla_trl.utils.formatting import hide_userinfo
from nabla_trl.utils.renamed import RENAMED_OPTIONS

_BLOCK_BYTES = 2**24


def hash_json(value: Any, length: int = 12) -> str:
    """Return the first `length` hexadecimal digits of the sha256 hash of a JSON value with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def hash_files(paths: Iterable[Path], length: int = 12) -> str:
    """Return the first `length` hexadecimal digits of the sha256 hash of the files' contents, in the given order.

    Raises:
        ValueError: if a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()[:length]


def hash_weights(folder: Path) -> str:
    """Return a hash of the weights in the folder of a model or an adapter."""
    return hash_files(sorted(folder.glob("*.safetensors")))


def identify_adapter(adapter: str) -> str:
    """Return an adapter's name. A local folder also gets a hash of its weights, which tells a retrained adapter."""
    return f"{adapter} ({hash_weights(Path(adapter))})" if Path(adapter).is_dir() else adapter


def is_same_model(first: str, second: str) -> bool:
    """Return True if two names are equal or are paths of the same file or folder."""
    # os.path, because pathlib raises an error for a text that is too long or holds a null byte.
    return first == second or (os.path.exists(first) and os.path.exists(second) and os.path.samefile(first, second))


def claim_settings(settings_file: Path, settings: Mapping[str, str]) -> None:
    """Write down the settings that an output is made with, or check that they are those of an existing output.

    Several processes may claim the same settings at once. Passwords in URLs are not written down.

    Raises:
        ValueError: if the file exists and has other settings, which the message names, or cannot be read.
    """
    check_settings(settings_file, settings)
    if not settings_file.exists():
        write_atomic(settings_file, json.dumps(hide_userinfo(settings), indent=1))


def check_settings(settings_file: Path, settings: Mapping[str, str], ignored_names: Collection[str] = ()) -> None:
    """Check the settings of an existing output as `claim_settings` does, and write nothing.

    Args:
        ignored_names: settings that are not compared, because they are not known yet.

    Raises:
        ValueError: if the file exists and has other settings, which the message names, or cannot be read.
    """
    if not settings_file.exists():
        return
    previous = read_json_file(settings_file)
    settings = hide_userinfo(settings)
    old_names = [name for name in previous if name not in settings and name in RENAMED_OPTIONS]
    if old_names:
        raise ValueError(
            f"{settings_file.parent} was made by version 0.1, since its settings have old names "
            f"({', '.join(old_names[:3])}, …), and cannot be continued: use another --output_dir"
        )
    names = [name for name in {**previous, **settings} if previous.get(name) != settings.get(name)]
    names = [name for name in names if name not in ignored_names]
    if names:
        changes = ", ".join(f"{name} {settings.get(name)!r} (was {previous.get(name)!r})" for name in names)
        raise ValueError(
            f"{settings_file.parent} was made with other settings, now {changes}: use another --output_dir"
        )
