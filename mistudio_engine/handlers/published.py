"""Handlers of api/operations/published.py: what Neuronpedia published of an SAE is brought in and shown.

Files are worked through one after the other, statistics first; each that is done is noted in a checkpoint. Labels go to
the records, examples into parquet files beside the current extraction, all at once when the last file is done.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mistudio_engine.api.errors import BadInput, CorruptFile, EmptyData, Forbidden, NotFound, WrongShape
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.operations.published import ImportLabels, ShowPublished
from mistudio_engine.api.published import Fidelity, ImportReport, Published, PublishedExample, PublishedFeature
from mistudio_engine.api.records import LabelRecord, ModelRecord, Plan, SAERecord
from mistudio_engine.api.refs import FeatureKey
from mistudio_engine.discovery.ablation import written_rows
from mistudio_engine.export import neuronpedia_reader as reader
from mistudio_engine.export.neuronpedia_reader import FileName, Identity, PublishedExplanation, Refused
from mistudio_engine.handlers.knowledge import Knowledge
from mistudio_engine.handlers.registry import Planned, handles, plans, runs
from mistudio_engine.handlers.search_index import update_rows
from mistudio_engine.runtime.bucket import Bucket, BucketFile
from mistudio_engine.runtime.engine import Engine, caller
from mistudio_engine.runtime.files import atomic_folder, require_free, slugify, write_atomic
from mistudio_engine.runtime.jobs import JobContext
from mistudio_engine.saes import load_sae
from mistudio_engine.saes.folders import new_file

NEURONPEDIA = "https://neuronpedia-datasets.s3.us-east-1.amazonaws.com"
"""The bucket of its public data set; everything lies below v1/."""

AUTHOR = "neuronpedia:"
"""What the author of a published label begins with."""

MACHINES = ("job:", AUTHOR)
"""Authors whose labels a published one may follow."""

FOLDER, INFO_FILE, FEATURES_FILE = "derived/published_examples", "published.json", "features.parquet"
STATE_FILE = "state.json"

ROWS_AT_ONCE = 1024
"""Lines to a step, and examples to a row group at most."""

LABELS_AT_ONCE = 64
FEATURES_A_FILE = 1024
"""What Neuronpedia puts into a batch."""

MAX_EXAMPLES, MAX_LABELS = 100, 8
"""Of a feature, from one source."""

REMOTE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")

FEATURES_SCHEMA = pa.schema([("index", pa.int64()), ("max", pa.float64()), ("frequency", pa.float64())])
EXAMPLES_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("tokens", pa.list_(pa.string())),
        ("values", pa.list_(pa.float32())),
        ("position", pa.int32()),
        ("bin_min", pa.float64()),
        ("bin_max", pa.float64()),
        ("bin_contains", pa.float64()),
    ]
)


class SourceFile(NamedTuple):
    """A file of a source, here or in a bucket."""

    name: FileName
    n_bytes: int
    path: Path | None
    remote: BucketFile | None


class Source:
    """Where published files are, and what they are expected to be of."""

    def __init__(self, operation: ImportLabels) -> None:
        self.folder: Path | None = None
        self.expected: Identity | None = None
        if operation.source[0] in "/.~":
            self.folder = Path(operation.source).expanduser()
            if not self.folder.is_dir():
                raise NotFound(
                    f"There is no folder {operation.source!r}.", why="It is looked up on the engine's machine."
                )
            return
        if not REMOTE.fullmatch(operation.source):
            raise BadInput(
                f"{operation.source[:100]!r} is neither MODEL/SOURCE nor a folder.",
                fix="Write it as Neuronpedia does, such as gpt2-small/8-res-jb.",
            )
        model_id, _, source_id = operation.source.partition("/")
        self.expected = Identity(model_id, source_id)
        self.bucket = Bucket(operation.base_url or NEURONPEDIA)

    @property
    def where(self) -> str:
        """For people to read."""
        return "a local folder" if self.folder is not None else self.bucket.host

    def files(self, operation: ImportLabels) -> list[SourceFile]:
        """Those wanted, in the order in which they are worked through.

        Raises:
            EmptyData: there are none.
        """
        wanted = {"features", *(["explanations"] if operation.labels else [])}
        wanted |= {"activations"} if operation.examples else set()
        found = [each for each in self._all() if each.name.kind in wanted]
        if not any(each.name.kind != "features" for each in found):
            raise EmptyData(
                f"{operation.source} has no {' or '.join(sorted(wanted - {'features'}))} to bring in.",
                why="They are files such as explanations/batch-0.jsonl.gz.",
                fix="Check the source.",
            )
        return sorted(found, key=lambda each: (reader.KINDS.index(each.name.kind), each.name.batch))

    def _all(self) -> Iterator[SourceFile]:
        if self.folder is not None:
            for path in self.folder.glob("*/batch-*.jsonl.gz"):
                name = reader.parse_file_name(f"{path.parent.name}/{path.name}")
                if name is not None and path.is_file():
                    yield SourceFile(name, path.stat().st_size, path, None)
            return
        assert self.expected is not None
        prefix = f"v1/{self.expected.model_id}/{self.expected.source_id}/"
        for file in self.bucket.listing(prefix):
            name = reader.parse_file_name(file.key.removeprefix(prefix))
            if name is not None:
                yield SourceFile(name, file.n_bytes, None, file)


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
        if operation.examples:
            _ = known.record  # there has to be an extraction, beside which they are kept
        source = Source(operation)
        if source.expected is not None:
            _check(known, operation, source.expected, source.expected, None)
        files = source.files(operation)
        n_bytes = sum(each.n_bytes for each in files)
        require_free(engine.home, 2 * n_bytes, "This import")
        n_batches = len({each.name.batch for each in files})
        n_features = min(known.sae.d_sae, n_batches * FEATURES_A_FILE, len(operation.features or []) or known.sae.d_sae)
        plan = Plan(
            summary=f"Bring in what {operation.source} says of at most {n_features:,} features of {known.sae.ref}.",
            disk_bytes=2 * n_bytes,
            details={"n_files": len(files), "n_bytes": n_bytes, "n_features_at_most": n_features},
        )
        return Planned(plan, subject=known.sae.ref)


@runs(ImportLabels, lane="io", resumes="checkpoint")
def run_import_labels(
    operation: ImportLabels, engine: Engine, context: JobContext
) -> Generator[Progress, Signal, ImportReport]:
    source = Source(operation)
    files = source.files(operation)
    n_bytes = sum(each.n_bytes for each in files)
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
        if (self.folder / STATE_FILE).exists():
            self.state = json.loads((self.folder / STATE_FILE).read_text(encoding="utf-8"))
        self._changed: list[int] = []
        self._counts, self._refused = Counter[str](), Counter[str]()  # of the file that is being read

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Whether it ended well or not: what is labelled is found."""
        self._index(0)
        slug = self.operation.sae
        self.engine.store.update(SAERecord, slug, n_labelled=len(self.engine.store.labels(slug)))

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
        _write_parquet(self._piece(name), [pa.table(columns, schema=FEATURES_SCHEMA)], FEATURES_SCHEMA)

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
        """Write a label down, unless it is here or somebody has a better word; whether it was written."""
        store, sae = self.engine.store, self.operation.sae
        label = LabelRecord(
            sae=sae,
            index=found.index,
            label=found.label,
            author=AUTHOR + found.author,
            method=found.method,
            evidence=f"Published at Neuronpedia as {'/'.join(found.of)} feature {found.index}"
            + (f", explanation {found.id}; " if found.id else "; ")
            + f"read from {self.source.where}.",
            scores={"published": found.scores} if found.scores else {},
        )
        with store.transaction():  # between looking and writing nobody else may come
            history = store.label_history(sae, found.index)
            if any(
                (each.author, each.label, each.method) == (label.author, label.label, label.method) for each in history
            ):
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

        with new_file(self._piece(name)) as part, pq.ParquetWriter(part, EXAMPLES_SCHEMA) as writer:
            for table in tables():
                if len(table):
                    writer.write_table(table)
                yield shares[-1] if shares else 1.0

    def _piece(self, name: FileName) -> Path:
        return self.folder / f"{name.kind}-{name.batch}.parquet"

    @cached_property
    def _statistics(self) -> pa.Table:
        pieces = [pq.read_table(path) for path in sorted(self.folder.glob("features-*.parquet"))]
        return pa.concat_tables(pieces) if pieces else FEATURES_SCHEMA.empty_table()

    def publish(self) -> None:
        """Put examples and statistics beside the extraction, in place of what an earlier import of the source put."""
        identity = self.state["identity"] or ["unknown", "unknown"]
        target = self.known.folder / FOLDER / slugify("-".join(identity))
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(target) as folder:
            for piece in sorted(self.folder.glob("activations-*.parquet")):
                shutil.copyfile(piece, folder / piece.name)
            pq.write_table(self._statistics, folder / FEATURES_FILE)
            (folder / INFO_FILE).write_text(json.dumps({"source": "/".join(identity)}), encoding="utf-8")

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


def _write_parquet(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    with new_file(path) as part, pq.ParquetWriter(part, schema) as writer:
        for table in tables:
            writer.write_table(table)


@handles(ShowPublished)
def show_published(operation: ShowPublished, engine: Engine) -> Published:
    with Knowledge.of(engine, operation.sae) as known:
        known.check_index(operation.index)
        key = FeatureKey(operation.sae, operation.index)
        history = engine.store.label_history(operation.sae, operation.index)
        labels = [each for each in history if each.author.startswith(AUTHOR)]
        sources = []
        if known.sae.extraction is not None:
            for folder in sorted((known.folder / FOLDER).glob("*/")):
                found = _published(folder, operation.index, operation.n)
                if found is not None:
                    sources.append(found)
    if not labels and not sources:
        raise NotFound(
            f"Nothing published of {key.ref} was brought in.",
            fix="Bring it in with import_labels.",
            next_call=("import_labels", {"sae": operation.sae, "source": "MODEL/SOURCE"}),
        )
    return Published(ref=key.ref, sae=key.sae, index=key.index, labels=labels, sources=sources)


def _published(folder: Path, index: int, n: int) -> PublishedFeature | None:
    """What a source says of a feature; None for nothing."""
    try:
        source = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))["source"]
        statistics = pq.read_table(folder / FEATURES_FILE, filters=[("index", "==", index)]).to_pylist()
        rows = [
            row
            for piece in sorted(folder.glob("activations-*.parquet"))
            for row in pq.read_table(piece, filters=[("index", "==", index)]).to_pylist()
        ]
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
        raise CorruptFile(f"{folder.name} cannot be read: {error}.", fix="Import it again.") from error
    if not statistics and not rows:
        return None
    rows.sort(key=lambda row: -row["values"][row["position"]])
    examples = [PublishedExample(**{key: row[key] for key in row if key != "index"}) for row in islice(rows, n)]
    return PublishedFeature(
        source=source,
        max_activation=statistics[0]["max"] if statistics else None,
        activation_frequency=statistics[0]["frequency"] if statistics else None,
        examples=examples,
        total=len(rows),
        shown=len(examples),
    )
