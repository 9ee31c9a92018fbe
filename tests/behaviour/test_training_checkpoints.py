"""A training is extended, its checkpoints are kept, and the same call makes the same bits."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from mistudio_engine import __version__
from mistudio_engine.api.errors import BadInput, Conflict, CorruptFile, NotFound
from mistudio_engine.api.operations import (
    ControlJob,
    EvalSAE,
    ExtendTraining,
    FeaturesOnText,
    KeepCheckpoint,
    RetryTraining,
    TrainingCheckpoints,
)
from mistudio_engine.api.records import ModelRecord, SAERecord, TokensRecord, TrainingRecord
from mistudio_engine.api.sae_config import parse_sae_config
from mistudio_engine.api.training_config import Hyperparameters
from mistudio_engine.handlers.resources import language_model, open_tokens
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.saes import load_sae
from mistudio_engine.training import ActivationStream, LiveActivations, Member, Trainer
from mistudio_engine.training import train as train_members
from mistudio_engine.training.checkpoints import restore_checkpoint, save_checkpoint
from tests.behaviour.trainings import (
    assert_same_bits,
    completed,
    endless,
    history,
    running,
    tensors,
    train,
    training_of,
)

MORE = 6144


@pytest.fixture(scope="module")
def extended(engine: Engine) -> dict[str, Tensor]:
    """`grown`: trained, then extended; the tensors of before."""
    completed(engine, train(name="grown", seed=7))
    before = tensors(engine, "grown")
    job = completed(engine, ExtendTraining(training="grown", n_tokens=MORE))
    assert job.result is not None and job.result["slug"] == "grown-2"
    return before


def test_an_extended_training_is_the_one_that_hands_would_have_made(
    engine: Engine, extended: dict[str, Tensor], tmp_path: Path
) -> None:
    record = training_of(engine, "grown")
    made = engine.compute.run(lambda: by_hand(engine, record, tmp_path))
    theirs = tensors(engine, "grown-2")
    assert all(torch.equal(tensor, theirs[f"sae_weights/{name}"]) for name, tensor in made.items())
    assert any(not torch.equal(tensor, theirs[name]) for name, tensor in extended.items())


def by_hand(engine: Engine, record: TrainingRecord, root: Path) -> dict[str, Tensor]:
    """Train as long as the record's first job did, then go on with a longer run in mind."""
    (member,) = record.members
    packed = open_tokens(engine, engine.store.get(TokensRecord, record.tokens))
    n_held_out = 2  # of 128 tokens each, to evaluate on 256
    n_tokens, folder, made = 8192, None, None
    with language_model(engine, "tiny") as lm:
        for total in (n_tokens, n_tokens + MORE):
            hp = Hyperparameters(**{**member.hyperparameters, "n_tokens": total})
            hook = record.hook_name
            source = LiveActivations(lm, packed, [hook], len(packed) - n_held_out)
            stream = ActivationStream(
                source, [hook], batch_size=hp.batch_size, buffer_tokens=hp.buffer_tokens, seed=member.seed
            )
            made = Member("sae", Trainer(parse_sae_config(member.config), hp, member.seed), hook)
            if folder is not None:
                stream.restore(restore_checkpoint(folder, [made]))
            drain(train_members([made], stream))
            folder = save_checkpoint(root, [made], stream)
    assert made is not None
    sae = made.finished_sae(stream)
    return {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}


def drain(work: Generator[Any, Any, Any]) -> None:
    for _ in work:
        pass


def test_the_saes_of_before_stay_and_the_record_knows_both(engine: Engine, extended: dict[str, Tensor]) -> None:
    assert_same_bits(tensors(engine, "grown"), extended)
    record = training_of(engine, "grown")
    assert record.saes == ["grown", "grown-2"] and len(record.jobs) == 2
    assert record.hyperparameters["n_tokens"] == 8192 + MORE
    assert history(engine, "grown") == [5120, 8192, 10_240, 14_336], "one history for both"
    assert {engine.store.get(SAERecord, slug).training for slug in record.saes} == {"grown"}
    with pytest.raises(Conflict, match="was extended since"):
        retry_the_first_job(engine, record)


def retry_the_first_job(engine: Engine, record: TrainingRecord) -> None:
    """As after a cancelled first job: it must not begin anew over what the extension has made."""
    from mistudio_engine.handlers.training import run_train_sae
    from mistudio_engine.runtime.attempt import JobContext
    from mistudio_engine.runtime.job_book import rebuilt

    job = engine.jobs.get(record.jobs[0])
    next(run_train_sae(rebuilt(job), engine, JobContext(job, engine.home, engine.bus.publish)))


def test_a_plan_says_what_an_extension_costs_and_starts_nothing(engine: Engine, extended: dict[str, Tensor]) -> None:
    plan = engine.call(ExtendTraining(training="grown", n_tokens=4096, dry_run=True)).plan
    assert plan is not None and "for 4,096 more tokens" in plan.summary
    assert plan.details["n_tokens"] == 4096
    assert len(training_of(engine, "grown").jobs) == 2


def test_what_runs_or_never_began_is_not_extended(engine: Engine) -> None:
    with running(engine, endless(name="under-way")) as job:
        with pytest.raises(Conflict, match="is running"):
            engine.call(ExtendTraining(training="under-way", n_tokens=1024))
        engine.jobs.control(job.slug, "pause")
        assert engine.jobs.wait(job.slug, 10).state == "paused"
        with pytest.raises(Conflict, match="is paused"):
            engine.call(ExtendTraining(training="under-way", n_tokens=1024))
        with pytest.raises(NotFound):
            engine.call(ExtendTraining(training="nobody", n_tokens=1024))
        waiting = engine.call(endless(name="never-began"))
        engine.call(ControlJob(job=waiting.slug, action="cancel"))
    engine.jobs.wait(waiting.slug, 10)
    with pytest.raises(NotFound, match="no checkpoint to go on from"):
        engine.call(ExtendTraining(training="never-began", n_tokens=1024))


def test_a_cancelled_extension_can_be_made_once_more(engine: Engine) -> None:
    completed(engine, train(name="twice"))
    with running(engine, ExtendTraining(training="twice", n_tokens=50_000_000), n_tokens=16_384):
        pass
    assert training_of(engine, "twice").status == "cancelled"
    assert training_of(engine, "twice").saes == ["twice"]
    completed(engine, ExtendTraining(training="twice", n_tokens=1024))
    record = training_of(engine, "twice")
    assert record.saes == ["twice", "twice-2"] and len(record.jobs) == 3


@pytest.fixture(scope="module")
def judged(engine: Engine) -> str:
    """A training with many checkpoints."""
    completed(engine, train(name="judged", n_tokens=16_384, checkpoint_interval=1024, keep_checkpoints=3))
    return "judged"


def test_the_newest_checkpoints_and_the_best_are_there(engine: Engine, judged: str) -> None:
    rows = engine.call(TrainingCheckpoints(training=judged)).rows
    assert [row.step for row in rows[:3]] == [32, 30, 28]
    assert len(rows) <= 4
    scores = {row.name: row.score for row in rows}
    assert all(score is not None for score in scores.values())
    (best,) = [row for row in rows if row.is_best]
    assert best.score == min(scores.values())
    assert all(row.n_bytes > 0 and row.members == ["sae"] for row in rows)
    folders = sorted(path.name for path in (engine.home / "trainings" / judged / "checkpoints").iterdir())
    assert folders == sorted(scores)


def test_the_best_checkpoint_stays_however_many_come_after_it(engine: Engine) -> None:
    rising = {"lr": 0.3, "lr_warm_up_fraction": 1.0, "lr_decay_fraction": 0.0}  # learns at first, spoils it later
    completed(engine, train(name="spoilt", n_tokens=32_768, checkpoint_interval=1024, keep_checkpoints=1, **rising))
    rows = engine.call(TrainingCheckpoints(training="spoilt")).rows
    assert [row.is_best for row in rows] == [False, True]
    assert rows[0].step == 64 > rows[1].step
    kept = engine.call(KeepCheckpoint(training="spoilt", checkpoint="best"))
    assert kept.slug == f"spoilt-step-{rows[1].step}"
    of_best, of_last = (completed(engine, EvalSAE(sae=sae, n_tokens=4096)).result for sae in (kept.slug, "spoilt"))
    assert of_best is not None and of_last is not None
    assert of_best["fvu"] < of_last["fvu"]


def test_the_last_checkpoint_is_what_training_ended_with(engine: Engine, judged: str) -> None:
    kept = engine.call(KeepCheckpoint(training=judged, checkpoint="last", name="the-last"))
    assert_same_bits(tensors(engine, "the-last"), tensors(engine, judged))
    assert (kept.training, kept.model, kept.hook_name) == (judged, "tiny", "blocks.2.hook_resid_post")
    ours, theirs = (json.loads((engine.home / "saes" / name / "cfg.json").read_text()) for name in ("the-last", judged))
    assert ours == theirs
    assert engine.call(FeaturesOnText(sae="the-last", text="The cat saw three dogs .")).rows


def test_a_checkpoint_is_kept_by_its_name(engine: Engine, judged: str) -> None:
    name = engine.call(TrainingCheckpoints(training=judged)).rows[1].name
    kept = engine.call(KeepCheckpoint(training=judged, checkpoint=name))
    assert kept.slug == f"{judged}-step-30"
    assert any(
        not torch.equal(one, other)
        for one, other in zip(tensors(engine, kept.slug).values(), tensors(engine, judged).values(), strict=True)
    )
    again = engine.call(KeepCheckpoint(training=judged, checkpoint=name))
    assert again.slug == f"{judged}-step-30-2", "a name that was not chosen gives way"


def test_a_checkpoint_that_there_is_not_is_named_with_those_that_there_are(engine: Engine, judged: str) -> None:
    with pytest.raises(NotFound, match="step-000000002") as refused:
        engine.call(KeepCheckpoint(training=judged, checkpoint="step-000000002"))
    assert "step-000000032" in refused.value.why and refused.value.next_call is not None
    with pytest.raises(ValueError, match="checkpoint"):
        KeepCheckpoint(training=judged, checkpoint="../../models")
    with pytest.raises(Conflict, match="taken"):
        engine.call(KeepCheckpoint(training=judged, checkpoint="last", name="first"))


def test_a_damaged_checkpoint_is_not_kept(engine: Engine) -> None:
    completed(engine, train(name="damaged", checkpoint_interval=4096))
    newest = engine.call(TrainingCheckpoints(training="damaged")).rows[0]
    path = engine.home / "trainings" / "damaged" / "checkpoints" / newest.name / "sae" / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match="damaged") as refused:
        engine.call(KeepCheckpoint(training="damaged", checkpoint="last", name="from-damage"))
    assert refused.value.fix
    assert not engine.store.exists(SAERecord, "from-damage")
    assert not (engine.home / "saes" / "from-damage").exists()


def test_of_a_sweep_it_has_to_be_said_which_sae(engine: Engine) -> None:
    variants = [{"name": "narrow", "d_sae": 32}, {"name": "wide", "d_sae": 96}]
    completed(engine, train(name="pair", variants=variants))
    with pytest.raises(BadInput, match="say which") as refused:
        engine.call(KeepCheckpoint(training="pair", checkpoint="last"))
    assert "narrow, wide" in refused.value.fix
    with pytest.raises(BadInput, match="No member 'tall'"):
        engine.call(KeepCheckpoint(training="pair", checkpoint="last", member="tall"))
    kept = engine.call(KeepCheckpoint(training="pair", checkpoint="last", member="wide"))
    assert (kept.slug, kept.d_sae) == ("pair-step-16-wide", 96)
    assert_same_bits(tensors(engine, kept.slug), tensors(engine, "pair-wide"))


def test_a_name_that_is_promised_to_an_sae_is_not_given_away(engine: Engine) -> None:
    variants = [{"name": "one"}, {"name": "two", "k": 4}]
    with running(engine, endless(name="promise", variants=variants)):
        with pytest.raises(Conflict, match=r"'promise-two' is taken: training/promise"):
            engine.call(train(name="promise-two"))
        with pytest.raises(Conflict, match="promised"):
            engine.call(KeepCheckpoint(training="judged", checkpoint="last", name="promise-one"))


def test_a_completed_training_is_not_retried_and_a_cancelled_one_begins_anew(engine: Engine) -> None:
    completed(engine, train(name="fine", seed=3))
    with pytest.raises(BadInput, match="nothing to retry"):
        engine.call(RetryTraining(training="fine"))
    with running(engine, train(name="second-try", seed=3, n_tokens=2_048_000), n_tokens=5120):
        pass
    job = engine.call(RetryTraining(training="second-try"))
    assert job.attempt == 2
    engine.call(ControlJob(job=job.slug, action="cancel"))
    assert engine.jobs.wait(job.slug, 10).state == "cancelled"


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "topk": {},
    "batchtopk": {"architecture": "batchtopk"},
    "jumprelu": {"architecture": "jumprelu", "k": None},
    "gated": {"architecture": "gated", "k": None},
    "topk_skip_transcoder": {
        "architecture": "topk_skip_transcoder",
        "hook_name": "blocks.2.ln2.hook_normalized",
        "hook_name_out": "blocks.2.hook_mlp_out",
    },
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_call_makes_the_same_bits(engine: Engine, architecture: str) -> None:
    one, other = (completed(engine, train(seed=11, **ARCHITECTURES[architecture])) for _ in range(2))
    assert one.result is not None and other.result is not None
    assert one.result["slug"] != other.result["slug"]
    assert_same_bits(tensors(engine, one.result["slug"]), tensors(engine, other.result["slug"]))


def test_another_seed_makes_others(engine: Engine) -> None:
    one, other = (completed(engine, train(seed=seed)).result for seed in (1, 2))
    assert one is not None and other is not None
    assert not torch.equal(*(tensors(engine, sae["slug"])["sae_weights/W_dec"] for sae in (one, other)))


def test_an_sae_carries_what_is_needed_to_make_it_again(engine: Engine) -> None:
    completed(engine, train(name="with-papers", seed=5))
    folder = engine.home / "saes" / "with-papers"
    papers = json.loads((folder / "cfg.json").read_text())["metadata"]["mistudio"]
    model = engine.store.get(ModelRecord, "tiny")
    tokens = engine.store.get(TokensRecord, training_of(engine, "with-papers").tokens)
    assert papers["mistudio"] == __version__
    assert (papers["torch"], papers["transformers"]) == (torch.__version__, transformers.__version__)
    assert papers["seed"] == papers["training"]["seed"] == 5
    assert papers["n_threads"] == engine.compute.run(torch.get_num_threads)
    assert papers["model"]["sha256"] == model.sha256 and len(model.sha256) == 64
    assert papers["tokens"] == {"dataset": "corpus", "sha256": tokens.sha256, "bos_policy": tokens.bos_policy}
    assert papers["training"]["hyperparameters"]["n_tokens"] == papers["training"]["n_tokens"] == 8192
    assert load_sae(folder).cfg.metadata["mistudio"] == papers
