"""Export a trained checkpoint to a folder that loads without its run, and push the folder to the Hub.

The folder is written under a temporary name. It is renamed after it was loaded again and gave the logits of the
trained model, so a failure leaves nothing behind.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from huggingface_hub import HfApi
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nabla_trl.exporting.checkpoint import Checkpoint, check_weight_files
from nabla_trl.exporting.model_card import Provenance, build_model_card, find_base_license
from nabla_trl.models.loading import (
    ADAPTER_CONFIG_FILE,
    load_causal_lm,
    load_policy,
    load_tokenizer,
    read_adapter_info,
)
from nabla_trl.models.policy import Policy
from nabla_trl.traces.build import get_package_versions
from nabla_trl.traces.storage import list_trace_files, read_traces
from nabla_trl.training.checkpoints import ADAPTER_WEIGHTS_FILE, CONFIG_FILE
from nabla_trl.training.peft import make_base_path_absolute
from nabla_trl.training.reporting import check_hub_repository

MERGED_DIR = "merged"
# Largest allowed difference of a logit, relative to the largest logit (at least 1). Rounding differs, because an
# adapter is added to the weights or to the activations.
LOGIT_TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
MAX_CHECK_TRACES = 4  # traces to compare logits on
_CUSTOM_GENERATE_DIR = Path(__file__).parent / "custom_generate"


@dataclass(frozen=True)
class ExportResult:
    """An exported folder, the results of its check (see `Provenance`), and the URL that it was pushed to."""

    output_dir: Path
    method: str
    logit_tolerance: float
    provenance: Provenance
    run_dir: Path
    url: str = ""


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
    """Export a checkpoint to a folder, and check the folder by loading it again.

    Args:
        checkpoint: from `find_checkpoint`.
        output_dir: folder to write, which must be empty or not exist.
        merge: also write base model and adapter as one model, in merged/.
        license: key of a license on the Hub. None takes the base model's license if its card is available offline.
        dtype: data type of the check and of merged weights. None takes that of the run's evaluation.
        device: device of the check. None takes a GPU if there is one.
        model_name: name of the model on its card. None takes the name of the folder.

    Raises:
        ValueError: `output_dir` is not empty, `check_weight_files` fails, the weights do not fit the base model or
            change nothing, vocabularies differ, the base model is quantized, rows are incomplete, or the exported
            folder gives other logits.
        OSError: the folder cannot be written.
    """
    check_export_folder(output_dir)
    output_dir = Path(os.path.abspath(output_dir))
    check_weight_files(checkpoint)
    if merge and not checkpoint.is_adapter:
        raise ValueError(f"{checkpoint.checkpoint_dir} holds full weights: there is nothing to merge")
    check = _LogitCheck(checkpoint, dtype or checkpoint.dtype, device)
    with temporary_folder(output_dir) as draft:
        differences = check.write_and_compare(draft, merge)
        provenance = Provenance(
            model_name=model_name or output_dir.name,
            base_revision=check.base_revision,
            license=license or find_base_license(checkpoint.base_policy),
            traces_hash=checkpoint.training["traces_hash"],
            dtype=check.dtype,
            has_merged_model=merge,
            max_logit_change=check.max_logit_change,
            logit_differences=differences,
        )
        record = {
            "method": checkpoint.method,
            "base": checkpoint.base_policy,
            "reward": checkpoint.facts["reward"],
            "training": checkpoint.training,
            **asdict(provenance),
            "versions": get_package_versions(),
        }
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        (draft / "provenance.json").write_text(text, encoding="utf-8")
        build_model_card(checkpoint, provenance).save(draft / "README.md")
        shutil.copytree(
            _CUSTOM_GENERATE_DIR, draft / _CUSTOM_GENERATE_DIR.name, ignore=shutil.ignore_patterns("__pycache__")
        )
    return ExportResult(output_dir, checkpoint.method, check.tolerance, provenance, checkpoint.run_dir)


def check_export_folder(output_dir: Path) -> None:
    """Refuse a folder that holds something."""
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"{output_dir} is not an empty folder: choose another --output_dir, or delete it")


def push_exported_folder(folder: Path, repo_id: str, *, private: bool) -> str:
    """Push an exported folder to the Hub and return its URL."""
    api = HfApi()
    api.create_repo(repo_id, private=private or None, exist_ok=True)  # None: the default of the account
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Export by nabla-trl"))


def check_push_to_hub(checkpoint: Checkpoint, repo_id: str, *, merge: bool) -> None:
    """Check before any work that a push is possible and useful.

    Raises:
        ValueError: only this machine has the base model of the adapter, or as `check_hub_repository`.
    """
    if checkpoint.is_adapter and not merge and Path(checkpoint.base_policy).exists():
        raise ValueError(
            f"the adapter's base {checkpoint.base_policy} is a folder of this machine, so nobody else could load it: "
            "add --merge, or train from a model on the Hub"
        )
    check_hub_repository(repo_id, HfApi())


# --- the check ----------------------------------------------------------------------------------------


class _LogitCheck:
    """Compare the logits of exported copies with those of the trained model, with one model in memory at a time."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, device: str | None):
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        folder = str(checkpoint.checkpoint_dir)
        self.tokenizer = load_tokenizer(folder)
        base = load_policy(checkpoint.base_policy, dtype=dtype, device=device, revision=self._read_base_revision())
        _check_vocabulary(checkpoint, self.tokenizer, base.tokenizer)
        _check_not_quantized(base)
        commit_hash: str | None = vars(base.model.config).get("_commit_hash")  # set if the model came from the Hub
        self.base_revision = self._read_base_revision() or commit_hash
        self.check_sequences = _collect_check_sequences(checkpoint, base)
        base_logits = _compute_logits(base.model, self.check_sequences)
        del base
        self.trained_logits = _compute_logits(self._load_trained_model(), self.check_sequences)
        if not all(logits.isfinite().all() for logits in self.trained_logits):
            raise ValueError(f"{folder} gives logits that are not finite in {dtype}")
        self.max_logit_change = _compute_max_difference(base_logits, self.trained_logits)
        if self.max_logit_change == 0:
            raise ValueError(f"{folder} gives the logits of {checkpoint.base_policy}: the training changed nothing")
        max_logit = max(float(logits.abs().max()) for logits in self.trained_logits)
        self.tolerance = LOGIT_TOLERANCE[dtype] * max(1.0, max_logit)

    def _read_base_revision(self) -> str | None:
        return read_adapter_info(str(self.checkpoint.checkpoint_dir)).revision if self.checkpoint.is_adapter else None

    def _load_trained_model(self) -> PreTrainedModel:
        """Load the model as the run evaluated it, with an adapter merged into its base."""
        folder = str(self.checkpoint.checkpoint_dir)
        if not self.checkpoint.is_adapter:
            return load_policy(folder, dtype=self.dtype, device=self.device).model
        base, revision = self.checkpoint.base_policy, self._read_base_revision()
        return load_policy(base, dtype=self.dtype, device=self.device, adapter=folder, revision=revision).model

    def write_and_compare(self, draft: Path, merge: bool) -> dict[str, float]:
        """Write weights and tokenizers to `draft`, load them again and compare their logits.

        Returns:
            The largest difference of a logit, by the way of loading.
        """
        _copy_files(self.checkpoint, draft)
        self.tokenizer.save_pretrained(draft)
        if merge:
            self._load_trained_model().save_pretrained(draft / MERGED_DIR)
            for file in (draft / MERGED_DIR).glob("*.safetensors"):
                shutil.copymode(draft / CONFIG_FILE, file)  # safetensors lets only the owner read its files
            self.tokenizer.save_pretrained(draft / MERGED_DIR)
        loaders: dict[str, Callable[[], PreTrainedModel]] = {"folder": lambda: self._load_exported_model(draft)}
        if self.checkpoint.is_adapter:
            loaders["adapter by PEFT"] = lambda: self._load_with_peft(draft)
        if merge:
            loaders[MERGED_DIR] = lambda: self._load_exported_model(draft / MERGED_DIR)
        return {way: self._compare_logits(way, load()) for way, load in loaders.items()}

    def _compare_logits(self, way: str, model: PreTrainedModel) -> float:
        difference = _compute_max_difference(self.trained_logits, _compute_logits(model, self.check_sequences))
        if not difference <= self.tolerance:
            raise ValueError(
                f"loaded again ({way}), logits differ from the trained model's by {difference:.2g}, more than "
                f"{self.tolerance:.2g} in {self.dtype}: nothing was exported"
            )
        return difference

    def _load_exported_model(self, folder: Path) -> PreTrainedModel:
        policy = load_policy(str(folder), dtype=self.dtype, device=self.device)
        _check_vocabulary(self.checkpoint, self.tokenizer, policy.tokenizer)
        if policy.tokenizer.chat_template != self.tokenizer.chat_template:
            raise ValueError(
                f"the chat template of {self.checkpoint.checkpoint_dir} changes when it is saved: nothing was exported"
            )
        return policy.model

    def _load_with_peft(self, folder: Path) -> PreTrainedModel:
        """Load the base model with the adapter beside its weights, as users of PEFT do."""
        from peft import PeftModel

        base_policy, revision = self.checkpoint.base_policy, self._read_base_revision()
        base = load_causal_lm(base_policy, dtype=self.dtype, device=self.device, revision=revision)
        return PeftModel.from_pretrained(base, str(folder)).eval()


def _copy_files(checkpoint: Checkpoint, draft: Path) -> None:
    """Copy weights and configurations. Tokenizers are saved separately, and a trainer's other files are left out."""
    folder = checkpoint.checkpoint_dir
    if checkpoint.is_adapter:
        files = [folder / ADAPTER_CONFIG_FILE, folder / ADAPTER_WEIGHTS_FILE]
    else:
        configs = [folder / "config.json", folder / "generation_config.json"]
        files = [*folder.glob("*.safetensors*"), *(file for file in configs if file.is_file())]
    for file in files:
        shutil.copyfile(file, draft / file.name)
    make_base_path_absolute(draft)
    shutil.copyfile(checkpoint.checkpoint_dir.parent / CONFIG_FILE, draft / CONFIG_FILE)


def _check_vocabulary(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, base_tokenizer: PreTrainedTokenizerBase
) -> None:
    vocab, base_vocab = tokenizer.get_vocab(), base_tokenizer.get_vocab()
    tokens = sorted(token for token in {**vocab, **base_vocab} if vocab.get(token) != base_vocab.get(token))
    if tokens:
        examples = ", ".join(map(repr, tokens[:3])) + (" …" if len(tokens) > 3 else "")
        raise ValueError(
            f"the tokenizers of {checkpoint.checkpoint_dir} and {checkpoint.base_policy} differ in {len(tokens)} "
            f"tokens ({examples}): the checkpoint was trained on another vocabulary"
        )


def _check_not_quantized(base: Policy) -> None:
    if "quantization_config" in base.model.config.to_dict():
        raise ValueError(
            f"{base.name} is quantized: merging an adapter would round it to a few bits. Export with its full weights"
        )


def _collect_check_sequences(checkpoint: Checkpoint, base: Policy) -> list[list[int]]:
    """Return token ids to compare logits on: evenly spaced tokens of the vocabulary, and the first traces."""
    allowed = torch.nonzero(~base.forbidden_mask.cpu()).squeeze(1)
    length = min(32, base.context_length)
    sequences = [allowed[torch.linspace(0, len(allowed) - 1, length).long()].tolist()]
    files = list_trace_files(checkpoint.run_dir)
    columns = ("prompt_ids", "response_ids", "meta", "error")
    for trace in read_traces(files, columns):
        has_same_tokens = trace.error is None and trace.meta.get("tokenizer_hash") == base.tokenizer_hash
        if has_same_tokens and len(sequences) <= MAX_CHECK_TRACES:
            sequences.append((trace.prompt_ids + trace.response_ids)[: base.context_length])
    return sequences


@torch.no_grad()
def _compute_logits(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return [T, V] float32 logits on the CPU for every sequence."""
    return [model(torch.tensor([ids], device=model.device)).logits[0].float().cpu() for ids in sequences]


def _compute_max_difference(logits: Sequence[Tensor], other_logits: Sequence[Tensor]) -> float:
    """Return the largest absolute difference, NaN if any difference is NaN."""
    return float(torch.stack([(a - b).abs().max() for a, b in zip(logits, other_logits, strict=True)]).max())


# --- the folder ---------------------------------------------------------------------------------------


@contextmanager
def temporary_folder(output_dir: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `output_dir` at the end, or deleted after an error."""
    _remove_leftovers(output_dir)
    draft = output_dir.with_name(f"{output_dir.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    draft.mkdir(parents=True)
    try:
        yield draft
        if output_dir.exists():
            output_dir.rmdir()  # it is empty
        draft.rename(output_dir)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _remove_leftovers(output_dir: Path) -> None:
    """Delete the temporary folders of exports to the same folder that were killed on this machine."""
    prefix = f"{output_dir.name}."
    for path in output_dir.parent.glob(f"{glob.escape(prefix)}*.tmp"):
        host, _, process_id = path.name.removeprefix(prefix).removesuffix(".tmp").rpartition("-")
        is_ours = host in (socket.gethostname(), "") and process_id.isdigit()  # version 0.2 wrote no host
        if is_ours and not _is_writing(int(process_id), path):
            shutil.rmtree(path, ignore_errors=True)


def _is_writing(process_id: int, folder: Path) -> bool:
    """Return whether the process that made a folder still runs. Another process may have its number by now."""
    try:
        return process_id != os.getpid() and psutil.Process(process_id).create_time() <= folder.stat().st_mtime + 1
    except (psutil.NoSuchProcess, OSError):
        return False
    except psutil.AccessDenied:
        return True
