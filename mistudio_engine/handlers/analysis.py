"""Handlers of api/operations/analysis.py: words of features are analysed in processes of their own, or one at once."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Generator
from pathlib import Path

from mistudio_engine.api.analysis import AnalysisReport, FeatureAnalysis
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.operations.analysis import AnalyseFeatures, ShowAnalysis
from mistudio_engine.api.records import ModelRecord, Plan
from mistudio_engine.discovery.analysis import Analyst
from mistudio_engine.discovery.analysis_part import analyse_part
from mistudio_engine.discovery.analysis_store import join_parts, part_features, read_analysis, write_part
from mistudio_engine.discovery.nlp import DEFAULT_PIPELINE, check_pipeline, is_folder, load_pipeline
from mistudio_engine.handlers.knowledge import DATA_FOLDER, DERIVED_FOLDER, Knowledge
from mistudio_engine.handlers.registry import Planned, handles, plans, runs
from mistudio_engine.handlers.settings import require_person
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.jobs import JobContext
from mistudio_engine.runtime.processes import ProcessPool

ANALYSED_AT_ONCE = 32
"""Features to a part: what is done again after the engine was killed."""

_joining = threading.Lock()


@plans(AnalyseFeatures)
def plan_analyse_features(operation: AnalyseFeatures, engine: Engine) -> Planned:
    pipeline = _pipeline(engine, operation.pipeline)
    with Knowledge.of(engine, operation.sae) as known:
        wanted, dead = _wanted(known, operation.features)
        plan = Plan(
            summary=f"Analyse what the words of {len(wanted):,} features of {known.sae.ref} have in common, "
            f"with the spaCy pipeline {_shown(pipeline)}.",
            details={"n_features": len(wanted), "n_dead": dead, "pipeline": _shown(pipeline)},
        )
        return Planned(plan, subject=known.sae.ref)


def _pipeline(engine: Engine, asked: str | None) -> str:
    """The pipeline to use, which is there and which the caller may name.

    Raises:
        Forbidden: an agent names a folder.
        NotFound: there is none of this name.
    """
    if asked is not None and is_folder(asked):
        require_person("name a pipeline by its folder")
    pipeline = asked or engine.store.get_setting("nlp_pipeline") or DEFAULT_PIPELINE
    check_pipeline(pipeline)
    return pipeline


def _shown(pipeline: str) -> str:
    """A pipeline's name without the folders above it."""
    return Path(pipeline).name if is_folder(pipeline) else pipeline


def _wanted(known: Knowledge, features: list[int] | None) -> tuple[list[int], int]:
    """Living features among those that were asked for, and how many of them are dead.

    Raises:
        NotFound: one of them does not exist, or is not in the extraction.
    """
    living = list(known.alive())
    if features is None:
        return living, known.record.n_features - len(living)
    for index in features:
        known.check_index(index)
        known.extraction.feature(index)
    asked, alive = list(dict.fromkeys(features)), set(living)
    return [index for index in asked if index in alive], sum(index not in alive for index in asked)


@runs(AnalyseFeatures, lane="io", resumes="checkpoint")
def run_analyse_features(
    operation: AnalyseFeatures, engine: Engine, context: JobContext
) -> Generator[Progress, Signal, AnalysisReport]:
    pipeline = operation.pipeline or engine.store.get_setting("nlp_pipeline") or DEFAULT_PIPELINE
    with Knowledge.of(engine, operation.sae) as known, ProcessPool() as pool:
        wanted, n_dead = _wanted(known, operation.features)
        # What an attempt made that was killed counts only if it was made from the same things.
        made_from = hashlib.sha256(f"{known.record.slug} {known.record.sha256} {pipeline}".encode()).hexdigest()[:16]
        parts = context.folder / made_from
        parts.mkdir(exist_ok=True)
        done = {feature for part in parts.glob("*.parquet") for feature in part_features(part)}
        left = [index for index in wanted if index not in done]
        chunks = [left[at : at + ANALYSED_AT_ONCE] for at in range(0, len(left), ANALYSED_AT_ONCE)]
        fixed = (operation.sae, known.record.slug, str(known.folder / DATA_FOLDER), str(_tokenizer_folder(known)))
        work = pool.map(analyse_part, [(*fixed, pipeline, operation.n_examples, chunk) for chunk in chunks])
        n_done, signal = len(done), Signal.GO
        try:
            for result in work:
                if result is not None:
                    number, analyses = result
                    write_part(parts / f"{chunks[number][0]:09d}.parquet", analyses)
                    n_done += len(analyses)
                signal = yield Progress(
                    stage="analysing words",
                    fraction=n_done / len(wanted),
                    unit="features",
                    checkpointed=result is not None,
                )
                if signal is Signal.STOP:
                    break
        finally:
            work.close()
        with _joining:  # another job may bring its own into the same file
            join_parts(known.folder / DERIVED_FOLDER, parts.glob("*.parquet"))
        first = read_analysis(known.folder / DERIVED_FOLDER, wanted[0]) if wanted else None
        return AnalysisReport(
            sae=operation.sae,
            extraction=known.record.slug,
            pipeline=first.pipeline if first else _shown(pipeline),
            missing=first.missing if first else [],
            advice=first.advice if first else "",
            n_analysed=n_done,
            n_dead=n_dead,
        )


def _tokenizer_folder(known: Knowledge) -> Path:
    return known.engine.home / known.engine.store.get(ModelRecord, known.record.model).folder


@handles(ShowAnalysis)
def show_analysis(operation: ShowAnalysis, engine: Engine) -> FeatureAnalysis:
    with Knowledge.of(engine, operation.sae) as known:
        known.check_index(operation.index)
        known.extraction.feature(operation.index)
        kept = read_analysis(known.folder / DERIVED_FOLDER, operation.index)
        if kept is not None and operation.pipeline is None:
            return kept
        pipeline = load_pipeline(_pipeline(engine, operation.pipeline))
        if kept is not None and kept.pipeline == pipeline.name:
            return kept
        analyst = Analyst(known.tokenizer, pipeline, operation.n_examples)
        found = analyst.analyse(operation.index, known.extraction.examples(operation.index))
        return found.model_copy(update={"sae": operation.sae, "extraction": known.record.slug})
