"""Operations that train SAEs and look at trainings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, Field, model_validator

from mistudio_engine.api.operations.base import JobOperation, Operation
from mistudio_engine.api.operations.datasets import Deleted, Limit
from mistudio_engine.api.records import Data, Job, Page, SAERecord, TrainingRecord
from mistudio_engine.api.refs import ModelRef, Slug, slug_of
from mistudio_engine.api.training_config import STEP_NAMES, Hyperparameters

__all__ = [
    "Checkpoint",
    "CheckpointPage",
    "DeleteTraining",
    "ListTrainings",
    "MetricRow",
    "MetricsPage",
    "RetryTraining",
    "ShowTraining",
    "StopTraining",
    "TrainSAE",
    "TrainingCheckpoints",
    "TrainingMetrics",
]

TrainingSlug = Annotated[str, AfterValidator(lambda text: slug_of("training", text))]

_FLAT = {
    alias
    for name, field in Hyperparameters.model_fields.items()
    for alias in (name, *(getattr(field.validation_alias, "choices", None) or ()))
} | set(STEP_NAMES)
"""Hyperparameters that may stand beside the other arguments, as the documents and most people write them."""


class MetricRow(Data):
    """The numbers of one moment of a training."""

    seq: int
    at: float
    values: dict[str, float]


class MetricsPage(Page[MetricRow]):
    """A training's history without gaps, oldest first."""


class Checkpoint(Data):
    """A state that a training can go on from."""

    name: str
    step: int
    n_bytes: int
    created_at: float


class CheckpointPage(Page[Checkpoint]):
    """Checkpoints, newest first."""


class TrainSAE(JobOperation[SAERecord], route="POST /trainings"):
    """Train a sparse autoencoder on a model's activations at one hook.

    With dry_run the plan: steps, memory, disk. Follow it with job(id); evaluate it with eval_sae, then extract.
    Hyperparameters such as lr, batch_size or l1_coefficient may be given beside the other arguments.
    """

    model: ModelRef
    dataset: Annotated[str, Field(min_length=1)]
    """Dataset or tokenisation; a dataset is tokenised for the model first where that has not been done."""

    hook_name: str
    """Where to read, such as blocks.2.hook_resid_post."""

    architecture: Literal["topk", "standard", "jumprelu"] = "topk"
    d_sae: Annotated[int | None, Field(gt=0, le=4_194_304, validation_alias=AliasChoices("d_sae", "latent_dim"))] = None
    """Number of features; by default 8 times the hook's width."""

    expansion: Annotated[float, Field(gt=0, le=1024)] | None = None
    """Features as a multiple of the hook's width, instead of d_sae."""

    k: Annotated[int | None, Field(gt=0, validation_alias=AliasChoices("k", "top_k_sparsity"))] = None
    """Active features per token (topk); by default 32."""

    normalize_activations: Literal["none", "layer_norm", "constant_norm_rescale"] = "none"
    """A norm of each token when the SAE runs; inputs are scaled to mean norm √d in any case."""

    d_in: Annotated[int | None, Field(gt=0, validation_alias=AliasChoices("d_in", "hidden_dim"))] = None
    """Only checked: it is the hook's width."""

    name: Slug | None = None
    """Slug of the training and of its SAE."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    hyperparameters: Hyperparameters = Hyperparameters()

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        """Move flat hyperparameters into their place."""
        if not isinstance(data, dict) or not _FLAT & data.keys():
            return data
        flat = {name: value for name, value in data.items() if name in _FLAT}
        given = data.get("hyperparameters") or {}
        nested = given.model_dump(exclude_unset=True) if isinstance(given, Hyperparameters) else dict(given)
        twice = sorted(flat.keys() & nested.keys())
        if twice:
            raise ValueError(f"{', '.join(twice)} stands both beside hyperparameters and inside; give it once")
        rest = {name: value for name, value in data.items() if name not in flat}
        return {**rest, "hyperparameters": nested | flat}

    @model_validator(mode="after")
    def _fits_together(self) -> TrainSAE:
        if self.d_sae is not None and self.expansion is not None:
            raise ValueError("d_sae and expansion say the same thing; give one of them")
        if self.k is not None and self.architecture != "topk":
            raise ValueError(f"k belongs to topk, not to {self.architecture}; leave it out or choose topk")
        return self


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
