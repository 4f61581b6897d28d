"""Options that version 0.2 renamed. An old name is refused with a line that says the new one."""

from __future__ import annotations

from collections.abc import Container

# Old name -> new names. Several commands shared an old name, so the first new name that a command has counts.
# GROUP.MEMBER.OPTION is an option of one solver, one kind of proposals or one acceptance.
RENAMED_OPTIONS: dict[str, tuple[str, ...]] = {
    # Search
    "kl": ("solver.mirror.target_kl", "target_kl"),
    "flops": ("max_flops",),
    "rounds": ("max_rounds", "round_counts"),
    "rollouts": ("max_rollouts",),
    "starts": ("num_starts",),
    "chains": ("num_chains",),
    "restart": ("restarts",),
    "branches": ("proposals.global.proposals_per_round",),
    "candidates": ("top_k_candidates",),
    "sample_min_p": ("min_p",),
    "point": ("gradient_at", "solver.mirror.gradient_at"),
    "step": ("step_size", "solver.mirror.step_size"),
    "shuffle": ("solver.mirror.shuffle_gradient",),
    "steps": ("solver.ste.steps",),
    "lr": ("solver.ste.learning_rate",),
    "lr_end": ("solver.ste.final_learning_rate",),
    "tau": ("solver.ste.tau",),
    "direct": ("solver.ste.likelihood_token_grad",),
    "postfix": ("solver.ste.likelihood_suffix_grad",),
    "moving": ("solver.ste.optimize_positions",),
    "confidence": ("proposals.sequential.confidence",),
    "gradient_norm": ("proposals.sequential.min_gradient_norm",),
    "resample_temperature": ("proposals.sequential.resample_temperature",),
    "resample_top_p": ("proposals.sequential.resample_top_p",),
    "redraw": ("acceptance.metropolis.independence_prob",),
    "tempering": ("acceptance.metropolis.parallel_tempering",),
    "step_tokens": ("max_step_tokens",),
    "step_width": ("steps_per_prefix",),
    # Data sets described by a YAML file
    "form": ("answer_format",),
    "stop": ("stop_strings",),
    # Commands and recipes
    "limit": ("max_problems",),
    "train_limit": ("max_train_problems",),
    "eval_limit": ("max_eval_problems",),
    "audit_problems": ("max_audit_problems",),
    "probe_problems": ("max_callback_problems",),
    "search_problems": ("max_search_problems",),
    "plain_problems": ("max_plain_problems",),
    "problems": ("max_problems",),
    "method": ("train_methods",),
    "methods": ("eval_methods",),
    "trained": ("train_method",),
    "output": ("output_file",),
    "output_dir": ("run_dir",),
    "to": ("output_dir",),
    "run": ("run_dir",),
    "audit": ("audit_file",),
    "pressure": ("over_optimization",),
    "points": ("gradient_at", "audit_gradient_at", "compare_gradient_at"),
    "shares": ("compare_step_sizes",),
    "swaps": ("num_swaps",),
    "samples": ("samples_per_problem", "best_of_n"),
    "rivals": ("baselines",),
    "lams": ("reward_weights",),
    # Training of policies and rewards
    "select": ("sft_selection",),
    "probe_steps": ("callback_steps",),
    "stop_on_overoptimisation": ("stop_on_overoptimization",),
    "base": ("base_model",),
    "members": ("num_members",),
    "caution": ("uncertainty_penalty",),
    "objective": ("loss_type",),
    "relaxed": ("relaxed_fraction",),
    "draws": ("target_samples",),
    "adversarial_rounds": ("max_adversarial_rounds",),
    "round_steps": ("max_steps_per_round",),
    "rare_temperature": ("extra_sample_temperature",),
    "audit_rounds": ("max_audit_rounds",),
    # Names of TRL's scripts
    "max_completion_length": ("max_new_tokens",),
    "model_name_or_path": ("policy",),
    "dataset_name": ("dataset",),
    "dataset_train_split": ("train_split",),
    "dataset_test_split": ("eval_split",),
    "reward_model_name_or_path": ("reward",),
    "torch_dtype": ("dtype",),
    "load_in_4bit": ("tuning",),
    "use_peft": ("tuning",),
    "vllm_server_host": ("vllm_server_base_url",),
    "vllm_server_port": ("vllm_server_base_url",),
    # Research recipes
    "answer_tokens": ("max_new_tokens",),
    "sizes": ("problem_counts",),
    "vocabulary": ("vocab_size",),
    "length": ("response_length",),
    "layers": ("num_layers",),
    "width": ("hidden_size",),
    "widths": ("hidden_sizes",),
    "repeats": ("num_repeats",),
    "responses": ("max_responses",),
    "symbols": ("num_symbols",),
    "prompts": ("num_prompts",),
    "weights": ("weight_std",),
    "spread": ("reward_std",),
    "train": ("train_methods",),
    "train_batch": ("train_batch_size",),
    "train_checkpoints": ("train_num_checkpoints",),
    "train_generations": ("train_num_generations",),
    "train_rate": ("train_learning_rate",),
    "train_rounds": ("train_max_rounds",),
    "train_samples": ("train_samples_per_prompt",),
    "data": ("data_dir",),
    "show": ("max_shown_disagreements",),
    "speed": ("num_comparisons",),
    "workers": ("num_workers",),
}


def find_new_name(name: str, valid_names: Container[str]) -> str:
    """Return the new name among `valid_names` of an old option, or an empty text."""
    return next((new for new in RENAMED_OPTIONS.get(name, ()) if new.partition(".")[0] in valid_names), "")


def describe_new_key(name: str, valid_names: Container[str]) -> str:
    """Return ": it is now 'max_rounds'" for an old key of a YAML file or a Python keyword, else an empty text."""
    group, *path = find_new_name(name, valid_names).split(".")
    new = f"'{group}'" if not path else f"{group}: {{name: {path[0]}, {path[1]}: …}}"
    return f": it is now {new}" if group else ""


def describe_new_flag(name: str, valid_names: Container[str]) -> str:
    """Return ": it is now --max_rounds" for an old flag (without its dashes), else an empty text.

    A flag such as no_restart, which turned an option off, gets the flag that does so now.
    """
    positive_name = name.removeprefix("no_")
    group, *path = find_new_name(positive_name, valid_names).split(".")
    if positive_name != name and group:
        return f": it is now --{group}.{path[1]} false" if path else f": it is now --no_{group}"
    new = f"--{group}.{path[1]} (of --{group} {path[0]})" if path else f"--{group}"
    return f": it is now {new}" if group else ""
