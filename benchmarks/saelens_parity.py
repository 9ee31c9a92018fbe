"""Whether SAELens loads what we save, and computes the same with it.

    python benchmarks/saelens_parity.py make FOLDER        with miStudio: random SAEs of every kind, inputs and outputs
    PEER/bin/python benchmarks/saelens_parity.py check FOLDER   with sae-lens 6.54 in an environment of its own

The two share files only. It exits with 1 when an active set differs, or a value by more than 1e-5 of 1 or of itself.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TOLERANCE = 1e-5


def make(root: Path) -> None:
    """One folder an architecture and setting, written by save_sae, with an io.safetensors beside."""
    from mistudio_engine.api.sae_config import parse_sae_config
    from mistudio_engine.saes import new_sae, save_sae

    d_in, d_sae = 48, 192
    transcoder = {"d_out": 40, "hook_name_out": "blocks.3.hook_mlp_out"}
    cases = {
        "standard": {},
        "standard_layer_norm": {"architecture": "standard", "normalize_activations": "layer_norm"},
        "standard_constant_norm": {"architecture": "standard", "normalize_activations": "constant_norm_rescale"},
        "standard_hook_z": {
            "architecture": "standard",
            "reshape_activations": "hook_z",
            "hook_name": "blocks.3.attn.hook_z",
        },
        "gated": {},
        "jumprelu": {},
        "jumprelu_no_bdec": {"architecture": "jumprelu", "apply_b_dec_to_input": False},
        "topk": {"k": 12},
        "topk_rescale": {"architecture": "topk", "k": 12, "rescale_acts_by_decoder_norm": True},
        "transcoder": transcoder,
        "skip_transcoder": transcoder,
        "jumprelu_transcoder": transcoder,
        "jumprelu_skip_transcoder": transcoder,
    }
    generator = torch.Generator().manual_seed(0)
    for name, more in cases.items():
        common = {"architecture": name, "d_in": d_in, "d_sae": d_sae, "hook_name": "blocks.3.hook_resid_post"}
        cfg = parse_sae_config({**common, "model_name": "gpt2-small", "prepend_bos": True, **more})
        tensors = {key: torch.randn(shape, generator=generator) * 0.3 for key, shape in cfg.tensor_shapes().items()}
        if "threshold" in tensors:
            tensors["threshold"] = tensors["threshold"].abs()
        sae = new_sae(cfg, tensors)
        x = torch.randn(4, 16, d_in, generator=generator) * 2
        if "hook_z" in name:
            x = x.view(4, 16, 6, d_in // 6)
        folder = save_sae(sae, root / name, sparsity=torch.rand(d_sae, generator=generator), replace=True)
        save_file({"x": x, "feature_acts": sae.encode(x), "sae_out": sae(x)}, folder / "io.safetensors")
    print(f"{len(cases)} folders in {root}")


def check(root: Path) -> bool:
    """Load every folder with SAELens and compare; prints one line each."""
    warnings.simplefilter("ignore")
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    all_equal = True
    for folder in sorted(path.parent for path in root.glob("*/io.safetensors")):
        io = load_file(folder / "io.safetensors")
        sae = SAE.load_from_disk(folder)
        with torch.no_grad():
            feature_acts, sae_out = sae.encode(io["x"]), sae(io["x"])
        same_set = torch.equal(feature_acts > 0, io["feature_acts"] > 0)
        acts_error, out_error = _error(feature_acts, io["feature_acts"]), _error(sae_out, io["sae_out"])
        equal = same_set and max(acts_error, out_error) <= TOLERANCE and sae.cfg.metadata.model_name == "gpt2-small"
        all_equal &= equal
        print(f"{folder.name:26} {'equal' if equal else 'DIFFERS'}  acts {acts_error:.1e}  out {out_error:.1e}")
    return all_equal


def _error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(((ours - theirs).abs() / theirs.abs().clamp_min(1)).max())


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("make", "check"):
        sys.exit(__doc__)
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    elif not check(Path(sys.argv[2])):
        sys.exit(1)
