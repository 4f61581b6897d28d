"""Test-time gradient search over token sequences, and its distillation into LoRA weights.

Each public name is imported on first use, so `import nabla_trl` loads neither torch nor trl, vllm or matplotlib.
"""

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from nabla_trl.models.loading.policies import load_policy
    from nabla_trl.models.policy import Policy
    from nabla_trl.pipeline.audit import audit_reward
    from nabla_trl.pipeline.datasets import to_preference_dataset, to_sft_dataset
    from nabla_trl.pipeline.evaluation import EvaluationResult, evaluate
    from nabla_trl.pipeline.export import export
    from nabla_trl.pipeline.report import write_report
    from nabla_trl.pipeline.trace_dataset import export_traces, push_traces
    from nabla_trl.pipeline.traces import generate_traces
    from nabla_trl.pipeline.train import train
    from nabla_trl.report.breakeven import compute_breakeven
    from nabla_trl.rewards.loading import load_reward
    from nabla_trl.rewards.reward import Reward
    from nabla_trl.search.config import SearchConfig
    from nabla_trl.search.reasoner import NablaReasoner
    from nabla_trl.tasks.problem import Problem, check_disjoint
    from nabla_trl.tasks.registry import load_problems
    from nabla_trl.traces.schema import Trace
    from nabla_trl.traces.storage import read_traces
    from nabla_trl.training.reporting import track_metrics
    from nabla_trl.utils.progress import disable_progress, enable_progress

__version__ = "0.2.0"

_MODULES = {
    "EvaluationResult": "nabla_trl.pipeline.evaluation",
    "NablaReasoner": "nabla_trl.search.reasoner",
    "Policy": "nabla_trl.models.policy",
    "Problem": "nabla_trl.tasks.problem",
    "Reward": "nabla_trl.rewards.reward",
    "SearchConfig": "nabla_trl.search.config",
    "Trace": "nabla_trl.traces.schema",
    "audit_reward": "nabla_trl.pipeline.audit",
    "check_disjoint": "nabla_trl.tasks.problem",
    "compute_breakeven": "nabla_trl.report.breakeven",
    "disable_progress": "nabla_trl.utils.progress",
    "enable_progress": "nabla_trl.utils.progress",
    "evaluate": "nabla_trl.pipeline.evaluation",
    "export": "nabla_trl.pipeline.export",
    "export_traces": "nabla_trl.pipeline.trace_dataset",
    "generate_traces": "nabla_trl.pipeline.traces",
    "load_policy": "nabla_trl.models.loading.policies",
    "load_problems": "nabla_trl.tasks.registry",
    "load_reward": "nabla_trl.rewards.loading",
    "push_traces": "nabla_trl.pipeline.trace_dataset",
    "read_traces": "nabla_trl.traces.storage",
    "to_preference_dataset": "nabla_trl.pipeline.datasets",
    "to_sft_dataset": "nabla_trl.pipeline.datasets",
    "track_metrics": "nabla_trl.training.reporting",
    "train": "nabla_trl.pipeline.train",
    "write_report": "nabla_trl.pipeline.report",
}
__all__ = [
    "EvaluationResult",
    "NablaReasoner",
    "Policy",
    "Problem",
    "Reward",
    "SearchConfig",
    "Trace",
    "__version__",
    "audit_reward",
    "check_disjoint",
    "compute_breakeven",
    "disable_progress",
    "enable_progress",
    "evaluate",
    "export",
    "export_traces",
    "generate_traces",
    "load_policy",
    "load_problems",
    "load_reward",
    "push_traces",
    "read_traces",
    "to_preference_dataset",
    "to_sft_dataset",
    "track_metrics",
    "train",
    "write_report",
]


if not _typing.TYPE_CHECKING:  # else no name would be unknown to a type checker

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
