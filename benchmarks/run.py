"""Speed and memory of ours beside the peer's, on this machine, in one run: prints one table.

python benchmarks/run.py --peer-python /tmp/peer/bin/python --markdown FILE
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from growth import grow, plot, table  # noqa: E402
from protocol import WorkerError  # noqa: E402
from rows import ROWS, Measured, Row, Setup, measure, stages  # noqa: E402
from tables import COLUMNS, line, markdown, stage_table, throughput  # noqa: E402

from utils.cli import log, new_parser, print_result, run_command  # noqa: E402
from utils.device import choose_device, choose_precision, versions  # noqa: E402
from utils.files import write_text  # noqa: E402
from utils.runs import git_sha  # noqa: E402


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__.split("\n")[0])
    names = [row.name for row in ROWS]
    parser.add_argument(
        "--only", metavar="NAME", action="append", choices=names, help="only these rows (default: all)"
    )
    parser.add_argument(
        "--shape", action="append", choices=("peer", "paper", "released"), help="only these (default: all)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="timed runs of each side, in turn; medians are shown"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument(
        "--precision", default="auto", help="auto: fp32, and bf16 if the device has it; or one"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process on a CPU")
    parser.add_argument(
        "--peer-python",
        metavar="PATH",
        help="interpreter of the peer's environment (default: none, its columns stay empty)",
    )
    parser.add_argument(
        "--size",
        type=int,
        help="of images, maps and features; smaller for a quick look (default: each row's)",
    )
    parser.add_argument("--stages", action="store_true", help="also each stage's share of the limit")
    parser.add_argument("--growth", action="store_true", help="only step time and memory by size and batch")
    parser.add_argument(
        "--markdown", metavar="FILE", help="write the tables there as well (default: nowhere)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Measure and print."""
    args = parse_arguments(argv)
    if args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds} is too few; give at least 1")
    if args.markdown and Path(args.markdown).exists():
        raise ValueError(f"{args.markdown} is there already; choose a new file for --markdown")
    device = choose_device(args.device)
    setup = Setup(sys.executable, args.peer_python, args.rounds, str(device), args.threads)
    fast = choose_precision("auto", device)
    precisions = list(dict.fromkeys(["fp32", fast])) if args.precision == "auto" else [args.precision]
    made = about(argv, setup)
    if args.growth:
        parts = [growth(setup, (args.shape or ["peer"])[0], precisions[-1], args.markdown)]
    else:
        parts = []
        for parts in main_table(setup, args, precisions):
            keep(args, [made, *parts])  # a run that is stopped leaves the rows before
        if args.stages:
            parts = parts + stage_tables(setup, args, precisions)
    print_result(keep(args, [made, *parts]))


def keep(args: argparse.Namespace, parts: Sequence[str]) -> str:
    """Write what there is to the Markdown file, if one is wanted; return it."""
    text = "\n\n".join(part for part in parts if part) + "\n"
    if args.markdown:
        write_text(Path(args.markdown), f"# Benchmarks\n\n{text}")
    return text


def about(argv: Sequence[str], setup: Setup) -> str:
    """How and where the numbers were made."""
    made = shlex.join(["python", "benchmarks/run.py", *argv])
    found = ", ".join(f"{name} {version}" for name, version in versions(torch.device(setup.device)).items())
    return (
        f"`{made}`: medians of {setup.rounds} rounds, {setup.threads} threads, {setup.device} "
        f"({processor(setup.device)}). Code {git_sha()}; {found}."
    )


def processor(device: str) -> str:
    """Name of the GPU that is the device, or of the processor with its cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown processor")
    return f"{name}, {os.cpu_count()} cores"


def main_table(setup: Setup, args: argparse.Namespace, precisions: Sequence[str]) -> Iterator[list[str]]:
    """After each row: the table so far, a note on PRO and versions, and the machine's throughput."""
    lines, all_found, notes = [list(COLUMNS)], [], []
    for row, variant, precision in chosen(args, precisions):
        log.info("%s, %s, %s", row.title, variant, precision)
        spec = replace(row.spec, variant=variant, precision=precision)
        try:
            found = measure(setup, spec, peer=row.peer and variant == "peer", limited=row.limited)
            all_found.append((precision, found))
        except WorkerError as error:
            log.warning("not measured: %s", error)
            found = Measured()
        lines.append(line(row, variant, precision, found))
        log.info("%s", markdown(lines[-1:]).partition("\n")[0])
        ours, peers = found.largest("ours", "pro"), found.largest("peer", "pro")
        if ours is not None:
            beside = "" if peers is None else f", the peer's {peers:.5f}"
            notes.append(f"PRO of the metrics row: ours {ours:.5f}{beside}.")
        if (off := found.largest("ours", "off")) is not None:
            notes.append(f"{row.title}: maps differ from PyTorch's by {off:.1e} of their range.")
        notes += [f"Peer: {found.versions}."] if found.versions else []
        yield [markdown(lines), " ".join(dict.fromkeys(notes)), throughput(all_found)]


def chosen(args: argparse.Namespace, precisions: Sequence[str]) -> Iterator[tuple[Row, str, str]]:
    """Rows, shapes and precisions that the command line asks for."""
    for row in ROWS:
        row = replace(row, spec=replace(row.spec, size=args.size or row.spec.size))
        if args.only and row.name not in args.only:
            continue
        for precision in precisions if row.bf16 else precisions[:1]:
            for variant in row.variants:
                if not (args.shape and len(row.variants) > 1 and variant not in args.shape):
                    yield row, variant, precision


def stage_tables(setup: Setup, args: argparse.Namespace, precisions: Sequence[str]) -> list[str]:
    """Operations and share of the limit of each stage, of the rows that have stages."""
    parts = []
    for row, variant, precision in chosen(args, precisions):
        if row.name in ("train", "one") and variant == (args.shape or ["peer"])[0]:
            log.info("stages: %s, %s, %s", row.title, variant, precision)
            try:
                found = stages(setup, replace(row.spec, variant=variant, precision=precision))
            except WorkerError as error:
                log.warning("not measured: %s", error)
                continue
            parts.append(f"## Stages: {row.title}, shape {variant}, {precision}\n\n{stage_table(found)}")
    return parts


def growth(setup: Setup, variant: str, precision: str, markdown_file: str | None) -> str:
    """The table by size and batch; the plot goes beside the Markdown file."""
    points = []
    for point in grow(setup, variant, precision):
        log.info("size %d, batch %d: %s s", point.size, point.batch, point.seconds)
        points.append(point)
    text = f"## Growth of a training step, shape {variant}, {precision}\n\n{table(points)}"
    if markdown_file:
        picture = Path(markdown_file).with_suffix(".svg")
        write_text(picture, plot(points))
        text += f"\n\n![step time and memory by batch]({picture.name})"
    return text


if __name__ == "__main__":
    sys.exit(run_command(main))
