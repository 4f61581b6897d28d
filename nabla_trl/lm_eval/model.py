"""`--model nabla` of lm-eval. Importing this module registers the class, and needs lm-eval."""

from __future__ import annotations

import os
from typing import Any

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
except ImportError as error:
    raise ImportError(f"lm-eval is not installed ({error}): pip install 'nabla-trl[lm-eval]'") from error

import torch
from accelerate import PartialState
from accelerate.utils import gather
from tqdm import tqdm

from nabla_trl.evaluation.rows import Row
from nabla_trl.lm_eval.harness import HarnessModel, HarnessRequest


@register_model("nabla")
class NablaLM(TemplateLM):
    """The model of `lm_eval --model nabla`.

    Args:
        batch_size: problems that are searched together. "auto" takes that of the preset.
        max_batch_size: upper limit for "auto".
        device: where the models run (default: a GPU if there is one).
        model_args: as for `HarnessModel.load`.

    Raises:
        ValueError: as `HarnessModel.load`.
    """

    def __init__(
        self,
        *,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        **model_args: Any,
    ):
        super().__init__()
        if missing := [name for name in ("policy", "reward") if name not in model_args]:
            raise ValueError(f"model_args lack {' and '.join(missing)}: --model_args policy=P,reward=R")
        if not str(batch_size).startswith("auto"):
            model_args["batch_size"] = int(batch_size)
        elif max_batch_size:
            model_args["batch_size"] = int(max_batch_size)
        if device and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # lm-eval's default is cuda:0 on every machine
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            self._state = PartialState(cpu=device == "cpu")
            self._rank, self._world_size = self._state.process_index, self._state.num_processes
            device = str(self._state.device)
        self.harness = HarnessModel.load(device=device, rank=self._rank, **model_args)
        self.harness.wait_for_all = self.barrier
        self.tokenizer = self.harness.policy.tokenizer
        self._device = self.harness.policy.device
        self._rows: list[Row] = []

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> NablaLM:
        """Return the model of model_args as text."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> NablaLM:
        """Return the model of model_args, which win over lm-eval's own options. The seed is that of --seed."""
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        # lm-eval has just set this seed. It hands it to no model.
        return cls(**{"seed": torch.initial_seed() % 2**31, **options, **arg_dict})

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Return the longest sequence of the policy in tokens."""
        return self.harness.policy.context_length

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text, as `HarnessModel.encode`."""
        return self.harness.encode(string, add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a chat as the policy's template writes it, as `HarnessModel.render_chat`."""
        return self.harness.render_chat(chat_history, add_generation_prompt)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the answer of the method to each request, as `HarnessModel.generate`."""
        asked = self._read_requests(requests)
        progress = tqdm(
            total=len({request.problem_id for request in asked}),
            desc=f"{self.harness.method}: answers",
            disable=disable_tqdm or self.rank != 0,
        )

        def report(request: HarnessRequest, answer: str) -> None:
            self.cache_hook.add_partial("generate_until", (request.prompt, request.generation_kwargs), answer)
            progress.update()

        with progress:
            answers = self.harness.generate(asked, report)
        gathered = self.gather_object(self.harness.rows)
        self._rows = [row for rows in gathered or [] for row in rows]
        return answers

    def _read_requests(self, requests: list[Instance]) -> list[HarnessRequest]:
        """Return lm-eval's requests. The same one again asks for another answer, up to its number of repeats."""
        counts: dict[int, int] = {}
        asked = []
        for request in requests:
            prompt, generation_kwargs = request.args
            repeat = counts.get(id(request), 0)
            counts[id(request)] = repeat + 1
            # More than that is padding, which equals the work of several processes.
            repeat = min(repeat, (request.repeats or 1) - 1)
            document = f"{request.doc_id}" + (f"/{request.idx}" if request.idx else "")
            asked.append(HarnessRequest(str(request.task_name), document, repeat, prompt, generation_kwargs))
        return asked

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return the policy's own log-likelihoods (see `HarnessModel.score`)."""
        scores = []
        for texts, context, continuation in tqdm(requests, "log-likelihoods", disable=disable_tqdm or self.rank != 0):
            scores.append(self.harness.score(context, continuation))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, scores[-1])
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the policy's log-likelihood of each whole text, in windows of its context."""
        likelihoods = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            likelihoods.append(sum(score for score, _ in self._loglikelihood_tokens(parts, disable_tqdm=True)))
        return likelihoods

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes into its results: the method and its cost by task."""
        return {"nabla": self.harness.summarize(self._rows)}

    # --- several processes ----------------------------------------------------------------------------

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensors of all processes, one after another."""
        return gather(tensor) if self.world_size > 1 else tensor

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return the objects of all processes on process `dst`, and None elsewhere."""
        if self.world_size == 1:
            return [obj]
        result = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, result, dst)
        return result

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            self._state.wait_for_everyone()
