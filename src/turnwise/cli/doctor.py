"""``turnwise doctor``: what this machine has, what is missing, and whether a model runs on it."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Annotated, Literal

import typer

EXTRAS = {
    "bitsandbytes": ("quantization", "model.quantization, weights in 4 bits under adapters"),
    "reasoning_gym": ("reasoning-gym", "environments reasoning_gym:<dataset>, over a hundred task families"),
    "trl": ("dev", "tests and benchmarks against TRL"),
}
"""Module → the extra that installs it, and what it is for."""
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TOKENIZERS_PARALLELISM",
)
"""Environment variables that change how a run behaves."""
LEAST_FREE_GB = 2.0
"""Of disk: checkpoints and trajectories of a small run."""

State = Literal["ok", "warn", "bad", "info"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's."""

    state: State
    what: str
    found: str
    remedy: str = ""


def doctor(
    runs: Annotated[Path, typer.Option(help="Where run directories are.")] = Path("runs"),
) -> None:
    """Check this machine: versions, processors, memory, disk, extras, and a tiny forward pass."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    marks = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "bad": ("✗", "bold red"), "info": ("·", "dim")}
    bad = 0
    for finding in examine(runs):
        bad += finding.state == "bad"
        mark, style = marks[finding.state]
        console.print(Text.assemble((mark, style), f" {finding.what:<14} {finding.found}"), soft_wrap=True)
        if finding.remedy:
            console.print(Text(f"{'':<17}{finding.remedy}", style), soft_wrap=True)
    if bad:
        raise typer.Exit(1)
    console.print("\nReady: turnwise run recipes/quickstart.yaml", soft_wrap=True)


def examine(runs: Path) -> Iterator[Finding]:
    """Everything that is worth knowing, one finding at a time."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("ok", "turnwise", f"{metadata.version('turnwise')} on Python {version}")
    libraries = list(_libraries())
    yield from libraries
    yield from _machine()
    yield _disk(runs)
    yield from _extras()
    for name in VARIABLES:
        if name in os.environ:
            yield Finding("info", "variable", f"{name}={'set' if 'TOKEN' in name else os.environ[name]}")
    if all(finding.state == "ok" for finding in libraries):
        yield from _torch()


def _libraries() -> Iterator[Finding]:
    for name in ("torch", "transformers", "tokenizers", "peft", "numpy", "pydantic"):
        if util.find_spec(name) is None:
            yield Finding("bad", name, "not installed", "pip install turnwise")
        else:
            yield Finding("ok", name, metadata.version(name))


def _machine() -> Iterator[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total = os.cpu_count() or usable
    yield Finding("ok", "processors", f"{usable}" + (f" of {total}" if usable != total else ""))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    small = memory < 2
    yield Finding(
        "warn" if small else "ok",
        "memory",
        f"{memory:.1f} GiB",
        "the quickstart needs about 2 GiB" if small else "",
    )


def _disk(runs: Path) -> Finding:
    where = runs.absolute()
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free / 1e9
    if not os.access(where, os.W_OK):
        return Finding("bad", "disk", f"{where} cannot be written to", "choose another place with --runs")
    if free < LEAST_FREE_GB:
        return Finding(
            "bad", "disk", f"{free:.1f} GB free for {runs}", f"make room: {LEAST_FREE_GB:.0f} GB at least"
        )
    return Finding("ok", "disk", f"{free:.0f} GB free for {runs}")


def _extras() -> Iterator[Finding]:
    for module, (extra, purpose) in EXTRAS.items():
        if util.find_spec(module) is None:
            yield Finding(
                "info", "extra", f"{module} is not installed: {purpose}", f"pip install 'turnwise[{extra}]'"
            )
        else:
            yield Finding("ok", "extra", f"{module} {metadata.version(module)}: {purpose}")


def _torch() -> Iterator[Finding]:
    import torch

    yield Finding(
        "ok", "threads", f"{torch.get_num_threads()} for tensor work; the recipe's key 'threads' sets them"
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            bf16 = "" if torch.cuda.is_bf16_supported() else ", without bfloat16: set model.dtype=float32"
            yield Finding("ok", "gpu", f"{device.name}, {device.total_memory / 2**30:.0f} GiB{bf16}")
    else:
        yield Finding("info", "gpu", "none that torch can use: the processor does everything")
    yield _smoke("cuda" if torch.cuda.is_available() else "cpu")


def _smoke(device: str) -> Finding:
    """A forward and a backward pass of a model of two layers."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    began = time.perf_counter()
    config = Qwen3Config(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    try:
        model = Qwen3ForCausalLM(config).to(device)
        ids = torch.arange(16, device=device)[None]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        finite = bool(torch.isfinite(loss))
    except RuntimeError as error:  # what torch raises for a broken driver or a full device
        return Finding(
            "bad", "smoke", f"a tiny model fails on {device}: {error}", "reinstall torch for this machine"
        )
    if not finite:
        return Finding("bad", "smoke", f"a tiny model's loss is {loss.item()} on {device}", "reinstall torch")
    seconds = time.perf_counter() - began
    return Finding("ok", "smoke", f"a tiny model learns on {device}, {seconds:.1f} s")
