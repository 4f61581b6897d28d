"""Options from presets, YAML and flags: who wins, what is refused, and that a mistake is one line."""

from __future__ import annotations

import re
import shlex
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import yaml
from trl import SFTConfig

from nabla_trl.cli.parsing import Parser, UsageError, collect_given_options, parse_dataclasses, run_main
from nabla_trl.search.config import PRESETS, SearchConfig
from nabla_trl.search.options import MetropolisAcceptance, MirrorSolver, NoGradient, SequentialProposals, SteSolver
from nabla_trl.utils.faults import Faults
from nabla_trl.utils.fields import coerce_fields, get_option_groups
from nabla_trl.utils.interrupts import StoppedBySignal
from nabla_trl.utils.renamed import RENAMED_OPTIONS

RELEASED_SOLVER = SteSolver(
    optimize_positions="first", hard_tokens="argmax", schedule="clipped_cosine", repeat_turn_end=True
)


@dataclass
class Options:
    name: str = field(metadata={"help": "a text"})
    count: int = field(default=3, metadata={"help": "a number"})
    share: float = field(default=0.5, metadata={"help": "a fraction"})
    flag: bool = field(default=False, metadata={"help": "yes or no"})
    maybe: bool | None = field(default=None, metadata={"help": "yes, no or neither"})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "several"})
    place: str | None = field(default=None, metadata={"help": "a text or none"})


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "options.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def options(*argv: str) -> Options:
    return parse_dataclasses([Options], ["--name", "x", *argv])[0]


def test_preset_then_file_then_flags(tmp_path):
    text = "preset: paper\nsolver: {learning_rate: 0.1, steps: 7}\nmax_rollouts: 5\n"
    argv = ["--config", yaml_file(tmp_path, text), "--solver.steps", "9"]
    found = parse_dataclasses([SearchConfig], argv, presets=PRESETS)[0]
    assert found == SearchConfig.from_preset("paper", solver={"learning_rate": 0.1, "steps": 9}, max_rollouts=5)


def test_the_preset_of_the_command_line_wins_over_the_one_of_the_file(tmp_path):
    argv = [f"--config={yaml_file(tmp_path, 'preset: paper')}", "--preset=default", "--max_rounds=2"]
    assert parse_dataclasses([SearchConfig], argv, presets=PRESETS)[0] == SearchConfig(max_rounds=2)


def test_a_file_that_repeats_the_defaults_changes_nothing(tmp_path):
    """Also the hash: YAML's `1` for a float must not tell two equal searches apart."""
    text = "solver: {target_kl: 2, step_size: 1}\ntemperature: 1\ntop_p: 1\nmax_flops: 0\nmax_rounds: 16"
    found = parse_dataclasses([SearchConfig], ["--config", yaml_file(tmp_path, text)])[0]
    assert found.compute_hash() == SearchConfig().compute_hash()


def test_values_of_a_file_get_the_types_of_the_fields(tmp_path):
    text = "share: 1e-3\ncount: 4\nflag: true\nmaybe: false\nseeds: [1, 2]\nplace: null"
    found = options("--config", yaml_file(tmp_path, text))
    assert found == Options("x", 4, 0.001, True, False, [1, 2], None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("count: many", "count must be a whole number, not 'many'"),
        ("count: 1.5", "count must be a whole number, not 1.5"),
        ("count: true", "count must be a whole number, not True"),
        ("count: null", "count must be a whole number, not None"),
        ("share: half", "share must be a number, not 'half'"),
        ("share: yes", "share must be a number, not True"),
        ("flag: 1", "flag must be true or false, not 1"),
        ("maybe: perhaps", "maybe must be true or false, not 'perhaps'"),
        ("seeds: 1", "seeds must be a list, each a whole number, not 1"),
        ("seeds: [1, a]", "seeds must be a list, each a whole number, not [1, 'a']"),
        ("name: no", "name must be text (in quotes), not False"),
        ("cuont: 3", "unknown key 'cuont' (did you mean count?)"),
        ("preset: paper", "unknown key 'preset'"),
        ("env: {A: 1}", "unknown key 'env'"),
        ("3: 4", "unknown key 3"),
        ("- 1", "must hold a mapping of options"),
        ("", "must hold a mapping of options"),
        ("[", "cannot read"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path, text, message):
    path = yaml_file(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        options("--config", path)
    assert path in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "odd.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read {re.escape(str(path))}"):
        options("--config", str(path))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--coutn", "3"], "unknown option --coutn (did you mean --count?)"),
        (["--coun", "3"], "unknown option --coun (did you mean --count?)"),  # no abbreviations
        (["--preset", "paper"], "unknown option --preset"),
        (["stray"], "unexpected argument 'stray'"),
        (["--count", "many"], "argument --count: invalid int value: 'many'"),
        (["--count"], "argument --count: expected one argument"),
        (["--config"], "argument --config: expected one argument"),
        (["--maybe", "perhaps"], "Truthy value expected"),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(argv, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        options(*argv)


def test_a_misspelt_required_option_is_named_rather_than_called_missing():
    with pytest.raises(UsageError, match=r"--nmae \(did you mean --name\?\)"):
        parse_dataclasses([Options], ["--nmae", "x"])
    with pytest.raises(UsageError, match="required: --name"):
        parse_dataclasses([Options], [])


def test_flags_of_every_kind():
    argv = ["--count=4", "--share", "1", "--flag", "--maybe", "false", "--seeds", "1", "2", "--place", "here"]
    assert options(*argv) == Options("x", 4, 1.0, True, False, [1, 2], "here")


def test_the_file_may_hold_a_required_option(tmp_path):
    assert parse_dataclasses([Options], ["--config", yaml_file(tmp_path, "name: y")])[0].name == "y"


def test_arguments_added_by_hand_come_last():
    parser = Parser([Options])
    parser.add_argument("question")
    filled, extra = parser.parse_options(["--name", "x", "--", "-3+4"])
    assert (filled.name, extra.question) == ("x", "-3+4")


def test_unknown_preset():
    with pytest.raises(
        ValueError, match=r"unknown preset 'papr' \(did you mean paper\?\): choose from default, paper"
    ):
        parse_dataclasses([SearchConfig], ["--preset", "papr"], presets=PRESETS)


def test_the_trainers_own_types_are_left_to_trl():
    """Enums, unions and mappings pass; plain fields are checked and converted like ours."""
    values = {"save_strategy": "no", "report_to": "none", "num_train_epochs": 6, "gradient_checkpointing_kwargs": {}}
    fitted = coerce_fields(values, [SFTConfig], source="f")
    assert fitted == values and isinstance(fitted["num_train_epochs"], float)
    with pytest.raises(ValueError, match="f: max_steps must be a whole number"):
        coerce_fields({"max_steps": "all"}, [SFTConfig], source="f")


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_dataclasses([Options], ["--help"], presets=PRESETS)
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "--config FILE YAML file of options" in text and "--preset NAME Named options: default, paper" in text
    assert "a number (default: 3)" in text and "a text (default" not in text and "--help-all" in text


# --- groups of options ------------------------------------------------------------------------------------


def search(*argv: str) -> SearchConfig:
    return parse_dataclasses([SearchConfig], argv, presets=PRESETS)[0]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--solver", "ste", "--solver.steps", "3"], {"solver": SteSolver(steps=3)}),
        (["--solver.steps=3", "--solver=ste"], {"solver": SteSolver(steps=3)}),
        (
            ["--solver.likelihood-token-grad", "no", "--solver", "ste"],
            {"solver": SteSolver(likelihood_token_grad=False)},
        ),
        (["--solver.shuffle_gradient"], {"solver": MirrorSolver(shuffle_gradient=True)}),
        (["--proposals", "sequential", "--proposals.confidence", "1"], {"proposals": SequentialProposals(1.0)}),
        (
            ["--acceptance.independence_prob", "0", "--acceptance", "metropolis"],
            {"acceptance": MetropolisAcceptance(0.0)},
        ),
    ],
)
def test_options_of_a_group_have_dotted_flags_in_any_order(argv, expected):
    assert search(*argv) == SearchConfig(**expected)


@pytest.mark.parametrize(
    ("text", "argv", "expected"),
    [
        ("solver: ste", ["--solver.steps", "3"], SteSolver(steps=3)),
        ("solver: {name: ste, steps: 3, tau: 2}", ["--solver.steps", "4"], SteSolver(steps=4, tau=2.0)),
        ("solver: {name: ste, steps: 3}", ["--solver", "ste", "--solver.tau", "2"], SteSolver(steps=3, tau=2.0)),
        ("solver: {name: ste, steps: 3}", ["--solver", "none"], NoGradient()),
        ("preset: released", ["--solver.steps", "3"], replace(RELEASED_SOLVER, steps=3)),
        ("preset: released\nsolver: ste", [], RELEASED_SOLVER),
        ("preset: released\nsolver: {name: mirror, step_size: 2}\nproposals: global", [], MirrorSolver(step_size=2.0)),
    ],
)
def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path, text, argv, expected):
    argv = ["--config", yaml_file(tmp_path, text), *argv]
    config = search(*argv)
    assert config.solver == expected
    given = collect_given_options(argv, [config], PRESETS)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(given), encoding="utf-8")
    assert search("--config", str(again)) == config


def test_the_given_options_are_those_of_preset_file_and_flags(tmp_path):
    argv = ["--config", yaml_file(tmp_path, "solver: {name: ste, tau: 2}"), "--solver.steps=3", "--no_restarts"]
    given = collect_given_options(argv, [search(*argv)], PRESETS)
    assert given == {"solver": {"name": "ste", "tau": 2, "steps": 3}, "restarts": False}
    assert collect_given_options(["--max_rounds", "3"], [search("--max_rounds", "3")]) == {"max_rounds": 3}


MIRROR = "it has gradient_at, step_size, target_kl, shuffle_gradient"


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("", ["--solver", "sta"], "solver must be one of mirror, ste, none, not 'sta' (did you mean ste?)"),
        ("", ["--solver.step", "3"], "unknown option --solver.step (did you mean --solver.steps?)"),
        (
            "",
            ["--solver.steps", "3"],
            f"solver mirror has no option 'steps': {MIRROR}; steps belongs to ste: add --solver",
        ),
        ("", ["--solver.steps", "few", "--solver", "ste"], "argument --solver.steps: invalid int value: 'few'"),
        ("", ["--solver", "ste", "--solver.tau", "0"], "solver ste needs steps >= 1"),
        (
            "",
            ["--acceptance.independence_prob", "0"],
            "acceptance greedy has no option 'independence_prob': it has none",
        ),
        ("solver: 3", [], "yaml: solver must be one of mirror, ste, none, not 3"),
        (
            "solver: {step_sze: 3}",
            [],
            f"yaml: solver mirror has no option 'step_sze' (did you mean step_size?): {MIRROR}",
        ),
        (
            "solver: {steps: 3}",
            [],
            f"yaml: solver mirror has no option 'steps': {MIRROR}; steps belongs to ste: add name: ste",
        ),
        ("solver: {name: ste, steps: few}", [], "yaml: solver ste: steps must be a whole number, not 'few'"),
        (
            "solver: {name: ste, steps: 3}",
            ["--solver", "none", "--solver.steps", "4"],
            "solver none has no option 'steps'",
        ),
    ],
)
def test_a_wrong_option_of_a_group_is_one_line(tmp_path, text, argv, message):
    argv = [*argv, "--config", yaml_file(tmp_path, text)] if text else argv
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        search(*argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "flag", "key"),
    [
        ("rounds", "--max_rounds", "'max_rounds'"),
        ("restart", "--restarts", "'restarts'"),
        ("lr", "--solver.learning_rate (of --solver ste)", "solver: {name: ste, learning_rate: …}"),
        ("kl", "--solver.target_kl (of --solver mirror)", "solver: {name: mirror, target_kl: …}"),
        (
            "branches",
            "--proposals.proposals_per_round (of --proposals global)",
            "proposals: {name: global, proposals_",
        ),
        (
            "redraw",
            "--acceptance.independence_prob (of --acceptance metropolis)",
            "acceptance: {name: metropolis, ind",
        ),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(tmp_path, old, flag, key):
    with pytest.raises(UsageError, match=re.escape(f"unknown option --{old}: it is now {flag}")):
        search(f"--{old}", "1")
    with pytest.raises(ValueError, match=re.escape(f"unknown key '{old}': it is now {key}")):
        search("--config", yaml_file(tmp_path, f"{old}: 1"))
    with pytest.raises(ValueError, match=re.escape(f"unknown option '{old}': it is now {key}")):
        SearchConfig.from_preset("default", **{old: 1})


def test_every_new_name_of_the_table_that_names_a_group_is_an_option():
    groups = get_option_groups(SearchConfig)
    for old, names in RENAMED_OPTIONS.items():
        for group, *path in (name.split(".") for name in names):
            if path:
                assert path[1] in groups[group].members[path[0]].__dataclass_fields__, old
    with pytest.raises(UsageError, match="unknown option --no_restart: it is now --no_restarts"):
        search("--no_restart")


def shown_help(capsys, *argv: str, **options) -> str:
    with pytest.raises(SystemExit):
        parse_dataclasses([Options, SearchConfig], argv, presets=PRESETS, prog="nabla", **options)
    return capsys.readouterr().out


def test_everything_wrong_is_told_at_once(tmp_path):
    with pytest.raises(UsageError) as caught:
        parse_dataclasses([SearchConfig], ["--kl", "2", "--foo", "--flops=3", "--no_direct", "--solver.kl", "3"])
    assert list(caught.value.lines[:-1]) == [
        "unknown option --kl: it is now --solver.target_kl (of --solver mirror)",
        "unknown option --foo",
        "unknown option --flops: it is now --max_flops",
        "unknown option --no_direct: it is now --solver.likelihood_token_grad false",
        "unknown option --solver.kl: it is now --solver.target_kl (of --solver mirror)",
    ]
    assert caught.value.lines[-1].startswith("solver mirror has no option 'likelihood_token_grad'")
    text = "kl: 2\nmax_rounds: abc\nsolver.target_kl: 2\n"
    with pytest.raises(ValueError) as caught:
        parse_dataclasses([SearchConfig], ["--config", yaml_file(tmp_path, text)])
    for part in ("unknown key 'kl': it is now", "max_rounds must be a whole number", "write solver: {target_kl: …}"):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="SearchConfig: beta must be a number, not 'x'; SearchConfig: max_r"):
        SearchConfig(beta="x", max_rounds="y")


def test_faults_of_every_kind_are_told_together(tmp_path):
    """Flags, words, values of flags and file, a missing option, a preset, and what the dataclasses refuse."""
    text = "share: half\ncuont: 3\nsolver: {name: ste, tua: 3}\npreset: papr"
    argv = ["--config", yaml_file(tmp_path, text), "stray", "--tempreature=-1", "--num_starts", "many", "--max_rounds"]
    argv += ["--top_p", "7", "--count", "x", "--num_chains", "9"]
    with pytest.raises(UsageError) as caught:
        parse_dataclasses([Options, SearchConfig], argv, presets=PRESETS)
    lines = caught.value.lines
    for part in (
        "unknown option --tempreature (did you mean --temperature?)",
        "unexpected argument 'stray'",
        "argument --num_starts/--num-starts: invalid int value: 'many'",
        "argument --max_rounds/--max-rounds: expected one argument",
        "argument --count: invalid int value: 'x'",
        "share must be a number, not 'half'",
        "unknown key 'cuont' (did you mean count?)",
        "solver ste has no option 'tua' (did you mean tau?)",
        "unknown preset 'papr'",
        "the following arguments are required: --name",
        "num_chains must be at most num_starts",
        "temperature must be 0 or from",
        "sampling needs top_k >= 0, 0 < top_p <= 1",
    ):
        assert sum(part in line for line in lines) == 1, (part, lines)
    assert len(lines) == 13


def test_a_search_is_refused_with_all_that_is_wrong():
    with pytest.raises(Faults) as caught:
        SearchConfig(solver={"name": "ste", "tau": 0}, acceptance="metropolis", patience=3, batch_size=0, max_ruonds=1)
    assert len(caught.value.lines) == 4
    with pytest.raises(ValueError, match="beta must be a number"):
        SearchConfig(beta=10**400)
    with pytest.raises(ValueError, match="solver mirror: step_size must be a number"):
        SearchConfig(solver=MirrorSolver(step_size=10**400))


def test_the_names_of_a_command_are_mended(capsys):
    def main(argv):
        Parser([Options, SearchConfig], presets=PRESETS).parse_options(argv)

    argv = ["--nmae", "a b", "--solver=sta", "--preset", "papr", "--kl", "2", "--count", "many"]
    assert run_main(main, argv, resume_command="", command=shlex.join(["nabla", *argv])) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-2:] == [
        "5 faults. Nothing was started.",
        "with the names mended: nabla --name 'a b' --solver=ste --preset paper --solver.target_kl 2 --count many",
    ]
    assert all(line.startswith("error: ") for line in err.splitlines()[:-2])


def test_help_shows_the_common_options_in_groups_and_counts_the_others(capsys):
    brief = shown_help(capsys, "--help", common={"name", "count", "proposals.confidence"})
    whole = shown_help(capsys, "--help-all")
    for flag in ("--name", "--count", "--solver NAME", "--solver.gradient_at", "--proposals.confidence", "--config"):
        assert flag in brief and flag in whole
    for flag in ("--share", "--patience", "--solver.steps", "--acceptance.parallel_tempering"):
        assert flag not in brief and flag in whole
    hidden = whole.count("\n  --") - whole.count("\n  --no_") - brief.count("\n  --")
    assert f"{hidden} more options: nabla --help-all" in brief and "more options" not in whole
    for title in ("Search: how a response is refined:", "--solver mirror: One closed-form"):
        assert title in brief and title in whole
    assert "--solver ste: Adam" not in brief and "--solver ste: Adam" in whole
    text = " ".join(whole.split())
    assert "Optimizer steps. Increase it for a closer optimum at a higher cost. (default: 20)" in text
    assert "--max-rounds" not in whole and "==SUPPRESS==" not in whole
    for entry in whole.split("\n  --")[1:]:
        assert entry.partition("\n\n")[0].count("(default") <= 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a\n  b"), 1, "error: a b\n"),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: [Errno 13] Permission denied: '/x'\n"),
        (UsageError("odd"), 2, "error: odd\n"),
        (KeyboardInterrupt(), 130, "stopped; to go on: do it again\n"),
        (StoppedBySignal(signal.SIGTERM, "nabla: 3 of 9"), 143, "stopped at nabla: 3 of 9; to go on: do it again\n"),
    ],
)
def test_exit_codes_and_one_line(capsys, error, code, line):
    def main(argv):
        raise error

    assert run_main(main, [], resume_command="do it again") == code
    assert capsys.readouterr() == ("", line)


def test_a_mistake_of_ours_is_not_hidden():
    def main(argv):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_main(main, [])


def test_the_code_of_main_is_returned():
    assert [run_main(lambda argv, code=code: code, []) for code in (None, 0, 3)] == [0, 0, 3]
