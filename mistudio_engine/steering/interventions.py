"""An intervention: what is changed in a language model's activations, where, and by how much.

It is built on `models.hooks.edit` and exists only inside `with applied(...)`. It knows nothing of prompts, sampling or
text, and reads nothing from disk.

**Units.** Every strength is a length in the activations' own units, as Neuronpedia has it: a feature's direction is its
decoder row scaled to length 1, and the length of what a feature writes is its activation times the norm of that row.
So an SAE and its twin with rescaled decoder rows steer alike. `calibration.length_of` makes lengths out of maximum
activations and typical norms.

**Order.** Interventions at one hook point all read the activation as the model computed it and their changes are added
up, so their order does not matter. Between hook points the later one sees what the earlier one did.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from mistudio_engine.api.errors import BadInput, NotFound, Unsupported, WrongShape
from mistudio_engine.models.hooks import check_hook, edit, hook_width
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.saes import SAE

__all__ = [
    "METHODS",
    "POSITIONS",
    "Intervention",
    "Method",
    "Positions",
    "Window",
    "applied",
    "check",
    "feature_direction",
]

Method = Literal["add", "suppress", "set", "ablate", "orthogonal", "cap"]
Positions = Literal["all", "prompt", "generated", "last"]

Strength = float | Sequence[float | None]


@dataclass(frozen=True, eq=False)
class Intervention:
    """One change at one hook point.

    Raises:
        BadInput: a vector that is zero or not finite, a strength that is not finite, an unknown method or position, a
            method that needs an SAE's feature without one.
    """

    hook_name: str
    """Where, such as `blocks.2.hook_resid_post`."""

    vector: Tensor
    """The direction, (width,). `add` adds strength × vector as it is; the other methods use its direction alone."""

    strength: Strength = 1.0
    """How much, as a length; one number for the whole batch, or one per row, where None leaves that row alone."""

    method: Method = "add"
    """A key of METHODS."""

    positions: Positions = "all"
    """Which tokens: `all`, those of the `prompt`, the `generated` ones (from the first one on, as it is read back), or
    the `last` token of the prompt alone. Padding is never touched."""

    sae: SAE | None = None
    """The SAE whose feature `suppress`, `set` and `ablate` measure; its other features and its error stay."""

    feature: int | None = None
    """Index of that feature."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise BadInput(f"There is no steering method {self.method!r}.", fix=f"Use one of {', '.join(METHODS)}.")
        if self.positions not in POSITIONS:
            raise BadInput(f"There are no positions {self.positions!r}.", fix=f"Use one of {', '.join(POSITIONS)}.")
        if self.vector.dim() != 1:
            raise WrongShape(f"A steering vector has one dimension, this one has shape {tuple(self.vector.shape)}.")
        length = float(self.vector.detach().double().norm())
        if not math.isfinite(length) or length == 0:
            raise BadInput(
                f"A steering vector of length {length} has no direction.",
                fix="Choose a feature that is alive, or a direction whose numbers are finite.",
            )
        for strength in self.strengths:
            if strength is not None and not math.isfinite(strength):
                raise BadInput(f"A strength of {strength} cannot be added.", fix="Give finite strengths.")
        if self.method in NEEDS_FEATURE and (self.sae is None or self.feature is None):
            raise BadInput(
                f"The method {self.method!r} changes what an SAE's feature writes, and no feature was given.",
                fix="Give sae and feature, or use add, orthogonal or cap along a plain direction.",
            )

    @property
    def strengths(self) -> tuple[float | None, ...]:
        """The strength of each row; a single number counts as one."""
        return tuple(self.strength) if isinstance(self.strength, Sequence) else (self.strength,)

    @classmethod
    def of_feature(
        cls,
        sae: SAE,
        feature: int,
        strength: Strength = 1.0,
        *,
        method: Method = "add",
        positions: Positions = "all",
        hook_name: str | None = None,
    ) -> Intervention:
        """Steer along a feature's decoder direction, scaled to length 1.

        Args:
            hook_name: where, if the SAE's configuration does not say or another layer is wanted; a transcoder's
                features are added where it writes.

        Raises:
            NotFound: no feature of that index.
            BadInput: the feature's decoder row is zero, or nothing says where the SAE reads.
            Unsupported: `suppress`, `set` or `ablate` on a transcoder, which reads elsewhere than it writes.
        """
        reads, writes = sae.cfg.hook_name, getattr(sae.cfg, "hook_name_out", None)
        if method in NEEDS_FEATURE and writes and writes != reads:
            raise Unsupported(
                f"{method!r} on a transcoder would need its input at {reads!r} while {writes!r} is changed.",
                fix="Use add, orthogonal or cap.",
            )
        where = hook_name or writes or reads
        if not where:
            raise BadInput("The SAE's configuration names no hook point.", fix="Give hook_name.")
        direction, _ = feature_direction(sae, feature)
        return cls(where, direction, strength, method, positions, sae, feature)

    def on_rows(self, strengths: Sequence[float | None]) -> Intervention:
        """The same change with one strength per row."""
        return replace(self, strength=tuple(strengths))

    def repeated(self, n: int) -> Intervention:
        """Strengths per row repeated for n neighbouring rows each; a single number stays as it is."""
        if not isinstance(self.strength, Sequence):
            return self
        return self.on_rows([strength for strength in self.strength for _ in range(n)])

    def row(self, index: int) -> Intervention | None:
        """The change in one row of the batch, or None where it leaves that row alone."""
        strength = self.strengths[index if isinstance(self.strength, Sequence) else 0]
        return None if strength is None else replace(self, strength=strength)


def feature_direction(sae: SAE, feature: int) -> tuple[Tensor, float]:
    """A feature's decoder row scaled to length 1, (d_out,) in fp32, and the length that an activation of 1 writes.

    The length is the row's norm, except where the SAE counts its rows as normed (`rescale_acts_by_decoder_norm`).

    Raises:
        NotFound: no feature of that index.
        BadInput: the row is zero or not finite.
    """
    d_sae = sae.W_dec.shape[0]
    if not 0 <= feature < d_sae:
        raise NotFound(f"The SAE has no feature {feature}.", why=f"It has {d_sae}, from 0 to {d_sae - 1}.")
    row = _decoder_row(sae, feature)
    length = float(row.norm())
    if not math.isfinite(length) or length == 0:
        raise BadInput(
            f"Feature {feature} cannot steer: its decoder row has length {length}.",
            fix="Choose a feature that is alive.",
        )
    return row / length, length


def _decoder_row(sae: SAE, feature: int) -> Tensor:
    """What an activation of 1 writes, (d_out,) in fp32."""
    row = sae.W_dec[feature].detach().float()
    return row / row.norm() if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else row


def _written(h: Tensor, it: Intervention) -> Tensor:
    """What the feature adds to the SAE's reconstruction of h: f·W_dec, un-normalised as its decoder does. h's shape."""
    sae, feature = it.sae, it.feature
    assert sae is not None and feature is not None
    z, norm = sae.normalize(h.to(sae.device))
    feature_acts, _ = sae.encode_normalized(z, torch.tensor([feature], device=z.device))  # (rows, n_tokens, 1)
    return (feature_acts.float() * norm.scale * _decoder_row(sae, feature)).to(h)


def _along(h: Tensor, it: Intervention) -> tuple[Tensor, Tensor]:
    """The length of h along the direction, (rows, n_tokens, 1), and the direction of length 1, (width,)."""
    direction = it.vector / it.vector.norm()
    return (h @ direction).unsqueeze(-1), direction


def _add(h: Tensor, strength: Tensor, it: Intervention) -> Tensor:
    return (strength * it.vector).expand_as(h)


def _suppress(h: Tensor, strength: Tensor, it: Intervention) -> Tensor:
    return -strength * _written(h, it)


def _set(h: Tensor, strength: Tensor, it: Intervention) -> Tensor:
    return strength * (it.vector / it.vector.norm()) - _written(h, it)


def _ablate(h: Tensor, strength: Tensor, it: Intervention) -> Tensor:
    return -_written(h, it)


def _orthogonal(h: Tensor, strength: Tensor, it: Intervention) -> Tensor:
    length, direction = _along(h, it)
    return (strength - 1) * length * direction


def _cap(h: Tensor, strength: Tensor, it: Intervention) -> Tensor:
    length, direction = _along(h, it)
    return (torch.minimum(length, strength) - length) * direction


METHODS: dict[Method, Callable[[Tensor, Tensor, Intervention], Tensor]] = {
    "add": _add,
    "suppress": _suppress,
    "set": _set,
    "ablate": _ablate,
    "orthogonal": _orthogonal,
    "cap": _cap,
}
"""What is added to h (rows, n_tokens, width) at strength (rows, 1, 1), with f what the SAE's feature reads, v the
direction of length 1 and P = v vᵀ:

- `add`: h + c·vector (Neuronpedia's SIMPLE_ADDITIVE);
- `suppress`: h − c·f·W_dec; `ablate`: the same with c = 1; `set`: what the feature writes becomes c·v;
- `orthogonal`: (I − P)h + c·Ph, so 1 changes nothing and 0 removes the direction (ORTHOGONAL_DECOMP);
- `cap`: the length along v is at most c (PROJECTION_CAP with a maximum).
"""

NEEDS_FEATURE: frozenset[Method] = frozenset({"suppress", "set", "ablate"})

CHANGES_NOTHING: dict[Method, float] = {"add": 0.0, "suppress": 0.0, "orthogonal": 1.0}
"""The strength at which a method does nothing. Such rows are left out, not computed: h + 0·v is not h for h = −0.0."""

POSITIONS: dict[Positions, Callable[[Tensor, int], Tensor]] = {
    "all": lambda column, prompt_width: torch.ones_like(column, dtype=torch.bool),
    "prompt": lambda column, prompt_width: column < prompt_width,
    "generated": lambda column, prompt_width: column >= prompt_width,
    "last": lambda column, prompt_width: column == prompt_width - 1,
}
"""Which columns of a left-padded batch are meant. They are absolute, so the same with a KV cache and without."""


@dataclass(frozen=True, eq=False)
class Window:
    """Which columns of a left-padded batch a forward pass covers."""

    start: int = 0
    """Column of the pass's first token; above 0 when a KV cache holds what came before."""

    prompt_width: int | None = None
    """Columns before this one hold the prompts; None: all do."""

    real: Tensor | None = None
    """(rows, n_columns) bool on the CPU, False for padding; None: there is no padding."""

    def mask(self, positions: Positions, rows: int, n_tokens: int) -> Tensor:
        """True where an intervention at these positions acts, (rows, n_tokens) on the CPU."""
        columns = torch.arange(self.start, self.start + n_tokens)
        width = self.start + n_tokens if self.prompt_width is None else self.prompt_width
        meant = POSITIONS[positions](columns, width).expand(rows, n_tokens)
        return meant if self.real is None else meant & self.real[:, self.start : self.start + n_tokens]


def _edited(h: Tensor, group: Sequence[Intervention], window: Window) -> Tensor:
    """h (rows, n_tokens, width) with the group's changes; bit-equal wherever none of them acts."""
    rows, n_tokens, _ = h.shape
    exact = h.float() if h.dtype in (torch.bfloat16, torch.float16) else h
    out = exact
    touched = torch.zeros(rows, n_tokens, dtype=torch.bool)
    for it in group:
        strengths = it.strengths * rows if len(it.strengths) == 1 else it.strengths
        acts = torch.tensor([s is not None and s != CHANGES_NOTHING.get(it.method) for s in strengths])
        where = acts[:, None] & window.mask(it.positions, rows, n_tokens)
        if not where.any():
            continue
        per_row = torch.tensor([s or 0.0 for s in strengths], dtype=exact.dtype, device=h.device).view(-1, 1, 1)
        on_device = replace(it, vector=it.vector.to(h.device, exact.dtype))
        change = METHODS[it.method](exact, per_row, on_device)
        out = torch.where(where.to(h.device)[..., None], out + change, out)
        touched |= where
    if not touched.any():
        return h
    return torch.where(touched.to(h.device)[..., None], out.to(h.dtype), h)


def check(lm: LanguageModel, interventions: Sequence[Intervention], rows: int) -> None:
    """Every hook point exists, every vector fits it, strengths are one number or one per row.

    Raises:
        UnknownHook: a hook point outside the model.
        WrongShape: a vector of another width, or another number of strengths than rows.
    """
    for it in interventions:
        check_hook(lm, it.hook_name)
        width = hook_width(lm, it.hook_name)
        if it.vector.shape[0] != width:
            raise WrongShape(
                f"A vector of {it.vector.shape[0]} numbers cannot steer {it.hook_name!r}, which is {width} wide.",
                fix="Use an SAE trained at this hook of this model, or another hook_name.",
            )
        if isinstance(it.strength, Sequence) and len(it.strength) != rows:
            raise WrongShape(
                f"{len(it.strength)} strengths were given for {rows} rows.",
                fix="Give one number, or one per row of the batch (None leaves a row alone).",
            )


@contextmanager
def applied(lm: LanguageModel, interventions: Sequence[Intervention], window: Window | None = None) -> Iterator[None]:
    """Within the block the model is steered; `edit` raises on leaving if a hook did not fire.

    Args:
        window: where the forward passes in the block lie in the batch; None: whole prompts without padding.
    """
    by_hook: dict[str, list[Intervention]] = {}
    for it in interventions:
        by_hook.setdefault(it.hook_name, []).append(it)
    with ExitStack() as stack:
        for hook_name, group in by_hook.items():
            stack.enter_context(edit(lm, hook_name, partial(_edited, group=group, window=window or Window())))
        yield
