"""The optimiser's step, going on from a saved state, float32 masters, and what a trained model then says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivcore.errors import TrainingError
from ivcore.floats import cast
from ivcore.shards import write_checkpoint
from ivcore.training import Batch, LoraSettings, NextToken, OptimizerSettings

NORM = "model.language_model.layers.0.input_layernorm.weight"
MATRIX = "model.language_model.layers.0.mlp.down_proj.weight"
PATCHES = "model.visual.patch_embed.proj.weight"
SETTINGS = OptimizerSettings((0.8, 0.95), 1e-6, weight_decay=0.3, multipliers=(("visual", 0.1),))
LORA = LoraSettings(rank=3, alpha=5)
SETTINGS_OF = {True: SETTINGS, False: OptimizerSettings(weight_decay=0.1)}


def weights_of(trainer: Any) -> dict[str, np.ndarray]:
    return {name.removeprefix("weight."): a for name, a in trainer.state().items() if name.startswith("weight.")}


def random_gradients(trainer: Any, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in trainer.trainable.items()}


def adamw(weight: np.ndarray, gradients: list[np.ndarray], rates: list[float], decay: float) -> np.ndarray:
    """Algorithm 2 of arXiv 1711.05101 in float64, the decay times the rate."""
    (beta1, beta2), mean, square = SETTINGS.betas, 0.0, 0.0
    weight = weight.astype(np.float64)
    for count, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        wide = gradient.astype(np.float64)
        mean = beta1 * mean + (1 - beta1) * wide
        square = beta2 * square + (1 - beta2) * wide**2
        unbiased = mean / (1 - beta1**count), square / (1 - beta2**count)
        weight = weight - rate * (unbiased[0] / (np.sqrt(unbiased[1]) + SETTINGS.eps) + decay * weight)
    return weight


def test_steps_are_adamw_s_with_decay_on_matrices_and_a_rate_for_each_pattern(one_lab: Any, backend: str) -> None:
    trainer, rates = one_lab.trainer(backend, None, optimizer=SETTINGS), [1e-2, 3e-3, 1e-3]
    start, given = weights_of(trainer), [random_gradients(trainer, seed) for seed in range(3)]
    for gradients, rate in zip(given, rates, strict=True):
        trainer.set_gradients(gradients)
        trainer.apply(rate, None)
    found = weights_of(trainer)
    for name in found:
        decay = 0.3 if start[name].ndim > 1 and not name.endswith("q_rope_scale") else 0.0
        factor = 0.1 if name.startswith("model.visual.") else 1.0
        expected = adamw(start[name], [each[name] for each in given], [rate * factor for rate in rates], decay)
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_gradient_is_clipped_to_a_norm_and_cleared(one_lab: Any, backend: str) -> None:
    trainer = one_lab.trainer(backend)
    gradients = random_gradients(trainer, 0)
    norm = float(np.sqrt(sum((array.astype(np.float64) ** 2).sum() for array in gradients.values())))
    trainer.set_gradients(gradients)
    assert trainer.apply(0.0, max_norm=0.5) == pytest.approx(norm, rel=1e-5)
    state = trainer.state()
    for name, array in gradients.items():
        np.testing.assert_allclose(state[f"mean.{name}"], 0.1 * array * 0.5 / norm, rtol=1e-4, atol=1e-9)
    assert not any(array.any() for array in trainer.gradients().values())


def test_a_gradient_that_is_not_a_number_takes_no_step(one_lab: Any, backend: str) -> None:
    trainer = one_lab.trainer(backend)
    before = trainer.state()
    gradients = random_gradients(trainer, 0)
    next(iter(gradients.values()))[0, 0] = np.nan
    trainer.set_gradients(gradients)
    with pytest.raises(TrainingError, match="norm is nan; the step was not taken"):
        trainer.apply(1e-3, 1.0)
    same_bytes(trainer.state(), before)


def test_a_multiplier_of_zero_leaves_weights_out(one_lab: Any, backend: str) -> None:
    frozen = OptimizerSettings(multipliers=(("visual.merger", 1.0), ("visual", 0.0)))
    trainer = one_lab.trainer(backend, None, optimizer=frozen)
    assert PATCHES not in trainer.trainable and MATRIX in trainer.trainable
    assert "model.visual.merger.linear_fc1.weight" in trainer.trainable
    everything = one_lab.trainer(backend, None)
    for each in (trainer, everything):
        each.accumulate(one_lab.batch, NextToken())
    expected = everything.gradients()
    for name, array in trainer.gradients().items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-7)


def same_bytes(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert array.tobytes() == found[name].tobytes(), name


@pytest.mark.parametrize("lora", [replace(LORA, dropout=0.3), None], ids=["lora with dropout", "full"])
def test_going_on_from_a_saved_state_gives_the_very_same_bytes(
    one_lab: Any, backend: str, lora: LoraSettings | None, tmp_path: Path
) -> None:
    def take(trainer: Any, steps: range) -> Any:
        for step in steps:
            for kind in ("next token", "policy with a reference"):
                trainer.accumulate(one_lab.batch, one_lab.loss(kind))
            trainer.apply(1e-3 / (step + 1), max_norm=1.0)
        return trainer

    undisturbed = take(one_lab.trainer(backend, lora, optimizer=SETTINGS_OF[lora is None], seed=5), range(3))
    first = take(one_lab.trainer(backend, lora, optimizer=SETTINGS_OF[lora is None], seed=5), range(1))
    np.savez(tmp_path / "state.npz", **first.state())
    with np.load(tmp_path / "state.npz") as saved:
        state = dict(saved)
    fresh = one_lab.trainer(backend, lora, optimizer=SETTINGS_OF[lora is None], seed=6)
    fresh.load_state(state)
    same_bytes(take(fresh, range(1, 3)).state(), undisturbed.state())
    assert np.array_equal(fresh.logprobs(one_lab.batch), undisturbed.logprobs(one_lab.batch))


def test_dropout_draws_anew_for_every_batch_and_only_while_training(one_lab: Any, backend: str) -> None:
    plain, dropping = (one_lab.trainer(backend, replace(LORA, dropout=dropout)) for dropout in (0.0, 0.5))
    expected = plain.logprobs(one_lab.batch)
    values = [dropping.accumulate(one_lab.batch, NextToken())["loss"] for _ in range(4)]
    assert len(set(values)) == 4
    assert plain.accumulate(one_lab.batch, NextToken())["loss"] not in values
    np.testing.assert_array_equal(dropping.logprobs(one_lab.batch), expected)
    other = one_lab.trainer(backend, replace(LORA, dropout=0.5), seed=1)
    other.load_state(dropping.state() | {"draws": other.state()["draws"]})
    assert other.accumulate(one_lab.batch, NextToken())["loss"] not in values


def test_the_masters_of_a_bfloat16_model_are_float32(one_lab: Any, backend: str) -> None:
    model = one_lab.model(backend, dtype="bfloat16")
    trainer = one_lab.trainer(backend, None, model=model)
    start, stored = weights_of(trainer), dict(trainer.tensors())
    for _ in range(4):
        trainer.set_gradients({name: np.ones(shape, np.float32) for name, shape in trainer.trainable.items()})
        trainer.apply(1e-5, None)
    for name, weight in weights_of(trainer).items():
        assert weight.dtype == np.float32
        np.testing.assert_allclose(weight, start[name] - 4e-5, rtol=0, atol=1e-6)
    # Too little for bfloat16 to show in the norms, which are near 1.
    now = dict(trainer.tensors())
    np.testing.assert_array_equal(now[NORM], stored[NORM])
    np.testing.assert_array_equal(now[MATRIX], cast(weights_of(trainer)[MATRIX], "F32", "BF16"))


def test_a_gradient_in_bfloat16_is_near_that_in_float32(one_lab: Any, backend: str, tools: Any) -> None:
    for lora in (LORA, None):
        rough = one_lab.trainer(backend, lora, model=one_lab.model(backend, dtype="bfloat16"))
        exact = one_lab.trainer(backend, lora)
        gradients = []
        for trainer in (rough, exact):
            trainer.accumulate(one_lab.batch, NextToken())
            gradients.append(np.concatenate([array.ravel() for array in trainer.gradients().values()]))
        assert np.linalg.norm(gradients[0] - gradients[1]) < 0.1 * np.linalg.norm(gradients[1])


@pytest.mark.parametrize("lora", [LoraSettings(rank=8, alpha=16), None], ids=["lora", "full"])
def test_a_model_says_what_it_was_taught_to_say(one_lab: Any, backend: str, lora: Any, tools: Any) -> None:
    row = tools.media_row(3)
    question = tools.ModelInputs(row.token_ids, row.pixels, row.grid_thw)
    answer = [17, 301, 301, 42, 9]
    config = tools.ModelConfig.from_dir(one_lab.path)
    asked = tools.pack(config, [tools.Row(np.append(row.token_ids, answer).astype(np.int32), row.pixels, row.grid_thw)])
    places = np.arange(len(row.token_ids) - 1, len(row.token_ids) + len(answer) - 1)
    targets, weights = np.zeros_like(asked.targets), np.zeros_like(asked.weights)
    targets[places], weights[places] = answer, 1 / len(answer)
    batch = replace(asked, targets=targets, weights=weights)
    trainer = one_lab.trainer(backend, lora)
    model = trainer.model
    model.stop_ids = frozenset()
    assert list(model.generate(question, max_tokens=5)) != answer
    for _ in range(25):
        trainer.accumulate(batch, NextToken())
        trainer.apply(3e-3, 1.0)
    for model.form in ("absorbed", "expanded"):
        assert list(model.generate(question, max_tokens=5)) == answer


def test_a_trained_checkpoint_is_written_and_loads_on_both_backends(one_lab: Any, backend: str, tools: Any,
                                                                   tmp_path: Path) -> None:  # fmt: skip
    trainer = one_lab.trainer(backend, None)
    trainer.accumulate(one_lab.batch, NextToken())
    trainer.apply(1e-3, 1.0)
    write_checkpoint(tmp_path, trainer.model.config.to_dict(), trainer.specs(), trainer.tensors())
    expected = trainer.logprobs(one_lab.batch)
    for name in tools.BACKENDS:
        found = tools.Lab(tmp_path, one_lab.batch).trainer(name, None).logprobs(one_lab.batch)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("full", [False, True])
def test_the_reference_is_the_adapter_that_training_began_with(one_lab: Any, backend: str, full: bool) -> None:
    trainer = one_lab.trainer(backend, LORA)
    fresh = one_lab.trainer(backend, LORA)
    before = fresh.reference_logprobs(one_lab.batch, full=full)
    trainer.accumulate(one_lab.batch, NextToken())
    trainer.apply(1e-2, None)
    score = trainer.token_logprobs_full if full else trainer.logprobs
    now = score(one_lab.batch)
    # `randomize` put the numbers of B there by `load_state`: the beginning is the adapter that changes nothing.
    np.testing.assert_allclose(before, trainer.reference_logprobs(one_lab.batch, full=full), rtol=0, atol=1e-6)
    assert np.abs(now - before).max() > 1e-2
    np.testing.assert_array_equal(now, score(one_lab.batch))
    with pytest.raises(TrainingError, match="loaded beside it"):
        one_lab.trainer(backend, None).reference_logprobs(one_lab.batch)


def test_a_state_of_another_run_is_refused(one_lab: Any, backend: str) -> None:
    state = one_lab.trainer(backend, replace(LORA, rank=2)).state()
    for other in (one_lab.trainer(backend, LORA), one_lab.trainer(backend, None)):
        with pytest.raises(TrainingError, match="of another model, adapter or recipe"):
            other.load_state(state)


def test_what_cannot_be_trained_is_refused(one_lab: Any, backend: str) -> None:
    with pytest.raises(TrainingError, match="float16 cannot be trained; load it in bfloat16"):
        one_lab.trainer(backend, model=one_lab.model(backend, dtype="float16"))
    with pytest.raises(TrainingError, match="mlp\\.dawn_proj names no linear layer"):
        one_lab.trainer(backend, replace(LORA, targets=("self_attn.*", "mlp.dawn_proj")))
    misspelt = OptimizerSettings(multipliers=(("visual", 0.1),))
    with pytest.raises(TrainingError, match="visual names no parameter that is trained"):
        one_lab.trainer(backend, LORA, optimizer=misspelt)


def test_a_batch_that_does_not_fit_is_refused_before_it_is_computed(one_lab: Any, backend: str) -> None:
    trainer = one_lab.trainer(backend)
    wrong: Batch = replace(one_lab.batch, lengths=one_lab.batch.lengths[:-1])
    with pytest.raises(TrainingError, match="has rows of"):
        trainer.accumulate(wrong, NextToken())
    with pytest.raises(TrainingError, match="has rows of"):
        trainer.logprobs(wrong)
