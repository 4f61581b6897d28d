"""Run a script where accelerate believes in GPUs, on CPUs and gloo, so that FSDP2 and ZeRO-3 divide the weights.

    accelerate launch --config_file CONFIG tests/sharded_launch.py REPORT SCRIPT ARGUMENTS

Without this a launch on CPUs is plain data parallelism, without a warning. REPORT gets one JSON line per trainer and
process: how the parameters are stored when training begins.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from importlib import import_module
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import Trainer

USES_DEEPSPEED = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
REPORT_FILE = sys.argv[1]
initialize_state, take_step = PartialState.__init__, Trainer.training_step


def initialize_on_cpu(self: PartialState, cpu: bool = False, **kwargs: Any) -> None:
    initialize_state(self, cpu=True, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU
        if USES_DEEPSPEED:
            from deepspeed import comm

            # It is for inference, and it would be compiled for minutes.
            import_module("deepspeed.comm.torch").build_shm_op = lambda: None
            comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
            self.distributed_type = DistributedType.DEEPSPEED


def report_first_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
    if not getattr(self, "_has_reported", False):
        self._has_reported = True
        parameters = list(self.model.parameters())
        figures = {
            "trainer": type(self).__name__,
            "parameters": len(parameters),
            "trainable": sum(weight.requires_grad for weight in parameters),
            "dtensors": sum(isinstance(weight, DTensor) for weight in parameters),
            "ds_ids": sum(hasattr(weight, "ds_id") for weight in parameters),
            "local_numel": sum(_count_local(weight) for weight in parameters),
            "numel": sum(getattr(weight, "ds_numel", weight.numel()) for weight in parameters),
        }
        with open(REPORT_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")
    return take_step(self, *args, **kwargs)


def _count_local(weight: Any) -> int:
    if isinstance(weight, DTensor):
        return int(weight.to_local().numel())
    return int(weight.ds_tensor.numel()) if hasattr(weight, "ds_tensor") else int(weight.numel())


PartialState.__init__, Trainer.training_step = initialize_on_cpu, report_first_step  # type: ignore[method-assign]
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
