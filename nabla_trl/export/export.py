"""Shipping a trained checkpoint: a folder that loads without its run, checked against the trained model, and a card.

The folder is written beside its place and renamed into it once everything loads from it as it should, so a failure
leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nabla_trl.export.checkpoint import Checkpoint, check_weight_files
from nabla_trl.export.model_card import Provenance, build_model_card, find_base_license
from nabla_trl.models.loading import (
    ADAPTER_CONFIG_FILE,
    load_causal_lm,
    load_policy,
    load_tokenizer,
    read_adapter_info,
)
from nabla_trl.models.policy import Policy
from nabla_trl.traces.build import get_package_versions
from nabla_trl.traces.storage import read_traces
from nabla_trl.training.checkpoints import ADAPTER_WEIGHTS_FILE, CONFIG_FILE
from nabla_trl.utils.formatting import format_error

MERGED_DIR = "merged"
# Largest difference of a logit that a reload may show, over the largest logit (at least 1). An adapter is added to the
# weights or to the activations, so rounding differs.
LOGIT_TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
MAX_CHECK_TRACES = 4  # traces that logits are compared on
_CUSTOM_GENERATE_DIR = Path(__file__).parent / "custom_generate"


@dataclass(frozen=True)
class ExportResult:
    """A shipped folder and what its check found (see `Provenance`)."""

    output_dir: Path
    method: str
    logit_tolerance: float
    provenance: Provenance


def export_checkpoint(
    checkpoint: Checkpoint,
    output_dir: Path,
    *,
    merge: bool = False,
    license: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    model_name: str | None = None,
) -> ExportResult:
    """Make the folder `to` of a run's checkpoint (`find_checkpoint`), checked by loading it again.

    Args:
        merge: also base and adapter as one model, in merged/.
        licence: a key of the hub's; None: the base's, where its card is at hand.
        dtype: of the check and of merged weights; None: what the run was evaluated in.
        name: what the card calls the model; None: the folder's name.

    Raises:
        ValueError: `to` is there and not empty; what `check_files` refuses; weights that do not fit the base or change
            nothing; another vocabulary; a quantised base; rows without a result; a reload that gives other logits.
        OSError: the folder cannot be written.
    """
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"{output_dir} is there already and not an empty folder: choose another --to, or delete it")
    output_dir = Path(os.path.abspath(output_dir))
    check_weight_files(checkpoint)
    if merge and not checkpoint.is_adapter:
        raise ValueError(f"{checkpoint.checkpoint_dir} holds full weights: there is nothing to merge")
    check = _LogitCheck(checkpoint, dtype or checkpoint.dtype, device)
    with _temporary_folder(output_dir) as draft:
        differences = check.write_and_compare(draft, merge)
        made = Provenance(
            model_name=model_name or output_dir.name,
            base_revision=check.base_revision,
            license=license or find_base_license(checkpoint.base_policy),
            traces_hash=checkpoint.training["traces"],
            dtype=check.dtype,
            has_merged_model=merge,
            max_logit_change=check.max_logit_change,
            logit_differences=differences,
        )
        _write_json(draft / "provenance.json", _build_provenance_record(checkpoint, made))
        build_model_card(checkpoint, made).save(draft / "README.md")
        shutil.copytree(
            _CUSTOM_GENERATE_DIR, draft / _CUSTOM_GENERATE_DIR.name, ignore=shutil.ignore_patterns("__pycache__")
        )
    return ExportResult(output_dir, checkpoint.method, check.tolerance, made)


def push_to_hub(folder: Path, repo_id: str, *, private: bool) -> str:
    """Push a shipped folder to the model hub and return its address."""
    api = HfApi()
    api.create_repo(repo_id, private=private or None, exist_ok=True)  # None: as the account's settings have it
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Ship by nabla-trl"))


def check_push_to_hub(checkpoint: Checkpoint, repo_id: str, *, merge: bool) -> None:
    """Refuse a push that cannot be of use, before any work.

    Raises:
        ValueError: not a name of the hub's, or an adapter whose base only this machine has.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not a name on the hub: {format_error(error)}") from error
    if checkpoint.is_adapter and not merge and Path(checkpoint.base_policy).exists():
        raise ValueError(
            f"the adapter's base {checkpoint.base_policy} is a folder of this machine, so nobody else could load it: "
            "add --merge, or train from a model on the hub"
        )


# --- the check ----------------------------------------------------------------------------------------


class _LogitCheck:
    """The trained model's logits on probes, and the folder's copies against them. One model is in memory at a time."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, device: str | None):
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        folder = str(checkpoint.checkpoint_dir)
        self.tokenizer = load_tokenizer(folder)
        base = load_policy(self.base_policy, dtype=dtype, device=device, revision=self._read_base_revision())
        _check_vocabulary(checkpoint, self.tokenizer, base.tokenizer)
        _check_not_quantized(base)
        known: str | None = vars(base.model.config).get("_commit_hash")  # set where it came from the hub
        self.base_revision = self._read_base_revision() or known
        self.check_sequences = _collect_check_sequences(checkpoint, base)
        before = _compute_logits(base.model, self.check_sequences)
        del base
        self.trained_logits = _compute_logits(self._load_trained_model(), self.check_sequences)
        if not all(one.isfinite().all() for one in self.trained_logits):
            raise ValueError(f"{folder} gives logits that are not finite in {dtype}")
        self.max_logit_change = _compute_max_difference(before, self.trained_logits)
        if self.max_logit_change == 0:
            raise ValueError(f"{folder} gives the logits of {self.base_policy}: the training changed nothing")
        self.tolerance = LOGIT_TOLERANCE[dtype] * max(1.0, *(float(one.abs().max()) for one in self.trained_logits))

    @property
    def base_policy(self) -> str:
        return self.checkpoint.base_policy

    def _read_base_revision(self) -> str | None:
        return read_adapter_info(str(self.checkpoint.checkpoint_dir)).revision if self.checkpoint.is_adapter else None

    def _load_trained_model(self) -> PreTrainedModel:
        """The model as the run evaluated it, an adapter merged into its base."""
        folder = str(self.checkpoint.checkpoint_dir)
        if not self.checkpoint.is_adapter:
            return load_policy(folder, dtype=self.dtype, device=self.device).model
        revision = self._read_base_revision()
        return load_policy(
            self.base_policy, dtype=self.dtype, device=self.device, adapter=folder, revision=revision
        ).model

    def write_and_compare(self, draft: Path, merge: bool) -> dict[str, float]:
        """Write the weights and tokenizers to `draft`, load them again and compare.

        Returns:
            The largest difference of a logit, by what was loaded.
        """
        _copy_files(self.checkpoint, draft)
        self.tokenizer.save_pretrained(draft)
        if merge:
            self._load_trained_model().save_pretrained(draft / MERGED_DIR)
            for file in (draft / MERGED_DIR).glob("*.safetensors"):
                shutil.copymode(draft / CONFIG_FILE, file)  # safetensors writes for nobody else to read
            self.tokenizer.save_pretrained(draft / MERGED_DIR)
        loaders: dict[str, Callable[[], PreTrainedModel]] = {"folder": lambda: self._load_exported_model(draft)}
        if self.checkpoint.is_adapter:
            loaders["adapter by PEFT"] = lambda: self._load_with_peft(draft)
        if merge:
            loaders[MERGED_DIR] = lambda: self._load_exported_model(draft / MERGED_DIR)
        return {what: self._compare_logits(what, load()) for what, load in loaders.items()}

    def _compare_logits(self, what: str, model: PreTrainedModel) -> float:
        found = _compute_max_difference(self.trained_logits, _compute_logits(model, self.check_sequences))
        if not found <= self.tolerance:
            raise ValueError(
                f"loaded again ({what}), logits differ from the trained model's by {found:.2g}, more than "
                f"{self.tolerance:.2g} in {self.dtype}: nothing was shipped"
            )
        return found

    def _load_exported_model(self, folder: Path) -> PreTrainedModel:
        again = load_policy(str(folder), dtype=self.dtype, device=self.device)
        _check_vocabulary(self.checkpoint, self.tokenizer, again.tokenizer)
        if again.tokenizer.chat_template != self.tokenizer.chat_template:
            raise ValueError(
                f"the chat template of {self.checkpoint.checkpoint_dir} is another once saved: nothing was shipped"
            )
        return again.model

    def _load_with_peft(self, folder: Path) -> PreTrainedModel:
        """The base with the adapter beside its weights, as PEFT's users load it."""
        from peft import PeftModel

        base = load_causal_lm(
            self.base_policy, dtype=self.dtype, device=self.device, revision=self._read_base_revision()
        )
        return PeftModel.from_pretrained(base, str(folder)).eval()


def _copy_files(checkpoint: Checkpoint, draft: Path) -> None:
    names = (
        [ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE]
        if checkpoint.is_adapter
        else _list_model_files(checkpoint.checkpoint_dir)
    )
    for name in names:
        shutil.copyfile(checkpoint.checkpoint_dir / name, draft / name)
    shutil.copyfile(checkpoint.training_config_path, draft / CONFIG_FILE)


def _list_model_files(folder: Path) -> list[str]:
    """Weights and configurations; tokenizers are saved apart, and what a trainer leaves beside them is not shipped."""
    weights = [file.name for file in sorted(folder.glob("*.safetensors*"))]
    return [*weights, *(name for name in ("config.json", "generation_config.json") if (folder / name).is_file())]


def _check_vocabulary(checkpoint: Checkpoint, own: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase) -> None:
    ours, theirs = own.get_vocab(), base.get_vocab()
    odd = sorted(token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token))
    if odd:
        named = ", ".join(map(repr, odd[:3])) + (" …" if len(odd) > 3 else "")
        raise ValueError(
            f"the tokenizers of {checkpoint.checkpoint_dir} and {checkpoint.base_policy} differ in {len(odd)} tokens ({named}): it "
            "was trained on another vocabulary"
        )


def _check_not_quantized(base: Policy) -> None:
    if "quantization_config" in base.model.config.to_dict():
        raise ValueError(
            f"{base.name} is quantised: an adapter would be merged into its few bits. Ship on its un-quantised weights"
        )


def _collect_check_sequences(checkpoint: Checkpoint, base: Policy) -> list[list[int]]:
    """Token ids to compare logits on: one walk through the vocabulary, and the first traces, prompt and response."""
    allowed = torch.nonzero(~base.forbidden_mask.cpu()).squeeze(1)
    length = min(32, base.context_length)
    walk = allowed[torch.linspace(0, len(allowed) - 1, length).long()].tolist()
    folder = checkpoint.run_dir / "traces"
    columns = ("prompt_ids", "response_ids", "meta", "error")
    traces = read_traces(folder, columns) if folder.is_dir() else []
    readable = [t for t in traces if t.error is None and t.meta.get("tokenizer_hash") == base.tokenizer_hash]
    return [walk, *((t.prompt_ids + t.response_ids)[: base.context_length] for t in readable[:MAX_CHECK_TRACES])]


@torch.no_grad()
def _compute_logits(model: PreTrainedModel, probes: Sequence[Sequence[int]]) -> list[Tensor]:
    """[T, V] float32 on the CPU for every probe."""
    return [model(torch.tensor([ids], device=model.device)).logits[0].float().cpu() for ids in probes]


def _compute_max_difference(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """NaN where a difference is."""
    return float(torch.stack([(one - other).abs().max() for one, other in zip(some, others, strict=True)]).max())


# --- the folder ---------------------------------------------------------------------------------------


@contextmanager
def _temporary_folder(to: Path) -> Iterator[Path]:
    """A folder beside `to` that takes its place at the end, or goes."""
    draft = to.with_name(f"{to.name}.{os.getpid()}.tmp")
    draft.mkdir(parents=True)
    try:
        yield draft
        if to.exists():
            to.rmdir()  # it is empty
        draft.rename(to)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _build_provenance_record(checkpoint: Checkpoint, made: Provenance) -> dict[str, Any]:
    return {
        "method": checkpoint.method,
        "base": checkpoint.base_policy,
        "reward": checkpoint.facts["reward"],
        "training": checkpoint.training,
        **asdict(made),
        "versions": get_package_versions(),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
