"""The whole idea in one file: refine responses by the gradient of a reward, then train the policy on them.

    python recipes/minimal.py

Nothing but the problems and the checker comes from nabla_trl. Policy and reward are the embedded world's by default.
The package does the same for many problems at once, with caches, other solvers, controls and costs.
"""

from __future__ import annotations

import argparse
import random

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.grading.equivalence import MatchResult
from nabla_trl.grading.extraction import extract_answer
from nabla_trl.tasks.registry import load_problems


class Refiner:
    """A policy π and a reward r with one tokenizer.

    Args:
        beta: KL coefficient β. A proposal follows π·exp(gain/β).
        top_k: tokens of the policy that may replace a token.
        share: share of the policy's own distribution in the relaxed response, at which the gradient is taken.
    """

    def __init__(self, policy: str, reward: str, beta: float = 0.3, top_k: int = 16, share: float = 0.5):
        no_code = {"trust_remote_code": False}  # transformers would ask on the terminal
        self.tokenizer = AutoTokenizer.from_pretrained(policy, **no_code)
        self.policy = AutoModelForCausalLM.from_pretrained(policy, **no_code).eval()
        self.reward = AutoModelForSequenceClassification.from_pretrained(reward, **no_code).eval()
        self.reward.requires_grad_(False)
        self.beta, self.top_k, self.share = beta, top_k, share

    def encode(self, question: str) -> list[int]:
        messages = [{"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    @torch.no_grad()
    def draw(self, prefix: list[int], max_new_tokens: int, do_sample: bool = True) -> list[int]:
        """Return a continuation of a prefix, its stop token included."""
        ids = torch.tensor([prefix])
        if max_new_tokens < 1 or prefix[-1] == self.tokenizer.eos_token_id:
            return []
        options = {"do_sample": do_sample, "top_k": 0, "pad_token_id": self.tokenizer.pad_token_id}
        output = self.policy.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **options
        )
        return output[0, len(prefix) :].tolist()

    def compute_reward(self, rows: Tensor) -> Tensor:
        """Return r of a sequence of rows [S, V]: one-hot, or mixtures of tokens."""
        embeddings = rows @ self.reward.get_input_embeddings().weight
        hidden = self.reward.model(inputs_embeds=embeddings[None]).last_hidden_state
        return self.reward.score(hidden[0, -1]).squeeze()

    @torch.no_grad()
    def score(self, prompt: list[int], response: list[int]) -> float:
        return float(self.compute_reward(self.one_hot(prompt + response)))

    def one_hot(self, ids: list[int]) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(ids), self.policy.config.vocab_size).float()

    def propose(self, prompt: list[int], response: list[int]) -> tuple[int, int]:
        """Draw a position t and a new token v with probability ∝ π(v|y_<t)·exp((∂r/∂Y[t, v] − ∂r/∂Y[t, y_t])/β)."""
        with torch.no_grad():
            logits = self.policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        log_prob = logits.log_softmax(-1)  # [T, V]
        hard = self.one_hot(response)
        # The gradient at a mixture of the response and the policy's distribution sees further than at the response.
        relaxed = ((1 - self.share) * hard + self.share * log_prob.exp()).requires_grad_()
        self.compute_reward(torch.cat((self.one_hot(prompt), relaxed))).backward()
        gradient = relaxed.grad
        gain = gradient - (gradient * hard).sum(-1, keepdim=True)  # first-order change of r
        scores = log_prob + gain / self.beta
        outside = log_prob < log_prob.topk(min(self.top_k, log_prob.shape[1])).values[:, -1:]
        scores = scores.masked_fill(outside | hard.bool(), -torch.inf)
        index = int(torch.distributions.Categorical(logits=scores.flatten()).sample())
        return divmod(index, scores.shape[1])

    def refine(self, question: str, rounds: int, max_new_tokens: int = 64) -> tuple[list[int], list[int], float]:
        """Draw a response, then change a token, draw the rest again, and keep what the reward prefers.

        Returns:
            The ids of the prompt, the ids of the response, and its reward.
        """
        prompt = self.encode(question)
        response = self.draw(prompt, max_new_tokens)
        reward = self.score(prompt, response)
        for _ in range(rounds):
            position, token = self.propose(prompt, response)
            prefix = [*response[:position], token]
            proposal = prefix + self.draw(prompt + prefix, max_new_tokens - len(prefix))
            proposal_reward = self.score(prompt, proposal)
            if proposal_reward > reward:  # rejection: keep the better one
                response, reward = proposal, proposal_reward
        return prompt, response, reward


def measure_accuracy(refiner: Refiner, problems: list, rounds: int | None = None) -> float:
    """Return the accuracy of greedy decoding, or of a search of some rounds."""
    texts = []
    for problem in problems:
        if rounds is None:
            response = refiner.draw(refiner.encode(problem.question), 64, do_sample=False)
        else:
            _, response, _ = refiner.refine(problem.question, rounds)
        texts.append(refiner.tokenizer.decode(response, skip_special_tokens=True))
    with AnswerChecker() as checker:
        pairs = [(extract_answer(text), problem.answer) for text, problem in zip(texts, problems, strict=True)]
        return sum(result is MatchResult.CORRECT for result in checker.check(pairs)) / len(problems)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="data/tiny/policy", help="A causal language model.")
    parser.add_argument("--reward", default="data/tiny/reward", help="A sequence classifier with one label.")
    parser.add_argument("--dataset", default="digit_chains", help="A task of nabla_trl.")
    parser.add_argument("--train_problems", type=int, default=64, help="Problems to search and to train on.")
    parser.add_argument("--test_problems", type=int, default=48, help="Problems to measure accuracy on.")
    parser.add_argument("--rounds", type=int, default=6, help="Proposals per problem.")
    parser.add_argument("--epochs", type=float, default=6, help="Epochs of supervised fine-tuning.")
    parser.add_argument("--output_dir", default="outputs/minimal", help="Folder for the LoRA adapter.")
    args = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)

    train = load_problems(args.dataset, split="train", max_problems=args.train_problems)
    test = load_problems(args.dataset, split="test", max_problems=args.test_problems)
    refiner = Refiner(args.policy, args.reward)
    print(f"greedy {measure_accuracy(refiner, test):.3f}", flush=True)
    print(f"search of {args.rounds} rounds {measure_accuracy(refiner, test, args.rounds):.3f}", flush=True)

    # Test-time compute becomes data …
    rows = []
    for problem in train:
        prompt, response, _ = refiner.refine(problem.question, args.rounds)
        rows.append({"input_ids": prompt + response, "completion_mask": [0] * len(prompt) + [1] * len(response)})
    # … and data become weights.
    trainer = SFTTrainer(
        model=refiner.policy,
        args=SFTConfig(
            output_dir=args.output_dir,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=8,
            learning_rate=2e-3,
            completion_only_loss=True,
            report_to="none",
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=refiner.tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model(args.output_dir)
    refiner.policy = trainer.model.eval()
    print(f"greedy after training {measure_accuracy(refiner, test):.3f}: adapter in {args.output_dir}")


if __name__ == "__main__":
    main()
