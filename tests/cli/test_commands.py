"""`nabla-trl` from end to end over tiny random models on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import worlds
from peft import LoraConfig, get_peft_model

from nabla_trl.cli import console
from nabla_trl.cli.main import COMMANDS, main
from nabla_trl.pipeline import audit
from nabla_trl.pipeline.models import ModelPair
from nabla_trl.search.config import SearchConfig
from nabla_trl.tasks.registry import compute_task_version
from nabla_trl.traces.storage import read_traces
from nabla_trl.utils import progress

SEARCH = ["--max_rounds", "3", "--max_new_tokens", "10"]


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """policy/, better/, adapter/ and problems.jsonl."""
    folder = tmp_path_factory.mktemp("world")
    worlds.save_world(folder, 6)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(worlds.tiny_policy().model, lora).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def models(world: Path) -> list[str]:
    return ["--policy", str(world / "policy"), "--reward", f"logratio:{world / 'better'}"]


@pytest.fixture
def dataset(world: Path) -> list[str]:
    return ["--dataset", str(world / "problems.jsonl")]


def error_line(capsys) -> str:
    """The faults on stderr, one on each line, with nothing on stdout."""
    out, err = capsys.readouterr()
    *faults, last = err.splitlines() if err.count("\n") > 1 else [err.rstrip("\n"), ""]
    assert out == "" and err.endswith("\n") and "Traceback" not in err
    assert all(line.startswith("error: ") for line in faults if not line.endswith("Nothing was started."))
    assert last == "" or last.endswith("Nothing was started.") or last.startswith("with the names mended: ")
    return err


# --- the top level ------------------------------------------------------------------------------------


def test_help_is_short_and_loads_nothing_heavy():
    code = (
        "import sys; from nabla_trl.cli.main import main;"
        "assert main(['--help']) == main([]) == main(['--version']) == 0;"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'matplotlib', 'starlette', 'uvicorn'};"
        "assert not heavy & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    for name, command in COMMANDS.items():
        assert ran.stdout.count(f"  {name:<10}{command.summary}\n") == 2


@pytest.mark.parametrize(
    ("name", "hint"),
    [("slove", "did you mean solve?"), ("xyz", "choose from init, solve, traces,"), ("ship", "it is now export")],
)
def test_an_unknown_command(capsys, name, hint):
    assert main([name]) == 2
    assert f"unknown command {name!r}: {hint}" in error_line(capsys)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(capsys, name):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and err == ""
    assert out.startswith(f"usage: nabla-trl {name}") and "--config FILE" in out
    assert ("--preset" in out) == (name in ("solve", "traces", "train", "eval", "distill", "serve"))


@pytest.mark.parametrize(("name", "resumable"), [("traces", True), ("eval", True), ("solve", False)])
def test_ctrl_c(capsys, monkeypatch, name, resumable):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"nabla_trl.cli.{COMMANDS[name].module}.main", interrupted)
    assert main([name]) == 130
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err == f"stopped{f'; to go on: nabla-trl {name}' if resumable else ''}\n"


# --- solve --------------------------------------------------------------------------------------------


def test_solve_prints_plain_lines_where_there_is_no_terminal(capsys, models):
    assert main(["solve", "1+2", *models, *SEARCH]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == "question  1+2" and any(line.startswith("answer  ") for line in lines)
    assert all(character == "\n" or character.isprintable() for character in out)
    assert "first response" in out and "<|" not in out


def test_solve_json(capsys, models):
    assert main(["solve", "1+2", *models, *SEARCH, "--json", "--seed", "5"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == "" and out.count("\n") == 1
    assert (result["seed"], result["method"], result["prompt"]) == (5, "nabla", "<|user|>1+2<|end|><|assistant|>")
    assert len(result["revisions"]) == 3 and result["cost"]["flops"] > 0 and result["error"] is None
    assert (
        result["meta"]["config_hash"]
        == SearchConfig(max_rounds=3, max_new_tokens=10).with_default_gradient_at("direct").compute_hash()
    )


def test_solve_grades_where_gold_is_known(capsys, models, world):
    """The gold answer of one call is what the same call answered before."""
    assert main(["solve", "1+1", *models, *SEARCH, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert (plain["gold"], plain["correct"]) == (None, None)
    gold = plain["answer"] or "7"
    for answer, word in ((gold, "right" if plain["answer"] else "wrong"), ("123456", "wrong")):
        assert main(["solve", "1+1", *models, *SEARCH, "--answer", answer]) == 0
        assert f"gold    {answer}: the answer is {word}" in capsys.readouterr().out
    dataset = ["--dataset", str(world / "problems.jsonl")]
    assert main(["solve", *dataset, "--index", "2", *models, *SEARCH, "--json"]) == 0
    solved = json.loads(capsys.readouterr().out)
    assert solved["gold"] == "3" and solved["correct"] is not None and "3+3" in solved["prompt"]


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ([], 2, "the following arguments are required: question"),
        (["1+1", "--dataset", "digit_chains"], 2, "either a question or --dataset"),
        (["--dataset", "digit_chains", "--answer", "3"], 2, "a problem of --dataset has its gold answer"),
        (["--dataset", "digit_chains", "--index", "-1"], 2, "index must be at least 0"),
    ],
)
def test_solve_needs_one_problem(capsys, models, argv, code, message):
    assert main(["solve", *argv, *models]) == code
    assert message in error_line(capsys)


def test_a_log_ratio_of_the_policy_against_itself_is_refused(capsys, world):
    policy = str(world / "policy")
    for reward in (f"logratio:{policy}", f"logratio:{policy},{policy}"):
        assert main(["solve", "1+1", "--policy", policy, "--reward", reward]) == 2
        assert "a log-ratio of a model against itself is 0 for every response" in error_line(capsys)


def test_every_method_that_is_wrong_is_named(capsys, models, dataset, tmp_path):
    methods = "greedy,best_off_4,nabla@0.3,vote"
    assert main(["eval", *models, *dataset, "--output_dir", str(tmp_path), "--eval_methods", methods]) == 2
    line = error_line(capsys)
    assert "unknown method 'best_off_4' (did you mean best_of_4?)" in line and "unknown method 'vote': choose" in line
    assert "add best_of_16 to the methods" in line and "--eval_methods greedy,best_of_4,nabla@0.3,vote\n" in line


def test_what_libraries_print_stays_out_of_the_json(capsys, models, monkeypatch):
    load = ModelPair.load

    def chatty(self, *args, **kwargs):
        print("noise")
        return load(self, *args, **kwargs)

    monkeypatch.setattr(ModelPair, "load", chatty)
    assert main(["solve", "1+2", *models, *SEARCH, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["error"] is None and err == "noise\n"


def test_the_question_from_stdin(capsys, models, monkeypatch, tmp_path):
    (tmp_path / "question").write_text("1+2\n", encoding="utf-8")
    with (tmp_path / "question").open(encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert main(["solve", "-", *models, *SEARCH, "--json"]) == 0
    piped = json.loads(capsys.readouterr().out)
    main(["solve", "1+2", *models, *SEARCH, "--json"])
    typed = json.loads(capsys.readouterr().out)
    assert piped["response_ids"] == typed["response_ids"] and piped["prompt_ids"] == typed["prompt_ids"]


def test_preset_file_and_flags_reach_the_search(capsys, models, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("preset: paper\nmax_rollouts: 3\nsolver: {steps: 4}\nmax_new_tokens: 6\n", encoding="utf-8")
    assert main(["solve", "1+2", *models, "--json", f"--config={path}", "--solver.steps", "2"]) == 0
    used = json.loads(capsys.readouterr().out)["meta"]["config_hash"]
    assert (
        used == SearchConfig.from_preset("paper", max_rollouts=3, solver={"steps": 2}, max_new_tokens=6).compute_hash()
    )


def test_an_adapter_changes_the_policy(capsys, models, world):
    assert main(["solve", "1+2", *models, *SEARCH, "--json", "--adapter", str(world / "adapter")]) == 0
    assert json.loads(capsys.readouterr().out)["meta"]["policy"].endswith("+" + str(world / "adapter"))


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["1+2", "--max_rounds", "many"], 2, "argument --max_rounds/--max-rounds: invalid int value"),
        (["1+2", "--ruonds", "3"], 2, "unknown option --ruonds (did you mean --max_rounds?)"),
        ([], 2, "required: question"),
        ([" "], 2, "the question is empty"),
        (["1\udcff2"], 2, "the question is not UTF-8 text"),
        (["1+2", "--preset", "papr"], 2, "unknown preset 'papr'"),
        (["1+2", "--solver.steps", "3"], 2, "steps belongs to ste: add --solver ste"),
        (["1+2", "--config", "no/such.yaml"], 2, "cannot read no/such.yaml: No such file"),
        (["1+2", "--adapter", "no/adapter"], 2, "cannot put adapter no/adapter"),
        (["1+2", "--device", "warp:9"], 2, "cannot use device 'warp:9'"),
        (["what?"], 2, "does not know some characters of the prompt"),
        (["1" * 200], 2, "the prompt has 203 tokens, the context"),
    ],
)
def test_solve_refuses_in_one_line(capsys, models, argv, code, message):
    assert main(["solve", *argv, *models]) == code
    assert message in error_line(capsys)


def test_a_failed_question_is_an_error_and_still_one_json_object(capsys, models):
    assert main(["solve", "what?", *models, "--json"]) == 1
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["error"] in err and result["reward"] is None and err.count("\n") == 1


@pytest.mark.parametrize("name", ["solve", "traces", "eval", "audit"])
def test_models_that_are_not_there(capsys, name, dataset, tmp_path):
    argv = {
        "solve": ["1+2"],
        "audit": dataset,
        "traces": [*dataset, "--output_dir", str(tmp_path / "out")],
        "eval": [*dataset, "--output_dir", str(tmp_path / "out")],
    }
    assert main([name, *argv[name], "--policy", "no/policy", "--reward", "no/reward"]) == 2
    assert "cannot load a tokenizer from 'no/policy'" in error_line(capsys)
    assert not list(tmp_path.glob("out/*.json"))  # a folder that was claimed would refuse the right policy


def test_a_file_with_an_unknown_or_an_ill_typed_key(capsys, models, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("max_ruonds: 3", encoding="utf-8")
    assert main(["solve", "1+2", *models, "--config", str(path)]) == 2
    assert f"{path}: unknown key 'max_ruonds' (did you mean max_rounds?)" in error_line(capsys)
    path.write_text("max_rounds: many", encoding="utf-8")
    assert main(["solve", "1+2", *models, "--config", str(path)]) == 2
    assert f"{path}: max_rounds must be a whole number, not 'many'" in error_line(capsys)


# --- traces -------------------------------------------------------------------------------------------


def test_traces_are_made_once(capsys, models, dataset, tmp_path, monkeypatch):
    argv = ["traces", *models, *dataset, *SEARCH, "--output_dir", str(tmp_path), "--batch_size", "4"]
    assert main([*argv, "--max_problems", "4"]) == 0
    capsys.readouterr()
    assert main(argv) == 0  # goes on with the two that are missing
    assert f"2 traces written, 4 existed: {tmp_path / 'traces'}" in capsys.readouterr().out
    traces = read_traces(tmp_path / "traces")
    assert [trace.problem_id for trace in traces] == [f"problems/{n}" for n in range(6)]
    assert all(trace.correct is not None and len(trace.revisions) == 3 for trace in traces)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*[!k]")}  # all but the lock

    def refuse(*args, **kwargs):
        raise AssertionError("models were loaded for nothing")

    monkeypatch.setattr(ModelPair, "load", refuse)
    assert main(argv) == 0
    assert capsys.readouterr().out == f"0 traces written, 6 existed: {tmp_path / 'traces'}\n"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*[!k]")} == before


def test_traces_made_with_other_settings_are_not_mixed(capsys, models, dataset, tmp_path):
    argv = ["traces", *models, *dataset, *SEARCH, "--output_dir", str(tmp_path), "--max_problems", "1"]
    assert main(argv) == 0
    capsys.readouterr()
    assert main([*argv, "--max_rounds", "4", "--batch_size", "7"]) == 2
    assert "now max_rounds '4' (was '3'): use another --output_dir" in error_line(capsys)


def test_a_problem_that_fails_is_counted_and_named(capsys, models, tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"question": "1+2"}\n{"question": "what?"}', encoding="utf-8")
    assert main(["traces", *models, "--dataset", str(path), *SEARCH, "--output_dir", str(tmp_path / "out")]) == 0
    assert "1 failed (the first: some/1: " in capsys.readouterr().out


# --- eval and report ----------------------------------------------------------------------------------


def evaluation(models: list[str], dataset: list[str], folder: Path, methods: str, *more: str) -> list[str]:
    flags = ["--eval_methods", methods, "--seeds", "0", "1", "--output_dir", str(folder)]
    return ["eval", *models, *dataset, *SEARCH, *flags, *more]


def test_eval_then_report(capsys, models, dataset, tmp_path, monkeypatch):
    methods = "greedy,best_of_1,best_of_16,self_consistency_4,nabla,control,nabla@0.5,reward_model_sampling"
    assert main(evaluation(models, dataset, tmp_path, methods)) == 0
    table = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    for name in methods.split(","):
        assert sum(row["method"] == name for row in rows) == 6 * (1 if name == "greedy" else 2)
        assert f"\n{name} " in table
    flops = {name: sum(row["flops"] for row in rows if row["method"] == name) for name in methods.split(",")}
    # a round starts if it is expected to end within the budget
    assert flops["nabla"] < 0.4 * flops["best_of_16"] < flops["nabla@0.5"] < 0.6 * flops["best_of_16"]

    def refuse(*args, **kwargs):
        raise AssertionError("a report needs no models")

    monkeypatch.setattr(ModelPair, "load", refuse)
    monkeypatch.setattr(progress, "_ANNOUNCE_SECONDS", 0.0)
    assert main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(table[: table.index("rows: ")])
    assert f"writing the report to {tmp_path} …" in printed.err
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    right = [bool(row["correct"]) for row in rows if row["method"] == "nabla"]
    assert summary["accuracy.nabla"]["value"] == pytest.approx(sum(right) / len(right))
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "nabla-trl eval --policy" in page


def test_eval_of_a_task_that_asks_for_a_form_tells_where_answers_are_read_in_two_ways(capsys, models, tmp_path):
    chains = ["--dataset", "digit_chains", "--max_problems", "5"]
    assert main(evaluation(models, chains, tmp_path, "greedy,nabla")) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    differ = [row for row in rows if row["tail"] is not None]
    assert differ and all(row["answer_strict"] != row["answer"] for row in differ)
    assert f"{len(differ)} answers differ by strict and lenient extraction: {tmp_path / 'extraction.jsonl'}" in out
    lines = (tmp_path / "extraction.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["lenient"] for line in lines] == [row["answer"] for row in differ]
    assert {row["task_version"] for row in rows} == {compute_task_version("digit_chains")}
    assert main(["report", "--run_dir", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    strict = [bool(row["correct_strict"]) for row in rows if row["method"] == "greedy"]
    assert summary["accuracy_strict.greedy"]["value"] == pytest.approx(sum(strict) / len(strict))
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"{len(differ)} of {len(rows)} responses are read in two ways" in page
    assert f"revision of digit_chains: `{compute_task_version('digit_chains')}`" in page


@pytest.mark.parametrize("command", ["eval", "traces"])
def test_another_version_of_the_task_is_refused_by_name(capsys, models, tmp_path, command):
    (tmp_path / "data.jsonl").write_text('{"question": "1+1", "answer": "2"}', encoding="utf-8")
    path, text = tmp_path / "sums.yaml", "path: data.jsonl\nquestion: question\nanswer: answer\ninstruction: ''\n"
    path.write_text(text, encoding="utf-8")
    methods = ["--eval_methods", "greedy"] * (command == "eval")
    argv = [command, *models, "--dataset", str(path), *SEARCH, *methods, "--output_dir", str(tmp_path / "out")]
    was = compute_task_version(str(path))
    assert main(argv) == 0
    path.write_text(f"{text}version: 2\n", encoding="utf-8")
    capsys.readouterr()
    assert main(argv) == 2
    assert f"now task_version '{compute_task_version(str(path))}' (was '{was}')" in error_line(capsys)


def test_how_the_policy_is_asked_is_a_setting(capsys, models, dataset, tmp_path):
    assert main(evaluation(models, dataset, tmp_path, "greedy", "--prompt_style", "chat")) == 0
    capsys.readouterr()
    assert main(evaluation(models, dataset, tmp_path, "greedy")) == 2
    assert "now prompt_style None (was 'chat')" in error_line(capsys)
    assert main(evaluation(models, dataset, tmp_path, "greedy", "--chat_template_kwargs", '{"add": 1}')) == 2
    assert "has no 'add'" in error_line(capsys)
    assert main(evaluation(models, dataset, tmp_path, "greedy", "--chat_template_kwargs", "x")) == 2
    assert "chat_template_kwargs is not JSON" in error_line(capsys)


def test_eval_adds_methods_and_keeps_rows(capsys, models, dataset, tmp_path):
    assert main(evaluation(models, dataset, tmp_path, "greedy")) == 0
    rows = (tmp_path / "rows" / "rows-00000.jsonl").read_text(encoding="utf-8")
    assert main(evaluation(models, dataset, tmp_path, "greedy,control")) == 0
    more = (tmp_path / "rows" / "rows-00000.jsonl").read_text(encoding="utf-8")
    assert more.startswith(rows) and more.count("\n") == 6 + 2 * 6
    capsys.readouterr()
    assert main(evaluation(models, dataset, tmp_path, "greedy", "--beta", "2")) == 2
    assert "now solver.target_kl 'None' (was '2.0'), beta '2.0' (was 'None')" in error_line(capsys)


def test_eval_by_steps(capsys, models, dataset, tmp_path, monkeypatch):
    """How steps are made is settled apart: these methods join rows that are there, and are not mixed."""
    assert main(evaluation(models, dataset, tmp_path, "best_of_2")) == 0
    names = "best_of_2,beam_search_2,dvts@best_of_2,tot_1,rap@best_of_2"
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(ModelPair, "load", None)  # nothing is loaded
        assert main(evaluation(models, dataset, tmp_path, names)) == 2
    assert "no step could end, as no tokens of" in error_line(capsys)
    more = ["--step_delimiter", ";", "--steps_per_prefix", "2"]
    assert main(evaluation(models, dataset, tmp_path, names, *more)) == 0
    table = capsys.readouterr().out
    for name in names.split(","):
        assert f"\n{name} " in table
    assert main(["report", "--run_dir", str(tmp_path)]) == 0
    assert "rap@best_of_2" in (tmp_path / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(evaluation(models, dataset, tmp_path, names, *more[:3], "3")) == 2
    assert "now steps_per_prefix '3' (was '2')" in error_line(capsys)


def test_eval_of_a_tuned_policy(models, dataset, tmp_path, world, capsys):
    adapter = ["--adapter", str(world / "adapter")]
    assert main(evaluation(models, dataset, tmp_path, "greedy")) == 0
    methods = "greedy,distilled_greedy,distilled_best_of_2"
    assert main(evaluation(models, dataset, tmp_path, methods, *adapter)) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    rewards = {name: [row["reward"] for row in rows if row["method"] == name] for name in methods.split(",")}
    assert len(rewards["distilled_best_of_2"]) == 12
    assert len(rewards["greedy"]) == 6 and rewards["greedy"] != rewards["distilled_greedy"]
    capsys.readouterr()
    assert main(evaluation(models, dataset, tmp_path, methods, "--adapter", str(world / "policy"))) == 2
    assert "is not an adapter" in error_line(capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--eval_methods", "greedy,magic"], "unknown method 'magic': choose from greedy, best_of_N"),
        (["--eval_methods", "best_of_0"], "unknown method 'best_of_0'"),
        (["--eval_methods", "nabla@0"], "unknown method 'nabla@0'"),
        (["--eval_methods", ","], "no methods"),
        (["--eval_methods", "nabla@0.3"], "add best_of_16 to the methods"),
        (["--eval_methods", "distilled_greedy"], "distilled_greedy needs an adapter: give --adapter"),
        (
            ["--eval_methods", "reward_weighted_greedy"],
            "a policy trained by reward-weighted, which recipes/distill.py makes",
        ),
        (["--eval_methods", "sft_shuffled"], "unknown method 'sft_shuffled'"),
        (["--eval_methods", "ppo_greedy"], "unknown method 'ppo_greedy'"),
        (
            ["--eval_methods", "sft_nabla@0.3"],
            "the FLOP budget of sft_nabla@0.3 equals best_of_16's FLOPs: add best_of_16",
        ),
        (["--eval_methods", "nabla", "--solver", "none"], "solver none is the control"),
        (["--seeds", "1", "1"], "seeds must be distinct"),
        (["--split", "x", "--dataset", "gsm8k"], "task 'gsm8k' has no split 'x'"),
    ],
)
def test_eval_refuses_in_one_line(capsys, models, dataset, tmp_path, argv, message):
    assert main(["eval", *models, *dataset, "--output_dir", str(tmp_path), *SEARCH, *argv]) == 2
    assert message in error_line(capsys)


def test_an_adapter_without_a_method_that_uses_it(capsys, models, dataset, tmp_path, world):
    assert main(evaluation(models, dataset, tmp_path, "greedy", "--adapter", str(world / "adapter"))) == 2
    assert "no distilled_ method that uses it" in error_line(capsys)


def test_eval_needs_gold_answers(capsys, models, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "1+2"}', encoding="utf-8")
    assert main(evaluation(models, ["--dataset", str(tmp_path / "q.jsonl")], tmp_path / "out", "greedy")) == 2
    assert "no problem has a gold answer" in error_line(capsys)


@pytest.mark.parametrize("argv", [[], ["a", "--run_dir", "b"]])
def test_report_is_of_one_folder(capsys, argv):
    assert main(["report", *argv]) == 2
    assert "name one folder, as in nabla-trl report outputs/tiny" in error_line(capsys)


def test_report_without_an_evaluation(capsys, tmp_path):
    assert main(["report", "--run_dir", str(tmp_path)]) == 1
    assert f"{tmp_path} holds no rows.jsonl: run nabla-trl eval" in error_line(capsys)
    (tmp_path / "rows.jsonl").write_text("{", encoding="utf-8")
    (tmp_path / "facts.json").write_text("{}", encoding="utf-8")
    assert main(["report", "--run_dir", str(tmp_path)]) == 1
    assert "not JSON" in error_line(capsys)


# --- audit --------------------------------------------------------------------------------------------


def test_audit_as_table_and_as_json(capsys, models, dataset):
    argv = ["audit", *models, *dataset, "--audit_samples", "16", "--max_new_tokens", "10"]
    assert main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == "" and result["problems"] == 6 and list(result["best_of_n_accuracy"]) == ["1", "2", "4", "8", "16"]
    assert main(argv) == 0
    table = capsys.readouterr().out
    assert f"AUC within problems       {result['auc']:.3f}" in table
    assert " ".join(result["conclusion"].split()) in " ".join(table.split())


def test_audit_needs_two_samples(capsys, models, dataset):
    assert main(["audit", *models, *dataset, "--audit_samples", "1"]) == 2
    assert "audit_samples must be at least 2" in error_line(capsys)


DEEP = ["--audit_samples", "16", "--max_new_tokens", "10", "--gradient", "--gradient_at", "direct", "hard"]
DEEP += ["--num_swaps", "40", "--over_optimization", "--max_rounds", "3"]


def test_audit_of_gradient_and_over_optimization_as_json(capsys, models, dataset, tmp_path):
    file = tmp_path / "new" / "audit.json"
    assert main(["audit", *models, *dataset, *DEEP, "--output_file", str(file), "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == "" and out.count("\n") == 1 and json.loads(file.read_text(encoding="utf-8")) == result
    assert [result["policy"], result["reward"]] == [models[1], models[3]]
    assert list(result["gradient"]["gradient_points"]) == ["direct", "hard"] and result["gradient"]["swaps"] == 40
    assert list(result["over_optimization"]["curves"]) == ["nabla", "control"]
    assert list(result["over_optimization"]["curves"]["nabla"]["accuracy"]) == ["0", "1", "2", "3"]
    assert result["validated_limits"] == result["over_optimization"]["validated_limits"]
    assert result["validated_limits"]["max_samples"] == result["validated_samples"]


def test_what_an_audit_found_is_kept_when_a_later_part_fails(capsys, models, dataset, tmp_path, monkeypatch):
    def fails(*args, **options):
        raise ValueError("no audit today")

    monkeypatch.setattr(audit, "audit_overoptimization", fails)
    assert main(["audit", *models, *dataset, *DEEP, "--output_file", str(tmp_path / "audit.json")]) == 1
    assert "no audit today" in error_line(capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["audit.json"]
    result = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
    assert result["problems"] == 6 and result["gradient"]["swaps"] == 40
    assert result["over_optimization"] is result["validated_limits"] is None


def test_audit_of_gradient_and_over_optimization_as_tables(capsys, models, dataset):
    assert main(["audit", *models, *dataset, *DEEP]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    text = " ".join(out.split())
    for part in (
        "AUC within problems: probability that a correct sample scores above an incorrect one of the same problem",
        "direction: share of exchanged tokens",
        "control: accuracy of the same search without the gradient",
        "gradient gradient at direction",
        "wrong responses the problems have no step labels",
        "over-optimization rounds",
    ):
        assert part in text
    assert text.count("conclusion: ") == 3 and "validated up to" in text


def test_audit_without_over_optimization_validates_no_limits(capsys, models, dataset):
    assert main(["audit", *models, *dataset, "--max_new_tokens", "10", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["gradient"] is result["over_optimization"] is result["validated_limits"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gradient_at", "hard", "soft"], "gradient_at must be direct, hard, mixture:A[,A…]"),
        (["--gradient_at", "direct+direct"], "or direct+ one of these, not 'direct+direct'"),
        (["--gradient_at", "hard", "hard"], "gradient_at must be distinct"),
        (["--num_swaps", "0"], "num_swaps must be at least 1"),
        (["--max_rounds", "0"], "max_rounds must be at least 1"),
    ],
)
def test_audit_options_are_checked_before_models_are_loaded(capsys, dataset, flags, message):
    assert main(["audit", "--policy", "no/policy", "--reward", "no/reward", *dataset, *flags]) == 2
    assert message in error_line(capsys)


def test_the_view_is_given_what_the_policy_decodes(capsys, models, monkeypatch):
    """Special tokens never reach the view as text."""
    seen = []
    monkeypatch.setattr(console, "print_trace", lambda trace, question, decode, out: seen.append((trace, decode)))
    assert main(["solve", "1+2", *models, *SEARCH]) == 0
    trace, decode = seen[0]
    assert decode(trace.prompt_ids) == "1+2" and decode(trace.response_ids) == trace.response
