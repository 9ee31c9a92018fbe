"""What a training will cost in time, memory and disk, and the nearest one that fits where it is too much.

It reads records and loads nothing; the machine's speed is measured once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from mistudio_engine.api.errors import NextCall, OutOfMemory
from mistudio_engine.api.operations.training import TrainSAE
from mistudio_engine.api.records import DatasetRecord, ModelRecord, Plan, TokensRecord, TrainingRecord
from mistudio_engine.api.sae_config import SAEConfig, sae_bytes
from mistudio_engine.api.training_config import (
    Hyperparameters,
    buffer_bytes,
    training_bytes,
)
from mistudio_engine.handlers.training_plan import Blueprint, cache_folder, hooks_of
from mistudio_engine.models.hooks import parse_hook
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.files import require_free
from mistudio_engine.training.cost import Speed, measure_speed, tokens_per_second

LEAST_ROWS = 64
"""Fewer tokens at a time are not proposed where memory is short."""

_speeds: dict[str, Speed] = {}


def cost(
    engine: Engine,
    members: list[Blueprint],
    model: ModelRecord,
    tokens: TokensRecord | DatasetRecord,
    n_tokens: int,
    operation: TrainSAE | None = None,
) -> Plan:
    """What training so many tokens will take, without a summary.

    Raises:
        OutOfMemory: more memory than there is; with `operation` it has the call that fits.
        DiskFull: more disk than there is.
    """
    hp, widths = members[0].hp, hooks_of(members)
    memory = _memory_of(members)
    capacity = engine.memory.capacity(engine.device)
    if memory + model.n_bytes > capacity:
        raise _does_not_fit(operation, members, memory, capacity, model.n_bytes, getattr(tokens, "context_size", 128))
    # A checkpoint is weights and two moments; the newest, the best and the one that is being written lie side by side.
    one = sum(3 * 4 * sae_bytes(each.cfg) // _bytes_each(each.cfg) + sae_bytes(each.cfg) for each in members)
    disk = one * (hp.keep_checkpoints + 2)
    is_cached = isinstance(tokens, TokensRecord) and cache_folder(engine, tokens, list(widths), hp).exists()
    if hp.activations == "cached" and isinstance(tokens, TokensRecord) and not is_cached:
        each = {"float32": 4}.get(hp.cache_dtype, 2)
        disk += tokens.n_contexts * tokens.context_size * each * sum(widths.values())
    require_free(engine.home, disk, "This training")
    rate, how = _rate(engine, members, model)
    return Plan(
        summary="",
        seconds=n_tokens / rate if rate else None,
        memory_bytes=memory,
        disk_bytes=disk,
        details={
            "n_steps": hp.n_steps,
            "n_tokens": n_tokens,
            "batch_size": hp.batch_size,
            "checkpoint_interval": hp.checkpoint_interval,
            "checkpoints": n_tokens // (hp.checkpoint_interval or n_tokens),
            "tokens_per_second": rate,
            "rate_is": how,
            "d_in": members[0].cfg.d_in,
            "d_sae": members[0].cfg.d_sae,
            "saes": {
                each.name: {
                    "architecture": each.cfg.architecture,
                    "hook_name": each.cfg.hook_name,
                    "d_sae": each.cfg.d_sae,
                    "memory_bytes": training_bytes(each.cfg, each.hp),
                }
                for each in members
            },
        },
    )


def _bytes_each(cfg: SAEConfig) -> int:
    return {"float64": 8, "float32": 4}.get(cfg.dtype, 2)


def _rate(engine: Engine, members: list[Blueprint], model: ModelRecord) -> tuple[float | None, str]:
    """Tokens per second: what the same training reached here before, or what the machine's speed lets expect."""
    shape = [_shape(each.cfg.model_dump(mode="json"), each.hp.model_dump(mode="json")) for each in members]
    for record in reversed(engine.store.all(TrainingRecord, model=model.slug)):
        then = [_shape(each.config, each.hyperparameters) for each in record.members]
        if record.tokens_per_second and then == shape:
            return record.tokens_per_second, "measured in an earlier training"
    if engine.device not in _speeds:
        _speeds[engine.device] = engine.compute.run(lambda: measure_speed(torch.device(engine.device)))
    deepest = max(parse_hook(hook).layer for hook in hooks_of(members))
    body = max(model.n_params - model.d_vocab * model.d_model, 0)
    n_parameters = round(body * (deepest + 1) / max(model.n_layers, 1))
    pairs = [(each.cfg, each.hp) for each in members]
    device = torch.device(engine.device)
    rate = tokens_per_second(pairs, n_parameters, model.d_model, _speeds[engine.device], device)
    return rate, "estimated from this machine's speed"


def _shape(config: dict[str, Any], hp: dict[str, Any]) -> tuple[Any, ...]:
    """What decides how fast a training is."""
    return (
        *(config.get(name) for name in ("architecture", "d_in", "d_sae", "k", "hook_name")),
        *(hp.get(name) for name in ("batch_size", "activations")),
    )


def _memory_of(members: list[Blueprint], **other: int) -> int:
    """Bytes that training takes beside the model, with other settings if some are given."""
    hps = [each.hp.model_copy(update=other) for each in members]
    trainers = sum(training_bytes(each.cfg, hp) for each, hp in zip(members, hps, strict=True))
    return buffer_bytes(hps[0], hooks_of(members).values()) + trainers


def _does_not_fit(
    operation: TrainSAE | None, members: list[Blueprint], memory: int, capacity: int, model_bytes: int, context: int
) -> OutOfMemory:
    """The error for a training that is too large, with the largest one like it that is not."""
    needed, free = memory + model_bytes, capacity - model_bytes
    if operation is None:  # its settings are given
        return OutOfMemory.of("This training", needed, capacity, "Stop other programs, or go on on a larger machine.")
    hp, first = members[0].hp, members[0]
    for settings in _smaller(hp, context):
        if _memory_of(members, **settings) <= free:
            return _fitting(operation, needed, capacity, settings)
    d_sae = first.cfg.d_sae // 2 if len(members) == 1 else 0
    while d_sae >= max(operation.k or 1, math.ceil(hp.target_l0 or 1)):
        narrow = [first._replace(cfg=_with_d_sae(first.cfg, d_sae))]
        for settings in ({}, *_smaller(hp, context)):
            if _memory_of(narrow, **settings) <= free:
                return _fitting(operation, needed, capacity, settings, d_sae=d_sae)
        d_sae //= 2
    for n in range(len(members) - 1, 0, -1):
        for settings in ({}, *_smaller(hp, context)):
            if _memory_of(members[:n], **settings) <= free:
                variants = [each.model_dump(mode="json", exclude_unset=True) for each in operation.variants[:n]]
                return _fitting(operation, needed, capacity, settings, variants=variants)
    return OutOfMemory.of("This training", needed, capacity, "Unload models, stop other programs, or lower d_sae.")


def _smaller(hp: Hyperparameters, context_size: int) -> Iterator[dict[str, int]]:
    """Settings that need less and less memory: at first such that the same is learnt, then smaller batches."""
    rows, buffer = min(hp.micro_batch_size or hp.batch_size, hp.batch_size), hp.buffer_tokens
    least = max(hp.batch_size, context_size)
    while rows > LEAST_ROWS or buffer > least:
        rows, buffer = min(rows, max(rows // 2, LEAST_ROWS)), max(buffer // 2, least)
        yield {"micro_batch_size": rows, "buffer_tokens": buffer}
    batch = hp.batch_size
    while batch > LEAST_ROWS:
        batch = max(batch // 2, LEAST_ROWS)
        yield {"batch_size": batch, "micro_batch_size": min(rows, batch), "buffer_tokens": max(8 * batch, context_size)}


def _with_d_sae(cfg: SAEConfig, d_sae: int) -> SAEConfig:
    update: dict[str, Any] = {"d_sae": d_sae}
    if cfg.architecture == "matryoshka_batchtopk":
        update["widths"] = (d_sae,)
    return cfg.model_copy(update=update)


def _fitting(
    operation: TrainSAE, needed: int, capacity: int, settings: dict[str, int], **arguments: Any
) -> OutOfMemory:
    """The error with the call that fits: `operation` with other settings and arguments."""
    call = operation.model_dump(mode="json", exclude_unset=True, exclude={"idempotency_key", "wait_s"})
    call["hyperparameters"] = call.get("hyperparameters", {}) | settings
    if "d_sae" in arguments:
        for name in ("expansion", "widths"):
            call.pop(name, None)
    words = [f"{name}={value}" for name, value in {**arguments, **settings}.items() if name != "variants"]
    if "variants" in arguments:
        words.insert(0, f"the first {len(arguments['variants'])} variants")
    error = OutOfMemory.of("This training", needed, capacity, f"It fits with {', '.join(words)}.")
    error.next_call = NextCall(tool="train_sae", arguments={**call, **arguments})
    return error
