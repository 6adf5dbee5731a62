"""Convert weights of UniNet and ReContrast, other programs' to a run folder, or a run's to the authors' file.

python scripts/convert_weights.py FILE --from uninet --dataset mvtec --category bottle --output RUN

A folder that is laid out as the authors' own is converted whole, one run per file. docs/PUBLISHED_WEIGHTS.md
says where the files are and how to read the results.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.registry import SPECS
from datasets.splits import content_digest
from model import build_model
from utils.checkpoint import FILE, Checkpoint, load_trained, not_finite
from utils.cli import WHAT, log, new_parser, overrides, print_result, run_command, user_path
from utils.config import Config
from utils.device import seed_everything
from utils.errors import CheckpointError, ConfigError, RunError
from utils.files import write_atomically, write_text
from utils.layers import POLYP, config_file, load_config
from utils.runs import locked, run_folder

# --- names --------------------------------------------------------------------------------------------------

Pairs = list[tuple[str, str]]  # beginnings of tensors' names: theirs, ours


def _table(text: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in text.split())


FUSION = _table("conv1=0.0.0 bn1=0.0.1 conv2=0.2.0 bn2=0.2.1 conv3=1.0.0 bn3=1.0.1")
RESIDUAL = _table("conv1=body.0.0 bn1=body.0.1 conv2=body.2.0 bn2=body.2.1 conv3=body.4.0 bn3=body.4.1")
MEM = _table(  # the kernels of their conv7x7 are 3 x 3
    "conv3x3=small.0.0 bn2=small.0.1 conv3x3_=small.2.0 bn5=small.2.1 conv7x7=large.0.0 bn4=large.0.1 "
    "conv7x7_=large.2.0 bn6=large.2.1 conv3=merge.0 bn3=merge.1 downsample=shortcut"
)


def _network(bottleneck: str, student: str, block: Mapping[str, str]) -> Pairs:
    """Of a bottleneck of such blocks and of a student with these names."""
    parts = [(bottleneck, "bottleneck.fuse", FUSION)]
    parts += [(f"{bottleneck}.bn_layer.{i}", f"bottleneck.blocks.{i}", dict(block)) for i in range(3)]
    decoder = RESIDUAL | {"upsample": "shortcut"}
    for stage, blocks in enumerate((3, 4, 6)):
        theirs, ours = f"{student}.layer{stage + 1}", f"student.stages.{stage}"
        parts += [(f"{theirs}.{i}", f"{ours}.{i}", decoder) for i in range(blocks)]
    return [(f"{theirs}.{a}.", f"{ours}.{b}.") for theirs, ours, t in parts for a, b in t.items()]


PAIRS: dict[str, Pairs] = {
    "uninet": [
        ("tt.", "teachers.target."),
        *_network("bn", "st", MEM),
        *((f"dfs.theta{n}", f"dfs.theta.{n - 1}") for n in (1, 2, 3)),  # of a training without a GPU
    ],
    "recontrast": [
        ("encoder.", "teachers.target."),
        ("encoder_freeze.", "teachers.source."),
        *_network("bottleneck", "decoder", RESIDUAL | {"downsample": "shortcut"}),
        *((f"decoder.out{n}.0.", f"student.heads.{3 - n}.") for n in (1, 2, 3)),
        *((f"decoder.out{n}.1.", f"student.second_heads.{3 - n}.") for n in (1, 2, 3)),
    ],
    "anomalib": [
        ("model.teachers.target_teacher.", "teachers.target."),
        ("model.teachers.source_teacher.", "teachers.source."),
        *_network("model.bottleneck", "model.student", MEM),
        *((f"model.dfs.theta{n}", f"dfs.theta.{n - 1}") for n in (1, 2, 3)),
    ],
}
HEADS = {"label": [("st.fc.", "heads.0.linear.")], "mask": [("st.conv1x1_1.", "heads.0.conv.")]}  # uninet's
# theirs that their networks hold and do not use
UNUSED = re.compile(
    r"(bn|(model\.)?bottleneck)\.(conv4|bn4|bn_layer\.\d\.bn7)\.|(st|model)\.fc\.|(pre_|post_)processor\.|evaluator\."
)
# ours that their files may lack: they keep their start
ABSENT = {
    "uninet": ("teachers.source.", "teachers.scale.", "dfs.theta."),
    "recontrast": ("teachers.scale.", "dfs.theta."),
    "anomalib": ("teachers.scale.",),
}


def renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    """The name with another beginning; None if no pair has its own."""
    return next((new + name.removeprefix(old) for old, new in pairs if name.startswith(old)), None)


# --- tensors ------------------------------------------------------------------------------------------------

# which dimensions of a MEM's tensors count its inner channels
INNER = ((r"(small|large)\.\d\.\d\.", 0), (r"(small|large)\.2\.0\.weight", 1), (r"merge\.0\.weight", 1))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, nested ones with dots; nothing in the file is executed.

    Raises:
        CheckpointError: if the file is missing, damaged, or holds more than plain types and tensors.
    """
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"no file at {path}; give a file of weights, or a folder of them") from error
    except Exception as error:  # torch raises many kinds for damaged and foreign files
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors and plain values ({type(error).__name__}); "
            "nothing of it was run. Save the state dict alone, with the program that wrote it"
        ) from error
    tree = tree if isinstance(tree, dict) else {}
    tree = tree["state_dict"] if isinstance(tree.get("state_dict"), dict) else tree  # Lightning's
    found: dict[str, Tensor] = {}
    for key, value in tree.items():
        inside = {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        found |= {name: tensor for name, tensor in inside.items() if isinstance(tensor, Tensor)}
    # UniNet's blocks lie in two containers, ReContrast's in one
    return {re.sub(r"bn_layer\.0\.(?=\d)", "bn_layer.", name): tensor for name, tensor in found.items()}


def to_ours(
    theirs: Mapping[str, Tensor], name: str, config: Config, start: Mapping[str, Tensor], *, file: Path
) -> dict[str, Tensor]:
    """Tensors under our names, with the shapes of `start`, the state of a new model, which fills gaps.

    Raises:
        CheckpointError: if one is missing, foreign, of another shape or not finite.
    """
    pairs = PAIRS[name] + (HEADS.get(config.model.head, []) if name == "uninet" else [])
    found: dict[str, Tensor] = {}
    problems: list[str] = []
    for key, tensor in theirs.items():
        ours = renamed(key, pairs)
        if ours and ours in start:
            found[ours] = _converted(ours, tensor, start[ours], name)
        elif not UNUSED.match(key):
            problems.append(f"expected no {key}, found one of shape {list(tensor.shape)}")
    back = [(b, a) for a, b in pairs]
    for ours, like in start.items():
        shape = list(found[ours].shape) if ours in found else None
        if shape != list(like.shape) and (shape or not ours.startswith(ABSENT[name])):
            expected = f"expected {renamed(ours, back)} of shape {list(like.shape)}"
            problems.append(f"{expected}, found {'none' if shape is None else shape}")
    if not problems and (wrong := not_finite(found)):
        problems.append(f"expected numbers, found values that are not finite in {wrong}")
    if problems:
        raise CheckpointError(
            f"{file} is no file of {name} for this model: {problems[0]} ({len(problems)} in all); check "
            "--from, --dataset and --setting, or take another file"
        )
    return {key: found[key].to(like.dtype) if key in found else like for key, like in start.items()}


def _converted(ours: str, tensor: Tensor, like: Tensor, name: str) -> Tensor:
    if ours.startswith("dfs.theta."):  # theirs is what is learned, ours the theta of Eq. 6
        return (tensor.sigmoid() + 0.5).clamp(max=1)
    return widened(ours, tensor, like) if name == "anomalib" else tensor


def widened(ours: str, tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor of anomalib's MEM, which has half as many inner channels, with the shape of ours, `like`.

    The other channels are zero after their batch norm, and what reads them has weights of zero: in eval mode
    the network computes the same. A tensor of any other shape is left as it is.
    """
    dims = [dim for pattern, dim in INNER if re.search(rf"blocks\.\d\.{pattern}", ours)]
    if not dims or list(tensor.shape) != [n // 2 if dim in dims else n for dim, n in enumerate(like.shape)]:
        return tensor
    wide = torch.ones_like(like) if ours.endswith("running_var") else torch.zeros_like(like)
    place = wide
    if "merge" in ours:  # it reads both branches side by side
        place, tensor = wide.unflatten(1, (2, -1)), tensor.unflatten(1, (2, -1))
    place[tuple(slice(n) for n in tensor.shape)] = tensor
    return wide


# --- to a run -----------------------------------------------------------------------------------------------

DATASETS = {  # the authors' folders
    "MVTec AD": "mvtec", "BTAD": "btad", "MVTec 3D-AD": "mvtec3d", "VisA": "visa", "VAD": "vad",
    "APTOS": "aptos", "OCT2017": "oct2017", "ISIC2018": "isic2018", "Kvasir-SEG": "kvasir",
    "CVC-ClinicDB": "clinicdb", "CVC-ColonDB": "colondb",
}  # fmt: skip
COMMON: dict[str, object] = {"train.precision": "fp32", "eval.select": "best"}
SETTINGS: dict[str, dict[str, object]] = {  # of the runs, beside the dataset's own for that model
    "uninet": {"model.flavor": "released"},
    "recontrast": {"model.name": "recontrast"},
    "anomalib": {
        "model.flavor": "released", "model.dfs": "prior", "model.dfs_theta": "learnable",
        "model.head": "none", "model.skip_connections": False, "loss.supervised": "none",
        "loss.temperature": 0.1, "loss.stop_grad": "none", "optim.preset": "multi-class",
        "data.image_size": 256, "data.center_crop": None, "data.resize": "bilinear",
        "score.decision": "max", "score.score_sigma": 4.0, "score.blur_size": 5,
    },
}  # fmt: skip


def settings_of_path(file: Path) -> dict[str, object]:
    """What the authors' folders tell: <dataset>/<class>/NAME.pth, <dataset>/multiclass/NAME.pth, or
    <dataset>/NAME.pth where there are no classes; nothing elsewhere.
    """
    above, folder = ("", "", *file.resolve().parts)[-3:-1]
    if folder in DATASETS:
        return {"data.name": DATASETS[folder]}
    if above not in DATASETS:
        return {}
    own = {"model.setting": "multi-class"} if folder == "multiclass" else {"data.category": folder}
    return {"data.name": DATASETS[above], **own}


def config_of(file: Path, name: str, chosen: Mapping[str, object]) -> Config:
    """The configuration of a file's run: the dataset's for that model, then what path and flags tell.

    Raises:
        ConfigError: if neither tells the dataset or the category.
    """
    told = {**COMMON, **SETTINGS[name], **settings_of_path(file), **chosen}
    if "data.name" not in told:
        raise ConfigError(f"the path of {file} does not tell its dataset; give --dataset, and --category")
    dataset = str(told["data.name"])
    if dataset == "vad" and name == "uninet":
        told.setdefault("model.setting", "supervised")
    if dataset in POLYP:
        told.setdefault("data.category", "random")
    multi, categories = told.get("model.setting") == "multi-class", list(SPECS[dataset].counts)
    if not multi and len(categories) > 1 and "data.category" not in told:
        raise ConfigError(f"give --category of {dataset} ({', '.join(categories)}), or --setting multi-class")
    category = None if multi else told.get("data.category")
    return load_config(config_file(dataset), told, category=None if category is None else str(category))


def to_run(file: Path, name: str, config: Config, folder: Path) -> None:
    """Write the run of a file.

    Raises:
        CheckpointError: as `read_tensors` and `to_ours`.
        RunError: if a run is in the folder.
    """
    if (folder / FILE).exists():
        raise RunError(f"{folder} holds a run; choose another --output")
    theirs = read_tensors(file)
    seed_everything(config.train.seed)  # for --weights random
    model = build_model(config, pretrained="teachers.source." in ABSENT[name])
    state = to_ours(theirs, name, config, model.state_dict(), file=file)
    step = config.train.iterations if config.eval.select == "last" else 0  # the file does not tell
    identity = {"converted": {"from": name, "file": file.name, "content": content_digest(file)}}
    with locked(folder):
        Checkpoint(config, state, step, identity=identity).save(folder / FILE)
        write_text(folder / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
    print_result(str(folder))


# --- to the authors' file -----------------------------------------------------------------------------------

AUTHORS: dict[str, object] = {  # the network that their code builds
    "name": "uninet", "backbone": "wide_resnet50_2", "strides": (4, 8, 16), "mem_kernels": (3, 3),
    "mem_reparam": "construct", "width": 1.0, "student_backbone": None, "student_activation": "relu",
    "feature_gain": None,
}  # fmt: skip


def to_uninet(run: Path, output: Path) -> None:
    """Write a run's weights as the authors' code reads them.

    Raises:
        CheckpointError: if their code has not that network.
        RunError: if there is such a file.
    """
    if output.exists():
        raise RunError(f"{output} is there already; choose another --output")
    path, state = load_trained(run)
    for key, value in AUTHORS.items():
        if (own := getattr(state.config.model, key)) != value:
            raise CheckpointError(
                f"{path} has model.{key} {own}, expected {value}: the authors' code builds no other network. "
                "Train with --flavor released"
            )
    back = [(b, a) for a, b in PAIRS["uninet"] + HEADS.get(state.config.model.head, [])]
    parts: dict[str, dict[str, Tensor]] = {"tt": {}, "bn": {}, "st": {}, "dfs": {}}
    for ours, tensor in state.model.items():
        if ours.startswith(ABSENT["uninet"]):
            continue
        part, _, name = (renamed(ours, back) or "").partition(".")
        if not part:
            raise CheckpointError(f"{path} has {ours}, expected no such part: the authors' code has none")
        parts[part][name.replace("bn_layer.", "bn_layer.0.")] = tensor
    for (part, name), module in _unused(parts["st"]).items():
        parts[part] |= {f"{name}.{kind}": tensor for kind, tensor in module.state_dict().items()}
    write_atomically(output, lambda file: torch.save(parts, file.name))
    log.info("the authors' code adds the source teacher (ImageNet, V1); theta is 1 there")
    print_result(str(output))


def _unused(student: Mapping[str, Tensor]) -> dict[tuple[str, str], nn.Module]:
    """New modules in the place of UNUSED: without them their code does not load the file."""
    finest, coarsest = (student[f"layer{n}.0.bn3.bias"].numel() for n in (3, 1))
    found: dict[tuple[str, str], nn.Module] = {
        ("bn", "conv4"): nn.Conv2d(4 * coarsest, 2 * coarsest, 1, bias=False),
        ("bn", "bn4"): nn.BatchNorm2d(2 * coarsest),
        **{("bn", f"bn_layer.0.{i}.bn7"): nn.BatchNorm2d(coarsest) for i in range(3)},
    }
    return found if "fc.weight" in student else {**found, ("st", "fc"): nn.Linear(finest, 1)}


# --- command line -------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__.split("\n")[0])
    parser.add_argument("file", type=user_path, metavar="FILE", help="weights, or a folder of them; a run")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="source", choices=tuple(PAIRS), help="the program that wrote FILE")
    way.add_argument("--to", choices=("uninet",), help="the program that is to read the run FILE")
    where = "the run's folder; of a folder the folder of all runs; with --to the file"
    parser.add_argument("--output", type=user_path, required=True, metavar="RUN", help=where)
    parser.add_argument("--dataset", choices=sorted(SPECS), help="of the run (default: as FILE's path tells)")
    for name in ("category", "setting", "weights"):
        WHAT[name].add(parser, name, default="as FILE's path tells, else the config's")
    others = "settings that FILE does not tell; eval.select=last if it is the end of a training"
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help=others)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Convert a file, the files of a folder, or a run."""
    args = parse_arguments(argv)
    if args.to:
        told = [name for name in ("dataset", "category", "setting", "weights", "set") if getattr(args, name)]
        if told:
            raise ConfigError(f"--{told[0]} is for --from: a run knows its own settings; leave it out")
        to_uninet(args.file, args.output)
        return
    whole = args.file.is_dir()
    files = sorted(args.file.rglob("*.pth")) if whole else [args.file]
    if not files:
        raise CheckpointError(f"no *.pth in {args.file}")
    configs = [config_of(file, args.source, overrides(args)) for file in files]  # all, before one is written
    for file, config in zip(files, configs, strict=True):
        folder = run_folder(config, args.output, file.stem) if whole else args.output
        to_run(file, args.source, config, folder)
    if any(config.eval.select == "best" for config in configs):
        log.info("results will say: selected on the test set, so not fair (docs/PUBLISHED_WEIGHTS.md)")


if __name__ == "__main__":
    sys.exit(run_command(main))
