r"""Tasks described by a YAML file: the benchmarks in `benchmarks/`, and any data set that a user describes.

path: ChilleD/SVAMP                       # on the hub, or a local file or folder (.jsonl, .json, .parquet, .csv)
revision: 3a9a9b7                         # commit of the data set
splits: {train: train, test: test}        # our names to the data set's names, or to files of a local folder
question: "{{ Body }} {{ Question }}"     # a column, or a Jinja template of columns
answer: Answer
parse: integer
instruction: Put your final answer within \boxed{}.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from nabla_trl.grading.extraction import ANSWER_FORMATS, detect_answer_format, extract_strict_answer
from nabla_trl.tasks.gold_answers import GOLD_PARSERS, ParsedGold, make_regex_parser
from nabla_trl.tasks.problem import BOXED_INSTRUCTION, Problem, append_instruction, hash_to_unit_interval
from nabla_trl.tasks.template_worker import format_value
from nabla_trl.tasks.templates import TemplateFailure, list_variables, render_columns
from nabla_trl.utils.fields import coerce_fields
from nabla_trl.utils.files import read_csv_file, read_yaml, read_yaml_value, refuse_unreadable
from nabla_trl.utils.formatting import format_error
from nabla_trl.utils.identity import hash_files, hash_json

logger = logging.getLogger(__name__)

BENCHMARKS_DIR = Path(__file__).with_name("benchmarks")
ALL_PROBLEMS = "all"  # the split of a data set in one piece that a caller divides
_DATASET_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class TaskConfig:
    r"""Where a data set is and how its rows become problems. The fields are the keys of the YAML file.

    Attributes:
        path: hub id of the data set, or a local file or folder relative to the YAML file.
        test_fraction: share of the problems that are the test split, chosen by a hash of the question. The others are
            the train split. For data in one piece: a local file, or a data set with one split.
        revision: commit to load. None follows the data set's main branch and is not reproducible.
        config: name of the data set's configuration.
        splits: our names of splits to the data set's names, or to files of a local folder. A local file is one split.
        question, answer: a column, or a Jinja template of columns, which has "{{" in it.
        level, solution: columns of the difficulty and of the worked solution, or None.
        parse: how to read the gold answer: plain, hashes (GSM8K's "#### n"), boxed, integer, or regex.
        pattern: regular expression for `parse: regex`. The last match, or its one group, is the answer.
        instruction: how to answer. An empty text gives no instruction.
        prompt: Jinja template of the user turn, of `question`, `instruction` and columns. None means the question with
            the instruction on the next line.
        answer_format: the format that `extract_strict_answer` reads. None means the one that the instruction names.
        few_shot: worked examples for models without a chat template, [{question, answer}], or a YAML file of them.
        stop_strings: strings that end a response, or one such text.
        version: increase it after a change that the other fields do not show.
        name: name of the task. None means the file's name without its ending.

    Raises:
        ValueError: if a value is not allowed, a template cannot be read, or an example does not end in the format.
    """

    path: str
    question: str
    answer: str
    test_fraction: float | None = None
    revision: str | None = None
    config: str | None = None
    splits: dict[str, str] = field(default_factory=dict)
    level: str | None = None
    solution: str | None = None
    parse: str = "plain"
    pattern: str | None = None
    instruction: str = BOXED_INSTRUCTION
    prompt: str | None = None
    answer_format: str | None = None
    few_shot: list[dict[str, str]] = field(default_factory=list)
    stop_strings: list[str] = field(default_factory=list)
    version: int = 1
    name: str | None = None

    def __post_init__(self) -> None:
        if self.parse not in (*GOLD_PARSERS, "regex"):
            raise ValueError(f"parse must be one of {', '.join(GOLD_PARSERS)}, regex, not {self.parse!r}")
        if (self.parse == "regex") != (self.pattern is not None):
            raise ValueError("pattern belongs to parse: regex, which needs one")
        if self.answer_format is not None and self.answer_format not in ANSWER_FORMATS:
            raise ValueError(f"answer_format must be one of {', '.join(ANSWER_FORMATS)}, not {self.answer_format!r}")
        if not _is_str_dict(self.splits):
            raise ValueError("splits must map names of splits to the data set's own, as {test: test}")
        if not all(self.stop_strings):
            raise ValueError("stop_strings must not hold an empty string")
        path = Path(self.path)
        if path.is_file() and self.splits:
            raise ValueError(f"{self.path} is a file, which is one split: leave splits out, or give its folder")
        if not path.exists() and path.suffix in _DATASET_BUILDERS:
            raise ValueError(f"there is no file {self.path}")
        if self.test_fraction is not None:
            if not 0 < self.test_fraction < 1:
                raise ValueError(f"test_fraction must be between 0 and 1, not {self.test_fraction:g}")
            if not path.is_file() and len(self.splits) != 1:
                raise ValueError("test_fraction divides data in one piece: a file, or a data set with one of splits")
        if not path.is_file() and not self.splits:
            raise ValueError(f"splits are needed: which of its splits is {self.path}'s test?")
        self.get_answer_parser()
        for template in (self.question, self.answer, self.prompt or ""):
            _list_template_variables(template)
        self._check_examples()

    def _check_examples(self) -> None:
        answer_format = self.resolve_answer_format()
        for number, example in enumerate(self.few_shot, start=1):
            if not _is_str_dict(example) or {*example} != {"question", "answer"}:
                raise ValueError(f"few_shot, example {number}: must have a question and an answer, both text")
            if answer_format and extract_strict_answer(example["answer"], answer_format) is None:
                raise ValueError(
                    f"few_shot, example {number}: no answer in the form that is asked for, {answer_format}"
                )

    @property
    def is_local(self) -> bool:
        """Whether the data set is a local file or folder."""
        return Path(self.path).exists()

    def resolve_answer_format(self) -> str | None:
        """Return the format in which the prompt asks for the answer, or None if it asks for none."""
        return self.answer_format or detect_answer_format(self.instruction)

    def get_answer_parser(self) -> Callable[[str], ParsedGold]:
        """Return the function that reads gold answers."""
        return GOLD_PARSERS[self.parse] if self.pattern is None else make_regex_parser(self.pattern)

    def find_data_files(self) -> dict[str, Path]:
        """Return the local data files by split. If the data set is a single file, its split is ""."""
        path = Path(self.path)
        return {"": path} if path.is_file() else {split: path / name for split, name in self.splits.items()}

    def compute_version(self) -> str:
        """Return the version, a hash of the description, and the revision or a hash of the local data."""
        description = asdict(self) | {"path": Path(self.path).name if self.is_local else self.path}
        if self.test_fraction is None:
            del description["test_fraction"]
        if self.is_local:
            data = hash_json({split: hash_files([file]) for split, file in self.find_data_files().items()})
        else:
            data = (self.revision or "main")[:12]
        return f"{self.version}-{hash_json(description, 8)}@{data}"


def list_benchmarks() -> list[str]:
    """Return the names of the benchmarks that come with the package."""
    return sorted(path.stem for path in BENCHMARKS_DIR.glob("*.yaml"))


def load_task_config(name_or_path: str) -> TaskConfig:
    """Return the description of a benchmark by its name, or of a YAML file.

    Raises:
        ValueError: if there is no such benchmark or file, or the file is not a description.
    """
    if _is_yaml(name_or_path):
        return read_task_config(Path(name_or_path))
    if name_or_path in list_benchmarks():
        return _read_benchmark(name_or_path)
    raise ValueError(
        f"unknown task {name_or_path!r}: use one of {', '.join(list_benchmarks())}, digit_chains, "
        "reasoning_gym:FAMILY, or the path of a .jsonl, .csv, .json, .parquet or .yaml file"
    )


def find_hub_task_config(name_or_path: str) -> TaskConfig | None:
    """Return the description of a task whose data are on the hub. For other tasks and names return None."""
    is_described = _is_yaml(name_or_path) and Path(name_or_path).is_file()
    if not is_described and name_or_path not in list_benchmarks():
        return None
    task = load_task_config(name_or_path)
    return None if task.is_local else task


def _is_yaml(name_or_path: str) -> bool:
    return Path(name_or_path).suffix in (".yaml", ".yml")


@cache
def _read_benchmark(name: str) -> TaskConfig:
    return read_task_config(BENCHMARKS_DIR / f"{name}.yaml")


def read_task_config(path: Path) -> TaskConfig:
    """Read the description of a task from a YAML file.

    Raises:
        ValueError: if there is no such file, a key is unknown or missing, or `TaskConfig` refuses a value. The message
            begins with the path.
    """
    values = read_yaml(path)
    required = [item.name for item in fields(TaskConfig) if item.default is item.default_factory is MISSING]
    if not any(name in values for name in required):  # another file: say nothing of what is in it
        raise ValueError(f"{path} describes no task: it has none of {', '.join(required)}")
    try:
        if isinstance(values.get("few_shot"), str):
            values["few_shot"] = _read_few_shot_examples(path.parent, values["few_shot"])
        values = coerce_fields(values, [TaskConfig], source=path)
        if missing := [name for name in required if values.get(name) is None]:
            raise ValueError(f"{', '.join(missing)} must be given")
        with refuse_unreadable("path"):  # a null byte, or a name that is too long
            local_path = path.parent / values["path"]
            is_local = local_path.exists()
        task = TaskConfig(**values | {"path": str(local_path) if is_local else values["path"]})
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from error
    return replace(task, name=task.name or path.stem)


def _read_few_shot_examples(folder: Path, name: str) -> Any:
    with refuse_unreadable("few_shot"):
        path = folder / name
        # A description may be somebody else's, and its examples become part of prompts that others see.
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"few_shot: {name} leads out of the folder of the description")
        examples = read_yaml_value(path)
        if not isinstance(examples, list):
            raise ValueError(f"few_shot: {name} must hold a list, each with a question and an answer")
        return examples


# --- rows to problems -----------------------------------------------------------------------------


def load_task_problems(task: TaskConfig, split: str) -> list[Problem]:
    """Load the problems of one split.

    Raises:
        ValueError: if there is no such split or column, the data cannot be loaded, or a row has no question.
    """
    columns, rows = _load_rows(task, split)
    _check_columns(task, columns)
    version, parse = task.compute_version(), task.get_answer_parser()
    examples = tuple((example["question"], example["answer"]) for example in task.few_shot)
    problems = []
    for index, row in enumerate(rows):
        where = f"task {task.name!r}, row {index}"
        question = (_read_value(task.question, row, where) or "").strip()
        if not question:
            raise ValueError(f"{where}: the question is empty")
        if task.test_fraction is not None and assign_split(question, task.test_fraction) != split:
            continue
        text = _read_value(task.answer, row, where) or ""
        try:
            answer, solution = parse(text)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        problems.append(
            Problem(
                id=f"{task.name}/{split}/{index}",
                question=question,
                answer=answer,
                solution=_read_value(task.solution, row, where) if task.solution else solution,
                messages=_build_messages(task, question, row, where),
                task=str(task.name),
                level=_read_value(task.level, row, where) if task.level else None,
                task_version=version,
                answer_format=task.resolve_answer_format(),
                few_shot_examples=examples,
                stop_strings=tuple(task.stop_strings),
            )
        )
    return problems


def assign_split(question: str, test_fraction: float) -> str:
    """Return the split, "train" or "test", that a question belongs to, which depends on its text alone."""
    return "test" if hash_to_unit_interval(" ".join(question.split()).casefold()) < test_fraction else "train"


def _load_rows(task: TaskConfig, split: str) -> tuple[list[str], Sequence[Mapping[str, Any]]]:
    """Return the columns and the rows of a split of the data, before `test_fraction` divides them."""
    source_split = split
    if task.test_fraction is not None:
        if split not in ("train", "test"):
            raise ValueError(f"task {task.name!r} has the splits train, test, not {split!r}")
        source_split = next(iter(task.splits), "")
    elif task.splits and split not in task.splits:
        raise ValueError(f"task {task.name!r} has no split {split!r}: it has {', '.join(task.splits)}")
    elif not task.splits and split != ALL_PROBLEMS:
        _tell_of_one_split(str(task.name))
    if not task.is_local:
        advice = f"go online once to cache it, or pass the path of a local .jsonl file in place of {task.name!r}"
        with _refuse_data(f"task {task.name!r} could not be loaded from the hub data set {task.path!r}", advice):
            import datasets  # takes a second to import, and other kinds of tasks do not need it

            name = task.splits[source_split]
            rows = datasets.load_dataset(task.path, task.config, split=name, revision=task.revision)
            return rows.column_names, rows
    files = task.find_data_files()
    file = files.get(source_split) or files[""]
    if file.suffix not in _DATASET_BUILDERS:
        raise ValueError(f"task {task.name!r}: {file.name} must end in one of {', '.join(_DATASET_BUILDERS)}")
    with _refuse_data(f"task {task.name!r} could not be read from {task.path}"):
        if file.suffix == ".csv":
            return read_csv_file(file)
        import datasets

        rows = datasets.load_dataset(_DATASET_BUILDERS[file.suffix], data_files=str(file), split="train")
        return rows.column_names, rows


@contextmanager
def _refuse_data(what: str, advice: str = "") -> Iterator[None]:
    """Turn any error of the block into one line. Readers of data sets raise errors of many kinds."""
    try:
        yield
    except Exception as error:
        advice = f"; {advice}" if advice else ""
        raise ValueError(f"{what} ({format_error(error)}){advice}") from error


_TOLD_OF_ONE_SPLIT: set[str] = set()


def _tell_of_one_split(name: str) -> None:
    """Say once that a task in one piece has the same problems in every split."""
    if name not in _TOLD_OF_ONE_SPLIT:
        _TOLD_OF_ONE_SPLIT.add(name)
        logger.warning(
            "task %r is one file, so its train and test problems are the same; test_fraction: 0.2 in its description "
            "divides them",
            name,
        )


def _check_columns(task: TaskConfig, columns: Sequence[str]) -> None:
    names = [name for name in (task.solution, task.level) if name]
    for source in (task.question, task.answer):
        names += _list_template_variables(source) if _is_template(source) else [source]
    names += [name for name in _list_template_variables(task.prompt or "") if name not in ("question", "instruction")]
    if missing := [name for name in dict.fromkeys(names) if name not in columns]:
        raise ValueError(f"task {task.name!r}: no column {', '.join(missing)}; there are {', '.join(columns)}")


def _is_template(source: str) -> bool:
    return "{{" in source or "{%" in source


def _list_template_variables(template: str) -> list[str]:
    try:
        return list_variables(template)
    except TemplateFailure as error:
        raise ValueError(f"cannot read the template {template!r}: {error}") from error


def _read_value(source: str, row: Mapping[str, Any], where: str) -> str | None:
    """Return a column or a template of columns as text, None for a missing value."""
    if _is_template(source):
        return _render_template(source, row, where)
    try:
        return format_value(row[source])
    except ValueError as error:
        raise ValueError(f"{where}: column {source!r} {error}") from error


def _render_template(template: str, row: Mapping[str, Any], where: str) -> str:
    columns = {name: row[name] for name in _list_template_variables(template) if name in row}
    try:
        return render_columns(template, columns)
    except TemplateFailure as error:
        raise ValueError(f"{where}: the template {template!r} fails: {error}") from error


def _build_messages(
    task: TaskConfig, question: str, row: Mapping[str, Any], where: str
) -> tuple[dict[str, str], ...] | None:
    if task.prompt is not None:
        variables = {**row, "question": question, "instruction": task.instruction}
        return ({"role": "user", "content": _render_template(task.prompt, variables, where)},)
    return append_instruction(question, task.instruction) if task.instruction else None


def _is_str_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for item in value.items() for text in item)
