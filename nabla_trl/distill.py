r"""Run traces, training, evaluation and report in the processes of one launch.

    accelerate launch -m nabla_trl.distill --config recipes/tiny/distill.yaml
    nabla-trl distill --config recipes/tiny/distill.yaml  # the same in one process

See `nabla_trl.cli.distill.run` for the stages.
"""

from __future__ import annotations

import sys

from nabla_trl.cli.distill.run import main
from nabla_trl.cli.parsing import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
