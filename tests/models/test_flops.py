"""FLOPs: the formula against torch's own FLOP counter on real tiny models, and the accounts of FlopCounter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from nabla_trl.models import flops
from nabla_trl.models.flops import Cost, FlopCounter, ModelSize, measure_model_size

VOCAB, HIDDEN, LAYERS, HEADS, INNER = 61, 24, 3, 4, 40
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "intermediate_size": INNER,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}


def _llama() -> PreTrainedModel:
    # head_dim is not hidden / heads here, so that an attention width taken from hidden_size would show
    return LlamaForCausalLM(LlamaConfig(**SMALL, head_dim=8, tie_word_embeddings=False))


def _qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=True))


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=64, attn_implementation="eager"
        )
    )


@pytest.fixture(params=[_llama, _qwen2, _gpt2], ids=["llama", "qwen2", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    return request.param().eval().requires_grad_(False)


def _counted(counter: FlopCounterMode) -> float:
    """What torch counted, less the rotary angles (a matmul in the code, left out of the formula)."""
    counts = counter.get_flop_counts()
    rotary = sum(sum(ops.values()) for path, ops in counts.items() if path.endswith("rotary_emb"))
    return float(sum(counts["Global"].values()) - rotary)


def _masked_half(size: ModelSize, count: int) -> float:
    """Attention FLOPs of the dense T x T kernel that a causal model does not need."""
    return 4 * size.attention_width * size.num_layers * count * (count - 1) / 2


def test_cached_decoding_equals_torch_counter_token_by_token(model: PreTrainedModel) -> None:
    size, cache = measure_model_size(model, "policy"), DynamicCache()
    ids = torch.randint(0, VOCAB, (1, 5))
    with torch.no_grad():
        for position in range(5):
            with FlopCounterMode(display=False) as counter:
                model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            assert _counted(counter) == size.compute_forward_flops(position, 1)


def test_prefill_after_a_prefix_with_a_partial_head_equals_torch_counter(model: PreTrainedModel) -> None:
    size, cache = measure_model_size(model, "policy"), DynamicCache()
    ids = torch.randint(0, VOCAB, (1, 11))
    with torch.no_grad():
        model(input_ids=ids[:, :4], past_key_values=cache, use_cache=True)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids[:, 4:], past_key_values=cache, use_cache=True, logits_to_keep=2)
    assert _counted(counter) == size.compute_forward_flops(4, 7, num_head_positions=2) + _masked_half(size, 7)


def test_frozen_backward_equals_torch_counter(model: PreTrainedModel) -> None:
    size, count = measure_model_size(model, "policy"), 6
    embeds = torch.randn(1, count, HIDDEN, requires_grad=True)
    logits = model(inputs_embeds=embeds, use_cache=False).logits
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    assert embeds.grad is not None and model.get_input_embeddings().weight.grad is None
    assert _counted(counter) == size.compute_backward_flops(0, count) + 2 * _masked_half(size, count)


def test_frozen_backward_behind_a_detached_prefix_equals_torch_counter(model: PreTrainedModel) -> None:
    size, cache = measure_model_size(model, "policy"), DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.randint(0, VOCAB, (1, 5)), past_key_values=cache, use_cache=True)
    embeds = torch.randn(1, 1, HIDDEN, requires_grad=True)
    logits = model(inputs_embeds=embeds, past_key_values=cache, use_cache=True).logits
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    assert _counted(counter) == size.compute_backward_flops(5, 1)


def test_trained_backward_equals_torch_counter(model: PreTrainedModel) -> None:
    size, count = measure_model_size(model, "policy"), 6
    model.requires_grad_(True)
    logits = model(input_ids=torch.randint(0, VOCAB, (1, count)), use_cache=False).logits
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    expected = size.compute_backward_flops(0, count, frozen=False) + 2 * _masked_half(size, count)
    assert _counted(counter) == expected


def test_reward_model_head_is_the_score() -> None:
    reward = LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=1, pad_token_id=0)).eval()
    size = measure_model_size(reward, "reward")
    assert size.head_params == HIDDEN
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        reward(input_ids=torch.tensor([[5]]))
    assert _counted(counter) == size.compute_forward_flops(0, 1)


def test_linear_params_leave_out_embeddings_positions_head_and_biases() -> None:
    per_layer = 3 * HIDDEN * HIDDEN + HIDDEN * HIDDEN + 2 * HIDDEN * 4 * HIDDEN
    expected = ModelSize("policy", LAYERS * per_layer, LAYERS, HIDDEN, VOCAB * HIDDEN)
    assert measure_model_size(_gpt2(), "policy") == expected


def test_only_the_experts_of_one_token_count() -> None:
    config = MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=1, tie_word_embeddings=False)
    one = measure_model_size(MixtralForCausalLM(config), "policy").linear_params
    config.num_experts_per_tok = 4
    every = measure_model_size(MixtralForCausalLM(config), "policy").linear_params
    assert every - one == 3 * LAYERS * 3 * HIDDEN * INNER
    attention = HIDDEN * HIDDEN * 2 + HIDDEN * HIDDEN // 2 * 2  # two key-value heads for four
    assert every == LAYERS * (attention + 4 * HIDDEN + 4 * 3 * HIDDEN * INNER)


def test_adapters_count_and_a_replaced_head_counts_once() -> None:
    from peft import LoraConfig, TaskType, get_peft_model

    reward = LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=1, pad_token_id=0))
    bare = measure_model_size(reward, "reward")
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["q_proj"])
    adapted = measure_model_size(get_peft_model(reward, lora), "reward")
    assert adapted.head_params == bare.head_params
    assert adapted.linear_params == bare.linear_params + LAYERS * 2 * (HIDDEN + HIDDEN)


def test_models_without_a_known_head_are_refused() -> None:
    bert = BertConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=INNER
    )
    for headless in (LlamaModel(LlamaConfig(**SMALL)), BertForSequenceClassification(bert)):
        with pytest.raises(ValueError, match="no lm_head and no `score` head"):
            measure_model_size(headless, "policy")


SIZE = ModelSize("policy", linear_params=1000, num_layers=2, attention_width=16, head_params=300)


def test_formula_by_hand() -> None:
    attended = 4 * 16 * 2 * (4 + 5 + 6)  # positions 3, 4 and 5 see 4, 5 and 6 tokens
    assert SIZE.compute_forward_flops(3, 3, num_head_positions=1) == 2 * 1000 * 3 + attended + 2 * 300
    assert SIZE.compute_backward_flops(3, 3, num_head_positions=1) == 2 * 1000 * 3 + 2 * attended + 2 * 300
    assert SIZE.compute_backward_flops(3, 3, frozen=False) == 2 * (2 * 1000 * 3 + attended + 2 * 300 * 3)


def test_cost_of_a_span_is_the_sum_of_its_parts() -> None:
    whole = SIZE.compute_forward_flops(2, 10)
    assert whole == SIZE.compute_forward_flops(2, 4) + SIZE.compute_forward_flops(6, 6)
    assert whole == sum(SIZE.compute_forward_flops(position, 1) for position in range(2, 12))
    assert (
        SIZE.compute_forward_flops(2, 10, num_head_positions=0)
        + SIZE.compute_forward_flops(9, 0, num_head_positions=10)
        == whole
    )


def _flops(kind: str, **options: bool) -> float:
    flop_counter = FlopCounter()
    flop_counter.add_flops("p", SIZE, kind, 4, 5, num_head_positions=2, **options)
    return flop_counter.get_cost("p").flops


def test_kinds_of_work() -> None:
    forward = SIZE.compute_forward_flops(4, 5, 2)
    assert _flops("prefill") == _flops("decode") == _flops("forward") == forward
    assert _flops("backward") == SIZE.compute_backward_flops(4, 5, 2)
    assert _flops("train") == forward + SIZE.compute_backward_flops(4, 5, 2)
    assert _flops("train", frozen=False) == 3 * forward
    with pytest.raises(ValueError, match="unknown kind of work 'sample'; known: prefill"):
        _flops("sample")
    with pytest.raises(ValueError, match="start=-1"):
        FlopCounter().add_flops("p", SIZE, "decode", -1, 5)


def test_meter_keeps_accounts_apart_and_totals_them() -> None:
    flop_counter = FlopCounter()
    flop_counter.add_flops("a", SIZE, "prefill", 0, 4, num_head_positions=1)
    flop_counter.add_flops("a", SIZE, "decode", 4, 3)
    flop_counter.add_flops("b", SIZE, "decode", 0, 2)
    assert flop_counter.get_cost("a").tokens == {"policy/prefill": 4, "policy/decode": 3}
    assert flop_counter.get_total_cost() == flop_counter.get_cost("a") + flop_counter.get_cost("b")
    assert flop_counter.get_total_cost().tokens == {"policy/prefill": 4, "policy/decode": 5}
    assert flop_counter.get_cost("never charged") == Cost()


def test_a_call_is_a_pass_over_one_sequence() -> None:
    """A decoded token is a call, a prompt or a scored response is one of any length, and a head alone is none."""
    flop_counter = FlopCounter()
    for kind, num_tokens in (("prefill", 9), ("decode", 7), ("forward", 5), ("forward", 0), ("backward", 5)):
        flop_counter.add_flops("a", SIZE, kind, 0, num_tokens, num_head_positions=num_tokens or 3)
    flop_counter.add_flops("b", SIZE, "decode", 0, 2)
    calls = flop_counter.get_cost("a").calls
    assert calls == {"policy/prefill": 1, "policy/decode": 7, "policy/forward": 1, "policy/backward": 1}
    assert flops.count_model_calls(calls) == 9, "the paper counts no prompt"
    assert flop_counter.get_total_cost().calls["policy/decode"] == 9
    assert flops.count_model_calls({}) is None, "not counted is not zero"


def test_cost_is_a_copy() -> None:
    flop_counter = FlopCounter()
    flop_counter.add_flops("a", SIZE, "decode", 0, 2)
    flop_counter.get_cost("a").tokens.clear()
    flop_counter.get_total_cost().tokens.clear()
    assert flop_counter.get_cost("a").tokens == {"policy/decode": 2}


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still; the test adds to its only entry."""
    now = [100.0]
    monkeypatch.setattr(flops, "perf_counter", lambda: now[0])
    return now


def test_clock_shares_seconds_evenly_by_row(wait: list[float]) -> None:
    flop_counter = FlopCounter()
    with flop_counter.measure_seconds(["a", "b", "b", "c"]):
        wait[0] += 8
    assert [flop_counter.get_cost(key).seconds for key in "abc"] == [2, 4, 2]


def test_nested_clocks_count_no_second_twice(wait: list[float]) -> None:
    flop_counter = FlopCounter()
    with flop_counter.measure_seconds(["outer"]):
        wait[0] += 1
        with flop_counter.measure_seconds(["inner"]):
            wait[0] += 2
            with flop_counter.measure_seconds(["innermost", "inner"]):
                wait[0] += 4
        with flop_counter.measure_seconds(["inner"]):
            wait[0] += 8
        wait[0] += 16
    assert flop_counter.get_cost("outer").seconds == 17
    assert flop_counter.get_cost("inner").seconds == 12
    assert flop_counter.get_cost("innermost").seconds == 2
    assert flop_counter.get_total_cost().seconds == 31


def test_time_lost_to_an_exception_is_charged_too(wait: list[float]) -> None:
    flop_counter = FlopCounter()
    with pytest.raises(RuntimeError), flop_counter.measure_seconds(["a"]), flop_counter.measure_seconds(["b"]):
        wait[0] += 3
        raise RuntimeError
    with flop_counter.measure_seconds(["a"]):
        wait[0] += 1
    assert (flop_counter.get_cost("a").seconds, flop_counter.get_cost("b").seconds) == (1, 3)
    with pytest.raises(ValueError, match="at least one key"), flop_counter.measure_seconds([]):
        pass


def test_cost_survives_json() -> None:
    cost = Cost(1.5e18, 0.1 + 0.2, {"policy/decode": 7, "reward/backward": 0}, {"policy/decode": 7})
    assert Cost.from_dict(json.loads(json.dumps(cost.to_dict()))) == cost
    assert Cost.from_dict({"flops": 1.0, "seconds": 2.0, "tokens": {}}).calls == {}, "of an earlier version"


def test_import_loads_no_torch() -> None:
    code = "import sys, nabla_trl.models.flops, nabla_trl.traces.storage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
