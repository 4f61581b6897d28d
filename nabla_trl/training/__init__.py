"""Training of a policy on traces (SFT, reward-weighted, DPO) or on its own samples (RLOO, GRPO), with TRL.

Hands out: `TrainOptions`, `TrainStage`, `train_on_traces`, `train_online`, `EvaluationCallback`, `LoraArguments`,
`read_training_record`.
May import: utils, grading, tasks, models, gradient, rewards, traces, search.
"""
