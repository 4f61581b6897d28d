"""Say everything that is wrong at once: an error with one line for each fault, and checks that collect them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")


class Faults(ValueError):
    """One or more faults of options, files or a machine. Its text has all of them, separated by semicolons.

    Args:
        faults: the sentences. A repeated one counts once.
        replacements: words of the command line that are wrong and what to write in their place.

    Attributes:
        lines: the sentences.
    """

    def __init__(self, *faults: str, replacements: Mapping[str, str] | None = None):
        self.lines = tuple(dict.fromkeys(faults))
        self.replacements = dict(replacements or {})
        super().__init__("; ".join(self.lines))


class Checks:
    """Checks that collect faults in place of stopping at the first one.

        checks = Checks()
        checks.require(beta > 0, f"beta must be positive, not {beta}")
        checks.call(parse_methods, methods)  # raises ValueError
        checks.raise_faults()

    Attributes:
        faults: the sentences so far, without repetitions.
        replacements: see `Faults`.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.replacements: dict[str, str] = {}

    def add(self, faults: Iterable[str], replacements: Mapping[str, str] | None = None) -> None:
        """Add faults."""
        self.faults += [fault for fault in dict.fromkeys(faults) if fault not in self.faults]
        self.replacements |= replacements or {}

    def require(self, condition: bool, fault: str) -> None:
        """Add a fault if a condition does not hold."""
        if not condition:
            self.add([fault])

    def require_minimum(self, options: object, minimum: float, *names: str) -> None:
        """Add a fault for each of these options that is below a minimum."""
        for name in names:
            value = getattr(options, name)
            self.require(value >= minimum, f"{name} must be at least {minimum:g}, not {value}")

    def require_choice(self, options: object, **choices: Collection[str]) -> None:
        """Add a fault for each of these options that has none of its choices."""
        for name, values in choices.items():
            value = getattr(options, name)
            self.require(value in values, f"{name} must be one of {', '.join(values)}, not {value!r}")

    @contextmanager
    def collect(self, prefix: str = "") -> Iterator[None]:
        """Turn a ValueError or OSError of the block into faults.

        If there are faults already, the block may work with values that are wrong. What it then raises beside these
        two kinds of errors says nothing, and is dropped.

        Args:
            prefix: begins every fault of the block.
        """
        try:
            yield
        except Faults as error:
            self.add([prefix + line for line in error.lines], error.replacements)
        except (ValueError, OSError) as error:
            self.add([prefix + " ".join(str(error).split())])
        except Exception:
            if not self.faults:
                raise

    def call(
        self, function: Callable[ParamsT, ResultT], *args: ParamsT.args, **options: ParamsT.kwargs
    ) -> ResultT | None:
        """Return the result of a function, or None if it raises an error, which becomes faults (see `collect`)."""
        with self.collect():
            return function(*args, **options)
        return None

    def raise_faults(self, error_class: type[Faults] = Faults) -> None:
        """Raise all faults as one error, if there are any."""
        if self.faults:
            raise error_class(*self.faults, replacements=self.replacements)
