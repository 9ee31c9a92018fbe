"""Handlers of api/operations/published.py: what Neuronpedia published of an SAE is brought in and shown.

Files are worked through one after the other, statistics first; each that is done is noted in a checkpoint. Labels go to
the records, examples beside the SAE's weights, all at once when the last file is done. Of several imports for one SAE
each waits for the one before.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mistudio_engine.api.errors import Forbidden, NotFound, WrongShape
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.operations.published import ImportLabels, ShowPublished
from mistudio_engine.api.published import Fidelity, ImportReport, Published
from mistudio_engine.api.records import LabelRecord, ModelRecord, Plan, SAERecord
from mistudio_engine.api.refs import FeatureKey
from mistudio_engine.discovery.ablation import written_rows
from mistudio_engine.discovery.published_store import (
    EXAMPLES_SCHEMA,
    FEATURES_SCHEMA,
    finish_source,
    read_source,
    write_statistics,
)
from mistudio_engine.export import neuronpedia_reader as reader
from mistudio_engine.export.neuronpedia_reader import FileName, Identity, PublishedExplanation, Refused
from mistudio_engine.handlers.knowledge import Knowledge
from mistudio_engine.handlers.published_source import Source, SourceFile
from mistudio_engine.handlers.registry import Planned, handles, plans, runs
from mistudio_engine.handlers.resources import one_at_a_time
from mistudio_engine.handlers.search_index import update_rows
from mistudio_engine.runtime.engine import Engine, caller
from mistudio_engine.runtime.files import require_free, slugify, write_atomic
from mistudio_engine.runtime.jobs import JobContext
from mistudio_engine.saes import load_sae
from mistudio_engine.saes.folders import new_file, take_place

AUTHOR = "neuronpedia:"
"""What the author of a published label begins with."""

MACHINES = ("job:", AUTHOR)
"""Authors whose labels a published one may follow."""

FOLDER = "published"
"""In the SAE's folder: a folder for each source."""

STATE_FILE, READY = "state.json", "ready"
"""In a job's folder: which files are done, and the folder that becomes the source's."""

_replacing = threading.Lock()
"""Held where a source's folder is read, or another takes its place."""

ROWS_AT_ONCE = 1024
"""Lines to a step, and examples to a row group at most."""

LABELS_AT_ONCE = 64
FEATURES_A_FILE = 1024
"""What Neuronpedia puts into a batch."""

MAX_EXAMPLES, MAX_LABELS = 100, 8
"""Of a feature, from one source."""


@plans(ImportLabels)
def plan_import_labels(operation: ImportLabels, engine: Engine) -> Planned:
    if caller() != "person" and (operation.base_url is not None or operation.source[0] in "/.~"):
        raise Forbidden(
            "Only a person may name a folder or another bucket to import from.",
            fix="Give MODEL/SOURCE as Neuronpedia has it, such as gpt2-small/8-res-jb.",
        )
    with Knowledge.of(engine, operation.sae) as known:
        for index in operation.features or []:
            known.check_index(index)
        source = Source(operation)
        if source.expected is not None:
            _check(known, operation, source.expected, source.expected, None)
        n_features = len(operation.features or []) or known.sae.d_sae
        n_bytes, details = 0, {}
        # A bucket takes its time to answer: only somebody who asked for the plan waits for it.
        if source.folder is not None or operation.dry_run:
            files = source.files(operation)
            n_bytes = _room(engine, files)
            n_features = min(n_features, len({each.name.batch for each in files}) * FEATURES_A_FILE)
            details = {"n_files": len(files), "n_bytes": n_bytes, "n_features_at_most": n_features}
        plan = Plan(
            summary=f"Bring in what {operation.source} says of at most {n_features:,} features of {known.sae.ref}.",
            disk_bytes=2 * n_bytes,
            details=details,
        )
        return Planned(plan, subject=known.sae.ref)


def _room(engine: Engine, files: list[SourceFile]) -> int:
    """The bytes of some files, for which there has to be room twice.

    Raises:
        DiskFull: there is not.
    """
    n_bytes = sum(each.n_bytes for each in files)
    require_free(engine.home, 2 * n_bytes, "This import")
    return n_bytes


@runs(ImportLabels, lane="io", resumes="checkpoint")
def run_import_labels(
    operation: ImportLabels, engine: Engine, context: JobContext
) -> Generator[Progress, Signal, ImportReport]:
    ref = f"{engine.store.get(SAERecord, operation.sae).ref}/published"
    return (yield from one_at_a_time(engine, ref, lambda: _bring_in(operation, engine, context)))


def _bring_in(
    operation: ImportLabels, engine: Engine, context: JobContext
) -> Generator[Progress, Signal, ImportReport]:
    source = Source(operation)
    yield Progress(stage=f"asking {source.where} for its files")
    files = source.files(operation)
    n_bytes = _room(engine, files)
    with Knowledge.of(engine, operation.sae) as known, _Import(operation, engine, context, known, source) as work:
        n_before = 0
        for file in files:
            if file.name.path not in work.state["done"]:
                path = file.path
                if file.remote is not None:
                    path = context.folder / "download.jsonl.gz"
                    for n_here in source.bucket.fetch(file.remote, path):
                        yield _progress("fetching", file, (n_before + n_here / 2) / n_bytes)
                assert path is not None
                for share in work.read(file.name, path):
                    half = share if file.remote is None else (1 + share) / 2
                    yield _progress("reading", file, (n_before + half * file.n_bytes) / n_bytes)
                work.done(file.name)
                yield _progress("reading", file, (n_before + file.n_bytes) / n_bytes, checkpointed=True)
            n_before += file.n_bytes
        if operation.examples:
            work.publish()
        return work.report(len(files))


def _progress(stage: str, file: SourceFile, fraction: float, checkpointed: bool = False) -> Progress:
    return Progress(
        stage=f"{stage} {file.name.path}", fraction=min(fraction, 1.0), unit="bytes", checkpointed=checkpointed
    )


class _Import:
    """One import on its way: what it has read is in its job's folder, so that another engine can go on."""

    def __init__(
        self, operation: ImportLabels, engine: Engine, context: JobContext, known: Knowledge, source: Source
    ) -> None:
        self.operation, self.engine, self.known, self.source = operation, engine, known, source
        self.folder = context.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.wanted = None if operation.features is None else set(operation.features)
        self.state: dict[str, Any] = {"done": [], "counts": {}, "refused": {}, "identity": None}
        self.ready = self.folder / READY
        if (self.folder / STATE_FILE).exists():
            self.state = json.loads((self.folder / STATE_FILE).read_text(encoding="utf-8"))
        else:  # otherwise a folder that is missing has been published already
            self.ready.mkdir(exist_ok=True)
        self._read_from = f"read from {source.where} by {context.job.ref}."
        self._changed: list[int] = []
        self._counts, self._refused = Counter[str](), Counter[str]()  # of the file that is being read

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Whether it ended well or not: what is labelled is found."""
        self._index(0)
        slug = self.operation.sae
        self.engine.store.update(SAERecord, slug, n_labelled=self.engine.store.count_labels(slug))

    def read(self, name: FileName, path: Path) -> Iterator[float]:
        """Take a file in; yields the share that is done."""
        self._counts, self._refused = Counter[str](), Counter[str]()
        match name.kind:
            case "features":
                yield from self._features(name, path)
            case "explanations":
                yield from self._explanations(path)
            case "activations":
                yield from self._examples(name, path)

    def done(self, name: FileName) -> None:
        """Write down that a file is done, with what came of it."""
        for key, counted in (("counts", self._counts), ("refused", self._refused)):
            self.state[key] = dict(Counter(self.state[key]) + counted)
        self.state["done"].append(name.path)
        write_atomic(self.folder / STATE_FILE, json.dumps(self.state))

    def _usable(self, rows: Iterable[tuple[float, Any]]) -> Iterator[tuple[float, Any]]:
        """Rows of ours, None for the others, which are counted.

        Raises:
            WrongShape: the first row is of another model, layer or source, or a feature lies beyond the SAE.
        """
        d_sae = self.known.sae.d_sae
        for share, row in rows:
            if isinstance(row, Refused):
                self._refused[row.reason] += 1
                yield share, None
                continue
            if self.state["identity"] is None:
                _check(self.known, self.operation, row.of, self.source.expected, getattr(row, "hook_name", None))
                self.state["identity"] = list(row.of)
            if list(row.of) != self.state["identity"]:
                self._refused["of another source"] += 1
                yield share, None
            elif row.index >= d_sae:
                raise WrongShape(
                    f"The files have a feature {row.index} and {self.known.sae.ref} has {d_sae} features.",
                    fix="Use the SAE that they are of.",
                )
            else:
                yield share, row if self.wanted is None or row.index in self.wanted else None

    def _features(self, name: FileName, path: Path) -> Iterator[float]:
        columns: dict[str, list[Any]] = {each: [] for each in FEATURES_SCHEMA.names}
        for n, (share, row) in enumerate(self._usable(reader.read_features(path)), start=1):
            if row is not None:
                for column in columns:
                    columns[column].append(getattr(row, column))
                self._counts["features"] += 1
            if n % ROWS_AT_ONCE == 0:
                yield share
        write_statistics(self.folder / f"features-{name.batch}.parquet", pa.table(columns, schema=FEATURES_SCHEMA))

    def _explanations(self, path: Path) -> Iterator[float]:
        found: dict[int, list[PublishedExplanation]] = {}
        for n, (share, row) in enumerate(self._usable(reader.read_explanations(path)), start=1):
            if row is not None:
                found.setdefault(row.index, []).append(row)
            if n % ROWS_AT_ONCE == 0:
                yield share / 2
        for n, index in enumerate(sorted(found), start=1):
            # The one with the best score comes last and is the one that counts.
            best = sorted(found[index], key=lambda each: (max(each.scores.values(), default=-1.0), each.id))
            self._refused[f"more than {MAX_LABELS} labels of a feature"] += max(0, len(best) - MAX_LABELS)
            if any([self._label(each) for each in best[-MAX_LABELS:]]):
                self._changed.append(index)
            if n % LABELS_AT_ONCE == 0:
                self._index(LABELS_AT_ONCE)
                yield 0.5 + 0.5 * n / len(found)
        self._index(0)

    def _label(self, found: PublishedExplanation) -> bool:
        """Write a label down, unless it is here or somebody has a better word; whether it is this job's."""
        store, sae = self.engine.store, self.operation.sae
        label = LabelRecord(
            sae=sae,
            index=found.index,
            label=found.label,
            author=AUTHOR + found.author,
            method=found.method,
            evidence=f"Published at Neuronpedia as {'/'.join(found.of)} feature {found.index}"
            + (f", explanation {found.id}; " if found.id else "; ")
            + self._read_from,
            scores={"published": found.scores} if found.scores else {},
        )
        with store.transaction():  # between looking and writing nobody else may come
            history = store.label_history(sae, found.index)
            same = [
                each
                for each in history
                if (each.author, each.label, each.method) == (label.author, label.label, label.method)
            ]
            if any(each.evidence.endswith(self._read_from) for each in same):
                self._counts["labels"] += 1  # by an attempt that was killed, maybe before it could be found
                return True
            if same:
                self._counts["known"] += 1
                return False
            if history and not history[0].author.startswith(MACHINES):
                self._counts["kept"] += 1
                return False
            written = store.add_label(label)
        self._counts["labels" if written else "kept"] += 1
        return written is not None

    def _index(self, at_least: int) -> None:
        if self._changed and len(self._changed) >= at_least:
            changed, self._changed = self._changed, []
            update_rows(self.engine, self.operation.sae, changed)

    def _examples(self, name: FileName, path: Path) -> Iterator[float]:
        per_feature: Counter[int] = Counter()
        shares: list[float] = []

        def tables() -> Iterator[pa.Table]:
            rows: list[dict[str, Any]] = []
            for n, (share, row) in enumerate(self._usable(reader.read_examples(path)), start=1):
                shares.append(share)
                if row is not None:
                    per_feature[row.index] += 1
                    if per_feature[row.index] <= MAX_EXAMPLES:
                        rows.append({column: getattr(row, column) for column in EXAMPLES_SCHEMA.names})
                        self._counts["examples"] += 1
                    else:
                        self._refused[f"more than {MAX_EXAMPLES} examples of a feature"] += 1
                if n % ROWS_AT_ONCE == 0:  # also where few rows are wanted: whoever cancels waits for this
                    yield pa.Table.from_pylist(rows, schema=EXAMPLES_SCHEMA)
                    rows = []
            yield pa.Table.from_pylist(rows, schema=EXAMPLES_SCHEMA)

        piece = self.ready / f"activations-{name.batch}.parquet"
        with new_file(piece) as part, pq.ParquetWriter(part, EXAMPLES_SCHEMA) as writer:
            for table in tables():
                if len(table):
                    writer.write_table(table)
                yield shares[-1] if shares else 1.0

    @cached_property
    def _statistics(self) -> pa.Table:
        pieces = [pq.read_table(path) for path in sorted(self.folder.glob("features-*.parquet"))]
        return pa.concat_tables(pieces) if pieces else FEATURES_SCHEMA.empty_table()

    def publish(self) -> None:
        """Put examples and statistics beside the SAE, in place of what an earlier import of the source put."""
        if not self.ready.exists():
            return
        identity = self.state["identity"] or ["unknown", "unknown"]
        finish_source(self.ready, "/".join(identity), self._statistics)
        target = _published(self.engine, self.known.sae) / slugify("-".join(identity))
        target.parent.mkdir(exist_ok=True)
        with _replacing:
            take_place(self.ready, target)

    def report(self, n_files: int) -> ImportReport:
        counts, identity = Counter(self.state["counts"]), self.state["identity"]
        return ImportReport(
            sae=self.operation.sae,
            source="/".join(identity) if identity else self.operation.source,
            n_files=n_files,
            n_features=counts["features"],
            n_labels=counts["labels"],
            n_known=counts["known"],
            n_kept=counts["kept"],
            n_examples=counts["examples"],
            refused=self.state["refused"],
            fidelity=self._fidelity(),
        )

    def _fidelity(self) -> Fidelity | None:
        if self.known.sae.extraction is None or not len(self._statistics):
            return None
        ours = self.known.extraction
        columns = {name: self._statistics[name].to_numpy() for name in FEATURES_SCHEMA.names}
        _, first = np.unique(columns["index"], return_index=True)  # a feature may be listed twice
        columns = {name: values[first] for name, values in columns.items()}
        _, mine, theirs = np.intersect1d(ours.indices, columns["index"], return_indices=True)
        # Published maxima are for decoder rows of length 1; ours are for the rows that there are.
        sae = load_sae(self.engine.home / self.known.sae.folder)
        lengths = written_rows(sae, ours.indices[mine]).norm(dim=-1).numpy()
        found = reader.fidelity(
            columns["max"][theirs].astype(float),
            ours.max[mine] * lengths,
            columns["frequency"][theirs].astype(float),
            ours.frequency[mine],
        )
        return Fidelity(**found._asdict())


def _check(
    known: Knowledge, operation: ImportLabels, found: Identity, expected: Identity | None, hook: str | None
) -> None:
    """Refuse what is not of this SAE."""
    sae, names = known.sae, [known.sae.model, known.sae.config.get("model_name")]
    if sae.model is not None and known.engine.store.exists(ModelRecord, sae.model):
        names.append(known.engine.store.get(ModelRecord, sae.model).source)
    reader.check_identity(
        found,
        expected=expected,
        models=reader.model_names(*names) if operation.check_model else set(),
        layer=sae.layer,
        hook_name=sae.hook_name,
        published_hook=hook,
    )


@handles(ShowPublished)
def show_published(operation: ShowPublished, engine: Engine) -> Published:
    with Knowledge.of(engine, operation.sae) as known:
        known.check_index(operation.index)
        key = FeatureKey(operation.sae, operation.index)
        history = engine.store.label_history(operation.sae, operation.index)
        labels = [each for each in history if each.author.startswith(AUTHOR)]
    with _replacing:
        folders = set(_published(engine, known.sae).glob("*/"))
        # An engine that is killed while a newer import takes the place of one may leave that behind.
        folders = sorted(each for each in folders if each.suffix != ".old" or each.with_suffix("") not in folders)
        found = [read_source(folder, operation.index, operation.n) for folder in folders]
    sources = [each for each in found if each is not None]
    if not labels and not sources:
        raise NotFound(
            f"Nothing published of {key.ref} was brought in.",
            fix="Bring it in with import_labels.",
            next_call=("import_labels", {"sae": operation.sae, "source": "MODEL/SOURCE"}),
        )
    return Published(ref=key.ref, sae=key.sae, index=key.index, labels=labels, sources=sources)


def _published(engine: Engine, sae: SAERecord) -> Path:
    """Where published examples of an SAE lie: they are of the SAE, whatever it is extracted from."""
    return engine.home / sae.folder / FOLDER
