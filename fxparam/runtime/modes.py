"""The modes of PyTorch that a read of a weight meets: which of them the cache knows, and which must stay outside of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

Autocast = tuple[object, object]
_OFF: Autocast = (False, False)


def autocast_state() -> Autocast:
    """The dtype of autocast on CPU and on GPU, False where it is off."""
    if not torch._C._is_any_autocast_enabled():
        return _OFF
    cpu = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    gpu = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    return (cpu, gpu)


@contextmanager
def without_autocast_cache() -> Iterator[None]:
    """Inside the block autocast keeps no casts: they would outlive what is only looked at."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def undisturbed(*, graph: bool) -> Iterator[None]:
    """Inside the block nothing of the user's modes reaches what is computed, but for autocast; grad mode is ``graph``."""
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(graph),
        _disable_current_modes(),
        _without_saved_tensor_hooks(),
    ):
        yield


def in_functorch() -> bool:
    """Whether a transform of functorch (``grad``, ``vmap``, ``jvp``) is running."""
    return torch._C._functorch.maybe_current_level() is not None


def under_a_transform() -> bool:
    """Whether compilation, functorch, or fake, functional or proxy tensors are about: nothing of these may enter the cache."""
    if torch.compiler.is_compiling() or in_functorch():
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    names = ("FakeTensorMode", "ProxyTorchDispatchMode", "FunctionalTensorMode")
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return any(type(mode).__name__ in names for mode in modes)


def _without_saved_tensor_hooks() -> AbstractContextManager[Any]:
    """Hide the user's saved-tensor hooks (checkpoint, offloading) from the private graph; keep autograd's version check."""
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return nullcontext()
    return saved_tensors_hooks(_pack, _unpack)


def _pack(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor.detach(), -1 if tensor.is_inference() else tensor._version


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    tensor, version = packed
    if version >= 0 and tensor._version != version:
        raise written_in_place(tensor, version)
    return tensor


def written_in_place(tensor: Tensor, version: int) -> RuntimeError:
    """Autograd's error about a tensor that is needed for a gradient and has been written since."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: a latent was "
        f"written between forward and backward (is at version {tensor._version}; expected version {version} instead)"
    )
