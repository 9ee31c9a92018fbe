"""Where the hook sites of one loaded model lie: its family's row, found by `model_type` or by structure.

A family that has no row is tried against every row's module names, and a fit is believed only when one small forward
pass confirms the arithmetic that the names claim. The rows are in families.py; what is done at a site is in hooks.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mistudio_engine.api.errors import Unsupported
from mistudio_engine.models.families import FAMILIES, SITES, Family

__all__ = ["Layout", "Tap", "find_layout"]

RESIDUAL_ONLY = "nothing but the residual stream was recognised in this family"


class Tap(NamedTuple):
    """A place in a block's computation."""

    path: str
    """Module inside the block, by dotted name; empty for the block itself."""

    side: Literal["input", "output", "stream", "normalized"]
    """What is tapped there: the module's `input` or `output`; `stream`, its input, which the block still holds as its
    residual stream and adds to later; `normalized`, what an RMSNorm computes before its gain."""


@dataclass(frozen=True)
class Layout:
    """A family's row applied to one model."""

    family: Family

    proved: bool
    """True where the row was found by structure and confirmed by a forward pass; False where the family is known."""

    blocks: nn.ModuleList
    final_norm: nn.Module | None
    taps: Mapping[str, Tap]

    lacks: Mapping[str, str]
    """Sites of `SITES` that are not in `taps`, and why."""


def find_layout(hf: Any) -> Layout:
    """The layout of a causal language model of transformers, in evaluation mode.

    Raises:
        Unsupported: the family has no row and no row fits; the message says what was looked for.
    """
    model_type, config = hf.config.model_type, hf.config.get_text_config()
    for row in FAMILIES:
        if model_type in row.model_types and _applies(row, config):
            return _apply(row, hf, proved=False)
    guesses = [_apply(row, hf, proved=True) for row in FAMILIES if _fits(row, hf, config)]
    for layout in [*guesses, *_residual_only(hf, model_type, config)]:
        if _is_proved(layout, hf):
            return layout
    rows = ", ".join(dict.fromkeys(t for row in FAMILIES for t in row.model_types))
    raise Unsupported(
        f"The model family {model_type!r} is not known, and its structure fits none that is.",
        why="Looked for a list of as many blocks as the config has layers, each block's output equal to transformers' "
        f"hidden_states, with modules named as in one of: {rows}.",
        fix="Use a model of one of these families, or add a row to FAMILIES in mistudio_engine/models/families.py.",
    )


def _applies(row: Family, config: Any) -> bool:
    return row.when is None or getattr(config, row.when[0], None) == row.when[1]


def _module(root: nn.Module, path: str) -> nn.Module | None:
    for name in filter(None, path.split(".")):
        root = getattr(root, name, None)  # type: ignore[assignment]
        if not isinstance(root, nn.Module):
            return None
    return root


def _apply(row: Family, hf: nn.Module, *, proved: bool) -> Layout:
    decoder = hf.get_submodule(row.decoder)
    blocks = decoder.get_submodule(row.blocks)
    assert isinstance(blocks, nn.ModuleList)
    taps = {
        "hook_resid_pre": Tap("", "input"),
        "hook_resid_post": Tap("", "output"),
        "attn.hook_z": Tap(row.z, "input"),
        "hook_attn_out": Tap(row.attn_out, "output"),
        "hook_mlp_out": Tap(row.mlp_out, "output"),
    }
    if row.ln2 is not None:
        taps["hook_resid_mid"] = Tap(row.ln2, "stream")
        # TransformerLens: LayerNorm's hook_normalized stands after gain and bias, RMSNorm's before the gain. Tapping
        # the MLP's input and not the LayerNorm's output matters where attention reads the same norm (Phi).
        is_layer_norm = isinstance(blocks[0].get_submodule(row.ln2), nn.LayerNorm)
        taps["ln2.hook_normalized"] = Tap(row.mlp, "input") if is_layer_norm else Tap(row.ln2, "normalized")
    taps = {site: taps[site] for site in SITES if site in taps and site not in row.lacks}
    return Layout(row, proved, blocks, _module(decoder, row.final_norm), taps, dict(row.lacks))


def _fits(row: Family, hf: nn.Module, config: Any) -> bool:
    """Whether all modules that the row names are there, in every block."""
    decoder = _module(hf, row.decoder)
    blocks = None if decoder is None else _module(decoder, row.blocks)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) != getattr(config, "num_hidden_layers", None):
        return False
    paths = [path for path in (row.attn_out, row.z, row.ln2, row.mlp, row.mlp_out) if path is not None]
    return all(_module(block, path) is not None for block in blocks for path in paths)


def _residual_only(hf: nn.Module, model_type: str, config: Any) -> Iterator[Layout]:
    """The last resort: any list of as many blocks as there are layers, with its residual stream alone."""
    n_layers = getattr(config, "num_hidden_layers", 0)
    for path, module in hf.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers > 0:
            decoder, _, blocks = path.rpartition(".")
            row = Family("by_structure", (model_type,), "", "", None, "", "", decoder=decoder, blocks=blocks)
            norms = [m for m in hf.get_submodule(decoder).children() if "norm" in type(m).__name__.lower()]
            taps = {"hook_resid_pre": Tap("", "input"), "hook_resid_post": Tap("", "output")}
            lacks = {site: RESIDUAL_ONLY for site in SITES if site not in taps}
            yield Layout(row, True, module, norms[-1] if norms else None, taps, lacks)


def _is_proved(layout: Layout, hf: nn.Module) -> bool:
    """Two forward passes of three tokens: does every tap carry what its name says, and is the stream writable?"""
    # hooks.py reads layouts and layouts are proved through hooks: of the two imports this is the one that can wait.
    from mistudio_engine.models.hooks import capture, tapped

    n_blocks = len(layout.blocks)
    points = [(layer, site) for layer in range(n_blocks) for site in layout.taps]
    ids = torch.arange(3, device=next(hf.parameters()).device).unsqueeze(0)
    try:
        captured = capture(hf, layout, points, ids)
        with torch.no_grad():
            hidden = hf(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        with ExitStack() as edits:
            for layer in range(n_blocks if "hook_resid_mid" in layout.taps else 0):
                edits.enter_context(tapped(layout, layer, "hook_resid_mid", lambda x: x + x.std()))
            edited = capture(hf, layout, points, ids)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False  # a tap that never fired, or a block that is called in another way
    if hidden is None or len(hidden) != n_blocks + 1:
        return False
    for layer, block in enumerate(layout.blocks):
        at = {site: captured[layer, site] for site in layout.taps}
        is_hidden = _close(at["hook_resid_pre"], hidden[layer]) and (
            layer + 1 == n_blocks or _close(at["hook_resid_post"], hidden[layer + 1])
        )
        if not (is_hidden and _adds_up(at) and _is_normalized(at, layout, block)):
            return False
        if "hook_resid_mid" in at and not _close(
            edited[layer, "hook_resid_mid"] + edited[layer, "hook_mlp_out"], edited[layer, "hook_resid_post"]
        ):
            return False
    return True


def _adds_up(at: Mapping[str, Tensor]) -> bool:
    """resid_pre + attn_out = resid_mid, and with mlp_out added, resid_post."""
    if "hook_mlp_out" not in at:
        return True
    middle = at["hook_resid_pre"] + at["hook_attn_out"]
    return _close(middle + at["hook_mlp_out"], at["hook_resid_post"]) and _close(
        at.get("hook_resid_mid", middle), middle
    )


def _is_normalized(at: Mapping[str, Tensor], layout: Layout, block: nn.Module) -> bool:
    """The site before an RMSNorm's gain, times the gain, is what the norm returns."""
    tap = layout.taps.get("ln2.hook_normalized")
    if tap is None or tap.side != "normalized":
        return True
    norm = block.get_submodule(tap.path)
    weight = getattr(norm, "weight", None)
    if weight is None or "hook_resid_mid" not in at:
        return False
    return _close(at["ln2.hook_normalized"] * (weight + layout.family.gain_offset), norm(at["hook_resid_mid"]))


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = max(1e-3, 4 * torch.finfo(a.dtype).eps)  # sums may be made in another order than the model's
    a, b = a.float(), b.float()
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.std()))
