"""`nabla-trl ship`: from a run to a folder, or a model of the hub, that others can load."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from nabla_trl.cli.arguments import ShipArguments
from nabla_trl.cli.parsing import Parser, quiet_libraries
from nabla_trl.utils.formatting import one_line


def ship(argv: Sequence[str]) -> int:
    parser = Parser(
        [ShipArguments],
        prog="nabla-trl ship",
        usage="nabla-trl ship --run RUN --to DIR [options]",
        description="Make a folder of a trained checkpoint: weights, tokenizer, the configuration that made it, and a "
        "card with\nwhat the run measured. Nothing is shipped before it was loaded again and gave the trained model's "
        "logits.",
    )
    args = parser.read(argv)[0]

    from nabla_trl.export import export
    from nabla_trl.export.checkpoint import find_checkpoint

    checkpoint = find_checkpoint(Path(args.run), args.trained)
    if args.push_to_hub:
        export.check_push(checkpoint, args.push_to_hub, merge=args.merge)
    quiet_libraries()
    with redirect_stdout(sys.stderr):
        shipped = export.ship(
            checkpoint,
            Path(args.to),
            merge=args.merge,
            licence=args.license,
            dtype=args.dtype,
            device=args.device,
            name=args.push_to_hub,
        )
    made = shipped.provenance
    differences = ", ".join(f"{what} {value:.2g}" for what, value in made.differences.items())
    print(
        f"loaded again in {made.dtype}: logits differ from the trained model's by at most {differences} (allowed "
        f"{shipped.tolerance:.2g}); training had moved them by {made.moved:.2g}"
    )
    if made.licence is None:
        print("licence: not known; --license names one")
    print(f"{checkpoint.method} of {checkpoint.run}: {shipped.folder}")
    if args.push_to_hub:
        try:
            print(f"pushed: {export.upload(shipped.folder, args.push_to_hub, private=args.private)}")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{shipped.folder} is ready, but was not pushed to {args.push_to_hub}: {one_line(error)}"
            ) from error
    return 0
