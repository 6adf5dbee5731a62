"""Evaluate a trained model: checkpoint -> metrics table, scores.csv, maps.

python test.py --checkpoint RUN --data-root DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from datasets.build import build_test, dataset_root, read_as
from datasets.masks import write_skipped
from datasets.registry import SPECS
from datasets.transforms import Normalise
from evaluation.figures import write_map
from evaluation.outputs import SCORES, begin, claim, finish, names_of, write_pages
from evaluation.published_protocol import april_decision, april_results
from evaluation.results import parameter_counts, protocol_notes, write_results
from evaluation.scoring import (
    Scores,
    results_by_category,
    results_table,
    score_images,
    write_scores,
)
from model import build_model
from model.backbone import input_normalisation
from model.calibration import Calibration
from model.graphs import graphed
from utils.checkpoint import Checkpoint, load_trained, restore_model
from utils.cli import add_overwrite_flag, add_skip_flag, log, new_parser, run_command, say, user_path
from utils.config import Config, build
from utils.device import choose_device, choose_precision, peak_memory_gb
from utils.errors import ConfigError
from utils.files import relative_to
from utils.runs import git_sha
from utils.yaml_io import parse_override

UNFAIR = "not a fair protocol"
APRIL = "april-2025"
CHANGEABLE = (  # beside all of score; the model stays as it is
    "eval.segmentation",
    "eval.clip_sigma",
    "eval.batch_size",
    "eval.aupimo",
    "eval.dsc_unias",
    "eval.precision",
    "data.num_train_anomalies",  # test images that are left out
)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__.split("\n")[0])
    what = parser.add_argument_group("what to evaluate, on what")
    what.add_argument("--checkpoint", required=True, metavar="RUN", help="a run folder or a checkpoint file")
    what.add_argument(
        "--data-root", metavar="DIR", help="folder of the dataset; default: where it was trained"
    )
    what.add_argument("--dataset", choices=sorted(SPECS), help="default: the one it was trained on")
    what.add_argument("--category", metavar="NAME", help="default: the one it was trained on")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--protocol",
        choices=("fair", APRIL),
        default="fair",
        help=f"{APRIL}: also the numbers as the first public evaluation computed them ({UNFAIR})",
    )
    add_skip_flag(how)
    how.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="settings that need no training: score.* (Eq. 14 and its variants) and some of eval and data",
    )
    how.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="where to compute")
    how.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        help="of scoring; default: eval.precision of the run, fp32",
    )
    where = parser.add_argument_group("where results go")
    where.add_argument(
        "--output", type=user_path, metavar="DIR", help="default: the folder 'test' beside the checkpoint"
    )
    add_overwrite_flag(where)
    where.add_argument(
        "--save-maps",
        action="store_true",
        help="write each map as a 32-bit float TIFF, below maps/ under its image's path in scores.csv",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Evaluate a checkpoint on the test set of its own or another dataset."""
    args = parse_arguments(argv)
    path, state = load_trained(args.checkpoint)
    device = choose_device(args.device)
    config = evaluated_config(state.config, args, device)
    output = args.output or path.parent / "test"
    earlier = claim(output, overwrite=args.overwrite)
    calibration = calibration_of(state, config)
    model = build_model(config, pretrained=False).to(device, memory_format=torch.channels_last)
    restore_model(model, state.model, source=path)
    model = model.deploy()
    data, defects, skipped = build_test(
        config, state.config, Normalise(*input_normalisation(config.model.backbone))
    )

    def score() -> Scores:
        return score_images(
            graphed(model),
            data,
            batch_size=config.eval.batch_size,
            device=device,
            precision=config.eval.precision,
            quiet=args.quiet,
        )

    scores = score()
    results = results_by_category(scores, config.eval, defects)
    say(results_table(results, notes=[*protocol_notes(config, state.iteration), str(path)]))
    command = shlex.join(["python", "test.py", *argv])
    begin(output, earlier)
    root = dataset_root(config.data)
    write_skipped(output, skipped, root)
    p_values = calibration.p_values(scores.score) if calibration else None
    write_scores(output / SCORES, scores, root, p_values=p_values)
    timing = {"ms_per_image": scores.ms_per_image, "peak_memory_gb": peak_memory_gb(device)}
    about = {
        "command": command,
        "timing": timing,
        "parameters": parameter_counts(model),
        "code": git_sha(),
        "identity": state.identity,
        "step": state.iteration,
    }
    write_results(output, config, results, **about)
    write_pages(output, config, data, scores, results, command=command, step=state.iteration)
    if args.save_maps:
        write_maps(output / "maps", scores, root, quiet=args.quiet)
    if args.protocol == APRIL:
        model.decision = april_decision(model.decision)
        unfair = april_results(score(), config)
        title = (
            f"{UNFAIR.upper()}: image scores smoothed along the list of test images, PRO with 800 thresholds"
        )
        say("\n" + results_table(unfair, notes=[title]))
        write_results(
            output / APRIL, config, unfair, **about, across_images=f"sigma 4 in folder order: {UNFAIR}"
        )
    finish(output)
    log.info("written to %s", output)


def evaluated_config(config: Config, args: argparse.Namespace, device: torch.device) -> Config:
    """The run's configuration with what the command line changes; always on the test set.

    Raises:
        ConfigError: for a --set outside of `score` and `eval`.
    """
    data = config.data
    if args.dataset and args.dataset != data.name:
        data = read_as(args.dataset, args.category or "all", config)
    data = dataclasses.replace(
        data,
        root=args.data_root or data.root,
        category=args.category or data.category,
        skip_unreadable=args.skip_unreadable or data.skip_unreadable,
    )
    tree = dataclasses.replace(config, data=data).to_dict()
    for key, value in map(parse_override, args.set):
        section, _, name = key.partition(".")
        if section != "score" and key not in CHANGEABLE:
            raise ConfigError(
                f"--set {key}: a trained model has that fixed; "
                f"score.* and {', '.join(CHANGEABLE)} can be changed"
            )
        tree[section][name] = value
    precision = choose_precision(args.precision or tree["eval"]["precision"], device)
    tree["eval"] |= {"split": "test", "every": 0, "precision": precision}
    return build(Config, tree)


def calibration_of(state: Checkpoint, config: Config) -> Calibration | None:
    """The run's calibration, where its held-out scores can be compared with those of `config`."""
    trained = state.config
    same = [getattr(trained.data, key) == getattr(config.data, key) for key in ("name", "category")]
    if state.calibration and not (all(same) and trained.score == config.score):
        log.warning("no p-values: the held-out scores are of the run's own dataset and score settings")
        return None
    if state.calibration and trained.eval.precision != config.eval.precision:
        log.warning(
            "p-values compare scores in %s with held-out ones in %s: take them as approximate",
            config.eval.precision, trained.eval.precision,
        )  # fmt: skip
    return Calibration(**state.calibration) if state.calibration else None


def write_maps(folder: Path, scores: Scores, root: Path, *, quiet: bool) -> None:
    """Write each anomaly map under its image's path in scores.csv, ending in .tiff, 32-bit float."""
    names = names_of([relative_to(s.path, root) for s in scores.samples], ".tiff")
    pairs = zip(names, scores.maps, strict=True)
    bar = tqdm(pairs, total=len(names), desc="maps", unit="image", leave=False, disable=quiet or None)
    for name, anomaly_map in bar:
        write_map(folder / name, anomaly_map)


if __name__ == "__main__":
    sys.exit(run_command(main))
