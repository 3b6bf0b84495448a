"""``petals-chat check``: is the configuration usable, and what do its models need of this machine?

The settings are valid already when it runs. It reads the headers of the models' checkpoints, but no weights,
and does not ask the swarms.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool

from huggingface_hub.utils.tqdm import disable_progress_bars

from petals_chat.errors import ConfigurationError
from petals_chat.models.checkpoint import client_tensors, open_checkpoint
from petals_chat.settings import ModelSettings, Settings, find_configuration_file

_MODELS_AT_ONCE = 8
_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Requirements:
    """What the gateway's machine needs for a model, and what the model is."""

    memory_bytes_16_bit: int
    """Of embeddings, norms and head."""
    memory_bytes_32_bit: int
    tied_head: bool
    """The embeddings are the head too."""
    model_type: str
    num_blocks: int
    hidden_size: int
    vocabulary: int
    dtype: str


@dataclasses.dataclass(frozen=True)
class ModelReport:
    """The result of checking one model: its requirements, or the problem."""

    key: str
    name: str
    repository: str
    adapter: str | None
    public_api: bool
    initial_peers: str | tuple[str, ...]
    requirements: Requirements | None
    problem: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Only the form of the output can be chosen."""
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Print a report for each model; 0 = all of them can be served."""
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what matters comes as an error anyway
    with ThreadPool(_MODELS_AT_ONCE) as pool:  # of daemon threads: Ctrl-C does not wait for the network
        reports = pool.map(lambda model: check_model(model, settings), settings.models)
    file = find_configuration_file(arguments.config)
    where = str(file) if file else None
    if arguments.json:
        models = [dataclasses.asdict(report) for report in reports]
        print(json.dumps({"configuration_file": where, "models": models}, indent=2, ensure_ascii=False))
    else:
        print(_text(where, reports))
    return 1 if any(report.problem for report in reports) else 0


def check_model(model: ModelSettings, settings: Settings) -> ModelReport:
    """Read what the model's checkpoint says of itself."""
    requirements, problem = None, None
    try:
        requirements = _requirements(model)
    except ConfigurationError as error:
        problem = error.message
    peers = settings.swarm.initial_peers if model.initial_peers is None else model.initial_peers
    return ModelReport(
        key=model.key,
        name=model.name,
        repository=model.repository,
        adapter=model.adapter,
        public_api=model.public_api,
        initial_peers=peers,
        requirements=requirements,
        problem=problem,
    )


def _requirements(model: ModelSettings) -> Requirements:
    checkpoint = open_checkpoint(model.repository, model.revision)
    names = client_tensors(checkpoint.config, checkpoint.tensors)
    embeddings = checkpoint.tensors[names.embeddings]
    vocabulary, hidden_size = embeddings.shape
    elements = sum(checkpoint.tensors[name].num_elements for name in names.names())
    return Requirements(
        memory_bytes_16_bit=2 * elements,
        memory_bytes_32_bit=4 * elements,
        tied_head=names.head is None,
        model_type=checkpoint.model_type,
        num_blocks=checkpoint.num_blocks,
        hidden_size=hidden_size,
        vocabulary=vocabulary,
        dtype=_DTYPE_NAMES.get(embeddings.dtype, embeddings.dtype),
    )


def _text(file: str | None, reports: Sequence[ModelReport]) -> str:
    source = f"{file} is valid" if file else "There is no configuration file; the settings are valid"
    if not reports:
        return (
            f"{source}.\n\nNo model is switched on: `petals-chat serve` will serve the bundled model, with a "
            "private swarm\non this machine. docs/configuration.md says how to switch models on."
        )
    paragraphs = [f"{source}. {len(reports)} {'model' if len(reports) == 1 else 'models'}:"]
    paragraphs += [_paragraph(report, is_default=report is reports[0]) for report in reports]
    found = [report.requirements for report in reports if report.requirements]
    if len(found) > 1:
        together = _memory(
            sum(each.memory_bytes_16_bit for each in found), sum(each.memory_bytes_32_bit for each in found)
        )
        paragraphs.append(f"Memory for these {len(found)} models together: {together}.")
    failed = sum(report.problem is not None for report in reports)
    if failed:
        paragraphs.append(f"{failed} of {len(reports)} cannot be served as configured.")
    return "\n\n".join(paragraphs)


def _paragraph(report: ModelReport, *, is_default: bool) -> str:
    lines = [f"{report.name} ({report.key}{', the default model' if is_default else ''})"]
    if report.repository != report.key:
        lines.append(f"  from        {report.repository}")
    if report.adapter and report.adapter != report.key:
        lines.append(f"  adapter     {report.adapter}")
    if report.problem:
        lines.append(f"  problem     {report.problem}")
    if needs := report.requirements:
        what = "embeddings, which are the head too" if needs.tied_head else "embeddings and head"
        lines += [
            f"  memory      {_memory(needs.memory_bytes_16_bit, needs.memory_bytes_32_bit)} ({what})",
            f"  checkpoint  {needs.model_type}, {needs.num_blocks} blocks, hidden size {needs.hidden_size}, "
            f"vocabulary {needs.vocabulary}, {needs.dtype}",
        ]
    lines.append(f"  swarm       {_swarm(report.initial_peers)}")
    if not report.public_api:
        lines.append("  use         only on this server's own page, not through the public APIs")
    return "\n".join(lines)


def _swarm(initial_peers: str | tuple[str, ...]) -> str:
    if isinstance(initial_peers, str):
        return initial_peers
    if not initial_peers:
        return "private; `petals-chat serve` starts a host with all blocks on this machine"
    return f"joined through {', '.join(initial_peers)}"


def _memory(bytes_16_bit: int, bytes_32_bit: int) -> str:
    return f"{_size(bytes_16_bit)} in 16 bit, {_size(bytes_32_bit)} in 32 bit"


def _size(count: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"
