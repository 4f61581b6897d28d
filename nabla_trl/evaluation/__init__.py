"""Evaluation on held-out problems: methods at sizes and budgets, one result row for each, and their metrics.

Hands out: `Method`, `EvaluationSetup`, `Evaluation`, `plan_jobs`, `run_job`, `Row`, `load_results`, `build_grids`.
May import: utils, grading, tasks, models, gradient, rewards, engine, traces, search, baselines, training.
"""
