"""Test-time gradient search over token sequences, and its distillation into LoRA weights.

Each public name is imported on first use, so `import nabla_trl` loads neither torch nor trl, vllm or matplotlib.
"""

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from nabla_trl.report.breakeven import compute_breakeven
    from nabla_trl.search.config import SearchConfig
    from nabla_trl.search.reasoner import NablaReasoner
    from nabla_trl.tasks.problem import Problem, check_disjoint
    from nabla_trl.tasks.registry import load_problems
    from nabla_trl.traces.schema import Trace
    from nabla_trl.traces.storage import read_traces

__version__ = "0.2.0"

_MODULES = {
    "NablaReasoner": "nabla_trl.search.reasoner",
    "Problem": "nabla_trl.tasks.problem",
    "SearchConfig": "nabla_trl.search.config",
    "Trace": "nabla_trl.traces.schema",
    "check_disjoint": "nabla_trl.tasks.problem",
    "compute_breakeven": "nabla_trl.report.breakeven",
    "load_problems": "nabla_trl.tasks.registry",
    "read_traces": "nabla_trl.traces.storage",
}
__all__ = [
    "NablaReasoner",
    "Problem",
    "SearchConfig",
    "Trace",
    "__version__",
    "check_disjoint",
    "compute_breakeven",
    "load_problems",
    "read_traces",
]


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    if name == "ReasonerConfig":
        raise ImportError("nabla_trl.ReasonerConfig is now nabla_trl.SearchConfig")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_importlib.import_module(_MODULES[name]), name)
    globals()[name] = value  # the next look-up skips this function
    return value


def __dir__() -> list[str]:
    """Return the public names, whether already imported or not."""
    return sorted(__all__)
