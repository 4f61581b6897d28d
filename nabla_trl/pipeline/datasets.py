"""Traces as data sets that plain trainers of TRL take."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nabla_trl.models.loading import find_tokenizer, get_loaded_name
from nabla_trl.models.policy import hash_vocabulary
from nabla_trl.traces.datasets import SFT_SELECTIONS, TrainingRows
from nabla_trl.traces.schema import Trace
from nabla_trl.traces.storage import list_trace_files, read_traces
from nabla_trl.training.offline import build_training_rows
from nabla_trl.utils.fields import check_choices
from nabla_trl.utils.formatting import format_error

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Traces in memory, or the folder of a run that holds them.
TraceSource = Iterable[Trace] | str | Path


def to_sft_dataset(traces: TraceSource, *, selection: str = "best", include_unfinished: bool = False) -> Dataset:
    """Return traces as a data set for `trl.SFTTrainer`: token ids, with labels over the response alone.

    Args:
        traces: traces, or the folder of a run.
        selection: "best" (the best response of each problem), "improved" (all accepted responses above the first one's
            reward) or "samples" (the last response of each trace, for Metropolis chains).
        include_unfinished: take responses that were cut at the limit, too.

    Returns:
        Columns `input_ids` and `labels`, -100 over the prompt. The trainer neither tokenizes again nor adds an end.

    Raises:
        ValueError: no response can be trained on, or an unknown selection.
    """
    check_choices("selection", [selection], SFT_SELECTIONS)
    found = collect_traces(traces)
    rows = build_training_rows("sft", found, sft_selection=selection, beta=1.0, include_unfinished=include_unfinished)
    return _build_dataset(rows, "SFT")


def to_preference_dataset(traces: TraceSource, tokenizer: PreTrainedTokenizerBase | str | None = None) -> Dataset:
    """Return traces as a data set for `trl.DPOTrainer`: the better and the worse continuation of a prefix.

    The trainer tokenizes texts again. Pairs for which this would give other tokens, or an end that the response does
    not have, are left out. Their number is logged.

    Args:
        traces: traces, or the folder of a run.
        tokenizer: the policy's, or its name. None: that of traces made in this process, else that of the policy's
            name.

    Returns:
        Columns `prompt`, `chosen` and `rejected` (texts), and `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Raises:
        ValueError: no proposal was accepted, no pair can be trained on, or the tokenizer is not known.
    """
    found = collect_traces(traces)
    rows = build_training_rows("dpo", found, sft_selection="best", beta=1.0)
    resolved = _resolve_tokenizer(found, tokenizer)
    written, skipped = [], Counter(rows.skipped)
    for row in rows.rows:
        if texts := _write_pair(row, resolved):
            written.append({**texts, **row})
        else:
            skipped["not the same tokens as text"] += 1
    if not written:
        raise ValueError(
            f"none of {len(rows.rows)} pairs has the same tokens after it is written as text, as trl.DPOTrainer reads "
            'it: train("dpo", …) of this package takes token ids'
        )
    return _build_dataset(TrainingRows(written, skipped), "DPO")


def collect_traces(traces: TraceSource) -> list[Trace]:
    """Return traces in memory, or those in the folder of a run.

    Raises:
        ValueError: there are none, or something else than a trace is among them.
    """
    if isinstance(traces, Trace):
        return [traces]
    if not isinstance(traces, Iterable | str | Path):
        raise ValueError(f"traces are Trace objects or the folder of a run, not {type(traces).__name__}")
    if not isinstance(traces, str | Path):
        found = list(traces)
    else:
        folder = Path(traces)
        found = read_traces(list_trace_files(folder) or folder)
    if not found:
        raise ValueError("there are no traces")
    if others := {type(item).__name__ for item in found if not isinstance(item, Trace)}:
        raise ValueError(f"traces are Trace objects, and not {', '.join(sorted(others))}: see Trace.from_dict")
    return found


def _build_dataset(rows: TrainingRows, what: str) -> Dataset:
    from datasets import Dataset

    if rows.skipped:
        logger.info("%s: %d rows; left out: %s", what, len(rows.rows), json.dumps(dict(rows.skipped)))
    return Dataset.from_list(rows.rows)


def _resolve_tokenizer(traces: Sequence[Trace], tokenizer: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the traces' policy."""
    if tokenizer is None:
        decoders = [trace.decoder for trace in traces if trace.decoder is not None]
        tokenizer = next((decoder.tokenizer for decoder in decoders if decoder.tokenizer is not None), None)
    if tokenizer is None:
        names = {get_loaded_name(trace.meta.get("policy", "")) for trace in traces}
        if len(names) > 1 or not any(names):
            raise ValueError("the traces do not say which tokenizer they need: give to_preference_dataset a tokenizer")
        [tokenizer] = names
        try:
            resolved = find_tokenizer(tokenizer, "")
        except ValueError as error:  # the policy was in memory, and its name may be that of its class
            raise ValueError(
                f"give to_preference_dataset the tokenizer of the policy {tokenizer}: {format_error(error)}"
            ) from error
    else:
        resolved = find_tokenizer(tokenizer, "")
    vocabulary = hash_vocabulary(resolved)
    if any(trace.meta.get("tokenizer_hash", vocabulary) != vocabulary for trace in traces):
        raise ValueError("the traces were made with another tokenizer: give to_preference_dataset the policy's")
    return resolved


def _write_pair(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, str] | None:
    """Return prompt, chosen and rejected as texts, or None if the trainer would read other tokens from them."""
    prompt_ids, begin = row["prompt_ids"], 0
    special = tokenizer("", add_special_tokens=True)["input_ids"]  # what the tokenizer puts around a text
    if special and prompt_ids[: len(special)] == special:
        begin = len(special)
    decode: Callable[[list[int]], str] = tokenizer.decode
    prompt = decode(prompt_ids[begin:])
    if tokenizer(prompt)["input_ids"] != prompt_ids:
        return None
    texts = {"prompt": prompt}
    for name in ("chosen", "rejected"):
        ids = row[f"{name}_ids"]
        text = decode(prompt_ids[begin:] + ids)
        ends = text.endswith(str(tokenizer.eos_token))  # else the trainer would add an end
        if not ends or not text.startswith(prompt) or tokenizer(text)["input_ids"] != prompt_ids + ids:
            return None
        texts[name] = text[len(prompt) :]
    return texts
