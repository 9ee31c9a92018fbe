"""The catalogue: importing this package loads every operation into `OPERATIONS`. It imports no torch."""

from mistudio_engine.api.operations import (
    ablation,
    analysis,
    datasets,
    exports,
    extractions,
    features,
    jobs,
    labels,
    models,
    neighbours,
    on_text,
    published,
    reproduce,
    saes,
    scores,
    search,
    settings,
    steering,
    system,
    templates,
    training,
)
from mistudio_engine.api.operations.ablation import *
from mistudio_engine.api.operations.analysis import *
from mistudio_engine.api.operations.base import OPERATIONS, JobOperation, Operation, Route
from mistudio_engine.api.operations.datasets import *
from mistudio_engine.api.operations.exports import *
from mistudio_engine.api.operations.extractions import *
from mistudio_engine.api.operations.features import *
from mistudio_engine.api.operations.jobs import *
from mistudio_engine.api.operations.labels import *
from mistudio_engine.api.operations.models import *
from mistudio_engine.api.operations.neighbours import *
from mistudio_engine.api.operations.on_text import *
from mistudio_engine.api.operations.published import *
from mistudio_engine.api.operations.reproduce import *
from mistudio_engine.api.operations.saes import *
from mistudio_engine.api.operations.scores import *
from mistudio_engine.api.operations.search import *
from mistudio_engine.api.operations.settings import *
from mistudio_engine.api.operations.steering import *
from mistudio_engine.api.operations.system import *
from mistudio_engine.api.operations.templates import *
from mistudio_engine.api.operations.training import *

__all__ = sorted(
    {"OPERATIONS", "JobOperation", "Operation", "Route"}
    | {
        name
        for module in (
            ablation,
            analysis,
            datasets,
            exports,
            extractions,
            features,
            jobs,
            labels,
            models,
            neighbours,
            on_text,
            published,
            reproduce,
            saes,
            scores,
            search,
            settings,
            steering,
            system,
            templates,
            training,
        )
        for name in module.__all__
    }
)
