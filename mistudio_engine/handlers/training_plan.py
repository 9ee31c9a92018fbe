"""What a call of train_sae stands for: the SAEs with their configs and settings, and what they will cost.

It reads records and loads nothing; training.py runs what is planned here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from mistudio_engine.api.errors import BadInput, EmptyData, NextCall, NotFound, OutOfMemory, UnknownHook, WrongShape
from mistudio_engine.api.operations.training import TrainSAE, Variant, preset_of
from mistudio_engine.api.presets import L1_PER_WIDTH, default_l1_coefficient
from mistudio_engine.api.records import DatasetRecord, ModelRecord, Plan, TokensRecord, TrainingRecord
from mistudio_engine.api.sae_config import SAEConfig, activation_of, explain, parse_sae_config, sae_bytes
from mistudio_engine.api.training_config import (
    Hyperparameters,
    belongs_to,
    buffer_bytes,
    check_training,
    training_bytes,
)
from mistudio_engine.handlers.resources import tokens_of
from mistudio_engine.models.hooks import parse_hook
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.files import require_free, slugify
from mistudio_engine.training.cost import Speed, measure_speed, tokens_per_second

__all__ = ["Blueprint", "blueprints", "cache_folder", "cost", "held_out", "hooks_of", "stem", "tokens_or_dataset"]

DEFAULT_EXPANSION = 8
DEFAULT_K = 32

CHECKPOINTS_PER_RUN = 10
"""How many a run writes when nothing else is said: a kill then costs a tenth of it at most."""

HELD_OUT_SHARE = 20
"""Text is held out for evaluation where it is at most one in so many of all contexts."""

LEAST_ROWS = 64
"""Fewer tokens at a time are not proposed where memory is short."""

MOST_CHARACTERS = 200
"""A longer list of hooks is no name of a folder."""

_speeds: dict[str, Speed] = {}


class Blueprint(NamedTuple):
    """One SAE to train."""

    name: str
    """Of its variant; `sae` where there is one only."""

    cfg: SAEConfig
    hp: Hyperparameters
    seed: int

    @property
    def hooks(self) -> list[str]:
        """Where it reads, and for a transcoder where its output belongs."""
        return [hook for hook in (self.cfg.hook_name, self.cfg.hook_name_out) if hook]


def blueprints(operation: TrainSAE, model: ModelRecord, tokens: TokensRecord | DatasetRecord) -> list[Blueprint]:
    """All SAEs of a call, checked; widths that only the loaded model knows are checked when it is loaded.

    Raises:
        UnknownHook, WrongShape, BadInput: what cannot be trained; names the variant.
    """
    hp = operation.hyperparameters
    if hp.checkpoint_interval is None:
        interval = max(hp.batch_size, hp.n_tokens // CHECKPOINTS_PER_RUN)
        hp = hp.model_copy(update={"checkpoint_interval": interval})
    if isinstance(tokens, TokensRecord):
        _check_enough(hp, tokens)
    if not operation.variants:
        return [_blueprint("sae", operation, hp, operation.seed, model, tokens)]
    found: list[Blueprint] = []
    for number, variant in enumerate(operation.variants, start=1):
        name = variant.name or str(number)
        merged = _merged(operation, variant)
        try:
            settings = _settings(hp, operation, merged, variant)
            seed = operation.seed if variant.seed is None else variant.seed
            found.append(_blueprint(name, merged, settings, seed, model, tokens))
        except BadInput as error:
            raise type(error)(f"Variant {name}: {error.what}", why=error.why, fix=error.fix) from error
        except ValidationError as error:
            raise BadInput(f"Variant {name}: {explain(error)}", fix="Mend the value that is named.") from error
    names = [each.name for each in found]
    if len(set(names)) < len(names):
        raise BadInput(f"Two variants are called alike: {', '.join(names)}.", fix="Give each a name of its own.")
    _check_used(operation, {each.cfg.activation for each in found})
    return found


def _check_enough(hp: Hyperparameters, tokens: TokensRecord) -> None:
    """Refuse tokens that do not make one batch; special ones are counted, so that the stream may still refuse them."""
    if tokens.n_tokens < hp.batch_size:
        raise EmptyData(
            f"{tokens.ref} has {tokens.n_tokens} tokens, less than one batch of {hp.batch_size}.",
            fix=f"Bring in more text, or set batch_size to at most {tokens.n_tokens}.",
        )
    if hp.buffer_tokens < tokens.context_size:
        raise BadInput(
            f"buffer_tokens = {hp.buffer_tokens} does not hold one context of {tokens.context_size} tokens.",
            fix=f"Set buffer_tokens to {tokens.context_size} or more; 16 batches or more shuffle well.",
        )


def _check_used(operation: TrainSAE, activations: set[str]) -> None:
    """Refuse what the call says and no variant has a use for, as it is refused where there is one SAE only."""
    hp, chosen = operation.hyperparameters, preset_of(operation.model_dump(include={"preset", "architecture"}))
    idle = [
        f"{name}={getattr(hp, name)!r}"
        for name in sorted(hp.model_fields_set - chosen.keys())
        if getattr(hp, name) != Hyperparameters.model_fields[name].default
        and not any(belongs_to(name, activation) for activation in activations)
    ]
    if operation.k is not None and "k" not in chosen and not activations & {"topk", "batchtopk"}:
        idle.append(f"k={operation.k}")
    if idle:
        raise BadInput(
            f"{', '.join(idle)} has no meaning for any of the variants.",
            why=f"Their activations are {', '.join(sorted(activations))}.",
            fix="Leave it out, or give the variant that it is meant for another architecture.",
        )


def _merged(operation: TrainSAE, variant: Variant) -> TrainSAE:
    """The call as if it were for this variant alone."""
    given = variant.model_dump(exclude_none=True, exclude={"hyperparameters", "name", "seed"})
    # d_sae and expansion, and what belongs to another architecture, are not inherited beside what replaces them.
    dropped: set[str] = set()
    if {"d_sae", "expansion"} & given.keys():
        dropped |= {"d_sae", "expansion"}
    architecture = given.get("architecture", operation.architecture)
    if activation_of(architecture) not in ("topk", "batchtopk"):
        dropped.add("k")
    if architecture != "matryoshka_batchtopk" or "d_sae" in given:
        dropped.add("widths")
    if "transcoder" not in architecture:
        dropped.add("hook_name_out")
    if "preset" in given:
        dropped.add("k")
    values = operation.model_dump(
        include={*given.keys(), *Variant.model_fields}
        & set(TrainSAE.model_fields) - dropped - {"hyperparameters", "name", "seed"},
        exclude_none=True,
    )
    if operation.d_in is not None and given.get("hook_name", operation.hook_name) == operation.hook_name:
        values["d_in"] = operation.d_in
    return TrainSAE(model=operation.model, dataset=operation.dataset, **{**values, **given})


def _settings(hp: Hyperparameters, operation: TrainSAE, merged: TrainSAE, variant: Variant) -> Hyperparameters:
    """The call's settings as far as they belong to this SAE, the variant's preset over them, its own over all."""
    activation = activation_of(merged.architecture)
    ours = {name: value for name, value in hp.model_dump(exclude_unset=True).items() if belongs_to(name, activation)}
    preset = (
        preset_of(merged.model_dump(include={"preset", "architecture"}))
        if variant.preset or variant.architecture
        else {}
    )
    preset.pop("k", None)
    if "l0_penalty" in (variant.hyperparameters.keys() | preset.keys()):
        ours.pop("target_l0", None)
    return Hyperparameters(**{**ours, **preset, **variant.hyperparameters})


def _blueprint(
    name: str,
    operation: TrainSAE,
    hp: Hyperparameters,
    seed: int,
    model: ModelRecord,
    tokens: TokensRecord | DatasetRecord,
) -> Blueprint:
    cfg = _config(operation, model, tokens)
    check_training(cfg, hp)
    if hp.l1_coefficient is None and cfg.activation in L1_PER_WIDTH:
        weight = default_l1_coefficient(cfg.activation, cfg.d_in, operation.preset)
        hp = hp.model_copy(update={"l1_coefficient": weight})
    return Blueprint(name, cfg, hp, seed)


def _config(operation: TrainSAE, model: ModelRecord, tokens: TokensRecord | DatasetRecord) -> SAEConfig:
    transcodes = "transcoder" in operation.architecture
    if transcodes and operation.hook_name_out is None:
        raise BadInput(
            f"A {operation.architecture} needs two hooks, and hook_name_out is missing.",
            why="It reads at hook_name and predicts hook_name_out.",
            fix="Give both, such as blocks.2.ln2.hook_normalized and blocks.2.hook_mlp_out.",
        )
    for hook_name in (operation.hook_name, operation.hook_name_out):
        if hook_name is not None:
            _check_layer(hook_name, model)
    d_in = operation.d_in or model.d_model
    if "resid" in parse_hook(operation.hook_name).site and d_in != model.d_model:
        raise WrongShape(
            f"d_in is {d_in}, but {operation.hook_name} of {model.ref} is {model.d_model} wide.",
            fix="Leave d_in out: it is the hook's width.",
        )
    d_sae = operation.d_sae or round((operation.expansion or DEFAULT_EXPANSION) * d_in)
    values: dict[str, Any] = {
        "architecture": operation.architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "normalize_activations": operation.normalize_activations,
        "hook_name": operation.hook_name,
        "model_name": model.slug,
        "dataset_path": tokens.dataset if isinstance(tokens, TokensRecord) else tokens.slug,
    }
    if transcodes:
        values |= {"d_out": model.d_model, "hook_name_out": operation.hook_name_out, "apply_b_dec_to_input": False}
    if activation_of(operation.architecture) in ("topk", "batchtopk"):
        values["k"] = operation.k or min(DEFAULT_K, d_sae)
        if values["k"] > d_sae:
            raise BadInput(
                f"k = {values['k']} features cannot be active where there are only d_sae = {d_sae}.",
                fix=f"Lower k to at most {d_sae}, or raise d_sae; k is usually a hundredth of it.",
            )
    if operation.architecture == "matryoshka_batchtopk":
        default = sorted({max(1, d_sae // 16), max(1, d_sae // 4), d_sae})
        values["widths"] = default if operation.widths is None else operation.widths
    return parse_sae_config(values)


def _check_layer(hook_name: str, model: ModelRecord) -> None:
    point = parse_hook(hook_name)
    if not 0 <= point.layer < model.n_layers:
        raise UnknownHook(
            f"{hook_name!r} lies outside {model.ref}, which has layers 0 to {model.n_layers - 1}.",
            fix=f"Use a layer below {model.n_layers}; model_architecture lists every hook.",
        )


def hooks_of(members: list[Blueprint]) -> dict[str, int]:
    """All hooks that are read, with their widths."""
    widths: dict[str, int] = {}
    for member in members:
        for hook, width in zip(member.hooks, (member.cfg.d_in, member.cfg.output_width), strict=False):
            widths[hook] = width
    return widths


def stem(operation: TrainSAE, members: list[Blueprint]) -> str:
    """A name for the training."""
    point = parse_hook(operation.hook_name)
    if len(members) > 1:
        return slugify(f"{operation.model}-sweep-{len(members)}")
    cfg = members[0].cfg
    return slugify(f"{operation.model}-L{point.layer}-{cfg.architecture}-{cfg.d_sae}".replace("_", "-"))


def held_out(hp: Hyperparameters, n_contexts: int, context_size: int) -> int:
    """How many contexts, the last ones, are kept from training for evaluation."""
    wanted = math.ceil(hp.evaluated_tokens / context_size)
    return wanted if wanted * HELD_OUT_SHARE <= n_contexts else 0


def tokens_or_dataset(engine: Engine, operation: TrainSAE) -> TokensRecord | DatasetRecord:
    """The tokens to train on; a dataset that has none for this model yet is tokenised when the job runs."""
    try:
        tokens = tokens_of(engine, operation.dataset, None, operation.model)
    except NotFound:
        return engine.store.get(DatasetRecord, operation.dataset.removeprefix("dataset/"))
    if tokens.model != operation.model:
        raise BadInput(
            f"{tokens.ref} was made for model/{tokens.model}, not for model/{operation.model}.",
            fix="Give the dataset, or one of its tokenisations for this model.",
        )
    return tokens


def cache_folder(engine: Engine, tokens: TokensRecord, hooks: list[str], hp: Hyperparameters) -> Path:
    """Where the activations of some hooks on a tokenisation lie, for whoever trains on them next."""
    name = "+".join(sorted(hooks))
    if len(name) > MOST_CHARACTERS:
        name = f"{len(hooks)}-hooks-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return engine.home / "activations" / tokens.slug / f"{name}-{hp.cache_dtype}"


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
        then = [_shape(each["config"], each["hyperparameters"]) for each in record.members]
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
