"""Handlers of api/operations/ablation.py: features are taken away, and tried on texts.

Both share the compute thread with a running job, a forward pass at a time. What was measured is kept as findings.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from mistudio_engine.api.ablation import (
    AblatedText,
    AblationReport,
    AblationRow,
    FeatureAblation,
    FeatureTest,
    LensAgreement,
    MeanOverTexts,
    TextTest,
)
from mistudio_engine.api.errors import NotFound
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.features import LogitToken
from mistudio_engine.api.operations.ablation import AblateFeatures, ShowAblation, TestFeature
from mistudio_engine.api.records import Finding, Plan, SAERecord
from mistudio_engine.api.refs import FeatureKey, feature_of
from mistudio_engine.discovery.ablation import (
    Ablation,
    AblationProgress,
    Interval,
    Passage,
    ablate,
    matched_controls,
    writing,
)
from mistudio_engine.discovery.feature_test import OnText, feature_on_texts, verdict
from mistudio_engine.handlers.knowledge import Knowledge
from mistudio_engine.handlers.registry import Planned, handles, plans, runs
from mistudio_engine.handlers.relay import relay
from mistudio_engine.handlers.resources import fitting_model, language_model, sparse_autoencoder
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.jobs import JobContext

WORKING_BYTES = 512 * 2**20
"""Logits with and without, and their probabilities, of one forward pass."""

TEXTS_KEPT = 8
"""Of each ablation, token by token."""

DIGITS = 6
"""Significant digits of numbers that stand for tokens."""

Chosen = tuple[list[Passage], list[int | None]]
"""Texts, and the context that each is from."""


@plans(AblateFeatures)
def plan_ablate_features(operation: AblateFeatures, engine: Engine) -> Planned:
    with Knowledge.of(engine, operation.sae) as known:
        fitting_model(engine, known.sae)
        for index in operation.features:
            known.check_index(index)
            known.extraction.feature(index)  # which says that the extraction was of other features
        n = len(set(operation.features))
        n_texts = len(operation.texts or []) or operation.n_contexts
        plan = Plan(
            summary=f"Ablate {n} feature{'s' if n > 1 else ''} of {known.sae.ref} in at most {n_texts} texts each.",
            memory_bytes=WORKING_BYTES,
            details={"n_features": n, "n_forward_rows": n * n_texts * (2 + operation.n_controls)},
        )
        return Planned(plan, subject=known.sae.ref)


@runs(AblateFeatures, lane="interactive", resumes="start")
def run_ablate_features(
    operation: AblateFeatures, engine: Engine, context: JobContext
) -> Generator[Progress, Signal, AblationReport]:
    author = f"job:{context.job.slug}"
    features = list(dict.fromkeys(operation.features))
    with Knowledge.of(engine, operation.sae) as known:
        model = fitting_model(engine, known.sae)
        found: list[FeatureAblation] = []
        with (
            language_model(engine, model.slug) as lm,
            sparse_autoencoder(engine, operation.sae) as sae,
            engine.memory.reserve("Ablating features", WORKING_BYTES, device=engine.device),
        ):
            frequency = np.zeros(known.sae.d_sae)
            frequency[known.extraction.indices] = known.extraction.frequency
            comparable = frequency * writing(sae)  # a control needs a direction
            for n, index in enumerate(features):
                kept = _by(engine, operation.sae, index, author)
                if kept is None:  # otherwise this job found it before the engine was killed
                    passages, contexts = _passages(operation, known, lm, index)
                    controls = matched_controls(comparable, index, operation.n_controls, operation.seed)
                    if passages:
                        work = ablate(
                            lm, sae, known.sae.hook_name, index, passages, controls=controls, seed=operation.seed
                        )
                        result = yield from relay(work, _saying(n, len(features)))
                    else:
                        result = None  # it never fired in the extraction
                    kept = _kept(known, operation, author, index, result, passages, contexts)
                    body = kept.model_dump(mode="json", exclude={"created_at"})
                    engine.store.add_findings(
                        [Finding(sae=operation.sae, index=index, kind="ablation", author=author, body=body)]
                    )
                found.append(kept)
                yield Progress(stage="ablating", fraction=(n + 1) / len(features), unit="features")
    rows = sorted((_row(each) for each in found), key=lambda row: -(row.kl_after or 0.0))
    return AblationReport(
        sae=operation.sae, n_features=len(rows), n_silent=sum(not each.n_firing for each in found), rows=rows
    )


def _saying(n: int, n_features: int) -> Any:
    def say(step: AblationProgress) -> Progress:
        return Progress(stage="ablating", fraction=(n + step.fraction) / n_features, unit="features")

    return say


def _by(engine: Engine, sae: str, index: int, author: str) -> FeatureAblation | None:
    """What this author found about a feature, if anything."""
    for finding in engine.store.findings(sae, index, "ablation"):
        if finding.author == author:
            return FeatureAblation.model_validate(finding.body)
    return None


def _passages(operation: AblateFeatures, known: Knowledge, lm: LanguageModel, index: int) -> Chosen:
    """The texts to measure a feature on."""
    if operation.texts is not None:
        return [_passage(lm, lm.encode(text, bos=True)) for text in operation.texts], [None] * len(operation.texts)
    groups = (known.extraction.examples(index, "top"), known.extraction.examples(index, "quantile"))
    in_turns = [each for n in range(max(map(len, groups))) for group in groups for each in group[n : n + 1]]
    examples = {}
    for each in in_turns:
        if len(examples) < operation.n_contexts:
            examples.setdefault(each.context, each)
    return (
        [_passage(lm, each.token_ids[: each.prime + 1 + operation.n_after]) for each in examples.values()],
        list(examples),
    )


def _passage(lm: LanguageModel, ids: Sequence[int]) -> Passage:
    token_ids = np.asarray(ids, dtype=np.int64)
    return Passage(token_ids, ~np.isin(token_ids, list(lm.special_ids)))


def _kept(
    known: Knowledge,
    operation: AblateFeatures,
    author: str,
    index: int,
    result: Ablation | None,
    passages: Sequence[Passage],
    contexts: Sequence[int | None],
) -> FeatureAblation:
    """What is kept of an ablation; None stands for a feature without a text to measure it on."""
    about: dict[str, Any] = {
        "ref": FeatureKey(operation.sae, index).ref,
        "sae": operation.sae,
        "index": index,
        "author": author,
        "extraction": known.record.slug,
        "source": "extraction" if operation.texts is None else "given",
    }
    if result is None:
        return FeatureAblation(**about, n_texts=0, n_silent=0, n_firing=0)
    strongest = sorted(result.passages, key=lambda effect: -float(effect.kl.max()))[:TEXTS_KEPT]
    intervals = ("loss_firing", "loss_after", "kl_firing", "kl_after")
    intervals += ("control_loss_after", "control_kl_after", "excess_kl")
    means: dict[str, Any] = {name: _interval(getattr(result, name)) for name in intervals}
    return FeatureAblation(
        **about,
        **means,
        n_texts=result.n_passages,
        n_silent=result.n_silent,
        n_firing=result.n_firing,
        controls=list(result.controls),
        controls_below=result.controls_below,
        promoted=_logit_tokens(known, result.promoted),
        suppressed=_logit_tokens(known, result.suppressed),
        lens=_agreement(result.lens),
        texts=[
            AblatedText(
                context=contexts[each.passage],
                tokens=known.strings(passages[each.passage].token_ids),
                activations=_short(each.feature_acts),
                loss=_short(each.loss),
                kl=_short(each.kl),
            )
            for each in strongest
        ],
    )


def _interval(found: Interval | None) -> MeanOverTexts | None:
    return None if found is None else MeanOverTexts(**found._asdict())


def _agreement(found: Any) -> LensAgreement | None:
    if found is None:
        return None
    return LensAgreement(**found._replace(correlation=_finite(found.correlation))._asdict())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _short(values: Any) -> list[float]:
    return [float(f"{float(value):.{DIGITS}g}") for value in values]


def _logit_tokens(known: Knowledge, found: Sequence[tuple[int, float]]) -> list[LogitToken]:
    strings = known.strings(token for token, _ in found)
    return [
        LogitToken(token=string, token_id=token, value=value)
        for string, (token, value) in zip(strings, found, strict=True)
    ]


def _row(found: FeatureAblation) -> AblationRow:
    return AblationRow(
        ref=found.ref,
        index=found.index,
        n_texts=found.n_texts - found.n_silent,
        loss_after=found.loss_after.mean if found.loss_after else None,
        kl_after=found.kl_after.mean if found.kl_after else None,
        control_kl_after=found.control_kl_after.mean if found.control_kl_after else None,
        excess_kl_low=found.excess_kl.low if found.excess_kl else None,
    )


@handles(ShowAblation)
def show_ablation(operation: ShowAblation, engine: Engine) -> FeatureAblation:
    with Knowledge.of(engine, operation.sae) as known:
        known.check_index(operation.index)
    found = engine.store.findings(operation.sae, operation.index, "ablation", limit=1)
    if not found:
        key = FeatureKey(operation.sae, operation.index)
        raise NotFound(
            f"{key.ref} has not been ablated.",
            fix="Run ablate_features for it first.",
            next_call=("ablate_features", {"sae": operation.sae, "features": [operation.index]}),
        )
    return FeatureAblation.model_validate({**found[0].body, "created_at": found[0].created_at})


@handles(TestFeature)
def test_feature(operation: TestFeature, engine: Engine) -> FeatureTest:
    key = feature_of(operation.feature)
    record = engine.store.get(SAERecord, key.sae)
    model = fitting_model(engine, record)
    with Knowledge(engine, record) as known:
        known.check_index(key.index)
        known_max = _known_max(known, key.index, required=operation.min_share > 0)

        def look() -> Generator[int, Signal, list[tuple[OnText, list[str]]]]:
            with language_model(engine, model.slug) as lm, sparse_autoencoder(engine, record.slug) as sae:
                found = yield from feature_on_texts(lm, sae, record.hook_name, key.index, operation.texts)
                return [(each, lm.token_strings(each.token_ids)) for each in found]

        found = engine.compute.interactive(look(), name="test_feature").result()
    from_here = operation.min_share * (known_max or 0.0)
    fired = [each.max > 0 and each.max >= from_here for each, _ in found]
    rows = [
        TextTest(
            tokens=tokens,
            max=each.max,
            position=each.position,
            token=tokens[each.position],
            fired=fired[n],
            share_of_max=each.max / known_max if known_max else None,
            expected=operation.expected[n] if operation.expected else None,
        )
        for n, (each, tokens) in enumerate(found)
    ]
    answer = FeatureTest(
        ref=key.ref,
        sae=key.sae,
        index=key.index,
        known_max=known_max,
        rows=rows,
        n=len(rows),
        n_fired=sum(fired),
    )
    if operation.expected is None:
        return answer
    judged = verdict([each.max for each, _ in found], fired, operation.expected)
    return answer.model_copy(
        update={
            "n_expected": judged.n_expected,
            "auroc": judged.auroc,
            "precision": _finite(judged.confusion.precision),
            "recall": _finite(judged.confusion.recall),
        }
    )


def _known_max(known: Knowledge, index: int, *, required: bool) -> float | None:
    """The largest activation that the extraction saw; None where it is of other features, or there is none.

    Raises:
        NotFound: it is required.
    """
    if not required and (known.sae.extraction is None or index not in known.extraction.indices):
        return None
    return known.extraction.feature(index).max
