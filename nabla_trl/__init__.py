"""Test-time gradient search over token sequences, and its distillation into LoRA weights.

The names below are the package's public door. Each is imported on first use, so that `import nabla_trl`
loads neither torch nor trl, vllm or matplotlib.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nabla_trl.config import ReasonerConfig
    from nabla_trl.reasoner import NablaReasoner
    from nabla_trl.tasks import Problem, check_disjoint, load_problems
    from nabla_trl.traces import Trace, read_traces

__version__ = "0.1.0"
__all__ = [
    "NablaReasoner",
    "Problem",
    "ReasonerConfig",
    "Trace",
    "__version__",
    "check_disjoint",
    "load_problems",
    "read_traces",
]

_ROOM_OF = {
    "NablaReasoner": "reasoner",
    "ReasonerConfig": "config",
    "Problem": "tasks",
    "check_disjoint": "tasks",
    "load_problems": "tasks",
    "Trace": "traces",
    "read_traces": "traces",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its room on first use (PEP 562)."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    globals()[name] = value  # the next look-up skips this function
    return value


def __dir__() -> list[str]:
    """Public names, whether already imported or not."""
    return sorted(set(globals()) | set(__all__))
