"""An interrupted training ends as an undisturbed one, bit for bit, and a damaged checkpoint is passed over."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_data import (
    D_SAE,
    HOOK,
    HOOK_OUT,
    alone,
    config,
    member,
    packed,
    run,
    settings,
    sparse_activations,
    stream_for,
)

from mistudio_engine.api.errors import BadInput, CorruptFile, JobFailed, NotFound, Unsupported
from mistudio_engine.api.training_config import Hyperparameters
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.saes import ARCHITECTURES
from mistudio_engine.training import (
    ActivationStream,
    LiveActivations,
    Member,
    Trainer,
    checkpoints,
    latest_good,
    restore_checkpoint,
    save_checkpoint,
    train,
)
from mistudio_engine.training.checkpoints import read_state, write_state

ALL = sorted(ARCHITECTURES)
FILES = [f"{folder}/{file}" for folder in ("sae", "training") for file in ("state.safetensors", "state.json")]

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{name}, {path}": (name, {"path": path, "dead_feature_window": 64}) for name in ALL for path in ("dense", "sparse")
}
RESAMPLED = {"resample_interval": 96, "dead_feature_window": 32, "lr": 0.03}
RUNS |= {
    f"{name}, resampled": (name, RESAMPLED | {"l1_coefficient": 50}) for name in ("standard", "gated", "transcoder")
}
RUNS |= {
    "jumprelu, resampled": ("jumprelu", RESAMPLED | {"jumprelu_init_threshold": 0.3}),
    "jumprelu, tanh": ("jumprelu", {"l0_penalty": "tanh", "pre_act_loss_coefficient": 0.1, "dead_feature_window": 64}),
    "standard, centred": ("standard", {"centre_inputs": True}),
    "topk, in micro-batches": ("topk", {"micro_batch_size": 12, "dead_feature_window": 64}),
    "batchtopk, in micro-batches": ("batchtopk", {"micro_batch_size": 12, "dead_feature_window": 64}),
    "skip_transcoder, in micro-batches": ("skip_transcoder", {"micro_batch_size": 5}),
    "standard, from dense to sparse": ("standard", {"l1_coefficient": 60, "lr": 0.01}),
    "topk, bfloat16": ("topk", {"precision": "bf16", "dead_feature_window": 64}),
    "batchtopk, bfloat16": ("batchtopk", {"precision": "bf16", "dead_feature_window": 64}),
}


def a_trainer(name: str, seed: int = 5) -> Trainer:
    architecture, more = RUNS[name]
    wide = {"d_sae": 320} if "from dense" in name else {}
    return Trainer(config(architecture, **wide), settings(log_interval=1, **more), seed=seed)


def a_stream(lm: LanguageModel, batch_size: int = 32) -> ActivationStream:
    source = LiveActivations(lm, packed(), [HOOK, HOOK_OUT])
    return ActivationStream(source, [HOOK, HOOK_OUT], batch_size=batch_size, buffer_tokens=160, seed=5)


def to_the_end(members: list[Member], stream: Any) -> dict[str, Any]:
    job = train(members, stream)
    while True:
        try:
            next(job)
        except StopIteration as end:
            return end.value


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.sae.named_parameters()}


def assert_same_state(ours: Trainer, theirs: Trainer) -> None:
    """Whatever decides the next step, bit for bit."""
    for name, weight in weights_of(theirs).items():
        assert torch.equal(weights_of(ours)[name], weight), name
    for name, leaf in theirs._leaves.items():
        moments = theirs.optimizer.state.get(leaf, {})
        assert ours.optimizer.state.get(ours._leaves[name], {}).keys() == moments.keys()
        for key, moment in moments.items():
            assert torch.equal(ours.optimizer.state[ours._leaves[name]][key], moment), (name, key)
    assert torch.equal(ours.tokens_since_fired, theirs.tokens_since_fired)
    assert torch.equal(ours.n_fired, theirs.n_fired)
    assert torch.equal(ours.generator.get_state(), theirs.generator.get_state())
    assert ours.paths.state() == theirs.paths.state()
    assert (ours.n_counted, ours.n_steps_done) == (theirs.n_counted, theirs.n_steps_done)
    assert (ours.batch_threshold, ours.forecast) == (theirs.batch_threshold, theirs.forecast)
    for scaling, other in ((ours.scaling, theirs.scaling), (ours.target_scaling, theirs.target_scaling)):
        assert scaling.scale == other.scale
        assert (scaling.mean is None) == (other.mean is None)
        assert scaling.mean is None or torch.equal(scaling.mean, other.mean)


# Going on where it stood


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_training_is_bit_identical(lm: LanguageModel, tmp_path: Path, name: str) -> None:
    undisturbed = a_trainer(name)
    expected = to_the_end([member(undisturbed)], a_stream(lm))["sae"]
    for stop_at in (0, 1, 7, 13, 19):
        first, stream = member(a_trainer(name)), a_stream(lm)
        job = train([first], stream)
        while first.trainer.n_steps_done < stop_at:
            next(job)
        folder = save_checkpoint(tmp_path / f"at {stop_at}", [first], stream)
        for _ in range(3):  # what happens between the checkpoint and the kill is lost
            next(job, None)
        job.close()

        second, stream = member(a_trainer(name, seed=6)), a_stream(lm)
        stream.restore(restore_checkpoint(folder, [second]))
        assert second.trainer.n_steps_done == stop_at
        resumed = to_the_end([second], stream)["sae"]
        assert_same_state(second.trainer, undisturbed)
        for (key, ours), theirs in zip(resumed.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(ours, theirs), key
        assert resumed.cfg == expected.cfg
        assert second.trainer.density is not None
        assert undisturbed.density is not None
        assert torch.equal(second.trainer.density, undisturbed.density)


def test_the_runs_above_do_what_their_names_say(lm: LanguageModel) -> None:
    for name in RUNS:
        trainer = a_trainer(name)
        before, n_dead, sparse = trainer.generator.get_state(), 0, set()
        for _ in train([member(trainer)], a_stream(lm)):
            n_dead = max(n_dead, int(trainer.dead.sum()))
            sparse.add(trainer.paths.rows_at_once(1 << 20, torch.device("cpu")) == 1 << 20)
        drew = not torch.equal(trainer.generator.get_state(), before)
        assert drew == ("resampled" in name), name
        if "from dense to sparse" in name:
            assert sparse == {False, True}
        if trainer.cfg.activation in ("topk", "batchtopk"):
            assert n_dead > 0, name  # AuxK takes part


def two_members() -> list[Member]:
    hp = settings(log_interval=1, dead_feature_window=64)
    return [member(Trainer(config("topk"), hp, 1), "a"), member(Trainer(config("jumprelu_transcoder"), hp, 2), "b")]


@pytest.mark.parametrize("stop_at", [1, 11])
def test_two_members_at_once_go_on_bit_for_bit(lm: LanguageModel, tmp_path: Path, stop_at: int) -> None:
    undisturbed = two_members()
    to_the_end(undisturbed, a_stream(lm))
    first, stream = two_members(), a_stream(lm)
    job = train(first, stream)
    while first[0].trainer.n_steps_done < stop_at:
        next(job)
    folder = save_checkpoint(tmp_path, first, stream)
    assert sorted(each.name for each in folder.iterdir()) == ["a", "b", "training"]
    second, stream = two_members(), a_stream(lm)
    stream.restore(restore_checkpoint(folder, second[::-1]))  # the order does not matter
    to_the_end(second, stream)
    for ours, theirs in zip(second, undisturbed, strict=True):
        assert_same_state(ours.trainer, theirs.trainer)


def test_a_member_that_had_diverged_stays_behind(lm: LanguageModel, tmp_path: Path) -> None:
    def members() -> list[Member]:
        hp = settings(log_interval=1, n_tokens=32 * 60)
        wild = hp.model_copy(update={"lr": 1e6})
        return [member(Trainer(config("topk"), wild, 1), "wild"), member(Trainer(config("topk"), hp, 2), "tame")]

    undisturbed = members()
    assert list(to_the_end(undisturbed, a_stream(lm))) == ["tame"]
    first, stream = members(), a_stream(lm)
    job = train(first, stream)
    while first[1].trainer.n_steps_done < 45:
        next(job)
    assert first[0].failure is not None
    folder = save_checkpoint(tmp_path, first, stream)
    assert folder.name == "step-000000045"

    second, stream = members(), a_stream(lm)
    stream.restore(restore_checkpoint(folder, second))
    assert isinstance(second[0].failure, JobFailed)
    assert str(second[0].failure) == str(first[0].failure)
    assert second[0].trainer.n_steps_done == first[0].trainer.n_steps_done < 45
    assert second[1].failure is None
    assert list(to_the_end(second, stream)) == ["tame"]
    assert_same_state(second[1].trainer, undisturbed[1].trainer)
    assert_same_state(second[0].trainer, first[0].trainer)


@pytest.mark.parametrize("architecture", ALL)
def test_centred_trainings_can_be_saved(tmp_path: Path, architecture: str) -> None:
    trainer = Trainer(config(architecture), settings(centre_inputs=True))
    stream = stream_for(trainer)
    run(alone(trainer, stream))
    again = Trainer(config(architecture), settings(centre_inputs=True))
    restore_checkpoint(save_checkpoint(tmp_path, [member(trainer)], stream), [member(again)])
    assert_same_state(again, trainer)
    assert again.finished_sae().cfg == trainer.finished_sae().cfg


@pytest.mark.parametrize("architecture", ALL)
def test_a_training_can_be_extended_with_more_tokens(tmp_path: Path, architecture: str) -> None:
    def trainer(**more: Any) -> Trainer:
        return Trainer(config(architecture), settings(dead_feature_window=200, **more))

    first = trainer(log_interval=3)
    stream = stream_for(first)
    run(alone(first, stream))
    assert first.is_done
    folder = save_checkpoint(tmp_path, [member(first)], stream)
    second = trainer(n_tokens=960, log_interval=5, checkpoint_interval=64, keep_checkpoints=5, eval_tokens=0)
    stream = stream_for(second)
    stream.restore(restore_checkpoint(folder, [member(second)]))
    assert_same_state(second, first)
    assert not second.is_done
    progress, sae = run(alone(second, stream))
    assert [step.metrics["n_tokens"] for step in progress if step.metrics] == [25 * 32, 30 * 32]
    assert second.is_done
    assert stream.at == 30
    assert sae.cfg.metadata["mistudio"]["training"]["n_tokens"] == 960


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": 2e-3}, r"another setting.*lr was 0\.001 there and is 0\.002 here"),
        ({"batch_size": 64}, "batch_size was 32 there and is 64"),
        ({"path": "dense"}, "path was 'auto' there and is 'dense'"),
        ({"micro_batch_size": 8}, "micro_batch_size was None there and is 8"),
        ({"centre_inputs": True}, "centre_inputs was None there and is True"),
        ({"lr": 2e-3, "n_tokens": 9600}, "lr was"),
    ],
)
def test_a_training_of_other_settings_is_not_gone_on_with(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    trainer = Trainer(config("topk"), settings())
    trainer.step(sparse_activations(32))
    trainer.save_state(tmp_path / "state")
    other = Trainer(config("topk"), settings(**change))
    before = weights_of(other)
    with pytest.raises(BadInput, match=said):
        other.restore(tmp_path / "state")
    assert all(torch.equal(p, before[name]) for name, p in weights_of(other).items())
    with pytest.raises(BadInput, match=r"another SAE config.*d_sae was 48 there and is 50"):
        Trainer(config("topk", d_sae=50), settings()).restore(tmp_path / "state")


def test_a_checkpoint_of_other_members_is_refused_with_their_names(tmp_path: Path) -> None:
    members = two_members()
    folder = save_checkpoint(tmp_path, members, stream_for(members[0].trainer))
    with pytest.raises(BadInput, match=r"It has a, b; this one has a\."):
        restore_checkpoint(folder, members[:1])
    with pytest.raises(BadInput, match=r"It has a, b; this one has a, b, c\."):
        restore_checkpoint(folder, [*members, member(Trainer(config("topk"), settings()), "c")])


def test_micro_batches_that_memory_asked_for_are_remembered(tmp_path: Path) -> None:
    trainer = Trainer(config("standard"), settings())
    trainer.step(sparse_activations(32))
    trainer.micro_batch_size = 8
    trainer.save_state(tmp_path / "state")
    again = Trainer(config("standard"), Hyperparameters(**trainer.hp.model_dump()))
    again.restore(tmp_path / "state")
    assert again.micro_batch_size == 8


# On disk


def test_a_checkpoint_is_the_same_bytes_for_the_same_state(lm: LanguageModel, tmp_path: Path) -> None:
    def written(root: Path) -> dict[str, bytes]:
        members, stream = two_members(), a_stream(lm)
        to_the_end(members, stream)
        folder = save_checkpoint(root, members, stream, score=0.25)
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    assert written(tmp_path / "a") == written(tmp_path / "b")


def three_checkpoints(root: Path, scores: tuple[float | None, ...] = (None, None, None), keep: int = 3) -> Trainer:
    trainer = Trainer(config("topk"), settings())
    for score in scores:
        trainer.step(sparse_activations(32))
        save_checkpoint(root, [member(trainer)], stream_for(trainer), keep=keep, score=score)
    return trainer


def cut(content: bytes) -> bytes:
    return content[:-3]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def empty(_: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [cut, flip, empty, None])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_found(
    tmp_path: Path, file: str, damage: Callable[[bytes], bytes] | None
) -> None:
    three_checkpoints(tmp_path)
    newest = tmp_path / "step-000000003"
    if damage is None:
        (newest / file).unlink()
    else:
        (newest / file).write_bytes(damage((newest / file).read_bytes()))
    fresh = Trainer(config("topk"), settings())
    with pytest.raises((CorruptFile, NotFound)):
        restore_checkpoint(newest, [member(fresh)])
    assert fresh.n_steps_done == 0
    latest = latest_good(tmp_path)
    assert latest.folder == tmp_path / "step-000000002"
    assert len(latest.warnings) == 1
    assert "step-000000003 was passed over" in latest.warnings[0]
    assert restore_checkpoint(latest.folder, [member(fresh)]) == {"at": 0}
    assert fresh.n_steps_done == 2


@pytest.mark.parametrize("folder", ["sae", "training"])
def test_a_checkpoint_without_one_of_its_states_is_passed_over(tmp_path: Path, folder: str) -> None:
    three_checkpoints(tmp_path)
    shutil.rmtree(tmp_path / "step-000000003" / folder)
    latest = latest_good(tmp_path)
    assert latest.folder == tmp_path / "step-000000002"
    assert "step-000000003 was passed over" in latest.warnings[0]


def test_when_every_checkpoint_is_damaged_each_is_named(tmp_path: Path) -> None:
    three_checkpoints(tmp_path)
    for folder in tmp_path.iterdir():
        (folder / "sae/state.safetensors").write_bytes(b"")
    latest = latest_good(tmp_path)
    assert latest.folder is None
    assert ["step-00000000" in warning for warning in latest.warnings] == [True] * 3


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    three_checkpoints(tmp_path)
    folder = tmp_path / "step-000000003"
    good = {file: (folder / file).read_bytes() for file in FILES}
    generator = torch.Generator().manual_seed(0)
    for file, content in good.items():
        for at in torch.randint(len(content), (40,), generator=generator).tolist():
            damaged = bytearray(content)
            damaged[at] ^= 1 << (at % 8)
            (folder / file).write_bytes(damaged)
            same = file.endswith("json") and is_json(damaged) and json.loads(bytes(damaged)) == json.loads(content)
            assert latest_good(tmp_path).folder != folder or same
        (folder / file).write_bytes(content)
    assert latest_good(tmp_path) == (folder, [])


def is_json(content: bytearray) -> bool:
    try:
        json.loads(bytes(content))
    except ValueError:
        return False
    return True


def test_there_may_be_no_checkpoint(tmp_path: Path) -> None:
    assert latest_good(tmp_path / "nowhere") == (None, [])
    (tmp_path / "step-000000001.part").mkdir()
    (tmp_path / "notes").mkdir()
    assert latest_good(tmp_path) == (None, [])
    assert checkpoints.checkpoints(tmp_path) == []


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    three_checkpoints(tmp_path, scores=(None,) * 6, keep=2)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step-000000005", "step-000000006"]


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ((0.5, 0.2, 0.4, 0.3, 0.3), [2, 4, 5]),
        ((0.5, 0.4, 0.3, 0.2, 0.1), [4, 5]),
        ((None, 0.9, None, None, None), [2, 4, 5]),
        ((0.1, None, 0.0, None, None), [3, 4, 5]),
    ],
)
def test_the_best_checkpoint_stays_beside_the_newest(
    tmp_path: Path, scores: tuple[float | None, ...], kept: list[int]
) -> None:
    three_checkpoints(tmp_path, scores, keep=2)
    found = checkpoints.checkpoints(tmp_path)
    assert [each.step for each in found] == kept[::-1]
    assert {each.step: each.score for each in found} == {step: scores[step - 1] for step in kept}
    assert {each.members for each in found} == {("sae",)}


def test_a_damaged_checkpoint_is_listed_without_a_score_and_does_not_count_as_the_best(tmp_path: Path) -> None:
    trainer = three_checkpoints(tmp_path, scores=(0.1, 0.2, 0.3))
    (tmp_path / "step-000000001/training/state.json").write_bytes(b"{")
    assert [(each.step, each.score) for each in checkpoints.checkpoints(tmp_path)] == [(3, 0.3), (2, 0.2), (1, None)]
    trainer.step(sparse_activations(32))
    save_checkpoint(tmp_path, [member(trainer)], stream_for(trainer), keep=1, score=0.4)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step-000000002", "step-000000004"]


def test_the_same_step_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    trainer = three_checkpoints(tmp_path)
    save_checkpoint(tmp_path, [member(trainer)], stream_for(trainer), keep=3, score=0.5)
    found = checkpoints.checkpoints(tmp_path)
    assert [(each.step, each.score) for each in found] == [(3, 0.5), (2, None), (1, None)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_never_saved_and_leave_the_earlier_checkpoint(
    tmp_path: Path, bad: float
) -> None:
    trainer = three_checkpoints(tmp_path)
    trainer.step(sparse_activations(32))
    trainer.sae.get_parameter("W_dec").data[3, 2] = bad
    with pytest.raises(BadInput, match=r"W_dec has NaN or infinite values.*never saved"):
        save_checkpoint(tmp_path, [member(trainer)], stream_for(trainer))
    assert latest_good(tmp_path) == (tmp_path / "step-000000003", [])
    assert sorted(folder.name for folder in tmp_path.iterdir()) == [f"step-00000000{i}" for i in (1, 2, 3)]


@pytest.mark.parametrize("version", [1, 3])
def test_a_checkpoint_of_another_version_is_refused_clearly(
    tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_VERSION", version)
        three_checkpoints(tmp_path)
    folder = tmp_path / "step-000000003"
    with pytest.raises(Unsupported, match=f"has version {version}; this miStudio reads version 2"):
        restore_checkpoint(folder, [member(Trainer(config("topk"), settings()))])
    latest = latest_good(tmp_path)
    assert latest.folder is None
    assert len(latest.warnings) == 3


def test_a_checkpoint_of_one_file_as_the_first_version_wrote_it_is_passed_over(tmp_path: Path) -> None:
    trainer = Trainer(config("topk"), settings())
    trainer.step(sparse_activations(32))
    trainer.save_state(tmp_path / "step-000000001")
    latest = latest_good(tmp_path)
    assert latest.folder is None
    assert "step-000000001 was passed over" in latest.warnings[0]


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.long), "c": torch.zeros(0)}
    write_state(tmp_path / "state", tensors, {"x": [1, None, "two"]})
    state = read_state(tmp_path / "state")
    assert state.values == {"x": [1, None, "two"]}
    assert state.tensors.keys() == tensors.keys()
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in tensors.items())


def test_a_state_is_exactly_what_a_trainer_needs(tmp_path: Path) -> None:
    trainer = Trainer(config("batchtopk"), settings())
    trainer.step(sparse_activations(32))
    trainer.save_state(tmp_path / "state")
    tensors = read_state(tmp_path / "state").tensors
    trained = ("W_enc", "W_dec", "b_dec", "b_enc")
    expected = {"tokens_since_fired", "n_fired", "generator", *(f"sae.{name}" for name in (*trained, "threshold"))}
    expected |= {f"adam.{name}.{key}" for name in trained for key in ("step", "exp_avg", "exp_avg_sq")}
    assert tensors.keys() == expected
    assert tensors["adam.W_enc.exp_avg"].shape == (D_SAE, 16)  # by feature, as it lies in memory
