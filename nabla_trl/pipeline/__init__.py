"""One Python function for each stage of a run, which the commands call too: the set-up of a stage stands here once.

Hands out: `ModelPair`, `generate_traces`, `to_sft_dataset`, `to_preference_dataset`, `evaluate`, `EvaluationResult`,
`audit_reward`, `write_report`, `export`, `train`, `run_training`.
May import: utils, grading, tasks, models, rewards, traces, search, baselines, training, planning, audit, evaluation,
report, exporting.
"""
