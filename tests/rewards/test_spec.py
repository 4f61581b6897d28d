"""reward_folder: what specs and reward.json mean and what is refused; trust, from the folder to the warning."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import shutil
import sys
from dataclasses import replace
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
    ParsedRewardSpec,
    RewardManifest,
    compute_reward_identity,
    parse_reward_spec,
    read_manifest,
    read_validated_limits,
    write_manifest,
)
from nabla_trl.search.config import SearchConfig
from nabla_trl.tasks import digit_chains

ROOT = Path(__file__).parents[2]
CARDS = {
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
    "implicit": RewardManifest("implicit", scale=0.1, reference_model="ref", gradient_at="hard"),
    "ensemble": RewardManifest("ensemble", members=["m/0", "m/1"], uncertainty_penalty=0.5),
}
# How reward.json is written: other programs may write one too.
WRITTEN: dict[str, dict[str, Any]] = {
    kind: {
        "format": 1,
        "kind": kind,
        "base": None,
        **own,
        "policy": "p",
        "trust": None,
        "point": None,
        "rounds": [],
        "settings": {},
    }
    for kind, own in {
        "scalar": {},
        "process": {"step_delimiter": ";"},
        "implicit": {"scale": 0.1, "reference": "ref"},
        "ensemble": {"members": ["m/0", "m/1"], "caution": 0.5},
    }.items()
}


def write(folder: Path, content: Any) -> Path:
    file = folder / MANIFEST_FILE
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


# --- reward.json ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CARDS)
def test_a_card_is_read_as_it_was_written(kind: str, tmp_path: Path) -> None:
    write_manifest(tmp_path / "new", CARDS[kind])
    assert read_manifest(tmp_path / "new") == CARDS[kind]
    content = json.loads((tmp_path / "new" / MANIFEST_FILE).read_text())
    assert content.keys() == WRITTEN[kind].keys() and content["point"] == CARDS[kind].gradient_at
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


def test_a_write_that_fails_leaves_the_card_that_was_there(tmp_path: Path) -> None:
    write_manifest(tmp_path, CARDS["scalar"])
    with pytest.raises(TypeError):
        write_manifest(tmp_path, RewardManifest("scalar", training_settings={"x": object()}))
    assert read_manifest(tmp_path) == CARDS["scalar"] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("kind", "change", "word"),
    [
        ("scalar", {"format": 2}, "format must be 1, not 2"),
        ("scalar", {"kind": "oracle"}, "'oracle'"),
        ("scalar", {"kind": ["scalar"]}, "kind"),
        ("scalar", {"base": 3}, "base"),
        ("scalar", {"policy": ""}, "policy"),
        ("scalar", {"trust": {"samples": 4}}, "rounds is missing"),
        ("scalar", {"trust": {"samples": 4, "rounds": -1}}, "rounds"),
        ("scalar", {"trust": 7}, "trust"),
        ("scalar", {"point": "soft"}, "point must be direct, hard, mixture"),
        ("scalar", {"point": ""}, "point must be"),
        ("implicit", {"point": "mixture:2"}, "'mixture:2'"),
        ("ensemble", {"point": 7}, "point"),
        ("ensemble", {"point": ["hard"]}, "point"),
        ("scalar", {"rounds": {}}, "rounds"),
        ("scalar", {"settings": []}, "settings"),
        ("scalar", {"scale": 1.0}, "'scale'"),
        ("scalar", {"step_delimiter": ";"}, "'step_delimiter'"),
        ("process", {"step_delimiter": ""}, "step_delimiter"),
        ("process", {"step_delimiter": None}, "step_delimiter"),
        ("implicit", {"scale": 0}, "scale"),
        ("implicit", {"scale": True}, "scale"),
        ("implicit", {"scale": "1"}, "scale"),
        ("implicit", {"reference": ""}, "reference"),
        ("implicit", {"reference": None}, "reference"),
        ("ensemble", {"caution": -1}, "caution"),
        ("ensemble", {"caution": float("nan")}, "caution"),
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


def test_a_folder_without_card(tmp_path: Path) -> None:
    worlds.refused(lambda: read_manifest(tmp_path), str(tmp_path / MANIFEST_FILE), "cannot be read")


def test_a_card_in_memory_is_checked_too() -> None:
    worlds.refused(lambda: RewardManifest("scalar", members=["a", "b"]), "scalar", "'members'")
    worlds.refused(lambda: RewardManifest("implicit"), "reference")
    worlds.refused(lambda: RewardManifest("magic"), "'magic'")
    worlds.refused(lambda: RewardManifest("scalar", gradient_at="soft"), "point must be", "'soft'")


# --- specs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "plan"),
    [
        ("org/model", ParsedRewardSpec("scalar", ("org/model",))),
        ("logratio:a", ParsedRewardSpec("log-ratio", ("a",))),
        ("logratio:a, b", ParsedRewardSpec("log-ratio", ("a", "b"))),
        ("ensemble:a,b,c", ParsedRewardSpec("ensemble", ("a", "b", "c"), uncertainty_penalty=1.0)),
        ("ensemble@0: a , b", ParsedRewardSpec("ensemble", ("a", "b"), uncertainty_penalty=0.0)),
        ("ensemble@2.5:a,b", ParsedRewardSpec("ensemble", ("a", "b"), uncertainty_penalty=2.5)),
    ],
)
def test_what_a_spec_means(spec: str, plan: ParsedRewardSpec) -> None:
    assert parse_reward_spec(spec) == plan


def test_what_a_folder_means(tmp_path: Path) -> None:
    for kind, card in CARDS.items():
        write_manifest(tmp_path / kind, card)
    here = {kind: str(tmp_path / kind) for kind in CARDS}
    assert parse_reward_spec(here["scalar"]) == ParsedRewardSpec(
        "scalar", (here["scalar"],), validated_limits=ValidatedLimits(8, 2), gradient_at="direct+mixture:0.5"
    )
    steps = ParsedRewardSpec("process", (here["process"],), validated_limits=ValidatedLimits(4, 1), step_delimiter=";")
    assert parse_reward_spec(here["process"]) == steps
    ratio = ParsedRewardSpec("log-ratio", (here["implicit"], "ref"), scale=0.1, gradient_at="hard")
    assert parse_reward_spec(here["implicit"]) == ratio
    members = tuple(str(tmp_path / "ensemble" / "m" / number) for number in "01")
    assert parse_reward_spec(here["ensemble"]) == ParsedRewardSpec("ensemble", members, uncertainty_penalty=0.5)
    write_manifest(
        tmp_path / "ensemble", replace(CARDS["ensemble"], validated_limits=ValidatedLimits(4, 1), gradient_at="direct")
    )
    audited = ParsedRewardSpec(
        "ensemble", members, uncertainty_penalty=0.5, validated_limits=ValidatedLimits(4, 1), gradient_at="direct"
    )
    assert parse_reward_spec(here["ensemble"]) == audited
    # A member's own point is not that of the ensemble.
    assert parse_reward_spec(f"ensemble:{here['scalar']},x") == ParsedRewardSpec("ensemble", (here["scalar"], "x"))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("logratio:a,b,c", ["logratio:BETTER,REFERENCE"]),
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
    here = {kind: str(tmp_path / kind) for kind in CARDS}
    for kind, card in CARDS.items():
        write_manifest(here[kind], card)
    for kind, named in (("implicit", "log-ratio"), ("ensemble", "ensemble")):
        worlds.refused(lambda kind=kind: parse_reward_spec(f"ensemble:x,{here[kind]}"), here[kind], f"of kind {named}")
    twice = f"ensemble:{here['scalar']},{here['scalar']}/../scalar"
    worlds.refused(lambda: parse_reward_spec(twice), "member twice")
    write_manifest(tmp_path, RewardManifest("ensemble", members=["scalar", "."]))
    worlds.refused(lambda: parse_reward_spec(str(tmp_path)), "of kind ensemble")
    write_manifest(tmp_path, RewardManifest("ensemble", members=["scalar"]))
    worlds.refused(lambda: parse_reward_spec(str(tmp_path)), str(tmp_path), "at least two")


# --- trust ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """policy/, scorer/, the reward folder trusted/ (up to 2 rounds) and problems.jsonl."""
    folder = tmp_path_factory.mktemp("world")
    models = {"policy": worlds.tiny_model(), "scorer": worlds.tiny_model(kind="score", seed=1)}
    for name, model in (*models.items(), ("trusted", models["scorer"])):
        model.save_pretrained(folder / name)
        worlds.char_tokenizer().save_pretrained(folder / name)
    write_manifest(folder / "trusted", CARDS["scalar"])
    lines = [json.dumps({"question": f"{n}+{n}", "answer": str(2 * n)}) for n in (1, 2)]
    (folder / "problems.jsonl").write_text("\n".join(lines))
    return folder


def test_a_folders_trust_reaches_the_reward_and_the_warning(world: Path, policy: Policy, capsys: Any) -> None:
    reward = load_reward(str(world / "trusted"), policy=policy)
    assert reward.validated_limits == ValidatedLimits(8, 2)
    assert load_reward(str(world / "scorer"), policy=policy).validated_limits is None
    capsys.readouterr()  # bars of loading
    warn_past_limits(reward, SearchConfig(max_rounds=2))
    assert capsys.readouterr() == ("", "")
    warn_past_limits(reward, SearchConfig(max_rounds=3))
    assert capsys.readouterr() == ("", f"warning: {past_limits(ValidatedLimits(8, 2), 3)}\n")
    warn_past_limits(reward, None, 8)
    assert capsys.readouterr() == ("", "")
    warn_past_limits(reward, SearchConfig(max_rounds=2, num_starts=9))
    warn_past_limits(reward, None, 9)
    assert capsys.readouterr() == ("", f"warning: {past_sample_limit(ValidatedLimits(8, 2), 9)}\n" * 2)


def audit_file(folder: Path, **changes: Any) -> Path:
    names = {"policy": str(folder / "policy"), "reward": str(folder / "scorer")}
    file = folder / "audit.json"
    file.write_text(json.dumps(names | {"trust": {"samples": 4, "rounds": 1}} | changes))
    return file


def test_the_trust_of_an_audit(world: Path, tmp_path: Path) -> None:
    asked = {"policy": str(world / "policy"), "reward": str(world / "scorer")}
    file = audit_file(world)
    assert read_validated_limits(file, **asked) == ValidatedLimits(4, 1)
    same = asked | {"reward": f"{world}/policy/../scorer"}
    assert read_validated_limits(file, **same) == ValidatedLimits(4, 1)
    for name in asked:
        other = {**asked, name: "other"}
        worlds.refused(
            lambda other=other: read_validated_limits(file, **other), str(file), f"the {name} {asked[name]}", "other"
        )
    audit_file(world, trust=None)
    worlds.refused(lambda: read_validated_limits(file, **asked), str(file), "--over_optimization")
    file.write_text(json.dumps({"trust": {"samples": 4, "rounds": 1}}))
    worlds.refused(lambda: read_validated_limits(file, **asked), str(file), "'policy' is missing")
    file.write_text("{")
    worlds.refused(lambda: read_validated_limits(file, **asked), str(file), "not JSON")
    worlds.refused(lambda: read_validated_limits(tmp_path / "none.json", **asked), "none.json", "cannot be read")


def warnings(capsys: Any, *argv: str) -> list[str]:
    """Warnings of a command that succeeds."""
    assert main(list(argv)) == 0
    out, err = capsys.readouterr()
    assert "warning" not in out
    return [line for line in err.splitlines() if line.startswith("warning: ")]


@pytest.mark.parametrize("command", ["solve", "traces", "eval"])
def test_commands_warn_once_of_a_search_past_trust(command: str, world: Path, tmp_path: Path, capsys: Any) -> None:
    models = ["--policy", str(world / "policy"), "--reward", str(world / "trusted"), "--max_new_tokens", "6"]
    data = ["--dataset", str(world / "problems.jsonl")]
    given = {"solve": ["1+2"], "traces": data, "eval": [*data, "--seeds", "0", "--eval_methods", "greedy,nabla"]}[
        command
    ]

    def run(rounds: str, *more: str) -> list[str]:
        place = [] if command == "solve" else ["--output_dir", str(tmp_path / rounds)]
        return warnings(capsys, command, *given, *models, *place, "--max_rounds", rounds, *more)

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


def test_an_audit_file_gives_the_trust_of_a_reward_without_folder(world: Path, capsys: Any) -> None:
    models = ["--policy", str(world / "policy"), "--reward", str(world / "scorer"), "--max_new_tokens", "6"]
    audited = ["--audit", str(audit_file(world))]
    assert warnings(capsys, "solve", "1+2", *models, "--max_rounds", "3") == []
    assert warnings(capsys, "solve", "1+2", *models, "--max_rounds", "3", *audited) == [
        f"warning: {past_limits(ValidatedLimits(4, 1), 3)}"
    ]
    models[3] = str(world / "trusted")
    assert main(["solve", "1+2", *models, *audited]) == 1
    assert "an audit of the reward" in capsys.readouterr().err


# --- the recipe -------------------------------------------------------------------------------------------


def test_the_recipe_names_an_implicit_reward_and_its_rival(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """The kind comes from the folder, also where no model is loaded; the rival stands beside the search."""
    monkeypatch.chdir(ROOT)
    shutil.copytree("data/tiny/clean", tmp_path / "tuned")
    card = RewardManifest(
        "implicit", scale=0.5, reference_model="data/tiny/policy", validated_limits=ValidatedLimits(16, 1)
    )
    write_manifest(tmp_path / "tuned", card)
    source = importlib.util.spec_from_file_location("distill", ROOT / "recipes" / "distill.py")
    module = importlib.util.module_from_spec(source)
    monkeypatch.setitem(sys.modules, "distill", module)
    source.loader.exec_module(module)
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
    assert "sampling from the better model itself, reward_model_sampling: " in report


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
    samples = [sample for pair in pairs for sample in pair]
    scores = reward.score(samples, reward.compute_prompt_caches(samples, FlopCounter()), flop_counter=FlopCounter())[0]
    better = [good > bad for good, bad in zip(scores[::2], scores[1::2], strict=True)]
    assert len(better) > 20 and sum(better) > 0.9 * len(better)
