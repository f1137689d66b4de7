"""What the verbs of the command line do with folders: start or resume a run, evaluate, sample and convert a model."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from fastlm import config as configuration
from fastlm.data import DataConfig, Loader, PrepareReport, Tokenizer, load_tokenizer, prepare
from fastlm.errors import UserError
from fastlm.evaluate import EvaluationResult, evaluate
from fastlm.generate import complete, print_piece
from fastlm.models import PRESETS, Transformer, TransformerConfig, load
from fastlm.models import preset as named_config
from fastlm.train import TrainConfig, TrainResult, train
from fastlm.train.setup import pick_device, start_folder

CONFIG = "config.yaml"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def prepare_data(config: DataConfig) -> PrepareReport:
    """`fastlm.data.prepare` under a progress bar (on a terminal), with its report printed."""
    from rich.progress import Progress

    with Progress(disable=not sys.stdout.isatty(), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        report = prepare(config, progress)
    print(report)
    return report


def start_run(
    config: TrainConfig, model_settings: dict[str, Any], *, preset: str | None = None, start: str | None = None
) -> TrainResult:
    """Trains a model on prepared data; the resolved settings are saved as config.yaml in the run's folder.

    Args:
        config: of the training; config.data is a folder made by `fastlm data prepare`.
        model_settings: fields of TransformerConfig; they win over the preset.
        preset: a named size, see fastlm.models.PRESETS.
        start: a model folder whose weights to start from; model_settings and preset must then be empty.

    Raises:
        UserError: no data, settings that do not fit each other, and all that `train` raises.
    """
    if not config.data:
        raise UserError("train: data is missing; give --data, a folder made by `fastlm data prepare`")
    tokenizer = load_tokenizer(config.data)
    torch.manual_seed(config.seed)
    if start is not None:
        if model_settings or preset:
            raise UserError("train: --model brings its own sizes; leave the preset and the model's settings away")
        model = load(model_folder(start))
    else:
        model = Transformer(_model_config(config, model_settings, preset, tokenizer))
    check_vocabulary(model, tokenizer, f"the data in {config.data}")
    if config.context > model.config.max_positions:
        raise UserError(
            f"train: context {config.context} is more than the model's max_positions {model.config.max_positions}; change one"
        )
    out = Path(config.out)
    if not config.resume:
        start_folder(out, config.overwrite)
        write_config(out / CONFIG, config, model.config)
    loaders = [_loader(config, split, config.seed) for split in ("train", "validation")]
    return train(model, dataclasses.replace(config, overwrite=False), *loaders, tokenizer=tokenizer)


def _model_config(
    config: TrainConfig, settings: dict[str, Any], preset: str | None, tokenizer: Tokenizer
) -> TransformerConfig:
    """Preset, then what the data fixes (vocabulary, end of text, room for the context), then the user's settings."""
    if preset:
        named_config(preset)  # names the nearest one if there is none of that name
    base = PRESETS[preset] if preset else {}
    of_data: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "bos_id": None, "pad_id": None}
    of_data["eos_ids"] = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    room = base.get("max_positions", TransformerConfig.max_positions)
    of_data["max_positions"] = max(room, config.context)
    return configuration.build(TransformerConfig, base, of_data, settings, where="model")


def _loader(config: TrainConfig, split: str, seed: int) -> Loader | None:
    """The split's batches; None for data prepared without a validation split."""
    if split == "validation" and not list(Path(config.data).glob("validation-*.bin")):
        return None
    return Loader(config.data, split, config.batch_size, config.context, seed=seed)


def write_config(path: Path, train_config: TrainConfig, model_config: TransformerConfig) -> None:
    """The resolved settings, in the form that `fastlm train --config` reads."""
    import yaml

    def plain(config: Any, skip: tuple[str, ...] = ()) -> dict[str, Any]:
        values = {k: v for k, v in configuration.to_dict(config).items() if k not in skip}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    content = {"train": plain(train_config, ("resume", "overwrite")), "model": plain(model_config)}
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def model_folder(folder: str | Path) -> Path:
    """The model folder itself, or the final model of a training run's folder. Raises UserError if there is neither."""
    folder = Path(folder)
    for path in (folder, folder / "model"):
        if (path / "config.json").is_file():
            return path
    if (folder / "checkpoints").is_dir():
        raise UserError(f"{folder} holds an unfinished run; finish it with `fastlm train --resume --out {folder}`")
    what = "has no config.json" if folder.is_dir() else "does not exist"
    raise UserError(f"model folder {folder} {what}; give a Hugging Face folder or the out folder of a finished run")


def load_model(folder: str | Path) -> tuple[Transformer, Tokenizer]:
    """The model and tokenizer of a folder, on the GPU where there is one. Raises UserError if they do not fit."""
    path = model_folder(folder)
    model = load(path).to(pick_device("auto")).eval()
    tokenizer = load_tokenizer(path)
    check_vocabulary(model, tokenizer, f"the tokenizer in {path}")
    return model, tokenizer


def check_vocabulary(model: Transformer, tokenizer: Tokenizer, whose: str) -> None:
    """Raises UserError if the tokenizer has tokens the model does not know."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{whose} has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}; use the tokenizer the model "
            "was trained with, or prepare the data with it"
        )


def evaluate_run(
    folder: str,
    files: list[str],
    data: str | None,
    split: str,
    context: int | None,
    batch_size: int,
    precision: str,
) -> EvaluationResult:
    """Scores a model on text files or on a split of prepared data."""
    if precision not in ("fp32", "bf16"):
        raise UserError(f"evaluate: precision must be fp32 or bf16, got {precision!r}")
    if bool(files) == bool(data):
        raise UserError("evaluate: give text files, or --data with a prepared folder, and not both")
    model, tokenizer = load_model(folder)
    context = context or trained_context(folder) or min(model.config.max_positions, 1024)
    device = model.embed.weight.device.type
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        if data:
            check_vocabulary(model, load_tokenizer(data), f"the data in {data}")
            return evaluate(model, tokenizer, data=data, split=split, context=context, batch_size=batch_size)
        return evaluate(model, tokenizer, files=files, context=context, batch_size=batch_size)


def trained_context(folder: str | Path) -> int | None:
    """The context a run's model was trained with; None where no config.yaml tells."""
    for path in (Path(folder) / CONFIG, Path(folder).parent / CONFIG):
        if path.is_file():
            return configuration.read_mapping(path).get("train", {}).get("context")
    return None


def generate_run(folder: str, prompt: str, max_new_tokens: int, **options: Any) -> None:
    """Streams a continuation of the prompt to standard output, the prompt first."""
    model, tokenizer = load_model(folder)
    print_piece(prompt)
    complete(model, tokenizer, prompt, max_new_tokens, stream=print_piece, **options)
    print()


def convert_run(source: str, target: str, dtype: str | None, shard_mb: int) -> str:
    """Writes a model folder anew; returns a line that says what was written."""
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"convert: dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    path = model_folder(source)
    if Path(target).resolve() == path.resolve():
        raise UserError(f"convert: target {target} is the source; give another folder")
    model = load(path)
    if dtype is not None:
        model = model.to(_DTYPES[dtype])
    tokenizer = load_tokenizer(path) if (path / "tokenizer.json").is_file() else None
    model.save_pretrained(target, max_shard_bytes=shard_mb * 10**6)
    if tokenizer is not None:
        tokenizer.save(target)
    count = sum(p.numel() for p in model.parameters())
    return f"{count:,} parameters in {str(model.embed.weight.dtype)[6:]} written to {target}"
