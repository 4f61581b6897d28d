"""Run lm-eval's command with the model nabla registered: `python -m nabla_trl.lm_eval --model nabla …`."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Run lm-eval and return the exit code. LMEVAL_LOG_LEVEL=DEBUG shows the traceback of a mistake."""
    try:
        import nabla_trl.lm_eval.model  # noqa: F401  # registers the class
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except (ValueError, OSError) as error:
        if os.environ.get("LMEVAL_LOG_LEVEL", "").upper() == "DEBUG":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
