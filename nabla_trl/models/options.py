"""Options of sampling, prompts and gradients. Loads no torch, so that `--help` is quick."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nabla_trl.utils.faults import Checks

if TYPE_CHECKING:
    from nabla_trl.tasks.problem import Problem

PROMPT_STYLES = ("auto", "chat", "few_shot")


@dataclass(frozen=True)
class GradientPoint:
    """Which gradient of the reward a search follows.

    Attributes:
        alphas: shares α of the policy's candidates in the relaxed inputs, 0 for the hard tokens. There is one backward
            pass for each, and their mean is taken. Empty: no backward pass.
        direct: add the part that is known from scoring, without a backward pass (`Reward.compute_direct_gradient`).
        candidate_min_p: mixtures leave out candidates below this fraction of the likeliest one at their position.
    """

    alphas: tuple[float, ...]
    direct: bool = False
    candidate_min_p: float = 0.0

    @classmethod
    def parse(cls, text: str, candidate_min_p: float = 0.0) -> GradientPoint:
        """Parse "direct", "hard", "mixture:A" or "mixture:A,A,…", or "direct+" and one of the last three.

        Raises:
            ValueError: another text, or an α outside (0, 1].
        """
        if text == "direct":
            return cls((), direct=True)
        backward = text.removeprefix("direct+")
        kind, _, shares = backward.partition(":")
        try:
            alphas = (0.0,) if backward == "hard" else tuple(float(share) for share in shares.split(","))
        except ValueError:
            alphas = ()
        if backward != "hard" and (kind != "mixture" or not alphas or not all(0 < alpha <= 1 for alpha in alphas)):
            raise ValueError(
                "gradient_at must be direct, hard, mixture:A[,A…] with A in (0, 1], or direct+ one of "
                f"these, not {text!r}"
            )
        return cls(alphas, direct=backward != text, candidate_min_p=candidate_min_p)


HARD_GRADIENT_POINT = GradientPoint((0.0,))


# Logits divided by what is outside are infinite in float32, and their softmax is no number.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-20, 1e20


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled. Temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 disable a filter."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        checks = Checks()
        checks.require(
            self.temperature == 0 or MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE,
            f"temperature must be 0 or from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}, not {self.temperature}",
        )
        checks.require(self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        checks.require(
            self.top_k >= 0 and 0 < self.top_p <= 1 and 0 <= self.min_p < 1,
            "sampling needs top_k >= 0, 0 < top_p <= 1 and 0 <= min_p < 1",
        )
        checks.raise_faults()


@dataclass(frozen=True)
class PromptOptions:
    """How problems are written as prompts.

    Attributes:
        style: "chat" (the chat template), "few_shot" (worked examples, for base models), or "auto": chat where the
            policy has a template.
        chat_template_kwargs: keywords of the chat template, such as {"enable_thinking": False}.
    """

    style: str = "auto"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks = Checks()
        checks.require(
            self.style in PROMPT_STYLES, f"prompt_style must be one of {', '.join(PROMPT_STYLES)}, not {self.style!r}"
        )
        checks.require(
            self.style != "few_shot" or not self.chat_template_kwargs,
            "chat_template_kwargs belong to a chat template: prompt_style few_shot uses none",
        )
        checks.raise_faults()

    @classmethod
    def parse(cls, style: str, chat_template_kwargs: str | None) -> PromptOptions:
        """Return the options as given on the command line, where the template's keywords are a JSON object.

        Raises:
            ValueError: not a JSON object, an unknown style, or keywords without a template.
        """
        try:
            keywords = json.loads(chat_template_kwargs) if chat_template_kwargs else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"chat_template_kwargs is not JSON ({error}): {chat_template_kwargs}") from error
        if not isinstance(keywords, dict):
            raise ValueError(
                f'chat_template_kwargs must be a JSON object, as {{"enable_thinking": false}}: {chat_template_kwargs}'
            )
        return cls(style, keywords)

    def check_problems(self, problems: Iterable[Problem]) -> None:
        """Refuse problems that cannot be written so, before any work is done."""
        if self.style != "few_shot":
            return
        for problem in problems:
            if not problem.few_shot_examples:
                raise ValueError(f"prompt_style few_shot needs worked examples, and task {problem.task} has none")

    def get_changed_settings(self) -> dict[str, str]:
        """Return what differs from the defaults, for `claim_settings` and the provenance of a trace."""
        settings = {} if self.style == "auto" else {"prompt_style": self.style}
        if self.chat_template_kwargs:
            settings["chat_template_kwargs"] = json.dumps(self.chat_template_kwargs, sort_keys=True)
        return settings
