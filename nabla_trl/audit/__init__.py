"""Audits of a reward before and while it is searched with: ranking, gradient, over-optimization.

Hands out: `audit_ranking`, `audit_gradient`, `audit_overoptimization`, `find_overoptimization`,
`warn_past_limits`.
May import: utils, grading, tasks, models, gradient, rewards, traces, search, baselines, reward_training.
"""
