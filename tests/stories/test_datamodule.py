from __future__ import annotations

import dataclasses
import functools
import hashlib
import pickle
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from conftest import one_line_error
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from mini_gpt_pl.stories.data import datamodule
from mini_gpt_pl.stories.data.batch import Batch, Piped, collate
from mini_gpt_pl.stories.data.corpus import CorpusConfig, Split, TokenizedStories
from mini_gpt_pl.stories.data.datamodule import EVALUATION_SETS, ProbedStories
from mini_gpt_pl.stories.data.probe import Probe, ProbeConfig, choose_codewords, sample_rng
from mini_gpt_pl.stories.data.stream import TrainingBatches, TrainStream, _StorySampler
from mini_gpt_pl.stories.data.tokenizer import load_tokenizer
from mini_gpt_pl.stories.objective import count_targets

CONTEXT = 64
PROBE = ProbeConfig(p_probe=0.5, n_codewords=20, train_gap=(2, 6), ood_gap=(10, 20), eval_examples=30)
CORPUS = CorpusConfig(train_rows=30, val_rows=11)
STORIES, BATCH = 22, 3  # 7 batches an epoch, one story left over


@functools.cache
def probe() -> Probe:
    encoding = load_tokenizer("builtin")
    return Probe(encoding, choose_codewords(encoding, 20, 42), PROBE, CONTEXT)


@functools.cache
def stories() -> TokenizedStories:
    """Stories of 5 to 130 tokens; the first two tokens of each are its own."""
    rng = sample_rng(0, 9, 0, 0)
    lengths = rng.integers(5, 130, size=STORIES)
    offsets = np.concatenate([[0], lengths.cumsum()])
    return TokenizedStories(rng.integers(300, 2_000, size=offsets[-1]).astype(np.uint16), offsets)


def stream_of(window: int = 1, batch_size: int = BATCH, seed: int = 42, **options: Any) -> TrainStream:
    return TrainStream(stories(), probe(), batch_size, seed, window=lambda: window, **options)


def digest(batch: Batch) -> str:
    return hashlib.sha256(b"".join(column.numpy().tobytes() for column in batch)).hexdigest()


def epochs(stream: TrainStream, n: int) -> list[str]:
    return [digest(batch) for _ in range(n) for batch in stream]


def test_batches_have_the_promised_shapes() -> None:
    stream = stream_of()
    batches = list(stream)
    assert len(batches) == len(stream) == 7
    for batch in batches:
        rows = int(batch.offsets[-1])
        assert [column.shape for column in batch] == [(BATCH, CONTEXT)] * 3 + [()] * 2 + [(rows,), (BATCH + 1,)]
        integers = [torch.int64] * 2
        assert [column.dtype for column in batch] == [*integers, torch.bool, *integers, torch.int64, torch.int32]


def test_a_sample_is_a_function_of_its_key() -> None:
    """Whatever the order of access, a stream's row is the probe's example for (seed, epoch, story)."""
    order = sample_rng(42, 0, 1, 0).permutation(STORIES)
    stream = stream_of()
    list(stream)
    batches = list(stream)
    for row in reversed(range(7 * BATCH)):
        index = int(order[row])
        expected = probe().training_example(stories()[index], sample_rng(42, 1, 1, index))
        batch = batches[row // BATCH]
        for column, values in zip(batch[:3], expected, strict=True):
            np.testing.assert_array_equal(column[row % BATCH].numpy(), values)


def test_a_batch_is_its_examples_one_by_one() -> None:
    """Rows cut together, and one generator put to each sample, give the bytes of examples made alone."""
    batches = TrainingBatches(stories(), probe(), seed=5)
    rows = np.array([7, 0, 21, 7, 3, *range(STORIES)])
    assert any(len(stories()[index]) > CONTEXT + 1 for index in rows)
    for epoch in (0, 4, 2**40):
        alone = [probe().training_example(stories()[index], sample_rng(5, 1, epoch, index)) for index in rows]
        masks = [example.probe_mask.any() for example in alone]
        assert any(masks) and not all(masks)
        assert digest(batches[epoch, rows]) == digest(collate(alone))


def test_a_batch_arrives_from_a_pipe_as_it_was_sent() -> None:
    batch = next(iter(stream_of()))
    arrived = pickle.loads(pickle.dumps(Piped(batch))).batch()
    assert isinstance(arrived, Batch) and digest(arrived) == digest(batch)
    assert [column.dtype for column in arrived] == [column.dtype for column in batch]
    assert [column.shape for column in arrived] == [column.shape for column in batch]
    arrived.tokens.zero_()  # its own memory, to be written to


def test_an_epoch_visits_each_story_once_and_the_next_in_another_order() -> None:
    sampler = stream_of()._sampler
    assert len(sampler) == 7
    for epoch in range(2):
        read = list(islice(sampler, 7 * epoch, 7 * (epoch + 1)))
        visited = np.concatenate([rows for _, rows in read])
        assert len(set(visited)) == len(visited) == 7 * BATCH and {number for number, _ in read} == {epoch}
    first, second = epochs(stream_of(), 1), epochs(stream_of(epoch=1), 1)
    assert not set(first) & set(second)
    assert epochs(stream_of(), 2) == first + second
    assert not set(first) & set(epochs(stream_of(seed=43), 1))


@pytest.mark.parametrize("window", [1, 3])
def test_workers_do_not_change_the_stream(window: int) -> None:
    stream = stream_of(window, num_workers=2)
    assert epochs(stream, 2) == epochs(stream_of(window), 2)
    iterator = iter(stream)
    next(iterator)
    stream.close()
    assert digest(next(iter(stream))) == epochs(stream_of(window, epoch=3), 1)[0]
    stream.close()


@pytest.mark.parametrize("window", [1, 2, 3, 10])
def test_resume_at_every_position(window: int) -> None:
    length = len(stream_of(window))
    whole = epochs(stream_of(window), 3)
    for position in range(2 * length + 1):
        stream = stream_of(window)
        seen, iterator = [], iter(stream)
        for _ in range(position):
            try:
                batch = next(iterator)
            except StopIteration:
                iterator = iter(stream)
                batch = next(iterator)
            seen.append(digest(batch))
        state = stream.state_dict()
        assert seen == whole[:position]
        assert state["epoch"] * length + state["batches"] == position
        fresh = stream_of(window)
        iter(fresh)
        fresh.load_state_dict(state)
        # the position at the end of an epoch and the start of the next are one
        rest = [digest(batch) for batch in fresh]
        while len(rest) < 3 * length - position:
            rest += [digest(batch) for batch in fresh]
        assert rest == whole[position:]


def test_lightning_may_call_iter_before_it_restores_the_position() -> None:
    """Nothing happens before the first batch is asked for."""
    stream = stream_of()
    iterator = iter(stream)
    stream.load_state_dict({**stream.state_dict(), "epoch": 1, "batches": 4})
    assert [digest(batch) for batch in iterator] == epochs(stream_of(), 2)[7 + 4 :]
    untouched = stream_of()
    for _ in range(3):
        iter(untouched)
    assert epochs(untouched, 1) == epochs(stream_of(), 1)


def test_an_abandoned_epoch_is_not_resumed() -> None:
    stream = stream_of()
    next(iter(stream))
    assert epochs(stream, 1) == epochs(stream_of(epoch=1), 1)


def test_position_of_another_layout_is_refused() -> None:
    state = stream_of().state_dict()
    with one_line_error("global_batch=3 and this one 4"):
        stream_of(batch_size=4).load_state_dict(state)
    with one_line_error("stories=9 and this one 22"):
        stream_of().load_state_dict({**state, "stories": 9})


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_the_global_batch(world_size: int) -> None:
    single = stream_of(batch_size=2 * world_size)
    ranks = [stream_of(batch_size=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(stream) for stream in ranks} == {len(single)}
    for _ in range(2):
        for whole, *parts in zip(single, *ranks, strict=True):
            for k in range(3):
                torch.testing.assert_close(torch.cat([part[k] for part in parts]), whole[k])
            assert sum(int(part.lm_count) for part in parts) == whole.lm_count
    # a resume on another number of ranks goes on with the same stories
    ranks[0].load_state_dict(single.state_dict())


@pytest.mark.parametrize("window", [1, 2, 3, 7, 9])
def test_counts_are_those_of_the_whole_window(window: int) -> None:
    batches = list(stream_of(window))
    assert len(batches) == (7 // window * window or 7)  # whole optimizer batches, if the stories suffice for one
    for start in range(0, len(batches), window):
        members = batches[start : start + window]
        counts = [count_targets(batch.targets, batch.probe_mask) for batch in members]
        for batch in members:
            assert batch.lm_count == sum(count.lm for count in counts)
            assert batch.probe_count == sum(count.probe for count in counts)
    assert sum(int(batch.probe_mask.sum()) for batch in batches) > 0
    plain = stream_of()
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(batches, plain, strict=False))


def test_limit_ends_the_epoch_and_its_last_window() -> None:
    stream = stream_of(window=2, limit=lambda: 3)
    batches = list(stream)
    assert len(batches) == 3 and stream.state_dict()["batches"] == 3
    last = batches[2]
    assert last.lm_count == count_targets(last.targets, last.probe_mask).lm
    fresh = stream_of(window=2, limit=lambda: 3)
    fresh.load_state_dict(stream.state_dict())
    assert epochs(fresh, 1) == epochs(stream, 1)
    assert fresh.state_dict()["epoch"] == 1


@pytest.mark.parametrize(("window", "limit", "starts"), [(1, 99, 1), (2, 99, 1), (3, 99, 1), (4, 99, 1), (2, 3, 3)])
def test_one_reader_goes_through_the_epochs(window: int, limit: int, starts: int, monkeypatch: Any) -> None:
    """It passes over the stories that make no whole window; an epoch that is broken off needs another one."""
    begun: list[object] = []
    monkeypatch.setattr(_StorySampler, "__iter__", _counted(_StorySampler.__iter__, begun))
    stream = stream_of(window, limit=lambda: limit)
    seen = epochs(stream, 3)
    assert len(begun) == starts
    alone = [epochs(stream_of(window, limit=lambda: limit, epoch=epoch), 1) for epoch in range(3)]
    assert seen == [*alone[0], *alone[1], *alone[2]]


def _counted(method: Callable[..., Any], calls: list[object]) -> Callable[..., Any]:
    def counted(self: object) -> Any:
        calls.append(self)
        return method(self)

    return counted


def test_reading_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    epochs(stream_of(), 2)
    assert torch.equal(before, torch.get_rng_state())


# ---- the data module


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    datasets.disable_progress_bars()
    return str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def module(cache_dir: str) -> Callable[..., ProbedStories]:
    def build(**options: Any) -> ProbedStories:
        defaults = {"corpus": CORPUS, "probe": PROBE, "context": CONTEXT, "batch_size": 4, "val_batches": 2}
        return ProbedStories(**{**defaults, "eval_batch_size": 8, "cache_dir": cache_dir, **options})

    return build


Build = Callable[..., ProbedStories]


def test_attributes_exist_before_setup(module: Build) -> None:
    data = module()
    assert data.vocab_size == data.encoding.n_vocab == data.eos_id + 1
    assert len(data.codewords) == 20 and data.context == CONTEXT
    assert not data.hparams
    with pytest.raises(RuntimeError, match="setup"):
        data.val_dataloader()
    with pytest.raises(RuntimeError, match="setup"):
        data.train_dataloader()


def test_setup_is_idempotent_and_prepare_fills_the_cache(module: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    module().prepare_data()
    data = module()

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr("mini_gpt_pl.stories.data.corpus._encode", forbidden)
    monkeypatch.setattr("mini_gpt_pl.stories.data.stories.story", forbidden)
    data.setup("fit")
    train, sets = data._train, data._evaluation
    data.setup("fit")
    data.setup("validate")
    assert data._train is train and data._evaluation is sets
    assert len(data.train_dataloader()) == 7


def test_the_process_that_prepares_reads_each_split_once(module: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    data, load = module(), datamodule.load_texts
    read: list[str] = []

    def counted(config: CorpusConfig, split: Split, cache_dir: str | None) -> datasets.Dataset:
        read.append(split)
        return load(config, split, cache_dir)

    monkeypatch.setattr(datamodule, "load_texts", counted)
    data.prepare_data()
    data.setup("fit")
    assert read == ["train", "val"]


def test_evaluation_sets_are_fixed_and_follow_the_seed(module: Build) -> None:
    first, again, other = module(), module(num_workers=2, batch_size=2, val_batches=4), module(seed=43)
    for data in (first, again, other):
        data.setup("validate")
    assert tuple(first.validation_hashes) == EVALUATION_SETS
    assert first.validation_hashes == again.validation_hashes
    assert all(first.validation_hashes[name] != other.validation_hashes[name] for name in EVALUATION_SETS)
    one, two = ([digest(batch) for loader in first.val_dataloader() for batch in loader] for _ in range(2))
    assert one == two == [digest(batch) for loader in first.test_dataloader() for batch in loader]


def test_evaluation_hash_is_that_of_the_bytes(module: Build) -> None:
    data = module()
    data.setup("validate")
    for name, loader in zip(EVALUATION_SETS, data.val_dataloader(), strict=True):
        batches = list(loader)
        columns = [torch.cat([batch[k] for batch in batches]).numpy().tobytes() for k in range(3)]
        assert hashlib.sha256(b"".join(columns)).hexdigest() == data.validation_hashes[name]


def test_evaluation_batches(module: Build) -> None:
    data = module()
    data.setup("validate")
    before = torch.get_rng_state()
    lm, inside, outside = (list(loader) for loader in data.val_dataloader())
    assert torch.equal(before, torch.get_rng_state())
    assert [len(batch.tokens) for batch in lm] == [4, 4]
    assert [len(batch.tokens) for batch in inside] == [len(batch.tokens) for batch in outside] == [8, 8, 8, 6]
    assert not any(batch.probe_mask.any() for batch in lm)
    for batch in (*lm, *inside, *outside):
        assert (batch.lm_count, batch.probe_count) == count_targets(batch.targets, batch.probe_mask)
    for batch in (*inside, *outside):
        assert (batch.probe_mask.sum(1) == 1).all()
    # longer gaps make longer examples
    assert outside[0].lm_count > inside[0].lm_count


def test_few_validation_stories_make_fewer_batches(module: Build) -> None:
    data = module(val_batches=50)
    data.setup("validate")
    assert [len(batch.tokens) for batch in data.val_dataloader()[0]] == [4, 4, 3]


def test_story_filler_is_running_text(module: Build) -> None:
    config = dataclasses.replace(PROBE, filler="story")
    data = module(probe=config)
    data.setup("validate")
    assert data.validation_hashes["probe_in"] != module_hash(module)
    for loader in data.val_dataloader()[1:]:
        for batch in loader:
            assert (batch.probe_mask.sum(1) == 1).all()
    first = data.val_dataloader()[1].dataset[0].tokens[0]
    story = data._read("val")[0]
    assert first[:2].tolist() == story[:2].tolist()


def module_hash(module: Build) -> str:
    data = module()
    data.setup("validate")
    return data.validation_hashes["probe_in"]


def test_errors_of_the_data_module(module: Build) -> None:
    with one_line_error("30 training stories .* 31 are needed"):
        module(batch_size=31).setup("fit")
    with one_line_error("the longest gap that fits is"):
        module(context=20)
    with one_line_error("n_codewords=100000"):
        module(probe=dataclasses.replace(PROBE, n_codewords=100_000))
    for option in ("context", "batch_size", "val_batches", "eval_batch_size"):
        with one_line_error(f"--data.{option}=0"):
            module(**{option: 0})
    with one_line_error("num_workers=-1"):
        module(num_workers=-1)


class Recorder(LightningModule):
    """Remembers what it was given, and takes steps on one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, str]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert isinstance(batch, Batch)
        self.seen.append((batch_idx, digest(batch)))
        return (self.weight * batch.lm_count).sum()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int) -> None:
        assert isinstance(batch, Batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def fit(data: ProbedStories, path: Path, ckpt: str | None = None, **options: Any) -> Recorder:
    model = Recorder()
    save = ModelCheckpoint(path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"max_epochs": 3, "accelerator": "cpu", "callbacks": [save], "num_sanity_val_steps": 1}
    trainer = Trainer(**{**quiet, **defaults, **options})
    trainer.fit(model, datamodule=data, ckpt_path=ckpt)
    return model


@pytest.mark.parametrize("limit", [1.0, 5])
def test_lightning_resumes_exactly_from_every_step(module: Build, tmp_path: Path, limit: float) -> None:
    """Seven batches an epoch in windows of two: three whole windows, or five batches, which end in half a window."""
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "limit_train_batches": limit}
    whole = fit(module(), tmp_path, **options).seen
    batches = 6 if limit == 1.0 else 5
    steps = (batches + 1) // 2
    assert [index for index, _ in whole] == list(range(batches)) * 3
    assert len({value for _, value in whole}) == 3 * batches
    for step in range(1, 3 * steps):
        resumed = fit(module(), tmp_path / "again", str(tmp_path / f"step={step}.ckpt"), **options).seen
        position = step // steps * batches + 2 * (step % steps)
        assert resumed == whole[position:]


def test_second_fit_of_a_trainer_goes_on(module: Build, tmp_path: Path) -> None:
    data, model = module(), Recorder()
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", **quiet)
    trainer.fit(model, datamodule=data)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, datamodule=data)
    assert model.seen == fit(module(), tmp_path, max_epochs=2).seen


def test_overfit_batches_is_refused(module: Build, tmp_path: Path) -> None:
    with one_line_error("overfit_batches"):
        fit(module(), tmp_path, overfit_batches=2)
