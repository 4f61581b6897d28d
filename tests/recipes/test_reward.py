"""The reward recipe as a user runs it: whole, resumed, cut short, and fed nonsense."""

from __future__ import annotations

import importlib
import io
import json
import shutil
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import worlds
from safetensors.torch import load_file
from transformers import AutoConfig

from nabla_trl.cli.parsing import UsageError
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.loading import load_policy
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.loading import load_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.rewards.spec import read_manifest
from nabla_trl.tasks import digit_chains

ROOT = Path(__file__).parents[2]
POLICY = "data/tiny/policy"
TRAINED, AUDITED = 40, 8
SIZES = {
    "max_train_problems": TRAINED,
    "max_audit_problems": AUDITED,
    "audit_samples": 4,
    "max_audit_rounds": 2,
    "max_steps": 3,
    "max_steps_per_round": 2,
    "max_adversarial_rounds": 1,
    "max_search_problems": 8,
    "num_swaps": 50,
    "warmup_steps": 0,
}


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return importlib.import_module("reward")


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the settings name models relative to it


def train(recipe: ModuleType, folder: Path, **options: object) -> str:
    """What the recipe says; options that are lists become several words."""
    argv = ["--config", "recipes/tiny/reward.yaml", "--output_dir", str(folder), "--disable_tqdm", "true"]
    for name, value in (SIZES | options).items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    with redirect_stdout(io.StringIO()) as output:
        recipe.main(argv)
    return output.getvalue()


@pytest.fixture(scope="module")
def finished(recipe: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a whole run, and what it said."""
    folder = tmp_path_factory.mktemp("reward") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return folder, train(recipe, folder)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(str(ROOT / POLICY))


def scores(reward: Reward, policy: Policy) -> list[float]:
    """Of the right solutions to some problems, each also with its answer changed."""
    samples = []
    for problem in digit_chains.make_digit_chain_problems("test", 6):
        gold = digit_chains.make_gold_solution(problem.question)
        for text in (gold, gold[:-1] + str((int(gold[-1]) + 1) % 10)):
            samples.append(worlds.sample(policy, problem, text))
    return reward.score(samples, reward.compute_prompt_caches(samples, FlopCounter()), flop_counter=FlopCounter())[0]


def stamps(folder: Path) -> dict[str, int]:
    """When every file of the rounds was written; the final folder is put together anew at the end of each run."""
    final = folder / "reward"
    return {
        str(file.relative_to(folder)): file.stat().st_mtime_ns
        for file in folder.rglob("*")
        if file.is_file() and final not in file.parents and file.suffix != ".lock"
    }


# --- a whole run ------------------------------------------------------------------------------------------


def test_the_reward_is_the_round_of_largest_limits_with_every_audit(
    finished: tuple[Path, str], policy: Policy
) -> None:
    folder, output = finished
    manifest = read_manifest(folder / "reward")
    assert (manifest.kind, manifest.base_model, manifest.policy) == ("scalar", POLICY, POLICY)
    assert [entry["round"] for entry in manifest.training_rounds] == [0, 1]
    for entry in manifest.training_rounds:
        assert {"training", "ranking", "over_optimization", "gradient"} <= set(entry)
        assert f"round {entry['round']}: {entry['ranking']['conclusion']}" in output
    trusts = [
        (
            entry["over_optimization"]["validated_limits"]["max_rounds"],
            entry["over_optimization"]["validated_limits"]["max_samples"],
        )
        for entry in manifest.training_rounds
    ]
    best = max((0, 1), key=lambda number: (trusts[number], number))
    assert (
        manifest.validated_limits is not None
        and (manifest.validated_limits.max_rounds, manifest.validated_limits.max_samples) == trusts[best]
    )
    reward, same, other = (
        load_reward(str(folder / name), policy=policy) for name in ("reward", f"round-{best}", f"round-{1 - best}")
    )
    assert reward.validated_limits == manifest.validated_limits and same.validated_limits is None
    assert scores(reward, policy) == scores(same, policy) != scores(other, policy)
    depths = [AutoConfig.from_pretrained(one).num_hidden_layers for one in (POLICY, folder / "reward")]
    assert depths[1] == depths[0] + 2, "it has grown, and only once"


def test_nothing_is_trained_on_problems_of_the_audits(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    ids = [problem.id for problem in digit_chains.make_digit_chain_problems("train", TRAINED + AUDITED)]
    for number in (0, 1):  # each round draws of every training problem, the second searches on some of them besides
        lines = [json.loads(line) for line in (folder / f"round-{number}.0.jsonl").read_text().splitlines()]
        assert {line["problem_id"] for line in lines} == set(ids[:TRAINED])
    assert read_manifest(folder / "reward").training_rounds[0]["ranking"]["problems"] == AUDITED


def test_a_finished_run_is_not_done_again(recipe: ModuleType, finished: tuple[Path, str]) -> None:
    folder, _ = finished
    before, manifest = stamps(folder), (folder / "reward" / "reward.json").read_bytes()
    weights = (folder / "reward" / "model.safetensors").read_bytes()
    output = train(recipe, folder)
    assert "answers to" not in output and "searches accepted" not in output and "reward: " in output
    assert stamps(folder) == before
    assert (folder / "reward" / "reward.json").read_bytes() == manifest
    assert (folder / "reward" / "model.safetensors").read_bytes() == weights


def test_a_run_that_was_cut_short_comes_to_the_same_reward(
    recipe: ModuleType, finished: tuple[Path, str], tmp_path: Path
) -> None:
    """Stopped in the search of round 1: round 0 stays as it is, the rest is made as if nothing had happened."""
    folder, _ = finished
    again = tmp_path / "out"
    shutil.copytree(folder, again)
    for name in ("reward", "round-1", "round-1.0.jsonl", "round-1.train.json", "round-1.audit.json"):
        gone = again / name
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    before = stamps(again)
    output = train(recipe, again)
    assert "round 0: 120 answers" not in output and "round 1: searches accepted" in output
    assert {name: stamp for name, stamp in stamps(again).items() if name in before} == before
    assert (again / "round-1.0.jsonl").read_text() == (folder / "round-1.0.jsonl").read_text()
    ours, theirs = (load_file(one / "reward" / "model.safetensors") for one in (again, folder))
    assert all(weight.equal(theirs[name]) for name, weight in ours.items()) and ours.keys() == theirs.keys()


# --- other rewards ----------------------------------------------------------------------------------------

SHORT = {"max_adversarial_rounds": 0, "max_audit_rounds": 1, "num_swaps": 20, "audit_gradient_at": ["hard"]}
SHORT |= {"tuning": "lora", "grow_layers": 0}


def test_an_implicit_reward_by_the_recipe(recipe: ModuleType, policy: Policy, tmp_path: Path) -> None:
    train(recipe, tmp_path, kind="implicit", implicit_beta=0.2, **SHORT)
    manifest = read_manifest(tmp_path / "reward")
    assert (manifest.kind, manifest.scale, manifest.reference_model) == ("log_ratio", 0.2, POLICY)
    reward = load_reward(str(tmp_path / "reward"), policy=policy)
    assert reward.kind == "log-ratio" and [term.weight for term in reward.objectives] == [0.2, -0.2]
    assert len(set(scores(reward, policy))) > 6


@pytest.mark.slow
def test_an_ensemble_by_the_recipe(recipe: ModuleType, policy: Policy, tmp_path: Path) -> None:
    """Its score is the members' mean − k·std; they were trained on outcomes, with a seed of their own each."""
    train(recipe, tmp_path, num_members=2, uncertainty_penalty=0.5, labels="outcome", **SHORT)
    reward = load_reward(str(tmp_path / "reward"), policy=policy)
    first, second = (
        scores(load_reward(str(tmp_path / "reward" / f"member-{index}"), policy=policy), policy) for index in (0, 1)
    )
    assert all(abs(a - b) > 1e-3 for a, b in zip(first, second, strict=True))
    bounds = [(a + b) / 2 - 0.5 * abs(a - b) / 2 for a, b in zip(first, second, strict=True)]
    assert scores(reward, policy) == pytest.approx(bounds, abs=1e-4)
    assert len(read_manifest(tmp_path / "reward").training_rounds[0]["training"]) == 2


@pytest.mark.slow
def test_heads_on_shared_answers_by_the_recipe(recipe: ModuleType, policy: Policy, tmp_path: Path) -> None:
    """Two runs draw their answers of round 0 once, and the second goes on from what the first had drawn."""
    shared = {"kind": "head", "samples_dir": tmp_path / "answers", "max_adversarial_rounds": 0, "max_steps": 30}
    train(recipe, tmp_path / "one", **shared, head_width=8)
    answers, part = (tmp_path / "answers" / name for name in ("round-0.0.jsonl", "round-0.0/000000.jsonl"))
    assert part.read_text() == answers.read_text()
    before, content = stamps(tmp_path / "answers"), answers.read_text()
    train(recipe, tmp_path / "two", **shared, num_members=2)
    assert stamps(tmp_path / "answers") == before
    one, two = (load_reward(str(tmp_path / name / "reward"), policy=policy) for name in ("one", "two"))
    assert (one.kind, two.kind, len(two.objectives)) == ("head", "ensemble", 2)
    assert len(set(scores(one, policy))) > 6 and two.reads_states_of(policy)
    answers.unlink()  # as if the drawing had been stopped
    shutil.rmtree(tmp_path / "one")
    train(recipe, tmp_path / "one", **shared)
    assert answers.read_text() == content
    worlds.refused(lambda: train(recipe, tmp_path / "three", **shared, samples_per_problem=5), "samples_per_problem")


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("learning_rate", "1e-6", ["learning_rate '1e-06' (was '0.0007')"]),
        ("relaxed_fraction", "0.25", ["relaxed_fraction '0.25' (was '0.5')"]),
        ("samples_per_problem", "2", ["samples_per_problem '2' (was '3')"]),
        ("max_new_tokens", "32", ["max_new_tokens '32' (was '64')"]),
    ],
)
def test_other_settings_on_the_same_folder_are_refused(
    option: str, value: str, words: list[str], recipe: ModuleType, finished: tuple[Path, str]
) -> None:
    folder, _ = finished
    before = stamps(folder)
    worlds.refused(lambda: train(recipe, folder, **{option: value}), "made with other settings", *words)
    assert stamps(folder) == before


@pytest.mark.parametrize("option", ["audit_samples", "max_audit_rounds", "max_audit_problems", "num_swaps"])
def test_a_finished_audit_does_not_answer_for_another(
    option: str, recipe: ModuleType, finished: tuple[Path, str], tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path / "out")
    worlds.refused(lambda: train(recipe, tmp_path / "out", **{option: SIZES[option] + 1}), f"{option} ")


def lines_of(file: Path, count: int) -> str:
    lines = [json.dumps({"question": f"{i}+{i}-1*2+3-1", "answer": "1"}) for i in range(count)]
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def test_step_labels_where_there_are_none_are_refused(recipe: ModuleType, tmp_path: Path) -> None:
    dataset = lines_of(tmp_path / "mine.jsonl", 12)
    act = partial(train, recipe, tmp_path / "out", dataset=dataset, labels="steps")
    worlds.refused(act, dataset, "has no step labels", "labels outcome")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [5, AUDITED])
def test_problems_that_leave_none_to_train_on_are_refused(count: int, recipe: ModuleType, tmp_path: Path) -> None:
    dataset = lines_of(tmp_path / "mine.jsonl", count)
    act = partial(train, recipe, tmp_path / "out", dataset=dataset)
    worlds.refused(act, f"{count} problems with answers", "leave none to train on", "max_audit_problems")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": "maybe"}, ["labels must be one of auto, steps, outcome"]),
        ({"samples_per_problem": 0}, ["samples_per_problem must be at least 1"]),
        ({"audit_samples": 1}, ["audit_samples must be at least 2"]),
        ({"max_adversarial_rounds": -1}, ["max_adversarial_rounds must not be negative"]),
        ({"tuning": "lora"}, ["grow_layers needs tuning full"]),
        ({"policy": "nowhere/at-all"}, ["nowhere/at-all"]),
        ({"dataset": "no-such-task"}, ["unknown task 'no-such-task'"]),
    ],
)
def test_nonsense_is_refused(options: dict[str, object], words: list[str], recipe: ModuleType, tmp_path: Path) -> None:
    worlds.refused(lambda: train(recipe, tmp_path / "out", **options), *words)


def test_all_faults_are_one_refusal_before_anything_is_loaded(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(recipe, "load_policy", None)
    options = {"labels": "maybe", "audit_samples": 1, "margin": -1, "grow_layers": 1, "tuning": "lora", "beta": 1e9}
    options |= {"dataset": str(tmp_path / "nope.jsonl"), "max_new_tokens": 4000, "base_model": "nowhere/at-all"}
    options |= {"report_to": "no_such_service", "max_ruonds": 3, "dtype": "bfloat16"}
    with pytest.raises(UsageError) as caught:
        train(recipe, tmp_path / "file" / "out", **options)
    for words in (
        "unknown option --max_ruonds (did you mean --max_rounds?)",
        "labels must be one of",
        "audit_samples must be at least 2",
        "margin must be a number",
        "grow_layers needs tuning full",
        "beta must be from",
        "nope.jsonl: No such file",
        "max_new_tokens 4000 is more than",
        "nowhere/at-all",
        "a bfloat16 base under a float32 adapter needs mixed precision",
        "report_to no_such_service is unknown",
        f"{tmp_path / 'file'} is a file",
    ):
        assert sum(words in line for line in caught.value.lines) == 1, (words, caught.value.lines)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
