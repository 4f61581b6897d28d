"""`nabla-trl ship`: from a run to a folder, or a model of the hub, that others can load."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from nabla_trl.cli.arguments import ExportArguments
from nabla_trl.cli.parsing import Parser, quiet_libraries
from nabla_trl.utils.formatting import format_error


def run_export(argv: Sequence[str]) -> int:
    parser = Parser(
        [ExportArguments],
        prog="nabla-trl ship",
        usage="nabla-trl ship --run RUN --to DIR [options]",
        description="Make a folder of a trained checkpoint: weights, tokenizer, the configuration that made it, and a "
        "card with\nwhat the run measured. Nothing is shipped before it was loaded again and gave the trained model's "
        "logits.",
    )
    args = parser.parse_options(argv)[0]

    from nabla_trl.export import export
    from nabla_trl.export.checkpoint import find_checkpoint

    checkpoint = find_checkpoint(Path(args.run), args.trained)
    if args.push_to_hub:
        export.check_push_to_hub(checkpoint, args.push_to_hub, merge=args.merge)
    quiet_libraries()
    with redirect_stdout(sys.stderr):
        shipped = export.export_checkpoint(
            checkpoint,
            Path(args.to),
            merge=args.merge,
            license=args.license,
            dtype=args.dtype,
            device=args.device,
            model_name=args.push_to_hub,
        )
    made = shipped.provenance
    differences = ", ".join(f"{what} {value:.2g}" for what, value in made.logit_differences.items())
    print(
        f"loaded again in {made.dtype}: logits differ from the trained model's by at most {differences} (allowed "
        f"{shipped.logit_tolerance:.2g}); training had moved them by {made.max_logit_change:.2g}"
    )
    if made.license is None:
        print("licence: not known; --license names one")
    print(f"{checkpoint.method} of {checkpoint.run_dir}: {shipped.output_dir}")
    if args.push_to_hub:
        try:
            print(f"pushed: {export.push_to_hub(shipped.output_dir, args.push_to_hub, private=args.private)}")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{shipped.output_dir} is ready, but was not pushed to {args.push_to_hub}: {format_error(error)}"
            ) from error
    return 0
