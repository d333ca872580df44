"""Whether data keep up: tokenizing beside tiktoken alone, batches beside what a GPU consumes, the wait while training.

    python -m benchmarks.data -c configs/paper/base.yaml -c configs/paper/seed42.yaml ... --out data.json

What is no option of this script goes to `fit`, whose corpus, tokenizer, probe and batch size are measured:

* tokenizing, in tokens per second: tiktoken's `encode_ordinary_batch` on the same texts in memory, with one thread and
  with one a core (`threads`), and in as many processes as there are cores, which share no interpreter's lock
  (`processes`); then this project's `tokenize` with its cache files (`tokenize`), and with reading the text before it
  (`prepare`), both with an empty cache.
* batches, in positions (sequences x context) per second: examples made one by one and stacked (`one by one`), and the
  training stream without workers and with 1 to `--workers`, unpacked and on a machine with a GPU pinned, beside the
  `--consumed` positions per second that training takes.
* waiting: the share of training time that `callbacks.DataWait` reports at the end of a run of `--steps` without probes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import pandas as pd
import tiktoken
import torch
import yaml
from jsonargparse import ArgumentParser

from mini_gpt_pl.stories.data.batch import Batch, collate
from mini_gpt_pl.stories.data.corpus import available_cores, load_texts, tokenize
from mini_gpt_pl.stories.data.datamodule import ProbedStories
from mini_gpt_pl.stories.data.probe import Stream, sample_rng
from mini_gpt_pl.stories.data.stream import TrainStream

# What an H100 takes with the `standard` probes live, in positions per second (see docs/speed.md).
_CONSUMED = 1_250_000


def configured(arguments: list[str]) -> ProbedStories:
    """Build the data module of a `fit` command line, without a model."""
    command = [sys.executable, "cli.py", "fit", *arguments, "--print_config"]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    parser = ArgumentParser()
    parser.add_class_arguments(ProbedStories, "data")
    config = parser.parse_object({"data": yaml.safe_load(printed)["data"]})
    data: ProbedStories = parser.instantiate_classes(config).data
    return data


def seconds(work: Callable[[], object]) -> float:
    """Wall time of a piece of work."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def tokenizing(data: ProbedStories, repeats: int) -> dict[str, float]:
    """Measure tokens per second of each way, the median of some alternating repeats."""
    cores, encoding = available_cores(), data.encoding
    texts = load_texts(data.corpus, "train", data.cache_dir)
    stories: list[str] = texts["text"][:]
    count = sum(map(len, encoding.encode_ordinary_batch(stories)))
    shares = [stories[first::cores] for first in range(cores)]
    times: dict[str, list[float]] = {name: [] for name in ("one thread", "threads", "processes", "tokenize", "prepare")}
    with multiprocessing.get_context("fork").Pool(cores, _take, (encoding, shares)) as pool:
        pool.map(_encode_share, range(cores), 1)  # the first call builds tiktoken's tables
        for _ in range(repeats):
            times["one thread"].append(seconds(lambda: encoding.encode_ordinary_batch(stories, num_threads=1)))
            times["threads"].append(seconds(lambda: encoding.encode_ordinary_batch(stories, num_threads=cores)))
            times["processes"].append(seconds(lambda: pool.map(_encode_share, range(cores), 1)))
            with tempfile.TemporaryDirectory() as folder:
                begun = time.perf_counter()
                fresh = load_texts(data.corpus, "train", folder)
                read = time.perf_counter()
                assert len(tokenize(fresh, encoding, data.corpus.num_proc).tokens) == count
                times["tokenize"].append(time.perf_counter() - read)
                times["prepare"].append(time.perf_counter() - begun)
    return {name: count / median(values) for name, values in times.items()}


_SHARE: tuple[tiktoken.Encoding, list[list[str]]]


def _take(*share: Any) -> None:
    global _SHARE
    _SHARE = share


def _encode_share(index: int) -> int:
    encoding, shares = _SHARE
    return sum(map(len, encoding.encode_ordinary_batch(shares[index], num_threads=1)))


def batches(data: ProbedStories, workers: int, number: int, repeats: int) -> dict[str, float]:
    """Measure positions per second of each way to make training batches, the median of some alternating repeats."""
    counts = range(workers + 1)
    rates: dict[str, list[float]] = {name: [] for name in ("one by one", *map(_workers, counts))}
    for _ in range(repeats):
        rates["one by one"].append(_rate(_one_by_one(data), number))
        for count in counts:
            data.num_workers = count
            stream = data.train_dataloader()
            rates[_workers(count)].append(_rate(_endless(stream), number))
            data.teardown()
    return {name: median(values) for name, values in rates.items()}


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"


def _one_by_one(data: ProbedStories) -> Iterator[Batch]:
    stories, index = data._read("train"), 0
    while True:
        rows = range(index, index + data.batch_size)
        yield collate(
            [
                data.probe.training_example(stories[row % len(stories)], sample_rng(data.seed, Stream.TRAIN, 0, row))
                for row in rows
            ]
        )
        index += data.batch_size


def _endless(stream: TrainStream) -> Iterator[Batch]:
    while True:
        yield from stream


def _rate(source: Iterator[Batch], number: int) -> float:
    # Workers start, and fill their queue: it is as full when the clock starts as when it stops.
    for _ in islice(source, number // 4 + 1):
        pass
    begun = time.perf_counter()
    positions = sum(batch.tokens.numel() for batch in islice(source, number))
    return positions / (time.perf_counter() - begun)


def waiting(arguments: list[str], steps: int) -> float:
    """Train without probes and return the share of the time that went by waiting for data."""
    with tempfile.TemporaryDirectory() as folder:
        # The last list of callbacks replaces those of the configuration; the wait is appended to it.
        watch = ["-c", "configs/probes/off.yaml", "--trainer.callbacks+=callbacks.DataWait", "--trainer.logger=false"]
        length = [f"--trainer.max_steps={steps}", "--trainer.log_every_n_steps=5", "--trainer.limit_val_batches=0"]
        quiet = ["--trainer.enable_progress_bar=false", "--run_dir", f"{folder}/run"]
        command = [sys.executable, "cli.py", "fit", *arguments, *watch, *length, *quiet]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return float(pd.read_csv(f"{folder}/run/metrics.csv")["overhead/data_wait"].dropna().iloc[-1])


def main() -> None:
    """Print every rate, the ratios, and the share of the wait."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--consumed", type=float, default=_CONSUMED, help="positions per second that training takes")
    parser.add_argument("--workers", type=int, default=4, help="most workers of the training stream")
    parser.add_argument("--batches", type=int, default=300, help="batches under the clock, in every arm")
    parser.add_argument("--steps", type=int, default=200, help="steps of the run whose wait is measured; 0 for none")
    parser.add_argument("--repeats", type=int, default=3, help="times that each arm is measured, alternating")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options, rest = parser.parse_known_args()
    datasets.disable_progress_bars()
    data = configured(rest)
    data.setup("fit")
    result: dict[str, Any] = {
        "cores": available_cores(),
        "tokens_per_second": tokenizing(data, options.repeats),
        "positions_per_second": batches(data, options.workers, options.batches, options.repeats),
        "consumed": options.consumed,
        "data_wait": waiting(rest, options.steps) if options.steps else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "tiktoken": tiktoken.__version__,
    }
    report(result)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def report(result: dict[str, Any]) -> None:
    """Print what was measured, and add the ratios to it."""
    tokens, positions = result["tokens_per_second"], result["positions_per_second"]
    result["tokenize_over"] = {name: tokens["tokenize"] / tokens[name] for name in tokens if name != "tokenize"}
    result["prepare_over"] = {name: tokens["prepare"] / tokens[name] for name in tokens if name != "prepare"}
    result["times_consumed"] = {name: rate / result["consumed"] for name, rate in positions.items()}
    print(f"tokenizing on {result['cores']} cores")
    for name, rate in tokens.items():
        print(f"  {name:12s} {rate:14,.0f} tokens/s")
    for name in ("one thread", "threads", "processes"):
        ratios = result["tokenize_over"][name], result["prepare_over"][name]
        print(f"  over {name:12s} tokenize {ratios[0]:6.2f}  prepare {ratios[1]:6.2f}")
    print(f"batches, beside {result['consumed']:,.0f} positions/s consumed")
    for name, rate in positions.items():
        print(f"  {name:12s} {rate:14,.0f} positions/s {result['times_consumed'][name]:8.2f}")
    if result["data_wait"] is not None:
        print(f"waiting for data: {result['data_wait']:.2%} of training time")


if __name__ == "__main__":
    main()
