"""Plan a run before it is paid for: memory, batch, FLOPs and hours, from the configs of its models.

Hands out: `measure_shape`, `plan_memory`, `make_plan`, `Workload`, `Hardware`.
May import: utils, models, rewards, training.
"""
