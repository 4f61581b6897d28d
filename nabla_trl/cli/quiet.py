"""Keep libraries quiet in a normal run, and let them speak with --verbose. Imports no library.

What they warn about goes to run.log in the output folder of a command that has one. Their errors, and warnings about
code that is neither theirs nor ours, such as a model's own code, are shown as one line each.
"""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import TextIO

from nabla_trl.utils.formatting import VERBOSE_VARIABLE, format_error, is_verbose

VERBOSE_HELP = (
    "Show what libraries print: warnings, loading bars and every entry of the trainer's log. Use it to look for the "
    "cause of an error (default: false)."
)
LOG_FILE = "run.log"
# Environment variables that libraries read once, when they are imported.
_ENVIRONMENT = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # DDP's advice about unused parameters, warnings of sockets
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
}
# Libraries that give their loggers a handler of their own.
_LIBRARIES = (
    *("transformers", "datasets", "huggingface_hub", "accelerate", "trl", "peft", "bitsandbytes"),
    *("diffusers", "torch", "vllm", "wandb", "trackio", "tensorboard", "deepspeed"),
)
_PACKAGE_DIR = Path(__file__).parents[1]
_LIBRARY_DIRS = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def prepare_environment(argv: Sequence[str], environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what libraries read when they are imported. Without effect on those that are imported already.

    Args:
        argv: the command line. With --verbose, nothing is set and child processes are verbose too.
    """
    if "--verbose" in argv:
        environ[VERBOSE_VARIABLE] = "1"
    if is_verbose(environ):
        return
    for name, value in _ENVIRONMENT.items():
        environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns while it is imported, by whichever library


class _Startup:
    """The line that `announce_startup` may print."""

    timer: threading.Timer | None = None


def announce_startup(seconds: float = 4.0) -> None:
    """Say on a terminal that libraries are being loaded, if that takes longer than some seconds.

    The thread that says so is stopped by the first `quiet_libraries` after torch is there.
    """
    if not sys.stderr.isatty():
        return
    line = "loading torch, transformers and trl …"
    _Startup.timer = threading.Timer(seconds, lambda: print(line, file=sys.stderr, flush=True))
    _Startup.timer.daemon = True
    _Startup.timer.start()


def stop_announcing_startup() -> None:
    """Do not say any more that libraries are being loaded."""
    if _Startup.timer is not None:
        _Startup.timer.cancel()


def quiet_libraries() -> None:
    """Hide loading bars and warnings of the libraries that are imported by now. Without effect with --verbose."""
    if "torch" in sys.modules:
        stop_announcing_startup()
    if is_verbose():
        return
    warnings.showwarning = _show_warning
    if not any(isinstance(handler, _LibraryHandler) for handler in logging.root.handlers):
        logging.root.addHandler(_LibraryHandler())
    loggers = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    for logger in loggers:
        if logger.name.partition(".")[0] in _LIBRARIES and any(map(_writes_to_terminal, logger.handlers)):
            logger.handlers = [handler for handler in logger.handlers if not _writes_to_terminal(handler)]
            logger.propagate = True
    if "transformers" in sys.modules:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    if "datasets" in sys.modules:
        from datasets.utils.logging import disable_progress_bar as disable_datasets_bar

        disable_datasets_bar()


def _writes_to_terminal(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)


class _RunLog:
    """The file that warnings go to, if there is one."""

    path: Path | None = None


def log_to_folder(folder: Path | None) -> None:
    """Write warnings of libraries to run.log in a folder from now on. The first one makes the file. None: nowhere."""
    _RunLog.path = None if folder is None else folder / LOG_FILE


class _LibraryHandler(logging.Handler):
    """Show errors, and what this package logs. Warnings of libraries go to the file of the run."""

    def emit(self, record: logging.LogRecord) -> None:
        package = record.name.partition(".")[0]
        if record.name == "nabla_trl.access" or record.levelno < logging.WARNING:
            return
        if package == "nabla_trl" or record.levelno >= logging.ERROR or not _is_library(record.pathname):
            kind = "error" if record.levelno >= logging.ERROR else "warning"
            source = "" if package == "nabla_trl" else f"{package}: "
            print(f"{kind}: {source}{format_error(record.getMessage(), 500)}", file=sys.stderr)
        else:
            _write_to_log(f"{record.levelname} {record.name}: {record.getMessage()}")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Write a warning about a library to the file of the run, and show any other as one line."""
    if file is None and not _is_library(filename):
        print(f"warning: {filename}:{lineno}: {category.__name__}: {format_error(str(message), 500)}", file=sys.stderr)
    else:
        _write_to_log(f"WARNING {filename}:{lineno}: {category.__name__}: {message}")


def _is_library(filename: str) -> bool:
    """Return whether a file belongs to Python, an installed library or this package. Code of models does not."""
    path = os.path.abspath(filename)
    is_frozen = filename.startswith("<") and filename != "<stdin>"
    return is_frozen or path.startswith((str(_PACKAGE_DIR), *_LIBRARY_DIRS))


def _write_to_log(text: str) -> None:
    if _RunLog.path is None or not _RunLog.path.parent.is_dir():
        return
    try:
        with _RunLog.path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.rstrip()}\n")
    except OSError:  # a full disk: the run itself says so
        _RunLog.path = None
