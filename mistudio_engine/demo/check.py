"""Has a dictionary found what the embedded corpus knows? Scores its features on text that nobody has trained on.

It loads the embedded model and an SAE from a folder and reads them with the grammar's masks. It knows neither engine
nor client, and nothing of how the dictionary was made.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mistudio_engine.demo.concepts import CONCEPTS, Concept
from mistudio_engine.demo.embedded import HELD_OUT_SEED, corpus, model_folder
from mistudio_engine.demo.masks import concept_mask
from mistudio_engine.demo.truth import ConceptScore, areas_of, concept_scores, mean_ranks
from mistudio_engine.models.hooks import activations
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.saes import load_sae

__all__ = ["FOUND_AT", "HeldOut", "carriers", "check_concepts", "held_out_tokens"]

FOUND_AT = 0.95
"""A concept counts as found above this AUROC on held-out text."""

N_DOCUMENTS = 240
"""Half of them choose features and fit probes, the other half scores."""

CONTEXT = 128


class HeldOut(NamedTuple):
    """Held-out text, token by token; BOS left out."""

    sae_in: Tensor
    """(n_tokens, d_in) activations at the hook."""

    masks: Tensor
    """bool (n_tokens, n_concepts)"""

    document: Tensor
    """(n_tokens,) which document a token is of."""


def held_out_tokens(lm: LanguageModel, hook_name: str, n_documents: int = N_DOCUMENTS) -> HeldOut:
    """Activations of the held-out corpus at a hook, with the concepts of each token."""
    sae_in, masks, document = [], [], []
    for number, text in enumerate(corpus(n_documents, HELD_OUT_SEED)):
        encoded = lm.tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True)
        ids = [lm.bos_token_id, *encoded["input_ids"]][:CONTEXT]
        sae_in.append(activations(lm, torch.tensor([ids]), [hook_name])[hook_name][0, 1:])
        masks.append(concept_mask(text, encoded["offset_mapping"])[: len(ids) - 1])
        document.append(torch.full((len(ids) - 1,), number))
    return HeldOut(torch.cat(sae_in), torch.cat(masks), torch.cat(document))


@torch.no_grad()
def check_concepts(folder: Path, hook_name: str, n_documents: int = N_DOCUMENTS) -> list[ConceptScore]:
    """Score every known concept against the SAE in a folder, trained on the embedded model at `hook_name`."""
    lm = LanguageModel.load(model_folder(), name="embedded")
    held_out = held_out_tokens(lm, hook_name, n_documents)
    feature_acts = load_sae(folder).encode(held_out.sae_in)
    with torch.enable_grad():  # the probes are fitted
        return concept_scores(feature_acts, held_out.sae_in, held_out.masks, held_out.document % 2 == 0)


@torch.no_grad()
def carriers(folder: Path, hook_name: str) -> list[tuple[Concept, set[int]]]:
    """The concepts that single features of the SAE in a folder carry, with those features, on held-out text.

    A concept is there if the feature that was chosen for it on half of the documents is found to carry it on the other
    half; the features beside it are those that do so there, too.
    """
    held_out = held_out_tokens(LanguageModel.load(model_folder(), name="embedded"), hook_name)
    acts = load_sae(folder).encode(held_out.sae_in)
    choosing = held_out.document % 2 == 0
    ranks, other_ranks = mean_ranks(acts[choosing]), mean_ranks(acts[~choosing])
    found = []
    for concept, mask in zip(CONCEPTS, held_out.masks.T, strict=True):
        chosen = int(areas_of(ranks, mask[choosing]).argmax())
        carrying = set((areas_of(other_ranks, mask[~choosing]) > FOUND_AT).nonzero().squeeze(1).tolist())
        if chosen in carrying:
            found.append((concept, carrying))
    return found
