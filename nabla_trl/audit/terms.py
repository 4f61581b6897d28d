"""The numbers of a ranking audit in words, for the report and for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from nabla_trl.utils.formatting import format_count, format_interval, format_si


class AuditTerm(NamedTuple):
    """What a number of an audit is called, what it means and how it is written."""

    label: str
    meaning: str
    format: Callable[[Any], str]


def _format_share(value: float) -> str:
    return f"{value:.3f}"


def _format_correlation(value: float) -> str:
    return f"{value:+.3f}"


AUDIT_TERMS = {
    "problems": AuditTerm("problems", "", format_count),
    "samples": AuditTerm("samples per problem", "", format_count),
    "accuracy": AuditTerm("correct samples", "share of the samples with a correct answer", _format_share),
    "auc_interval": AuditTerm(
        "AUC within problems",
        "probability that a correct sample scores above an incorrect one of the same problem (0.5: by chance)",
        lambda auc: _format_share(auc) if isinstance(auc, float) else format_interval(auc),
    ),
    "step_auc": AuditTerm(
        "AUC of error-free", "the same for samples without any wrong step against all others", _format_share
    ),
    "correct_with_errors": AuditTerm(
        "correct despite an error", "share of the correct samples that contain a wrong step", _format_share
    ),
    "correlation": AuditTerm(
        "correlation with correct", "of reward and correctness, within problems", _format_correlation
    ),
    "length_correlation": AuditTerm(
        "correlation with length",
        "of reward and length, within problems (far from 0: it may prefer long or short samples)",
        _format_correlation,
    ),
    "validated_samples": AuditTerm(
        "validated up to",
        "largest number of samples up to which choosing by the reward raises the accuracy",
        lambda count: f"{format_count(count)} sample{'s' * (count != 1)}",
    ),
    "flops": AuditTerm("cost", "sampling and scoring", lambda flops: format_si(flops, "FLOPs")),
}


def describe_audit(audit: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (label, value, meaning) of every number of an audit that is known, those without a term of ours last."""
    if "auc" in audit:
        audit = {"auc_interval": audit["auc"]} | {key: value for key, value in audit.items() if key != "auc"}
    lines = [
        (term.label, term.format(audit[key]), term.meaning)
        for key, term in AUDIT_TERMS.items()
        if audit.get(key) is not None
    ]
    others = {key: value for key, value in audit.items() if isinstance(value, int | float) and key not in AUDIT_TERMS}
    return lines + [(key.replace("_", " "), f"{value:.3g}", "") for key, value in others.items()]
