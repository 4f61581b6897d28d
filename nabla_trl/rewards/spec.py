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

from nabla_trl.gradient.step_ends import BLANK_LINE, check_delimiter, read_delimiter
from nabla_trl.models.options import Point
from nabla_trl.rewards.limits import Trust
from nabla_trl.utils.files import write_whole
from nabla_trl.utils.formatting import one_line
from nabla_trl.utils.identity import same_model

PREFIX = "logratio:"
FILE = "reward.json"
_ADAPTER = "adapter_config.json"
FORMAT = 1

_PROCESS = re.compile(r"process(?:@(?P<delimiter>[^:]*))?:(?P<model>.*)", re.DOTALL)
_ENSEMBLE = re.compile(r"ensemble(?:@(?P<caution>[^:]*))?:(?P<members>.*)", re.DOTALL)
# Kinds of reward.json: the kind of `nabla_trl.rewards.reward.Reward` that each becomes, and the keys that only it has.
_KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "scalar": ("scalar", ()),
    "process": ("process", ("step_delimiter",)),
    "implicit": ("log-ratio", ("scale", "reference")),
    "ensemble": ("ensemble", ("members", "caution")),
}
_FOREIGN = {kind: [name for other in _KINDS if other != kind for name in _KINDS[other][1]] for kind in _KINDS}


# --- reward.json --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardCard:
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
    base: str | None = None
    step_delimiter: str = BLANK_LINE
    members: Sequence[str] = ()
    caution: float = 1.0
    scale: float = 1.0
    reference: str = ""
    policy: str | None = None
    trust: Trust | None = None
    point: str | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_kind(self.kind)
        for one in fields(self):
            if one.name in _FOREIGN[self.kind] and getattr(self, one.name) != one.default:
                raise ValueError(f"a reward of kind {self.kind} has no {one.name!r}")
        for name in ("base", "policy"):
            if getattr(self, name) is not None:
                _check_name(name, getattr(self, name))
        if self.kind == "implicit":
            _check_name("reference", self.reference)
        if not (isinstance(self.members, list | tuple) and all(isinstance(one, str) and one for one in self.members)):
            raise ValueError(f"members must be a list of folders, not {self.members!r}")
        if not (_is_number(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be a positive number, not {self.scale!r}")
        check_delimiter(self.step_delimiter)
        _check_caution(self.caution)
        if self.point is not None:
            Point.parse(str(self.point))

    def to_dict(self) -> dict[str, Any]:
        """The object of reward.json: the common keys and those of the kind."""
        values = {name: value for name, value in asdict(self).items() if name not in _FOREIGN[self.kind]}
        return {"format": FORMAT} | values

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RewardCard:
        """The inverse of `to_dict`.

        Raises:
            ValueError: another format, a missing or unknown key, or a value that the card refuses.
        """
        if data.get("format") != FORMAT:
            raise ValueError(f"format must be {FORMAT}, not {data.get('format')!r}")
        _check_kind(data.get("kind"))
        keys = ["base", *_KINDS[data["kind"]][1], "policy", "trust", "point", "rounds", "settings"]
        for name in keys:
            if name not in data:
                raise ValueError(f"{name!r} is missing")
        for name in data:
            if name not in ("format", "kind", *keys):
                raise ValueError(f"{name!r} is not a key of the kind {data['kind']}")
        for name, kind in (("rounds", list), ("settings", dict)):
            if not isinstance(data[name], kind):
                raise ValueError(f"{name!r} must be a {kind.__name__}, not {data[name]!r}")
        trust = None if data["trust"] is None else _trust(data["trust"])
        return cls(**{name: data[name] for name in ("kind", *keys)} | {"trust": trust})


def write_card(folder: str | Path, card: RewardCard) -> None:
    """Write a folder's reward.json, whole or not at all."""
    write_whole(Path(folder, FILE), json.dumps(card.to_dict(), indent=1, ensure_ascii=False) + "\n")


def read_card(folder: str | Path) -> RewardCard:
    """A folder's reward.json.

    Raises:
        ValueError: no such file, or one that is broken; it is named.
    """
    file = Path(folder, FILE)
    try:
        return RewardCard.from_dict(_read_object(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


# --- specs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardPlan:
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
    models: tuple[str, ...]
    scale: float = 1.0
    caution: float = 1.0
    delimiter: str = ""
    trust: Trust | None = None
    point: str | None = None


def plan_reward(spec: str) -> RewardPlan:
    """What a spec means; reads reward.json, loads nothing.

    Raises:
        ValueError: a malformed spec or reward.json; a process reward of what is not scalar; an ensemble of fewer than
            two members, of one twice, or of different kinds.
    """
    if spec.startswith(PREFIX):
        names = _listed(spec.removeprefix(PREFIX))
        if not 1 <= len(names) <= 2 or not all(names):
            raise ValueError(f"{spec!r}: expected {PREFIX}BETTER or {PREFIX}BETTER,REFERENCE")
        return RewardPlan("log-ratio", names)
    written = _PROCESS.fullmatch(spec)
    if written:
        return _plan_process(spec, written["delimiter"], written["model"])
    written = _ENSEMBLE.fullmatch(spec)
    if written:
        return _plan_ensemble(spec, _listed(written["members"]), _caution(spec, written["caution"]))
    return _plan_folder(spec) if Path(spec, FILE).is_file() else RewardPlan("scalar", (spec,))


def reward_identity(spec: str) -> str:
    """A reward's name; with a hash of the weights that we trained, so that a reward trained again is another.

    Weights of plain model folders and of the hub are taken by their names alone, as those of policies are.
    """
    plan = plan_reward(spec)
    models = [Path(_classifier(name)) for name in plan.models]
    ours = [folder for folder in models if Path(folder, FILE).is_file() or Path(folder, _ADAPTER).is_file()]
    ours += [Path(spec)] if plan.kind == "ensemble" and Path(spec, FILE).is_file() else []
    if not ours:
        return spec
    meaning = [plan.scale, plan.caution, plan.point, *([plan.delimiter] if plan.delimiter else [])]
    digest = hashlib.sha256(json.dumps(meaning).encode())
    for file in sorted({file for folder in ours for file in folder.rglob("*.safetensors")}):
        digest.update(file.read_bytes())
    return f"{spec} ({digest.hexdigest()[:12]})"


def _plan_folder(spec: str) -> RewardPlan:
    card = read_card(spec)
    if card.kind == "ensemble":
        members = tuple(str(Path(spec, name)) for name in card.members)
        return replace(_plan_ensemble(spec, members, card.caution), trust=card.trust, point=card.point)
    if card.kind == "implicit":
        return RewardPlan("log-ratio", (spec, card.reference), card.scale, trust=card.trust, point=card.point)
    delimiter = card.step_delimiter if card.kind == "process" else ""
    return RewardPlan(card.kind, (spec,), delimiter=delimiter, trust=card.trust, point=card.point)


def _plan_process(spec: str, delimiter: str | None, model: str) -> RewardPlan:
    """A scalar reward, read at steps. Its own audit is of another reward, so it brings no trust and no point."""
    if not model:
        raise ValueError(f"{spec!r}: expected process:NAME or process@DELIMITER:NAME")
    try:
        read = BLANK_LINE if delimiter is None else read_delimiter(delimiter)
    except ValueError as error:
        raise ValueError(f"{spec!r}: {error}") from error
    kind, _ = _kind(model)
    if kind != "scalar":
        raise ValueError(f"{spec!r}: {model} is a reward of kind {kind}: only a scalar one can be read at steps")
    return RewardPlan("process", (model,), delimiter=read)


def _plan_ensemble(spec: str, members: tuple[str, ...], caution: float) -> RewardPlan:
    if not all(members):
        raise ValueError(f"{spec!r}: expected ensemble:A,B,… or ensemble@K:A,B,…")
    if len(members) < 2:
        raise ValueError(f"{spec}: an ensemble needs at least two members")
    for index, name in enumerate(members):
        if any(same_model(_classifier(name), _classifier(other)) for other in members[:index]):
            raise ValueError(f"{spec}: {name} is a member twice, and so would count twice")
    check_members(spec, [(name, *_kind(name)) for name in members])
    return RewardPlan("ensemble", members, caution=caution)


def check_members(spec: str, members: Sequence[tuple[str, str, str]]) -> None:
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


def _kind(spec: str) -> tuple[str, str]:
    """The kind of a spec, and its delimiter. Does not look into an ensemble, which might hold itself."""
    if spec.startswith(PREFIX):
        return "log-ratio", ""
    if _ENSEMBLE.fullmatch(spec):
        return "ensemble", ""
    if _PROCESS.fullmatch(spec):
        return "process", plan_reward(spec).delimiter
    if not Path(spec, FILE).is_file():
        return "scalar", ""
    card = read_card(spec)
    return _KINDS[card.kind][0], card.step_delimiter if card.kind == "process" else ""


def _classifier(spec: str) -> str:
    """The name of the model in a member's spec."""
    written = _PROCESS.fullmatch(spec)
    return written["model"] if written else spec


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _caution(spec: str, text: str | None) -> float:
    if text is None:
        return 1.0
    try:
        value = float(text)
        _check_caution(value)
    except ValueError as error:
        raise ValueError(f"{spec!r}: expected ensemble@K:A,B,… with a number K of at least 0, not {text!r}") from error
    return value


# --- audits -------------------------------------------------------------------------------------------


def audited_trust(file: str | Path, *, policy: str, reward: str) -> Trust:
    """The trust in an audit that `nabla-trl audit --pressure --output FILE` wrote.

    Raises:
        ValueError: no such file, broken, without trust, or of another policy or reward.
    """
    try:
        found = _read_object(Path(file))
        for name, asked in (("policy", policy), ("reward", reward)):
            if name not in found:
                raise ValueError(f"{name!r} is missing: is it an audit by nabla-trl audit --pressure --output?")
            if not same_model(str(found[name]), asked):
                raise ValueError(f"this is an audit of the {name} {found[name]}, not of {asked}")
        if found.get("trust") is None:
            raise ValueError("the audit tells no trust: make it with nabla-trl audit --pressure")
        return _trust(found["trust"])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


# --- checks -------------------------------------------------------------------------------------------


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError("does not hold a JSON object")
    return content


def _trust(data: Any) -> Trust:
    if not isinstance(data, Mapping):
        raise ValueError(f"trust must be an object, not {data!r}")
    return Trust.from_dict(data)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_kind(value: Any) -> None:
    if value not in list(_KINDS):  # a list: the value may be anything that JSON can hold
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, not {value!r}")


def _check_caution(value: Any) -> None:
    if not (_is_number(value) and value >= 0):
        raise ValueError(f"caution must be a number of at least 0, not {value!r}")


def _check_name(key: str, value: Any) -> None:
    if not (isinstance(value, str) and value):
        raise ValueError(f"{key} must be the name of a model, not {value!r}")
