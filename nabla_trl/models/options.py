"""Groups of options as the rooms below read them: sampling, the point of a gradient, ste's optimiser, the scan.

Depends on nothing, so that `--help` needs no torch; `config.py` is where a user sets them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nabla_trl.tasks.problem import Problem

PROMPT_STYLES = ("auto", "chat", "few_shot")


@dataclass(frozen=True)
class GradientPoint:
    """Which gradient of the reward a search follows.

    Attributes:
        alphas: where backward passes are made, their mean counts: the share of the policy's own candidates in the
            input of each position; 0 = the hard tokens. Empty: no backward pass.
        direct: the part that scoring has shown already (`Reward.direct_gradient`).
        min_p: candidates below this fraction of the position's likeliest are left out of mixtures.
    """

    alphas: tuple[float, ...]
    direct: bool = False
    candidate_min_p: float = 0.0

    @classmethod
    def parse(cls, text: str, candidate_min_p: float = 0.0) -> GradientPoint:
        """ "direct", "hard", "mixture:A" or "mixture:A,A,…"; or "direct+" and one of the others.

        Raises:
            ValueError: anything else, or an α outside (0, 1].
        """
        if text == "direct":
            return cls((), direct=True)
        rest = text.removeprefix("direct+")
        kind, _, listed = rest.partition(":")
        try:
            alphas = (0.0,) if rest == "hard" else tuple(float(part) for part in listed.split(","))
        except ValueError:
            alphas = ()
        if rest != "hard" and (kind != "mixture" or not alphas or not all(0 < alpha <= 1 for alpha in alphas)):
            raise ValueError(
                f"point must be direct, hard, mixture:A[,A…] with A in (0, 1], or direct+ one of these, not {text!r}"
            )
        return cls(alphas, direct=rest != text, candidate_min_p=candidate_min_p)


HARD_GRADIENT_POINT = GradientPoint((0.0,))


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch a filter off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be a number of at least 0, not {self.temperature}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p < 1:
            raise ValueError("sampling needs top_k >= 0, 0 < top_p <= 1 and 0 <= min_p < 1")


@dataclass(frozen=True)
class PromptOptions:
    """How a policy is asked.

    Attributes:
        style: "chat" (its chat template), "few_shot" (worked examples, as a base model reads them), or "auto": chat
            where it has a template.
        template: keywords for the chat template, such as {"enable_thinking": False}.
    """

    style: str = "auto"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.style not in PROMPT_STYLES:
            raise ValueError(f"prompt_style must be one of {', '.join(PROMPT_STYLES)}, not {self.style!r}")
        if self.style == "few_shot" and self.chat_template_kwargs:
            raise ValueError("chat_template_kwargs belong to a chat template: prompt_style few_shot uses none")

    @classmethod
    def parse(cls, style: str, chat_template_kwargs: str | None) -> PromptOptions:
        """From the command line, where the template's keywords are a JSON object.

        Raises:
            ValueError: no JSON object, or what the class refuses.
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
        """Refuse problems that cannot be put so, before any work.

        Raises:
            ValueError: worked examples are asked for, and a problem has none.
        """
        bare = next((one for one in problems if not one.few_shot_examples), None) if self.style == "few_shot" else None
        if bare is not None:
            raise ValueError(f"prompt_style few_shot needs worked examples, and task {bare.task} has none")

    def get_changed_settings(self) -> dict[str, str]:
        """What differs from the defaults, for `tracing.claim_settings` and a trace's provenance."""
        told = {} if self.style == "auto" else {"prompt_style": self.style}
        return told | (
            {"chat_template_kwargs": json.dumps(self.chat_template_kwargs, sort_keys=True)}
            if self.chat_template_kwargs
            else {}
        )
