"""The stage train: one trained policy per method, on traces or on problems, in the folder of a run."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.loading import (
    DTYPES,
    describe_dtype,
    get_dtype_name,
    get_saved_folder_name,
    load_policy,
    trusting_remote_code,
    unwrap_model,
)
from nabla_trl.models.options import PromptOptions
from nabla_trl.models.policy import Policy
from nabla_trl.pipeline.models import ModelPair, PolicySource, RewardSource, check_model_options
from nabla_trl.pipeline.problems import ProblemSet, collect_problems
from nabla_trl.planning.machine import Machine, choose_batches
from nabla_trl.planning.preflight import check_output_dir, collect_model_faults, list_frozen_models
from nabla_trl.planning.training import collect_training_faults
from nabla_trl.rewards.function import is_reward_function
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig, make_search_config
from nabla_trl.tasks.problem import Problem
from nabla_trl.tasks.registry import Problems
from nabla_trl.traces.datasets import build_soft_target_rows
from nabla_trl.traces.schema import Trace
from nabla_trl.traces.storage import TRACES_DIR, TraceWriter, list_trace_files, read_traces
from nabla_trl.training.offline import (
    GROUP_METHODS,
    OFFLINE_METHODS,
    ON_POLICY,
    ONLINE_METHODS,
    SOFT_TARGETS,
    TRAIN_METHODS,
    TrainingResult,
    TrainOptions,
)
from nabla_trl.training.peft import LoraArguments
from nabla_trl.training.reporting import check_reporting
from nabla_trl.training.stage import TrainStage
from nabla_trl.training.trainers import check_amounts, check_seeds
from nabla_trl.training.trl_options import TrainerConfig, TrlOptions, collect_trl_options, list_trl_faults
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import check_choices, coerce_fields
from nabla_trl.utils.files import read_json_file
from nabla_trl.utils.formatting import pluralize
from nabla_trl.utils.locks import lock_folder

logger = logging.getLogger(__name__)

# PEFT's names of the options of `LoraArguments`.
_PEFT_NAMES = {"r": "lora_r", "target_modules": "lora_target_modules"}


def train(
    method: str,
    policy: PolicySource,
    traces_or_problems: Iterable[Trace] | Problems,
    *,
    output_dir: str | Path,
    reward: RewardSource | None = None,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    config: SFTConfig | Mapping[str, Any] | None = None,
    lora: LoraArguments | Mapping[str, Any] | Any = None,
    search: SearchConfig | Mapping[str, Any] | str | None = None,
    split: str = "train",
    max_problems: int | None = None,
    **model_options: Any,
) -> TrainingResult:
    """Train a policy on traces (sft, reward-weighted, dpo, soft-targets) or on problems, with TRL's trainers.

    The weights are in `output_dir`/trained/METHOD/adapter, or …/model for full weights. The same call continues an
    interrupted training, and returns the record of a finished one. Several processes may make the call together, under
    `accelerate launch`.

    Args:
        method: "sft", "reward-weighted", "dpo" or "soft-targets" on traces, "rloo", "grpo" or "on-policy-distillation"
            on problems.
        policy: hub id or folder of a causal LM, a model in memory, or a `Policy`. A model in memory is written to
            `output_dir`, where the trained adapter finds it again, and stays as it is.
        traces_or_problems: for methods on traces, a list of `Trace` or the folder of a run that holds traces/. For
            the others, what `load_problems` takes.
        output_dir: folder of the run.
        reward: what rloo and grpo maximize (see `load_reward`). A function is enough, since no gradient is needed.
            on-policy-distillation follows its gradient.
        tokenizer: tokenizer of a model in memory, or its name. None: that of the model's name.
        config: options of the training, by name: those of TRL's `SFTConfig` and of the trainer of the method
            (learning_rate, num_train_epochs, label_smoothing, …), and of `TrainOptions` (tuning, sft_selection,
            num_generations, …). Or an `SFTConfig`. None: defaults, which the log says.
        lora: options of the adapter: `LoraArguments`, a mapping of its options, or PEFT's `LoraConfig`.
        search: β, and how methods on problems sample (beta, temperature, max_new_tokens, …). The teacher of
            on-policy-distillation is the step of its solver. None: for traces of a folder the β that they were made
            with.
        split: split of a task's name.
        max_problems: maximum number of problems. None: all.
        model_options: options of `ModelPair`, such as dtype and device.

    Returns:
        The record of the training: rows, steps, tokens, FLOPs, seconds and loss.

    Raises:
        ValueError: an unknown method or option, traces for a method on problems or problems for a method on traces, a
            model that cannot be trained, or `output_dir` was trained with other settings. What can be checked is
            checked before anything is loaded.
    """
    check_model_options(model_options, train)
    if unused := [name for name in ("adapter", "vllm_url", "audit_file") if model_options.get(name)]:
        raise ValueError(f"train takes no {', '.join(unused)}: to train an adapter further, give its folder as policy")
    is_named = isinstance(policy, str | Path | None) or isinstance(reward, str | Path | Mapping)
    if placed := [name for name in ("dtype", "device") if model_options.get(name) and not is_named]:
        raise ValueError(f"{' and '.join(placed)}: nothing is loaded by name here, so convert the model before")
    state = PartialState() if PartialState._shared_state else PartialState(cpu=not torch.cuda.is_available())
    options, sft_config, trl_options, given = _split_config(
        config, Path(output_dir), Machine.detect(state), _get_dtype(policy, model_options.get("dtype"), state)
    )
    call = TrainingCall(
        methods=[method],
        policy=policy,
        traces=traces_or_problems if method in OFFLINE_METHODS else None,
        problems=traces_or_problems if method in ONLINE_METHODS else None,
        output_dir=Path(output_dir),
        reward=reward,
        tokenizer=tokenizer,
        options=options,
        sft_config=sft_config,
        trl_options=trl_options,
        lora=_make_lora(lora),
        search_config=make_search_config(search),
        given_options=given,
        split=split,
        max_problems=max_problems,
        model_options=model_options,
        command=f"nabla_trl.train({method!r}, …)",
    )
    return call.run(logger.info)[method]


@dataclass
class TrainingCall:
    """A call of the stage train, from Python or the shell.

    Attributes:
        methods: training methods.
        traces: traces, or the folder of a run that holds them. None: those of `output_dir`.
        problems: what `load_problems` takes, for methods on problems. None: no such method is trained.
        sft_config: options of the trainer.
        trl_options: further options of TRL's trainers (see `collect_trl_options`).
        given_options: the options that were given, as a YAML file can hold them.
        model_options: options of `ModelPair`.
        command: what is stored with the weights as the command that made them.
        problem_set: problems that `collect_faults` has read.
        stage: what `collect_faults` or `run` has made of all this.
    """

    methods: Sequence[str]
    policy: PolicySource
    traces: Any
    problems: Any
    output_dir: Path
    reward: RewardSource | None
    tokenizer: Any
    options: TrainOptions
    sft_config: Any
    trl_options: Mapping[str, Any]
    lora: LoraArguments
    search_config: SearchConfig
    given_options: Mapping[str, Any]
    split: str
    max_problems: int | None
    model_options: Mapping[str, Any]
    command: str
    problem_set: ProblemSet | None = field(default=None, init=False)
    stage: TrainStage | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self._has_traces_in_memory():
            self.traces = list(self.traces)

    def collect_faults(self, checks: Checks) -> None:
        """Collect everything that would stop the call later. Nothing is loaded or written.

        A policy in memory is written to the folder of the run first, so what needs its files is checked in `run`.
        """
        with trusting_remote_code(self.model_options.get("trust_remote_code")):
            self._collect_faults(checks)

    def _collect_faults(self, checks: Checks) -> None:
        self._collect_method_faults(checks)
        traces_run_dir, policy = self.output_dir, ""
        with checks.collect():
            traces_run_dir = self._find_traces_run_dir()
            if self._has_named_policy():
                policy = self._find_policy_name(traces_run_dir)
        with checks.collect():
            self.problem_set = self._collect_problems()
        policy = policy or str(self.policy or "") if self._has_named_policy() else ""
        options, is_online = self.model_options, self.problems is not None
        device = options.get("device")
        dtype = get_dtype_name(options.get("dtype"), PartialState().device if device is None else device)
        with checks.collect():
            collect_model_faults(
                checks,
                policy=policy,
                reward=str(self.reward) if is_online and isinstance(self.reward, str | Path) else "",
                dtype=dtype,
                device=None if device is None else str(device),
                prompt_options=options.get("prompt_options"),
                vllm_url=options.get("vllm_url") if is_online else None,
                problems=self.problem_set.problems[:100] if self.problem_set is not None else [],
                max_new_tokens=self.search_config.max_new_tokens if is_online else 0,
            )
        if self._has_named_policy():
            with checks.collect():
                stage = self._build_stage(traces_run_dir, checks, policy, policy, dtype)
                self._collect_stage_faults(checks, stage)
                self.stage = stage

    def run(self, say: Callable[[str], None]) -> dict[str, TrainingResult]:
        """Train a policy per method, after `collect_faults` found nothing. Returns the records by method.

        Args:
            say: prints a line about what was chosen or done.

        Raises:
            ValueError: as `train`.
        """
        checks, state = Checks(), PartialState()
        if self.stage is None:
            self.collect_faults(checks)
            checks.raise_faults()
        with ExitStack() as stack:
            with state.main_process_first():
                stack.enter_context(lock_folder(self.output_dir, state.process_index))
                if self._has_traces_in_memory() and state.is_main_process:
                    _store_traces(list(self.traces), self.output_dir)
            if self.stage is None:
                with trusting_remote_code(self.model_options.get("trust_remote_code")):
                    source, name, dtype = self._write_policy(state)
                    self.stage = self._build_stage(self._find_traces_run_dir(), checks, source, name, dtype)
                    self._collect_stage_faults(checks, self.stage)
                checks.raise_faults()
            stack.enter_context(self.stage.checker)
            return run_training(self.stage, self.methods, say)

    def _has_named_policy(self) -> bool:
        return self.policy is None or isinstance(self.policy, str | Path)

    def _has_traces_in_memory(self) -> bool:
        learns_from_traces = any(method in OFFLINE_METHODS for method in self.methods)
        return learns_from_traces and self.traces is not None and not isinstance(self.traces, str | Path)

    def _collect_method_faults(self, checks: Checks) -> None:
        with checks.collect():
            check_choices("training method", self.methods, TRAIN_METHODS)
        online = ", ".join(method for method in self.methods if method in ONLINE_METHODS)
        groups = ", ".join(method for method in self.methods if method in GROUP_METHODS)
        if groups and self.reward is None and self.options.online_reward == "reward":
            checks.add([f"{groups} needs a reward to maximize: give reward, or set online_reward verifier"])
        if ON_POLICY in self.methods and (self.reward is None or is_reward_function(self.reward)):
            reason = "give reward" if self.reward is None else "a function has none, so train by rloo or grpo"
            checks.add([f"{ON_POLICY} needs a reward with a gradient: {reason}"])
        if online and self.problems is None:
            checks.add([f"{online} learns from problems: give a data set"])
        if not online and self.options.max_callback_problems:
            methods = ", ".join(ONLINE_METHODS)
            checks.add([f"max_callback_problems evaluates during {methods} here: leave it out, or use distill"])
        if self._has_named_policy():
            return
        # The stage checks this too, but comes after the policy is written.
        checks.add(list_trl_faults(self.methods, self.trl_options))
        for check in (check_amounts, check_seeds, check_reporting):
            with checks.collect():
                check(self.sft_config)
        with checks.collect():
            check_output_dir(self.output_dir)

    def _collect_stage_faults(self, checks: Checks, stage: TrainStage) -> None:
        frozen_models: list[str] = []
        if self.problems is not None and self._has_named_policy() and isinstance(self.reward, str | Path):
            with checks.collect():
                frozen_models = list_frozen_models(stage.policy, str(self.reward))
        with checks.collect():
            collect_training_faults(checks, stage, self.methods, frozen_models=frozen_models)
        if not self._has_traces_in_memory():
            for method in self.methods:
                with checks.collect():
                    stage.check_traces(method)

    def _find_traces_run_dir(self) -> Path:
        """Return the folder of the run that holds the traces, or will hold those in memory.

        Raises:
            ValueError: a method learns from traces, and there are none.
        """
        offline = [method for method in self.methods if method in OFFLINE_METHODS]
        if self._has_traces_in_memory():
            _check_traces(self.traces)
            if SOFT_TARGETS in self.methods:
                build_soft_target_rows(self.traces)  # refuses traces without soft targets
            return self.output_dir
        run_dir = self.output_dir
        if self.traces is not None and offline:
            folder = Path(self.traces)
            run_dir = folder.parent if folder.name == TRACES_DIR and not (folder / TRACES_DIR).exists() else folder
        if offline and not list_trace_files(run_dir):
            raise ValueError(
                f"{run_dir} holds no traces to train {', '.join(offline)} on: make them by nabla-trl traces or "
                "generate_traces, or name their folder"
            )
        return run_dir

    def _collect_problems(self) -> ProblemSet | None:
        if self.problems is None:
            return None
        size = None if self.max_problems is None else self.max_problems + self.options.max_callback_problems
        prompt_options = self.model_options.get("prompt_options") or PromptOptions()
        return collect_problems(self.problems, split=self.split, max_problems=size, prompt_options=prompt_options)

    def _build_stage(
        self, traces_run_dir: Path, checks: Checks, source: PolicySource, name: str, dtype: str
    ) -> TrainStage:
        """Return the stage, as far as what it needs can be read.

        Args:
            source: what loads the policy.
            name: of the policy, or of the folder that it was written to.
        """
        if name and dtype in DTYPES:
            with checks.collect():
                self._choose_batches(PartialState(), name, dtype)
        load_models, settings = self._refuse_to_load, {"policy": name, "dtype": dtype}
        search_config, problems = self.search_config, self.problem_set
        with checks.collect():
            load_models, settings = self._plan_models(source, settings)
        with checks.collect():
            if search_config.beta is None and (beta := _read_beta(traces_run_dir)) is not None:
                search_config = search_config.with_beta(beta)
        is_online = self.problems is not None
        settings |= search_config.get_settings() if is_online else {"beta": str(search_config.beta)}
        rows = problems.problems if problems is not None else None
        limit = self.max_problems if self.max_problems is not None else _count_training(rows, self.options)
        return TrainStage(
            run_dir=self.output_dir,
            policy=name,
            dtype=dtype,
            problems=None if rows is None else rows[:limit],
            callback_problems=[] if rows is None else rows[limit:],
            search_config=search_config,
            options=self.options,
            lora=self.lora,
            sft_config=self.sft_config,
            load_models=load_models,
            search_settings=settings | (problems.settings if problems is not None else {}),
            checker=AnswerChecker(),
            process_state=PartialState(),
            command_options=self.given_options,
            command=self.command,
            traces_run_dir=traces_run_dir,
            trl_options=self.trl_options,
            only_traces_of_problems=False,
        )

    def _choose_batches(self, state: PartialState, policy: str, dtype: str) -> None:
        """Fill in the batch sizes that were not given, for the memory of this machine."""
        chosen = choose_batches(
            Machine.detect(state),
            {**self.given_options, "batch_size": self.search_config.batch_size},
            policy=policy,
            reward="",
            methods=list(self.methods),
            dtype=dtype,
            search_config=self.search_config,
            train_options=self.options,
            lora=self.lora,
            sft_config=self.sft_config,
        )
        for option_name, value in chosen.items():
            setattr(self.sft_config, option_name, value)

    def _find_policy_name(self, traces_run_dir: Path) -> str:
        """Return the name of a policy that is given by name, or that the traces were made with."""
        if self.policy is not None:
            return str(self.policy)
        settings_file = traces_run_dir / f"{TRACES_DIR}.settings.json"
        settings = read_json_file(settings_file) if settings_file.exists() else {}
        if "policy" not in settings:
            raise ValueError(f"which policy? {settings_file} names none, so give policy")
        return str(settings["policy"])

    def _write_policy(self, state: PartialState) -> tuple[PolicySource, str, str]:
        """Write a policy in memory to the folder of the run. Returns what loads it, its folder and its data type."""
        model = self.policy
        if hasattr(model, "peft_config") and hasattr(model, "merge_and_unload"):
            model = deepcopy(model).merge_and_unload()
        policy = load_policy(model) if isinstance(model, Policy) else load_policy(model, self.tokenizer)
        name = policy.name
        if name != policy.model.name_or_path:  # in memory, or with an adapter: no files hold these weights
            given = policy.model if isinstance(model, Policy) else unwrap_model(self.policy)
            name = str(_write_policy(policy, self.output_dir / get_saved_folder_name(given), state))
        return replace(policy, name=name), name, describe_dtype(policy.model)

    @staticmethod
    def _refuse_to_load() -> tuple[Policy, Reward]:
        raise ValueError("training on traces loads no frozen policy")

    def _plan_models(
        self, source: PolicySource, policy_settings: dict[str, str]
    ) -> tuple[Callable[[], tuple[Policy, Reward]], dict[str, str]]:
        """Return what loads the frozen policy and the reward, and the settings of both."""
        if self.problems is None:
            return self._refuse_to_load, policy_settings
        options = dict(self.model_options)
        if isinstance(source, Policy):
            kept = ("reward_tokenizer", "trust_remote_code", "dtype", "device")  # of a reward that is loaded by name
            options = {name: value for name, value in options.items() if name in kept}
        reward = _reward_nothing if self.reward is None else self.reward
        models = ModelPair.build(source, reward, options)
        settings = models.get_settings() | policy_settings
        return partial(models.load, 4 * self.search_config.batch_size), settings


def run_training(stage: TrainStage, methods: Sequence[str], say: Callable[[str], None]) -> dict[str, TrainingResult]:
    """Train a policy per method, continue what was interrupted, and skip what is finished. Returns the records.

    Args:
        say: prints a line.

    Raises:
        ValueError: as `TrainStage.train_method`.
    """
    results = {}
    for method in methods:
        if defaults := stage.describe_defaults(method):
            say(f"train {method}: {defaults}")
        result = stage.train_method(method)
        if result is None:
            say(f"train {method}: already done")
            result = _read_result(stage.run_dir, method)
        else:
            counts = f"{pluralize(result.rows, 'row')}, {pluralize(result.steps, 'step')}"
            figures = f"{counts}, loss {result.loss:.3f}, {result.seconds:.0f} s"
            say(f"train {method}: {figures}")
            if result.stop_reason:
                say(f"train {method}: {result.stop_reason}")
        results[method] = result
    return results


def _read_result(run_dir: Path, method: str) -> TrainingResult:
    record = read_json_file(run_dir / "trained" / method / "train.json")
    return TrainingResult(**{item.name: record[item.name] for item in fields(TrainingResult) if item.name in record})


def _split_config(
    config: SFTConfig | Mapping[str, Any] | None, output_dir: Path, machine: Machine, dtype: str
) -> tuple[TrainOptions, Any, dict[str, Any], dict[str, Any]]:
    """Return the options of training, of the trainer and of single methods, and all that were given."""
    if isinstance(config, SFTConfig):
        defaults = type(config)(output_dir="", use_cpu=True, bf16=False)
        given = {
            item.name: getattr(config, item.name)
            for item in fields(config)
            if item.init and getattr(config, item.name) != getattr(defaults, item.name)
        }
        chosen_by_caller = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps")
        given |= {name: getattr(config, name) for name in chosen_by_caller}
        return TrainOptions(), config, collect_trl_options(TrlOptions(), config, given), given
    if config is not None and not isinstance(config, Mapping):
        raise ValueError(f"config is a mapping of options or an SFTConfig, not {type(config).__name__}")
    given = coerce_fields(config or {}, [TrainOptions, TrainerConfig, TrlOptions], source="config")
    machine_defaults = machine.get_defaults()
    if dtype == "bfloat16" and given.get("tuning") != "full" and "fp16" not in given:
        machine_defaults["bf16"] = True  # the adapter is in float32, beside weights that are not
    trainer_values = {"max_length": None, **machine_defaults, **_select(given, TrainerConfig)}
    sft_config = TrainerConfig(**trainer_values | {"output_dir": str(output_dir)})
    trl_options = collect_trl_options(TrlOptions(**_select(given, TrlOptions)), sft_config, given)
    return TrainOptions(**_select(given, TrainOptions)), sft_config, trl_options, given


def _get_dtype(policy: Any, dtype: Any, state: PartialState) -> str:
    """Return the data type of a policy's weights before it is loaded."""
    if policy is None or isinstance(policy, str | Path):
        return get_dtype_name(dtype, state.device)
    return describe_dtype(policy.model if isinstance(policy, Policy) else unwrap_model(policy))


def _select(values: Mapping[str, Any], dataclass_type: Any) -> dict[str, Any]:
    names = {item.name for item in fields(dataclass_type)}
    return {name: value for name, value in values.items() if name in names}


def _make_lora(lora: Any) -> LoraArguments:
    """Return the options of the adapter from a mapping or PEFT's `LoraConfig`."""
    if lora is None or isinstance(lora, LoraArguments):
        return lora or LoraArguments()
    if not isinstance(lora, Mapping):
        names = ("r", "lora_alpha", "lora_dropout", "target_modules")
        if not hasattr(lora, "lora_alpha"):
            raise ValueError(f"lora is LoraArguments, a mapping of its options or a LoraConfig, not {lora!r}")
        lora = {name: getattr(lora, name) for name in names if getattr(lora, name, None) is not None}
    values = {_PEFT_NAMES.get(name, name): value for name, value in lora.items()}
    modules = values.get("lora_target_modules", [])
    values |= {"lora_target_modules": [modules] if isinstance(modules, str) else sorted(modules)} if modules else {}
    return LoraArguments(**coerce_fields(values, [LoraArguments], source="lora"))


def _check_traces(traces: Sequence[Any]) -> None:
    """Refuse objects that are no traces, and a trace that is there twice, before any is written."""
    if not traces or not all(isinstance(trace, Trace) for trace in traces):
        kinds = ", ".join(sorted({type(trace).__name__ for trace in traces})) or "none"
        raise ValueError(f"this method learns from traces, which generate_traces makes, and got {kinds}")
    keys = Counter((trace.problem_id, trace.seed, trace.method) for trace in traces)
    [((problem_id, seed, method), number)] = keys.most_common(1)
    if number > 1:
        raise ValueError(
            f"{number} traces are of problem {problem_id!r} with seed {seed} ({method}): each response to a problem "
            "needs a seed of its own"
        )


def _store_traces(traces: Sequence[Any], output_dir: Path) -> None:
    """Write traces in memory to the folder of a run, unless it holds them already.

    Raises:
        ValueError: the folder holds other traces.
    """
    files = list_trace_files(output_dir)
    if files:
        if list(map(_identify, read_traces(files))) != sorted(map(_identify, traces)):
            raise ValueError(f"{output_dir} holds other traces than these: use another output_dir")
        return
    with TraceWriter(output_dir / TRACES_DIR, chunk_size=len(traces)) as writer:
        for trace in traces:
            writer.add(trace)


def _identify(trace: Trace) -> tuple[Any, ...]:
    return trace.problem_id, trace.seed, trace.method, tuple(trace.response_ids), len(trace.revisions)


def _read_beta(run_dir: Path) -> float | None:
    """Return the β that the traces of a run were made with, None where a KL target set the steps or none is known."""
    path = run_dir / f"{TRACES_DIR}.settings.json"
    beta = read_json_file(path).get("beta", "None") if path.exists() else "None"
    return None if beta == "None" else float(beta)


def _count_training(problems: Sequence[Problem] | None, options: TrainOptions) -> int:
    return max(0, len(problems or ()) - options.max_callback_problems)


def _write_policy(policy: Policy, folder: Path, state: PartialState) -> Path:
    """Write a policy in memory to the folder of a run, from where an adapter finds it again."""
    if state.is_main_process and not folder.exists():
        draft = folder.with_name(f"{folder.name}.tmp")
        policy.model.save_pretrained(draft)
        policy.tokenizer.save_pretrained(draft)
        draft.rename(folder)
    state.wait_for_everyone()
    return folder


def _reward_nothing(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Return 0 for every response, where a verifier gives the rewards."""
    return [0.0] * len(completions)
