"""Evaluate a trained model: checkpoint -> metrics table, scores.csv, maps.

python test.py --checkpoint RUN --data-root DIR
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from datasets.build import build_test, dataset_root, read_as
from datasets.check import write_skipped
from datasets.registry import SPECS
from evaluation import results as result_files
from evaluation.figures import write_map
from evaluation.published_protocol import UNFAIR, april_detector, april_results
from evaluation.report import write_pages
from evaluation.scoring import Scores, collect_scores, results_by_category
from model import load_detector
from utils import cli
from utils.checkpoint import find_checkpoint
from utils.config import Config, check_together, unread
from utils.device import peak_memory_gb
from utils.errors import ConfigError
from utils.files import relative_to
from utils.yaml_io import build, merge, nested, parse_override

APRIL = "april-2025"
APRIL_NOTE = f"{UNFAIR.upper()}: image scores smoothed along the list of test images, PRO with 800 thresholds"
CHANGEABLE = ("data.num_train_anomalies",)  # beside all of score: test images that are left out


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.new_parser(__doc__.split("\n")[0])
    what = parser.add_argument_group("what to evaluate, on what")
    what.add_argument("--checkpoint", required=True, metavar="RUN", help="a run folder or a checkpoint file")
    what.add_argument("--data-root", metavar="DIR", help="folder of the dataset (default: the run's)")
    what.add_argument("--dataset", choices=sorted(SPECS), help="what to test on (default: the run's)")
    text = "one, or all (default: the run's; with --dataset all)"
    what.add_argument("--category", metavar="NAME", help=text)
    how = parser.add_argument_group("how")
    text = f"{APRIL}: also the numbers as the first public evaluation computed them, {UNFAIR}"
    how.add_argument("--protocol", choices=("fair", APRIL), default="fair", help=text)
    cli.SKIP.add(how, "skip-unreadable", default="as the run did")
    cli.EXTRA.add(how, "extra-metrics", default="the run's")
    text = f"a setting that needs no training: score.* or {', '.join(CHANGEABLE)}"
    how.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help=text)
    cli.add_device_flags(how)
    where = parser.add_argument_group("where results go")
    text = "folder (default: test, beside the checkpoint)"
    where.add_argument("--output", type=cli.user_path, metavar="DIR", help=text)
    cli.add_overwrite_flag(where)
    text = "write each map, a 32-bit float TIFF of data.image_size, under its image's path below maps/"
    where.add_argument("--save-maps", action="store_true", help=text)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Evaluate a checkpoint on the test set of its own or another dataset."""
    args = parse_arguments(argv)
    output = args.output or find_checkpoint(args.checkpoint).parent / "test"
    earlier = result_files.claim(output, overwrite=args.overwrite)
    change = partial(evaluated_config, args=args)
    where = {"device": args.device, "precision": args.precision, "batch_size": args.eval_batch_size}
    detector = load_detector(args.checkpoint, change=change, **where)
    config, state = detector.config, detector.state
    data, defects, skipped = build_test(config, state.config, detector.normalise, identity=state.identity)
    scores = collect_scores(detector.predictions(data, quiet=args.quiet), data)
    results = results_by_category(scores, config.run, defects)
    notes = [*result_files.protocol_notes(config, state.iteration), str(detector.path)]
    cli.print_result(result_files.results_table(results, notes=notes))
    result_files.begin(output, earlier)
    root, command = dataset_root(config), shlex.join(["python", "test.py", *argv])
    write_skipped(output, skipped, root)
    p_values = detector.calibration.p_values(scores.score) if detector.calibration else None
    result_files.write_scores(output / result_files.SCORES, scores, root, p_values=p_values)
    timing = {"ms_per_image": scores.ms_per_image, "peak_memory_gb": peak_memory_gb(detector.device)}
    write = partial(result_files.write_results, config=config, command=command, timing=timing)
    write = partial(write, model=detector.model, identity=state.identity, step=state.iteration)
    write(output, results=results)
    write_pages(output, config, data, scores, results, command=command, step=state.iteration)
    if args.save_maps:
        write_maps(output / "maps", scores, root, quiet=args.quiet)
    if args.protocol == APRIL:
        then = collect_scores(april_detector(detector).predictions(data, quiet=args.quiet), data)
        unfair = april_results(then, config)
        cli.print_result("\n" + result_files.results_table(unfair, notes=[APRIL_NOTE]))
        write(output / APRIL, results=unfair, across_images=f"sigma 4 in folder order: {UNFAIR}")
    result_files.finish(output)
    cli.log.info("written to %s", output)


def evaluated_config(config: Config, args: argparse.Namespace) -> Config:
    """The run's configuration with what the command line changes; always on the test set."""
    names = ("data_root", "device", "skip_unreadable", "extra_metrics")
    flags = {f"run.{name}": getattr(args, name) for name in names} | {"data.category": args.category}
    chosen: dict[str, object] = {key: value for key, value in flags.items() if value is not None}
    for key, value in map(parse_override, args.set):
        if not key.startswith("score.") and key not in CHANGEABLE:
            can = f"score.* and {', '.join(CHANGEABLE)} can be changed"
            raise ConfigError(f"--set {key}: a trained model has that fixed; {can}")
        chosen[key] = value
    if config.model.head == "speed" and any(key.startswith("score.") for key in chosen):
        raise ConfigError("--set score.*: the power of the speed was measured for the run's own score")
    chosen |= {"eval.split": "test", "eval.every": 0}
    if args.dataset and args.dataset != config.data.name:
        data = read_as(args.dataset, args.category or "all", config)
        config = replace(config, data=data, run=replace(config.run, data_root=None))  # it is of the other set
    changed = build(Config, merge([config.to_dict(), {"run": asdict(config.run)}, nested(chosen)]))
    check_together(changed)
    for text in unread(changed, config, chosen):
        cli.log.warning("%s", text)
    return changed


def write_maps(folder: Path, scores: Scores, root: Path | None, *, quiet: bool) -> None:
    """Write each anomaly map under its image's path in scores.csv, ending in .tiff, 32-bit float."""
    names = result_files.names_of([relative_to(s.path, root) for s in scores.samples], ".tiff")
    pairs = zip(names, scores.maps, strict=True)
    bar = tqdm(pairs, total=len(names), desc="maps", unit="image", leave=False, disable=quiet or None)
    for name, anomaly_map in bar:
        write_map(folder / name, anomaly_map)


if __name__ == "__main__":
    sys.exit(cli.run_command(main))
