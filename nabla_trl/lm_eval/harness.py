"""The model that lm-eval evaluates: every generated answer is searched. This module does not import lm-eval.

A task of lm-eval is to this package a task, and a request a problem named TASK/DOCUMENT. So a method costs here what
it costs in `nabla-trl eval`, and the log of a run is an evaluation that `nabla-trl report` reads.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

from nabla_trl.audit.overoptimization import warn_past_limits
from nabla_trl.baselines.config import BaselineConfig
from nabla_trl.engine.logprobs import compute_token_logprobs
from nabla_trl.evaluation.lm_eval_logs import read_lm_eval_rows
from nabla_trl.evaluation.method import METHOD_SYNTAX, Method, get_max_selection_size, has_search
from nabla_trl.evaluation.plan import EvaluationSetup, check_methods, get_baseline_settings, plan_jobs
from nabla_trl.evaluation.results import load_results, store_results
from nabla_trl.evaluation.rows import Row, RowStore, build_row, read_rows
from nabla_trl.evaluation.runner import compute_mean_flops
from nabla_trl.models.loading import get_dtype_name, load_policy, set_trust_remote_code
from nabla_trl.models.options import PromptOptions
from nabla_trl.models.policy import Policy
from nabla_trl.models.vllm_backend import connect_vllm
from nabla_trl.rewards.loading import load_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.rewards.spec import compute_reward_identity
from nabla_trl.search.config import SearchConfig
from nabla_trl.serving.answers import cut_at_stop_string
from nabla_trl.tasks.problem import Problem, compute_content_hash
from nabla_trl.traces.build import describe_hardware, get_package_versions
from nabla_trl.traces.schema import Trace
from nabla_trl.utils.fields import format_suggestion
from nabla_trl.utils.identity import check_settings, claim_settings, hash_json, identify_adapter

logger = logging.getLogger(__name__)

TOKEN_LIMIT_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is set
SAMPLING_NAMES = ("temperature", "top_p", "top_k", "min_p")
# Generation options that are accepted only with these values, which ask for nothing.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "length_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "typical_p": (1,),
    "use_cache": (True, False),
    "skip_special_tokens": (True,),
}
SETTINGS_FILE = "lm_eval.settings.json"


@dataclass(frozen=True)
class GenerationOptions:
    """What a task asks of the generation of an answer.

    Attributes:
        until: strings that end an answer, and are no part of it.
        max_new_tokens: longest answer in tokens. None: the task does not say.
        sampling: the sampling options that the task sets. Empty where the task asks for greedy decoding.
    """

    until: tuple[str, ...]
    max_new_tokens: int | None
    sampling: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, values: Mapping[str, Any], task: str) -> GenerationOptions:
        """Read the generation_kwargs of a task, with the names that lm-eval's models take.

        Raises:
            ValueError: options that the search does not support, or values of another type. The message has all.
        """
        remaining = {name: value for name, value in values.items() if value is not None}
        until = remaining.pop("until", [])
        until = [until] if isinstance(until, str) else until
        limits = [remaining.pop(name) for name in TOKEN_LIMIT_NAMES if name in remaining]
        do_sample = remaining.pop("do_sample", None)
        sampling = {name: remaining.pop(name) for name in SAMPLING_NAMES if name in remaining}
        mistakes = [
            f"{name}={value}" for name, value in remaining.items() if value not in NEUTRAL_VALUES.get(name, ())
        ]
        mistakes += [f"{name}={value!r}" for name, value in sampling.items() if not isinstance(value, int | float)]
        mistakes += [f"max_gen_toks={limit!r}" for limit in limits if not isinstance(limit, int) or limit < 1]
        if not isinstance(until, list) or not all(isinstance(string, str) for string in until):
            mistakes.append(f"until={until!r}")
        if mistakes:
            raise ValueError(f"task {task}: model nabla does not support generation_kwargs {', '.join(mistakes)}")
        # As in lm-eval, a task samples if it says so, or if it says nothing and has a temperature.
        samples = sampling.get("temperature") != 0 and (bool(sampling) if do_sample is None else do_sample)
        return cls(
            until=tuple(dict.fromkeys(string for string in until if string)),
            max_new_tokens=limits[0] if limits else None,
            sampling=tuple(sorted((name, float(value)) for name, value in sampling.items())) if samples else (),
        )


@dataclass(frozen=True)
class HarnessRequest:
    """A prompt of lm-eval that asks for one answer.

    Attributes:
        task: name of the task.
        document: number of the document in the task, and of its prompt if it has several.
        repeat: 0 for the first answer to the prompt, 1 for the next independent one, and so on.
        prompt: the text, in which the chat template is already written.
        generation_kwargs: as the task has them.
    """

    task: str
    document: str
    repeat: int
    prompt: str
    generation_kwargs: Mapping[str, Any]

    @property
    def problem_id(self) -> str:
        return f"{self.task}/{self.document}" + (f"/repeat-{self.repeat}" if self.repeat else "")


class HarnessModel:
    """A policy, a reward and a method that answer the prompts of lm-eval.

    Args:
        method: what `nabla-trl eval` calls a method, of the base policy: nabla, control, greedy, best_of_16, …
        config: configuration of the search and of the sampling.
        fixed_options: names of the options of `config` that the user set. A task may not set them otherwise.
        chat_template_kwargs: keywords of the chat template.
        log_dir: folder of the log. None: no log.
        settings: what the rows of the log depend on beside `config`, such as the names of the models.
        rank: number of this process.

    Attributes:
        rows: the row of every answer of this process, with its cost.
        wait_for_all: called after the answers and before the log is written. It waits for the other processes.
        loglikelihood_flops: FLOPs of scoring texts, which has no rows.

    Raises:
        ValueError: a method that cannot run here, or a log of other settings.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        *,
        method: str = "nabla",
        config: SearchConfig | None = None,
        baseline_config: BaselineConfig | None = None,
        seed: int = 0,
        fixed_options: Iterable[str] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        log_dir: str | Path | None = None,
        settings: Mapping[str, str] | None = None,
        rank: int = 0,
    ):
        self.policy, self.reward, self.method, self.seed = policy, reward, check_method(method), seed
        self.config, self.baseline_config = config or SearchConfig(), baseline_config or BaselineConfig()
        if self.config.max_flops and not self.method.is_search:
            raise ValueError(f"max_flops limits searches, and {method} is none: its cost follows from its name")
        check_methods([method], self._build_setup(self.config), {})
        self.fixed_options, self.chat_template_kwargs = frozenset(fixed_options), dict(chat_template_kwargs or {})
        self.rows: list[Row] = []
        self.wait_for_all: Callable[[], None] = lambda: None
        self.loglikelihood_flops = 0.0
        self._chats: dict[str, list[dict[str, str]]] = {}
        self._store: RowStore | None = None
        self._log_dir = None if log_dir is None else Path(log_dir)
        settings = {
            "policy": policy.name,
            "reward": reward.name,
            **self.config.get_settings(),
            "chat_template_kwargs": json.dumps(self.chat_template_kwargs, sort_keys=True),
            **(settings or {}),
        }
        self.settings_hash = hash_json(settings, length=16)
        if self._log_dir:
            self._store = self._open_log(self._log_dir, settings, rank)
        elif self.method.budget:
            raise ValueError(
                f"{method} runs at the FLOPs of {self.method.budget_reference}: run that method with log=FOLDER "
                "first, then this one with the same log"
            )

    @classmethod
    def load(
        cls,
        *,
        policy: str,
        reward: str,
        preset: str = "default",
        method: str = "nabla",
        adapter: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        vllm_url: str | None = None,
        trust_remote_code: bool = False,
        chat_template_kwargs: str | Mapping[str, Any] | None = None,
        enable_thinking: bool | None = None,
        log: str | None = None,
        seed: int = 0,
        rank: int = 0,
        **options: Any,
    ) -> HarnessModel:
        """Load the models that model_args name.

        Args:
            policy, reward, adapter, dtype, device, vllm_url: as the options of `nabla-trl eval`.
            preset: named configuration that the options change.
            method: see `HarnessModel`.
            chat_template_kwargs: keywords of the chat template, as a JSON object.
            enable_thinking: a keyword of many chat templates.
            log: folder of the log.
            options: options of `SearchConfig` and `BaselineConfig`. A dot names an option of a group, as in
                solver.step_size.

        Raises:
            ValueError: unknown options, values out of range, or models that cannot be loaded.
        """
        check_method(method)  # before anything is loaded
        config, baseline_config = build_configs(preset, options)
        keywords = PromptOptions.parse("auto", _to_json(chat_template_kwargs)).chat_template_kwargs
        if enable_thinking is not None:
            keywords = {**keywords, "enable_thinking": enable_thinking}
        set_trust_remote_code(trust_remote_code)
        dtype = get_dtype_name(dtype, device)
        loaded = load_policy(
            policy,
            dtype=dtype,
            device=device,
            adapter=adapter,
            prompt_options=PromptOptions(chat_template_kwargs=keywords),
        )
        if vllm_url:
            loaded = connect_vllm(loaded, vllm_url)
        batch_size = 4 * config.batch_size
        loaded_reward = load_reward(reward, policy=loaded, dtype=dtype, device=device, batch_size=batch_size)
        warn_past_limits(loaded_reward, config if has_search([method]) else None, get_max_selection_size([method]))
        settings = {"policy": policy, "reward": compute_reward_identity(reward), "dtype": dtype}
        settings |= {"adapter": identify_adapter(adapter)} if adapter else {}
        return cls(
            loaded,
            loaded_reward,
            method=method,
            config=config,
            baseline_config=baseline_config,
            seed=seed,
            fixed_options={name.partition(".")[0] for name in options},
            chat_template_kwargs=keywords,
            log_dir=log,
            settings=settings | ({"sampler": "vllm"} if vllm_url else {}),
            rank=rank,
        )

    # --- text and tokens ------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Return the ids of a text. Control tokens in it are read as such, because a chat template wrote them.

        Args:
            add_special_tokens: None adds those of the tokenizer, unless the text begins with the BOS token.
        """
        tokenizer = self.policy.tokenizer
        if add_special_tokens is None:
            add_special_tokens = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
        return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def render_chat(self, chat: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a chat as the policy's template writes it, and remember its turns for the reward.

        Args:
            add_generation_prompt: begin the assistant's turn. False: the last message is the beginning of that turn.

        Raises:
            ValueError: the policy has no chat template, or the template refuses the chat.
        """
        tokenizer = self.policy.tokenizer
        if tokenizer.chat_template is None:
            raise ValueError(f"{self.policy.name} has no chat template: leave out --apply_chat_template")
        try:
            text = tokenizer.apply_chat_template(
                chat,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self.chat_template_kwargs,
            )
        except Exception as error:  # a template may raise anything
            raise ValueError(f"the chat template of {self.policy.name} refuses the messages: {error}") from error
        self._chats[text] = [dict(message) for message in chat]
        return text

    # --- answers --------------------------------------------------------------------------------------

    def generate(
        self, requests: Sequence[HarnessRequest], on_answer: Callable[[HarnessRequest, str], None] | None = None
    ) -> list[str]:
        """Return the answer to each request. The answers do not depend on the order or the batches.

        A request that cannot be run has an empty answer. A warning counts these, and their rows say why.

        Args:
            on_answer: called with each answer as soon as it is there.

        Raises:
            ValueError: what a task asks for is not supported, or no request can be run. Before any work where
                possible.
        """
        groups: dict[tuple[str, int | None, tuple[tuple[str, float], ...]], list[HarnessRequest]] = {}
        problems: dict[str, Problem] = {}
        for request in requests:
            options = GenerationOptions.parse(request.generation_kwargs, request.task)
            problems[request.problem_id] = self._build_problem(request, options)
            groups.setdefault((request.task, options.max_new_tokens, options.sampling), []).append(request)
        setups = {key: self._build_setup(self._build_config(*key)) for key in groups}
        self._check_log(problems)
        answers: dict[str, str] = {}
        for key, group in groups.items():
            for trace, request in self._run(group, problems, setups[key]):
                answers[request.problem_id] = self._get_answer(trace, problems[request.problem_id])
                if on_answer:
                    on_answer(request, answers[request.problem_id])
        self._finish(requests)
        return [answers[request.problem_id] for request in requests]

    def _run(
        self, group: Sequence[HarnessRequest], problems: Mapping[str, Problem], setup: EvaluationSetup
    ) -> Iterable[tuple[Trace, HarnessRequest]]:
        """Yield the trace of each request, and log the rows of each batch."""
        unique = list({request.problem_id: request for request in group}.values())
        [job] = plan_jobs([str(self.method)], setup, {}, lambda reference: self._get_flops(reference, unique))
        for begin in range(0, len(unique), max(1, job.batch_size)):
            batch = unique[begin : begin + max(1, job.batch_size)]
            traces = job.run([problems[request.problem_id] for request in batch], job.seeds[0])
            rows = [
                build_row(trace, self.settings_hash, content_hash=compute_content_hash(problems[trace.problem_id]))
                for trace in traces
            ]
            self.rows += rows
            if self._store:
                self._store.append(rows)
            yield from zip(traces, batch, strict=True)

    def _build_problem(self, request: HarnessRequest, options: GenerationOptions) -> Problem:
        """Return a request as a problem. A reward with its own chat template reads the turns of the prompt."""
        chat = self._chats.get(request.prompt)
        if chat and chat[-1]["role"] == "assistant":
            raise ValueError(
                f"task {request.task} begins the assistant's turn itself (gen_prefix), which a reward cannot read"
            )
        ids = self.encode(request.prompt)
        return Problem(
            id=request.problem_id,
            question=chat[-1]["content"] if chat else self.policy.decode(ids),
            messages=tuple(chat) if chat else None,
            task=request.task,
            # Rows of other generation options are rows of another version of the task.
            task_version=hash_json([options.max_new_tokens, options.sampling]),
            stop_strings=options.until,
            prompt_ids=tuple(ids),
        )

    def _build_config(self, task: str, max_new_tokens: int | None, sampling: tuple[tuple[str, float], ...]) -> Any:
        """Return the configuration for what a task asks."""
        changes: dict[str, Any] = {name: int(value) if name == "top_k" else value for name, value in sampling}
        if changes and self.method.name == "greedy":
            raise ValueError(f"task {task} samples ({_format(changes)}), and method greedy does not: use best_of_1")
        fixed = [
            name for name in changes if name in self.fixed_options and changes[name] != getattr(self.config, name)
        ]
        if fixed:
            raise ValueError(
                f"task {task} sets {_format({name: changes[name] for name in fixed})}, and model_args set "
                f"{_format({name: getattr(self.config, name) for name in fixed})}: leave one of them out"
            )
        if max_new_tokens is not None:
            changes["max_new_tokens"] = max_new_tokens
        return replace(self.config, **changes) if changes else self.config

    def _build_setup(self, config: SearchConfig) -> EvaluationSetup:
        return EvaluationSetup(self.policy, self.reward, config, (self.seed,), baseline_config=self.baseline_config)

    def _get_answer(self, trace: Trace, problem: Problem) -> str:
        """Return the text before the first stop string, also where that string is a special token."""
        special = set(self.policy.tokenizer.all_special_ids)
        stop_ids = set(self.policy.tokenizer.convert_tokens_to_ids(list(problem.stop_strings))) & special
        end = next((index for index, token in enumerate(trace.response_ids) if token in stop_ids), None)
        text = trace.response if end is None else self.policy.decode(list(trace.response_ids[:end]))
        return cut_at_stop_string(text, problem.stop_strings)

    # --- the log --------------------------------------------------------------------------------------

    def _open_log(self, folder: Path, settings: Mapping[str, str], rank: int) -> RowStore:
        with _naming_log():
            check_settings(folder / SETTINGS_FILE, settings)
            store = RowStore(folder / "rows", self.settings_hash, rank)
            claim_settings(folder / SETTINGS_FILE, settings)
            for name, own in get_baseline_settings([str(self.method)], self._build_setup(self.config)).items():
                claim_settings(folder / f"{name}.settings.json", own)
        return store

    def _get_flops(self, reference: str, requests: Sequence[HarnessRequest]) -> float:
        """Return the mean FLOPs of the method that sets the budget, on the task of these requests."""
        assert self._store is not None  # a method with a budget needs a log
        task = requests[0].task
        rows = [row for row in self._store.read() if row.task == task and row.method == reference]
        missing = {request.problem_id for request in requests} - {row.problem for row in rows}
        if missing:
            raise ValueError(
                f"{self.method} runs at the FLOPs of {reference}, and {self._log_dir} lacks its rows of "
                f"{len(missing)} of {len(requests)} prompts of {task}: run method={reference} with this log first"
            )
        return compute_mean_flops(rows, reference)

    def _check_log(self, problems: Mapping[str, Problem]) -> None:
        """Refuse a log with rows of the same name and of other prompts, before any work."""
        if self._store:
            with _naming_log():
                self._store.find_missing([str(self.method)], list(problems.values()), self.seed)

    def _finish(self, requests: Sequence[HarnessRequest]) -> None:
        """Warn about requests that failed, and write the log as an evaluation that a report can read."""
        self.wait_for_all()
        asked = {request.problem_id for request in requests}
        failed = [row for row in self.rows if row.error and row.problem in asked]
        if failed and len(failed) == len(asked):
            raise ValueError(f"no request could be run: {failed[0].error}")
        if failed:
            logger.warning("%d of %d answers are empty. The first: %s", len(failed), len(asked), failed[0].error)
        if self._store and self._log_dir and self._store.rank == 0:
            rows, path = self._store.read(), self._log_dir / "rows.jsonl"
            verdicts = {row.key: row.correct for row in (read_rows(path) if path.exists() else ())}  # of `grade_log`
            graded = [replace(row, correct=verdicts.get(row.key)) for row in rows]
            store_results(self._log_dir, graded, self._build_facts(rows))

    def _build_facts(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {
            "title": "lm-eval",
            "command": "lm_eval --model nabla",
            "policy": self.policy.name,
            "reward": self.reward.name,
            "task": ", ".join(sorted({row.task for row in rows})),
            "reward_kind": "",
            "versions": get_package_versions(),
            "hardware": describe_hardware(),
            "revisions": {},
            "seeds": sorted({row.seed for row in rows}),
            "sampling": vars(self.config.get_sampling()),
            "problems": {},
        }

    def summarize(self, rows: Sequence[Row] | None = None) -> dict[str, Any]:
        """Return what lm-eval writes beside its results: method, seed, options, and mean costs by task.

        Args:
            rows: those of all processes (default: those of this process).
        """
        rows = self.rows if rows is None else rows
        costs = {}
        for task in dict.fromkeys(row.task for row in rows):
            own = [row for row in rows if row.task == task]
            costs[task] = {
                "answers": len(own),
                "flops_per_answer": sum(row.flops for row in own) / len(own),
                "seconds_per_answer": sum(row.seconds for row in own) / len(own),
                "tokens_per_answer": {
                    name: sum(row.tokens.get(name, 0) for row in own) / len(own)
                    for name in sorted({name for row in own for name in row.tokens})
                },
                "unfinished": sum(not row.finished and row.error is None for row in own) / len(own),
                "errors": sum(row.error is not None for row in own),
            }
        return {
            "method": str(self.method),
            "policy": self.policy.name,
            "reward": self.reward.name,
            "seed": self.seed,
            "search": self.config.get_settings(),
            "costs": costs,
            "loglikelihood_flops": self.loglikelihood_flops,
        }

    # --- likelihoods ----------------------------------------------------------------------------------

    def score(self, context_ids: Sequence[int], continuation_ids: Sequence[int]) -> tuple[float, bool]:
        """Return log π of a continuation (in nats), and whether greedy decoding would write it. No search is involved.

        A context that is too long loses its beginning.

        Raises:
            ValueError: the continuation is empty or fills the context.
        """
        length = len(continuation_ids)
        if not 0 < length < self.policy.context_length:
            raise ValueError(
                f"a text to score has {length} tokens: it must have from 1 to {self.policy.context_length - 1}"
            )
        ids = [*context_ids, *continuation_ids][-self.policy.context_length :]
        self.loglikelihood_flops += self.policy.size.compute_forward_flops(0, len(ids))
        scored = compute_token_logprobs(self.policy, ids, 1)
        logprobs = [value for value in scored.logprobs[-length:] if value is not None]
        is_greedy = all(top[0][0] == token for top, token in zip(scored.top[-length:], ids[-length:], strict=True))
        return sum(logprobs), is_greedy


def check_method(name: str) -> Method:
    """Return a method that gives one answer per prompt with the base policy.

    Raises:
        ValueError: no such method.
    """
    method = Method.parse(name)
    if not method.is_runnable or method.policy or method.num_samples or method.is_allocated:
        raise ValueError(f"method {name!r} cannot answer lm-eval: choose from {METHOD_SYNTAX}")
    return method


def build_configs(preset: str, options: Mapping[str, Any]) -> tuple[SearchConfig, BaselineConfig]:
    """Return the configurations of model_args.

    Args:
        options: options of `SearchConfig` and `BaselineConfig`. A dot names an option of a group.

    Raises:
        ValueError: unknown options, each with the most similar one, or values out of range.
    """
    baseline_names = {field.name for field in fields(BaselineConfig)}
    baseline_options = {name: value for name, value in options.items() if name in baseline_names}
    search_options: dict[str, Any] = {}
    for name, value in options.items():
        group, _, option = name.partition(".")
        if name in baseline_names:
            continue
        if option or isinstance(search_options.get(name), dict):
            present = search_options.get(group, {})
            present = present if isinstance(present, dict) else {"name": present}
            search_options[group] = present | ({option: value} if option else {"name": value})
        else:
            search_options[name] = value
    known = {field.name for field in fields(SearchConfig)} | baseline_names
    known |= signature(HarnessModel.load).parameters.keys() - {"rank", "options"}
    unknown = [f"{name!r}{format_suggestion(name, known)}" for name in search_options if name not in known]
    if unknown:
        raise ValueError(f"model_args: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return SearchConfig.from_preset(preset, **search_options), BaselineConfig(**baseline_options)


def grade_log(
    log_dir: str | Path, samples: str | Path, *, method: str, metric: str = "", filter_name: str = ""
) -> int:
    """Give the rows of a log the verdicts of lm-eval, so that `nabla-trl report` compares methods by them.

    Args:
        log_dir: folder that model_args named as `log`.
        samples: folder that lm-eval wrote with --output_path and --log_samples.
        method: the method whose answers these are.
        metric: name of the metric (default: the first of the task).
        filter_name: name of the filter (default: the first of the task).

    Returns:
        the number of rows that have a verdict now.

    Raises:
        ValueError: no rows of the method, no samples of its tasks, or a metric that is no number from 0 to 1.
    """
    rows, facts = load_results(Path(log_dir))
    tasks = dict.fromkeys(row.task for row in rows if row.method == method)
    if not tasks:
        methods = ", ".join(dict.fromkeys(row.method for row in rows))
        raise ValueError(f"{log_dir} has no rows of {method}: its methods are {methods}")
    verdicts = {
        f"{task}/{row.problem.partition('/')[0]}": row.correct
        for task in tasks
        for row in read_lm_eval_rows(Path(samples), method, task=task, metric=metric, filter_name=filter_name)
    }
    graded = [
        replace(row, correct=verdicts[row.problem]) if row.method == method and row.problem in verdicts else row
        for row in rows
    ]
    store_results(Path(log_dir), graded, facts)
    return sum(row.method == method and row.problem in verdicts for row in rows)


@contextmanager
def _naming_log() -> Iterator[None]:
    """Name the option log in errors, which is --output_dir elsewhere."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("--output_dir", "log")) from error


def _to_json(value: str | Mapping[str, Any] | None) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _format(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())
