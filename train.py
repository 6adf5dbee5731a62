"""Train a model and evaluate it: config -> data -> model -> loop -> last checkpoint -> results.

python train.py --dataset mvtec --data-root DIR --category screw
"""

import argparse
import shlex
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import utils  # noqa: F401  # isort: skip  # before PyTorch
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from datasets.build import RunData, build_data, categories_of, data_identity, dataset_root
from datasets.check import write_skipped
from datasets.demo import DEMO_CATEGORIES
from datasets.loader import ImageSet, TrainingOrder, batches, count_steps, statistics_sample, training_batches
from datasets.registry import SPECS
from datasets.samples import ANOMALOUS
from datasets.transforms import Normalise, augment_batch
from evaluation.figures import example_page
from evaluation.metrics import Results, mean_results
from evaluation.report import write_pages
from evaluation.results import SCORES, protocol_notes, results_table, short, write_results, write_scores
from evaluation.scoring import Scores, calibrate, join_scores, results_by_category, score_images
from model import build_model, for_inference
from model.backbone import input_normalisation
from model.base import AnomalyModel
from model.inference import ScoringOptions, inputs_of, to_device
from model.step import TrainingStep
from model.time_budget import TimeBudget
from utils import cli, distributed
from utils.checkpoint import BEST, FILE, Checkpoint, load_checkpoint, restore_model, training_state
from utils.config import Config, check_evaluations
from utils.device import choose_device, peak_memory_gb, reset_peak_memory, seed_everything
from utils.errors import ConfigError
from utils.files import write_text
from utils.layers import config_file, load_config
from utils.optim import make_optimizer
from utils.runs import clear_run, earlier, git_sha, identity_of, locked, place_of
from utils.tracking import LOG_EVERY, NullTracker, Tracker, show_final, validation_curve
from utils.yaml_io import Tree

CRITERIA = ("dsc", "frame_auroc_micro", "pro", "image_auroc")  # of --select best, as in the released code


@dataclass
class Run:
    """All that the loop needs."""

    config: Config
    folder: Path
    data: RunData
    model: AnomalyModel
    device: torch.device
    quiet: bool
    command: str
    identity: Tree | None = None
    state: Checkpoint | None = None  # to go on from
    best: float | None = None  # of `select: best`, the value of the state that is kept so far

    def save(self, step: int, name: str = FILE, **fields: object) -> None:
        """Write the model as of `step`, and further fields of a `Checkpoint`."""
        values: Tree = {"identity": self.identity, **fields}
        Checkpoint(self.config, self.model.state_dict(), step, **values).save(self.folder / name)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.new_parser(__doc__.split("\n")[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--dataset", choices=sorted(SPECS), help="with its file of configs/ (default: mvtec)")
    source.add_argument("--config", type=cli.user_path, metavar="FILE", help="another (default: --dataset's)")
    cli.add_setting_flags(parser)
    cli.add_place_flags(parser)
    parser.add_argument("--list", action="store_true", help="list what can be chosen, and stop")
    args = parser.parse_args(argv)
    args.config = args.config or config_file(args.dataset or "mvtec")
    return args


@cli.when_stopped("a run's state is kept as of its last checkpoint, --resume goes on from there")
def main(argv: Sequence[str]) -> None:
    """Train one run, or one per category, and print the results table."""
    args = parse_arguments(argv)
    if args.list:
        categories = {name: spec.counts for name, spec in SPECS.items()} | {"demo": DEMO_CATEGORIES}
        cli.print_result(cli.choices(categories))
        return
    with distributed.processes():
        train_all(args, command=shlex.join(["python", "train.py", *argv]))


def train_all(args: argparse.Namespace, *, command: str) -> list[Path]:
    """Train the runs that the command line asks for, one after the other; return their folders."""
    chosen = cli.overrides(args)
    config = load_config(args.config, chosen)
    budget = None if args.minutes is None else TimeBudget(args.minutes, chosen, args.config)
    with distributed.main_process_first():
        dataset_root(config)  # the demo is written where it is missing
    names = [config.data.category] if config.model.setting == "multi-class" else categories_of(config)
    results: dict[str, Results] = {}
    folders: list[Path] = []
    for place, name in enumerate(names):
        config = load_config(args.config, chosen | {"data.category": name}, category=name)
        config = budget.fit(config, args, runs=len(names) - place) if budget else config
        config, folder = place_of(config, args.output, args.name, anew=args.overwrite)
        folders.append(folder)
        with locked(folder, overwrite=args.overwrite) if distributed.is_main_process() else nullcontext():
            found = train_run(config, folder, args, command=command)
        results.update({k: v for k, v in found.items() if k != "mean"})
    if results and distributed.is_main_process():
        results["mean"] = mean_results([r for name, r in results.items() if "/" not in name])
        cli.print_result(results_table(results, notes=protocol_notes(config)))
    for folder in folders if distributed.is_main_process() else []:
        cli.print_result(f"report.html, scores.csv and all else: {folder}" if results else str(folder))
    return folders


def train_run(config: Config, folder: Path, args: argparse.Namespace, *, command: str) -> dict[str, Results]:
    """Train, evaluate and write one run; a finished one is reported as it is."""
    device = distributed.device_for_rank(choose_device(config.run.device))
    reset_peak_memory(device)
    config, data, identity = contents(config)
    done, state, best = earlier(folder, identity, resume=args.resume, anew=args.overwrite)
    if done is not None:
        cli.log.info("%s is finished; --overwrite trains it again, test.py has other metrics", folder)
        return done
    distributed.check_batches(config.train, len(data.train))
    seed_everything(config.train.seed)
    model = build_model(config, pretrained=state is None).to(device).to(memory_format=torch.channels_last)
    if state is not None:
        restore_model(model, state.model, source=folder / FILE)
    if distributed.is_main_process():
        if args.overwrite:  # now that the new one can start
            clear_run(folder)
        others = args.resume and state is None and any(folder.parent.glob(f"{config.model.name}-*/{FILE}"))
        cli.log.info(describe(config, data, model) + others * f"; runs beside {folder} have other settings")
        write_skipped(folder, data.skipped, dataset_root(config))
        write_text(folder / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
    quiet = args.quiet or not distributed.is_main_process()
    run = Run(config, folder, data, model, device, quiet, command, identity, state, best)
    del state  # `optimise` lets go of it
    if run.state is not None and run.state.finished:
        return finish(run, run.state.seconds)
    return finish(run, fit(run) if model.one_pass else optimise(run))


def contents(config: Config) -> tuple[Config, RunData, Tree]:
    """The data of a run, its configuration with the length that follows from it, and the run's identity."""
    data = build_data(config, Normalise(*input_normalisation(config.model.backbone)))
    train = replace(config.train, iterations=count_steps(config.train, len(data.train)))
    check_evaluations(config := replace(config, train=train))
    content = data_identity(config, data) if distributed.is_main_process() else {}
    return config, data, identity_of(config, distributed.broadcast_object(content))


def describe(config: Config, data: RunData, model: AnomalyModel) -> str:
    """One line that identifies a run."""
    train, name = config.train, config.model
    split = "validation" if config.eval.split == "validation" else "test"
    steps = "one pass" if model.one_pass else f"{train.iterations} steps of {train.batch_size}"
    tiles = f" in tiles of {config.data.tile}" if config.data.tile else ""
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return (
        f"{config.data.name}/{config.data.category}: {len(data.train)} training and "
        f"{len(data.evaluated(split))} {split} images{tiles}; {name.name} ({name.flavor}, {name.backbone}), "
        f"{parameters:.1f} M parameters, {steps}, {train.precision}, code {git_sha()}"
    )


def image_batches(run: Run, data: ImageSet, title: str) -> Iterator[Tensor]:
    """Images (B, 3, H, W) of a set, in order, on the device, with a progress bar."""
    loader = batches(data, run.config.run.eval_batch_size)
    for batch in tqdm(loader, desc=title, unit="batch", leave=False, disable=run.quiet or None):
        images = inputs_of(to_device(batch, run.device))
        yield images[:, -1] if images.dim() == 5 else images


def fit(run: Run) -> float:
    """Fit what needs no gradient steps; return the seconds it took."""
    data = run.data.train if run.model.one_pass else statistics_sample(run.data.train, run.model.fits)
    data.fill_cache(quiet=run.quiet)
    start = time.perf_counter()
    run.model.fit(image_batches(run, data, "memory bank"), seed=run.config.train.seed)
    return time.perf_counter() - start


def optimise(run: Run) -> float:
    """The training loop: fixed length, the same for every model with a loss; return the seconds it took."""
    config, train, model, device = run.config, run.config.train, run.model, run.device
    samples = run.data.train.samples
    run.data.train.fill_cache(quiet=run.quiet)

    # --- restore, or start ----------------------------------------------------------------------------------
    groups = model.parameter_groups(config.optim)
    optimizer, schedule = make_optimizer(groups, config)
    start, stop, seconds = 0, train.iterations, 0.0
    if run.state is None:
        model.fit_statistics(image_batches(run, statistics_sample(run.data.train), "feature statistics"))
        seconds = fit(run) if model.fits else 0.0
    else:
        run.state.resume(optimizer, schedule)
        start, seconds = run.state.iteration, run.state.seconds
        run.state = None  # its memory is needed
        cli.log.info("going on from step %d", start)

    # --- data, curves, processes ----------------------------------------------------------------------------
    order = TrainingOrder(
        len(samples), train.batch_size, seed=train.seed, start=start, stop=stop, repeat=len(train.scales),
        share=(distributed.rank(), distributed.world_size()), last_batch=train.last_batch,
    )  # fmt: skip
    loader = training_batches(run.data.train, order, workers=config.run.workers, device=device)
    main = distributed.is_main_process()
    tracker = Tracker(run.folder, start=start, stop=stop, quiet=run.quiet) if main else NullTracker()
    loss = distributed.wrap_ddp(model, model.loss)  # gradients of the whole batch in every process
    training_step = TrainingStep(model, optimizer, config, loss=loss, start=start)
    labelled = config.model.head == "label" or any(sample.label == ANOMALOUS for sample in samples)
    unused = {"index"} if labelled or config.data.synthetic else {"index", "label"}
    indices: deque[Tensor] = deque(maxlen=LOG_EVERY)  # of the images of the last batches

    # --- the loop -------------------------------------------------------------------------------------------
    model.train()
    began = time.perf_counter()
    for step, host_batch in enumerate(loader, start=start):
        categories = [samples[i].category for i in host_batch["index"].tolist()]
        batch = augment_batch(to_device(host_batch, device), config, step, categories)
        # forward, the losses, backward, the update: nothing in it waits for a GPU
        parts = training_step({name: x for name, x in batch.items() if name not in unused})
        indices.append(host_batch["index"])
        done, mean_parts = step + 1, distributed.reduce_mean(parts)
        # before anything is written, and at once where it is no sync point
        stops = LOG_EVERY, config.run.save_every, config.eval.every or LOG_EVERY, train.iterations
        if device.type == "cpu" or done == 1 or not all(done % stop for stop in stops):
            stop_if_not_finite(run, training_step, indices, step)
        rates = dict(zip((group["name"] for group in groups), schedule.get_last_lr(), strict=True))
        schedule.step()
        tracker.step(done, mean_parts, lr=rates, images=train.batch_size, diagnose=model.diagnostics)
        paused = time.perf_counter()  # training time counts neither of these
        if config.eval.every and done % config.eval.every == 0:
            evaluate_during_training(run, tracker, done)
        if main and done % config.run.save_every == 0 and done < train.iterations:
            fit_score(run, 64)  # so that this state can be scored, too
            run.save(done, seconds=seconds + paused - began, **training_state(optimizer, schedule))
        began += time.perf_counter() - paused
    tracker.close()
    return seconds + time.perf_counter() - began


def stop_if_not_finite(run: Run, done: TrainingStep, indices: Sequence[Tensor], step: int) -> None:
    """Stop on a loss that was no number, and say where; `indices` are of the images of steps up to `step`."""
    if (bad := done.first_bad()) is None:
        return
    names = ", ".join(run.data.train.samples[i].path.name for i in indices[bad[0] - step - 1].tolist())
    values = ", ".join(f"{name} {value:.4g}" for name, value in bad[1].items())
    found = f"the loss is not finite at step {bad[0]} ({values}; images {names})"
    raise FloatingPointError(f"{found}; lower optim.lr or use --precision fp32")


def fit_score(run: Run, most: int = 512) -> None:
    """Let the model measure what its score needs, on normals held out for it or else on those of training."""
    sample = statistics_sample(run.data.scale, most) if run.data.scale else statistics_sample(run.data.train)
    run.model.fit_score(image_batches(run, sample, "score unit"))  # by 64 a speed's power is 15 % off


def evaluate_during_training(run: Run, tracker: Tracker | NullTracker, done: int) -> None:
    """Evaluate during training, for curves: on held-out normals with synthetic defects, not on the test set.

    Only `select: best` looks at the test set, and keeps the state with the best result so far.
    """
    config, split = run.config, "test" if run.config.eval.select == "best" else "validation"
    data = run.data.evaluated(split)
    fit_score(run)
    if (scores := score(run, data)) is None:
        return
    results = results_by_category(scores, config.run, run.data.trained_defects)
    tracker.evaluation(done, results, split=split, panel=example_page(data, scores, 4))
    mean = results["mean"]
    tracker.note(f"step {done}, {split}: {short(mean)}")
    if config.eval.select == "best":
        value = next((found for name in CRITERIA if (found := mean.get(name)) is not None), None)
        if value is None:
            raise ConfigError("--select best needs test images of both kinds, normal and anomalous")
        if run.best is None or value > run.best:
            run.best = value
            run.save(done, BEST, value=value)


def finish(run: Run, train_s: float) -> dict[str, Results]:
    """Keep the last (or best) state, evaluate it once, and write the run's files, numbers first."""
    config, folder, step = run.config, run.folder, run.config.train.iterations
    if config.eval.select == "best" and distributed.broadcast_object((folder / BEST).is_file()):
        best = load_checkpoint(folder / BEST)  # of this run: `earlier` has compared
        restore_model(run.model, best.model, source=folder / BEST)
        step = best.iteration
    fit_score(run)
    calibration = None
    if len(run.data.calibration):  # scored by the very model that predict.py scores with
        held_out = score(run, run.data.calibration, for_inference(run.model))
        calibration = calibrate(held_out) if held_out else None
    if distributed.is_main_process():
        run.save(step, seconds=train_s, calibration=calibration and asdict(calibration))
    results: dict[str, Results] = {}
    scores: Scores | None = None
    timing: dict[str, float | None] = {"train_s": train_s}
    if not run.model.one_pass:
        timing["s_per_iteration"] = train_s / config.train.iterations
    if config.eval.split != "none" and len(run.data.evaluated(config.eval.split)):
        if (scores := score(run, data := run.data.evaluated(config.eval.split))) is None:
            return {}
        results = results_by_category(scores, config.run, run.data.trained_defects)
        p_values = calibration.p_values(scores.score) if calibration else None
        write_scores(folder / SCORES, scores, dataset_root(config), p_values=p_values)
        timing["ms_per_image"] = scores.ms_per_image
    if not distributed.is_main_process():
        return {}
    timing["peak_memory_gb"] = peak_memory_gb(run.device)
    about: Tree = {"command": run.command, "identity": run.identity, "step": step, "model": run.model}
    write_results(folder, config, results, timing=timing, curve=validation_curve(folder), **about)
    if scores is not None:
        page = write_pages(folder, config, data, scores, results, command=run.command, step=step)
        show_final(folder, config.train.iterations, results, split=config.eval.split, panel=page)
    return results


def score(run: Run, data: ImageSet, model: AnomalyModel | None = None) -> Scores | None:
    """Score a set with the run's model, or with a copy of it; None in processes that do not lead."""
    how = run.config.run
    options = ScoringOptions(how.eval_batch_size, run.device, how.eval_precision, run.quiet)
    part = score_images(model or run.model, data, options, indices=distributed.shard(len(data)))
    parts = distributed.gather(part)
    return None if parts is None else join_scores(parts)


if __name__ == "__main__":
    sys.exit(cli.run_command(main))
