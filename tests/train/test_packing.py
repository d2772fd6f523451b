"""The order of rows and the packs of a step: complete, within budget, the same on any number of processes, resumed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train.order
from ivcore.config import ModelConfig
from ivcore.errors import ConfigError, PromptError, TrainingError
from ivcore.tokenizer import Tokenizer
from ivcore.vision import Patches
from train.order import RowStream, epoch_order
from train.packing import Packer, first_fit, to_batch
from train.row import Row
from train.rows import Rows, read_rows
from train.samples import Framing, Sample, SampleBuilder
from train.weighting import place_weights

MICRO = Path(__file__).resolve().parents[1] / "data/reference/iv3-micro"
BUDGET = 40


class Lengths(SampleBuilder):
    """Makes a row labelled `7` into a sample of 7 tokens, the last three trained; and fails for one labelled `bad`."""

    def __init__(self) -> None:
        self.made = 0

    def sample(self, row: Row) -> Sample:
        self.made += 1
        if row.kind == "bad":
            raise PromptError("It is bad.")
        length = int(row.kind)
        ids = np.arange(1, length + 1, dtype=np.int32) * 7 + int(row.id, 16) % 400
        trained = np.arange(length) >= length - 3
        return Sample(row.id, ids, trained, np.tile(np.arange(length, dtype=np.int32), (3, 1)), None, None)


def make_rows(folder: Path, kinds: Iterable[Any], name: str = "rows") -> Rows:
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    lines = [
        json.dumps({"kind": str(kind), "messages": [{**said[0], "content": f"{index}?"}, said[1]]})
        for index, kind in enumerate(kinds)
    ]
    (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return read_rows(folder / f"{name}.jsonl")


def packer(
    rows: Rows, batch: int = 4, *, seed: int = 1, window: int = 5, rank: int = 0, world: int = 1, **how: Any
) -> Packer:
    stream = RowStream(rows, batch, seed=seed, rank=rank, world=world)
    return Packer(stream, Lengths(), budget=BUDGET, window=window, weighting="square", **how)


KINDS = [3, 38, 5, 20, 11, 7, 30, 4, 19, 25, 6, 9, 40, 13, 22, 8, 3]


def test_an_epoch_shows_each_data_set_as_often_as_its_share() -> None:
    datasets = {"a": range(0, 10), "b": range(10, 30), "c": range(30, 35)}
    shares = {"a": 2.3, "b": 0.25}
    orders = [epoch_order(datasets, shares, 3, epoch).tolist() for epoch in range(200)]
    for order in orders:
        counts = Counter(order)
        assert [sum(counts[row] for row in rows) for rows in datasets.values()] == [23, 5, 0]
        assert {counts[row] for row in datasets["a"]} == {2, 3} and max(counts[row] for row in datasets["b"]) == 1
    assert orders[0] == epoch_order(datasets, shares, 3, 0).tolist() != orders[1]
    assert orders[0] != epoch_order(datasets, shares, 4, 0).tolist()
    # Drawn anew in each epoch, so that in the long run all rows are seen: 200 * 5 / 20 = 50 times each.
    seen = Counter(row for order in orders for row in order if row in datasets["b"])
    assert len(seen) == 20 and min(seen.values()) > 30 and max(seen.values()) < 70


@pytest.mark.parametrize("batch", [1, 3, 4, 25])
def test_the_lanes_of_any_number_of_processes_deal_out_one_order(tmp_path: Path, batch: int) -> None:
    rows = make_rows(tmp_path, range(3, 13))
    worlds = [world for world in (1, 2, 3, 5) if batch % world == 0]

    def drawn(world: int) -> list[int]:
        streams = [RowStream(rows, batch, seed=5, rank=rank, world=world) for rank in range(world)]
        return [streams[lane % world].draw(lane, lambda row: row)[0] for _ in range(30) for lane in range(batch)]

    one = drawn(1)
    assert all(drawn(world) == one for world in worlds)
    for epoch in range(len(one) // 10):  # each row once an epoch, in another order
        assert sorted(one[10 * epoch : 10 * (epoch + 1)]) == list(range(10))
    assert one[:10] != one[10:20]


def test_an_unusable_row_is_rejected_once_and_the_lane_goes_on(tmp_path: Path) -> None:
    rows = make_rows(tmp_path, [3, "bad", 4, BUDGET + 1, 5])
    packs = [pack for _ in range(40) for pack in packer(rows, 2).step()]
    assert {row for pack in packs for row in pack.rows} <= {0, 2, 4}
    assert sorted((each.line, each.reason) for each in rows.rejected) == [
        (2, "no usable prompt"),
        (4, "longer than the budget"),
    ]
    assert "takes 41 tokens" in rows.rejected[-1].detail or "takes 41 tokens" in rows.rejected[0].detail


def test_data_without_a_usable_row_is_an_error_and_no_endless_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainingError, match=r"no row to train on: 0 rows; 2 cannot be used: no usable prompt \(2, "):
        packer(make_rows(tmp_path, ["bad", "bad"])).step()
    with pytest.raises(TrainingError, match="There is no row to train on"):
        RowStream(make_rows(tmp_path, []), 1, seed=0)
    monkeypatch.setattr(train.order, "MOST_FAILURES", 3)
    with pytest.raises(TrainingError, match="no row to train on: 7 rows; 3 cannot be used"):
        packer(make_rows(tmp_path, ["bad"] * 10)).step()


def test_one_usable_row_among_few_is_found(tmp_path: Path) -> None:
    for seed in range(20):
        assert {pack.rows for pack in packer(make_rows(tmp_path, ["bad", 30, "bad"]), seed=seed).step()} == {(1,)}


def test_a_batch_or_a_mix_that_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    rows = make_rows(tmp_path, [3], "short_clips")
    with pytest.raises(ConfigError, match="batch is 4, which 3 processes cannot share evenly"):
        RowStream(rows, 4, seed=0, world=3)
    with pytest.raises(ConfigError, match=r"mix names the data set 'short_clip', .* the nearest is 'short_clips'"):
        RowStream(rows, 1, seed=0, shares={"short_clip": 1.0})


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(3, BUDGET), min_size=1, max_size=25),
    st.sampled_from([1, 2, 6]),
    st.integers(1, 8),
    st.integers(0, 9),
)
def test_packs_stay_within_the_budget_and_lose_no_row(
    tmp_path: Path, kinds: list[int], batch: int, window: int, seed: int
) -> None:
    planner = packer(make_rows(tmp_path, kinds), batch, seed=seed, window=window)
    packs = [pack for _ in range(12) for pack in planner.step()]
    for pack in packs:
        assert pack.rows and pack.tokens == sum(kinds[row] for row in pack.rows) <= BUDGET
    # All rows drawn are in a pack or still wait; what is drawn is epoch after epoch of all rows.
    state = planner.state()
    waiting = [row for lane in state["lanes"].values() for row in lane["window"]]
    assert all(len(lane["window"]) < window for lane in state["lanes"].values())
    drawn = Counter(waiting) + Counter(row for pack in packs for row in pack.rows)
    assert drawn.total() == sum(lane["drawn"] for lane in state["lanes"].values())
    if batch == 1:
        least, most = min(drawn[row] for row in range(len(kinds))), max(drawn.values())
        assert most - least <= 1


def test_no_row_waits_for_ever(tmp_path: Path) -> None:
    planner = packer(make_rows(tmp_path, [BUDGET] + [3] * 60), 1, window=4)
    steps = [step for step in range(40) if 0 in planner.step()[0].rows]
    assert len(steps) >= 2  # the long row, for which only an empty pack has room, is in every epoch


def test_rows_are_taken_in_their_order_where_they_fit(tmp_path: Path) -> None:
    rows = make_rows(tmp_path, KINDS)
    planner = packer(rows, 1, seed=2, window=6)
    queue = [int(row) for epoch in range(3) for row in epoch_order(rows.datasets, rows.ratios, 2, epoch)]
    waiting: list[int] = []
    for _ in range(10):  # first fit, written out once more over the known order
        while len(waiting) < 6:
            waiting.append(queue.pop(0))
        expected, room = [], BUDGET
        for row in list(waiting):
            if KINDS[row] <= room:
                expected.append(row)
                room -= KINDS[row]
                waiting.remove(row)
        assert planner.step()[0].rows == tuple(expected)


def test_processes_plan_together_what_one_would_alone(tmp_path: Path) -> None:
    alone = packer(make_rows(tmp_path, KINDS))
    together = [packer(make_rows(tmp_path, KINDS), rank=rank, world=2) for rank in range(2)]
    for _ in range(8):
        parts = [each.step() for each in together]
        assert alone.step() == [parts[lane % 2][lane // 2] for lane in range(4)]


@pytest.mark.parametrize("stop", [0, 1, 3, 7])
@pytest.mark.parametrize("world", [1, 2])
def test_a_restart_goes_on_with_the_very_same_batches(tmp_path: Path, stop: int, world: int) -> None:
    def run(planner: Packer, steps: int) -> list[Any]:
        planned = [planner.step() for _ in range(steps)]
        return [(pack, planner.batch(pack, 1.0).token_ids.tolist()) for packs in planned for pack in packs]

    undisturbed = packer(make_rows(tmp_path, [*KINDS, "bad"]))
    expected = run(undisturbed, 12)
    state: dict[str, Any] = {}
    for rank in range(world):
        before = packer(make_rows(tmp_path, [*KINDS, "bad"]), rank=rank, world=world)
        run(before, stop)
        own = json.loads(json.dumps(before.state()))
        state = {**own, "lanes": {**state.get("lanes", {}), **own["lanes"]}}
    assert len(json.dumps(state)) < 1_000
    after = packer(make_rows(tmp_path, [*KINDS, "bad"]))  # one process, whatever it was before
    after.load_state(state)
    assert run(after, 12 - stop) == expected[4 * stop :]
    assert after.state() == undisturbed.state()


def test_a_state_of_another_run_is_an_error(tmp_path: Path) -> None:
    state = packer(make_rows(tmp_path, KINDS)).state()
    with pytest.raises(TrainingError, match="17 rows an epoch and seed 1, but now there are 16 and seed 1"):
        packer(make_rows(tmp_path, KINDS[1:])).load_state(state)
    with pytest.raises(TrainingError, match="and seed 2; resume"):
        packer(make_rows(tmp_path, KINDS), seed=2).load_state(state)
    with pytest.raises(TrainingError, match="without lane 4"):
        packer(make_rows(tmp_path, KINDS), 8).load_state(state)


def test_samples_are_kept_from_planning_as_far_as_told(tmp_path: Path, make_clip: Callable[..., Path]) -> None:
    clip = make_clip(frames=8, fps=4, size=(64, 64))
    video = [{"type": "video", "video": clip.name}, {"type": "text", "text": "?"}]
    row = {"messages": [{"role": "user", "content": video}, {"role": "assistant", "content": "A."}]}
    (tmp_path / "clips.jsonl").write_text(json.dumps(row))
    builder = SampleBuilder(Tokenizer.from_dir(MICRO), Framing(max_tokens=500))
    batches = []
    for hold in (0, 1 << 20):
        stream = RowStream(read_rows(tmp_path / "clips.jsonl"), 1, seed=0)
        planner = Packer(stream, builder, budget=500, window=1, weighting="token", hold_bytes=hold)
        (pack,) = planner.step()
        clip.touch() if hold else None  # no second look at a sample that is held
        batches.append(planner.batch(pack, pack.weight))
    np.testing.assert_array_equal(np.asarray(batches[0].pixels), np.asarray(batches[1].pixels))
    assert batches[0].token_ids.tolist() == batches[1].token_ids.tolist()


def test_the_weights_of_a_step_add_up_to_one_and_batches_fit_the_model(tmp_path: Path) -> None:
    planner = packer(make_rows(tmp_path, [kind for kind in KINDS if kind > 3]))
    packs = planner.step()
    total = sum(pack.weight for pack in packs)
    batches = [planner.batch(pack, total) for pack in packs]
    assert sum(batch.weights.sum() for batch in batches) == pytest.approx(1.0, rel=1e-5)
    # Three trained tokens in each sample: each sample weighs the same.
    rows = sum(len(pack.rows) for pack in packs)
    for batch in batches:
        batch.check(ModelConfig.from_dir(MICRO))
        assert batch.weights[batch.weights > 0] == pytest.approx(1 / (3 * rows), rel=1e-5)


def test_a_target_is_the_next_token_of_the_same_row_and_positions_begin_anew() -> None:
    def sample(ids: list[int], trained: list[int]) -> Sample:
        positions = np.tile(np.arange(len(ids), dtype=np.int32), (3, 1))
        return Sample("", np.array(ids, np.int32), np.array(trained, bool), positions, None, None)

    samples = [sample([1, 2, 3, 4], [0, 0, 1, 1]), sample([5, 6], [0, 1]), sample([7, 8, 9], [0, 1, 0])]
    batch = to_batch(samples, [place_weights(each.trained, "sample") for each in samples])
    assert batch.targets.tolist() == [0, 3, 4, 0, 6, 0, 8, 0, 0]
    assert batch.weights.tolist() == [0, 0.5, 0.5, 0, 1, 0, 1, 0, 0]
    assert batch.lengths.tolist() == [4, 2, 3] and batch.position_ids[0].tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2]
    assert (batch.pixels, batch.grid_thw) == (None, None)
    assert [array.dtype for array in (batch.targets, batch.weights, batch.lengths)] == [np.int32, np.float32, np.int32]


def test_the_pixels_of_samples_are_joined_and_stay_frames(make_clip: Callable[..., Path]) -> None:
    builder = SampleBuilder(Tokenizer.from_dir(MICRO))

    def messages(name: str, frames: int) -> tuple[dict[str, Any], ...]:
        path = str(make_clip(name, frames=frames, fps=4, size=(64, 64)))
        content = [{"type": "video", "video": path}, {"type": "text", "text": "?"}]
        return {"role": "user", "content": content}, {"role": "assistant", "content": "A."}

    rows = [
        Row(name, messages(name, frames), (), None, None, None, "", "")
        for name, frames in (("a.mp4", 8), ("b.mp4", 12))
    ]
    samples = [builder.sample(row) for row in rows]
    samples.insert(
        1,
        builder.rollout(
            "", builder.prompt(Row("", ({"role": "user", "content": "?"},), (), None, None, None, "", "")), [7]
        ),
    )
    batch = to_batch(samples, [place_weights(each.trained, "token") for each in samples])
    batch.check(ModelConfig.from_dir(MICRO))
    assert isinstance(batch.pixels, Patches) and batch.grid_thw is not None
    assert batch.pixels.nbytes == samples[0].nbytes + samples[2].nbytes
    each = [np.asarray(sample.pixels) for sample in (samples[0], samples[2])]
    np.testing.assert_array_equal(np.asarray(batch.pixels), np.concatenate(each))
    assert batch.grid_thw.tolist() == [samples[0].grid_thw[0].tolist(), samples[2].grid_thw[0].tolist()]  # type: ignore[index]


@given(st.lists(st.integers(1, 30), max_size=40))
def test_first_fit_puts_each_into_the_first_pack_with_room(lengths: list[int]) -> None:
    packs = first_fit(lengths, 30)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    for number, pack in enumerate(packs):
        assert pack == sorted(pack) and sum(lengths[index] for index in pack) <= 30
        for index in pack:
            for earlier in packs[:number]:
                assert sum(lengths[other] for other in earlier if other < index) + lengths[index] > 30
