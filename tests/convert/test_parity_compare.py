"""`compare`: which runs, on what prompt, one model at a time; decode, gates, errors, and nothing left behind."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from convert import compare
from convert.parity import compare as compare_module
from convert.parity import run as run_module
from convert.parity.compare import make_prompt
from convert.parity.probe import FRAMES, build, file_messages, probe_messages
from convert.parity.report import ParityError, Report
from ivcore.config import ModelConfig
from ivcore.errors import BackendError, CheckpointError, ConfigError, PromptError
from ivcore.inputs import ModelInputs
from ivcore.schedule import DEFAULT_MEMORY_BUDGET
from ivcore.shards import Checkpoint, TensorSpec, write_checkpoint
from ivcore.tokenizer import Tokenizer

REFERENCE = Path(__file__).resolve().parents[1] / "data" / "reference"
IV3, QWEN = REFERENCE / "iv3-micro", REFERENCE / "qwen3vl-micro"
IMAGE, VIDEO, OPEN, CLOSE = 505, 506, 502, 503
pytest.importorskip("torch")
RELEASE = run_module.release


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting all of Python's garbage takes ten times as long as running a micro model."""
    monkeypatch.setattr(run_module, "release", lambda backend: None)


def prompt(seed: int = 0) -> ModelInputs:
    """Text, a video of 3 x (4 x 4) patches, text, an image of 2 x 4, text."""
    random = np.random.default_rng(seed)
    frame = [77, OPEN, *[VIDEO] * 4, CLOSE]
    tokens = [5, 9, 200, *frame * 3, 31, 4, OPEN, *[IMAGE] * 2, CLOSE, *random.integers(0, 500, 7).tolist()]
    pixels = random.standard_normal((56, 1536), dtype=np.float32)
    return ModelInputs(np.array(tokens, np.int32), pixels, np.array([[3, 4, 4], [1, 2, 4]], np.int32))


def names(report: Report) -> list[tuple[str, str]]:
    return [(run.backend, run.dtype) for run in (report.reference, *(c.run for c in report.comparisons))]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder of its own with the reference checkpoint of the release's form."""
    return Path(shutil.copytree(IV3, tmp_path / "copy"))


def change(folder: Path, **tensors: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rewrite a folder with some tensors changed; their names with __ for dots."""
    checkpoint = Checkpoint(folder)
    values = {name: np.array(checkpoint.read(name)) for name in checkpoint.specs}
    values |= {(name := key.replace("__", ".")): how(values[name]) for key, how in tensors.items()}
    write_checkpoint(folder, json.loads((folder / "config.json").read_text()), checkpoint.specs, values.items())


def configure(folder: Path, section: str | None, **fields: Any) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    (content if section is None else content[section]).update(fields)
    file.write_text(json.dumps(content))


def test_one_folder_runs_on_both_backends_two_folders_on_one(copy: Path) -> None:
    assert names(compare(IV3, inputs=prompt(), tokens=0)) == [("mlx", "float32"), ("torch", "float32")]
    two = compare(IV3, copy, inputs=prompt(), tokens=0)
    assert names(two)[0] == names(two)[1] and len(names(two)) == 2


def test_runs_are_every_folder_on_every_backend_in_every_dtype_in_the_order_given(copy: Path) -> None:
    report = compare(
        IV3, copy, backends=["torch", "mlx"], dtypes=["bfloat16", "float32"], inputs=prompt(), tokens=0
    )  # fmt: skip
    expected = [(backend, dtype) for backend in ("torch", "mlx") for dtype in ("bfloat16", "float32")]
    assert names(report) == expected * 2
    assert [c.run.model for c in report.comparisons] == [str(IV3)] * 3 + [str(copy)] * 4
    # The fourth comparison is the copy in the reference's own backend and dtype.
    assert all(point.relative_l2 == point.own == 0.0 for point in report.comparisons[3].points)
    assert all(c.suspect is None for c in report.comparisons)


def test_two_dtypes_of_one_folder_run_on_one_backend() -> None:
    report = compare(IV3, dtypes=["float32", "float16"], inputs=prompt(), tokens=0)
    assert len(names(report)) == 2 and names(report)[0][0] == names(report)[1][0]


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_the_same_run_twice_differs_in_nothing(backend: str, copy: Path) -> None:
    (comparison,) = compare(IV3, copy, backends=[backend], inputs=prompt(), tokens=5).comparisons
    for point in comparison.points:
        assert (point.relative_l2, point.own, point.max_abs, point.cosine) == (0.0, 0.0, 0.0, 1.0)
        assert point.visual in (0.0, None) and point.text in (0.0, None)
    assert comparison.text is not None and comparison.visual is not None
    for logits in (comparison.text, comparison.visual):
        assert (logits.kl_mean, logits.kl_max, logits.agreement) == (0.0, 0.0, 1.0)
    assert comparison.text.perplexity_difference == 0.0
    assert comparison.decode.parted_at is None and comparison.decode.ids == comparison.decode.reference_ids
    assert comparison.suspect is None


def test_points_are_the_observer_s_own_in_its_order_with_all_their_rows() -> None:
    from ivcore import load

    rows: dict[str, int] = {}
    load(IV3, "torch").logits(prompt(), observe=lambda name, a: rows.update({name: rows.get(name, 0) + len(a)}))
    (comparison,) = compare(IV3, inputs=prompt(), tokens=0).comparisons
    assert {point.point: point.rows for point in comparison.points} == rows
    assert [point.point for point in comparison.points] == [*rows]


def test_a_run_s_errors_are_those_of_its_activations(copy: Path) -> None:
    change(copy, model__language_model__layers__1__mlp__up_proj__weight=lambda values: values * np.float32(1.1))
    from ivcore import load

    seen: list[dict[str, np.ndarray]] = [{}, {}]
    for folder, activations in zip((IV3, copy), seen, strict=True):
        load(folder, "torch").logits(prompt(), observe=activations.__setitem__)
    (comparison,) = compare(IV3, copy, backends=["torch"], inputs=prompt(), tokens=0).comparisons
    visual = np.isin(prompt().token_ids, (IMAGE, VIDEO))
    for point in comparison.points:
        ours, theirs = (each[point.point].astype(np.float64) for each in seen)
        assert point.max_abs == pytest.approx(np.abs(theirs - ours).max(), rel=1e-9)
        assert point.relative_l2 == pytest.approx(np.linalg.norm(theirs - ours) / np.linalg.norm(ours), rel=1e-9)
        if point.point in ("layers.1", "layers.4", "norm"):
            for part, kind in ((visual, point.visual), (~visual, point.text)):
                expected = np.linalg.norm(theirs[part] - ours[part]) / np.linalg.norm(ours[part])
                assert kind == pytest.approx(expected, rel=1e-9)
        assert (point.own > 0) == (point.point == "layers.1")


def test_portions_of_any_size_give_the_same_report(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compare(IV3, inputs=prompt(), tokens=0).comparisons[0]
    budgets = iter([1, DEFAULT_MEMORY_BUDGET, 200_000])
    loaded = run_module.load

    def load(*arguments: Any) -> Any:
        model = loaded(*arguments)
        model.memory_budget = next(budgets)
        return model

    monkeypatch.setattr(run_module, "load", load)
    for each in compare(IV3, dtypes=["float32"], inputs=prompt(), tokens=0).comparisons:
        assert each.suspect is None
        for ours, theirs in zip(each.points, whole.points, strict=True):
            assert (ours.point, ours.rows) == (theirs.point, theirs.rows)
            assert ours.own < 2e-6 and ours.relative_l2 < 1e-5


def test_more_positions_than_are_compared_are_chosen_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.from_dir(IV3)
    everything = make_prompt(prompt(), config)
    np.testing.assert_array_equal(everything.positions, np.arange(len(prompt().token_ids)))
    monkeypatch.setattr(compare_module, "TEXT_POSITIONS", 5)
    monkeypatch.setattr(compare_module, "VISUAL_POSITIONS", 3)
    some = make_prompt(prompt(), config)
    text, visual = (np.flatnonzero(kind) for kind in (~some.visual, some.visual))
    assert len(text) == 23 and len(visual) == 14
    # 22 / 4 and 13 / 2 apart, rounded to the even neighbour.
    assert some.positions.tolist() == sorted([*text[[0, 6, 11, 16, 22]], *visual[[0, 6, 13]]])
    report = compare(IV3, inputs=prompt(), tokens=0)
    comparison = report.comparisons[0]
    assert comparison.text is not None and comparison.visual is not None
    assert (comparison.text.compared, comparison.text.positions) == (5, 23)
    assert (comparison.visual.compared, comparison.visual.positions) == (3, 14)


def test_perplexity_is_of_the_text_tokens_that_follow_text(copy: Path) -> None:
    from ivcore import load

    torch = pytest.importorskip("torch")
    change(copy, lm_head__weight=lambda values: values * np.float32(1.5))
    (comparison,) = compare(IV3, copy, backends=["torch"], inputs=prompt(), tokens=0).comparisons
    ids = torch.from_numpy(prompt().token_ids.astype(np.int64))
    visual = torch.isin(ids, torch.tensor([IMAGE, VIDEO]))
    counted = ~visual[:-1] & ~visual[1:]
    expected = []
    for folder in (IV3, copy):
        logits = torch.from_numpy(load(folder, "torch").logits(prompt())).double()
        nll = torch.nn.functional.cross_entropy(logits[:-1][counted], ids[1:][counted])
        expected.append(float(nll.exp()))
    text = comparison.text
    assert text is not None and text.reference_perplexity is not None and text.perplexity is not None
    assert (text.reference_perplexity, text.perplexity) == pytest.approx(expected, rel=1e-6)
    assert text.perplexity_difference == pytest.approx(expected[1] - expected[0], rel=1e-4)
    assert comparison.visual is not None and comparison.visual.perplexity is None


def test_text_alone_has_no_vision_tower_to_compare() -> None:
    inputs = ModelInputs(np.arange(10, 30, dtype=np.int32), None, None)
    (comparison,) = compare(IV3, inputs=inputs, tokens=0).comparisons
    assert comparison.points[0].point == "embeddings" and comparison.visual is None
    assert all(point.visual is None for point in comparison.points)


def test_decoding_is_greedy_and_parts_where_the_ids_do(copy: Path) -> None:
    from ivcore import load

    # Raises the logit of one token over all others once the text has begun to repeat.
    change(copy, model__language_model__norm__weight=lambda values: values * np.float32(-1))
    (comparison,) = compare(IV3, copy, backends=["torch"], inputs=prompt(), tokens=8).comparisons
    greedy = [tuple(load(folder, "torch").generate(prompt(), max_tokens=8)) for folder in (IV3, copy)]
    assert (comparison.decode.reference_ids, comparison.decode.ids) == tuple(greedy)
    same = [a == b for a, b in zip(*greedy, strict=False)]
    assert comparison.decode.parted_at == same.index(False)


def test_texts_part_where_one_goes_on_alone(copy: Path) -> None:
    from convert.parity.findings import _parted_at

    assert _parted_at((1, 2, 3), (1, 2, 3)) is None
    assert _parted_at((1, 2, 3), (1, 5, 3)) == 1
    assert _parted_at((1, 2), (1, 2, 3)) == _parted_at((1, 2, 3), (1, 2)) == 2
    assert _parted_at((), (4,)) == 0


def test_the_reference_s_stop_tokens_end_every_run(copy: Path) -> None:
    unstopped = compare(IV3, inputs=prompt(), tokens=6).comparisons[0].decode.reference_ids
    stop = unstopped[2]
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    expected = unstopped[: unstopped.index(stop) + 1]
    for folders, ids in (((copy, IV3), expected), ((IV3, copy), unstopped)):
        (comparison,) = compare(*folders, inputs=prompt(), tokens=6).comparisons
        assert comparison.decode.reference_ids == comparison.decode.ids == ids


def test_numbers_that_are_not_finite_end_in_a_report_that_names_where_they_begin(copy: Path) -> None:
    # Beyond float16's largest number, 65,504, from the third layer on.
    change(copy, model__language_model__layers__2__mlp__down_proj__weight=lambda values: values * np.float32(6e4))
    report = compare(copy, dtypes=["float32", "float16"], backends=["torch"], inputs=prompt(), tokens=4)
    (comparison,) = report.comparisons
    assert comparison.suspect is not None and comparison.suspect.point == "layers.2"
    assert "not finite" in comparison.suspect.sentence
    assert comparison.text is not None and math.isnan(comparison.text.kl_mean) and comparison.text.agreement < 1
    assert (comparison.decode.ids, comparison.decode.parted_at) == ((), 0)
    assert report.misses(max_kl=1e9) and report.misses(min_agreement=1.0)
    written = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    layer = next(point for point in written["comparisons"][0]["points"] if point["point"] == "layers.2")
    assert layer["relative_l2"] is None and layer["own"] is None


def test_gates_are_missed_only_beyond_their_bounds() -> None:
    report = compare(IV3, dtypes=["float32", "bfloat16"], inputs=prompt(), tokens=0)
    text = report.comparisons[0].text
    assert text is not None
    changed = replace(report.comparisons[0], text=replace(text, kl_mean=0.25, agreement=0.75))
    report = replace(report, comparisons=(changed, report.comparisons[0]))
    assert report.misses() == report.misses(max_kl=0.25, min_agreement=0.75) == []
    (kl,) = report.misses(max_kl=0.2)
    assert "bfloat16" in kl and "0.25" in kl and "0.2" in kl
    (agreement,) = report.misses(min_agreement=0.8)
    assert "0.75" in agreement and "0.8" in agreement
    assert report.misses(max_kl=0.2, min_agreement=0.8) == [kl, agreement]


def test_the_json_object_holds_every_number_of_the_report() -> None:
    report = compare(IV3, inputs=prompt(), tokens=3)
    written = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert written["reference"] == {"model": str(IV3), "backend": "mlx", "dtype": "float32"}
    assert written["prompt"] == {"source": "inputs", "tokens": 37, "visual_tokens": 14}
    (comparison,) = written["comparisons"]
    assert comparison.keys() == {"run", "points", "suspect", "text", "visual", "decode"}
    assert comparison["points"][0].keys() == {
        "point", "stack", "rows", "relative_l2", "max_abs", "cosine", "visual", "text", "own", "limit",
    }  # fmt: skip
    assert comparison["text"].keys() == comparison["visual"].keys() == {
        "compared", "positions", "kl_mean", "kl_max", "agreement", "reference_perplexity", "perplexity",
        "perplexity_difference",
    }  # fmt: skip
    assert comparison["decode"]["parted_at"] is None and len(comparison["decode"]["ids"]) == 3
    assert [point["own"] for point in comparison["points"]] == [p.own for p in report.comparisons[0].points]


def quantised(source: Path, folder: Path, bits: int) -> Path:
    """A folder in MLX's packed form, the vision tower in float, made with MLX itself."""
    checkpoint, tensors = Checkpoint(source), {}
    for name in checkpoint.specs:
        values, module = np.array(checkpoint.read(name)), name.removesuffix(".weight")
        packs = name.endswith(".weight") and values.ndim == 2 and "visual" not in name and values.shape[1] % 32 == 0
        if packs:
            parts = mx.quantize(mx.array(values), group_size=32, bits=bits)
            for kind, part in zip(("weight", "scales", "biases"), parts, strict=True):
                tensors[f"{module}.{kind}"] = np.array(part)
        else:
            tensors[name] = values
    config = json.loads((source / "config.json").read_text())
    config["quantization"] = {"bits": bits, "group_size": 32}
    kinds = {"uint32": "U32", "float32": "F32"}
    specs = {name: TensorSpec(values.shape, kinds[str(values.dtype)]) for name, values in tensors.items()}
    write_checkpoint(folder, config, specs, tensors.items())
    return folder


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("source", [IV3, QWEN], ids=lambda path: path.name)
def test_quantised_against_float_names_no_suspect_and_both_backends_agree_on_it(
    source: Path, bits: int, tmp_path: Path
) -> None:
    packed = quantised(source, tmp_path / "packed", bits)
    report = compare(source, packed, backends=["mlx", "torch"], inputs=prompt(), tokens=0)
    float_torch, packed_mlx, packed_torch = report.comparisons
    assert [each.suspect for each in report.comparisons] == [None] * 3
    own = {point.point: point.own for point in packed_mlx.points}
    assert all(value == 0.0 for name, value in own.items() if name.startswith("visual.") or name == "norm")
    assert all(own[name] > 1e-3 for name in ("embeddings", "layers.0", "layers.4", "logits"))
    for ours, theirs in ((packed_mlx.text, packed_torch.text), (packed_mlx.visual, packed_torch.visual)):
        assert ours is not None and theirs is not None
        assert ours.kl_mean == pytest.approx(theirs.kl_mean, rel=1e-3) and ours.kl_mean > 1e-5
    assert float_torch.text is not None and float_torch.text.kl_mean < 1e-9
    # The same packed weights on both backends differ by rounding alone.
    (same,) = compare(packed, inputs=prompt(), tokens=0).comparisons
    assert same.suspect is None and max(point.own for point in same.points) < 5e-6


def test_bodies_that_differ_in_attention_alone_are_compared() -> None:
    (comparison,) = compare(QWEN, IV3, inputs=prompt(), tokens=0).comparisons
    assert comparison.suspect is not None and comparison.suspect.point == "visual.patch_embed"
    assert all(point.limit is None for point in comparison.points if point.point in ("layers.0", "layers.1"))


def test_one_model_is_in_memory_at_a_time(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = run_module.load
    models: list[Any] = []
    monkeypatch.setattr(run_module, "release", RELEASE)

    def load(*arguments: Any) -> Any:
        assert [model() for model in models] == [None] * len(models)
        model = loaded(*arguments)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(run_module, "load", load)
    compare(IV3, copy, backends=["mlx", "torch"], inputs=prompt(), tokens=2)
    assert len(models) == 4 and all(model() is None for model in models)


def test_activations_lie_in_the_work_dir_and_are_gone_afterwards(tmp_path: Path) -> None:
    sizes: list[int] = []

    def look(words: str, done: int, total: int) -> None:
        sizes.append(sum(file.stat().st_size for file in tmp_path.rglob("*.f32")))

    compare(IV3, inputs=prompt(), tokens=0, work_dir=tmp_path, on_progress=look)
    vision = 56 * 64 * 5 + 14 * 128 * 4
    assert max(sizes) == 4 * (vision + 37 * 128 * 7 + 37 * 512)
    assert [*tmp_path.iterdir()] == []


class Stopped(Exception):
    pass


@pytest.mark.parametrize("where", ["run 1 of 2, mlx float32: reading", "run 2 of 2, torch float32: reading", "own"])
def test_nothing_is_left_when_it_fails_or_is_stopped_at_any_time(where: str, tmp_path: Path) -> None:
    def stop(words: str, done: int, total: int) -> None:
        if where in words and done > total // 2:
            raise Stopped

    with pytest.raises(Stopped):
        compare(IV3, inputs=prompt(), work_dir=tmp_path, on_progress=stop)
    assert [*tmp_path.iterdir()] == []


def test_too_small_a_disk_is_said_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(run_module, "load", None)
    with pytest.raises(ParityError, match=r"activations take 0\.0 GB, but .* has 0\.0 GB free; set TMPDIR"):
        compare(IV3, inputs=prompt(), work_dir=tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_progress_counts_every_pass_of_every_run_to_its_end(copy: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    compare(IV3, copy, backends=["torch"], inputs=prompt(), tokens=2, on_progress=lambda *call: calls.append(call))
    last = {words: (done, total) for words, done, total in calls}
    assert [*last] == [
        "run 1 of 2, torch float32: loading", "run 1 of 2, torch float32: reading the prompt",
        "run 1 of 2, torch float32: decoding", "run 2 of 2, torch float32: loading",
        "run 2 of 2, torch float32: reading the prompt", "run 2 of 2, torch float32: each layer's own error",
        "run 2 of 2, torch float32: decoding",
    ]  # fmt: skip
    assert all(done == total for words, (done, total) in last.items() if "loading" not in words)
    passed = [done for words, done, _ in calls if "run 2" in words and "prompt" in words]
    assert passed == sorted(passed) and passed[0] == 0


def test_the_probe_is_a_clip_a_picture_and_two_languages_and_always_the_same() -> None:
    inputs, messages = build(IV3, None, None)
    again, _ = build(IV3, None, None)
    np.testing.assert_array_equal(inputs.token_ids, again.token_ids)
    assert inputs.pixels is not None and again.pixels is not None and inputs.grid_thw is not None
    np.testing.assert_array_equal(np.asarray(inputs.pixels), np.asarray(again.pixels))
    assert inputs.grid_thw[0, 0] == FRAMES // 2 and [medium.kind for medium in inputs.media] == ["video", "image"]
    assert len(inputs.media[0].timestamps) == FRAMES
    assert {IMAGE, VIDEO} <= set(inputs.token_ids.tolist())
    text = Tokenizer.from_dir(IV3).decode(inputs.token_ids.tolist())
    written = messages[0]["content"][-1]["text"]
    assert written in text and written.isprintable() is False and any("\u4e00" <= c <= "\u9fff" for c in written)
    frames = probe_messages()[0]["content"][0]["video"]
    assert all((frames[index] != frames[index + 1]).any() for index in range(FRAMES - 1))


def test_a_picture_or_a_clip_with_a_question_takes_the_probe_s_place(tmp_path: Path, make_clip: Any) -> None:
    picture = tmp_path / "photo.png"
    Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)).save(picture)
    for file, kind in ((picture, IMAGE), (make_clip(frames=8, fps=4), VIDEO)):
        report = compare(IV3, video=file, question="What is it?", tokens=0)
        assert report.prompt.source == str(file)
        inputs, _ = build(IV3, file, "What is it?")
        assert report.prompt.tokens == len(inputs.token_ids)
        assert report.prompt.visual_tokens == int((inputs.token_ids == kind).sum()) > 0


@pytest.mark.parametrize("given", [{"video": "clip.mp4"}, {"question": "What?"}])
def test_a_video_and_a_question_go_together(given: dict[str, str]) -> None:
    with pytest.raises(PromptError, match="go together"):
        compare(IV3, **given)  # type: ignore[arg-type]


def test_nothing_to_compare_is_said() -> None:
    with pytest.raises(ParityError, match=r"nothing to compare .* with: name a second folder, a second backend"):
        compare(IV3, backends=["torch"], inputs=prompt())
    with pytest.raises(ParityError, match="nothing to compare"):
        compare(IV3, backends=["torch", "torch"], dtypes=["float32", "float32"], inputs=prompt())


def test_an_unknown_backend_or_dtype_is_said() -> None:
    with pytest.raises(BackendError, match="There is no backend 'jax'"):
        compare(IV3, backends=["jax", "torch"])
    with pytest.raises(BackendError, match="dtype 'int8' is not one of float32, bfloat16, float16"):
        compare(IV3, dtypes=["int8"])


def test_models_of_other_bodies_are_refused_in_one_sentence_that_names_every_difference(copy: Path) -> None:
    configure(copy, "text_config", num_hidden_layers=4)
    configure(copy, "vision_config", deepstack_visual_indexes=[1, 2])
    configure(copy, None, video_token_id=507)
    checkpoint = Checkpoint(copy)
    kept = {
        name: spec for name, spec in checkpoint.specs.items() if ".layers.4." not in name and "_list.2." not in name
    }
    config = json.loads((copy / "config.json").read_text())
    write_checkpoint(copy, config, kept, ((name, np.array(checkpoint.read(name))) for name in kept))
    with pytest.raises(CheckpointError) as caught:
        compare(IV3, copy, inputs=prompt())
    message = str(caught.value)
    assert str(IV3) in message and str(copy) in message
    for part in ("num_hidden_layers is 5 and 4", "deepstack_visual_indexes is [1, 2, 3] and [1, 2]", "506 and 507"):
        assert part in message
    assert "hidden_size" not in message.replace("num_hidden", "")


def test_another_tokenizer_or_template_is_refused_but_not_for_given_inputs(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(CheckpointError, match="make other tokens of the same text"):
        compare(IV3, copy)
    compare(IV3, copy, inputs=prompt(), tokens=0)


def test_a_folder_that_cannot_be_loaded_is_said_before_the_other_runs(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "load", None)
    (copy / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="damaged"):
        compare(IV3, copy)
    with pytest.raises(CheckpointError, match="does not exist"):
        compare(IV3, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises((CheckpointError, ConfigError), match="empty"):
        compare(IV3, tmp_path / "empty")


def test_messages_of_a_file_name_its_kind(tmp_path: Path, make_clip: Any) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (40, 40)).save(picture)
    assert file_messages(picture, "Q")[0]["content"][0] == {"type": "image", "image": str(picture)}
    clip = make_clip()
    assert file_messages(clip, "Q")[0]["content"] == [
        {"type": "video", "video": str(clip)},
        {"type": "text", "text": "Q"},
    ]
