"""Checkpoints without pickle: a folder of safetensors and JSON that is either whole or not there.

    checkpoints/step-00000400/model.safetensors       weights by name; a tied weight once
                              optimizer.safetensors   <parameter name>.<state name>, such as embedding.weight.exp_avg
                              state.json              counters, data position, random states; size and SHA-256 of the other two

A checkpoint is written under a temporary name, flushed to the disk (fsync) and renamed, so a kill or a full disk at any moment
leaves the earlier ones untouched. Every read verifies the checksums first.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.errors import UserError

FORMAT = 1
COUNTS = ("skipped",)  # of fastlm.optim's state dicts: not of a parameter
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


def save(
    folder: str | Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: int = 2,
) -> Path:
    """Writes folder/step-<step> and then, only once it is complete, removes all but the `keep` newest.

    Args:
        state: anything JSON can hold. The random states of torch (CPU and every GPU) are added to it.

    Raises:
        OSError: the disk is full or fails. Nothing that was there before has changed and the part written is removed.
    """
    folder = Path(folder)

    def fill(path: Path) -> None:
        write_tensors(path / MODEL, unique_tensors(model))
        write_tensors(path / OPTIMIZER, _optimizer_tensors(model, optimizer))
        files = {
            name: {"bytes": (path / name).stat().st_size, "sha256": _sha256(path / name)} for name in (MODEL, OPTIMIZER)
        }
        counts = {k: int(v) for k, v in optimizer.state_dict().items() if k in COUNTS}
        body = {"format": FORMAT, "step": step, "files": files, "state": state, "random": _random_states()}
        body |= {"optimizer": counts}
        write_json(path / STATE, {**body, "sha256": _json_sha256(body)})

    path = write_folder(folder / f"step-{step:08d}", fill)
    for old in [*checkpoints(folder)[keep:], *folder.glob(".writing-step-*")]:  # the latter: from kills
        shutil.rmtree(old)
    return path


def checkpoints(folder: str | Path) -> list[Path]:
    """Every folder/step-<number>, newest step first, valid or not."""
    found = [p for p in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def latest_valid(folder: str | Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint whose checksums hold, and the newer ones that were skipped, each with what is wrong with it."""
    skipped = []
    for path in checkpoints(folder):
        fault = find_fault(path)
        if fault is None:
            return path, skipped
        skipped.append((path, fault))
    return None, skipped


def find_fault(path: str | Path) -> str | None:
    """What makes the checkpoint unusable, in a few words, or None if every byte is as it was written."""
    path = Path(path)
    try:
        content = json.loads((path / STATE).read_bytes())
        expected = content.pop("sha256")
    except FileNotFoundError:
        return f"{STATE} is missing"
    except (ValueError, KeyError, AttributeError, OSError) as error:
        return f"{STATE} cannot be read ({type(error).__name__})"
    if _json_sha256(content) != expected:
        return f"{STATE} does not match its checksum"
    if content["format"] != FORMAT:
        return f"{STATE} has format {content['format']}, this version reads {FORMAT}"
    for name, file in content["files"].items():
        try:
            size = (path / name).stat().st_size
            if size != file["bytes"]:
                return f"{name} has {size} bytes, expected {file['bytes']}"
            if _sha256(path / name) != file["sha256"]:
                return f"{name} does not match its checksum"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def load(path: str | Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Puts a checkpoint's weights, optimizer state and random states in place; returns the `state` given to `save`.

    Raises:
        UserError: the checkpoint is damaged, or was made with another model or optimizer. Nothing has changed then.
    """
    from safetensors.torch import load_file

    path = Path(path)
    fault = find_fault(path)
    if fault is not None:
        raise UserError(f"checkpoint {path} is damaged: {fault}")
    content = json.loads((path / STATE).read_bytes())
    saved, own = load_file(path / MODEL), unique_tensors(model)
    for name in sorted(saved.keys() ^ own.keys()):
        where = "the checkpoint lacks it" if name in own else "the model lacks it"
        raise UserError(
            f"checkpoint {path} was made with another model: {name}: {where}; give the settings it was made with"
        )
    for name, tensor in own.items():
        if saved[name].shape != tensor.shape:
            shapes = f"{list(saved[name].shape)} in the checkpoint, {list(tensor.shape)} in the model"
            raise UserError(f"checkpoint {path} was made with another model: {name} is {shapes}")
    counts = content.get("optimizer", {})  # which checkpoints of earlier versions lack
    _load_optimizer_tensors(model, optimizer, load_file(path / OPTIMIZER), counts)  # first: it may refuse
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])
    _set_random_states(content["random"])
    return content["state"]


def read_state(path: str | Path) -> dict[str, Any]:
    """The `state` given to `save`, of a checkpoint that `find_fault` finds nothing wrong with."""
    return json.loads((Path(path) / STATE).read_bytes())["state"]


def unique_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's state dict without the second and later names of a tied weight, which safetensors cannot hold."""
    seen, tensors = set(), {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() == 0 or key not in seen:
            seen.add(key)
            tensors[name] = tensor
    return tensors


def optimizer_names(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the optimizer's parameters in the order in which its state dict numbers them.

    Raises UserError for one that is not the model's.
    """
    names = {p: name for name, p in model.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for p in held:
        if p not in names:
            raise UserError(
                f"train: the optimizer holds a parameter {list(p.shape)} that {type(model).__name__} does not have; make the "
                "optimizer from model.parameters(), after every change of its modules"
            )
    return [names[p] for p in held]


def _optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = optimizer_names(model, optimizer)
    return {
        f"{names[number]}.{key}": value
        for number, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def _load_optimizer_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], counts: dict[str, int]
) -> None:
    numbers = {name: number for number, name in enumerate(optimizer_names(model, optimizer))}
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, key = name.rsplit(".", 1)
        if parameter not in numbers:
            raise UserError(f"the checkpoint has {name}, but the optimizer does not train that parameter")
        state.setdefault(numbers[parameter], {})[key] = tensor
    own = {k: v for k, v in optimizer.state_dict().items() if k not in COUNTS}
    optimizer.load_state_dict({**own, **counts, "state": state})


def _random_states() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": _to_text(torch.get_rng_state()), "cuda": [_to_text(state) for state in cuda]}


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(_from_text(states["cpu"]))
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_from_text(state) for state in states["cuda"]])


def _to_text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _from_text(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def write_folder(target: Path, fill: Callable[[Path], None]) -> Path:
    """Makes `target` with the files that `fill(temporary folder)` writes, all of them or none; replaces an older `target`."""
    temporary, old = target.parent / f".writing-{target.name}", target.parent / f".old-{target.name}"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)  # what a kill left behind
    try:
        temporary.mkdir()
        fill(temporary)
        for file in temporary.rglob("*"):
            _flush(file)
        _flush(temporary)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)  # a folder cannot be renamed onto another that has files
        os.replace(temporary, target)
        _flush(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk gets its space back
        raise
    shutil.rmtree(old, ignore_errors=True)
    return target


def save_model(model: torch.nn.Module, folder: str | Path, tokenizer: Any = None) -> None:
    """Writes the model alone, all or nothing: a Hugging Face folder if it has save_pretrained, else model.safetensors."""

    def fill(path: Path) -> None:
        if hasattr(model, "save_pretrained"):
            try:
                model.save_pretrained(path)
            except UserError as error:
                # Its advice is for someone who saves by hand; training has more to say about a full disk.
                raise error.__cause__ if isinstance(error.__cause__, OSError) else error from None
        else:
            write_tensors(path / MODEL, unique_tensors(model))
        if tokenizer is not None:
            tokenizer.save(path)

    write_folder(Path(folder), fill)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file. Raises OSError, not safetensors' own exception, when the disk refuses."""
    import safetensors
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except safetensors.SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(mode)  # safetensors 0.8 leaves the file readable by its owner alone


def write_json(path: Path, content: Any) -> None:
    """Writes JSON with one key a line, without NaN or infinity (which JSON lacks)."""
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def is_full_disk(error: OSError) -> bool:
    """Whether the error means that there is no room: a full disk, a quota, or a limit on file sizes."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _json_sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
