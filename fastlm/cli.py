"""The `fastlm` command line: the life of a model, one verb each. Every verb's --help shows an example."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastlm import config as configuration
from fastlm._flags import with_flags
from fastlm.data import DataConfig
from fastlm.errors import UserError
from fastlm.models import TransformerConfig
from fastlm.train import TrainConfig, TrainingInterrupted

app = typer.Typer(
    help="Language models on fused kernels: prepare data, train, evaluate, generate, convert.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Turn text into token shards.", no_args_is_help=True)
tokenizer_app = typer.Typer(help="Train a tokenizer.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app, name="tokenizer")

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="YAML or TOML file; flags win over it.", show_default=False),
]
Sources = Annotated[
    list[str] | None,
    typer.Argument(
        help="Text files, folders, globs or .jsonl(.gz); path@weight repeats or samples.", show_default=False
    ),
]
Model = Annotated[str, typer.Argument(help="Model folder (Hugging Face format), or the folder of a training run.")]


def main() -> None:
    """Runs the command line. Exit status: 0, 2 for a mistake the user can repair, 128 + signal when interrupted."""
    try:
        app()
    except TrainingInterrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_status)
    except UserError as error:
        print(f"fastlm: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo writes.")] = Path("runs/demo"),
    seconds: Annotated[float, typer.Option(help="Training time.")] = 100.0,
) -> None:
    """Trains a small Llama-style model on the source of Python's standard library, evaluates and samples it.

    Example: `fastlm demo --seconds 100`
    """
    from fastlm.demo import run

    run(out, seconds)


@data_app.command("prepare")
@with_flags(DataConfig, skip=("output",))
def data_prepare(
    sources: Sources = None,
    out: Annotated[str | None, typer.Option(help="Folder to write. [default: data/prepared]")] = None,
    validation: Annotated[
        list[str] | None,
        typer.Option(help="Sources of the validation split; repeat for several.", show_default=False),
    ] = None,
    config: ConfigFile = None,
    flags: dict[str, Any] = {},  # noqa: B006  filled by with_flags
) -> None:
    """Cleans text, trains or loads a tokenizer, and writes token shards.

    Example: `fastlm data prepare books/ notes.jsonl.gz@0.5 --tokenizer bpe --vocab-size 8192 --out data/books`
    """
    from fastlm.runs import prepare_data

    given = {"sources": sources or None, "output": out, "validation_sources": validation or None}
    flags = flags | {name: value for name, value in given.items() if value is not None}
    prepare_data(configuration.build(DataConfig, _sections(config, "data")["data"], flags, where="data"))


@tokenizer_app.command("train")
@with_flags(DataConfig, skip=("output", "tokenizer", "append_eos", "split", "validation_fraction", "shard_tokens"))
def tokenizer_train(
    sources: Sources = None,
    out: Annotated[str, typer.Option(help="Folder for tokenizer.json.")] = "tokenizer",
    kind: Annotated[str, typer.Option(help="char, bpe (byte-level), wordpiece or unigram.")] = "bpe",
    config: ConfigFile = None,
    flags: dict[str, Any] = {},  # noqa: B006  filled by with_flags
) -> None:
    """Trains a tokenizer on text and writes tokenizer.json, which transformers opens too.

    Example: `fastlm tokenizer train books/ --kind bpe --vocab-size 8192 --out tokenizers/books`
    """
    from fastlm.data import tokenizer_from_sources
    from fastlm.data.tokenizer import KINDS

    if kind not in KINDS:
        raise UserError(f"tokenizer: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    flags = flags | {"tokenizer": kind} | ({"sources": sources} if sources else {})
    settings = configuration.build(DataConfig, _sections(config, "data")["data"], flags, where="data")
    tokenizer, report = tokenizer_from_sources(settings)
    tokenizer.save(out)
    print(report)
    print(f"{tokenizer} written to {out}")


@app.command()
@with_flags(TrainConfig, TransformerConfig, panel={TrainConfig: "Training", TransformerConfig: "Model"})
def train(
    preset: Annotated[
        str | None,
        typer.Option(help="Start from a named size, such as gpt2 or llama-6x384; model flags win.", show_default=False),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--model", help="Start from the weights of this model folder.", show_default=False),
    ] = None,
    config: ConfigFile = None,
    flags: dict[str, Any] = {},  # noqa: B006  filled by with_flags
) -> None:
    """Trains a model on prepared data; Ctrl-C saves, `--resume` goes on bit for bit.

    A config file has two sections, `train` and `model`; the resolved ones are saved as config.yaml in the out folder.

    Example: `fastlm train --data data/books --preset llama-6x384 --steps 2000 --precision bf16 --out runs/books`
    """
    from fastlm.runs import start_run

    sections = _sections(config, "train", "model")
    names = set(TrainConfig.__dataclass_fields__)
    train_flags = {name: value for name, value in flags.items() if name in names}
    model_flags = {name: value for name, value in flags.items() if name not in names}
    settings = configuration.build(TrainConfig, sections["train"], train_flags, where="train")
    start_run(settings, sections["model"] | model_flags, preset=preset, start=start)


@app.command()
def evaluate(
    model: Model,
    files: Annotated[list[str] | None, typer.Argument(help="Text files.", show_default=False)] = None,
    data: Annotated[str | None, typer.Option(help="A prepared folder instead of files.", show_default=False)] = None,
    split: Annotated[str, typer.Option(help="Which split of the prepared folder.")] = "validation",
    context: Annotated[int | None, typer.Option(help="Tokens seen at once. [default: what the model was trained on]",
                                                   show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in one forward pass.")] = 16,
    precision: Annotated[str, typer.Option(help="fp32 or bf16 (autocast).")] = "fp32",
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:  # fmt: skip
    """Loss, perplexity, bits per byte and top-1 accuracy, with confidence interval.

    Example: `fastlm evaluate runs/books chapter1.txt chapter2.txt`
    """
    from fastlm.runs import evaluate_run

    result = evaluate_run(model, files or [], data, split, context, batch_size, precision)
    print(result.to_json() if json_output else result)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="Text to continue; - reads standard input.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add, at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.", show_default=False)] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens of this total probability.",
                                                   show_default=False)] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep tokens of at least this share of the likeliest one's probability.",
                                                   show_default=False)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; repeat for several.", show_default=False)] = None,
    samples: Annotated[int, typer.Option(help="Continuations to write.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Seed of the draw.", show_default=False)] = None,
) -> None:  # fmt: skip
    """Continues a prompt and streams the text to the terminal.

    Example: `fastlm generate runs/books --prompt "It was" --temperature 0.8 --top-p 0.95`
    """
    from fastlm.runs import generate_run

    if prompt == "-":
        prompt = sys.stdin.read()
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "stop_strings": stop or ()}
    for i in range(samples):
        if samples > 1:
            print(f"--- {i + 1}")
        generate_run(model, prompt or "", max_new_tokens, seed=None if seed is None else seed + i, **options)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Model folder (Hugging Face format) or the folder of a training run.")],
    target: Annotated[str, typer.Argument(help="Folder to write.")],
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16. [default: as stored]", show_default=False)
    ] = None,
    shard_mb: Annotated[int, typer.Option(help="Largest weight file, in MB.")] = 5000,
) -> None:
    """Reads a model folder and writes it anew in Hugging Face's format: other dtype, other sharding.

    Example: `fastlm convert runs/books books-bf16 --dtype bf16`
    """
    from fastlm.runs import convert_run

    print(convert_run(source, target, dtype, shard_mb))


@app.command()
def doctor() -> None:
    """Prints versions, devices, and the backends each op can use here, with the reasons for the missing ones.

    Example: `fastlm doctor`
    """
    from fastlm.doctor import show

    show()


def _sections(path: Path | None, *names: str) -> dict[str, dict[str, Any]]:
    """The named sections of a config file; each may be missing, no other may be there."""
    content = configuration.read_mapping(path) if path else {}
    sections = {}
    for name in names:
        section = content.pop(name, None) or {}
        if not isinstance(section, dict):
            raise UserError(f"{path}: section {name!r} must hold names and values, got {section!r}")
        sections[name] = section
    if content:
        key = next(iter(content))
        raise UserError(f"{path}: unknown section {key!r}; {configuration.nearest(key, names)}")
    return sections


if __name__ == "__main__":
    main()
