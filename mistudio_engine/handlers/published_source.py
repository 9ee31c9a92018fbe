"""Where published files are: in Neuronpedia's bucket, in another with the same tree, or in a folder here.

It knows which files there are and how large, not what stands in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mistudio_engine.api.errors import BadInput, EmptyData, NotFound
from mistudio_engine.api.operations.published import ImportLabels
from mistudio_engine.export.neuronpedia_reader import KINDS, FileName, Identity, parse_file_name
from mistudio_engine.runtime.bucket import Bucket, BucketFile

__all__ = ["NEURONPEDIA", "Source", "SourceFile"]

NEURONPEDIA = "https://neuronpedia-datasets.s3.us-east-1.amazonaws.com"
"""The bucket of its public data set; everything lies below v1/."""

REMOTE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


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
        return sorted(found, key=lambda each: (KINDS.index(each.name.kind), each.name.batch))

    def _all(self) -> Iterator[SourceFile]:
        if self.folder is not None:
            for path in self.folder.glob("*/batch-*.jsonl.gz"):
                name = parse_file_name(f"{path.parent.name}/{path.name}")
                if name is not None and path.is_file():
                    yield SourceFile(name, path.stat().st_size, path, None)
            return
        assert self.expected is not None
        prefix = f"v1/{self.expected.model_id}/{self.expected.source_id}/"
        for file in self.bucket.listing(prefix):
            name = parse_file_name(file.key.removeprefix(prefix))
            if name is not None:
                yield SourceFile(name, file.n_bytes, None, file)
