"""What the engine keeps and answers: one class a kind of thing, as it travels over every door.

A record is plain data. It knows neither the table it lies in nor the files beside it; folders are relative to the data
directory, and a `ref` such as `sae/stories-l2` is what people and agents pass on.
"""

from __future__ import annotations

from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, computed_field

from mistudio_engine.api.docstrings import describe_fields
from mistudio_engine.api.errors import ErrorBody

__all__ = [
    "KINDS",
    "RECORDS",
    "TERMINAL_STATES",
    "DatasetRecord",
    "Evaluation",
    "ExperimentRecord",
    "ExportRecord",
    "ExtractionRecord",
    "Finding",
    "Job",
    "JobState",
    "LabelRecord",
    "ModelRecord",
    "Page",
    "Plan",
    "Record",
    "SAERecord",
    "TemplateRecord",
    "TokensRecord",
    "TrainingMember",
    "TrainingRecord",
]

R = TypeVar("R")


class Data(BaseModel):
    """Base of everything that travels: field docstrings become the schema's descriptions."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), defer_build=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        describe_fields(cls)


class Record(Data):
    """Something with a slug that is unique in its kind."""

    kind: ClassVar[str]

    slug: str
    """Name, unique in its kind; no `/` and no `#`."""

    created_at: float = 0.0
    """Seconds since 1970."""

    @computed_field
    @property
    def ref(self) -> str:
        """`kind/slug`, which names it everywhere."""
        return f"{self.kind}/{self.slug}"


class Page(Data, Generic[R]):
    """Some rows of many."""

    rows: list[R]
    total: int
    """How many there are in all."""

    shown: int
    next_cursor: str | None = None
    """Pass it as `cursor` for the rows that follow; None at the end."""


class Plan(Data):
    """What a long operation would cost, said before it starts."""

    summary: str
    """The plan in one sentence."""

    seconds: float | None = None
    """Estimated run time; None while nothing like it has been measured here."""

    memory_bytes: int = 0
    disk_bytes: int = 0
    details: dict[str, Any] = {}
    """The numbers behind it: steps, batches, checkpoints."""


class ModelRecord(Record):
    """A causal language model that the engine has on disk."""

    kind: ClassVar[str] = "model"

    source: str
    """Hub id or folder it was brought in from."""

    revision: str | None = None
    precision: str = "fp32"
    family: str = ""
    n_layers: int = 0
    d_model: int = 0
    d_vocab: int = 0
    n_ctx: int = 0
    n_params: int = 0
    n_bytes: int = 0
    """Memory of the weights in this precision."""

    folder: str = ""
    """Where its files lie; absolute when a local folder is used in place."""

    sha256: str = ""
    """Hash of the weight files."""


class TokensRecord(Record):
    """One tokenisation of a dataset for one model's tokenizer."""

    kind: ClassVar[str] = "tokens"

    dataset: str
    model: str
    context_size: int
    bos_policy: str
    """Where BOS stands: context, document, both, none."""

    n_tokens: int = 0
    n_contexts: int = 0
    n_documents: int = 0
    folder: str = ""
    sha256: str = ""


class DatasetRecord(Record):
    """Text that the engine knows."""

    kind: ClassVar[str] = "dataset"

    source: str
    """Hub id or path it was brought in from."""

    split: str | None = None
    config: str | None = None
    revision: str | None = None
    text_field: str | None = None
    n_documents: int = 0
    n_bytes: int = 0
    folder: str = ""
    sha256: str = ""
    tokens: list[str] = []
    """Slugs of its tokenisations."""


class Evaluation(Data):
    """How well an SAE stands for the activations it was trained on, on given tokens.

    x are the activations, x̂ the SAE's reconstructions. Every average is over tokens of text: BOS, EOS, other special
    tokens and padding are left out. Where one was not measured (by an older version) it is None.
    """

    n_tokens: int
    """Tokens that were measured."""

    tokens: str = ""
    """Slug of the tokenisation that was used."""

    l0: float
    """Mean number of active features per token."""

    l1: float | None = None
    """Mean over tokens of the sum of |activations|, in the model's unit."""

    fvu: float
    """Fraction of variance unexplained: 0 is perfect, 1 is no better than the mean."""

    explained_variance: float
    """1 − E‖x − x̂‖² / Var(x)."""

    explained_variance_legacy: float | None = None
    """Mean over tokens of 1 − sse / ‖x − batch mean‖², as older papers report it; it depends on the batch."""

    mse: float
    """E‖x − x̂‖², summed over dimensions, in the model's squared unit."""

    cosine: float
    """Mean over tokens of cos(x, x̂): 1 is the right direction."""

    l2_norm_in: float | None = None
    """E‖x‖."""

    l2_norm_out: float | None = None
    """E‖x̂‖."""

    l2_ratio: float
    """Mean over tokens of ‖x̂‖/‖x‖: 1 is the right length, less is shrinkage."""

    relative_reconstruction_bias: float | None = None
    """E‖x̂‖²/E⟨x, x̂⟩: 1 is unbiased, less is shrinkage."""

    ce_loss_clean: float
    """Next-token loss of the model itself, in nats."""

    ce_loss_sae: float
    """With x̂ in the place of x."""

    ce_loss_zero: float
    """With zeros in the place of x, at special tokens too."""

    ce_loss_score: float
    """(CE_zero − CE_sae) / (CE_zero − CE_clean): 1 is perfect, 0 is as bad as zeroing the hook."""

    kl_div_with_sae: float | None = None
    """KL(clean ‖ with x̂ in the place of x) of the next-token predictions, in nats: 0 is no change."""

    kl_div_with_ablation: float | None = None
    """KL(clean ‖ with zeros in the place of x)."""

    kl_div_score: float | None = None
    """(KL_zero − KL_sae) / KL_zero: 1 is perfect, 0 is as bad as zeroing the hook."""

    n_dead: int | None = None
    """Features that never fired on these tokens."""

    dead_fraction: float
    """Share of features that never fired on these tokens."""

    dense_fraction: float = 0.0
    """Share of features that fired on more than a tenth of them."""

    density_histogram: list[int] | None = None
    """How many features fire how often, in 32 bins: bin i has −8 + i/4 ≤ log10(share of tokens) < −8 + (i + 1)/4, the
    first also what is rarer, the last what always fires. The dead are in none of them."""

    mean_encoder_decoder_cosine: float | None = None
    """Mean over features of cos(encoder, decoder direction); None where the two live in spaces of different width."""


class SAERecord(Record):
    """A sparse autoencoder on disk."""

    kind: ClassVar[str] = "sae"

    source: Literal["trained", "huggingface", "gemma_scope", "upload"] = "trained"
    origin: str = ""
    """Hub id or folder it came from; empty when trained here."""

    model: str | None = None
    """Slug of the model, or the name in its config when that model is not here."""

    hook_name: str = ""
    layer: int | None = None
    architecture: str = ""
    d_in: int = 0
    d_sae: int = 0
    format: str = "saelens"
    """Of its folder: saelens, or native where SAELens lacks the architecture."""

    source_format: str | None = None
    """The format that it came in as; None where it was trained here."""

    training: str | None = None
    """Slug of the training that made it; None after unlinking."""

    tokens: str | None = None
    """Slug of the tokenisation it was trained on."""

    extraction: str | None = None
    """Slug of its current extraction."""

    evaluation: Evaluation | None = None
    n_labelled: int = 0
    folder: str = ""
    sha256: str = ""
    config: dict[str, Any] = {}


class TrainingMember(Data):
    """One of the SAEs that a training trains."""

    name: str
    """Of its variant; `sae` where there is one only."""

    sae: str
    """The slug that it has or will have."""

    config: dict[str, Any]
    hyperparameters: dict[str, Any]
    seed: int
    failure: ErrorBody | None = None
    """Why it goes on no further, where it does not."""


class TrainingRecord(Record):
    """A training: it has jobs and makes SAEs, and is neither."""

    kind: ClassVar[str] = "training"

    model: str
    tokens: str
    hook_name: str
    architecture: str
    status: str = "pending"
    """The documents' word for its job's state: pending, running, paused, completed, failed, cancelled."""

    progress: float = 0.0
    """0 to 100."""

    jobs: list[str] = []
    saes: list[str] = []
    """Those that it made, in the order of their making."""

    members: list[TrainingMember] = []
    """The SAEs that it trains."""

    config: dict[str, Any] = {}
    """The first SAE's configuration."""

    hyperparameters: dict[str, Any] = {}
    """The first SAE's settings; those of length are the same for all."""

    tokens_per_second: float | None = None
    """How fast it was, on average over its last run."""

    metrics: dict[str, float] = {}
    """The latest of each."""

    provenance: dict[str, Any] = {}
    """Versions, hashes and seed."""


class ExtractionRecord(Record):
    """One pass over tokens for all features of an SAE."""

    kind: ClassVar[str] = "extraction"

    sae: str
    model: str
    tokens: str
    hook_name: str
    n_tokens: int = 0
    n_features: int = 0
    n_alive: int = 0
    n_dense: int = 0
    """Features that fire on more than a tenth of the tokens."""

    l0: dict[str, float] = {}
    """Features active on a token: mean, p5, p50, p95, max, and `silent`, the share of tokens on which none is."""

    tokens_per_second: float | None = None
    """How fast the pass was."""

    job: str | None = None
    """The job that made it."""

    settings: dict[str, Any] = {}
    folder: str = ""
    sha256: str = ""
    """Of the pass and the logit lens; what is derived later does not change it."""


class LabelRecord(Data):
    """One version of a feature's label; the newest counts."""

    sae: str
    index: int
    version: int = 1
    label: str
    category: str = ""
    """A path such as `Emotion > Positive > Love`."""

    author: str
    """`person`, `agent:<name>`, `job:<slug>`, or `neuronpedia:<author>` where it was published."""

    method: str = ""
    """How a job found it: token_pattern, …"""

    confidence: float | None = None
    """Balanced accuracy on held-out examples, 0.5 is chance."""

    evidence: str = ""
    extraction: str | None = None
    """The extraction whose examples it was made from, or that was current when it was written."""

    scores: dict[str, Any] = {}
    """How well it foretells where the feature fires, by method: detection, fuzzing, or `published` by others."""

    created_at: float = 0.0


class Finding(Data):
    """Something that was found out about a feature, as it was then; later ones do not replace it."""

    sae: str
    index: int
    kind: Literal["attempt", "ablation", "test"]
    """attempt: what a labeller asked and was answered."""

    author: str = "person"
    """`person`, `agent:<name>` or `job:<slug>`."""

    created_at: float = 0.0
    body: dict[str, Any] = {}


class ExperimentRecord(Record):
    """A steering run that was kept."""

    kind: ClassVar[str] = "experiment"

    model: str
    operation: dict[str, Any] = {}
    result: dict[str, Any] = {}


class ExportRecord(Record):
    """A file made for others."""

    kind: ClassVar[str] = "export"

    sae: str
    format: str = "zip"
    status: str = "pending"
    """The documents' words: pending, computing, packaging, completed, failed, cancelled."""

    progress: float = 0.0
    """0 to 100."""

    current_stage: str = ""
    feature_count: int = 0
    output_path: str | None = None
    file_size_bytes: int | None = None
    sha256: str | None = None
    error_message: str | None = None
    job: str | None = None
    config: dict[str, Any] = {}
    completed_at: float | None = None


class TemplateRecord(Record):
    """Some arguments of an operation, kept to be used again."""

    kind: ClassVar[str] = "template"

    operation: str
    """Name of the operation, such as `train_sae`."""

    arguments: dict[str, Any] = {}
    """Those that it gives; a call gives the others, and its own count where both do."""

    description: str = ""
    favourite: bool = False
    default: bool = False
    """It counts for its operation where a call names none; one for each operation at most."""

    n_used: int = 0
    """How many jobs were started with it."""

    last_used_at: float | None = None
    updated_at: float = 0.0
    """Seconds since 1970 when somebody last changed it."""

    version: int = 1
    """Of the form in which templates are written."""


class JobState:
    """The states of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    INTERRUPTED = "interrupted"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL_STATES = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED})


class Job(Record):
    """A long operation: what was asked, how far it is, what came of it."""

    kind: ClassVar[str] = "job"

    operation: str
    """Name of the operation, such as `train_sae`."""

    arguments: dict[str, Any] = {}
    """Its fields: a retry is the same call again."""

    state: Literal["queued", "running", "pausing", "paused", "interrupted", "completed", "failed", "cancelled"] = (
        "queued"
    )
    lane: str = "compute"
    """Which worker runs it: compute or io."""

    priority: int = 0
    """Higher first; then first in, first out."""

    subject: str | None = None
    """Ref of what it works on or makes."""

    author: str = "person"
    idempotency_key: str | None = None
    attempt: int = 1
    progress: float | None = None
    """Share done, 0 to 1."""

    stage: str = ""
    rate: float | None = None
    unit: str = ""
    eta_seconds: float | None = None
    metrics: dict[str, float] = {}
    """The latest of each."""

    resumes: Literal["checkpoint", "start", "never"] = "start"
    """What a restart of the engine does with it: goes on from its last checkpoint, begins again, or leaves it."""

    checkpoint: str | None = None
    """Where its last good state lies."""

    plan: Plan | None = None
    settled: dict[str, Any] = {}
    """What its arguments leave open, as it was settled when it was submitted: which extraction, which language model,
    at what price. Empty where nothing is, and after a retry until it begins."""

    result: dict[str, Any] | None = None
    error: ErrorBody | None = None
    started_at: float | None = None
    finished_at: float | None = None

    @property
    def finished(self) -> bool:
        """True once nothing more will happen to it."""
        return self.state in TERMINAL_STATES

    message: str = Field(default="")
    """What a person should know: why it was interrupted, what a retry would do."""


RECORDS: dict[str, type[Record]] = {
    cls.kind: cls
    for cls in (
        ModelRecord,
        DatasetRecord,
        TokensRecord,
        TrainingRecord,
        SAERecord,
        ExtractionRecord,
        ExperimentRecord,
        ExportRecord,
        TemplateRecord,
        Job,
    )
}
"""Every kind that has slugs, by its name."""

KINDS = tuple(RECORDS)
