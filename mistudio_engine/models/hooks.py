"""Reading and replacing activations by name, through plain PyTorch hooks that exist only inside a `with`.

`blocks.L.hook_resid_post` and the other sites carry TransformerLens's names and mean what they mean there; families.py
says where they lie in each model. This file knows nothing of SAEs, of steering, or of who asks.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mistudio_engine.api.errors import BadInput, Internal, UnknownHook, WrongShape
from mistudio_engine.models.families import SITES

if TYPE_CHECKING:
    from mistudio_engine.models.language_model import LanguageModel
    from mistudio_engine.models.layout import Layout

__all__ = [
    "SITES",
    "HookPoint",
    "activations",
    "capture",
    "check_hook",
    "check_width",
    "edit",
    "hook_names",
    "hook_width",
    "parse_hook",
    "tapped",
]

_NAME = re.compile(r"blocks\.([0-9]{1,4})\.(.+)", re.DOTALL)


class HookPoint(NamedTuple):
    """A hook name taken apart; `str()` puts it together again."""

    layer: int
    site: str

    def __str__(self) -> str:
        return f"blocks.{self.layer}.{self.site}"


class _Reached(Exception):
    """Every wanted activation has been seen: the rest of the forward pass is not needed."""


def parse_hook(name: str) -> HookPoint:
    """`blocks.2.hook_resid_post` as a HookPoint.

    Raises:
        UnknownHook: it is not such a name; the message has the sites and the nearest valid name.
    """
    match = _NAME.fullmatch(name)
    if match and match[2] in SITES:
        return HookPoint(int(match[1]), match[2])
    layer = next(iter(re.findall(r"[0-9]{1,4}", name)), "0")
    known = [f"blocks.{int(layer)}.{site}" for site in SITES]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    raise UnknownHook(
        f"{name!r} is not a hook name.",
        why=f"Hooks are named blocks.L.SITE; the sites are {', '.join(SITES)}.",
        fix=f"Did you mean {near[0]!r}?",
    )


def check_hook(lm: LanguageModel, name: str) -> HookPoint:
    """The hook point, if this model has it.

    Raises:
        UnknownHook: the layer is outside the model, or its family has no such site.
    """
    point = parse_hook(name)
    if point.layer >= lm.n_layers:
        raise UnknownHook(
            f"{name!r} is outside {lm.name}.",
            why=f"The model has {lm.n_layers} layers, 0 to {lm.n_layers - 1}.",
            fix=f"The last one is {str(point._replace(layer=lm.n_layers - 1))!r}.",
        )
    if point.site not in lm.layout.taps:
        raise UnknownHook(
            f"{lm.name} has no {name!r}.",
            why=f"In the {lm.layout.family.name} family {point.site} does not exist: {lm.layout.lacks[point.site]}.",
            fix=f"Its sites are {', '.join(lm.layout.taps)}.",
        )
    return point


def hook_names(lm: LanguageModel) -> list[str]:
    """Every hook that this model has, first layer first."""
    return [f"blocks.{layer}.{site}" for layer in range(lm.n_layers) for site in lm.layout.taps]


def hook_width(lm: LanguageModel, name: str) -> int:
    """How many numbers a token has at this hook: d_model, or n_heads · d_head for `attn.hook_z`."""
    point = check_hook(lm, name)
    if point.site != "attn.hook_z":
        return lm.d_model
    projection = lm.layout.blocks[point.layer].get_submodule(lm.layout.taps[point.site].path)
    # nn.Linear and its quantised kin know in_features; GPT-2's Conv1D keeps (in, out) in its weight.
    return int(getattr(projection, "in_features", None) or projection.get_parameter("weight").shape[0])


def check_width(lm: LanguageModel, name: str, d_in: int) -> None:
    """Whether something that reads `d_in` numbers fits a hook.

    Raises:
        WrongShape: it does not; the message has both widths.
    """
    width = hook_width(lm, name)
    if width != d_in:
        raise WrongShape(
            f"The SAE reads {d_in} numbers and {name} of {lm.name} has {width}.",
            fix="Use an SAE that was trained on this model and this hook, or name the hook that it was trained on.",
        )


def activations(
    lm: LanguageModel, input_ids: Tensor, hook_names: Iterable[str], attention_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """The activations at some hooks, from one forward pass that stops after the last of them.

    Args:
        input_ids: (batch, seq).
        hook_names: at least one.
        attention_mask: (batch, seq), 1 where a real token stands.

    Returns:
        For each name (batch, seq, width) in the model's dtype on its device, without gradient. The tensors are the
        model's own: do not write into them.

    Raises:
        UnknownHook: a name is not a hook of this model.
        BadInput: no names; ids outside the vocabulary; more tokens than the model's context.
        WrongShape: ids or mask are not (batch, seq).
    """
    names = list(hook_names)
    if not names:
        raise BadInput("No hook was named.", fix="Name at least one, such as 'blocks.0.hook_resid_post'.")
    points = {name: check_hook(lm, name) for name in names}
    input_ids, attention_mask = lm.check_inputs(input_ids, attention_mask)
    captured = capture(lm.hf, lm.layout, list(points.values()), input_ids, attention_mask)
    return {name: captured[point] for name, point in points.items()}


def capture(
    hf: nn.Module,
    layout: Layout,
    points: Sequence[tuple[int, str]],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
) -> dict[tuple[int, str], Tensor]:
    """As `activations`, for a model that has a layout but is not a LanguageModel yet; nothing is checked."""
    wanted = set(points)
    captured: dict[tuple[int, str], Tensor] = {}

    def keep(point: tuple[int, str]) -> Callable[[Tensor], None]:
        def look(value: Tensor) -> None:
            captured[point] = value
            if len(captured) == len(wanted):
                raise _Reached

        return look

    with ExitStack() as hooks, torch.no_grad():
        for layer, site in wanted:
            hooks.enter_context(tapped(layout, layer, site, keep((layer, site))))
        try:
            hf(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        except _Reached:
            return captured
    missing = ", ".join(str(HookPoint(*point)) for point in sorted(wanted - captured.keys()))
    raise RuntimeError(f"The forward pass ended without reaching {missing}.")


@contextmanager
def edit(lm: LanguageModel, hook_name: str, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While inside, every forward pass has its activation at `hook_name` replaced by `fn(activation)`.

    `fn` gets (batch, seq, width) (with a key-value cache seq is the number of new tokens) and returns the same shape.
    Where it returns its argument unchanged the forward pass is bit-equal to an unedited one. Edits at one hook apply
    in the order in which they were entered. The hook is gone on leaving, whatever happened.

    Raises:
        UnknownHook: the model has no such hook.
        WrongShape: `fn` returned another shape.
        Internal: on leaving without an exception, if no forward pass came by: nothing was edited, and nothing may be
            called edited.
    """
    point = check_hook(lm, hook_name)
    n_fired = 0

    def replace(value: Tensor) -> Tensor:
        nonlocal n_fired
        n_fired += 1
        new = fn(value)
        if new.shape != value.shape:
            raise WrongShape(
                f"The edit at {hook_name} returned a tensor of shape {tuple(new.shape)}.",
                why=f"The activation has shape {tuple(value.shape)}.",
                fix="Return a tensor of the activation's shape.",
            )
        return new.to(value.dtype)

    with tapped(lm.layout, point.layer, point.site, replace):
        yield
    if not n_fired:
        raise Internal(
            f"The edit at {hook_name} never took place.",
            why="No forward pass of the model reached this hook while the edit was installed.",
            fix="Run the model inside the `with`, at least as deep as the hook.",
        )


@contextmanager
def tapped(layout: Layout, layer: int, site: str, fn: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Calls `fn` with each forward pass's activation; what it returns, unless None, takes the activation's place.

    What `edit` and `capture` are made of; checks nothing.
    """
    block, tap = layout.blocks[layer], layout.taps[site]
    module = block.get_submodule(tap.path)
    batch_shape: tuple[int, ...] = ()

    def note_shape(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal batch_shape
        batch_shape = tuple(_input(args, kwargs).shape[:-1])

    def call(value: Tensor) -> Tensor | None:
        # OPT runs its MLP on (batch · seq, width); everybody outside sees (batch, seq, width).
        new = fn(value.view(*batch_shape, value.shape[-1]))
        return None if new is None else new.reshape(value.shape)

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = _input(args, kwargs)
        new = call(value)
        if new is None:
            return None
        if tap.side == "stream":
            # The block holds the same tensor as its residual and adds to it later: a new argument here would reach
            # the norm alone, so the tensor itself is written.
            value.copy_(new)
            return None
        return _with_input(args, kwargs, new)

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        new = call(output[0] if isinstance(output, tuple) else output)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def after_norm(norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        old = _rms_normalized(norm, args[0])
        new = call(old)
        if new is None:
            return None
        gain = norm.get_parameter("weight") + layout.family.gain_offset
        return output + gain * (new - old)  # the difference, so that no change is exactly no change

    handles = [block.register_forward_pre_hook(note_shape, with_kwargs=True)]
    try:
        if tap.side in ("input", "stream"):
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        elif tap.side == "output":
            handles.append(module.register_forward_hook(after))
        else:
            handles.append(module.register_forward_hook(after_norm))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rms_normalized(norm: nn.Module, x: Tensor) -> Tensor:
    """x / rms(x), what an RMSNorm multiplies with its gain (arXiv 1910.07467, equation 4), computed in fp32."""
    eps: Any = next((getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name)), None) or 0.0
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _with_input(args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((value, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": value})
