"""How people and agents name things: `kind/slug`, and `sae/slug#7` for a feature. It knows no records."""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, Field

__all__ = [
    "DatasetRef",
    "FeatureKey",
    "FeatureRef",
    "ModelRef",
    "SAERef",
    "Slug",
    "TemplateRef",
    "feature_of",
    "kind_and_slug",
    "slug_of",
]

SLUG = re.compile(r"[a-z0-9A-Z][a-zA-Z0-9._-]{0,119}")


class FeatureKey(NamedTuple):
    """A feature: the slug of its SAE and its index."""

    sae: str
    index: int

    @property
    def ref(self) -> str:
        """As people and agents write it."""
        return f"sae/{self.sae}#{self.index}"

    @property
    def id(self) -> str:
        """As it stands in a URL."""
        return f"{self.sae}:{self.index}"


def slug_of(kind: str, text: str) -> str:
    """The slug in `kind/slug` or `slug`.

    Raises:
        ValueError: another kind, or characters that no slug has.
    """
    prefix, slash, rest = text.partition("/")
    if slash and prefix != kind:
        raise ValueError(f"{text!r} is not a {kind}: write {kind}/NAME or just NAME, as find(kind={kind!r}) lists them")
    slug = rest if slash else text
    if not SLUG.fullmatch(slug):
        raise ValueError(f"{text!r} is not a name: letters, digits, '.', '_' and '-', at most 120 of them")
    return slug


def feature_of(text: str) -> FeatureKey:
    """The feature in `sae/slug#7`, `slug#7` or `slug:7`.

    Raises:
        ValueError: it does not read as a feature.
    """
    name, mark, index = text.removeprefix("feature ").rpartition("#" if "#" in text else ":")
    if not mark or not index.isascii() or not index.isdigit() or len(index) > 9:
        raise ValueError(f"{text!r} is not a feature: write sae/NAME#INDEX, such as sae/stories-l2#7")
    return FeatureKey(slug_of("sae", name), int(index))


def kind_and_slug(ref: str) -> tuple[str, str]:
    """`("sae", "stories-l2")` of `sae/stories-l2`.

    Raises:
        ValueError: there is no kind in it.
    """
    kind, slash, slug = ref.partition("/")
    if not slash:
        raise ValueError(f"{ref!r} does not say its kind: write KIND/NAME, such as sae/{ref}")
    return kind, slug


Slug = Annotated[str, Field(max_length=120, pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]*$")]
"""A name to give to something new."""

ModelRef = Annotated[str, AfterValidator(lambda text: slug_of("model", text))]
DatasetRef = Annotated[str, AfterValidator(lambda text: slug_of("dataset", text))]
SAERef = Annotated[str, AfterValidator(lambda text: slug_of("sae", text))]
TemplateRef = Annotated[str, AfterValidator(lambda text: slug_of("template", text))]
FeatureRef = Annotated[str, AfterValidator(lambda text: feature_of(text).ref)]
