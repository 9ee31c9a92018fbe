"""Operations that train SAEs and look at trainings."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from mistudio_engine.api.operations.base import JobOperation, Operation
from mistudio_engine.api.operations.datasets import Deleted, Limit
from mistudio_engine.api.presets import Preset, preset_settings
from mistudio_engine.api.records import Data, Job, Page, SAERecord, TrainingRecord
from mistudio_engine.api.refs import ModelRef, Slug, TemplateRef, slug_of
from mistudio_engine.api.sae_config import activation_of
from mistudio_engine.api.training_config import STEP_NAMES, Hyperparameters

__all__ = [
    "Checkpoint",
    "CheckpointPage",
    "DeleteTraining",
    "DeleteTrainings",
    "DeletedTrainings",
    "ExtendTraining",
    "KeepCheckpoint",
    "ListTrainings",
    "MetricRow",
    "MetricsPage",
    "RetryTraining",
    "ShowTraining",
    "StopTraining",
    "TrainSAE",
    "TrainingCheckpoints",
    "TrainingMetrics",
    "Variant",
]

TrainingSlug = Annotated[str, AfterValidator(lambda text: slug_of("training", text))]

_FLAT = {
    alias
    for name, field in Hyperparameters.model_fields.items()
    for alias in (name, *(getattr(field.validation_alias, "choices", None) or ()))
} | set(STEP_NAMES)
"""Hyperparameters that may stand beside the other arguments, as the documents and most people write them."""


def preset_of(data: dict[str, Any]) -> dict[str, Any]:
    """The settings of the preset that arguments name, `k` among them; none where they name none, or none that there
    is."""
    preset, architecture = data.get("preset"), data.get("architecture") or "topk"
    try:
        return preset_settings(activation_of(architecture), preset)
    except KeyError:
        return {}  # a wrong word; the field says so


def _under(settings: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters among a preset's settings; puts its k into `data` where that has none."""
    k = settings.pop("k", None)
    if k is not None and data.get("k", data.get("top_k_sparsity")) is None:
        data["k"] = k
    return settings


class MetricRow(Data):
    """The numbers of one moment of a training."""

    seq: int
    at: float
    values: dict[str, float]


class DeletedTrainings(Data):
    """What became of each."""

    deleted: list[Deleted]
    refused: dict[str, str] = {}
    """Those that are still there, and why."""

    freed_bytes: int = 0


class MetricsPage(Page[MetricRow]):
    """A training's history without gaps, oldest first."""


class Checkpoint(Data):
    """A state that a training can go on from."""

    name: str
    step: int
    n_bytes: int
    created_at: float
    score: float | None = None
    """Mean loss since the checkpoint before, for each dimension and without AuxK; None where the penalty was still
    rising. The lowest is the best."""

    is_best: bool = False
    members: list[str] = []


class CheckpointPage(Page[Checkpoint]):
    """Checkpoints, newest first."""


Architecture = Literal[
    "topk",
    "batchtopk",
    "matryoshka_batchtopk",
    "jumprelu",
    "standard",
    "gated",
    "transcoder",
    "skip_transcoder",
    "topk_transcoder",
    "topk_skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
]

_OF_THE_RUN = ("n_tokens", "batch_size", "buffer_tokens", "exclude_special", "log_interval", "checkpoint_interval")
_OF_THE_RUN += ("keep_checkpoints", "eval_tokens", "activations", "cache_dtype")
"""Hyperparameters that all SAEs of one training share: they see the same batches at the same time."""


COMMON = "training"
"""What the part of a checkpoint that all SAEs share is called (training/checkpoints.py)."""


class Shape(BaseModel):
    """What is said of one SAE, in a training or in one variant of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hook_name: str | None = None
    """Where to read, such as blocks.2.hook_resid_post."""

    hook_name_out: str | None = None
    """Where a transcoder's output belongs, such as blocks.2.hook_mlp_out beside blocks.2.ln2.hook_normalized."""

    architecture: Architecture | None = None
    d_sae: Annotated[int | None, Field(gt=0, le=4_194_304, validation_alias=AliasChoices("d_sae", "latent_dim"))] = None
    """Number of features; by default 8 times the hook's width."""

    expansion: Annotated[float | None, Field(gt=0, le=1024)] = None
    """Features as a multiple of the hook's width, instead of d_sae."""

    k: Annotated[int | None, Field(gt=0, validation_alias=AliasChoices("k", "top_k_sparsity"))] = None
    """Active features per token (topk, batchtopk); by default 32."""

    widths: tuple[Annotated[int, Field(gt=0)], ...] | None = None
    """Numbers of features of a matryoshka SAE's nested dictionaries; by default d_sae/16, d_sae/4 and d_sae."""

    normalize_activations: Literal["none", "layer_norm", "constant_norm_rescale"] | None = None
    """A norm of each token when the SAE runs; inputs are scaled to mean norm √d in any case."""

    preset: Preset | None = None
    """About 16 (sparse), 32 (balanced) or 64 (faithful) active features a token, whatever the architecture."""

    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.d_sae is not None and self.expansion is not None:
            raise ValueError("d_sae and expansion say the same thing; give one of them")
        if self.architecture is not None:
            self._check_words(activation_of(self.architecture), "transcoder" in self.architecture)
        return self

    def _check_words(self, activation: str, transcodes: bool) -> None:
        if self.k is not None and activation not in ("topk", "batchtopk"):
            raise ValueError(f"k belongs to topk and batchtopk, not to {self.architecture}; leave it out")
        if self.widths is not None and self.architecture != "matryoshka_batchtopk":
            raise ValueError(f"widths belong to matryoshka_batchtopk, not to {self.architecture}; leave them out")
        if self.hook_name_out is not None and not transcodes:
            raise ValueError(
                f"hook_name_out belongs to transcoders: a {self.architecture} SAE reconstructs what it reads. "
                "Leave it out, or choose an architecture such as topk_transcoder"
            )


class Variant(Shape):
    """One SAE of several that are trained together; what it does not say is as in the call."""

    name: Slug | None = None
    """Added to the training's name; by default its number."""

    hyperparameters: dict[str, Any] = {}
    """Those that differ, such as l1_coefficient or lr; not those of the whole run, such as n_tokens or batch_size."""

    @field_validator("name")
    @classmethod
    def _is_free(cls, name: str | None) -> str | None:
        if name == COMMON:
            raise ValueError(f"{name!r} is what all SAEs of a training have in common; give the variant another name")
        return name

    @field_validator("hyperparameters")
    @classmethod
    def _of_this_sae(cls, given: dict[str, Any]) -> dict[str, Any]:
        shared = sorted(set(_OF_THE_RUN) & given.keys() | set(STEP_NAMES) & given.keys() - {"resample_steps"})
        if shared:
            raise ValueError(f"{', '.join(shared)} are the same for all SAEs of a training; give them in the call")
        try:
            Hyperparameters(**given)
        except ValidationError as error:
            if any(finding["loc"] for finding in error.errors()):
                raise
            # What does not go together may do so with what the call says; that is seen when they are put together.
        return given


class TrainSAE(JobOperation[SAERecord], route="POST /trainings"):
    """Train sparse autoencoders on a model's activations: one, or several at once on one pass of the model.

    With dry_run the plan: steps, time, memory, disk. Follow it with job(id); evaluate it with eval_sae, then extract.
    Hyperparameters such as lr, batch_size or l1_coefficient may be given beside the other arguments.
    """

    model: ModelRef
    dataset: Annotated[str, Field(min_length=1)]
    """Dataset or tokenisation; a dataset is tokenised for the model first where that has not been done."""

    hook_name: str
    """Where to read, such as blocks.2.hook_resid_post."""

    hook_name_out: str | None = None
    """Where a transcoder's output belongs, such as blocks.2.hook_mlp_out beside blocks.2.ln2.hook_normalized."""

    architecture: Architecture = "topk"
    d_sae: Annotated[int | None, Field(gt=0, le=4_194_304, validation_alias=AliasChoices("d_sae", "latent_dim"))] = None
    """Number of features; by default 8 times the hook's width."""

    expansion: Annotated[float | None, Field(gt=0, le=1024)] = None
    """Features as a multiple of the hook's width, instead of d_sae."""

    k: Annotated[int | None, Field(gt=0, validation_alias=AliasChoices("k", "top_k_sparsity"))] = None
    """Active features per token (topk, batchtopk); by default 32."""

    widths: tuple[Annotated[int, Field(gt=0)], ...] | None = None
    """Numbers of features of a matryoshka SAE's nested dictionaries; by default d_sae/16, d_sae/4 and d_sae."""

    normalize_activations: Literal["none", "layer_norm", "constant_norm_rescale"] = "none"
    """A norm of each token when the SAE runs; inputs are scaled to mean norm √d in any case."""

    preset: Preset | None = None
    """About 16 (sparse), 32 (balanced) or 64 (faithful) active features a token, whatever the architecture."""

    template: TemplateRef | None = None
    """A saved template whose arguments are taken where none are given here."""

    d_in: Annotated[int | None, Field(gt=0, validation_alias=AliasChoices("d_in", "hidden_dim"))] = None
    """Only checked: it is the hook's width."""

    variants: Annotated[tuple[Variant, ...], Field(max_length=64)] = ()
    """Several SAEs in one job, each with what it differs in: hook_name, architecture, d_sae, k, hyperparameters, …"""

    name: Slug | None = None
    """Slug of the training and of its SAE."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    hyperparameters: Hyperparameters = Hyperparameters()

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        """Move flat hyperparameters into their place, and lay them over the preset's."""
        if not isinstance(data, dict):
            return data
        flat = {name: value for name, value in data.items() if name in _FLAT}
        given = data.get("hyperparameters") or {}
        nested = given.model_dump(exclude_unset=True) if isinstance(given, Hyperparameters) else dict(given)
        twice = sorted(flat.keys() & nested.keys())
        if twice:
            raise ValueError(f"{', '.join(twice)} stands both beside hyperparameters and inside; give it once")
        rest = {name: value for name, value in data.items() if name not in flat}
        settings = _under(preset_of(rest), rest)
        return {**rest, "hyperparameters": settings | nested | flat} if settings or flat or nested else rest

    @model_validator(mode="after")
    def _fits_together(self) -> TrainSAE:
        given = self.model_dump(include=set(Shape.model_fields), exclude_none=True)
        Shape(**given)
        names = [variant.name for variant in self.variants if variant.name]
        if len(set(names)) < len(names):
            raise ValueError("two variants have the same name; give each its own")
        return self


class ExtendTraining(JobOperation[SAERecord], route="POST /trainings/{training}/extend"):
    """Go on with a training that ended, for more tokens: from its last checkpoint, with what it has learnt.

    The learning rate rises again at once and falls at the new end. The SAEs of before stay beside the new ones.
    """

    training: TrainingSlug
    n_tokens: Annotated[int, Field(gt=0)]
    """How many more."""


class KeepCheckpoint(Operation[SAERecord], route="POST /trainings/{training}/checkpoints/{checkpoint}/keep"):
    """Make an SAE of a checkpoint, the best one for example, as if training had ended there."""

    training: TrainingSlug
    checkpoint: Annotated[str, Field(pattern=r"^(step-\d{9}|best|last)$")] = "best"
    """Its name, as training_checkpoints has it, or best or last."""

    member: str | None = None
    """Which SAE, where the training has several: the name of its variant."""

    name: Slug | None = None
    """Slug of the SAE; by default made from the training and the step."""


class DeleteTrainings(Operation[DeletedTrainings], route="POST /trainings/delete", effect="destroy"):
    """Delete several trainings with their checkpoints; the SAEs they made stay. All that can be are deleted."""

    trainings: Annotated[list[TrainingSlug], Field(min_length=1, max_length=1000)]


class ListTrainings(Operation[Page[TrainingRecord]], route="GET /trainings"):
    """List trainings, newest first."""

    query: str | None = None
    status: str | None = None
    model: ModelRef | None = None
    limit: Limit = 50
    cursor: str | None = None


class ShowTraining(Operation[TrainingRecord], route="GET /trainings/{training}"):
    """One training's record."""

    training: TrainingSlug


class DeleteTraining(Operation[Deleted], route="DELETE /trainings/{training}"):
    """Delete a training with its checkpoints. The SAEs it made stay and are unlinked."""

    training: TrainingSlug


class TrainingMetrics(Operation[MetricsPage], route="GET /trainings/{training}/metrics"):
    """A training's metrics: loss, l0, fvu, dead fraction and the others, for each recorded step."""

    training: TrainingSlug
    after: Annotated[int, Field(ge=0)] = 0
    """Only rows after this sequence number."""

    limit: Annotated[int, Field(ge=1, le=10_000)] = 1000


class TrainingCheckpoints(Operation[CheckpointPage], route="GET /trainings/{training}/checkpoints"):
    """The checkpoints that a training has on disk."""

    training: TrainingSlug


class StopTraining(Operation[Job], route="POST /trainings/{training}/stop", idempotent=True):
    """Finish a training early and keep the SAE as it is."""

    training: TrainingSlug


class RetryTraining(Operation[Job], route="POST /trainings/{training}/retry"):
    """Run a failed or cancelled training again with the same configuration."""

    training: TrainingSlug
