"""What a sparse autoencoder is: its architecture, sizes and where in which model it belongs.

A config knows the names and shapes of its tensors, and so its size in bytes, from its numbers alone. It knows nothing
of torch, of files (the keys of SAELens's `cfg.json` are in saes/saelens.py) or of training (training_config.py).
"""

from __future__ import annotations

from math import prod
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from mistudio_engine.api.errors import BadInput

__all__ = [
    "DTYPE_BYTES",
    "BatchTopKConfig",
    "Dtype",
    "GatedConfig",
    "JumpReLUConfig",
    "JumpReLUSkipTranscoderConfig",
    "JumpReLUTranscoderConfig",
    "MatryoshkaBatchTopKConfig",
    "Normalization",
    "SAEConfig",
    "SAEConfigBase",
    "SkipTranscoderConfig",
    "StandardConfig",
    "TopKConfig",
    "TopKSkipTranscoderConfig",
    "TopKTranscoderConfig",
    "TranscoderConfig",
    "activation_of",
    "explain",
    "parse_sae_config",
    "sae_bytes",
]

Dtype = Literal["float32", "float64", "float16", "bfloat16"]

DTYPE_BYTES: dict[str, int] = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}

Normalization = Literal[
    "none", "expected_average_only_in", "layer_norm", "constant_norm_rescale", "covariance_whitening"
]
"""SAELens's names. Only layer_norm and constant_norm_rescale do anything when an SAE runs: the scale or the whitening
of the other two must have been folded into the weights before they were saved."""


class SAEConfigBase(BaseModel):
    """What all architectures have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    per_feature: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Names of the tensors with one number per feature."""

    activation: ClassVar[str] = "relu"
    """What makes features sparse: relu, gated, jumprelu, topk or batchtopk. Wirings of one activation share it."""

    architecture: str
    """Which kind of SAE this is."""

    d_in: Annotated[int, Field(gt=0, validation_alias=AliasChoices("d_in", "hidden_dim"))]
    """Width of the activations that go in."""

    d_sae: Annotated[int, Field(gt=0, validation_alias=AliasChoices("d_sae", "latent_dim"))]
    """Number of features."""

    dtype: Dtype = "float32"
    """Type of all tensors."""

    apply_b_dec_to_input: bool = True
    """Whether b_dec is subtracted from the input before encoding. Gemma Scope's SAEs do not."""

    normalize_activations: Normalization = "none"
    """Norm of each token's activations when the SAE runs; undone on the way out."""

    reshape_activations: Literal["none", "hook_z"] = "none"
    """`hook_z`: the input may come as (…, heads, d_head) and is flattened to d_in, the output reshaped back."""

    model_name: str | None = None
    """The language model's name, as TransformerLens and Neuronpedia have it."""

    hook_name: str | None = None
    """Where the input is taken, such as `blocks.6.hook_resid_post`."""

    hook_name_out: str | None = None
    """Where a transcoder's output belongs; None where the output stands for the input."""

    hook_head_index: int | None = None
    """The attention head, if the SAE was trained on one only."""

    prepend_bos: bool | None = None
    """Whether contexts began with BOS in training; None if nobody recorded it."""

    context_size: Annotated[int, Field(gt=0)] | None = None
    """Tokens per context in training."""

    dataset_path: str | None = None
    """The text it was trained on: a hub id or a name."""

    neuronpedia_id: str | None = None
    """Its id on Neuronpedia, if it has one."""

    metadata: dict[str, Any] = {}
    """Everything else that came with it and must survive; what miStudio adds stands under `mistudio`."""

    @property
    def is_transcoder(self) -> bool:
        """Whether the output belongs elsewhere than the input: then b_dec is never subtracted, nor a norm undone."""
        return False

    @property
    def has_skip(self) -> bool:
        """Whether there is a linear path beside the features."""
        return False

    @property
    def output_width(self) -> int:
        """Width of the reconstruction."""
        return self.d_in

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of this SAE by name, with its shape: exactly these are in its file, no more and no fewer."""
        return {
            "W_enc": (self.d_in, self.d_sae),
            "W_dec": (self.d_sae, self.output_width),
            "b_dec": (self.output_width,),
            **{name: (self.d_sae,) for name in self.per_feature},
        }


class StandardConfig(SAEConfigBase):
    """ReLU, made sparse by an L1 penalty."""

    architecture: Literal["standard"] = "standard"


class GatedConfig(SAEConfigBase):
    """One path decides whether a feature is on, a second how strong it is (arXiv 2404.16014)."""

    per_feature: ClassVar[tuple[str, ...]] = ("b_gate", "b_mag", "r_mag")
    activation: ClassVar[str] = "gated"
    architecture: Literal["gated"] = "gated"


class JumpReLUConfig(SAEConfigBase):
    """A feature is on above a threshold of its own (arXiv 2407.14435)."""

    per_feature: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")
    activation: ClassVar[str] = "jumprelu"
    architecture: Literal["jumprelu"] = "jumprelu"


class _WithK(SAEConfigBase):
    k: Annotated[int, Field(gt=0, validation_alias=AliasChoices("k", "top_k_sparsity"))]
    """Features that may be active on one token."""

    @model_validator(mode="after")
    def _k_fits(self) -> _WithK:
        if self.k > self.d_sae:
            raise ValueError(f"k is {self.k} and there are only d_sae = {self.d_sae} features to choose from")
        return self


class TopKConfig(_WithK):
    """The k largest pre-activations of a token, those below zero left out (arXiv 2406.04093)."""

    activation: ClassVar[str] = "topk"
    architecture: Literal["topk"] = "topk"

    rescale_acts_by_decoder_norm: bool = False
    """Choose by pre-activation times decoder norm, and call that the activation. SAEs trained here come out with
    decoder rows of norm 1, where it makes no difference."""


class BatchTopKConfig(_WithK):
    """In training the k largest a token, counted over the whole batch (arXiv 2412.06410); finished, a JumpReLU with
    one threshold for all features."""

    per_feature: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")
    activation: ClassVar[str] = "batchtopk"
    architecture: Literal["batchtopk"] = "batchtopk"

    k: Annotated[int, Field(gt=0, validation_alias=AliasChoices("k", "top_k_sparsity"))]
    """Active features per token, on average."""


class MatryoshkaBatchTopKConfig(BatchTopKConfig):
    """A BatchTopK SAE whose first features have to reconstruct alone, too: nested dictionaries (arXiv 2503.17547)."""

    architecture: Literal["matryoshka_batchtopk"] = "matryoshka_batchtopk"  # pyright: ignore[reportIncompatibleVariableOverride]

    widths: tuple[Annotated[int, Field(gt=0)], ...]
    """Numbers of features of the nested dictionaries, growing; the last one is d_sae."""

    @model_validator(mode="after")
    def _widths_nest(self) -> MatryoshkaBatchTopKConfig:
        if list(self.widths) != sorted(set(self.widths)) or self.widths[-1:] != (self.d_sae,):
            raise ValueError(f"widths {list(self.widths)} have to grow and end with d_sae = {self.d_sae}")
        return self


class _TranscoderBase(SAEConfigBase):
    apply_b_dec_to_input: Literal[False] = False  # pyright: ignore[reportIncompatibleVariableOverride]
    """Never: b_dec lives at the output."""

    d_out: Annotated[int, Field(gt=0)]
    """Width of the activations that it predicts."""

    @property
    def is_transcoder(self) -> bool:
        """True."""
        return True

    @property
    def output_width(self) -> int:
        """Width of the prediction."""
        return self.d_out


class _SkipBase(_TranscoderBase):
    @property
    def has_skip(self) -> bool:
        """True."""
        return True

    @model_validator(mode="after")
    def _reads_and_writes_apart(self) -> _SkipBase:
        if self.hook_name is not None and self.hook_name == self.hook_name_out:
            raise ValueError(
                f"a skip transcoder from {self.hook_name} to itself has a perfect solution without any feature "
                "(the identity on the skip path); give it two hooks, or use an SAE without a skip"
            )
        return self

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """A transcoder's tensors and W_skip (d_out, d_in)."""
        return {**super().tensor_shapes(), "W_skip": (self.d_out, self.d_in)}


class TranscoderConfig(_TranscoderBase):
    """Reads at one hook and predicts another, the MLP's input and output for example (arXiv 2406.11944)."""

    architecture: Literal["transcoder"] = "transcoder"


class SkipTranscoderConfig(_SkipBase):
    """A transcoder with a linear path beside the features (arXiv 2501.18823)."""

    architecture: Literal["skip_transcoder"] = "skip_transcoder"


class JumpReLUTranscoderConfig(_TranscoderBase):
    """A transcoder whose features are on above thresholds of their own."""

    per_feature: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")
    activation: ClassVar[str] = "jumprelu"
    architecture: Literal["jumprelu_transcoder"] = "jumprelu_transcoder"


class JumpReLUSkipTranscoderConfig(_SkipBase):
    """A JumpReLU transcoder with a linear path beside the features."""

    per_feature: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")
    activation: ClassVar[str] = "jumprelu"
    architecture: Literal["jumprelu_skip_transcoder"] = "jumprelu_skip_transcoder"


class TopKTranscoderConfig(_TranscoderBase, _WithK):
    """A transcoder with the k largest pre-activations of a token (arXiv 2501.18823)."""

    activation: ClassVar[str] = "topk"
    architecture: Literal["topk_transcoder"] = "topk_transcoder"

    rescale_acts_by_decoder_norm: bool = False
    """As for TopK."""


class TopKSkipTranscoderConfig(_SkipBase, _WithK):
    """A TopK transcoder with a linear path beside the features (arXiv 2501.18823)."""

    activation: ClassVar[str] = "topk"
    architecture: Literal["topk_skip_transcoder"] = "topk_skip_transcoder"

    rescale_acts_by_decoder_norm: bool = False
    """As for TopK."""


SAEConfig = Annotated[
    StandardConfig
    | GatedConfig
    | JumpReLUConfig
    | TopKConfig
    | BatchTopKConfig
    | MatryoshkaBatchTopKConfig
    | TranscoderConfig
    | SkipTranscoderConfig
    | JumpReLUTranscoderConfig
    | JumpReLUSkipTranscoderConfig
    | TopKTranscoderConfig
    | TopKSkipTranscoderConfig,
    Field(discriminator="architecture"),
]
"""Any of the architectures, told apart by `architecture`."""

_ACTIVATIONS: dict[str, str] = {
    config.model_fields["architecture"].default: config.activation for config in get_args(get_args(SAEConfig)[0])
}

_ANY_CONFIG: TypeAdapter[SAEConfig] = TypeAdapter(SAEConfig)


def activation_of(architecture: str) -> str:
    """What makes an architecture's features sparse: relu, gated, jumprelu, topk or batchtopk.

    Raises:
        KeyError: there is no such architecture.
    """
    return _ACTIVATIONS[architecture]


def explain(error: ValidationError) -> str:
    """Pydantic's findings in one line a person can read: `k: Input should be greater than 0 (got 0)`."""
    findings = []
    for finding in error.errors(include_url=False, include_context=False):
        place = ".".join(str(part) for part in finding["loc"])
        value = "" if isinstance(finding["input"], dict) else f" (got {finding['input']!r:.80})"
        findings.append(f"{place}: {finding['msg'].removeprefix('Value error, ')}{value}".removeprefix(": "))
    return "; ".join(findings) + "."


def parse_sae_config(data: dict[str, Any]) -> SAEConfig:
    """The config that `data` describes.

    Raises:
        BadInput: a missing, unknown or impossible value; names it.
    """
    try:
        return _ANY_CONFIG.validate_python(data)
    except ValidationError as error:
        raise BadInput(
            "This is not the configuration of an SAE.", why=explain(error), fix="Mend the value that is named."
        ) from error


def sae_bytes(cfg: SAEConfigBase) -> int:
    """Bytes of all tensors of this SAE, on disk and in memory."""
    return sum(prod(shape) for shape in cfg.tensor_shapes().values()) * DTYPE_BYTES[cfg.dtype]
