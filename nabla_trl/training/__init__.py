"""Training of a policy with TRL: on traces (SFT, DPO, soft targets), or on its own samples (RLOO, on-policy KD).

Hands out: `TrainOptions`, `TrainStage`, `train_on_traces`, `train_online`, `EvaluationCallback`, `LoraArguments`,
`read_training_record`.
May import: utils, grading, tasks, models, gradient, rewards, traces, search.
"""
