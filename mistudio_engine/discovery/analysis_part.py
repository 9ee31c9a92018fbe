"""The share of one process in analysing features: plain names go in, JSON comes out.

What takes long to open (tokenizer, pipeline, extraction) is opened once a process. It knows nothing of the others.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from mistudio_engine.discovery.analysis import Analyst
from mistudio_engine.discovery.extraction_store import ExtractionStore, load_extraction
from mistudio_engine.discovery.nlp import load_pipeline
from mistudio_engine.models.checkpoint import load_tokenizer

__all__ = ["analyse_part"]


def analyse_part(
    sae: str,
    slug: str,
    extraction: str,
    tokenizer: str,
    pipeline: str,
    n_examples: int,
    indices: list[int],
) -> list[tuple[int, str]]:
    """Analyses of some living features, (feature, JSON of a `FeatureAnalysis`).

    Args:
        sae: slug of the SAE, and
        slug: of the extraction: what the analyses say they are of.
        extraction: folder of its data.
        tokenizer: folder of the model.
        pipeline: as `load_pipeline` takes it.
        n_examples: at most this many of each kind for a feature.
        indices: the features.

    Raises:
        NotFound, CorruptFile, BadInput: something cannot be opened.
    """
    store, analyst = _opened(extraction, tokenizer, pipeline, n_examples)
    found = []
    for index in indices:
        analysis = analyst.analyse(index, store.examples(index))
        named = {"sae": sae, "extraction": slug, "stored": True}
        found.append((index, analysis.model_copy(update=named).model_dump_json()))
    return found


@lru_cache(maxsize=1)
def _opened(extraction: str, tokenizer: str, pipeline: str, n_examples: int) -> tuple[ExtractionStore, Analyst]:
    analyst = Analyst(load_tokenizer(Path(tokenizer)), load_pipeline(pipeline), n_examples)
    return load_extraction(extraction), analyst
