"""Shards: independent processes that share the problems of one output, without knowing of each other.

Shard I of N has the problems I, I + N, I + 2N, … of the data set. Every result depends on its problem and seed alone,
so the results of N shards are those of one process. Where results depend on those of other problems too, because these
share a budget, all problems of a budget are in one shard: it has the blocks I, I + N, … of the data set. A plan beside
the results says what all shards do together, so that whoever reads the results can name the shards that are missing.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nabla_trl.tasks.problem import Problem
from nabla_trl.utils.files import read_json_file, write_atomic

SHARD_HELP = (
    "Work on one of N equal shares of the problems, written I/N with I from 0 to N-1. Start one process per shard, on "
    "any machines and in any order, with the same other options. Shards may share an --output_dir or have one each. "
    "nabla-trl report and the training merge them (default: all problems)."
)


@dataclass(frozen=True)
class Shard:
    """Share `index` of `count` of the problems of an output. The default is all of them.

    Attributes:
        block_size: so many problems after each other stay together.
    """

    index: int = 0
    count: int = 1
    block_size: int = 1

    @classmethod
    def parse(cls, text: str | None, block_size: int = 1) -> Shard:
        """Return the shard of a text such as "2/8". None is the only shard, with all problems.

        Raises:
            ValueError: the text is not I/N with 0 <= I < N.
        """
        if text is None:
            return cls(block_size=block_size)
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if not match or not int(match[1]) < int(match[2]):
            raise ValueError(
                f"shard must be I/N with I from 0 to N-1, such as 0/4, 1/4, 2/4 and 3/4 for four shards, not {text!r}"
            )
        return cls(int(match[1]), int(match[2]), block_size)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def select(self, problems: Sequence[Problem]) -> list[Problem]:
        """Return the problems of this shard."""
        return [
            problem for number, problem in enumerate(problems) if number // self.block_size % self.count == self.index
        ]


@dataclass(frozen=True)
class ShardPlan:
    """What all shards of an output do together. Every shard writes the same plan.

    Attributes:
        problems: (task, id) of all problems, in the order in which they are shared out.
        methods: methods of an evaluation. Empty: traces.
        block_size: so many problems after each other are in the same shard.
    """

    num_shards: int
    problems: tuple[tuple[str, str], ...]
    seeds: tuple[int, ...]
    methods: tuple[str, ...] = ()
    block_size: int = 1

    @classmethod
    def build(
        cls, shard: Shard, problems: Sequence[Problem], seeds: Sequence[int], methods: Sequence[str] = ()
    ) -> ShardPlan:
        """Return the plan of a shard and all others."""
        keys = tuple((problem.task, problem.id) for problem in problems)
        return cls(shard.count, keys, tuple(seeds), tuple(methods), shard.block_size)

    @classmethod
    def read(cls, path: Path) -> ShardPlan:
        """Return the plan of a file.

        Raises:
            ValueError: the file holds no plan.
        """
        values = read_json_file(path)
        try:
            plan = cls(
                num_shards=int(values["num_shards"]),
                problems=tuple((str(task), str(problem_id)) for task, problem_id in values["problems"]),
                seeds=tuple(map(int, values["seeds"])),
                methods=tuple(map(str, values["methods"])),
                block_size=int(values.get("block_size", 1)),  # plans of earlier versions have none
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path} holds no plan of shards: delete it, and run a shard again") from error
        for name in ("num_shards", "block_size"):
            if getattr(plan, name) < 1:
                raise ValueError(f"{path} holds no plan of shards: {name} is {getattr(plan, name)}")
        return plan

    def write(self, path: Path) -> None:
        """Write the plan as JSON. A plan of other problems is never replaced, because their shards would be forgotten.

        Raises:
            ValueError: the file holds a plan of other problems.
            OSError: the file cannot be written.
        """
        planned = ShardPlan.read(path).problems if path.exists() else self.problems
        if planned != self.problems:
            count = len(self.problems) if len(self.problems) != len(planned) else "other ones"
            raise ValueError(
                f"{path} plans shards of {len(planned)} problems, and this command has {count}: give every shard the "
                "same data set, split and --max_problems, or delete that file to plan anew"
            )
        write_atomic(path, json.dumps(asdict(self), ensure_ascii=False))

    def describe_missing(self, finished: Collection[tuple[str, str]]) -> str:
        """Return which shards lack how many results, and an empty text if none does.

        Args:
            finished: (task, id) of the problems that have all results.
        """
        owners = [number // self.block_size % self.num_shards for number in range(len(self.problems))]
        totals = Counter(owners)
        counts = Counter(owner for owner, key in zip(owners, self.problems, strict=True) if key not in finished)
        return ", ".join(
            f"shard {index}/{self.num_shards} ({counts[index]} of {totals[index]} problems)"
            for index in sorted(counts)
        )


def list_run_folders(run_dir: Path) -> list[Path]:
    """Return the folder of a run, and the folders of its shards inside it. Shards may also share the run's folder."""
    plans = [path for pattern in ("*/traces/shards-*.json", "*/rows/shards.json") for path in run_dir.glob(pattern)]
    return [run_dir, *sorted({path.parent.parent for path in plans})]


def read_shard_plan(paths: Iterable[Path]) -> ShardPlan | None:
    """Return the plan that the files hold, or None if none of them exists.

    Raises:
        ValueError: the files hold different plans.
    """
    plans = {path: ShardPlan.read(path) for path in paths if path.exists()}
    for path, plan in plans.items():
        if plan != next(iter(plans.values())):
            raise ValueError(
                f"{path} holds another plan of shards than {next(iter(plans))}: give all shards the same --shard N, "
                "data set, --max_problems, seeds and methods"
            )
    return next(iter(plans.values()), None)


def check_same_settings(run_folders: Iterable[Path], pattern: str) -> None:
    """Refuse shards in folders of their own that were made with different settings.

    Args:
        pattern: glob pattern of the settings files in each folder.
    """
    first: dict[str, Path] = {}
    for folder in run_folders:
        for path in sorted(folder.glob(pattern)):
            other = first.setdefault(path.name, path)
            values, other_values = read_json_file(path), read_json_file(other)
            names = [name for name in {**values, **other_values} if values.get(name) != other_values.get(name)]
            if names:
                raise ValueError(f"{path} and {other} differ in {', '.join(names)}: they are shards of different runs")
