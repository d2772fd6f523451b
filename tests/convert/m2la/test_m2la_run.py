"""The conversion as a whole: what it writes and reports, and what is left of it when it is stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.m2la import calibrate as calibration
from convert.m2la.options import PLAIN_SVD, Method, Options
from convert.m2la.plan import make_plan
from convert.m2la.run import convert_attention
from convert.m2la.sensitivity import sensitivities
from convert.record import Record
from convert.source import open_source
from convert.verification import verify
from ivcore.backend import load
from ivcore.config import ModelConfig
from ivcore.errors import CheckpointError
from ivcore.inputs import ModelInputs
from ivcore.shards import Checkpoint

OPTIONS = Options(cache_ratio=2)
ARGUMENTS: dict[str, Any] = {"backend": "torch", "shard_bytes": 20_000}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    pytest.importorskip("torch").set_num_threads(1)


@pytest.fixture(scope="module")
def source(sources: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.make(tmp_path_factory.mktemp("m2la") / "in", sources.Shape(kv_heads=4, layers=3))


def listing(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


class Stop(BaseException):
    """What a run is stopped with: no error that anything handles."""


@pytest.mark.parametrize("layout", ["norm", "release"])
@pytest.mark.parametrize("ratio", [2, 4])
def test_the_cache_is_smaller_by_the_ratio_and_both_backends_agree(
    source: Path, prompts: list[ModelInputs], tmp_path: Path, layout: Any, ratio: int
) -> None:
    options = Options(cache_ratio=ratio, layout=layout)
    record = convert_attention(source, tmp_path / "out", options, prompts, backend="torch")
    cache = record.report["cache_bytes_per_token"]
    assert cache["source"] == 3 * 2 * 4 * 8 * 4  # layers, keys and values, heads, head_dim, float32
    assert 0.9 * cache["source"] / ratio < cache["converted"] <= cache["source"] / ratio
    geometry = ModelConfig.from_dir(tmp_path / "out").text.geometry
    assert 4 * sum(geometry.cache_width(layer) for layer in range(3)) == cache["converted"]
    assert geometry.layout == layout
    if layout == "release":
        assert geometry.biases == {"q_proj", "kv_a_proj_with_mqa"} and set(geometry.rope_heads) == {1}
    logits = [load(tmp_path / "out", backend).logits(prompts[1]) for backend in ("torch", "mlx")]  # type: ignore[arg-type]
    assert np.abs(logits[0] - logits[1]).max() < 1e-4 * np.abs(logits[0]).max()


def test_what_the_conversion_does_not_make_is_copied_bit_for_bit(
    source: Path, prompts: list[ModelInputs], tmp_path: Path
) -> None:
    convert_attention(source, tmp_path / "out", OPTIONS, prompts, **ARGUMENTS)
    before, after = Checkpoint(source), Checkpoint(tmp_path / "out")
    kept = before.specs.keys() & after.specs.keys()
    assert before.specs.keys() == kept  # the norm layout keeps all of the source's tensors
    assert {name.rpartition("self_attn.")[2] for name in after.specs.keys() - kept} == {
        "q_rope_scale", "kv_a_proj.weight", "kv_b_proj.weight",
    }  # fmt: skip
    for name in kept:
        assert np.array_equal(before.read(name), after.read(name)), name
    assert (tmp_path / "out" / "tokenizer_config.json").read_bytes() == b"{}"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert verify(tmp_path / "out").ok and verify(tmp_path / "out").hashed


def test_a_source_in_bfloat16_stays_in_bfloat16(
    sources: Any, checkpoints: Any, prompts: list[ModelInputs], tmp_path: Path
) -> None:
    shape = sources.Shape()
    tensors = {name: checkpoints.store(values, "BF16") for name, values in sources.random(shape).items()}
    source = checkpoints.write(tmp_path / "in", shape.config(), tensors)
    record = convert_attention(source, tmp_path / "out", OPTIONS, prompts, **ARGUMENTS)
    assert {spec.dtype for spec in Checkpoint(tmp_path / "out").specs.values()} == {"BF16"}
    assert record.report["cache_bytes_per_token"]["source"] == 2 * 2 * 2 * 8 * 2


def test_the_report_compares_the_models_on_prompts_that_were_left_out(
    source: Path, prompts: list[ModelInputs], tmp_path: Path
) -> None:
    """Against torch's own KL of the two models' logits."""
    torch = pytest.importorskip("torch")
    record = convert_attention(source, tmp_path / "out", OPTIONS, prompts, **ARGUMENTS)
    assert record.request["calibration"]["prompts"] == 4 and record.request["held_out"]["prompts"] == 1
    ours, theirs = (
        torch.from_numpy(load(folder, "torch").logits(prompts[1])).double().log_softmax(-1)
        for folder in (source, tmp_path / "out")
    )
    kl = torch.nn.functional.kl_div(theirs, ours, log_target=True, reduction="none").sum(-1).numpy()
    agrees = (ours.argmax(-1) == theirs.argmax(-1)).numpy()
    visual = np.isin(prompts[1].token_ids, (38, 39))
    for kind, places in (("text", ~visual), ("visual", visual)):
        found = record.report["model"][kind]
        assert found["positions"] == places.sum()
        assert found["kl"] == pytest.approx(kl[places].mean(), rel=1e-3)
        assert found["top1"] == pytest.approx(agrees[places].mean())
    text = record.report["model"]["text"]
    followed = np.flatnonzero(~visual[:-1] & ~visual[1:])
    likelihoods = -ours.numpy()[followed, prompts[1].token_ids[followed + 1]]
    assert text["nll_source"] == pytest.approx(likelihoods.mean(), rel=1e-3)
    assert Record.read(tmp_path / "out").report == json.loads(json.dumps(record.report))


@pytest.mark.parametrize(
    "method",
    [
        PLAIN_SVD,
        Method(rotation=False),
        Method(turns=False),
        Method(balance=False),
        Method(attention_aware=False),
        Method(per_layer=False),
    ],
)
def test_every_part_of_the_method_can_be_left_out(
    source: Path, prompts: list[ModelInputs], tmp_path: Path, method: Method
) -> None:
    record = convert_attention(source, tmp_path / "out", Options(cache_ratio=2, method=method), prompts, **ARGUMENTS)
    layers = record.report["layers"]
    if not method.balance:
        assert {layer["balance"] for layer in layers} == {1.0}
    if not method.per_layer:
        assert len({(layer["rank"], layer["rope_heads"]) for layer in layers}) == 1
    whole = convert_attention(source, tmp_path / "all", OPTIONS, prompts, **ARGUMENTS).report["layers"]
    errors = [[layer["output_error"]["text"] for layer in each] for each in (layers, whole)]
    assert errors[0] != errors[1]


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_layers_that_do_nothing_are_equally_sensitive_and_more_where_the_head_is_louder(
    sources: Any, prompts: list[ModelInputs], tmp_path: Path, backend: str
) -> None:
    """Noise then reaches the head as it was made, whichever layer it is put behind; KL grows with logits squared."""
    shape = sources.Shape(layers=4, deepstack=())
    tensors = sources.random(shape)
    for name in tensors:
        if name.startswith("model.language_model.layers.") and name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name][:] = 0
    found = {}
    for loudness in (0.0, 0.01, 0.02):
        tensors["model.language_model.norm.weight"][:] = loudness
        source = open_source(sources.write(tmp_path / f"{loudness}", shape, tensors))
        found[loudness] = np.array(sensitivities(make_plan(source, OPTIONS, prompts, None, backend)))
    assert (found[0.0] == 1).all()  # nothing can be measured
    assert found[0.02].max() < 1.5 * found[0.02].min()
    assert found[0.02] == pytest.approx(4 * found[0.01], rel=0.1)


def test_a_rank_is_taken_at_its_word(source: Path, prompts: list[ModelInputs], tmp_path: Path) -> None:
    record = convert_attention(source, tmp_path / "out", Options(rank=11), prompts, **ARGUMENTS)
    assert {(layer["rank"], layer["rope_heads"]) for layer in record.report["layers"]} == {(11, 1)}
    assert ModelConfig.from_dir(tmp_path / "out").text.kv_lora_rank == 11


@pytest.mark.parametrize("stop_at", [("calibrating", 0), ("calibrating", 2), ("writing", 9_000), ("comparing", 0)])
def test_a_run_that_was_stopped_is_gone_on_with_and_ends_in_the_same_bytes(
    source: Path, prompts: list[ModelInputs], tmp_path: Path, stop_at: tuple[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    convert_attention(source, tmp_path / "whole", OPTIONS, prompts, **ARGUMENTS)

    def stop(what: str, done: int, total: int) -> None:
        if (what, done) >= stop_at and what == stop_at[0]:
            raise Stop

    out = tmp_path / "out"
    with pytest.raises(Stop):
        convert_attention(source, out, OPTIONS, prompts, on_progress=stop, **ARGUMENTS)
    assert not out.exists()
    if stop_at == ("calibrating", 0):
        assert not out.with_name("out.part").exists()
    else:
        with pytest.raises(CheckpointError, match="--resume"):
            convert_attention(source, out, OPTIONS, prompts, **ARGUMENTS)
        finished = len(list(out.with_name("out.part").glob("m2la-layer-*.npz")))
        assert finished == (2 if stop_at[0] == "calibrating" else 3)
        made: list[int] = []
        finish = calibration._finish_layer
        monkeypatch.setattr(calibration, "_finish_layer", lambda *args: (made.append(args[-1]), finish(*args)))
        convert_attention(source, out, OPTIONS, prompts, resume=True, **ARGUMENTS)
        assert made == list(range(finished, 3))
        assert listing(out) == listing(tmp_path / "whole")
        assert not out.with_name("out.part").exists()
        assert convert_attention(source, out, OPTIONS, prompts, resume=True, **ARGUMENTS).report


def test_unfinished_work_is_not_gone_on_with_for_another_request(
    source: Path, prompts: list[ModelInputs], tmp_path: Path
) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "writing":
            raise Stop

    with pytest.raises(Stop):
        convert_attention(source, tmp_path / "out", OPTIONS, prompts, on_progress=stop, **ARGUMENTS)
    others = [(Options(cache_ratio=4), prompts, "cache_ratio"), (OPTIONS, prompts[:-1], "calibration")]
    for options, given, what in others:
        with pytest.raises(CheckpointError, match=what):
            convert_attention(source, tmp_path / "out", options, given, resume=True, **ARGUMENTS)
    convert_attention(source, tmp_path / "out", Options(cache_ratio=4), prompts, force=True, **ARGUMENTS)
    assert verify(tmp_path / "out").ok


def test_nothing_is_left_where_the_source_turns_out_to_be_damaged(
    sources: Any, prompts: list[ModelInputs], tmp_path: Path
) -> None:
    shape = sources.Shape()
    tensors = sources.random(shape)
    tensors["model.language_model.layers.1.self_attn.o_proj.weight"][0, 0] = np.nan
    source = sources.write(tmp_path / "in", shape, tensors)
    with pytest.raises(CheckpointError, match="NaN"):
        convert_attention(source, tmp_path / "deep" / "out", OPTIONS, prompts, **ARGUMENTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_full_disk_leaves_the_finished_layers_and_says_so(
    source: Path, prompts: list[ModelInputs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = calibration._finish_layer

    def full(*args: Any) -> None:
        if args[-1] == 1:
            raise OSError(28, "No space left on device")
        finish(*args)

    monkeypatch.setattr(calibration, "_finish_layer", full)
    with pytest.raises(CheckpointError, match=r"disk is full.*--resume"):
        convert_attention(source, tmp_path / "out", OPTIONS, prompts, **ARGUMENTS)
    assert (tmp_path / "out.part" / "m2la-layer-000.npz").exists()
    monkeypatch.undo()
    convert_attention(source, tmp_path / "out", OPTIONS, prompts, resume=True, **ARGUMENTS)
    assert verify(tmp_path / "out").ok


def test_force_replaces_a_checkpoint_when_the_new_one_is_whole(
    source: Path, prompts: list[ModelInputs], tmp_path: Path
) -> None:
    shutil.copytree(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="--force"):
        convert_attention(source, tmp_path / "out", OPTIONS, prompts, **ARGUMENTS)
    convert_attention(source, tmp_path / "out", OPTIONS, prompts, force=True, **ARGUMENTS)
    assert ModelConfig.from_dir(tmp_path / "out").text.attention == "m2la"
