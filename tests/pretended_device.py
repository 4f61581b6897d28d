"""A pretended accelerator: tensors that say they are elsewhere, over data on the CPU.

Operations that mix its tensors with the CPU's raise, as they would on a GPU; what a GPU would make the host wait for
(a value read back, a shape that depends on data) is counted with the lines of our code that asked for it.
"""

from __future__ import annotations

import os
import traceback
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
_setup_privateuseone_for_python_backend(NAME)
torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
DEVICE = torch.device(NAME, 0)

# Their outputs' shapes or values come from the data, so the host waits for the device.
_READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
_MAY_MIX = {"copy_", "index", "index_put_", "index_put", "_index_put_impl_", "set_", "_to_copy"}
_INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_"}


class MixedDevices(RuntimeError):
    """An operation on tensors of the CPU and of the device."""


class DeviceTensor(Tensor):
    """A tensor on the pretended device; `data_on_cpu` holds its numbers."""

    data_on_cpu: Tensor

    @staticmethod
    def __new__(cls, data: Tensor) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            data.size(),
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            layout=data.layout,
            device=DEVICE,
            requires_grad=False,
        )
        made.data_on_cpu = data
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("numpy cannot read a tensor of the device")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class PretendedDevice(TorchDispatchMode):
    """Runs everything inside a `with` on the device where its tensors are, and counts what is waited for.

    Attributes:
        waits: place in our code -> how often the host waited there.
        kernels: name of an operation -> how often it ran on the device.
    """

    current: PretendedDevice | None = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.shapes: Counter[str] = Counter()

    def __enter__(self) -> PretendedDevice:
        PretendedDevice.current = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        PretendedDevice.current = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _place() -> str:
    frames = [frame for frame in traceback.extract_stack() if "nabla_trl" in frame.filename]
    return " < ".join(f"{os.path.basename(frame.filename)}:{frame.lineno}" for frame in reversed(frames[-2:]))


def _on_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.split("::")[1]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    cpu = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
    if ours and any(tensor.dim() for tensor in cpu) and name not in _MAY_MIX:
        raise MixedDevices(f"{name} of {[tuple(tensor.shape) for tensor in tensors]} at {_place()}")
    if name in _INDEXING and not isinstance(args[0], DeviceTensor) and len(ours):
        raise MixedDevices(f"{name}: the CPU's tensor by an index of the device at {_place()}")
    target = kwargs.get("device")
    result_on_device = _on_device(target) if target is not None else bool(ours)
    if name in _INDEXING or name == "copy_":
        result_on_device = isinstance(args[0], DeviceTensor)
    watch = PretendedDevice.current
    if watch is not None and ours:
        by_mask = name in _INDEXING and any(
            isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1])
        )
        from_device = name == "_to_copy" and target is not None and not result_on_device
        from_device |= name == "copy_" and isinstance(args[1], DeviceTensor) and not result_on_device
        if name in _READS or by_mask or from_device:
            watch.waits[f"{name} at {_place()}"] += 1
        watch.kernels[name] += 1

    def unwrap(leaf: Any) -> Any:
        return leaf.data_on_cpu if isinstance(leaf, DeviceTensor) else leaf

    plain_args, plain_kwargs = tree_map(unwrap, args), tree_map(unwrap, kwargs)
    if _on_device(target):
        plain_kwargs["device"] = torch.device("cpu")
    output = func(*plain_args, **plain_kwargs)
    if not result_on_device:
        return output
    wrappers = {id(tensor.data_on_cpu): tensor for tensor in ours}

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in wrappers and func._schema.is_mutable:
            return wrappers[id(leaf)]  # written in place
        return DeviceTensor(leaf)

    return tree_map(wrap, output)
