"""The tables of docs/speed.md, from the committed results: what the page says is what was measured.

    python -m benchmarks.page            # puts the tables of all results into the page
    python -m benchmarks.page --check    # says whether they are there

A table stands between two comments that name its result, as `<!-- throughput_h100 -->` and `<!-- /throughput_h100 -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "speed.md"

Found = Mapping[str, Any]
Rows = Iterable[Sequence[str]]

_ARMS = {
    "transformers": "Hugging Face's GPT-2 of the same shape, compiled, plain loop",
    "plain": "this model as plain operations on every position, compiled, plain loop (nanoGPT's tricks)",
    "packed": "this model as it trains, plain loop",
    "none": "the same under Lightning, data and logging included, no probe",
    "standard": "the same with the `standard` probes live",
    "every_step": "the same with the `every_step` probes live",
}


def table(head: Sequence[str], rows: Rows) -> str:
    """Lay out a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def throughput(found: Found) -> str:
    """Milliseconds a step, tokens a second, our speed with probes over each arm's, and what each probe takes."""
    ms, speed, over = found["ms_per_step"], found["tokens_per_second"], found["over"]
    rows = [
        [_ARMS[arm], f"{ms[arm]:.2f}", f"{round(speed[arm], -3):,.0f}", f"{over[arm]:.2f}" if arm in over else ""]
        for arm in ms
    ]
    caption = f"{found['share_computed']:.0%} of {found['positions_per_step']:,} positions are computed.".replace(
        "%", " %"
    )
    head = ["arm", "ms a step", "tokens/s", f"`{found['compared']}` over it"]
    return "\n\n".join([table(head, rows), caption, overhead(found["overhead"])])


def overhead(found: Found) -> str:
    """What each preset adds, and each probe in it by its own clock."""
    presets = list(found["over_none"])
    probes = dict.fromkeys(name for preset in presets for name in found["shares"][preset])
    apart = ("fraction", "data_wait", "stretch")
    pairs = found.get("pairs", {})
    rows = [["whole run against the run without", *(_whole(found["over_none"], pairs, preset) for preset in presets)]]
    for probe in probes:
        if probe not in apart:
            shares = (found["shares"][preset].get(probe) for preset in presets)
            rows.append([f"`{probe}`", *("" if share is None else f"{share:.2%}" for share in shares)])
    steps = ["ms a step", *(f"{found['ms_per_step'][preset]:.2f}" for preset in presets)]
    none = f"Without probes: {found['ms_per_step']['none']:.2f} ms a step."
    return table(["", *(f"`{preset}`" for preset in presets)], [*rows, steps]) + "\n\n" + none


def _whole(over: Found, pairs: Found, preset: str) -> str:
    """What a preset adds; of runs that were timed in pairs, with the least and the most of the pairs."""
    of = sorted(set(pairs.get(preset, [])))
    return f"{over[preset]:+.1%}" + (f" ({of[0]:+.1%} to {of[-1]:+.1%})" if len(of) > 1 else "")


def fisher(found: Found) -> str:
    """Time of each arm, and over that of the bare passes."""
    rows = [[name, f"{ms:,.0f}", f"{found['over_passes'][name]:.3f}"] for name, ms in found["ms"].items()]
    differences = found["difference_from_curvlinops"].values()
    worst = max((value for by_precision in differences for value in by_precision.values()), default=None)
    caption = "" if worst is None else f"\n\nQuotients differ from those of curvlinops by {worst:.1e} at most."
    return table([f"arm, M = {found['passes']}", "ms", "over the passes"], rows) + caption


def evaluation(found: Found) -> str:
    """Time of a whole evaluation, of its parts, and of the bare forward passes."""
    rows = [[name, f"{ms:,.0f}"] for name, ms in found["ms"].items()]
    caption = f"{found['examples']:,} examples; Lightning's share is {found['lightning_share']:.1%}."
    return table(["", "ms"], rows) + "\n\n" + caption


def data(found: Found) -> str:
    """Rates of tokenizing and of batches."""
    tokens, positions = found["tokens_per_second"], found["positions_per_second"]
    threads, consumed = tokens["threads"], found["consumed"]
    rows = [
        [f"tokenizing: {name}", f"{rate / 1e6:.2f} M tokens/s", f"{rate / threads:.2f} of tiktoken's threads"]
        for name, rate in tokens.items()
    ]
    rows += [
        [f"batches: {name}", f"{rate / 1e6:.2f} M positions/s", f"{rate / consumed:.1f} of what training takes"]
        for name, rate in positions.items()
    ]
    wait = "" if found["data_wait"] is None else f" Waiting for data: {found['data_wait']:.2%} of training time."
    return table(["", "rate", "beside"], rows) + f"\n\n{found['cores']} cores.{wait}"


def startup(found: Found) -> str:
    """Seconds of each part of a start."""
    arms = [name for name in ("first_run", "cached", "with_compile") if name in found]
    rows = [[part, *(f"{found[arm][part]:.1f}" for arm in arms)] for part in found["cached"]]
    rows.append(["together", *(f"{sum(found[arm].values()):.1f}" for arm in arms)])
    helps = ", ".join(f"`cli.py {command}` {seconds:.1f} s" for command, seconds in found["help"].items())
    parts = table(["seconds", *(arm.replace("_", " ") for arm in arms)], rows)
    libraries = ", ".join(f"`{name}` {seconds:.1f} s" for name, seconds in found.get("libraries", {}).items())
    return f"{parts}\n\n{helps}." + (f" Imports by themselves: {libraries}." if libraries else "")


def trajectory(found: Found) -> str:
    """Principal components from files, the Gram row, and what a snapshot makes training wait for."""
    lines: list[Sequence[str]] = []
    for source in ("from the disk", "from the page cache"):
        if "from_files" in found:
            read = found["from_files"][source]
            beside = f"{read['ratio']:.2f} of reading once, {read['pca_peak_gb']:.2f} GB at the peak"
            lines.append([f"components of every block and the whole, {source}", f"{read['pca_s']:.2f} s", beside])
    if "from_gram_file_ms" in found:
        lines.append(["the same from the Gram file", f"{found['from_gram_file_ms']:.1f} ms", ""])
    if "svd_of_one_block" in found:
        lines.append(["NumPy's decomposition of one block", f"{found['svd_of_one_block']['seconds']:.1f} s", ""])
    row = found["gram_row"]
    lines.append(["Gram row of one more snapshot", f"{row['row_ms']:.2f} ms",
                  f"{row['floor_ms']:.2f} ms to copy as many bytes"])  # fmt: skip
    for place in ("model", "cpu", "disk"):
        took = found[place]
        lines.append([f"handing a snapshot over, `keep_on: {place}`", f"{took['handing_over_ms']:.2f} ms",
                      f"{took['direct_write_ms']:.0f} ms to write it on the spot"])  # fmt: skip
    return table([f"{found['snapshots']} snapshots of {found['dim']:,} weights", "", "beside"], lines)


def ranks(found: Found) -> str:
    """Milliseconds a step, tokens a second, and how many times the speed of one rank."""
    ms, speed, times = found["ms_per_step"], found["tokens_per_second"], found["times"]
    rows = [
        [f"`{arm}`", f"{ms[arm]:.2f}", f"{round(speed[arm], -3):,.0f}", f"{times[arm]:.2f}" if arm in times else ""]
        for arm in ms
    ]
    alone = found.get("reduce_alone")
    summed = f"; their sum over both by itself: {alone['whole_ms']:.2f} ms" if isinstance(alone, dict) else ""
    caption = f"{found['device']}. Gradients: {found['gradient_bytes'] / 1e6:.0f} MB{summed}."
    return table(["arm", "ms a step", "tokens/s", "times one rank"], rows) + "\n\n" + caption


_SECOND_TASK = {
    "plain": "plain loop",
    "stacked": "plain loop of three seeds at once, of one seed",
    "lightning": "under Lightning",
    "watched": "with evaluations, snapshots and costs",
}


def grokking(found: Found) -> str:
    """Milliseconds a step of the second task, and over those of a plain loop."""
    models = [name for name in ("smoke", "paper") if name in found]
    rows = [
        [said, *(f"{found[m]['ms_per_step'][arm]:.1f} ({found[m]['over_plain'][arm]:.2f})" for m in models)]
        for arm, said in _SECOND_TASK.items()
    ]
    return table(["ms a step (over the plain loop)", *(f"`{name}`" for name in models)], rows)


TABLES: dict[str, Callable[[Found], str]] = {
    "throughput_h100": throughput,
    "overhead_cpu": overhead,
    "fisher_h100": fisher,
    "fisher_curvlinops_h100": fisher,
    "fisher_cpu": fisher,
    "evaluation_h100": evaluation,
    "data_h100": data,
    "startup_h100": startup,
    "startup_alone_h100": startup,
    "startup_cpu": startup,
    "trajectory_h100": trajectory,
    "trajectory_cpu": trajectory,
    "ranks_h200": ranks,
    "ranks_ddp_h200": ranks,
    "grokking_cpu": grokking,
}
"""By the result's file name, without its suffix."""


def fill(page: str, results: Path = RESULTS) -> str:
    """Put the table of each result between its comments.

    Raises:
        ValueError: A result has no place on the page, or the page a place without a result.
    """
    places = set(re.findall(r"<!-- (\w+) -->", page))
    have = {name for name in TABLES if (results / f"{name}.json").is_file()}
    if places != have:
        raise ValueError(f"results without a place on the page, or places without a result: {sorted(places ^ have)}")
    for name in have:
        found = json.loads((results / f"{name}.json").read_text())
        body = f"<!-- {name} -->\n{TABLES[name](found)}\n<!-- /{name} -->"
        before, _, rest = page.partition(f"<!-- {name} -->")
        page = before + body + rest.partition(f"<!-- /{name} -->")[2]
    return page


def main() -> None:
    """Fill the page, or say whether it is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if something would change")
    options = parser.parse_args()
    page = PAGE.read_text()
    filled = fill(page)
    if options.check:
        sys.exit(int(filled != page))
    PAGE.write_text(filled)


if __name__ == "__main__":
    main()
