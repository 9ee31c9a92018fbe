# Made by `python -m mistudio_engine.api.generate`: do not edit.
from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, overload

import httpx

from mistudio_engine.api import wire
from mistudio_engine.api.events import Event
from mistudio_engine.api.exports import Download
from mistudio_engine.api.features import FeatureCard, FeaturePage, LabellingReport, TextFeatures
from mistudio_engine.api.home import EngineFile
from mistudio_engine.api.operations import JobOperation, Operation
from mistudio_engine.api.operations.datasets import Deleted, SamplePage, TokenStatistics
from mistudio_engine.api.operations.jobs import EventPage
from mistudio_engine.api.operations.models import Architecture, Unloaded
from mistudio_engine.api.operations.saes import Config
from mistudio_engine.api.operations.system import Description, Found, Metrics, MetricsHistory, SystemStatus
from mistudio_engine.api.operations.training import CheckpointPage, MetricsPage
from mistudio_engine.api.records import (
    DatasetRecord,
    Evaluation,
    ExportRecord,
    ExtractionRecord,
    Job,
    LabelRecord,
    ModelRecord,
    Page,
    SAERecord,
    TokensRecord,
    TrainingRecord,
)
from mistudio_engine.api.steering import Generated, Intervention, SteerResult, SweepResult
from mistudio_engine.api.training_config import Hyperparameters

R = TypeVar("R")
Outcome = TypeVar("Outcome")
WAIT_SLICE_SECONDS = 20.0

class AsyncStudio:
    def __init__(self, home: Path | str | None = None, *, autostart: bool = True, caller: str = "person") -> None: ...
    async def __aenter__(self) -> AsyncStudio: ...
    async def __aexit__(self, *_: object) -> None: ...
    async def close(self) -> None: ...
    async def engine(self, *, renew: bool = False) -> EngineFile: ...
    async def call(self, operation: Operation[R]) -> R: ...
    async def _send(self, request: wire.Request, *, repeatable: bool) -> httpx.Response: ...
    async def _request(self, engine: EngineFile, request: wire.Request) -> httpx.Response: ...
    async def _save(self, operation: Operation[Any], response: httpx.Response) -> Download: ...
    def follow(self, channels: Iterable[str] = ("*",), after: int | None = None) -> AsyncIterator[Event]: ...
    async def wait(
        self, job: Job | str, timeout: float | None = None, on_progress: Callable[[Job], None] | None = None
    ) -> Any: ...
    async def control(self, job: Job | str, action: str) -> Job: ...
    home: Path
    caller: str
    autostart: bool
    async def get_dataset(
        self,
        *,
        dry_run: bool = ...,
        idempotency_key: str | None = ...,
        wait_s: float = ...,
        source: str,
        name: str | None = ...,
        text_field: str | None = ...,
        config: str | None = ...,
        split: str = ...,
        revision: str | None = ...,
        model: str | None = ...,
        context_size: int = ...,
        bos_policy: Literal["context", "document", "both", "none"] = ...,
        n_tokens: int | None = ...,
    ) -> Job: ...
    async def list_datasets(
        self, *, query: str | None = ..., limit: int = ..., cursor: str | None = ...
    ) -> Page[DatasetRecord]: ...
    async def show_dataset(self, *, dataset: str) -> DatasetRecord: ...
    async def delete_dataset(self, *, dataset: str) -> Deleted: ...
    async def download_dataset(
        self, *, dry_run: bool = ..., idempotency_key: str | None = ..., wait_s: float = ..., dataset: str
    ) -> Job: ...
    async def tokenize_dataset(
        self,
        *,
        dry_run: bool = ...,
        idempotency_key: str | None = ...,
        wait_s: float = ...,
        dataset: str,
        model: str,
        context_size: int = ...,
        bos_policy: Literal["context", "document", "both", "none"] = ...,
        n_tokens: int | None = ...,
    ) -> Job: ...
    async def dataset_statistics(self, *, dataset: str, tokens: str | None = ...) -> TokenStatistics: ...
    async def dataset_samples(self, *, dataset: str, offset: int = ..., limit: int = ...) -> SamplePage: ...
    async def export(
        self,
        *,
        dry_run: bool = ...,
        idempotency_key: str | None = ...,
        wait_s: float = ...,
        sae: str,
        feature_selection: Literal["all", "extracted", "custom"] = ...,
        range_start: int | None = ...,
        range_end: int | None = ...,
        indices: list[int] | None = ...,
        include_logit_lens: bool = ...,
        include_histograms: bool = ...,
        include_top_tokens: bool = ...,
        include_explanations: bool = ...,
        include_saelens_weights: bool = ...,
        logit_lens_k: int = ...,
        histogram_bins: int = ...,
        top_tokens_k: int = ...,
    ) -> Job: ...
    async def show_export(self, *, export: str) -> ExportRecord: ...
    async def download_export(self, *, export: str) -> Download: ...
    async def cancel_export(self, *, export: str) -> Job: ...
    async def list_exports(
        self,
        *,
        sae: str | None = ...,
        status: Literal["pending", "computing", "packaging", "completed", "failed", "cancelled"] | None = ...,
        limit: int = ...,
        cursor: str | None = ...,
    ) -> Page[ExportRecord]: ...
    async def extract(
        self,
        *,
        dry_run: bool = ...,
        idempotency_key: str | None = ...,
        wait_s: float = ...,
        sae: str,
        dataset: str | None = ...,
        n_tokens: int | None = ...,
        n_examples: int = ...,
        window: int = ...,
        seed: int = ...,
    ) -> Job: ...
    async def list_extractions(
        self, *, sae: str | None = ..., limit: int = ..., cursor: str | None = ...
    ) -> Page[ExtractionRecord]: ...
    async def show_extraction(self, *, extraction: str) -> ExtractionRecord: ...
    async def label_features(
        self,
        *,
        dry_run: bool = ...,
        idempotency_key: str | None = ...,
        wait_s: float = ...,
        sae: str,
        features: list[int] | None = ...,
        provider: Literal["token_pattern"] = ...,
    ) -> Job: ...
    async def search_features(
        self,
        *,
        query: str | None = ...,
        sae: str | None = ...,
        mode: Literal["auto", "meaning", "text", "token"] = ...,
        category: str | None = ...,
        include_dense: bool = ...,
        limit: int = ...,
        cursor: str | None = ...,
    ) -> FeaturePage: ...
    async def get_feature(
        self,
        *,
        sae: str,
        index: int,
        n: int = ...,
        sampling: Literal["top", "quantile", "random", "zero", "all"] = ...,
        bins: int = ...,
    ) -> FeatureCard: ...
    async def set_label(self, *, feature: str, label: str, category: str = ..., evidence: str = ...) -> LabelRecord: ...
    async def label_history(self, *, sae: str, index: int) -> Page[LabelRecord]: ...
    async def features_on_text(
        self, *, sae: str, text: str, contrast_text: str | None = ..., k: int = ..., include_dense: bool = ...
    ) -> TextFeatures: ...
    async def list_jobs(
        self,
        *,
        state: Literal["queued", "running", "pausing", "paused", "interrupted", "completed", "failed", "cancelled"]
        | None = ...,
        operation: str | None = ...,
        limit: int = ...,
        cursor: str | None = ...,
    ) -> Page[Job]: ...
    async def show_job(self, *, job: str, wait_s: float = ...) -> Job: ...
    async def control_job(self, *, job: str, action: Literal["cancel", "pause", "resume", "stop", "retry"]) -> Job: ...
    async def list_events(self, *, after: int = ..., channels: str | None = ..., limit: int = ...) -> EventPage: ...
    async def get_model(
        self,
        *,
        dry_run: bool = ...,
        idempotency_key: str | None = ...,
        wait_s: float = ...,
        source: str,
        name: str | None = ...,
        revision: str | None = ...,
        precision: Literal["fp32", "bf16", "fp16", "int8", "nf4"] = ...,
    ) -> Job: ...
    async def list_models(
        self, *, query: str | None = ..., limit: int = ..., cursor: str | None = ...
    ) -> Page[ModelRecord]: ...
    async def show_model(self, *, model: str) -> ModelRecord: ...
    async def delete_model(self, *, model: str) -> Deleted: ...
    async def download_model(
        self, *, dry_run: bool = ..., idempotency_key: str | None = ..., wait_s: float = ..., model: str
    ) -> Job: ...
    async def model_architecture(self, *, model: str) -> Architecture: ...
    async def unload_model(self, *, model: str) -> Unloaded: ...
    async def get_sae(
        self,
        *,
        dry_run: bool = ...,
        idempotency_key: str | None = ...,
        wait_s: float = ...,
        source: str,
        path: str = ...,
        name: str | None = ...,
        revision: str | None = ...,
        model: str | None = ...,
        hook_name: str | None = ...,
    ) -> Job: ...
    async def list_saes(
        self,
        *,
        query: str | None = ...,
        source: Literal["trained", "huggingface", "gemma_scope", "upload"] | None = ...,
        model: str | None = ...,
        layer: int | None = ...,
        architecture: str | None = ...,
        limit: int = ...,
        cursor: str | None = ...,
    ) -> Page[SAERecord]: ...
    async def show_sae(self, *, sae: str) -> SAERecord: ...
    async def show_saeconfig(self, *, sae: str) -> Config: ...
    async def delete_sae(self, *, sae: str) -> Deleted: ...
    async def convert_sae(
        self, *, sae: str, format: Literal["saelens", "mistudio"], name: str | None = ...
    ) -> SAERecord: ...
    async def eval_sae(
        self,
        *,
        dry_run: bool = ...,
        idempotency_key: str | None = ...,
        wait_s: float = ...,
        sae: str,
        dataset: str | None = ...,
        n_tokens: int = ...,
    ) -> Job: ...
    async def generate(
        self,
        *,
        dry_run: bool = ...,
        idempotency_key: str | None = ...,
        wait_s: float = ...,
        model: str,
        prompt: str,
        interventions: list[Intervention] = ...,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        top_k: int = ...,
        repetition_penalty: float = ...,
        stop: list[str] = ...,
        seed: int = ...,
        n: int = ...,
    ) -> Job: ...
    async def steer(
        self,
        *,
        dry_run: bool = ...,
        idempotency_key: str | None = ...,
        wait_s: float = ...,
        interventions: list[Intervention],
        prompt: str,
        model: str | None = ...,
        concept_tokens: list[str] = ...,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        top_k: int = ...,
        repetition_penalty: float = ...,
        stop: list[str] = ...,
        seed: int = ...,
        n: int = ...,
    ) -> Job: ...
    async def sweep(
        self,
        *,
        dry_run: bool = ...,
        idempotency_key: str | None = ...,
        wait_s: float = ...,
        feature: str,
        strengths: list[float],
        prompt: str,
        model: str | None = ...,
        concept_tokens: list[str] = ...,
        max_new_tokens: int = ...,
        temperature: float = ...,
        seed: int = ...,
    ) -> Job: ...
    async def status(self) -> SystemStatus: ...
    async def show_system_metrics(self) -> Metrics: ...
    async def show_system_history(self, *, seconds: float = ..., limit: int = ...) -> MetricsHistory: ...
    async def find(
        self,
        *,
        kind: Literal["model", "dataset", "tokens", "training", "sae", "extraction", "experiment", "export", "job"],
        query: str | None = ...,
        limit: int = ...,
        cursor: str | None = ...,
    ) -> Page[Found]: ...
    async def describe(
        self,
        *,
        kind: Literal["model", "dataset", "tokens", "training", "sae", "extraction", "experiment", "export", "job"],
        slug: str,
    ) -> Description: ...
    async def train_sae(
        self,
        *,
        dry_run: bool = ...,
        idempotency_key: str | None = ...,
        wait_s: float = ...,
        model: str,
        dataset: str,
        hook_name: str,
        architecture: Literal["topk", "standard", "jumprelu"] = ...,
        d_sae: int | None = ...,
        expansion: float | None = ...,
        k: int | None = ...,
        normalize_activations: Literal["none", "layer_norm", "constant_norm_rescale"] = ...,
        d_in: int | None = ...,
        name: str | None = ...,
        seed: int = ...,
        hyperparameters: Hyperparameters = ...,
        **hyperparameters: Any,
    ) -> Job: ...
    async def list_trainings(
        self,
        *,
        query: str | None = ...,
        status: str | None = ...,
        model: str | None = ...,
        limit: int = ...,
        cursor: str | None = ...,
    ) -> Page[TrainingRecord]: ...
    async def show_training(self, *, training: str) -> TrainingRecord: ...
    async def delete_training(self, *, training: str) -> Deleted: ...
    async def training_metrics(self, *, training: str, after: int = ..., limit: int = ...) -> MetricsPage: ...
    async def training_checkpoints(self, *, training: str) -> CheckpointPage: ...
    async def stop_training(self, *, training: str) -> Job: ...
    async def retry_training(self, *, training: str) -> Job: ...

def outcome_of(job: Job) -> Any: ...

class JobHandle(Job, Generic[Outcome]):
    @classmethod
    def bind(cls, job: Job, studio: Studio) -> JobHandle[Any]: ...
    def refresh(self) -> JobHandle[Outcome]: ...
    def wait(self, timeout: float | None = None, *, progress: bool | None = None) -> Outcome: ...
    def cancel(self) -> JobHandle[Outcome]: ...
    def pause(self) -> JobHandle[Outcome]: ...
    def resume(self) -> JobHandle[Outcome]: ...
    def stop(self) -> JobHandle[Outcome]: ...
    def retry(self) -> JobHandle[Outcome]: ...
    def _control(self, action: str) -> JobHandle[Outcome]: ...

class Studio:
    def __init__(self, home: Path | str | None = None, *, autostart: bool = True, caller: str = "person") -> None: ...
    def __enter__(self) -> Studio: ...
    def __exit__(self, *_: object) -> None: ...
    def __repr__(self) -> str: ...
    def close(self) -> None: ...
    @overload
    def call(self, operation: JobOperation[Outcome]) -> JobHandle[Outcome]: ...
    @overload
    def call(self, operation: Operation[R]) -> R: ...
    def follow(self, channels: Iterable[str] = ("*",), after: int | None = None) -> Iterator[Event]: ...
    def _run(self, coroutine: Coroutine[Any, Any, R]) -> R: ...
    client: AsyncStudio
    def get_dataset(
        self,
        *,
        dry_run: bool = ...,
        idempotency_key: str | None = ...,
        wait_s: float = ...,
        source: str,
        name: str | None = ...,
        text_field: str | None = ...,
        config: str | None = ...,
        split: str = ...,
        revision: str | None = ...,
        model: str | None = ...,
        context_size: int = ...,
        bos_policy: Literal["context", "document", "both", "none"] = ...,
        n_tokens: int | None = ...,
    ) -> JobHandle[DatasetRecord]: ...
    def list_datasets(
        self, *, query: str | None = ..., limit: int = ..., cursor: str | None = ...
    ) -> Page[DatasetRecord]: ...
    def show_dataset(self, *, dataset: str) -> DatasetRecord: ...
    def delete_dataset(self, *, dataset: str) -> Deleted: ...
    def download_dataset(
        self, *, dry_run: bool = ..., idempotency_key: str | None = ..., wait_s: float = ..., dataset: str
    ) -> JobHandle[DatasetRecord]: ...
    def tokenize_dataset(
        self,
        *,
        dry_run: bool = ...,
        idempotency_key: str | None = ...,
        wait_s: float = ...,
        dataset: str,
        model: str,
        context_size: int = ...,
        bos_policy: Literal["context", "document", "both", "none"] = ...,
        n_tokens: int | None = ...,
    ) -> JobHandle[TokensRecord]: ...
    def dataset_statistics(self, *, dataset: str, tokens: str | None = ...) -> TokenStatistics: ...
    def dataset_samples(self, *, dataset: str, offset: int = ..., limit: int = ...) -> SamplePage: ...
    def export(
        self,
        *,
        dry_run: bool = ...,
        idempotency_key: str | None = ...,
        wait_s: float = ...,
        sae: str,
        feature_selection: Literal["all", "extracted", "custom"] = ...,
        range_start: int | None = ...,
        range_end: int | None = ...,
        indices: list[int] | None = ...,
        include_logit_lens: bool = ...,
        include_histograms: bool = ...,
        include_top_tokens: bool = ...,
        include_explanations: bool = ...,
        include_saelens_weights: bool = ...,
        logit_lens_k: int = ...,
        histogram_bins: int = ...,
        top_tokens_k: int = ...,
    ) -> JobHandle[ExportRecord]: ...
    def show_export(self, *, export: str) -> ExportRecord: ...
    def download_export(self, *, export: str) -> Download: ...
    def cancel_export(self, *, export: str) -> Job: ...
    def list_exports(
        self,
        *,
        sae: str | None = ...,
        status: Literal["pending", "computing", "packaging", "completed", "failed", "cancelled"] | None = ...,
        limit: int = ...,
        cursor: str | None = ...,
    ) -> Page[ExportRecord]: ...
    def extract(
        self,
        *,
        dry_run: bool = ...,
        idempotency_key: str | None = ...,
        wait_s: float = ...,
        sae: str,
        dataset: str | None = ...,
        n_tokens: int | None = ...,
        n_examples: int = ...,
        window: int = ...,
        seed: int = ...,
    ) -> JobHandle[ExtractionRecord]: ...
    def list_extractions(
        self, *, sae: str | None = ..., limit: int = ..., cursor: str | None = ...
    ) -> Page[ExtractionRecord]: ...
    def show_extraction(self, *, extraction: str) -> ExtractionRecord: ...
    def label_features(
        self,
        *,
        dry_run: bool = ...,
        idempotency_key: str | None = ...,
        wait_s: float = ...,
        sae: str,
        features: list[int] | None = ...,
        provider: Literal["token_pattern"] = ...,
    ) -> JobHandle[LabellingReport]: ...
    def search_features(
        self,
        *,
        query: str | None = ...,
        sae: str | None = ...,
        mode: Literal["auto", "meaning", "text", "token"] = ...,
        category: str | None = ...,
        include_dense: bool = ...,
        limit: int = ...,
        cursor: str | None = ...,
    ) -> FeaturePage: ...
    def get_feature(
        self,
        *,
        sae: str,
        index: int,
        n: int = ...,
        sampling: Literal["top", "quantile", "random", "zero", "all"] = ...,
        bins: int = ...,
    ) -> FeatureCard: ...
    def set_label(self, *, feature: str, label: str, category: str = ..., evidence: str = ...) -> LabelRecord: ...
    def label_history(self, *, sae: str, index: int) -> Page[LabelRecord]: ...
    def features_on_text(
        self, *, sae: str, text: str, contrast_text: str | None = ..., k: int = ..., include_dense: bool = ...
    ) -> TextFeatures: ...
    def list_jobs(
        self,
        *,
        state: Literal["queued", "running", "pausing", "paused", "interrupted", "completed", "failed", "cancelled"]
        | None = ...,
        operation: str | None = ...,
        limit: int = ...,
        cursor: str | None = ...,
    ) -> Page[Job]: ...
    def show_job(self, *, job: str, wait_s: float = ...) -> Job: ...
    def control_job(self, *, job: str, action: Literal["cancel", "pause", "resume", "stop", "retry"]) -> Job: ...
    def list_events(self, *, after: int = ..., channels: str | None = ..., limit: int = ...) -> EventPage: ...
    def get_model(
        self,
        *,
        dry_run: bool = ...,
        idempotency_key: str | None = ...,
        wait_s: float = ...,
        source: str,
        name: str | None = ...,
        revision: str | None = ...,
        precision: Literal["fp32", "bf16", "fp16", "int8", "nf4"] = ...,
    ) -> JobHandle[ModelRecord]: ...
    def list_models(
        self, *, query: str | None = ..., limit: int = ..., cursor: str | None = ...
    ) -> Page[ModelRecord]: ...
    def show_model(self, *, model: str) -> ModelRecord: ...
    def delete_model(self, *, model: str) -> Deleted: ...
    def download_model(
        self, *, dry_run: bool = ..., idempotency_key: str | None = ..., wait_s: float = ..., model: str
    ) -> JobHandle[ModelRecord]: ...
    def model_architecture(self, *, model: str) -> Architecture: ...
    def unload_model(self, *, model: str) -> Unloaded: ...
    def get_sae(
        self,
        *,
        dry_run: bool = ...,
        idempotency_key: str | None = ...,
        wait_s: float = ...,
        source: str,
        path: str = ...,
        name: str | None = ...,
        revision: str | None = ...,
        model: str | None = ...,
        hook_name: str | None = ...,
    ) -> JobHandle[SAERecord]: ...
    def list_saes(
        self,
        *,
        query: str | None = ...,
        source: Literal["trained", "huggingface", "gemma_scope", "upload"] | None = ...,
        model: str | None = ...,
        layer: int | None = ...,
        architecture: str | None = ...,
        limit: int = ...,
        cursor: str | None = ...,
    ) -> Page[SAERecord]: ...
    def show_sae(self, *, sae: str) -> SAERecord: ...
    def show_saeconfig(self, *, sae: str) -> Config: ...
    def delete_sae(self, *, sae: str) -> Deleted: ...
    def convert_sae(self, *, sae: str, format: Literal["saelens", "mistudio"], name: str | None = ...) -> SAERecord: ...
    def eval_sae(
        self,
        *,
        dry_run: bool = ...,
        idempotency_key: str | None = ...,
        wait_s: float = ...,
        sae: str,
        dataset: str | None = ...,
        n_tokens: int = ...,
    ) -> JobHandle[Evaluation]: ...
    def generate(
        self,
        *,
        dry_run: bool = ...,
        idempotency_key: str | None = ...,
        wait_s: float = ...,
        model: str,
        prompt: str,
        interventions: list[Intervention] = ...,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        top_k: int = ...,
        repetition_penalty: float = ...,
        stop: list[str] = ...,
        seed: int = ...,
        n: int = ...,
    ) -> JobHandle[Generated]: ...
    def steer(
        self,
        *,
        dry_run: bool = ...,
        idempotency_key: str | None = ...,
        wait_s: float = ...,
        interventions: list[Intervention],
        prompt: str,
        model: str | None = ...,
        concept_tokens: list[str] = ...,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        top_k: int = ...,
        repetition_penalty: float = ...,
        stop: list[str] = ...,
        seed: int = ...,
        n: int = ...,
    ) -> JobHandle[SteerResult]: ...
    def sweep(
        self,
        *,
        dry_run: bool = ...,
        idempotency_key: str | None = ...,
        wait_s: float = ...,
        feature: str,
        strengths: list[float],
        prompt: str,
        model: str | None = ...,
        concept_tokens: list[str] = ...,
        max_new_tokens: int = ...,
        temperature: float = ...,
        seed: int = ...,
    ) -> JobHandle[SweepResult]: ...
    def status(self) -> SystemStatus: ...
    def show_system_metrics(self) -> Metrics: ...
    def show_system_history(self, *, seconds: float = ..., limit: int = ...) -> MetricsHistory: ...
    def find(
        self,
        *,
        kind: Literal["model", "dataset", "tokens", "training", "sae", "extraction", "experiment", "export", "job"],
        query: str | None = ...,
        limit: int = ...,
        cursor: str | None = ...,
    ) -> Page[Found]: ...
    def describe(
        self,
        *,
        kind: Literal["model", "dataset", "tokens", "training", "sae", "extraction", "experiment", "export", "job"],
        slug: str,
    ) -> Description: ...
    def train_sae(
        self,
        *,
        dry_run: bool = ...,
        idempotency_key: str | None = ...,
        wait_s: float = ...,
        model: str,
        dataset: str,
        hook_name: str,
        architecture: Literal["topk", "standard", "jumprelu"] = ...,
        d_sae: int | None = ...,
        expansion: float | None = ...,
        k: int | None = ...,
        normalize_activations: Literal["none", "layer_norm", "constant_norm_rescale"] = ...,
        d_in: int | None = ...,
        name: str | None = ...,
        seed: int = ...,
        hyperparameters: Hyperparameters = ...,
        **hyperparameters: Any,
    ) -> JobHandle[SAERecord]: ...
    def list_trainings(
        self,
        *,
        query: str | None = ...,
        status: str | None = ...,
        model: str | None = ...,
        limit: int = ...,
        cursor: str | None = ...,
    ) -> Page[TrainingRecord]: ...
    def show_training(self, *, training: str) -> TrainingRecord: ...
    def delete_training(self, *, training: str) -> Deleted: ...
    def training_metrics(self, *, training: str, after: int = ..., limit: int = ...) -> MetricsPage: ...
    def training_checkpoints(self, *, training: str) -> CheckpointPage: ...
    def stop_training(self, *, training: str) -> Job: ...
    def retry_training(self, *, training: str) -> Job: ...

def connect(home: Path | str | None = None, *, autostart: bool = True, caller: str = "person") -> Studio: ...
