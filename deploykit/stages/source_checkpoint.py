"""Weights from a checkpoint file, read without running code, and fitted to a module's names."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.errors import ModelError

if TYPE_CHECKING:
    import torch

State = dict[str, "torch.Tensor"]
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_SHOWN = 5


def read(path: Path) -> State:
    """The state dict in a .safetensors or a torch checkpoint; 'state_dict' and 'model' entries unwrapped, the prefixes
    of DataParallel ('module.') and torch.compile ('_orig_mod.') taken off.

    Raises ModelError for a truncated or foreign file, and for a pickle that holds anything but tensors and plain
    containers: loading one would run its code.
    """
    state = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_torch(path)
    for prefix in _PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _read_safetensors(path: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as exc:
        raise ModelError(f"{path.name} is not a safetensors file, or it is truncated ({exc})", "copy or save it again") from exc


def _read_torch(path: Path) -> State:
    import torch

    refused = ModelError(
        f"{path.name} is a pickle that would run code when loaded (a whole model, or objects besides tensors): refused",
        "save the weights alone, torch.save(model.state_dict(), ...) or safetensors.torch.save_file(...), and load those",
    )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as exc:
        # weights_only's refusal and a damaged stream are one exception; only the refusal speaks of weights_only globals.
        text = str(exc)
        if "GLOBAL" in text or "Unsupported" in text or "TorchScript" in text:
            raise refused from exc
        raise ModelError(f"{path.name} is not a torch checkpoint, or it is damaged", "copy or save it again") from exc
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, UnicodeDecodeError) as exc:
        if "TorchScript" in str(exc):
            raise refused from exc
        raise ModelError(f"{path.name} is not a torch checkpoint, or it is truncated", "copy or save it again") from exc
    for key in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping):
        raise ModelError(f"{path.name} holds a {type(found).__name__}, not a state dict", "save model.state_dict()")
    state = {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}
    if not state:
        raise ModelError(f"{path.name} holds no tensors", "save model.state_dict()")
    return state


def fit(module: torch.nn.Module, state: State, name: str) -> str | None:
    """Loads `state` into `module`; returns a note when it was matched by order instead of by name.

    Names are compared first. Where they differ but both sides hold as many tensors with the same shapes in the same
    order, the order decides: two ports of one network name their layers differently and define them alike.
    Batch counters (num_batches_tracked, whole numbers of rank 0) are left out of the comparison, since they don't touch inference.
    Raises ModelError listing the first mismatches.
    """
    import torch

    own, given = _without_counters(module.state_dict()), _without_counters(state)
    if set(own) == set(given):
        wrong = [k for k in own if own[k].shape != given[k].shape]
        if wrong:
            raise ModelError(
                f"{name} does not fit the model: " + "; ".join(_pair(k, own, k, given) for k in wrong[:_SHOWN]),
                _remedy(wrong, given),
            )
        note = None
        renamed = given
    elif [v.shape for v in own.values()] == [v.shape for v in given.values()]:
        renamed = dict(zip(own, given.values(), strict=True))
        first = next(k for k in own if k not in given)
        other = dict(zip(own, given, strict=True))[first]
        note = f"weights of {name} were matched by order, {len(own)} tensors of equal shapes (e.g. '{other}' -> '{first}')"
    else:
        raise ModelError(
            _difference(own, given, name), _remedy([k for k in own if k in given and own[k].shape != given[k].shape], given)
        )
    with torch.no_grad():
        module.load_state_dict(renamed, strict=False)
    return note


def _without_counters(state: State) -> State:
    return {key: value for key, value in state.items() if value.ndim or value.is_floating_point()}


def fit_backbone(module: torch.nn.Module, state: State, name: str) -> tuple[str, ...]:
    """Loads every tensor of `state` that fits by name and shape and leaves a head of another size as it was made;
    returns the names left. Raises ModelError when more than the head (a last layer's weight and bias) differs."""
    own = module.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    left = [k for k in own if k not in fitting and not k.endswith("num_batches_tracked")]
    stems = {k.rpartition(".")[0] for k in left}
    heads = [k for k in left if k in state and own[k].shape[1:] == state[k].shape[1:]]
    if len(heads) != len(left) or len(stems) > 2:
        raise ModelError(_difference(own, state, name), "give the checkpoint of this very network")
    module.load_state_dict(fitting, strict=False)
    return tuple(left)


def _pair(key: str, own: State, other: str, given: State) -> str:
    return f"'{key}' is {list(own[key].shape)} in the model, {list(given[other].shape)} in the file"


def _difference(own: State, given: State, name: str) -> str:
    missing = [k for k in own if k not in given]
    extra = [k for k in given if k not in own]
    wrong = [_pair(k, own, k, given) for k in own if k in given and own[k].shape != given[k].shape]
    parts = [f"{name} does not fit the model ({len(own)} tensors in the model, {len(given)} in the file)"]
    if wrong:
        parts.append("; ".join(wrong[:_SHOWN]))
    if missing:
        parts.append("missing in the file: " + ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else ""))
    if extra:
        parts.append("not in the model: " + ", ".join(extra[:_SHOWN]) + (", ..." if len(extra) > _SHOWN else ""))
    return "; ".join(parts)


def _remedy(wrong: list[str], given: State) -> str:
    if wrong and len(wrong) <= 2 and given[wrong[-1]].ndim >= 1:
        return f"the last layer differs: try --num-classes {given[wrong[-1]].shape[0]}"
    return "give the checkpoint of this very network, or the network of this checkpoint"
