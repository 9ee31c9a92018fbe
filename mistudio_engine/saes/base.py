"""What all sparse autoencoders have in common: tensors checked against a config, norms, encode, decode.

A module is stateless: `sae(x)` normalises and un-normalises in one call, and `decode(f, like=x)` takes the input again
where undoing the norm needs it. It is used for running and for training alike. It does not know its architecture's
activation (one file each beside this), files (saelens.py, native.py) or language models: activations come as tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mistudio_engine.api.errors import BadInput, WrongShape
from mistudio_engine.api.sae_config import SAEConfig

__all__ = ["SAE", "Norm", "check_tensors"]

_LAYER_NORM_EPS = 1e-5
"""SAELens adds it to the standard deviation on the way in, not on the way out."""

_TINY = 1e-12
"""An all-zero token has no norm to divide by: it stays zero instead of becoming NaN."""


class Norm(NamedTuple):
    """How one token's activations were normalised: x = z · scale + shift."""

    shift: Tensor | None
    """(…, 1), or None for no shift."""

    scale: Tensor
    """(…, 1)."""


class SAE(nn.Module, ABC):
    """A sparse autoencoder, or a transcoder.

    Args:
        cfg: what it is; its architecture has to be this class's.
        tensors: one for each of `cfg.tensor_shapes()`, used as they are without copying; None for zeros.

    Raises:
        WrongShape: a tensor is missing, is one too many, or has another shape.

    Shapes: W_enc (d_in, d_sae); W_dec (d_sae, d_in), so that a feature's direction is a **row**; b_dec (d_in,). A
    transcoder's W_dec and b_dec have d_out in place of d_in; a skip path is W_skip (d_out, d_in).
    """

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def __init__(self, cfg: SAEConfig, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.cfg = cfg
        self.notes: tuple[str, ...] = ()
        """What the loader had to assume, one sentence each, for people to read."""
        dtype = getattr(torch, cfg.dtype)
        shapes = cfg.tensor_shapes()
        if tensors is None:
            # W_enc lies in memory by feature, like W_dec: the gradient of a few features is then whole rows.
            tensors = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
            tensors["W_enc"] = torch.zeros(cfg.d_sae, cfg.d_in, dtype=dtype).T
        check_tensors(cfg, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        for name in shapes:
            self.register_parameter(name, nn.Parameter(tensors[name].to(dtype), requires_grad=False))

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the tensors; inputs are converted to it."""
        return self.W_dec.dtype

    def encode(self, x: Tensor) -> Tensor:
        """Activations of all features.

        Args:
            x: (…, d_in); with `reshape_activations="hook_z"` also (…, heads, d_head).

        Returns:
            (…, d_sae), none negative.
        """
        return self.encode_normalized(self.normalize(self._flat(x))[0])[0]

    def feature_acts(self, x: Tensor, features: Tensor) -> Tensor:
        """Activations of some features only, at the cost of those where the architecture allows.

        Args:
            x: as for `encode`.
            features: (n,) indices.

        Returns:
            (…, n).
        """
        return self.encode_normalized(self.normalize(self._flat(x))[0], features)[0]

    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The active features of each token, without the zeros between them.

        Args:
            x: (n, d_in).

        Returns:
            values (n, k) and indices (n, k), in no order; k is TopK's k, else the most that are active on one token
            here (at least 1). A value of 0 means nothing is active in that place, whatever its index.
        """
        feature_acts = self.encode(x)
        k = max(1, int((feature_acts > 0).sum(-1).max())) if feature_acts.numel() else 1
        top = torch.topk(feature_acts, k, dim=-1, sorted=False)
        return top.values, top.indices

    def decode(self, feature_acts: Tensor, like: Tensor | None = None) -> Tensor:
        """The reconstruction that feature activations stand for; a skip path is **not** in it (as in SAELens).

        Args:
            feature_acts: (…, d_sae).
            like: the input that was encoded; needed with a run-time norm, and for an output shaped like a hook_z input.

        Returns:
            (…, d_in), or `like`'s shape; a transcoder's is (…, d_out).

        Raises:
            BadInput: the norm cannot be undone without `like`.
        """
        sae_out = self.reconstruct(feature_acts)
        if self.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale") and not self.cfg.is_transcoder:
            if like is None:
                raise BadInput(
                    f"This SAE normalises each token ({self.cfg.normalize_activations}), so decode() needs the input.",
                    fix="Call decode(feature_acts, like=x) with the x that was encoded.",
                )
            _, norm = self.normalize(self._flat(like))
            sae_out = sae_out * norm.scale if norm.shift is None else sae_out * norm.scale + norm.shift
        return sae_out if like is None or not self._is_split(like) else sae_out.reshape(like.shape)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x, in x's shape; a transcoder's prediction of its output hook (…, d_out), to which a
        skip path adds what it carries over from the input as it came."""
        if self.cfg.is_transcoder:
            sae_out = self.decode(self.encode(x))
            skip = self.skip(self._flat(x).to(self.dtype))
            return sae_out if skip is None else sae_out + skip
        return self.decode(self.encode(x), like=x)

    def normalize(self, x: Tensor) -> tuple[Tensor, Norm]:
        """x (…, d_in) under the run-time norm that the config names, and what undoes it."""
        x = x.to(self.dtype)
        match self.cfg.normalize_activations:
            case "layer_norm":
                mean = x.mean(dim=-1, keepdim=True)
                centred = x - mean
                # The unbiased standard deviation, as in SAELens; std() itself warns about an empty batch.
                std = centred.norm(dim=-1, keepdim=True) / max(1, self.cfg.d_in - 1) ** 0.5
                return centred / (std + _LAYER_NORM_EPS), Norm(mean, std)
            case "constant_norm_rescale":
                scale = x.norm(dim=-1, keepdim=True) / self.cfg.d_in**0.5
                return x / scale.clamp_min(_TINY), Norm(None, scale)
            case _:
                return x, Norm(None, x.new_ones(()))

    @abstractmethod
    def encode_normalized(self, z: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Feature activations and pre-activations of inputs that are normalised already.

        Args:
            z: (…, d_in).
            features: only these; None for all.

        Returns:
            feature_acts and hidden_pre, both (…, d_sae) or (…, n).
        """

    def reconstruct(self, feature_acts: Tensor) -> Tensor:
        """The reconstruction in normalised space, (…, d_out)."""
        return feature_acts @ self.W_dec + self.b_dec

    def skip(self, z: Tensor) -> Tensor | None:
        """z·W_skipᵀ, (…, d_out); None where there is no skip path."""
        return z @ self.get_parameter("W_skip").T if self.cfg.has_skip else None

    def centre(self, z: Tensor) -> Tensor:
        """z − b_dec where the architecture subtracts it."""
        return z - self.b_dec if self.cfg.apply_b_dec_to_input else z

    def of(self, name: str, features: Tensor | None) -> Tensor:
        """A per-feature tensor, or W_enc, restricted to some features."""
        tensor = getattr(self, name)
        return tensor if features is None else tensor[..., features]

    def _is_split(self, x: Tensor) -> bool:
        return self.cfg.reshape_activations == "hook_z" and x.shape[-1] != self.cfg.d_in

    def _flat(self, x: Tensor) -> Tensor:
        if self._is_split(x) and x.dim() >= 2 and x.shape[-1] * x.shape[-2] == self.cfg.d_in:
            return x.flatten(-2)
        if x.shape[-1] != self.cfg.d_in:
            raise WrongShape(
                f"Activations of width {x.shape[-1]} do not fit an SAE with d_in = {self.cfg.d_in}.",
                why=f"It was made for {self.cfg.hook_name or 'an unnamed hook'} of {self.cfg.model_name or 'a model'}.",
                fix="Use the hook and the model that it was trained on.",
            )
        return x


def check_tensors(cfg: SAEConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that are not exactly those of the config.

    Args:
        cfg: what the SAE should be.
        shapes: the tensors that there are, by name.

    Raises:
        WrongShape: names the tensors, and says when the weights look transposed.
    """
    expected = cfg.tensor_shapes()
    missing, extra = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    if missing or extra:
        said = [f"{word} {', '.join(names)}" for word, names in (("lacks", missing), ("also has", extra)) if names]
        raise WrongShape(
            f"These are not the tensors of a {cfg.architecture} SAE: it {' and '.join(said)}.",
            why=f"A {cfg.architecture} SAE has exactly {', '.join(expected)}.",
            fix="Check that the config's architecture is the one these weights were saved from.",
        )
    for name, shape in expected.items():
        if tuple(shapes[name]) != shape:
            turned = tuple(shapes[name]) == shape[::-1]
            raise WrongShape(
                f"{name} has the shape {tuple(shapes[name])}, expected {shape}.",
                why="It looks transposed: features are the columns of W_enc and the rows of W_dec."
                if turned
                else f"The config says d_in = {cfg.d_in}, d_sae = {cfg.d_sae}, output {cfg.output_width}.",
                fix="Fix the config, or convert the weights.",
            )
