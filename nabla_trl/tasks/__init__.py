"""Load problems: benchmarks, data sets described by a YAML file, JSONL files and generated problems.

Hands out: `Problem`, `load_problems`, `compute_task_version`, `check_disjoint`, `TaskConfig`.
May import: utils, grading.
"""
