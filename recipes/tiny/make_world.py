"""Train the models of the embedded world: a tokenizer, a clean model and a policy with a knowledge gap.

    python recipes/tiny/make_world.py --output_dir data/tiny --seed 0

A small Llama is trained on correct solutions of digit chains ("clean"). The policy is trained from there on solutions
with the knowledge gap (`nabla_trl.tasks.digit_chains.get_knowledge_gap`). All questions are from the train split. Both
models are saved in bf16 with their tokenizer, loaded again, measured on the test split, and described in
OUT/README.md. A seed always gives the same files on the same machine. The run takes seven minutes on one core.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from world_card import measure, write_card

from nabla_trl.models.loading import load_model
from nabla_trl.tasks import digit_chains

PAD, USER, ASSISTANT, END, UNKNOWN = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<|unk|>"
CHARACTERS = "0123456789+-*=;,#"
BATCH_SIZE = 64
CLEAN_STEPS, CLEAN_LEARNING_RATE = 700, 3e-3
POLICY_STEPS, POLICY_LEARNING_RATE = 400, 2e-3

# The template marks the assistant's text ({% generation %}), so that trainers can find its tokens.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ '<|user|>' + message['content'] + '<|end|>' }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{%- else -%}"
    "{{ raise_exception('this template knows the roles user and assistant, not ' + message['role']) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a fast tokenizer with one token per character and five special tokens. It adds no tokens by itself."""
    specials = [PAD, USER, ASSISTANT, END, UNKNOWN]
    vocabulary = {token: index for index, token in enumerate([*specials, *CHARACTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()  # joins tokens without spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int) -> LlamaForCausalLM:
    """Return an untrained Llama over the tokenizer's vocabulary, with weights from torch's global seed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, rows: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Return input_ids, attention_mask and labels, each [rows, length], of (question, solution) rows."""
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]
        for question, solution in rows
    ]
    batch = tokenizer.apply_chat_template(
        chats,
        padding=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"padding_side": "right"},
    )
    labels = batch["input_ids"].masked_fill(batch["assistant_masks"] == 0, -100)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    make_solution: Callable[[str, random.Random], str],
    *,
    num_steps: int,
    learning_rate: float,
    rng: random.Random,
) -> None:
    """Train a model in place on new batches of training questions.

    Args:
        make_solution: returns the solution of a question.
    """
    questions = digit_chains.generate_questions("train", rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    # Warm-up, a long constant part that teaches the rarest facts, and a linear decay.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.1 * num_steps), (num_steps - step) / (0.25 * num_steps))
    )
    model.train()
    for step in range(1, num_steps + 1):
        rows = [(question, make_solution(question, rng)) for question in islice(questions, BATCH_SIZE)]
        loss = model(**encode(tokenizer, rows)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(f"  step {step}/{num_steps}  loss {loss.item():.4f}", flush=True)
    model.eval()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> LlamaForCausalLM:
    """Save model and tokenizer in bf16 and return the model as a user will load it, in float32."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # Cast a copy, because the next training continues from the float32 weights.
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(AutoModelForCausalLM, str(folder), dtype="float32", device="cpu").eval()


def main() -> None:
    """Build, train, save and measure the models, and write the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("data/tiny"), help="Folder to write to.")
    parser.add_argument("--seed", type=int, default=0, help="Random seed of weights and training data.")
    parser.add_argument(
        "--num_threads", type=int, default=1, help="Threads of torch. Another number rounds differently."
    )
    parser.add_argument("--hidden_size", type=int, default=96, help="Hidden size of the models, a multiple of 8.")
    parser.add_argument("--num_layers", type=int, default=3, help="Number of layers of the models.")
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(options.seed)
    start = time.perf_counter()

    tokenizer = build_tokenizer()
    model = build_model(tokenizer, options.hidden_size, options.num_layers)
    print(f"clean: {model.num_parameters():,} parameters")
    train(
        model,
        tokenizer,
        digit_chains.make_styled_solution,
        num_steps=CLEAN_STEPS,
        learning_rate=CLEAN_LEARNING_RATE,
        rng=random.Random(f"clean/{options.seed}"),
    )
    clean = save(model, tokenizer, options.output_dir / "clean")
    print("policy: trained from the clean model")
    train(
        model,
        tokenizer,
        digit_chains.make_noisy_solution,
        num_steps=POLICY_STEPS,
        learning_rate=POLICY_LEARNING_RATE,
        rng=random.Random(f"policy/{options.seed}"),
    )
    policy = save(model, tokenizer, options.output_dir / "policy")

    facts = measure(clean, policy, tokenizer, seed=options.seed)
    write_card(options.output_dir, facts, seed=options.seed, num_parameters=model.num_parameters())
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
