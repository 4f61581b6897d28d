r"""Distill test-time gradient search into a policy, and compare both at equal cost.

    accelerate launch recipes/distill.py --config recipes/tiny/distill.yaml
    accelerate launch recipes/distill.py --config recipes/gsm8k/distill.yaml \
        --policy Qwen/Qwen2.5-0.5B-Instruct --reward PATH_OR_HUB_ID --dataset gsm8k --train_methods sft rloo

The code is in the package, so that an installed one runs it too: `accelerate launch -m nabla_trl.distill`.
"""

from __future__ import annotations

import sys

from nabla_trl.cli.parsing import run_main
from nabla_trl.distill import main

if __name__ == "__main__":
    sys.exit(run_main(main))
