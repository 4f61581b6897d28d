"""`nabla-trl export`: write a trained checkpoint, or the traces, to a folder or a Hub repository for others."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass

from nabla_trl.cli.arguments import TRUST_REMOTE_CODE_HELP
from nabla_trl.cli.parsing import Parser, UsageError, quiet_libraries
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import option, required_option


@dataclass
class ExportArguments:
    """Options of `nabla-trl export`."""

    run_dir: str = required_option("Folder of a run of recipes/distill.py that has trained and evaluated a policy.")
    output_dir: str = required_option("Folder to write the exported model to. It must be empty or not exist.")
    traces: bool = option(
        False,
        "Export the traces of the run in place of a checkpoint: a data set with a card, which datasets.load_dataset "
        "and TRL's trainers read (default: false).",
        common=True,
    )
    train_method: str | None = option(
        None,
        "Training method of the checkpoint to export, such as sft or dpo. Needed if the run has several checkpoints "
        "(default: the only checkpoint).",
        common=True,
    )
    merge: bool = option(
        False,
        "Also merge the adapter into the base model and save the result in merged/, in --dtype. Use it for tools that "
        "cannot load adapters (default: false).",
        common=True,
    )
    dtype: str | None = option(
        None,
        "Data type of the check and of the merged weights: float32, bfloat16 or float16 (default: the data type of "
        "the run's evaluation).",
        common=True,
    )
    device: str | None = option(
        None, "Device of the check, such as cpu or cuda:1 (default: a GPU if there is one, else the CPU).", common=True
    )
    license: str | None = option(
        None,
        "License of what is exported, such as apache-2.0. Set it if the base model's card is not available (default: "
        "the base model's license, and none for traces).",
        common=True,
    )
    push_to_hub: str | None = option(
        None,
        "Also push the folder to this repository of the Hugging Face Hub, written NAME/MODEL. With --traces it is a "
        "repository of data sets (default: do not push).",
        common=True,
    )
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE_HELP)
    private: bool = option(
        False, "Make the repository of --push_to_hub private if it is new (default: false).", common=True
    )

    def __post_init__(self) -> None:
        checks = Checks()
        checks.require(not self.private or bool(self.push_to_hub), "private needs push_to_hub: nothing is pushed")
        given = [name for name in ("train_method", "merge", "dtype", "device") if getattr(self, name)]
        checks.require(
            not (self.traces and given),
            f"{', '.join(given)} belong to a checkpoint: leave them out, or leave out traces",
        )
        checks.raise_faults()


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    parser = Parser(
        [ExportArguments],
        prog="nabla-trl export",
        usage="nabla-trl export --run_dir RUN --output_dir DIR [options]",
        description="Write a trained checkpoint to a folder: weights, tokenizer, training configuration, and a model\n"
        "card with the results of the run. The export is checked before it is written: the folder is loaded again,\n"
        "and must give the logits of the trained model. With --traces: a data set of the run's traces.",
    )
    checks = Checks()
    args = parser.parse_options(argv, checks)[0]
    if args.traces:
        return _export_traces(args, checks)

    from nabla_trl.models.loading import set_trust_remote_code
    from nabla_trl.pipeline.export import collect_export_faults, export
    from nabla_trl.planning.preflight import check_device, check_output_dir

    quiet_libraries()
    set_trust_remote_code(args.trust_remote_code)
    checks.call(check_device, args.device, args.dtype)
    if args.output_dir:
        checks.call(check_output_dir, args.output_dir)
    if args.run_dir and args.output_dir:
        collect_export_faults(checks, args.run_dir, args.output_dir, args.train_method, args.push_to_hub, args.merge)
    checks.raise_faults(UsageError)
    with redirect_stdout(sys.stderr):
        result = export(
            args.run_dir,
            args.output_dir,
            train_method=args.train_method,
            merge=args.merge,
            license=args.license,
            dtype=args.dtype,
            device=args.device,
            push_to_hub=args.push_to_hub,
            private=args.private,
        )
    provenance = result.provenance
    differences = ", ".join(f"{name} {value:.2g}" for name, value in provenance.logit_differences.items())
    print(
        f"loaded again in {provenance.dtype}: logits differ from the trained model's by at most {differences} "
        f"(allowed {result.logit_tolerance:.2g}); training changed them by {provenance.max_logit_change:.2g}"
    )
    if provenance.license is None:
        print("license: not known; --license names one")
    print(f"{result.method} of {result.run_dir}: {result.output_dir}")
    if result.url:
        print(f"pushed: {result.url}")
    return 0


def _export_traces(args: ExportArguments, checks: Checks) -> int:
    """Write the traces of a run as a data set, and push it if that was asked for."""
    from nabla_trl.models.loading import set_trust_remote_code
    from nabla_trl.pipeline.trace_dataset import collect_trace_export_faults, export_traces, push_trace_folder
    from nabla_trl.planning.preflight import check_output_dir

    quiet_libraries()
    set_trust_remote_code(args.trust_remote_code)
    if args.output_dir:
        checks.call(check_output_dir, args.output_dir)
    if args.run_dir and args.output_dir:
        collect_trace_export_faults(checks, args.run_dir, args.output_dir, args.push_to_hub)
    checks.raise_faults(UsageError)
    with redirect_stdout(sys.stderr):
        folder = export_traces(args.run_dir, args.output_dir, license=args.license, name=args.push_to_hub)
    if args.license is None:
        print("license: not set; --license names one")
    print(f"traces of {args.run_dir}: {folder}")
    if args.push_to_hub:
        print(f"pushed: {push_trace_folder(folder, args.push_to_hub, private=args.private)}")
    return 0
