"""Render Jinja templates of checkpoints and tasks in a process with bounds on time, memory and output.

A template is a program by somebody else. Jinja's sandbox keeps it from the machine, but not from a loop of 10^9 steps
or a string of 10^9 characters, which run in C code that no signal interrupts. So templates run in a worker process
that is killed when it takes too long. Like the worker of `grading.checker`, it is a `subprocess` that exchanges JSON
lines. One worker serves the whole process. It starts with the first template.

Chat templates may print the date. All templates of a run print the same one: the time at which the run first needed
it, which the run's folder records, so that a resumed run goes on with it (see `use_recorded_date`).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import selectors
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from nabla_trl.tasks.template_worker import MAX_MEMORY_BYTES
from nabla_trl.utils.files import read_json_file
from nabla_trl.utils.formatting import format_error

TIMEOUT_SECONDS = 10.0  # for one rendering, which usually takes less than a millisecond
MAX_STOPS = 2  # how often a template may be stopped before it is refused at once
DATE_FILE = "template_date.json"  # in the folder of a run
_START_TIMEOUT_SECONDS = 120.0  # on a busy machine
_WORKER_SCRIPT = """
import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
import json, sys; sys.path[:] = json.loads(sys.argv[1])
from nabla_trl.tasks.template_worker import run_worker; run_worker(float(sys.argv[2]))
"""


class TemplateFailure(ValueError):
    """A template that cannot be read, refuses its input, or takes too much time, memory or output."""


def render_chat(template: str, variables: Mapping[str, Any]) -> str:
    """Return the text that a chat template writes, as `apply_chat_template(..., tokenize=False)` of transformers does.

    Args:
        template: Jinja source.
        variables: values of the template's variables, made of JSON types: messages, special tokens, keywords.

    Raises:
        TemplateFailure: the template refuses its input, or exceeds a bound.
    """
    date = get_template_date() if is_dated(template) else ""
    return _ask_worker({"kind": "chat", "template": template, "variables": dict(variables), "date": date})


def render_columns(template: str, row: Mapping[str, Any]) -> str:
    """Return the text that a template of a task writes. Columns that the row lacks are an error.

    Args:
        row: values by column, which expressions write by the rules of `format_value`.

    Raises:
        TemplateFailure: the template fails, or exceeds a bound.
    """
    try:
        # The types of values matter, and the worker trusts this process.
        values = base64.b64encode(pickle.dumps(dict(row))).decode("ascii")
    except Exception as error:  # pickle raises anything
        raise TemplateFailure(f"its columns cannot be handed over: {format_error(error)}") from error
    return _ask_worker({"kind": "task", "template": template, "variables": values, "date": ""})


@lru_cache
def list_variables(template: str) -> list[str]:
    """Return the names that a template of a task reads, sorted.

    Raises:
        TemplateFailure: the template cannot be read, or exceeds a bound.
    """
    return json.loads(_ask_worker({"kind": "names", "template": template, "variables": {}, "date": ""}))


# --- the date -------------------------------------------------------------------------------------


class _RunDate:
    """The date of this process's run, as ISO text. It is chosen when it is first needed."""

    text: str | None = None
    file: Path | None = None


def is_dated(template: str | None) -> bool:
    """Return whether a chat template can read the clock."""
    return template is not None and "strftime_now" in template


def pin_template_date(date: str | None) -> None:
    """Choose the date that all chat templates of this process print from now on.

    Args:
        date: ISO text such as 2026-11-29 or 2026-11-29T13:05:00. None: the time at which it is first needed.

    Raises:
        ValueError: not an ISO date.
    """
    if date is not None:
        try:
            datetime.fromisoformat(date)
        except ValueError:
            raise ValueError(f"template_date must be a date such as 2026-11-29, not {date!r}") from None
    _RunDate.text, _RunDate.file = date, None


def use_recorded_date(folder: Path, date: str | None = None) -> None:
    """Use the date that a run's folder records, and record it there once a template needs it.

    Args:
        date: a date that the user chose, as for `pin_template_date`.

    Raises:
        ValueError: the folder records another date than the chosen one, or its record cannot be read.
    """
    file = folder / DATE_FILE
    recorded = _read_date(file) if file.exists() else None
    if date is not None and recorded not in (None, date):
        raise ValueError(f"{folder} was made with template_date {recorded}, not {date}: use another --output_dir")
    pin_template_date(date or recorded)
    _RunDate.file = file


def get_template_date() -> str:
    """Return the date of this run as ISO text, and record it if the run has a folder."""
    date = _RunDate.text or datetime.now().isoformat(timespec="seconds")
    if _RunDate.file is not None:
        date = _record_date(_RunDate.file, date)
    _RunDate.text, _RunDate.file = date, None  # recorded
    return date


def _record_date(file: Path, date: str) -> str:
    """Write the date, unless another process of the run was first, and return the date in the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    draft.write_text(json.dumps({"template_date": date}) + "\n", encoding="utf-8")
    try:
        os.link(draft, file)  # fails if the file exists, and never leaves half a file
    except FileExistsError:
        return _read_date(file)
    except OSError:  # a file system without links
        with contextlib.suppress(FileExistsError), file.open("x", encoding="utf-8") as stream:
            stream.write(draft.read_text(encoding="utf-8"))
        return _read_date(file)
    finally:
        draft.unlink()
    return date


def _read_date(file: Path) -> str:
    date = str(read_json_file(file).get("template_date"))
    try:
        datetime.fromisoformat(date)
    except ValueError:
        raise ValueError(f"{file} holds no template_date, but {date!r}") from None
    return date


# --- the worker ----------------------------------------------------------------


class _Worker:
    """A process that renders one template at a time."""

    def __init__(self) -> None:
        command = [
            sys.executable,
            "-c",
            _WORKER_SCRIPT,
            json.dumps(list(map(str, sys.path))),
            str(_START_TIMEOUT_SECONDS + TIMEOUT_SECONDS),
        ]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, encoding="ascii", start_new_session=True
        )
        if self.request("null", _START_TIMEOUT_SECONDS) is None:
            self.kill()
            raise RuntimeError("the process that renders templates could not be started")

    def request(self, line: str, timeout: float) -> Any:
        """Return the answer to a request, or None if the process died or had to be killed."""
        assert self.process.stdin and self.process.stdout  # for the type checker: both are pipes
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        try:
            with self._limit_seconds(timeout) as is_ready:
                return json.loads(self.process.stdout.readline() or "null") if is_ready else None
        except json.JSONDecodeError:  # the process died in the middle of a line
            return None

    @contextlib.contextmanager
    def _limit_seconds(self, timeout: float) -> Iterator[bool]:
        """Yield whether an answer arrives in time. Answers are whole lines, which the worker writes at once."""
        if sys.platform == "win32":  # cannot wait for a pipe
            timer = threading.Timer(timeout, self.process.kill)
            timer.start()
            try:
                yield True
            finally:
                timer.cancel()
                timer.join()  # afterwards the timer cannot kill the process any more
        else:
            with selectors.DefaultSelector() as selector:
                selector.register(self.process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
                yield bool(selector.select(timeout))

    def kill(self) -> None:
        """Kill the process, reap it and close its pipes."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError, AttributeError):
                stream.close()  # type: ignore[union-attr]


class _WorkerSlot:
    """The worker of this process. A forked child starts another one."""

    def __init__(self) -> None:
        self.worker: _Worker | None = None
        self.lock = threading.Lock()

    def ask(self, line: str) -> Any:
        with self.lock:
            if self.worker is None or self.worker.process.poll() is not None:
                self.close()
                self.worker = _Worker()
            try:
                answer = self.worker.request(line, TIMEOUT_SECONDS)
            except BaseException:  # Ctrl-C: a late answer must not be read as that of the next request
                self.close()
                raise
            if answer is None:
                self.close()
            return answer

    def close(self) -> None:
        if self.worker is not None:
            self.worker.kill()
            self.worker = None


_slot = _WorkerSlot()
_num_stops: Counter[str] = Counter()  # by template


def _forget_worker() -> None:
    _slot.__init__()  # type: ignore[misc]  # the pipes belong to the parent


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_worker)


def _ask_worker(request: Mapping[str, Any]) -> str:
    template = request["template"]
    # Otherwise every problem of a data set would wait for it.
    is_hopeless = _num_stops[template] >= MAX_STOPS
    answer = None if is_hopeless else _slot.ask(json.dumps(request, default=str))
    if answer is None:
        _num_stops[template] += 1
        raise TemplateFailure(
            f"the template takes more than {TIMEOUT_SECONDS:.0f} s or {MAX_MEMORY_BYTES >> 20} MB, and was stopped"
        )
    if "error" in answer:
        raise TemplateFailure(answer["error"])
    return str(answer["text"])
