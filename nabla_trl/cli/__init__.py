"""The command `nabla-trl` and what its command line needs.

Hands out: `main`, `Parser`, `ModelArguments`, `DistillArguments`.
May import: utils, grading, tasks, models, rewards, traces, search, baselines, training, planning, audit, evaluation,
report, export, serving.
"""
