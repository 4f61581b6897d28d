"""Differentiable rewards over token ids: what a reward's name means, loading, scoring, gradients, validated limits.

Hands out: `Reward`, `load_reward`, `parse_reward_spec`, `RewardSpec`, `compute_reward_identity`, `RewardManifest`,
`read_manifest`, `write_manifest`, `ValidatedLimits`, `Verifier`, `build_scalar_reward`, `build_process_reward`,
`build_log_ratio_reward`, `build_ensemble_reward`.
May import: utils, grading, tasks, states, models, gradient.
"""
