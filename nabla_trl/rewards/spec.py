"""What a reward's name means, before any model is loaded: specs, reward.json and limits in audit files.

Loads no torch. `nabla_trl.rewards.loading.load_reward` lists the forms of a spec.
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
from nabla_trl.utils.files import read_json_file, write_atomic
from nabla_trl.utils.formatting import format_error
from nabla_trl.utils.identity import is_same_model

LOG_RATIO_PREFIX = "logratio:"
POWER_PREFIX = "power:"
NO_REFERENCE = "none"  # in place of the name of a log-ratio's reference: r = scale · log p_A
SAME_MODELS = "a log-ratio of a model against itself is 0 for every response, so it rewards nothing"
MANIFEST_FILE = "reward.json"
MANIFEST_FORMAT = 2
_ADAPTER_FILE = "adapter_config.json"

HEAD_PREFIX = "head:"
_PROCESS_SPEC = re.compile(r"process(?:@(?P<step_delimiter>[^:]*))?:(?P<model>.*)", re.DOTALL)
_ENSEMBLE_SPEC = re.compile(r"ensemble(?:@(?P<uncertainty_penalty>[^:]*))?:(?P<members>.*)", re.DOTALL)
# Per kind the keys of a mapping that describes a reward. The first one is required.
_MAPPING_KEYS: dict[str, tuple[str, ...]] = {
    "scalar": ("model",),
    "process": ("model", "step_delimiter"),
    "head": ("model",),
    "log_ratio": ("model", "reference", "scale"),
    "ensemble": ("members", "uncertainty_penalty"),
    "power": ("alpha",),
}
# Per kind the keys of reward.json that no other kind has.
_MANIFEST_KEYS: dict[str, tuple[str, ...]] = {
    "scalar": (),
    "process": ("step_delimiter",),
    "head": (),
    "log_ratio": ("scale", "reference_model"),
    "ensemble": ("members", "uncertainty_penalty"),
}
# Keys of reward.json in format 1, which version 0.1 wrote, and their names since.
_RENAMED_KEYS = {
    "base": "base_model",
    "reference": "reference_model",
    "caution": "uncertainty_penalty",
    "trust": "validated_limits",
    "point": "gradient_at",
    "rounds": "training_rounds",
    "settings": "training_settings",
}


# --- reward.json --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardManifest:
    """reward.json: what a reward folder holds, and how far a search may go with the reward.

    Attributes:
        kind: "scalar" (a sequence classifier with one label, or a LoRA adapter of one, in this folder), "process" (the
            sum of such a score over the ends of reasoning steps), "head" (a head on the policy's hidden states, in
            this folder), "log_ratio" (a causal LM or its adapter in this folder: r = scale · (log π −
            log π_reference), or scale · log π without a reference) or "ensemble".
        base_model: the model that training began from. None = none.
        step_delimiter: process only: the text that ends a reasoning step.
        members: ensemble only: folders of scalar, process or head rewards, relative to this one.
        uncertainty_penalty: ensemble only: k of mean − k·std.
        scale: log_ratio only: β > 0.
        reference_model: log_ratio only: name of the reference model. "none" = no reference.
        policy: the policy that the reward was trained and audited for.
        validated_limits: how far the audit allows a search to go. None = not audited.
        gradient_at: the gradient that the audit recommends (`GradientPoint.parse`). None = not audited, or no
            gradient helps.
        training_rounds: one object per round of training, with its audit.
        training_settings: the options of the training.

    Raises:
        ValueError: an unknown kind, a value of another kind's key, or a value out of range.
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
        for attribute in fields(self):
            name = attribute.name
            if name in _list_foreign_keys(self.kind) and getattr(self, name) != attribute.default:
                raise ValueError(f"a reward of kind {self.kind} has no {name!r}")
        for name in ("base_model", "policy"):
            if getattr(self, name) is not None:
                _check_model_name(name, getattr(self, name))
        if self.kind == "log_ratio":
            _check_model_name("reference_model", self.reference_model)
        if not (
            isinstance(self.members, list | tuple) and all(isinstance(name, str) and name for name in self.members)
        ):
            raise ValueError(f"members must be a list of folders, not {self.members!r}")
        _check_scale(self.scale)
        check_delimiter(self.step_delimiter)
        check_uncertainty_penalty(self.uncertainty_penalty)
        if self.gradient_at is not None:
            GradientPoint.parse(str(self.gradient_at))

    def to_dict(self) -> dict[str, Any]:
        """Return the object of reward.json: the keys of all rewards and those of the kind."""
        foreign_keys = _list_foreign_keys(self.kind)
        values = {name: value for name, value in asdict(self).items() if name not in foreign_keys}
        return {"format": MANIFEST_FORMAT} | values

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RewardManifest:
        """Return the manifest in the object of a reward.json, also of format 1.

        Raises:
            ValueError: another format, missing or unknown keys (the message names all), or a malformed value.
        """
        if data.get("format") == 1:
            data = _upgrade_format_1(data)
        if data.get("format") != MANIFEST_FORMAT:
            raise ValueError(
                f"format must be {MANIFEST_FORMAT} or 1, not {format_error(repr(data.get('format')), 60)}"
            )
        _check_kind(data.get("kind"))
        foreign_keys = _list_foreign_keys(data["kind"])
        keys = [attribute.name for attribute in fields(cls) if attribute.name not in foreign_keys]
        mistakes = []
        for name in data:
            if name not in ("format", *keys):
                renamed = f": it is now {_RENAMED_KEYS[name]!r}" if name in _RENAMED_KEYS else ""
                mistakes.append(f"{name[:60]!r} is not a key of the kind {data['kind']}{renamed}")
        mistakes += [f"{name!r} is missing" for name in keys if name not in data]
        for name, expected in (("training_rounds", list), ("training_settings", dict)):
            if name in data and not isinstance(data[name], expected):
                mistakes.append(f"{name!r} must be a {expected.__name__}, not {format_error(repr(data[name]), 60)}")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        limits = data["validated_limits"]
        return cls(
            **{name: data[name] for name in keys}
            | {"validated_limits": None if limits is None else ValidatedLimits.from_dict(limits)}
        )


def write_manifest(folder: str | Path, manifest: RewardManifest) -> None:
    """Write a folder's reward.json, whole or not at all."""
    write_atomic(Path(folder, MANIFEST_FILE), json.dumps(manifest.to_dict(), indent=1, ensure_ascii=False) + "\n")


def read_manifest(folder: str | Path) -> RewardManifest:
    """Return a folder's reward.json.

    Raises:
        ValueError: no such file, or a broken one. The message names the file.
    """
    file = Path(folder, MANIFEST_FILE)
    content = read_json_file(file)
    try:
        return RewardManifest.from_dict(content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _upgrade_format_1(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a reward.json of version 0.1 with today's keys. Audits inside the rounds stay as they are."""
    data = {_RENAMED_KEYS.get(name, name): value for name, value in data.items()} | {"format": MANIFEST_FORMAT}
    if data.get("kind") == "implicit":
        data["kind"] = "log_ratio"
    if isinstance(data.get("validated_limits"), dict):
        data["validated_limits"] = {f"max_{name}": value for name, value in data["validated_limits"].items()}
    return data


# --- specs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardSpec:
    """What a reward is made of.

    Attributes:
        name: the reward's name in rows, reports and messages: the spec as text.
        kind: "scalar", "process", "head", "log-ratio", "ensemble" or "power", as `Reward.kind`.
        model_names: models to load: the classifier, the preferred model and (unless it is the policy) the reference,
            or the classifiers of an ensemble's members. Empty for a power of the policy and for heads.
        members: of an ensemble.
        has_reference: of a log-ratio. False: the reward is the likelihood of the preferred model alone.
        scale: factor of a log-ratio, or α − 1 of a power.
        uncertainty_penalty: k of an ensemble's mean − k·std.
        step_delimiter: of a process reward, else empty.
        folder: the folder of a head, or the one whose reward.json describes this reward, if there is one.
        validated_limits: those of reward.json.
        gradient_at: that of reward.json.
    """

    name: str
    kind: str
    model_names: tuple[str, ...]
    members: tuple[RewardSpec, ...] = ()
    has_reference: bool = True
    scale: float = 1.0
    uncertainty_penalty: float = 1.0
    step_delimiter: str = ""
    folder: str | None = None
    validated_limits: ValidatedLimits | None = None
    gradient_at: str | None = None


def parse_reward_spec(spec: str | Mapping[str, Any]) -> RewardSpec:
    """Return what a spec means. Reads reward.json, loads no model.

    Args:
        spec: text, or a mapping with a `kind` (see `nabla_trl.rewards.loading.load_reward`).

    Raises:
        ValueError: a malformed spec or reward.json, a process reward of a model that is not scalar, an ensemble of
            fewer than two members, with a member twice, or of different kinds.
    """
    data = _read_mapping(spec)
    if data is not None:
        return _parse_mapping(data)
    spec = str(spec)
    if spec.startswith(LOG_RATIO_PREFIX):
        names = _split_names(spec.removeprefix(LOG_RATIO_PREFIX))
        if not 1 <= len(names) <= 2 or not all(names):
            raise ValueError(f"{spec!r}: expected {LOG_RATIO_PREFIX}BETTER or {LOG_RATIO_PREFIX}BETTER,REFERENCE")
        return _build_log_ratio_spec(spec, names)
    if spec.startswith(POWER_PREFIX):
        return _build_power_spec(spec, spec.removeprefix(POWER_PREFIX))
    if spec.startswith(HEAD_PREFIX):
        return _build_head_spec(spec, spec.removeprefix(HEAD_PREFIX))
    if match := _PROCESS_SPEC.fullmatch(spec):
        if not match["model"]:
            raise ValueError(f"{spec!r}: expected process:NAME or process@DELIMITER:NAME")
        try:
            delimiter = BLANK_LINE if match["step_delimiter"] is None else parse_delimiter(match["step_delimiter"])
        except ValueError as error:
            raise ValueError(f"{spec!r}: {error}") from error
        return _build_process_spec(spec, match["model"], delimiter)
    if match := _ENSEMBLE_SPEC.fullmatch(spec):
        names = _split_names(match["members"])
        if not all(names):
            raise ValueError(f"{spec!r}: expected ensemble:A,B,… or ensemble@K:A,B,…")
        text = "1" if match["uncertainty_penalty"] is None else match["uncertainty_penalty"]
        try:
            check_uncertainty_penalty(float(text))
        except ValueError as error:
            raise ValueError(
                f"{spec!r}: expected ensemble@K:A,B,… with a number K of at least 0, not {text!r}"
            ) from error
        return _build_ensemble_spec(spec, names, float(text))
    return _parse_folder(spec) if Path(spec, MANIFEST_FILE).is_file() else RewardSpec(spec, "scalar", (spec,))


def get_reward_name(spec: str | Mapping[str, Any]) -> str:
    """Return a spec as text: a mapping becomes a JSON object with its keys in a fixed order."""
    data = _read_mapping(spec)
    if data is None:
        return str(spec)
    keys = [key for key in ("kind", *_MAPPING_KEYS.get(str(data.get("kind")), ())) if key in data]
    return json.dumps({key: data[key] for key in keys}, ensure_ascii=False, default=str)


def compute_reward_identity(spec: str | Mapping[str, Any]) -> str:
    """Return a reward's name, with a hash of the weights that were trained here.

    A reward that is trained again gets another identity. Weights of plain model folders and of the hub are
    identified by their names alone, as policies are.
    """
    reward = parse_reward_spec(spec)
    folders = [Path(name) for name in (*reward.model_names, reward.folder) if name is not None]
    trained = [
        folder for folder in folders if any(Path(folder, name).is_file() for name in (MANIFEST_FILE, _ADAPTER_FILE))
    ]
    if not trained:
        return reward.name
    meaning = [reward.scale, reward.uncertainty_penalty, reward.gradient_at]
    meaning += [reward.step_delimiter] if reward.step_delimiter else []
    digest = hashlib.sha256(json.dumps(meaning).encode())
    for file in sorted({file for folder in trained for file in folder.rglob("*.safetensors")}):
        digest.update(file.read_bytes())
    return f"{reward.name} ({digest.hexdigest()[:12]})"


def _read_mapping(spec: str | Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the mapping that a spec is, or that it writes as JSON. None = another text."""
    if isinstance(spec, Mapping):
        return spec
    if not spec.lstrip().startswith("{"):
        return None
    try:
        return json.loads(spec)
    except ValueError as error:
        raise ValueError(f"the reward {spec!r} is not a JSON object: {format_error(error)}") from error


def _parse_mapping(data: Mapping[str, Any]) -> RewardSpec:
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in _MAPPING_KEYS:
        raise ValueError(f"reward: kind must be one of {', '.join(_MAPPING_KEYS)}, not {kind!r}")
    required, *optional = _MAPPING_KEYS[kind]
    if required not in data:
        raise ValueError(f"reward: a {kind} reward needs the key {required!r}")
    for key in data:
        if key not in ("kind", required, *optional):
            keys = ", ".join(_MAPPING_KEYS[kind])
            raise ValueError(f"reward: {key!r} is not a key of the kind {kind}, which has {keys}")
    if kind == "ensemble":
        members, penalty = data["members"], data.get("uncertainty_penalty", 1.0)
        if not isinstance(members, list | tuple) or not all(
            isinstance(name, str | Mapping) and name for name in members
        ):
            raise ValueError(f"reward: members must be a list of rewards, not {members!r}")
        check_uncertainty_penalty(penalty)
        return _build_ensemble_spec(get_reward_name(data), members, float(penalty))
    if kind == "power":
        return _build_power_spec(get_reward_name(data), data["alpha"])
    for key in ("model", "reference"):
        if key in data:
            _check_model_name(f"reward: {key}", data[key])
    name, model = get_reward_name(data), data["model"]
    if kind == "head":
        return _build_head_spec(name, model)
    if kind == "process":
        delimiter = data.get("step_delimiter", BLANK_LINE)
        check_delimiter(delimiter)
        return _build_process_spec(name, model, delimiter)
    if kind == "log_ratio":
        _check_scale(data.get("scale", 1.0))
        models = tuple(data[key] for key in ("model", "reference") if key in data)
        return _build_log_ratio_spec(name, models, float(data.get("scale", 1.0)))
    return _parse_scalar(name, model)


def _parse_folder(folder: str) -> RewardSpec:
    """Return what a folder's reward.json describes."""
    manifest = read_manifest(folder)
    if manifest.kind == "ensemble":
        members = [str(Path(folder, name)) for name in manifest.members]
        spec = _build_ensemble_spec(folder, members, manifest.uncertainty_penalty)
    elif manifest.kind == "log_ratio":
        spec = _build_log_ratio_spec(folder, (folder, manifest.reference_model), manifest.scale)
    else:
        delimiter = manifest.step_delimiter if manifest.kind == "process" else ""
        models = () if manifest.kind == "head" else (folder,)
        spec = RewardSpec(folder, manifest.kind, models, step_delimiter=delimiter)
    return replace(spec, folder=folder, validated_limits=manifest.validated_limits, gradient_at=manifest.gradient_at)


def _build_log_ratio_spec(name: str, models: tuple[str, ...], scale: float = 1.0) -> RewardSpec:
    """Return the spec of a preferred model and its reference, which is the policy unless it is named."""
    if models[1:] == (NO_REFERENCE,):
        return RewardSpec(name, "log-ratio", models[:1], has_reference=False, scale=scale)
    if len(models) == 2 and is_same_model(*models):
        raise ValueError(f"{name}: {SAME_MODELS}")
    return RewardSpec(name, "log-ratio", models, scale=scale)


def _build_power_spec(name: str, alpha: Any) -> RewardSpec:
    try:
        value = float(alpha)
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(alpha, bool) or not 1 < value < math.inf:
        raise ValueError(f"{name}: expected power:ALPHA with a number ALPHA above 1, not {alpha!r}")
    return RewardSpec(name, "power", (), scale=value - 1)


def _build_process_spec(name: str, model: str, step_delimiter: str) -> RewardSpec:
    """Return a scalar reward that is read at steps. Audits of the scalar reward do not count for this reward."""
    _parse_scalar(name, model)
    return RewardSpec(name, "process", (model,), step_delimiter=step_delimiter)


def _build_head_spec(name: str, folder: str) -> RewardSpec:
    """Return the head in a folder, with the limits of its reward.json if there is one."""
    if not folder:
        raise ValueError(f"{name!r}: expected {HEAD_PREFIX}FOLDER")
    if not Path(folder, MANIFEST_FILE).is_file():
        return RewardSpec(name, "head", (), folder=folder)
    spec = _parse_folder(folder)
    if spec.kind != "head":
        raise ValueError(f"{name!r}: {folder} is a reward of kind {spec.kind}, not a head")
    return replace(spec, name=name)


def _parse_scalar(name: str, model: str) -> RewardSpec:
    spec = parse_reward_spec(model)
    if spec.kind != "scalar":
        raise ValueError(f"{name!r}: {model} is a reward of kind {spec.kind}, but only a scalar one fits here")
    return spec


def _build_ensemble_spec(
    name: str, members: Sequence[str | Mapping[str, Any]], uncertainty_penalty: float
) -> RewardSpec:
    if len(members) < 2:
        raise ValueError(f"{name}: an ensemble needs at least two members")
    for member in members:
        if _is_ensemble(member):  # refused before it is parsed: it could hold itself
            check_ensemble_members(name, [(get_reward_name(member), "ensemble", "")])
    specs = tuple(parse_reward_spec(member) for member in members)
    sources = [spec.model_names[0] if spec.model_names else str(spec.folder) for spec in specs]
    for index, source in enumerate(sources):
        if any(is_same_model(source, other) for other in sources[:index]):
            raise ValueError(f"{name}: {specs[index].name} is a member twice, and so would count twice")
    check_ensemble_members(name, [(spec.name, spec.kind, spec.step_delimiter) for spec in specs])
    models = tuple(model for spec in specs for model in spec.model_names[:1])
    return RewardSpec(name, "ensemble", models, specs, uncertainty_penalty=uncertainty_penalty)


def check_ensemble_members(name: str, members: Sequence[tuple[str, str, str]]) -> None:
    """Refuse an ensemble whose scores cannot be averaged.

    Args:
        name: of the ensemble.
        members: name, kind and step delimiter of each member.

    Raises:
        ValueError: a member of another kind, or with another delimiter than the first one.
    """
    rule = "the members of an ensemble are all scalar, all heads, or all process with one delimiter"
    for member, kind, delimiter in members:
        if kind not in ("scalar", "process", "head"):
            raise ValueError(f"{name}: {member} is a reward of kind {kind}: {rule}")
        if (kind, delimiter) != members[0][1:]:
            raise ValueError(f"{name}: {member} is not read at the same steps as {members[0][0]}: {rule}")


def _is_ensemble(spec: str | Mapping[str, Any]) -> bool:
    data = _read_mapping(spec)
    if data is not None:
        return data.get("kind") == "ensemble"
    if _ENSEMBLE_SPEC.fullmatch(str(spec)):
        return True
    return Path(str(spec), MANIFEST_FILE).is_file() and read_manifest(str(spec)).kind == "ensemble"


def _split_names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


# --- audits -------------------------------------------------------------------------------------------


def read_validated_limits(file: str | Path, *, policy: str, reward: str | Mapping[str, Any]) -> ValidatedLimits:
    """Return the limits in a file that `nabla-trl audit --over_optimization --output_file FILE` wrote.

    Raises:
        ValueError: no such file, or a broken one, or an audit of another policy or reward, or without limits.
    """
    audit = read_json_file(Path(file))
    how = "nabla-trl audit --over_optimization --output_file"
    try:
        if "trust" in audit or "verdict" in audit:
            raise ValueError(
                f"this is an audit of version 0.1, which had 'trust' for 'validated_limits': make it again by {how}"
            )
        for key, name in (("policy", policy), ("reward", get_reward_name(reward))):
            if key not in audit:
                raise ValueError(f"{key!r} is missing: is it an audit by {how}?")
            if not is_same_model(get_reward_name(str(audit[key])), name):
                raise ValueError(f"this is an audit of the {key} {audit[key]}, not of {name}")
        if audit.get("validated_limits") is None:
            raise ValueError(f"the audit has no validated limits: make it by {how}")
        return ValidatedLimits.from_dict(audit["validated_limits"])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


# --- checks -------------------------------------------------------------------------------------------


def _list_foreign_keys(kind: str) -> list[str]:
    """Return the keys of reward.json that only other kinds have."""
    return [key for other, keys in _MANIFEST_KEYS.items() if other != kind for key in keys]


def _check_kind(value: Any) -> None:
    if value not in list(_MANIFEST_KEYS):  # a list: the value may be anything that JSON can hold
        raise ValueError(f"kind must be one of {', '.join(_MANIFEST_KEYS)}, not {value!r}")


def check_uncertainty_penalty(value: Any, name: str = "uncertainty_penalty") -> None:
    """Raise ValueError unless a value is a finite number of at least 0. The message begins with `name`."""
    if not (_is_finite_number(value) and value >= 0):
        raise ValueError(f"{name} must be a number of at least 0, not {value!r}")


def _check_scale(value: Any) -> None:
    if not (_is_finite_number(value) and value > 0):
        raise ValueError(f"scale must be a positive number, not {value!r}")


def _check_model_name(key: str, value: Any) -> None:
    if not (isinstance(value, str) and value):
        raise ValueError(f"{key} must be the name of a model, not {value!r}")


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
