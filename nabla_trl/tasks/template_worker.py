"""What runs in the process that renders templates: the environments of chat templates and of tasks, and their bounds.

`nabla_trl.tasks.templates` starts the process and talks to it.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.meta
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment

from nabla_trl.utils.formatting import format_error

MAX_MEMORY_BYTES = 1 << 29  # of the process, where the system can limit it
MAX_OUTPUT_CHARS = 1 << 23  # several times what the longest contexts hold

# --- values of data sets -------------------------------------------------------------------------


_FIRST_INEXACT_FLOAT = 2**53


def format_value(value: Any) -> str | None:
    """Return a value of a data set as text, None for a missing value.

    Texts and whole numbers stay as they are. A float is written in decimals, without an exponent and without a final
    ".0": 1e-07 is 0.0000001, and 25.0 is 25.

    Raises:
        ValueError: a list, a mapping, bytes, a date, true, false, NaN or infinity, which have several spellings, or a
            float from 2^53 on, which may have lost digits of a whole number.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float):
        text = repr(value)
        if text.strip("-") in ("nan", "inf"):
            raise ValueError(f"holds {text}, which is no number")
        if abs(value) >= _FIRST_INEXACT_FLOAT:  # a decimal makes floats of a column
            advice = 'write numbers in quotes, or the template "{{ answer | int }}" if no digit is missing'
            raise ValueError(f"holds the float {text}, which may have lost digits: {advice}")
        return f"{Decimal(text):f}".removesuffix(".0")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    kinds = {list: "a list", dict: "a mapping", bytes: "bytes", bool: "true or false"}
    kind = (
        "a date or time"
        if isinstance(value, date | time | timedelta)
        else kinds.get(type(value), type(value).__name__)
    )
    raise ValueError(f"holds {kind}, which has no certain text: write a template, as in {_get_template_hint(value)}")


def _get_template_hint(value: Any) -> str:
    """Return a template that makes text of a value."""
    if isinstance(value, list):
        return '"{{ answer[0] }}" or "{{ answer | join(\', \') }}"'
    if isinstance(value, dict):
        return '"{{ answer.value }}"'
    if isinstance(value, bool):
        return "\"{{ 'yes' if answer else 'no' }}\""
    return '"{{ answer | string }}"'


# --- environments -------------------------------------------------------------------------------


class _GenerationBlocks(Extension):
    """Accept `{% generation %}` … `{% endgeneration %}`, with which templates mark what an assistant writes."""

    tags = {"generation"}  # noqa: RUF012 -- as Jinja declares it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers: what the block assigns stays inside it.
        return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """A namespace without names that begin with an underscore, which lead to the interpreter's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace must not hold {name!r}, which begins with an underscore")


def _create_chat_environment() -> SandboxedEnvironment:
    """Return the environment for which chat templates are written, that of transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "namespace": _Namespace}
    return environment


_CHAT = _create_chat_environment()


def _finalize(value: Any) -> str:
    """Return what an expression of a task's template writes, by the rules of plain columns."""
    return str(value) if isinstance(value, bool | jinja2.Undefined) else format_value(value) or ""


_TASK = SandboxedEnvironment(undefined=jinja2.StrictUndefined, finalize=_finalize)
_compile_chat, _compile_task = lru_cache(_CHAT.from_string), lru_cache(_TASK.from_string)


def _render(request: Mapping[str, Any]) -> str:
    template, variables = request["template"], request["variables"]
    if request["kind"] == "names":
        return json.dumps(sorted(jinja2.meta.find_undeclared_variables(_TASK.parse(template))))
    if request["kind"] == "task":
        return _join_bounded(_compile_task(template).generate(pickle.loads(base64.b64decode(variables))))

    def strftime_now(format: str) -> str:
        return datetime.fromisoformat(request["date"]).strftime(format)

    return _join_bounded(_compile_chat(template).generate(variables, strftime_now=strftime_now))


def _join_bounded(pieces: Iterator[str]) -> str:
    texts, length = [], 0
    for piece in pieces:
        texts.append(piece)
        length += len(piece)
        if length > MAX_OUTPUT_CHARS:
            raise ValueError(f"the template writes more than {MAX_OUTPUT_CHARS:,} characters")
    return "".join(texts)


def _answer(line: str) -> str:
    try:
        request = json.loads(line)
        return json.dumps({"text": "" if request is None else _render(request)})
    except MemoryError:
        return json.dumps({"error": f"the template needs more than {MAX_MEMORY_BYTES >> 20} MB"})
    except RecursionError:
        return json.dumps({"error": "the template is nested too deeply, or calls itself without an end"})
    except Exception as error:  # a template can raise anything
        return json.dumps({"error": re.sub(r"^[\s:]+", "", format_error(error))})


def run_worker(orphan_seconds: float) -> None:
    """Answer requests, one line each, until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints must not be read as an answer
    if sys.platform != "win32":
        import resource
        import signal

        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
        for line in sys.stdin:
            signal.alarm(int(orphan_seconds))  # a parent that is gone cannot kill a template that hangs
            print(_answer(line), file=answers, flush=True)
            signal.alarm(0)
    else:
        for line in sys.stdin:
            print(_answer(line), file=answers, flush=True)
