"""What a call of train_sae stands for: the SAEs with their configs and settings.

It reads records and loads nothing. What they cost is in training_cost.py; training_run.py trains what is planned here.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from mistudio_engine.api.errors import BadInput, EmptyData, NotFound, UnknownHook, WrongShape
from mistudio_engine.api.operations.training import TrainSAE, Variant, preset_of
from mistudio_engine.api.presets import L1_PER_ROOT_WIDTH, default_l1_coefficient
from mistudio_engine.api.records import DatasetRecord, ModelRecord, TokensRecord, TrainingRecord
from mistudio_engine.api.sae_config import SAEConfig, activation_of, explain, parse_sae_config
from mistudio_engine.api.training_config import (
    Hyperparameters,
    belongs_to,
    check_training,
)
from mistudio_engine.handlers.resources import tokens_of
from mistudio_engine.models.hooks import parse_hook
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.files import slugify

__all__ = [
    "Blueprint",
    "blueprints",
    "blueprints_of",
    "cache_folder",
    "held_out",
    "hooks_of",
    "promised_saes",
    "stem",
    "tokens_or_dataset",
]

DEFAULT_EXPANSION = 8
DEFAULT_K = 32

CHECKPOINTS_PER_RUN = 10
"""How many a run writes when nothing else is said: a kill then costs a tenth of it at most."""

HELD_OUT_SHARE = 20
"""Text is held out for evaluation where it is at most one in so many of all contexts."""

MOST_CHARACTERS = 200
"""A longer list of hooks is no name of a folder."""


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
    if hp.l1_coefficient is None and cfg.activation in L1_PER_ROOT_WIDTH:
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


def blueprints_of(record: TrainingRecord, n_tokens: int | None = None) -> list[Blueprint]:
    """What a training's record says it trains."""
    members = []
    for each in record.members:
        values = each.hyperparameters | ({} if n_tokens is None else {"n_tokens": n_tokens})
        members.append(
            Blueprint(each.name, parse_sae_config(each.config), Hyperparameters.model_validate(values), each.seed)
        )
    return members


def promised_saes(engine: Engine) -> dict[str, str]:
    """Names of the SAEs that trainings make, whether or not they are there yet, and which training it is."""
    return {each.sae: record.ref for record in engine.store.all(TrainingRecord) for each in record.members}
