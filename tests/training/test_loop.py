"""One stream feeds several trainings as it would feed each alone; signals are obeyed, and what happens is reported."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from training_data import (
    D_IN,
    HOOK,
    HOOK_OUT,
    Synthetic,
    alone,
    config,
    member,
    packed,
    run,
    settings,
    sparse_activations,
    stream_for,
    transcoded,
)

from mistudio_engine.api.errors import Cancelled, JobFailed
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.saes import ARCHITECTURES, SAE
from mistudio_engine.training import ActivationStream, LiveActivations, Member, Trainer, train
from mistudio_engine.training.loop import Stream
from mistudio_engine.training.trainer import StepMetrics

ALL = sorted(ARCHITECTURES)
METRICS = {*StepMetrics._fields, "tokens_per_second", "n_tokens", "memory_bytes"}


def two_hooks(batch_size: int = 32) -> Synthetic:
    return Synthetic({HOOK: sparse_activations(320) * 5, HOOK_OUT: transcoded(320) * 2}, batch_size)


def finish(job: Generator[Progress, Signal | None, dict[str, SAE]]) -> tuple[list[Progress], dict[str, SAE]]:
    """All that a job yields, and what it returns."""
    seen = []
    while True:
        try:
            seen.append(next(job))
        except StopIteration as end:
            return seen, end.value


def logged(progress: list[Progress]) -> list[dict[str, float]]:
    return [step.metrics for step in progress if step.metrics]


def tensors(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in trainer.sae.named_parameters()}


def assert_same_weights(ours: Trainer, theirs: Trainer) -> None:
    for name, weight in tensors(ours).items():
        assert torch.equal(weight, tensors(theirs)[name]), name


class Keeper:
    """A checkpoint function that remembers when it was called, and takes two steps of its own."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bool]] = []
        self.heard: list[Signal | None] = []

    def __call__(
        self, members: Sequence[Member], stream: Stream, urgent: bool
    ) -> Generator[Progress, Signal | None, None]:
        self.calls.append((max(each.trainer.n_steps_done for each in members), urgent))
        for stage in ("evaluating", "writing"):
            self.heard.append((yield Progress(stage=stage)))


# Several at once


def test_several_members_train_exactly_as_each_alone() -> None:
    def trainer(place: int) -> Trainer:
        more = {"resample_interval": 160, "dead_feature_window": 96} if ALL[place] == "standard" else {}
        return Trainer(config(ALL[place]), settings(log_interval=7, **more), seed=place)

    together = [member(trainer(place), name) for place, name in enumerate(ALL)]
    progress, saes = finish(train(together, two_hooks()))
    assert list(saes) == ALL
    for place, each in enumerate(together):
        single = trainer(place)
        own, sae = run(alone(single, two_hooks()))
        assert_same_weights(each.trainer, single)
        assert saes[each.name].cfg == sae.cfg
        for ours, theirs in zip(logged(progress), logged(own), strict=True):
            for name in StepMetrics._fields:
                assert ours[f"{each.name}/{name}"] == theirs[name]
    expected = {f"{name}/{metric}" for name in ALL for metric in StepMetrics._fields}
    assert set(logged(progress)[0]) == expected | {"tokens_per_second", "n_tokens", "memory_bytes"}


def test_one_forward_pass_of_a_model_feeds_members_of_several_hooks(lm: LanguageModel) -> None:
    hooks = [HOOK, HOOK_OUT, "blocks.0.hook_resid_post"]

    def stream(names: Sequence[str]) -> ActivationStream:
        source = LiveActivations(lm, packed(), names)
        return ActivationStream(source, names, batch_size=32, buffer_tokens=160, seed=5)

    def members() -> list[Member]:
        hp = settings()
        return [
            Member("early", Trainer(config("topk"), hp), hooks[2]),
            Member("late", Trainer(config("batchtopk"), hp, seed=1), HOOK),
            Member("mlp", Trainer(config("skip_transcoder"), hp, seed=2), hooks[2], HOOK_OUT),
        ]

    together = members()
    _, saes = finish(train(together, stream(hooks)))
    for each, single in zip(together, members(), strict=True):
        used = [name for name in (single.hook_name, single.hook_name_out) if name]
        finish(train([single], stream(used)))
        assert_same_weights(each.trainer, single.trainer)
    assert {name: (sae.cfg.hook_name, sae.cfg.hook_name_out) for name, sae in saes.items()} == {
        "early": (hooks[2], None),
        "late": (HOOK, None),
        "mlp": (hooks[2], HOOK_OUT),
    }
    assert {sae.cfg.model_name for sae in saes.values()} == {"tiny"}
    assert (saes["late"].cfg.prepend_bos, saes["late"].cfg.context_size) == (True, 10)


@pytest.mark.parametrize("architecture", [name for name in ALL if "transcoder" in name])
def test_a_transcoder_takes_its_target_from_the_other_hook(architecture: str) -> None:
    stream = two_hooks()
    trainer = Trainer(config(architecture), settings(n_tokens=32 * 200, lr=5e-3))
    progress, sae = run(alone(trainer, stream))
    assert logged(progress)[-1]["fvu"] < 0.5 * logged(progress)[0]["fvu"]
    assert trainer.target_scaling.scale != trainer.scaling.scale
    x, y = stream.buffer[HOOK], stream.buffer[HOOK_OUT]
    assert float((sae(x) - y).pow(2).sum()) < 0.7 * float((y - y.mean(0)).pow(2).sum())
    assert float((sae(x) - x).pow(2).sum()) > 0.7 * float((x - x.mean(0)).pow(2).sum())


def spoilt(how: str) -> Trainer:
    """A trainer that is going to diverge."""
    hp = settings(n_tokens=32 * 40)
    if how == "rate":
        return Trainer(config("topk"), hp.model_copy(update={"lr": 1e6}))
    trainer = Trainer(config("topk"), hp)
    trainer.sae.get_parameter("W_enc").data[3, 7] = math.nan
    return trainer


@pytest.mark.parametrize("how", ["rate", "weights"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_member_that_diverges_is_left_behind_and_the_others_finish_as_without_it(place: int, how: str) -> None:
    def good(seed: int) -> Trainer:
        return Trainer(config("standard"), settings(n_tokens=32 * 40, log_interval=1), seed)

    members = [member(good(1), "a"), member(good(2), "b")]
    bad = member(spoilt(how), "bad")
    members.insert(place, bad)
    progress, saes = finish(train(members, two_hooks()))
    assert sorted(saes) == ["a", "b"]
    assert bad.failure is not None
    assert bad.failure.fix
    assert bad.trainer.n_steps_done < 40
    assert len(bad.trainer.warnings) == 1
    assert bad.trainer.warnings[0].startswith("bad goes on no further.")
    assert progress[-1].fraction == 1
    names = set(logged(progress)[-1])
    assert "a/loss" in names
    assert not any(name.startswith("bad/") for name in names)
    for seed, each in ((1, "a"), (2, "b")):
        single = good(seed)
        run(alone(single, two_hooks()))
        assert_same_weights(next(m.trainer for m in members if m.name == each), single)


def test_when_all_have_diverged_the_training_fails() -> None:
    members = [member(spoilt("weights"), "a"), member(spoilt("weights"), "b")]
    with pytest.raises(JobFailed, match="diverged"):
        finish(train(members, two_hooks()))
    with pytest.raises(JobFailed, match="diverged") as raised:
        run(alone(spoilt("rate"), two_hooks()))
    assert "lower lr" in raised.value.fix


# What is reported


def test_progress_has_every_metric_and_ends_at_one() -> None:
    trainer = Trainer(config("topk"), settings(log_interval=7))
    progress, _ = run(alone(trainer, stream_for(trainer)))
    metrics = logged(progress)
    assert [each["n_tokens"] for each in metrics] == [7 * 32, 14 * 32, 20 * 32]
    assert all(set(each) == METRICS for each in metrics)
    assert all(math.isfinite(value) for each in metrics for value in each.values())
    assert all(each["tokens_per_second"] > 0 for each in metrics)
    assert all(each["memory_bytes"] > 1 << 20 for each in metrics)
    fractions = [step.fraction for step in progress]
    assert fractions == sorted(fractions)
    assert progress[-1].fraction == 1
    assert progress[-1].eta_seconds == 0
    assert {step.unit for step in progress} == {"tokens"}
    assert not any(step.checkpointed for step in progress)


def test_a_trainer_that_is_done_is_finished_without_another_batch() -> None:
    trainer = Trainer(config("topk"), settings())
    run(alone(trainer, stream_for(trainer)))
    before = {name: weight.clone() for name, weight in tensors(trainer).items()}
    stream = stream_for(trainer)
    progress, sae = run(alone(trainer, stream))
    assert (progress, stream.at) == ([], 0)
    assert all(torch.equal(weight, before[name]) for name, weight in tensors(trainer).items())
    assert sae.cfg.metadata["mistudio"]["training"]["n_tokens"] == 640


# Signals and checkpoints


def test_stop_keeps_a_usable_sae() -> None:
    trainer = Trainer(config("topk"), settings(log_interval=1))
    job = alone(trainer, stream_for(trainer))
    next(job)
    with pytest.raises(StopIteration) as end:
        job.send(Signal.STOP)
    (sae,) = end.value.value.values()
    assert sae.cfg.metadata["mistudio"]["training"]["n_tokens"] == 32
    assert bool(sae(sparse_activations(8)).isfinite().all())


def test_stop_leaves_a_checkpoint_so_that_the_training_can_be_extended() -> None:
    keeper, trainer = Keeper(), Trainer(config("topk"), settings(log_interval=1))
    job = alone(trainer, stream_for(trainer), checkpoint=keeper)
    next(job)
    next(job)
    step = job.send(Signal.STOP)
    stages = [step.stage, *(each.stage for each in job)]
    assert stages == ["evaluating", "writing", "checkpoint"]
    assert keeper.calls == [(2, True)]
    assert trainer.n_steps_done == 2


def test_stop_right_after_a_checkpoint_writes_no_second_one() -> None:
    keeper, trainer = Keeper(), Trainer(config("topk"), settings(log_interval=1))
    job = alone(trainer, stream_for(trainer), checkpoint=keeper)
    next(job)
    seen = job.send(Signal.CHECKPOINT)
    while not seen.checkpointed:
        seen = next(job)
    with pytest.raises(StopIteration):
        job.send(Signal.STOP)
    assert keeper.calls == [(1, True)]


def test_stop_in_the_middle_of_a_checkpoint_is_passed_on_and_obeyed_after_it() -> None:
    keeper, trainer = Keeper(), Trainer(config("topk"), settings(log_interval=1, checkpoint_interval=32))
    job = alone(trainer, stream_for(trainer), checkpoint=keeper)
    next(job)
    assert next(job).stage == "evaluating"
    assert job.send(Signal.STOP).stage == "writing"
    assert next(job).checkpointed
    with pytest.raises(StopIteration):
        next(job)
    assert keeper.heard == [Signal.STOP, None]
    assert keeper.calls == [(1, False)]
    assert trainer.n_steps_done == 1


def test_stopping_before_the_first_step_leaves_nothing_to_keep() -> None:
    class Slow(Synthetic):
        def batches(self) -> Any:
            while True:
                yield None

    keeper = Keeper()
    job = alone(Trainer(config("topk"), settings()), Slow(sparse_activations(32), 32), checkpoint=keeper)
    first = next(job)
    assert (first.stage, first.fraction, first.metrics) == ("running the model", 0, None)
    with pytest.raises(Cancelled, match="before its first step"):
        job.send(Signal.STOP)
    assert keeper.calls == []


def test_checkpoints_are_written_when_told_and_at_intervals() -> None:
    keeper, trainer = Keeper(), Trainer(config("topk"), settings(log_interval=1, checkpoint_interval=5 * 32))
    job = alone(trainer, stream_for(trainer), checkpoint=keeper)
    next(job)
    told = [job.send(Signal.CHECKPOINT), next(job), next(job)]
    assert [step.stage for step in told] == ["evaluating", "writing", "checkpoint"]
    assert [step.checkpointed for step in told] == [False, False, True]
    assert {step.fraction for step in told} == {1 / 20}
    steps = [(trainer.n_steps_done, step.checkpointed) for step in job]
    assert [n for n, checkpointed in steps if checkpointed] == [5, 10, 15, 20]
    assert keeper.calls == [(1, True), (5, False), (10, False), (15, False), (20, False)]


def test_an_interval_that_is_no_multiple_of_the_batch_is_kept_on_average() -> None:
    keeper, trainer = Keeper(), Trainer(config("topk"), settings(checkpoint_interval=100))
    finish(alone(trainer, stream_for(trainer), checkpoint=keeper))
    assert [n for n, _ in keeper.calls] == [4, 7, 10, 13, 16, 19, 20]


def test_without_an_interval_there_is_one_at_the_end_and_without_a_function_none_is_claimed() -> None:
    keeper, trainer = Keeper(), Trainer(config("topk"), settings())
    assert trainer.hp.checkpoint_interval is None
    finish(alone(trainer, stream_for(trainer), checkpoint=keeper))
    assert keeper.calls[-1] == (20, False)
    other = Trainer(config("topk"), settings(log_interval=1))
    job = alone(other, stream_for(other))
    next(job)
    assert not job.send(Signal.CHECKPOINT).checkpointed
    assert not any(step.checkpointed for step in job)


def test_metrics_come_before_the_checkpoint_of_their_step() -> None:
    keeper, trainer = Keeper(), Trainer(config("topk"), settings(checkpoint_interval=32 * 10))
    progress, _ = finish(alone(trainer, stream_for(trainer), checkpoint=keeper))
    at = [i for i, step in enumerate(progress) if step.checkpointed]
    before = [[step.metrics["n_tokens"] for step in progress[:i] if step.metrics][-1] for i in at]
    assert before == [320, 640]


def test_a_checkpoint_that_fails_ends_the_training_with_its_error() -> None:
    def broken(*_: Any) -> Generator[Progress, Signal | None, None]:
        yield Progress(stage="writing")
        raise OSError("no disk")

    trainer = Trainer(config("topk"), settings(log_interval=1))
    job = alone(trainer, stream_for(trainer), checkpoint=broken)
    next(job)
    job.send(Signal.CHECKPOINT)
    with pytest.raises(OSError, match="no disk"):
        next(job)


def test_the_scaling_is_estimated_on_the_first_activations_only() -> None:
    stream = two_hooks()
    trainer = Trainer(config("standard"), settings())
    job = alone(trainer, stream)
    next(job)
    scale = trainer.scaling.scale
    assert float((stream.buffer[HOOK] * scale).norm(dim=1).mean()) == pytest.approx(math.sqrt(D_IN), rel=1e-5)
    stream.buffer[HOOK] = stream.buffer[HOOK] * 10
    finish(job)
    assert trainer.scaling.scale == scale
