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

from nabla_trl.export.checkpoint import Checkpoint, check_files
from nabla_trl.export.model_card import Provenance, base_licence, model_card
from nabla_trl.models.adapters import FILE, adapter_note
from nabla_trl.models.loading import load_causal, load_policy, load_tokenizer
from nabla_trl.models.policy import Policy
from nabla_trl.traces.build import versions
from nabla_trl.traces.storage import read_traces
from nabla_trl.training.checkpoints import CONFIG, WEIGHTS
from nabla_trl.utils.formatting import one_line

MERGED = "merged"
# Largest difference of a logit that a reload may show, over the largest logit (at least 1). An adapter is added to the
# weights or to the activations, so rounding differs.
TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
PROBES = 4  # traces that logits are compared on
_HOOK = Path(__file__).parent / "custom_generate"


@dataclass(frozen=True)
class Shipped:
    """A shipped folder and what its check found (see `Provenance`)."""

    folder: Path
    method: str
    tolerance: float
    provenance: Provenance


def ship(
    checkpoint: Checkpoint,
    to: Path,
    *,
    merge: bool = False,
    licence: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    name: str | None = None,
) -> Shipped:
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
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"{to} is there already and not an empty folder: choose another --to, or delete it")
    to = Path(os.path.abspath(to))
    check_files(checkpoint)
    if merge and not checkpoint.adapter:
        raise ValueError(f"{checkpoint.folder} holds full weights: there is nothing to merge")
    check = _Check(checkpoint, dtype or checkpoint.dtype, device)
    with _draft(to) as draft:
        differences = check.compare(draft, merge)
        made = Provenance(
            name=name or to.name,
            base_revision=check.revision,
            licence=licence or base_licence(checkpoint.policy),
            traces=checkpoint.training["traces"],
            dtype=check.dtype,
            merged=merge,
            moved=check.moved,
            differences=differences,
        )
        _write(draft / "provenance.json", _provenance(checkpoint, made))
        model_card(checkpoint, made).save(draft / "README.md")
        shutil.copytree(_HOOK, draft / _HOOK.name, ignore=shutil.ignore_patterns("__pycache__"))
    return Shipped(to, checkpoint.method, check.tolerance, made)


def upload(folder: Path, repo_id: str, *, private: bool) -> str:
    """Push a shipped folder to the model hub and return its address."""
    api = HfApi()
    api.create_repo(repo_id, private=private or None, exist_ok=True)  # None: as the account's settings have it
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Ship by nabla-trl"))


def check_push(checkpoint: Checkpoint, repo_id: str, *, merge: bool) -> None:
    """Refuse a push that cannot be of use, before any work.

    Raises:
        ValueError: not a name of the hub's, or an adapter whose base only this machine has.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not a name on the hub: {one_line(error)}") from error
    if checkpoint.adapter and not merge and Path(checkpoint.policy).exists():
        raise ValueError(
            f"the adapter's base {checkpoint.policy} is a folder of this machine, so nobody else could load it: "
            "add --merge, or train from a model on the hub"
        )


# --- the check ----------------------------------------------------------------------------------------


class _Check:
    """The trained model's logits on probes, and the folder's copies against them. One model is in memory at a time."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, device: str | None):
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        folder = str(checkpoint.folder)
        self.tokenizer = load_tokenizer(folder)
        base = load_policy(self.base, dtype=dtype, device=device, revision=self._pinned())
        _check_vocabulary(checkpoint, self.tokenizer, base.tokenizer)
        _check_whole(base)
        known: str | None = vars(base.model.config).get("_commit_hash")  # set where it came from the hub
        self.revision = self._pinned() or known
        self.probes = _probes(checkpoint, base)
        before = _logits(base.model, self.probes)
        del base
        self.logits = _logits(self._trained(), self.probes)
        if not all(one.isfinite().all() for one in self.logits):
            raise ValueError(f"{folder} gives logits that are not finite in {dtype}")
        self.moved = _furthest(before, self.logits)
        if self.moved == 0:
            raise ValueError(f"{folder} gives the logits of {self.base}: the training changed nothing")
        self.tolerance = TOLERANCE[dtype] * max(1.0, *(float(one.abs().max()) for one in self.logits))

    @property
    def base(self) -> str:
        return self.checkpoint.policy

    def _pinned(self) -> str | None:
        return adapter_note(str(self.checkpoint.folder)).revision if self.checkpoint.adapter else None

    def _trained(self) -> PreTrainedModel:
        """The model as the run evaluated it, an adapter merged into its base."""
        folder = str(self.checkpoint.folder)
        if not self.checkpoint.adapter:
            return load_policy(folder, dtype=self.dtype, device=self.device).model
        revision = self._pinned()
        return load_policy(self.base, dtype=self.dtype, device=self.device, adapter=folder, revision=revision).model

    def compare(self, draft: Path, merge: bool) -> dict[str, float]:
        """Write the weights and tokenizers to `draft`, load them again and compare.

        Returns:
            The largest difference of a logit, by what was loaded.
        """
        _copy(self.checkpoint, draft)
        self.tokenizer.save_pretrained(draft)
        if merge:
            self._trained().save_pretrained(draft / MERGED)
            for file in (draft / MERGED).glob("*.safetensors"):
                shutil.copymode(draft / CONFIG, file)  # safetensors writes for nobody else to read
            self.tokenizer.save_pretrained(draft / MERGED)
        loaders: dict[str, Callable[[], PreTrainedModel]] = {"folder": lambda: self._reload(draft)}
        if self.checkpoint.adapter:
            loaders["adapter by PEFT"] = lambda: self._wrapped(draft)
        if merge:
            loaders[MERGED] = lambda: self._reload(draft / MERGED)
        return {what: self._difference(what, load()) for what, load in loaders.items()}

    def _difference(self, what: str, model: PreTrainedModel) -> float:
        found = _furthest(self.logits, _logits(model, self.probes))
        if not found <= self.tolerance:
            raise ValueError(
                f"loaded again ({what}), logits differ from the trained model's by {found:.2g}, more than "
                f"{self.tolerance:.2g} in {self.dtype}: nothing was shipped"
            )
        return found

    def _reload(self, folder: Path) -> PreTrainedModel:
        again = load_policy(str(folder), dtype=self.dtype, device=self.device)
        _check_vocabulary(self.checkpoint, self.tokenizer, again.tokenizer)
        if again.tokenizer.chat_template != self.tokenizer.chat_template:
            raise ValueError(
                f"the chat template of {self.checkpoint.folder} is another once saved: nothing was shipped"
            )
        return again.model

    def _wrapped(self, folder: Path) -> PreTrainedModel:
        """The base with the adapter beside its weights, as PEFT's users load it."""
        from peft import PeftModel

        base = load_causal(self.base, dtype=self.dtype, device=self.device, revision=self._pinned())
        return PeftModel.from_pretrained(base, str(folder)).eval()


def _copy(checkpoint: Checkpoint, draft: Path) -> None:
    names = [FILE, WEIGHTS] if checkpoint.adapter else _model_files(checkpoint.folder)
    for name in names:
        shutil.copyfile(checkpoint.folder / name, draft / name)
    shutil.copyfile(checkpoint.made_with, draft / CONFIG)


def _model_files(folder: Path) -> list[str]:
    """Weights and configurations; tokenizers are saved apart, and what a trainer leaves beside them is not shipped."""
    weights = [file.name for file in sorted(folder.glob("*.safetensors*"))]
    return [*weights, *(name for name in ("config.json", "generation_config.json") if (folder / name).is_file())]


def _check_vocabulary(checkpoint: Checkpoint, own: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase) -> None:
    ours, theirs = own.get_vocab(), base.get_vocab()
    odd = sorted(token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token))
    if odd:
        named = ", ".join(map(repr, odd[:3])) + (" …" if len(odd) > 3 else "")
        raise ValueError(
            f"the tokenizers of {checkpoint.folder} and {checkpoint.policy} differ in {len(odd)} tokens ({named}): it "
            "was trained on another vocabulary"
        )


def _check_whole(base: Policy) -> None:
    if "quantization_config" in base.model.config.to_dict():
        raise ValueError(
            f"{base.name} is quantised: an adapter would be merged into its few bits. Ship on its un-quantised weights"
        )


def _probes(checkpoint: Checkpoint, base: Policy) -> list[list[int]]:
    """Token ids to compare logits on: one walk through the vocabulary, and the first traces, prompt and response."""
    allowed = torch.nonzero(~base.forbidden.cpu()).squeeze(1)
    length = min(32, base.context)
    walk = allowed[torch.linspace(0, len(allowed) - 1, length).long()].tolist()
    folder = checkpoint.run / "traces"
    columns = ("prompt_ids", "response_ids", "meta", "error")
    traces = read_traces(folder, columns) if folder.is_dir() else []
    readable = [t for t in traces if t.error is None and t.meta.get("tokenizer_hash") == base.tokenizer_hash]
    return [walk, *((t.prompt_ids + t.response_ids)[: base.context] for t in readable[:PROBES])]


@torch.no_grad()
def _logits(model: PreTrainedModel, probes: Sequence[Sequence[int]]) -> list[Tensor]:
    """[T, V] float32 on the CPU for every probe."""
    return [model(torch.tensor([ids], device=model.device)).logits[0].float().cpu() for ids in probes]


def _furthest(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """NaN where a difference is."""
    return float(torch.stack([(one - other).abs().max() for one, other in zip(some, others, strict=True)]).max())


# --- the folder ---------------------------------------------------------------------------------------


@contextmanager
def _draft(to: Path) -> Iterator[Path]:
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


def _provenance(checkpoint: Checkpoint, made: Provenance) -> dict[str, Any]:
    return {
        "method": checkpoint.method,
        "base": checkpoint.policy,
        "reward": checkpoint.facts["reward"],
        "training": checkpoint.training,
        **asdict(made),
        "versions": versions(),
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
