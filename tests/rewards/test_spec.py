"""What specs and reward.json mean and what is refused, and validated limits from the folder to the warning."""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import shutil
from dataclasses import make_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import worlds

from nabla_trl.audit.overoptimization import warn_past_limits
from nabla_trl.cli.main import main
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.loading import load_policy
from nabla_trl.models.policy import Policy
from nabla_trl.reward_training.card import render_reward_readme
from nabla_trl.rewards.limits import ValidatedLimits, past_limits, past_sample_limit
from nabla_trl.rewards.loading import load_reward
from nabla_trl.rewards.spec import (
    MANIFEST_FILE,
    RewardManifest,
    RewardSpec,
    compute_reward_identity,
    parse_reward_spec,
    read_manifest,
    read_validated_limits,
    write_manifest,
)
from nabla_trl.search.config import SearchConfig
from nabla_trl.tasks import digit_chains
from nabla_trl.utils.fields import coerce_fields
from nabla_trl.utils.files import read_yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = {
    "scalar": RewardManifest(
        "scalar",
        base_model="b",
        policy="p",
        validated_limits=ValidatedLimits(8, 2),
        gradient_at="direct+mixture:0.5",
        training_rounds=[{"auc": 0.5}],
        training_settings={"x": 1},
    ),
    "process": RewardManifest("process", step_delimiter=";", validated_limits=ValidatedLimits(4, 1)),
    "log_ratio": RewardManifest("log_ratio", scale=0.1, reference_model="ref", gradient_at="hard"),
    "ensemble": RewardManifest("ensemble", members=["m/0", "m/1"], uncertainty_penalty=0.5),
}
# How reward.json is written: other programs may write one too.
WRITTEN: dict[str, dict[str, Any]] = {
    kind: {
        "format": 2,
        "kind": kind,
        "base_model": None,
        **own,
        "policy": "p",
        "validated_limits": None,
        "gradient_at": None,
        "training_rounds": [],
        "training_settings": {},
    }
    for kind, own in {
        "scalar": {},
        "process": {"step_delimiter": ";"},
        "log_ratio": {"scale": 0.1, "reference_model": "ref"},
        "ensemble": {"members": ["m/0", "m/1"], "uncertainty_penalty": 0.5},
    }.items()
}


def write(folder: Path, content: Any) -> Path:
    file = folder / MANIFEST_FILE
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


# --- reward.json ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_is_read_as_it_was_written(kind: str, tmp_path: Path) -> None:
    write_manifest(tmp_path / "new", MANIFESTS[kind])
    assert read_manifest(tmp_path / "new") == MANIFESTS[kind]
    content = json.loads((tmp_path / "new" / MANIFEST_FILE).read_text())
    assert content.keys() == WRITTEN[kind].keys() and content["gradient_at"] == MANIFESTS[kind].gradient_at
    assert [file.name for file in (tmp_path / "new").iterdir()] == [MANIFEST_FILE]


@pytest.mark.parametrize("kind", WRITTEN)
def test_every_key_is_needed_and_no_other_known(kind: str, tmp_path: Path) -> None:
    write(tmp_path, WRITTEN[kind])
    assert read_manifest(tmp_path).kind == kind
    for name in WRITTEN[kind]:
        file = write(tmp_path, {key: value for key, value in WRITTEN[kind].items() if key != name})
        worlds.refused(lambda: read_manifest(tmp_path), str(file), name)
    file = write(tmp_path, WRITTEN[kind] | {"colour": 1})
    worlds.refused(lambda: read_manifest(tmp_path), str(file), "'colour'")


def test_a_reward_of_version_0_1_is_read(tmp_path: Path) -> None:
    """Format 1 had other keys. What it says is the same, and a write gives today's format."""
    old = {
        "format": 1,
        "kind": "implicit",
        "base": "b",
        "scale": 0.1,
        "reference": "ref",
        "policy": "p",
        "trust": {"samples": 8, "rounds": 2},
        "point": "hard",
        "rounds": [{"round": 0, "training": [{"flops": 1.0}]}],
        "settings": {"train_limit": "4"},
    }
    write(tmp_path, old)
    manifest = read_manifest(tmp_path)
    assert manifest == RewardManifest(
        "log_ratio",
        base_model="b",
        scale=0.1,
        reference_model="ref",
        policy="p",
        validated_limits=ValidatedLimits(8, 2),
        gradient_at="hard",
        training_rounds=old["rounds"],
        training_settings={"train_limit": "4"},
    )
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest and '"format": 2' in (tmp_path / MANIFEST_FILE).read_text()
    old = {**WRITTEN["ensemble"], "format": 1, "caution": 0.25}
    del old["uncertainty_penalty"]
    write(tmp_path, old)
    assert read_manifest(tmp_path).uncertainty_penalty == 0.25
    for name in ("caution", "kind"):
        file = write(tmp_path, {key: value for key, value in old.items() if key != name})
        worlds.refused(lambda: read_manifest(tmp_path), str(file), "missing" if name == "caution" else "kind")


def test_a_write_that_fails_leaves_the_manifest_that_was_there(tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFESTS["scalar"])
    with pytest.raises(TypeError):
        write_manifest(tmp_path, RewardManifest("scalar", training_settings={"x": object()}))
    assert read_manifest(tmp_path) == MANIFESTS["scalar"] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("kind", "change", "word"),
    [
        ("scalar", {"format": 3}, "format must be 2 or 1, not 3"),
        ("scalar", {"kind": "oracle"}, "'oracle'"),
        ("scalar", {"kind": ["scalar"]}, "kind"),
        ("scalar", {"base_model": 3}, "base_model"),
        ("scalar", {"policy": ""}, "policy"),
        ("scalar", {"validated_limits": {"max_samples": 4}}, "max_rounds is missing"),
        ("scalar", {"validated_limits": {"max_samples": 4, "max_rounds": -1}}, "max_rounds"),
        ("scalar", {"validated_limits": 7}, "validated_limits"),
        ("scalar", {"gradient_at": "soft"}, "must be direct, hard, mixture"),
        ("scalar", {"gradient_at": ""}, "must be direct"),
        ("log_ratio", {"gradient_at": "mixture:2"}, "'mixture:2'"),
        ("ensemble", {"gradient_at": 7}, "'7'"),
        ("ensemble", {"gradient_at": ["hard"]}, "['hard']"),
        ("scalar", {"training_rounds": {}}, "training_rounds"),
        ("scalar", {"training_settings": []}, "training_settings"),
        ("scalar", {"kind": "implicit"}, "'implicit'"),
        ("scalar", {"base": "b"}, "'base_model'"),
        ("scalar", {"trust": None}, "'validated_limits'"),
        ("scalar", {"scale": 1.0}, "'scale'"),
        ("scalar", {"step_delimiter": ";"}, "'step_delimiter'"),
        ("process", {"step_delimiter": ""}, "step_delimiter"),
        ("process", {"step_delimiter": None}, "step_delimiter"),
        ("log_ratio", {"scale": 0}, "scale"),
        ("log_ratio", {"scale": True}, "scale"),
        ("log_ratio", {"scale": "1"}, "scale"),
        ("log_ratio", {"reference_model": ""}, "reference_model"),
        ("log_ratio", {"reference_model": None}, "reference_model"),
        ("ensemble", {"uncertainty_penalty": -1}, "uncertainty_penalty"),
        ("ensemble", {"uncertainty_penalty": float("nan")}, "uncertainty_penalty"),
        ("ensemble", {"members": "ab"}, "members"),
        ("ensemble", {"members": ["a", 1]}, "members"),
    ],
)
def test_values_that_are_refused(kind: str, change: dict, word: str, tmp_path: Path, policy: Policy) -> None:
    file = write(tmp_path, WRITTEN[kind] | change)
    worlds.refused(lambda: read_manifest(tmp_path), str(file), word)
    worlds.refused(lambda: load_reward(str(tmp_path), policy=policy), str(file), word)


@pytest.mark.parametrize("content", ["", "{", "[1]", "{'a': 1}"])
def test_a_broken_file_is_named(content: str, tmp_path: Path) -> None:
    file = write(tmp_path, content)
    worlds.refused(lambda: parse_reward_spec(str(tmp_path)), str(file), "JSON")


def test_a_folder_without_manifest(tmp_path: Path) -> None:
    worlds.refused(lambda: read_manifest(tmp_path), str(tmp_path / MANIFEST_FILE), "cannot be read")


def test_a_manifest_in_memory_is_checked_too() -> None:
    worlds.refused(lambda: RewardManifest("scalar", members=["a", "b"]), "scalar", "'members'")
    worlds.refused(lambda: RewardManifest("log_ratio"), "reference_model")
    worlds.refused(lambda: RewardManifest("magic"), "'magic'")
    worlds.refused(lambda: RewardManifest("scalar", gradient_at="soft"), "must be direct", "'soft'")


# --- specs ------------------------------------------------------------------------------------------------


def scalar_specs(*names: str) -> tuple[RewardSpec, ...]:
    return tuple(RewardSpec(name, "scalar", (name,)) for name in names)


@pytest.mark.parametrize(
    ("spec", "kind", "models", "options"),
    [
        ("org/model", "scalar", "org/model", {}),
        ("power:2.5", "power", "", {"scale": 1.5}),
        ("logratio:a", "log-ratio", "a", {}),
        ("logratio:a, b", "log-ratio", "a b", {}),
        ("logratio:a,none", "log-ratio", "a", {"has_reference": False}),
        ("ensemble:a,b,c", "ensemble", "a b c", {"uncertainty_penalty": 1.0}),
        ("ensemble@0: a , b", "ensemble", "a b", {"uncertainty_penalty": 0.0}),
        ("ensemble@2.5:a,b", "ensemble", "a b", {"uncertainty_penalty": 2.5}),
    ],
)
def test_what_a_spec_means(spec: str, kind: str, models: str, options: dict[str, Any]) -> None:
    members = scalar_specs(*models.split()) if kind == "ensemble" else ()
    assert parse_reward_spec(spec) == RewardSpec(spec, kind, tuple(models.split()), members, **options)


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        ({"kind": "scalar", "model": "a"}, "a"),
        ({"kind": "process", "model": "a"}, "process:a"),
        ({"model": "a", "step_delimiter": ":\n", "kind": "process"}, r"process@\x3a\n:a"),
        ({"kind": "log_ratio", "model": "a"}, "logratio:a"),
        ({"kind": "log_ratio", "reference": "b", "model": "a"}, "logratio:a,b"),
        ({"kind": "log_ratio", "reference": "none", "model": "a"}, "logratio:a,none"),
        ({"kind": "ensemble", "members": ["a", "b"]}, "ensemble:a,b"),
        ({"kind": "ensemble", "members": ("process@;:a", "process@;:b")}, "ensemble:process@;:a,process@;:b"),
        (
            {"kind": "ensemble", "members": ["a", {"kind": "scalar", "model": "b"}], "uncertainty_penalty": 2.0},
            "ensemble@2:a,b",
        ),
    ],
)
def test_a_mapping_means_what_its_text_means(mapping: dict[str, Any], text: str) -> None:
    """As a dict, as a JSON object and whatever the order of its keys. Its name is that JSON object."""
    spec, written = parse_reward_spec(mapping), parse_reward_spec(text)
    assert replace(spec, name=text) == written
    assert parse_reward_spec(json.dumps(mapping)) == spec
    assert parse_reward_spec(f" {json.dumps(dict(reversed(mapping.items())))}\n") == spec
    assert parse_reward_spec(spec.name) == spec
    assert compute_reward_identity(mapping) == compute_reward_identity(json.dumps(mapping)) == spec.name
    assert spec.name == "a" if mapping["kind"] == "scalar" else json.loads(spec.name)["kind"] == mapping["kind"]


def test_a_mapping_of_a_config_file_is_the_text_of_an_option(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text('reward: {kind: process, model: a, step_delimiter: "\\n"}\n')
    options = coerce_fields(read_yaml(file), [make_dataclass("Options", [("reward", str)])], source=file)
    assert parse_reward_spec(options["reward"]) == parse_reward_spec(
        {"kind": "process", "model": "a", "step_delimiter": "\n"}
    )


def test_a_mapping_names_what_text_cannot(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("a,b", "c:d")]
    for name in names:
        write_manifest(name, MANIFESTS["scalar"])
        Path(name, "model.safetensors").write_bytes(b"one")
    spec = {"kind": "ensemble", "members": names, "uncertainty_penalty": 0.5}
    assert parse_reward_spec(spec).model_names == tuple(names)
    first = compute_reward_identity(spec)
    assert first.startswith('{"kind": "ensemble", "members": ["')
    Path(names[1], "model.safetensors").write_bytes(b"two")
    assert compute_reward_identity(spec) != first
    assert parse_reward_spec({"kind": "log_ratio", "model": "a", "scale": 0.1}).scale == 0.1
    folder = parse_reward_spec({"kind": "scalar", "model": names[0]})
    assert folder == parse_reward_spec(names[0]) and folder.validated_limits == ValidatedLimits(8, 2)


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({}, ["kind must be one of scalar, process, head, log_ratio, ensemble", "not None"]),
        ({"kind": "implicit", "model": "a"}, ["kind must be one of", "'implicit'"]),
        ({"kind": ["scalar"], "model": "a"}, ["kind must be one of"]),
        ({"kind": "scalar"}, ["'model'"]),
        ({"kind": "ensemble", "uncertainty_penalty": 1}, ["'members'"]),
        ({"kind": "process", "model": "a", "delimiter": ";"}, ["'delimiter' is not a key", "model, step_delimiter"]),
        ({"kind": "process", "model": "a", "step_delimiter": ""}, ["step_delimiter", "at least one character"]),
        ({"kind": "process", "model": "logratio:a"}, ["logratio:a is a reward of kind log-ratio"]),
        ({"kind": "scalar", "model": "process:a"}, ["process:a is a reward of kind process"]),
        ({"kind": "scalar", "model": 3}, ["model must be the name", "3"]),
        ({"kind": "log_ratio", "model": "a", "reference": None}, ["reference must be the name", "None"]),
        ({"kind": "log_ratio", "model": "a", "scale": 0}, ["scale must be a positive number"]),
        ({"kind": "ensemble", "members": "a,b"}, ["members must be a list"]),
        ({"kind": "ensemble", "members": ["a", 3]}, ["members must be a list", "3"]),
        ({"kind": "ensemble", "members": ["a"]}, ["at least two"]),
        ({"kind": "ensemble", "members": ["a", "a"]}, ["a is a member twice"]),
        ({"kind": "ensemble", "members": ["a", {"kind": "ensemble", "members": ["b"]}]}, ["of kind ensemble"]),
        ({"kind": "ensemble", "members": ["a", "b"], "uncertainty_penalty": -1}, ["uncertainty_penalty", "-1"]),
        ({"kind": "ensemble", "members": ["a", "b"], "uncertainty_penalty": "1"}, ["uncertainty_penalty", "'1'"]),
    ],
)
def test_mappings_that_are_refused(mapping: dict[str, Any], words: list[str], policy: Policy) -> None:
    worlds.refused(lambda: load_reward(mapping, policy=policy), *words)
    worlds.refused(lambda: load_reward(json.dumps(mapping), policy=policy), *words)


def test_a_mapping_that_is_no_json_is_refused(policy: Policy) -> None:
    worlds.refused(lambda: load_reward("{kind: scalar}", policy=policy), "{kind: scalar}", "not a JSON object")


def test_what_a_folder_means(tmp_path: Path) -> None:
    for kind, manifest in MANIFESTS.items():
        write_manifest(tmp_path / kind, manifest)
    here = {kind: str(tmp_path / kind) for kind in MANIFESTS}

    def spec_of(kind: str, *models: str, **options: Any) -> RewardSpec:
        name = here[kind]
        return RewardSpec(name, kind.replace("_", "-"), models or (name,), folder=name, **options)

    limits = {"validated_limits": ValidatedLimits(4, 1)}
    scalar = spec_of("scalar", validated_limits=ValidatedLimits(8, 2), gradient_at="direct+mixture:0.5")
    assert parse_reward_spec(here["scalar"]) == scalar
    assert parse_reward_spec(here["process"]) == spec_of("process", step_delimiter=";", **limits)
    ratio = spec_of("log_ratio", here["log_ratio"], "ref", scale=0.1, gradient_at="hard")
    assert parse_reward_spec(here["log_ratio"]) == ratio
    models = tuple(str(tmp_path / "ensemble" / "m" / number) for number in "01")
    members = {"members": scalar_specs(*models), "uncertainty_penalty": 0.5}
    assert parse_reward_spec(here["ensemble"]) == spec_of("ensemble", *models, **members)
    write_manifest(tmp_path / "ensemble", replace(MANIFESTS["ensemble"], **limits, gradient_at="direct"))
    audited = spec_of("ensemble", *models, **members, **limits, gradient_at="direct")
    assert parse_reward_spec(here["ensemble"]) == audited
    # A member's own gradient_at is not that of the ensemble.
    spec = f"ensemble:{here['scalar']},x"
    assert parse_reward_spec(spec) == RewardSpec(spec, "ensemble", (here["scalar"], "x"), (scalar, *scalar_specs("x")))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("logratio:a,b,c", ["logratio:BETTER,REFERENCE"]),
        ("power:", ["power:ALPHA", "above 1"]),
        ("power:1", ["power:ALPHA", "above 1"]),
        ("power:nan", ["power:ALPHA", "above 1"]),
        ("ensemble:", ["ensemble:A,B"]),
        ("ensemble:a,", ["ensemble:A,B"]),
        ("ensemble:a", ["at least two"]),
        ("ensemble:a,b,a", ["a is a member twice"]),
        ("ensemble:a,logratio:b", ["logratio:b is a reward of kind log-ratio"]),
        ("ensemble:a,ensemble@2:b", ["of kind ensemble"]),
        ("ensemble@:a,b", ["number K", "not ''"]),
        ("ensemble@two:a,b", ["number K", "not 'two'"]),
        ("ensemble@-1:a,b", ["number K", "not '-1'"]),
        ("ensemble@nan:a,b", ["number K", "not 'nan'"]),
        ("ensemble@inf:a,b", ["number K", "not 'inf'"]),
    ],
)
def test_malformed_specs(spec: str, words: list[str], policy: Policy) -> None:
    worlds.refused(lambda: load_reward(spec, policy=policy), spec, *words)


def test_members_that_are_refused(tmp_path: Path) -> None:
    here = {kind: str(tmp_path / kind) for kind in MANIFESTS}
    for kind, card in MANIFESTS.items():
        write_manifest(here[kind], card)
    for kind, named in (("log_ratio", "log-ratio"), ("ensemble", "ensemble")):
        worlds.refused(lambda kind=kind: parse_reward_spec(f"ensemble:x,{here[kind]}"), here[kind], f"of kind {named}")
    twice = f"ensemble:{here['scalar']},{here['scalar']}/../scalar"
    worlds.refused(lambda: parse_reward_spec(twice), "member twice")
    write_manifest(tmp_path, RewardManifest("ensemble", members=["scalar", "."]))
    worlds.refused(lambda: parse_reward_spec(str(tmp_path)), "of kind ensemble")
    write_manifest(tmp_path, RewardManifest("ensemble", members=["scalar"]))
    worlds.refused(lambda: parse_reward_spec(str(tmp_path)), str(tmp_path), "at least two")


# --- limits -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """policy/, scorer/, the reward folder audited/ (up to 2 rounds) and problems.jsonl."""
    folder = tmp_path_factory.mktemp("world")
    models = {"policy": worlds.tiny_model(), "scorer": worlds.tiny_model(kind="score", seed=1)}
    for name, model in (*models.items(), ("audited", models["scorer"])):
        worlds.save(folder / name, model)
    write_manifest(folder / "audited", MANIFESTS["scalar"])
    lines = [json.dumps({"question": f"{n}+{n}", "answer": str(2 * n)}) for n in (1, 2)]
    (folder / "problems.jsonl").write_text("\n".join(lines))
    return folder


def test_a_folders_limits_reach_the_reward_and_the_warning(world: Path, policy: Policy, caplog: Any) -> None:
    reward = load_reward(str(world / "audited"), policy=policy)
    assert reward.validated_limits == ValidatedLimits(8, 2)
    assert load_reward(str(world / "scorer"), policy=policy).validated_limits is None
    caplog.clear()

    def warn(config: SearchConfig | None, num_samples: int = 1) -> list[str]:
        caplog.clear()
        warn_past_limits(reward, config, num_samples)
        return list(caplog.messages)

    config = SearchConfig(max_rounds=2)
    assert warn(config) == [] and warn(None, 8) == []
    assert warn(config.with_options(max_rounds=3)) == [past_limits(ValidatedLimits(8, 2), 3)]
    warn_past_limits(reward, config.with_options(max_rounds=3), limits_rounds=False)
    assert caplog.messages == [past_limits(ValidatedLimits(8, 2), 3)], "no second one"
    past_samples = [past_sample_limit(ValidatedLimits(8, 2), 9)]
    assert warn(config.with_options(num_starts=9)) == warn(None, 9) == past_samples
    [message] = warn(config.with_options(candidate_min_p=0.0))
    assert "set 0.02, the default" in message
    assert warn(config.with_options(candidate_min_p=0.0, select="weighted_vote")) == []


def audit_file(folder: Path, **changes: Any) -> Path:
    names = {"policy": str(folder / "policy"), "reward": str(folder / "scorer")}
    file = folder / "audit.json"
    file.write_text(json.dumps(names | {"validated_limits": {"max_samples": 4, "max_rounds": 1}} | changes))
    return file


def test_the_limits_of_an_audit(world: Path, tmp_path: Path) -> None:
    models = {"policy": str(world / "policy"), "reward": str(world / "scorer")}
    file = audit_file(world)
    assert read_validated_limits(file, **models) == ValidatedLimits(4, 1)
    same = models | {"reward": f"{world}/policy/../scorer"}
    assert read_validated_limits(file, **same) == ValidatedLimits(4, 1)
    for name in models:
        other = {**models, name: "other"}
        worlds.refused(
            lambda other=other: read_validated_limits(file, **other), str(file), f"the {name} {models[name]}", "other"
        )
    audit_file(world, validated_limits=None)
    worlds.refused(lambda: read_validated_limits(file, **models), str(file), "--over_optimization")
    audit_file(world, trust={"samples": 4, "rounds": 1})
    worlds.refused(lambda: read_validated_limits(file, **models), str(file), "'trust'", "'validated_limits'")
    file.write_text(json.dumps({"validated_limits": {"max_samples": 4, "max_rounds": 1}}))
    worlds.refused(lambda: read_validated_limits(file, **models), str(file), "'policy' is missing")
    file.write_text("{")
    worlds.refused(lambda: read_validated_limits(file, **models), str(file), "not JSON")
    worlds.refused(lambda: read_validated_limits(tmp_path / "none.json", **models), "none.json", "cannot be read")


SHORT = ["--max_new_tokens", "6", "--candidate_min_p", "0.02"]


def warnings(capsys: Any, *argv: str) -> list[str]:
    """Warnings of a command that succeeds."""
    assert main(list(argv)) == 0
    out, err = capsys.readouterr()
    assert "warning" not in out
    return [line for line in err.splitlines() if line.startswith("warning: ")]


@pytest.mark.parametrize("command", ["solve", "traces", "eval"])
def test_commands_warn_once_of_a_search_past_the_limits(
    command: str, world: Path, tmp_path: Path, capsys: Any
) -> None:
    models = ["--policy", str(world / "policy"), "--reward", str(world / "audited"), *SHORT]
    data = ["--dataset", str(world / "problems.jsonl")]
    arguments = {"solve": ["1+2"], "traces": data, "eval": [*data, "--seeds", "0", "--eval_methods", "greedy,nabla"]}[
        command
    ]

    def run(rounds: str, *more: str) -> list[str]:
        place = [] if command == "solve" else ["--output_dir", str(tmp_path / rounds)]
        return warnings(capsys, command, *arguments, *models, *place, "--max_rounds", rounds, *more)

    assert run("2") == []
    assert run("3") == [f"warning: {past_limits(ValidatedLimits(8, 2), 3)}"]
    if command == "eval":
        assert run("4", "--eval_methods", "greedy,best_of_2") == []  # nothing is refined
        assert len(run("5", "--eval_methods", "control")) == 1
        assert run("6", "--eval_methods", "best_of_2,weighted_best_of_9") == [
            f"warning: {past_sample_limit(ValidatedLimits(8, 2), 9)}"
        ]
    if command == "traces":
        assert run("3") == []  # all there already: no search


def test_an_audit_file_gives_the_limits_of_a_reward_without_folder(world: Path, capsys: Any) -> None:
    models = ["--policy", str(world / "policy"), "--reward", str(world / "scorer"), *SHORT]
    audited = ["--audit_file", str(audit_file(world))]
    assert warnings(capsys, "solve", "1+2", *models, "--max_rounds", "3") == []
    assert warnings(capsys, "solve", "1+2", *models, "--max_rounds", "3", *audited) == [
        f"warning: {past_limits(ValidatedLimits(4, 1), 3)}"
    ]
    models[3] = str(world / "audited")
    assert main(["solve", "1+2", *models, *audited]) == 2
    assert "an audit of the reward" in capsys.readouterr().err


# --- the recipe -------------------------------------------------------------------------------------------


def test_the_recipe_names_an_implicit_reward_and_its_rival(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """The kind comes from the folder, also where no model is loaded; the rival stands beside the search."""
    monkeypatch.chdir(ROOT)
    shutil.copytree("data/tiny/clean", tmp_path / "tuned")
    card = RewardManifest(
        "log_ratio", scale=0.5, reference_model="data/tiny/policy", validated_limits=ValidatedLimits(16, 1)
    )
    write_manifest(tmp_path / "tuned", card)
    module = importlib.import_module("nabla_trl.distill")
    argv = ["--config", "recipes/tiny/distill.yaml", "--reward", str(tmp_path / "tuned"), "--seeds", "0"]
    argv += [
        "--output_dir",
        str(tmp_path / "out"),
        "--max_eval_problems",
        "4",
        "--max_train_problems",
        "4",
        "--max_rounds",
        "2",
    ]
    argv += ["--eval_methods", "greedy,nabla,reward_model_sampling", "--max_new_tokens", "48"]
    module.main([*argv, "--stages", "evaluate"])
    assert capsys.readouterr().err.count(f"warning: {past_limits(ValidatedLimits(16, 1), 2)}") == 1
    module.main([*argv, "--stages", "report"])
    assert "warning: 2 rounds" not in capsys.readouterr().err
    facts = json.loads((tmp_path / "out" / "facts.json").read_text())
    assert facts["reward_kind"] == "log-ratio"
    report = (tmp_path / "out" / "report.md").read_text()
    assert "sample from the better model, reward_model_sampling. " in report and "Here it is missing" not in report


def test_identity_follows_the_weights_that_we_trained(tmp_path: Path) -> None:
    folder = tmp_path / "reward"
    write_manifest(folder, RewardManifest(kind="scalar", base_model="b", policy="p"))
    (folder / "model.safetensors").write_bytes(b"one")
    first = compute_reward_identity(str(folder))
    assert first.startswith(f"{folder} (") and compute_reward_identity(str(folder)) == first
    write_manifest(
        folder, RewardManifest(kind="scalar", base_model="b", policy="p", validated_limits=ValidatedLimits(4, 2))
    )
    assert compute_reward_identity(str(folder)) == first  # an audit changes no score
    write_manifest(folder, RewardManifest(kind="scalar", base_model="b", policy="p", gradient_at="direct"))
    assert compute_reward_identity(str(folder)) != first  # but the search, where it advises another gradient
    write_manifest(folder, RewardManifest(kind="scalar", base_model="b", policy="p"))
    (folder / "model.safetensors").write_bytes(b"two")
    assert compute_reward_identity(str(folder)) != first
    assert compute_reward_identity(f"logratio:some/model,{folder}") != f"logratio:some/model,{folder}"
    for name in ("some/model", "logratio:some/model", f"logratio:{tmp_path}"):
        assert compute_reward_identity(name) == name


@pytest.mark.parametrize("prefix", ["ensemble:", "ensemble:process@;:"])
def test_the_identity_of_an_ensemble_follows_the_weights_of_its_members(prefix: str, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        write_manifest(folder, RewardManifest(kind="scalar"))
        (folder / "model.safetensors").write_bytes(b"one")
    kind = prefix.removeprefix("ensemble:")
    spec = f"ensemble:{kind}{folders[0]},{kind}{folders[1]}"
    first = compute_reward_identity(spec)
    (folders[1] / "model.safetensors").write_bytes(b"two")
    assert compute_reward_identity(spec) != first and compute_reward_identity(spec).startswith(f"{spec} (")


def test_the_committed_reward_is_what_its_cards_say() -> None:
    folder = ROOT / "data" / "tiny" / "reward"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    card = read_manifest(folder)
    assert render_reward_readme(card) == (folder / "README.md").read_text(encoding="utf-8")
    policy = load_policy(str(ROOT / "data" / "tiny" / "policy"))
    reward = load_reward(str(folder), policy=policy)
    assert (reward.kind, reward.gradient_at, reward.validated_limits) == (
        "scalar",
        card.gradient_at,
        card.validated_limits,
    )
    rng, pairs = random.Random(0), []
    for problem in digit_chains.make_digit_chain_problems("test", 60):
        wrong = digit_chains.make_noisy_solution(problem.question, rng)  # by someone with the policy's gap
        if digit_chains.find_first_error(problem, wrong) is not None:
            pairs.append(
                [
                    worlds.sample(policy, problem, text)
                    for text in (digit_chains.make_gold_solution(problem.question), wrong)
                ]
            )
    samples = [sample for sample_pair in pairs for sample in sample_pair]
    scores = reward.score(samples, reward.compute_prompt_caches(samples, FlopCounter()), flop_counter=FlopCounter())[0]
    better = [good > bad for good, bad in zip(scores[::2], scores[1::2], strict=True)]
    assert len(better) > 20 and sum(better) > 0.9 * len(better)
