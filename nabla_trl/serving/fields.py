"""Read the fields of a request, and collect everything that is wrong with them in OpenAI's words and codes."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from nabla_trl.utils.fields import format_suggestion
from nabla_trl.utils.formatting import make_printable
from nabla_trl.utils.renamed import describe_new_key

MAX_MISTAKES = 8  # of one request that are described
MAX_QUOTED_CHARS = 60
_KINDS = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


class ApiError(Exception):
    """An error response: HTTP status, headers and JSON body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        error_type: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ):
        # JSON can hold half of a surrogate pair, which no answer can.
        message = make_printable(" ".join(message.encode(errors="backslashreplace").decode().split()))
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = {"error": {"message": message, "type": error_type, "param": param, "code": code}}


class TooManyMistakes(Exception):
    """The request has more mistakes than are described."""


class FieldReader:
    """Reads the fields of one JSON object. A field that is null counts as missing.

    A wrong field is noted and read as its default, so that one error can name all wrong fields.

    Args:
        fields: the JSON object.
        path: how errors call the object, such as "messages[0]". Empty for the body of the request.
        parent: the reader of the object that holds this one, which collects the mistakes of both.
    """

    def __init__(self, fields: Mapping[str, Any], path: str = "", parent: FieldReader | None = None):
        self.fields = {name: value for name, value in fields.items() if value is not None}
        self.path = path
        self.errors: list[ApiError] = [] if parent is None else parent.errors

    def name(self, field: str) -> str:
        """Return how a client calls a field: with the path of its object."""
        return f"{self.path}.{field}" if self.path else field

    def refuse(self, field: str, message: str, code: str | None = "invalid_value", *, status: int = 400) -> None:
        """Note a mistake.

        Args:
            field: the field within this object. Empty: the object itself.

        Raises:
            TooManyMistakes: there are enough to refuse the request.
        """
        param = (self.name(field) if field else self.path) or None
        self.errors.append(ApiError(status, message, param=None if param is None else shorten(param), code=code))
        if len(self.errors) >= MAX_MISTAKES:
            raise TooManyMistakes

    def refuse_missing(self, field: str) -> None:
        """Note a field that is needed."""
        self.refuse(field, f"Missing required parameter: '{self.name(field)}'.", "missing_required_parameter")

    def refuse_type(self, field: str, expected: str, value: Any) -> None:
        """Note a value of another type than expected."""
        kind = "a decimal number" if isinstance(value, float) and expected == "an integer" else _KINDS[type(value)]
        self.refuse(
            field,
            f"Invalid type for '{self.name(field)}': expected {expected}, but got {kind} instead.",
            "invalid_type",
        )

    def refuse_unknown(self, supported: Collection[str]) -> None:
        """Note the fields that are not supported, with the name that was perhaps meant."""
        for field in self.fields:
            if field not in supported:
                name = shorten(field)
                hint = describe_new_key(name, supported) or format_suggestion(name, supported)
                self.refuse(name, f"Unknown parameter: '{self.name(name)}'{hint}.", "unknown_parameter")

    def refuse_other_values(self, neutral_values: Mapping[str, tuple[Any, ...]]) -> None:
        """Note fields whose value asks for something that is not supported.

        Args:
            neutral_values: field → the values that ask for nothing.
        """
        for field, values in neutral_values.items():
            if field in self.fields and not any(_is_same_json(self.fields[field], value) for value in values):
                supported = " or ".join(map(json.dumps, values)) or "null"
                message = (
                    f"Unsupported value: '{self.name(field)}' does not support {quote(self.fields[field])} on this "
                )
                self.refuse(field, f"{message}server. Only {supported} is supported.", "unsupported_value")

    def _read(self, field: str, expected: str, *types: type) -> Any:
        """Return a value of these types. None if it is missing or, as a mistake, of another type."""
        value = self.fields.get(field)
        if value is None or (isinstance(value, types) and (bool in types or not isinstance(value, bool))):
            return value
        self.refuse_type(field, expected, value)
        return None

    def read_integer(
        self, field: str, default: Any = None, *, minimum: int | None = None, maximum: int | None = None
    ) -> Any:
        """Return an integer within bounds, or the default."""
        value = self._read(field, "an integer", int)
        is_valid = value is not None and self._check_bounds(field, value, minimum, maximum, "integer")
        return value if is_valid else default

    def read_number(
        self,
        field: str,
        *,
        minimum: float | None = None,
        maximum: float | None = None,
        above: float | None = None,
        below: float | None = None,
    ) -> float | None:
        """Return a finite number within bounds as a float, or None.

        Args:
            above, below: bounds that the number must not reach.
        """
        value = self._read(field, "a number", int, float)
        if value is None:
            return None
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            self.refuse(field, f"Invalid '{self.name(field)}': expected a finite number.", "decimal_above_max_value")
            return None
        if not self._check_bounds(field, value, minimum, maximum, "decimal"):
            return None
        if (above is not None and number <= above) or (below is not None and number >= below):
            low = above is not None and number <= above
            bound = f"above {above:g}" if low else f"below {below:g}"
            message = f"Invalid '{self.name(field)}': expected a value {bound}, but got {quote(value)} instead."
            self.refuse(field, message, f"decimal_{'below_min' if low else 'above_max'}_value")
            return None
        return number

    def _check_bounds(self, field: str, value: float, minimum: float | None, maximum: float | None, kind: str) -> bool:
        too_small, too_large = minimum is not None and value < minimum, maximum is not None and value > maximum
        if too_small or too_large:
            which, sign, bound = ("below minimum", ">=", minimum) if too_small else ("above maximum", "<=", maximum)
            text = str(bound) if isinstance(bound, int) else f"{bound:.15g}"
            message = f"Invalid '{self.name(field)}': {kind} {which} value. Expected a value {sign} {text}"
            code = f"{kind}_{'below_min' if too_small else 'above_max'}_value"
            self.refuse(field, f"{message}, but got {quote(value)} instead.", code)
        return not (too_small or too_large)

    def read_boolean(self, field: str) -> bool:
        """Return a boolean, false where it is missing."""
        return bool(self._read(field, "a boolean", bool))

    def read_object(self, field: str) -> dict[str, Any]:
        """Return an object, or an empty one."""
        return self._read(field, "an object", dict) or {}

    def check_text(self, field: str, text: str) -> str:
        """Return a text, and an empty one for a text that is no Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError:
            self.refuse(field, f"Invalid '{self.name(field)}': it contains half of a surrogate pair.")
            return ""
        return text

    def raise_errors(self) -> None:
        """Raise one ApiError that names every mistake, with the status, the parameter and the code of the first."""
        if not self.errors:
            return
        first, body = self.errors[0], self.errors[0].body["error"]
        messages = list(dict.fromkeys(str(error) for error in self.errors))
        raise ApiError(first.status, " ".join(messages), param=body["param"], code=body["code"])


def shorten(text: str) -> str:
    """Return a text that an error may hold: printable and not long."""
    text = "".join(char if char.isprintable() else "?" for char in text[: MAX_QUOTED_CHARS + 1])
    return text if len(text) <= MAX_QUOTED_CHARS else f"{text[: MAX_QUOTED_CHARS - 1]}…"


def quote(value: Any) -> str:
    """Return a JSON value as an error may hold it."""
    if isinstance(value, dict | list) and len(value) > MAX_QUOTED_CHARS:
        return f"{_KINDS[type(value)]} of {len(value)} values"
    if isinstance(value, str):
        return f"'{shorten(value)}'"
    try:
        return shorten(json.dumps(value))
    except RecursionError:
        return f"{_KINDS[type(value)]} of many levels"


def _is_same_json(first: Any, second: Any) -> bool:
    """Return whether two JSON values are equal, where true and 1 are not."""
    return isinstance(first, bool) == isinstance(second, bool) and first == second
