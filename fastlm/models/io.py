"""Models as Hugging Face folders: config.json and safetensors, in one file or sharded with an index."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.config import build, to_dict
from fastlm.errors import UserError
from fastlm.models import gpt2, llama
from fastlm.models.config import TransformerConfig
from fastlm.models.rules import Rule, hf_token_ids
from fastlm.models.transformer import Transformer

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_FAMILIES = {family.MODEL_TYPE: family for family in (gpt2, llama)}
# A config that no Hugging Face family can express is saved under our own names.
_OWN_TYPE = "fastlm"
_TOKENIZER_FILES = re.compile(
    r"(tokenizer.*\.(json|model)|vocab\.(json|txt)|merges\.txt|special_tokens_map\.json|added_tokens\.json|chat_template.*)"
)


def load(folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Transformer:
    """The model in a Hugging Face folder, in evaluation mode.

    Args:
        folder: holds config.json (its model_type decides the family: gpt2 or llama) and model.safetensors, or shards and
            model.safetensors.index.json.
        dtype: of the weights; None keeps what the file has, bit for bit.
        device: where the weights go.

    Raises:
        UserError: a missing, truncated or corrupted file, an architecture or variant we lack, or tensors that are missing,
        unexpected or of another shape than config.json says; one line naming file, tensor and remedy.
    """
    folder = Path(folder)
    config, rules, family = _read_config(folder)
    with torch.device("meta"):
        model = Transformer(config)
    expected = {name: list(p.shape) for name, p in model.named_parameters()}
    with contextlib.ExitStack() as stack:
        files = _Files(folder, stack)
        keys = _match_keys(files, rules, family, folder)
        state = {}
        for rule in rules:
            theirs = [files.read(keys[key], shape) for key, shape in zip(rule.theirs, rule.shapes(expected[rule.ours]))]
            state[rule.ours] = rule.to_ours(theirs).to(device=device, dtype=dtype)
    model.load_state_dict(state, assign=True)
    model.make_tables()
    return model.eval()


def save(
    model: Transformer, folder: str | Path, *, tokenizer: Any = None, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes a folder that `load` and transformers' from_pretrained open; the tensors keep every bit.

    Files are written whole under a temporary name and renamed when all are there, so that a full disk or a kill leaves the
    folder as it was. Beside the weights stand their CRC-32 sums, which `load` checks.

    Args:
        model: a Transformer.
        folder: made if it is not there; a model in it is replaced, other files stay.
        tokenizer: an object with `save(folder)`, or a folder whose tokenizer files are copied.
        max_shard_bytes: weights above this size are split into several files with an index.

    Raises:
        UserError: the disk is full or the folder cannot be written; weights are not there, such as those of quantised layers.
    """
    folder = Path(folder)
    hf, rules = _hf_config(model)
    state = dict(model.named_parameters())
    missing = sorted({rule.ours for rule in rules} - state.keys())
    if missing:
        raise UserError(
            f"save: the model has no {missing[0]} (and {len(missing) - 1} more); put quantised or otherwise replaced layers "
            "back first (report.undo()), or save its state_dict() with safetensors"
        )
    tensors = {}
    for rule in rules:
        tensors |= zip(rule.theirs, rule.to_theirs(state[rule.ours].detach().cpu()))
    shards = _shards(tensors, max_shard_bytes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
        try:
            _write(staging, hf, model.config, shards, tokenizer)
            # The weights first: config.json of an interrupted first save never stands there without them.
            for path in sorted(staging.iterdir(), key=lambda p: (p.name == CONFIG, p.name == INDEX)):
                os.replace(path, folder / path.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        for path in folder.glob("model*.safetensors*"):
            if path.name not in shards and not (path.name == INDEX and len(shards) > 1):
                path.unlink()  # shards of the model that was replaced
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space; what was there is unchanged" if full else "choose another folder"
        raise UserError(f"save: {folder} cannot be written: {error.strerror or error}; {remedy}") from error


# --- reading ------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}; copy or download it again") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold an object, got {type(data).__name__}; copy or download it again")
    return data


def _read_config(folder: Path) -> tuple[TransformerConfig, list[Rule], Any]:
    """The config, the key rules and the family module (None for our own names)."""
    path = folder / CONFIG
    if not path.is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        raise UserError(f"model folder {folder} {what}; give a folder in Hugging Face's format")
    hf = _read_json(path)
    model_type = hf.get("model_type")
    try:
        if model_type == _OWN_TYPE:
            config = build(TransformerConfig, hf.get("transformer") or {}, where="transformer")
            return config, _own_rules(config), None
        if model_type not in _FAMILIES:
            raise UserError(f"model_type {model_type!r} is not supported, only {', '.join(_FAMILIES)} are")
        if hf.get("quantization_config"):
            raise UserError("quantized weights are not supported; use the checkpoint they were made from")
        family = _FAMILIES[model_type]
        config = family.config_from_hf(hf)
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    return config, family.rules(config), family


def _match_keys(files: _Files, rules: list[Rule], family: Any, folder: Path) -> dict[str, str]:
    """The family's name of every tensor -> its name in the files, which may lack the prefix (a base model was saved)."""
    prefix = family.PREFIX if family else ""
    bare = not any(key.startswith(prefix) for key in files.where)
    keys = {prefix + key if bare and not key.startswith("lm_head.") else key: key for key in files.where}
    wanted = {key for rule in rules for key in rule.theirs}
    missing = sorted(wanted - keys.keys())
    if missing:
        raise UserError(
            f"{folder}: {missing[0]}{_more(missing)} is missing from the weights; config.json and weights must be of one model"
        )
    ignored = rf"lm_head\.weight|{family.IGNORED}" if family else ""
    unknown = sorted(key for key in keys.keys() - wanted if not re.fullmatch(ignored, key))
    if unknown:
        raise UserError(
            f"{folder / files.where[keys[unknown[0]]]}: {unknown[0]}{_more(unknown)} has no place in the model of config.json; "
            "config.json and weights must be of one model"
        )
    return keys


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


class _Files:
    """The tensors of a folder's safetensors files. `where` maps each tensor's name to its file."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self.handles: dict[str, Any] = {}
        self.sums: dict[str, dict[str, int]] = {}
        self.where: dict[str, str] = {}
        if (folder / WEIGHTS).is_file():
            names, listed = [WEIGHTS], {}
        elif (folder / INDEX).is_file():
            listed = _read_json(folder / INDEX).get("weight_map") or {}
            names = sorted(set(listed.values()))
        else:
            other = next((p.name for p in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))), None)
            remedy = f"{other} is a pickle and is not opened; save it as safetensors" if other else "copy it there"
            raise UserError(f"model folder {folder} has no {WEIGHTS}; {remedy}")
        for name in names:
            self._open(name, stack)
        for key, name in listed.items():
            if self.where.get(key) != name:
                raise UserError(
                    f"{folder / name} lacks {key}, which {INDEX} promises; copy or download the folder again"
                )

    def _open(self, name: str, stack: contextlib.ExitStack) -> None:
        from safetensors import safe_open

        path = self.folder / name
        if Path(name).name != name or not path.is_file():
            raise UserError(f"{path} is missing, which {INDEX} names; copy or download it again")
        try:
            handle = stack.enter_context(safe_open(path, framework="pt"))
        except Exception as error:  # safetensors raises its own class, which is not an OSError
            raise UserError(f"{path} is truncated or corrupted ({error}); copy or download it again") from error
        self.handles[name] = handle
        self.where |= dict.fromkeys(handle.keys(), name)
        with contextlib.suppress(ValueError):
            self.sums[name] = json.loads((handle.metadata() or {}).get("crc32", "{}"))

    def read(self, key: str, shape: list[int]) -> Tensor:
        """One tensor, in memory of its own (a mapped file that somebody changes would change the weights)."""
        name = self.where[key]
        path = self.folder / name
        tensor = self.handles[name].get_tensor(key).clone()
        if list(tensor.shape) != shape:
            raise UserError(
                f"{path}: {key} is {list(tensor.shape)}, config.json asks for {shape}; both must be of one model"
            )
        if not tensor.is_floating_point():
            raise UserError(f"{path}: {key} is {tensor.dtype}; only floating-point weights are supported")
        if _crc32(tensor) != self.sums.get(name, {}).get(key, _crc32(tensor)):
            raise UserError(f"{path} is corrupted: {key} does not have its checksum; copy or download it again")
        return tensor


# --- writing ------------------------------------------------------------------------------------------------------


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _own_rules(config: TransformerConfig) -> list[Rule]:
    with torch.device("meta"):
        return [Rule(name, (name,)) for name, _ in Transformer(config).named_parameters()]


def _hf_config(model: Transformer) -> tuple[dict[str, Any], list[Rule]]:
    config = model.config
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    for name, family in _FAMILIES.items():
        if family.reason_against(config) is None:
            hf = {"architectures": [family.ARCHITECTURE], "model_type": name, "dtype": dtype}
            return hf | family.config_to_hf(config), family.rules(config)
    return {"model_type": _OWN_TYPE, "dtype": dtype, "transformer": to_dict(config)}, _own_rules(config)


def _shards(tensors: dict[str, Tensor], limit: int) -> dict[str, dict[str, Tensor]]:
    """File name -> its tensors, in order, each file within the limit unless one tensor alone is larger."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][key] = tensor
        size += tensor.nbytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _write(
    staging: Path, hf: dict[str, Any], config: TransformerConfig, shards: dict[str, dict[str, Tensor]], tokenizer: Any
) -> None:
    for name, group in shards.items():
        _write_tensors(staging / name, group)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for group in shards.values() for t in group.values())},
            "weight_map": {key: name for name, group in shards.items() for key in group},
        }
        _write_json(staging / INDEX, index)
    _write_json(staging / CONFIG, hf)
    _write_json(staging / "generation_config.json", {k: v for k, v in hf_token_ids(config).items() if v is not None})
    if hasattr(tokenizer, "save"):
        tokenizer.save(staging)
    elif tokenizer is not None:
        for path in Path(tokenizer).iterdir():
            if _TOKENIZER_FILES.fullmatch(path.name):
                shutil.copyfile(path, staging / path.name)
    for path in staging.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    sums = json.dumps({key: _crc32(tensor) for key, tensor in tensors.items()})
    try:
        save_file(tensors, path, metadata={"format": "pt", "crc32": sums})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(mode)  # safetensors 0.8 leaves the file readable by its owner alone


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
