"""What cannot be trained is refused before anything is written: what was wrong, which value, what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mistudio_engine.api.operations import GetDataset
from mistudio_engine.api.records import SAERecord, TokensRecord, TrainingRecord
from mistudio_engine.demo.embedded import DEMO_HOOK
from tests.behaviour.doors import Served
from tests.behaviour.trainings import CALL, SHORT, completed

MLP = {"hook_name": "blocks.2.ln2.hook_normalized", "hook_name_out": "blocks.2.hook_mlp_out"}
NO_K = {name: value for name, value in CALL.items() if name != "k"}


@pytest.fixture(scope="module")
def http(studio: Served) -> Iterator[httpx.Client]:
    with studio.http(headers=studio.headers) as client:
        yield client


def answer(http: httpx.Client, **arguments: Any) -> httpx.Response:
    return http.post("/api/v1/trainings", json={**CALL, **SHORT, **arguments})


def error_of(http: httpx.Client, arguments: dict[str, Any]) -> dict[str, Any]:
    said = http.post("/api/v1/trainings", json=arguments)
    assert 400 <= said.status_code < 500, said.text
    return said.json()["error"]


def things(studio: Served) -> tuple[int, int, int, list[Path]]:
    """All that a training leaves behind."""
    engine = studio.engine
    folders = sorted(path for name in ("trainings", "saes", "jobs") for path in (engine.home / name).iterdir())
    jobs = sum(engine.jobs.counts().values())
    return len(engine.store.all(TrainingRecord)), len(engine.store.all(SAERecord)), jobs, folders


REFUSED: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "k above d_sae": ({"k": 65}, "bad_input", ("k = 65", "d_sae = 64")),
    "k of nothing": ({"k": 0}, "bad_input", ("k = 0", "greater than 0")),
    "a negative coefficient": (
        {"k": None, "architecture": "standard", "l1_coefficient": -1.0},
        "bad_input",
        ("l1_coefficient = -1.0", "greater than or equal to 0"),
    ),
    "a negative penalty": (
        {"k": None, "architecture": "jumprelu", "l0_coefficient": -0.5},
        "bad_input",
        ("l0_coefficient = -0.5",),
    ),
    "a learning rate of nothing": ({"lr": 0}, "bad_input", ("lr = 0", "greater than 0")),
    "a skip transcoder on one hook": (
        {"architecture": "topk_skip_transcoder", "hook_name_out": DEMO_HOOK},
        "bad_input",
        (DEMO_HOOK, "give it two hooks"),
    ),
    "a transcoder without its output": (
        {"architecture": "topk_transcoder"},
        "bad_input",
        ("topk_transcoder", "hook_name_out is missing", "blocks.2.hook_mlp_out"),
    ),
    "an output for an SAE": ({**MLP}, "bad_input", ("hook_name_out", "topk", "topk_transcoder")),
    "a layer that there is not": (
        {"hook_name": "blocks.4.hook_resid_post"},
        "unknown_hook",
        ("blocks.4.hook_resid_post", "0 to 3"),
    ),
    "an output layer that there is not": (
        {**MLP, "architecture": "topk_transcoder", "hook_name_out": "blocks.9.hook_mlp_out"},
        "unknown_hook",
        ("blocks.9.hook_mlp_out",),
    ),
    "no hook": ({"hook_name": "layers.2.mlp"}, "unknown_hook", ("layers.2.mlp", "blocks.2.")),
    "another width": ({"d_in": 65}, "wrong_shape", ("d_in is 65", "64 wide")),
    "an unknown preset": ({"preset": "cosy"}, "bad_input", ("preset = 'cosy'", "'sparse'")),
    "an unknown architecture": ({"architecture": "vanilla"}, "bad_input", ("architecture = 'vanilla'", "'standard'")),
    "an argument that there is not": ({"n_latents": 64}, "bad_input", ("n_latents is not an argument",)),
    "two sizes": ({"expansion": 4}, "bad_input", ("d_sae and expansion", "one of them")),
    "a target that is missing": (
        {"k": None, "architecture": "jumprelu", "l0_penalty": "quadratic"},
        "bad_input",
        ("quadratic", "target_l0"),
    ),
    "a target without its penalty": ({"k": None, "architecture": "jumprelu", "target_l0": 20}, "bad_input", ("both",)),
    "a target above d_sae": (
        {"k": None, "architecture": "jumprelu", "l0_penalty": "quadratic", "target_l0": 65},
        "bad_input",
        ("target_l0=65", "d_sae = 64"),
    ),
    "k for jumprelu": ({"architecture": "jumprelu"}, "bad_input", ("k belongs to topk", "leave it out")),
    "l1 for topk": ({"l1_coefficient": 3.0}, "bad_input", ("l1_coefficient=3.0", "topk", "Leave l1_coefficient out")),
    "aux for standard": (
        {"k": None, "architecture": "standard", "aux_loss_coefficient": 0.5},
        "bad_input",
        ("aux_loss_coefficient=0.5",),
    ),
    "widths for topk": ({"widths": [16, 64]}, "bad_input", ("widths belong to matryoshka",)),
    "widths that do not nest": (
        {"architecture": "matryoshka_batchtopk", "widths": [16, 8, 64]},
        "bad_input",
        ("[16, 8, 64]", "d_sae = 64"),
    ),
    "widths that end elsewhere": (
        {"architecture": "matryoshka_batchtopk", "widths": [16, 32]},
        "bad_input",
        ("[16, 32]", "d_sae = 64"),
    ),
    "widths of nothing": (
        {"architecture": "matryoshka_batchtopk", "widths": []},
        "bad_input",
        ("d_sae = 64",),
    ),
    "a buffer smaller than a batch": ({"buffer_tokens": 256}, "bad_input", ("buffer_tokens (256)", "512")),
    "a buffer smaller than a context": (
        {"buffer_tokens": 100, "batch_size": 64},
        "bad_input",
        ("buffer_tokens = 100", "128 tokens"),
    ),
    "less than a batch": ({"n_tokens": 511}, "bad_input", ("n_tokens (511)", "batch_size (512)")),
    "steps and tokens": ({"num_steps": 4}, "bad_input", ("num_steps and n_tokens",)),
    "a setting given twice": ({"hyperparameters": {"lr": 1e-3}}, "bad_input", ("lr stands both",)),
    "two variants of one name": (
        {"variants": [{"name": "a", "k": 4}, {"name": "a", "k": 8}]},
        "bad_input",
        ("two variants have the same name",),
    ),
    "a variant that takes another's number": (
        {"variants": [{"name": "2", "k": 4}, {"k": 8}]},
        "bad_input",
        ("called alike", "2, 2"),
    ),
    "a variant with a length of its own": (
        {"variants": [{"k": 4, "hyperparameters": {"n_tokens": 4096}}, {"k": 8}]},
        "bad_input",
        ("n_tokens are the same for all SAEs", "in the call"),
    ),
    "a variant with steps of its own": (
        {"variants": [{"k": 4, "hyperparameters": {"num_steps": 4}}, {"k": 8}]},
        "bad_input",
        ("num_steps are the same for all SAEs",),
    ),
    "a variant that is called as the checkpoint's common part": (
        {"variants": [{"name": "training", "k": 4}, {"k": 8}]},
        "bad_input",
        ("'training'", "another name"),
    ),
    "a variant whose folder would be swept": (
        {"variants": [{"name": "a.part", "k": 4}, {"k": 8}]},
        "bad_input",
        ("'a.part'", "another name"),
    ),
    "a variant outside the model": (
        {"variants": [{"name": "deep", "hook_name": "blocks.7.hook_resid_post"}, {"k": 8}]},
        "unknown_hook",
        ("Variant deep", "blocks.7"),
    ),
    "a variant with too many active": (
        {"variants": [{"name": "dense", "k": 400}, {"k": 8}]},
        "bad_input",
        ("Variant dense", "k = 400"),
    ),
    "a variant with a setting of another architecture": (
        {"variants": [{"hyperparameters": {"l1_coefficient": 3.0}}, {"k": 8}]},
        "bad_input",
        ("Variant 1", "l1_coefficient=3.0"),
    ),
    "a variant whose words do not go together": (
        {"variants": [{"name": "odd", "architecture": "jumprelu", "hyperparameters": {"l0_penalty": "quadratic"}}]},
        "bad_input",
        ("Variant odd", "target_l0"),
    ),
    "a setting that no variant has a use for": (
        {"l1_coefficient": 3.0, "variants": [{"k": 4}, {"k": 8}]},
        "bad_input",
        ("l1_coefficient=3.0", "any of the variants", "Leave it out"),
    ),
    "a k that no variant has a use for": (
        {"variants": [{"architecture": "standard"}, {"architecture": "gated"}]},
        "bad_input",
        ("k=8", "any of the variants"),
    ),
    "a name that is taken": ({"name": "first"}, "conflict", ("'first' is taken", "another name")),
    "a name that leaves the folder": ({"name": "../first"}, "bad_input", ("../first",)),
    "a name that would be swept": ({"name": "mine.part"}, "bad_input", ("'mine.part'", "another name")),
    "names that are too long together": (
        {"name": "n" * 100, "variants": [{"name": "m" * 40}, {"k": 4}]},
        "bad_input",
        ("longer than 120", "shorter"),
    ),
    "a cache type without a cache": ({"cache_dtype": "float16"}, "bad_input", ('activations="cached"',)),
    "a folded scale": ({"normalize_activations": "covariance_whitening"}, "bad_input", ("normalize_activations",)),
    "an unknown model": ({"model": "nobody"}, "not_found", ("nobody", "tiny")),
    "an unknown dataset": ({"dataset": "nothing"}, "not_found", ("nothing", "corpus")),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_with_the_value_and_advice_and_leaves_nothing_behind(
    studio: Served, http: httpx.Client, what: str
) -> None:
    arguments, code, words = REFUSED[what]
    given = {name: value for name, value in {**CALL, **SHORT, **arguments}.items() if value is not None}
    before = things(studio)
    error = error_of(http, given)
    assert error["code"] == code
    said = " ".join((error["what"], error["why"], error["fix"]))
    assert [word for word in words if word not in said] == [], said
    assert error["fix"]
    assert "\n" not in said and "pydantic" not in said
    dry = error_of(http, {**given, "dry_run": True})
    assert dry["what"] == error["what"], "a plan is refused for the same reason"
    assert things(studio) == before


def test_text_shorter_than_one_batch_is_refused(studio: Served, http: httpx.Client, tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text(json.dumps({"text": "The cat slept near the river ."}) + "\n")
    completed(studio.engine, GetDataset(source=str(path), name="a-line", model="tiny"))
    before = things(studio)
    error = error_of(http, {**CALL, **SHORT, "dataset": "a-line"})
    assert error["code"] == "empty_data"
    assert "less than one batch of 512" in error["what"] and "batch_size" in error["fix"]
    assert things(studio) == before


def test_text_that_is_short_but_for_its_special_tokens_fails_with_the_number_that_is_left(
    studio: Served, http: httpx.Client, tmp_path: Path
) -> None:
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps({"text": "cat"}) + "\n" for _ in range(200)))
    completed(studio.engine, GetDataset(source=str(path), name="words", model="tiny"))
    (tokens,) = studio.engine.store.all(TokensRecord, dataset="words")
    batch = tokens.n_tokens  # as many as there are, if those between the texts counted
    job = answer(http, dataset="words", batch_size=batch).json()
    ended = studio.engine.jobs.wait(job["slug"], 60)
    assert ended.state == "failed" and ended.error is not None
    assert ended.error.code == "empty_data" and f"less than one batch of {batch}" in ended.error.what


def test_a_dataset_that_was_not_tokenised_is_tokenised_first(
    studio: Served, http: httpx.Client, tmp_path: Path
) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": f"The cat saw {n} dogs ."}) + "\n" for n in range(400)))
    completed(studio.engine, GetDataset(source=str(path), name="raw"))
    job = answer(http, dataset="raw", n_tokens=2048, name="from-raw").json()
    assert studio.engine.jobs.wait(job["slug"], 60).state == "completed"
    assert studio.engine.store.get(TrainingRecord, "from-raw").tokens.startswith("raw-tiny-")


def test_the_words_of_the_documents_are_understood(studio: Served, http: httpx.Client) -> None:
    common = {"model": "tiny", "dataset": "corpus", "hook_name": DEMO_HOOK, "hidden_dim": 64, "latent_dim": 48}
    topk = {
        **common,
        "learning_rate": 1e-3,
        "num_steps": 4,
        "batch_size": 512,
        "buffer_tokens": 4096,
        "top_k_sparsity": 6,
        "checkpoint_interval": 1024,
        "dead_neuron_threshold": 2048,
        "normalize_activations": "layer_norm",
        "name": "in-their-words",
    }
    said = http.post("/api/v1/trainings", json=topk)
    assert said.status_code == 200, said.text
    assert studio.engine.jobs.wait(said.json()["slug"], 60).state == "completed"
    record = studio.engine.store.get(TrainingRecord, "in-their-words")
    config, hp = record.config, record.hyperparameters
    names = ("d_in", "d_sae", "k", "normalize_activations")
    assert [config[name] for name in names] == [64, 48, 6, "layer_norm"]
    names = ("lr", "n_tokens", "checkpoint_interval", "dead_feature_window")
    assert [hp[name] for name in names] == [1e-3, 2048, 1024, 2048]

    standard = {**common, "architecture": "standard", "l1_alpha": 3.5, "num_steps": 40, "resample_steps": 10}
    plan = http.post("/api/v1/trainings", json={**standard, "batch_size": 512, "dry_run": True})
    assert plan.status_code == 200, plan.text
    hp = plan.json()["arguments"]["hyperparameters"]
    assert (hp["l1_coefficient"], hp["n_tokens"], hp["resample_interval"]) == (3.5, 20_480, 5120)


def test_a_sweep_may_differ_in_everything_but_its_length(studio: Served, http: httpx.Client) -> None:
    variants = [
        {"architecture": "standard", "hyperparameters": {"l1_coefficient": 1.0, "lr": 1e-3}, "seed": 5},
        {"architecture": "jumprelu", "preset": "sparse", "hook_name": "blocks.1.hook_resid_post"},
        {"architecture": "topk_transcoder", "k": 4, **MLP},
        {"architecture": "matryoshka_batchtopk", "d_sae": 96, "widths": [24, 96]},
        {"preset": "faithful", "expansion": 2},
        {"architecture": "jumprelu", "hyperparameters": {"l0_penalty": "quadratic", "target_l0": 9}},
    ]
    plan = answer(http, **{**NO_K, "k": 16}, variants=variants, dry_run=True)
    assert plan.status_code == 200, plan.text
    details = plan.json()["plan"]["details"]
    assert [each["architecture"] for each in details["saes"].values()] == [
        "standard", "jumprelu", "topk_transcoder", "matryoshka_batchtopk", "topk", "jumprelu",
    ]  # fmt: skip
    assert [each["d_sae"] for each in details["saes"].values()] == [64, 64, 64, 96, 128, 64]


def test_what_goes_together_may_be_said_half_in_the_call_and_half_in_the_variant(
    studio: Served, http: httpx.Client
) -> None:
    quadratic = {"architecture": "jumprelu", "l0_penalty": "quadratic", "target_l0": 20}
    variants = [{"hyperparameters": {"target_l0": 5}}, {"hyperparameters": {"l0_coefficient": 2.0}}]
    said = http.post("/api/v1/trainings", json={**NO_K, **SHORT, **quadratic, "variants": variants, "name": "halves"})
    assert studio.engine.jobs.wait(said.json()["slug"], 60).state == "completed"
    members = studio.engine.store.get(TrainingRecord, "halves").members
    settings = [(each.hyperparameters["target_l0"], each.hyperparameters["l0_coefficient"]) for each in members]
    assert settings == [(5, 1.0), (20, 2.0)]
