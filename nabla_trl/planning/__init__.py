"""Plan a run before it is paid for: memory, batch, FLOPs and hours, from the configs of its models.

Hands out: `measure_shape`, `plan_memory`, `make_plan`, `Workload`, `Hardware`, `check_policy_files`,
`check_reward_files`, `check_device`, `check_memory`, `check_output_dir`, `collect_model_faults`,
`collect_training_faults`, `Machine`, `choose_batches`.
May import: utils, tasks, models, gradient, rewards, search, training.
"""
