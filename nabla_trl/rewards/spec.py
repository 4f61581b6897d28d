"""What the name of a reward means, before any model is loaded: specs, reward.json, and audits on disk.

Loads no torch. The grammar of specs is told in `nabla_trl.rewards.loading.load_reward`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from nabla_trl.gradient.step_ends import BLANK_LINE, check_delimiter, parse_delimiter
from nabla_trl.models.options import GradientPoint
from nabla_trl.rewards.limits import ValidatedLimits
from nabla_trl.utils.files import write_atomic
from nabla_trl.utils.formatting import format_error
from nabla_trl.utils.identity import is_same_model

LOG_RATIO_PREFIX = "logratio:"
MANIFEST_FILE = "reward.json"
_ADAPTER_FILE = "adapter_config.json"
MANIFEST_FORMAT = 1

_PROCESS_SPEC = re.compile(r"process(?:@(?P<delimiter>[^:]*))?:(?P<model>.*)", re.DOTALL)
_ENSEMBLE_SPEC = re.compile(r"ensemble(?:@(?P<caution>[^:]*))?:(?P<members>.*)", re.DOTALL)
# Kinds of reward.json: the kind of `nabla_trl.rewards.reward.Reward` that each becomes, and the keys that only it has.
_MANIFEST_KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "scalar": ("scalar", ()),
    "process": ("process", ("step_delimiter",)),
    "implicit": ("log-ratio", ("scale", "reference")),
    "ensemble": ("ensemble", ("members", "caution")),
}
_KEYS_OF_OTHER_KINDS = {
    kind: [name for other in _MANIFEST_KINDS if other != kind for name in _MANIFEST_KINDS[other][1]]
    for kind in _MANIFEST_KINDS
}


# --- reward.json --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardManifest:
    """reward.json: what a reward folder holds, and how far it may be trusted.

    Attributes:
        kind: "scalar" (a sequence classifier with one label, or a LoRA adapter of one, in this folder), "process" (the
            sum of such a score over the ends of steps), "implicit" (a causal LM or its adapter in this folder:
            r = scale · (log π − log π_reference)) or "ensemble".
        base: the model that training began from; None = none.
        step_delimiter: process only: the text that ends a step.
        members, caution: ensemble only: folders of scalar or of process rewards, relative to this one; k of
            mean − k·std.
        scale, reference: implicit only: β > 0, and the name of the reference model.
        policy: the policy that it was trained and audited for.
        trust: what the audit allows; None = not audited.
        point: the gradient that the audit advises to follow (`options.Point.parse`); None = not audited, or none
            helps.
        rounds: one object per round of training: its audit.
        settings: what it was trained with.

    Raises:
        ValueError: an unknown kind, a value of another kind's, or one out of range.
    """

    kind: str
    base_model: str | None = None
    step_delimiter: str = BLANK_LINE
    members: Sequence[str] = ()
    uncertainty_penalty: float = 1.0
    scale: float = 1.0
    reference_model: str = ""
    policy: str | None = None
    validated_limits: ValidatedLimits | None = None
    gradient_at: str | None = None
    training_rounds: list[dict[str, Any]] = field(default_factory=list)
    training_settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_kind(self.kind)
        for one in fields(self):
            if one.name in _KEYS_OF_OTHER_KINDS[self.kind] and getattr(self, one.name) != one.default:
                raise ValueError(f"a reward of kind {self.kind} has no {one.name!r}")
        for name in ("base", "policy"):
            if getattr(self, name) is not None:
                _check_model_name(name, getattr(self, name))
        if self.kind == "implicit":
            _check_model_name("reference", self.reference_model)
        if not (isinstance(self.members, list | tuple) and all(isinstance(one, str) and one for one in self.members)):
            raise ValueError(f"members must be a list of folders, not {self.members!r}")
        if not (_is_number(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be a positive number, not {self.scale!r}")
        check_delimiter(self.step_delimiter)
        _check_uncertainty_penalty(self.uncertainty_penalty)
        if self.gradient_at is not None:
            GradientPoint.parse(str(self.gradient_at))

    def to_dict(self) -> dict[str, Any]:
        """The object of reward.json: the common keys and those of the kind."""
        values = {name: value for name, value in asdict(self).items() if name not in _KEYS_OF_OTHER_KINDS[self.kind]}
        return {"format": MANIFEST_FORMAT} | values

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RewardManifest:
        """The inverse of `to_dict`.

        Raises:
            ValueError: another format, a missing or unknown key, or a value that the card refuses.
        """
        if data.get("format") != MANIFEST_FORMAT:
            raise ValueError(f"format must be {MANIFEST_FORMAT}, not {data.get('format')!r}")
        _check_kind(data.get("kind"))
        keys = ["base", *_MANIFEST_KINDS[data["kind"]][1], "policy", "trust", "point", "rounds", "settings"]
        for name in keys:
            if name not in data:
                raise ValueError(f"{name!r} is missing")
        for name in data:
            if name not in ("format", "kind", *keys):
                raise ValueError(f"{name!r} is not a key of the kind {data['kind']}")
        for name, kind in (("rounds", list), ("settings", dict)):
            if not isinstance(data[name], kind):
                raise ValueError(f"{name!r} must be a {kind.__name__}, not {data[name]!r}")
        trust = None if data["trust"] is None else _parse_validated_limits(data["trust"])
        return cls(**{name: data[name] for name in ("kind", *keys)} | {"trust": trust})


def write_manifest(folder: str | Path, manifest: RewardManifest) -> None:
    """Write a folder's reward.json, whole or not at all."""
    write_atomic(Path(folder, MANIFEST_FILE), json.dumps(manifest.to_dict(), indent=1, ensure_ascii=False) + "\n")


def read_manifest(folder: str | Path) -> RewardManifest:
    """A folder's reward.json.

    Raises:
        ValueError: no such file, or one that is broken; it is named.
    """
    file = Path(folder, MANIFEST_FILE)
    try:
        return RewardManifest.from_dict(_read_json_object(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


# --- specs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParsedRewardSpec:
    """What a spec means.

    Attributes:
        kind: as `nabla_trl.rewards.reward.Reward.kind`.
        models: names of what to load: the classifier; the better model and, where it is not the policy, the
            reference; or the members, each a spec.
        scale: factor of a log-ratio.
        caution: of an ensemble.
        delimiter: of a process reward.
        trust, point: those of reward.json.
    """

    kind: str
    model_names: tuple[str, ...]
    scale: float = 1.0
    uncertainty_penalty: float = 1.0
    step_delimiter: str = ""
    validated_limits: ValidatedLimits | None = None
    gradient_at: str | None = None


def parse_reward_spec(spec: str) -> ParsedRewardSpec:
    """What a spec means; reads reward.json, loads nothing.

    Raises:
        ValueError: a malformed spec or reward.json; a process reward of what is not scalar; an ensemble of fewer than
            two members, of one twice, or of different kinds.
    """
    if spec.startswith(LOG_RATIO_PREFIX):
        names = _split_names(spec.removeprefix(LOG_RATIO_PREFIX))
        if not 1 <= len(names) <= 2 or not all(names):
            raise ValueError(f"{spec!r}: expected {LOG_RATIO_PREFIX}BETTER or {LOG_RATIO_PREFIX}BETTER,REFERENCE")
        return ParsedRewardSpec("log-ratio", names)
    written = _PROCESS_SPEC.fullmatch(spec)
    if written:
        return _parse_process_spec(spec, written["delimiter"], written["model"])
    written = _ENSEMBLE_SPEC.fullmatch(spec)
    if written:
        return _parse_ensemble_spec(
            spec, _split_names(written["members"]), _parse_uncertainty_penalty(spec, written["caution"])
        )
    return _parse_folder_spec(spec) if Path(spec, MANIFEST_FILE).is_file() else ParsedRewardSpec("scalar", (spec,))


def compute_reward_identity(spec: str) -> str:
    """A reward's name; with a hash of the weights that we trained, so that a reward trained again is another.

    Weights of plain model folders and of the hub are taken by their names alone, as those of policies are.
    """
    plan = parse_reward_spec(spec)
    models = [Path(_get_classifier_name(name)) for name in plan.model_names]
    ours = [
        folder for folder in models if Path(folder, MANIFEST_FILE).is_file() or Path(folder, _ADAPTER_FILE).is_file()
    ]
    ours += [Path(spec)] if plan.kind == "ensemble" and Path(spec, MANIFEST_FILE).is_file() else []
    if not ours:
        return spec
    meaning = [
        plan.scale,
        plan.uncertainty_penalty,
        plan.gradient_at,
        *([plan.step_delimiter] if plan.step_delimiter else []),
    ]
    digest = hashlib.sha256(json.dumps(meaning).encode())
    for file in sorted({file for folder in ours for file in folder.rglob("*.safetensors")}):
        digest.update(file.read_bytes())
    return f"{spec} ({digest.hexdigest()[:12]})"


def _parse_folder_spec(spec: str) -> ParsedRewardSpec:
    card = read_manifest(spec)
    if card.kind == "ensemble":
        members = tuple(str(Path(spec, name)) for name in card.members)
        return replace(
            _parse_ensemble_spec(spec, members, card.uncertainty_penalty),
            validated_limits=card.validated_limits,
            gradient_at=card.gradient_at,
        )
    if card.kind == "implicit":
        return ParsedRewardSpec(
            "log-ratio",
            (spec, card.reference_model),
            card.scale,
            validated_limits=card.validated_limits,
            gradient_at=card.gradient_at,
        )
    delimiter = card.step_delimiter if card.kind == "process" else ""
    return ParsedRewardSpec(
        card.kind,
        (spec,),
        step_delimiter=delimiter,
        validated_limits=card.validated_limits,
        gradient_at=card.gradient_at,
    )


def _parse_process_spec(spec: str, step_delimiter: str | None, model_name: str) -> ParsedRewardSpec:
    """A scalar reward, read at steps. Its own audit is of another reward, so it brings no trust and no point."""
    if not model_name:
        raise ValueError(f"{spec!r}: expected process:NAME or process@DELIMITER:NAME")
    try:
        read = BLANK_LINE if step_delimiter is None else parse_delimiter(step_delimiter)
    except ValueError as error:
        raise ValueError(f"{spec!r}: {error}") from error
    kind, _ = _get_kind_and_delimiter(model_name)
    if kind != "scalar":
        raise ValueError(f"{spec!r}: {model_name} is a reward of kind {kind}: only a scalar one can be read at steps")
    return ParsedRewardSpec("process", (model_name,), step_delimiter=read)


def _parse_ensemble_spec(spec: str, members: tuple[str, ...], uncertainty_penalty: float) -> ParsedRewardSpec:
    if not all(members):
        raise ValueError(f"{spec!r}: expected ensemble:A,B,… or ensemble@K:A,B,…")
    if len(members) < 2:
        raise ValueError(f"{spec}: an ensemble needs at least two members")
    for index, name in enumerate(members):
        if any(is_same_model(_get_classifier_name(name), _get_classifier_name(other)) for other in members[:index]):
            raise ValueError(f"{spec}: {name} is a member twice, and so would count twice")
    check_ensemble_members(spec, [(name, *_get_kind_and_delimiter(name)) for name in members])
    return ParsedRewardSpec("ensemble", members, uncertainty_penalty=uncertainty_penalty)


def check_ensemble_members(spec: str, members: Sequence[tuple[str, str, str]]) -> None:
    """Refuse an ensemble whose scores cannot be averaged.

    Args:
        members: name, kind and delimiter of each.
    """
    rule = "the members of an ensemble are all scalar, or all process with one delimiter"
    for name, kind, delimiter in members:
        if kind not in ("scalar", "process"):
            raise ValueError(f"{spec}: {name} is a reward of kind {kind}: {rule}")
        if (kind, delimiter) != members[0][1:]:
            raise ValueError(f"{spec}: {name} is not read where {members[0][0]} is: {rule}")


def _get_kind_and_delimiter(spec: str) -> tuple[str, str]:
    """The kind of a spec, and its delimiter. Does not look into an ensemble, which might hold itself."""
    if spec.startswith(LOG_RATIO_PREFIX):
        return "log-ratio", ""
    if _ENSEMBLE_SPEC.fullmatch(spec):
        return "ensemble", ""
    if _PROCESS_SPEC.fullmatch(spec):
        return "process", parse_reward_spec(spec).step_delimiter
    if not Path(spec, MANIFEST_FILE).is_file():
        return "scalar", ""
    card = read_manifest(spec)
    return _MANIFEST_KINDS[card.kind][0], card.step_delimiter if card.kind == "process" else ""


def _get_classifier_name(spec: str) -> str:
    """The name of the model in a member's spec."""
    written = _PROCESS_SPEC.fullmatch(spec)
    return written["model"] if written else spec


def _split_names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _parse_uncertainty_penalty(spec: str, text: str | None) -> float:
    if text is None:
        return 1.0
    try:
        value = float(text)
        _check_uncertainty_penalty(value)
    except ValueError as error:
        raise ValueError(f"{spec!r}: expected ensemble@K:A,B,… with a number K of at least 0, not {text!r}") from error
    return value


# --- audits -------------------------------------------------------------------------------------------


def read_validated_limits(file: str | Path, *, policy: str, reward: str) -> ValidatedLimits:
    """The trust in an audit that `nabla-trl audit --over_optimization --output_file FILE` wrote.

    Raises:
        ValueError: no such file, broken, without trust, or of another policy or reward.
    """
    try:
        found = _read_json_object(Path(file))
        for name, asked in (("policy", policy), ("reward", reward)):
            if name not in found:
                raise ValueError(
                    f"{name!r} is missing: is it an audit by nabla-trl audit --over_optimization --output_file?"
                )
            if not is_same_model(str(found[name]), asked):
                raise ValueError(f"this is an audit of the {name} {found[name]}, not of {asked}")
        if found.get("trust") is None:
            raise ValueError("the audit tells no trust: make it with nabla-trl audit --over_optimization")
        return _parse_validated_limits(found["trust"])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


# --- checks -------------------------------------------------------------------------------------------


def _read_json_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not JSON: {format_error(error)}") from error
    if not isinstance(content, dict):
        raise ValueError("does not hold a JSON object")
    return content


def _parse_validated_limits(data: Any) -> ValidatedLimits:
    if not isinstance(data, Mapping):
        raise ValueError(f"trust must be an object, not {data!r}")
    return ValidatedLimits.from_dict(data)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_kind(value: Any) -> None:
    if value not in list(_MANIFEST_KINDS):  # a list: the value may be anything that JSON can hold
        raise ValueError(f"kind must be one of {', '.join(_MANIFEST_KINDS)}, not {value!r}")


def _check_uncertainty_penalty(value: Any) -> None:
    if not (_is_number(value) and value >= 0):
        raise ValueError(f"caution must be a number of at least 0, not {value!r}")


def _check_model_name(key: str, value: Any) -> None:
    if not (isinstance(value, str) and value):
        raise ValueError(f"{key} must be the name of a model, not {value!r}")
