"""The command `nabla-trl` and what its command line needs.

Hands out: `main`, `Parser`, `ModelArguments`, `DistillArguments`.
May import: utils, grading, tasks, models, rewards, traces, search, baselines, training, planning, audit, evaluation,
report, pipeline, serving.
"""

import sys

from nabla_trl.cli.quiet import prepare_environment

prepare_environment(sys.argv)  # before any module of this package imports torch
