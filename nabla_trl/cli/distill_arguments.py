"""What recipes/distill.py can be asked for, apart from the search, the training and the adapter."""

from __future__ import annotations

from dataclasses import dataclass, field

from nabla_trl.cli.arguments import (
    CHAT_TEMPLATE_KWARGS_HELP,
    DATASET_HELP,
    PROMPT_STYLE_HELP,
    REWARD_HELP,
    VLLM_TIMEOUT_HELP,
    VLLM_URL_HELP,
)
from nabla_trl.evaluation.method import METHOD_SYNTAX, parse_methods
from nabla_trl.models.options import PromptOptions
from nabla_trl.training.checkpoints import get_policy_label
from nabla_trl.training.offline import TRAIN_METHODS as TRAININGS
from nabla_trl.utils.fields import option

STAGES = ("traces", "train", "evaluate", "report")
DEFAULT_DISTILL_EVAL_METHODS = (
    "greedy,samples_32,self_consistency_16,best_of_1,best_of_2,best_of_4,best_of_8,best_of_16,best_of_32,"
    "weighted_best_of_16,control,nabla,control@0.15,nabla@0.15,control@0.2,nabla@0.2,control@0.33,nabla@0.33,"
    "reward_model_sampling"
)
DEFAULT_TRAINED_POLICY_METHODS = ("greedy", "best_of_1", "best_of_8", "samples_8")  # of every trained policy


@dataclass
class DistillArguments:
    """Models, problems and what to compare. The search is set by the reasoner's options, training by TRL's."""

    policy: str = field(metadata={"help": "hub id or path of the policy, a causal LM"})
    reward: str = field(metadata={"help": REWARD_HELP})
    dataset: str = option("digit_chains", f"what to train on: {DATASET_HELP}")
    eval_dataset: str = option("", "the held-out task, named alike; empty = the dataset's eval_split")
    train_split: str = option("train", "split that traces are made of")
    eval_split: str = option("test", "split that methods are compared on")
    train_methods: list[str] = field(
        default_factory=lambda: ["sft"],
        metadata={"help": f"how to train, one policy for each: {', '.join(TRAININGS)}"},
    )
    max_train_problems: int = option(1000, "training problems")
    traces_per_problem: int = option(1, "traces of each training problem, with seeds from the first of `seeds` on")
    max_eval_problems: int = option(300, "held-out problems")
    stages: str = option(",".join(STAGES), "comma-separated stages to run")
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "seeds of every method that samples"}
    )
    eval_methods: str = option(
        "",
        f"comma-separated methods to compare: {METHOD_SYNTAX}; empty = {DEFAULT_DISTILL_EVAL_METHODS}, and of every trained policy "
        f"{', '.join(DEFAULT_TRAINED_POLICY_METHODS)}",
    )
    max_audit_problems: int = option(64, "training problems of the reward audit; 0 = no audit")
    audit_samples: int = option(16, "samples per problem of the reward audit")
    dtype: str = option("float32", "weights of frozen models: float32, bfloat16 or float16")
    vllm_url: str | None = option(None, VLLM_URL_HELP)
    vllm_timeout: float = option(600.0, VLLM_TIMEOUT_HELP)
    prompt_style: str = option("auto", PROMPT_STYLE_HELP)
    chat_template_kwargs: str | None = option(None, CHAT_TEMPLATE_KWARGS_HELP)
    title: str = option("Test-time gradient search and its distillation", "title of the report")

    def __post_init__(self) -> None:
        unknown = [stage for stage in self.stages.split(",") if stage not in STAGES]
        if unknown:
            raise ValueError(f"unknown stage {unknown[0]!r}: choose from {', '.join(STAGES)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must be distinct and not empty")
        unknown = [name for name in self.train_methods if name not in TRAININGS]
        if unknown or len(set(self.train_methods)) < len(self.train_methods):
            raise ValueError(f"method takes distinct ones of {', '.join(TRAININGS)}, not {self.train_methods}")
        if self.traces_per_problem < 1:
            raise ValueError("traces_per_problem must be at least 1")
        if not self.eval_methods:
            self.eval_methods = ",".join(
                [
                    DEFAULT_DISTILL_EVAL_METHODS,
                    *(
                        f"{get_policy_label(one)}_{rest}"
                        for one in self.train_methods
                        for rest in DEFAULT_TRAINED_POLICY_METHODS
                    ),
                ]
            )
        parse_methods(self.eval_methods)
        self.get_prompt_options()

    def get_prompt_options(self) -> PromptOptions:
        return PromptOptions.parse(self.prompt_style, self.chat_template_kwargs)
