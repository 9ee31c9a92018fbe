"""An interrupted training ends as an undisturbed one, bit for bit, and a damaged checkpoint is passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_data import HOOK, config, packed, run, settings, sparse_activations

from mistudio_engine.api.errors import BadInput, CorruptFile, NotFound, Unsupported
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.training import ActivationStream, Trainer, latest_good, save_checkpoint, train

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("topk", {"dead_feature_window": 64}),
    "topk dense": ("topk", {"dead_feature_window": 64, "topk_path": "dense"}),
    "standard": ("standard", {}),
    "standard with resampling": (
        "standard",
        {"resample_interval": 96, "dead_feature_window": 32, "l1_coefficient": 50},
    ),
    "gated": ("gated", {}),
    "jumprelu": ("jumprelu", {}),
}


def a_run(lm: LanguageModel, name: str, seed: int = 5) -> tuple[Trainer, ActivationStream]:
    architecture, more = RUNS[name]
    hp = settings(log_interval=1, **more)
    stream = ActivationStream(lm, packed(), HOOK, batch_size=hp.batch_size, buffer_tokens=hp.buffer_tokens, seed=seed)
    return Trainer(config(architecture), hp, seed=seed), stream


@pytest.mark.parametrize("stop_at", [0, 1, 4, 13, 19])
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_training_is_bit_identical(lm: LanguageModel, tmp_path: Path, name: str, stop_at: int) -> None:
    undisturbed, stream = a_run(lm, name)
    _, expected = run(train(undisturbed, stream))

    first, stream = a_run(lm, name)
    job = train(first, stream)
    while first.n_steps_done < stop_at:
        next(job)
    folder = save_checkpoint(tmp_path, first, stream)
    for _ in range(3):  # what happens between the checkpoint and the kill is lost
        next(job, None)
    job.close()

    second, stream = a_run(lm, name)
    state = second.restore(folder)
    assert state is not None
    stream.restore(state)
    assert second.n_steps_done == stop_at
    _, resumed = run(train(second, stream))
    for (key, ours), theirs in zip(resumed.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), key
    assert resumed.cfg == expected.cfg
    assert second.density is not None
    assert undisturbed.density is not None
    assert torch.equal(second.density, undisturbed.density)


def test_a_checkpoint_is_the_same_bytes_for_the_same_state(lm: LanguageModel, tmp_path: Path) -> None:
    def written(root: Path) -> bytes:
        trainer, stream = a_run(lm, "topk")
        run(train(trainer, stream))
        folder = save_checkpoint(root, trainer, stream)
        return (folder / "state.json").read_bytes() + (folder / "state.safetensors").read_bytes()

    assert written(tmp_path / "a") == written(tmp_path / "b")


def three_checkpoints(root: Path) -> Trainer:
    trainer = Trainer(config("topk"), settings())
    for _ in range(3):
        trainer.step(sparse_activations(32))
        trainer.save_state(root / f"step-{trainer.n_steps_done:09d}")
    return trainer


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "gone"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_found(tmp_path: Path, file: str, damage: str) -> None:
    three_checkpoints(tmp_path)
    path = tmp_path / "step-000000003" / file
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: 0 if damage == "empty" else -3])
    with pytest.raises((CorruptFile, NotFound)):
        Trainer(config("topk"), settings()).restore(path.parent)
    latest = latest_good(tmp_path)
    assert latest.folder == tmp_path / "step-000000002"
    assert len(latest.warnings) == 1
    assert "step-000000003 was passed over" in latest.warnings[0]


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    three_checkpoints(tmp_path)
    folder = tmp_path / "step-000000003"
    good = {file: (folder / file).read_bytes() for file in ("state.json", "state.safetensors")}
    generator = torch.Generator().manual_seed(0)
    for file, content in good.items():
        for at in torch.randint(len(content), (40,), generator=generator).tolist():
            damaged = bytearray(content)
            damaged[at] ^= 1 << (at % 8)
            (folder / file).write_bytes(damaged)
            assert latest_good(tmp_path).folder != folder or json.loads(bytes(damaged)) == json.loads(content)
        (folder / file).write_bytes(content)
    assert latest_good(tmp_path) == (folder, [])


def test_there_may_be_no_checkpoint(tmp_path: Path) -> None:
    assert latest_good(tmp_path / "nowhere") == (None, [])
    (tmp_path / "step-000000001.part").mkdir()
    assert latest_good(tmp_path) == (None, [])


def test_only_the_newest_checkpoints_are_kept(lm: LanguageModel, tmp_path: Path) -> None:
    trainer, stream = a_run(lm, "topk")
    run(train(trainer, stream, checkpoint=lambda t, s: save_checkpoint(tmp_path, t, s, keep=2)))
    for _ in range(4):
        trainer.step(sparse_activations(32))
        save_checkpoint(tmp_path, trainer, stream, keep=2)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step-000000023", "step-000000024"]


def test_a_checkpoint_of_other_settings_is_refused_with_the_first_difference(tmp_path: Path) -> None:
    three_checkpoints(tmp_path)
    with pytest.raises(BadInput, match=r"another hyperparameters.*lr was 0\.001 there and is 0\.002 here"):
        Trainer(config("topk"), settings(lr=2e-3)).restore(tmp_path / "step-000000003")
    with pytest.raises(BadInput, match=r"another SAE config.*d_sae was 48 there and is 50"):
        Trainer(config("topk", d_sae=50), settings()).restore(tmp_path / "step-000000003")


def test_a_checkpoint_of_a_newer_version_is_refused_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mistudio_engine.training.checkpoints._VERSION", 2)
    three_checkpoints(tmp_path)
    monkeypatch.undo()
    with pytest.raises(Unsupported, match="has version 2; this miStudio reads version 1"):
        Trainer(config("topk"), settings()).restore(tmp_path / "step-000000003")
