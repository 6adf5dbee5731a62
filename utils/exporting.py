"""A model as an ONNX file that needs none of this code, normalisation inside the graph.

Legend: B images, H and W the model's size.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from datasets.transforms import Normalise
from utils.checkpoint import Checkpoint
from utils.errors import ExportError
from utils.runs import git_sha

OUTPUTS = ("score", "anomaly_map")
LARGEST_BATCH = 4096  # the exporter wants a bound
LARGEST_FILE = 2**31 - 2**24  # bytes of weights: an ONNX file is at most 2 GiB, the graph included


@dataclass
class Exported:
    """The bytes of the file, and what it computes: uint8 images to score (B,) and anomaly_map (B, H, W)."""

    content: bytes
    run: Callable[[np.ndarray], tuple[np.ndarray, ...]]


class Deployed(nn.Module):
    """A deployed model behind the normalisation of its backbone; what is exported."""

    def __init__(self, model: nn.Module, normalise: Normalise) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        scale, offset = normalise.factors()
        self.register_buffer("scale", torch.from_numpy(scale))
        self.register_buffer("offset", torch.from_numpy(offset))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """RGB (B, H, W, 3) uint8, or frames (B, F, H, W, 3), to score (B,) and anomaly_map (B, H, W)."""
        prediction = self.model.predict((image.float() * self.scale + self.offset).movedim(-1, -3))
        return prediction.score, prediction.anomaly_map


def check_size(model: nn.Module) -> None:
    """Stop before the long work if the weights do not fit into one ONNX file.

    Raises:
        ExportError: with their size, and what to do.
    """
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    found, most = size / 2**30, LARGEST_FILE / 2**30
    if size > LARGEST_FILE:
        raise ExportError(
            f"the model holds {found:.2f} GiB, an ONNX file at most {most:.2f}; a memory "
            "bank shrinks with model.bank_fraction, other models with model.width or another --backbone"
        )


def describe(state: Checkpoint) -> dict[str, str]:
    """What a user of the file must know: how to make the input, what comes out, where it is from."""
    data, frames = state.config.data, state.config.model.head == "frame"
    height, width = data.image_size
    shape = f"(B, 2, {height}, {width}, 3): an earlier frame, and the one that is judged"
    about = {
        "input": f"image: uint8 RGB {shape if frames else f'(B, {height}, {width}, 3)'}; any B",
        "image_size": json.dumps(data.image_size),
        "center_crop": json.dumps(data.center_crop),
        "resize": f"{data.resize}, antialiased (Pillow), after the centre crop, which is a side in pixels, "
        "or up to 1 a share of each side",
        "normalisation": "inside the graph",
        "output": f"score: float32 (B,); anomaly_map: float32 (B, {height}, {width}); high is anomalous",
        "config": json.dumps(state.config.to_dict()),
        "training": f"{state.iteration} of {state.config.train.iterations} steps",
        "code": git_sha(),
    }
    if data.stack_frames:
        about["stacked_frames"] = (
            f"grey: the pictures {2 * data.stack_frames} and {data.stack_frames} before, and the one judged"
        )
    if state.calibration:
        about["calibration"] = json.dumps(state.calibration)
        about["p_value"] = "(1 + number of calibration.scores >= score) / (1 + number of calibration.scores)"
    return about


def to_onnx(model: Deployed, image: Tensor, about: dict[str, str]) -> Exported:
    """Export by torch.export, and open the result in onnxruntime on the CPU.

    image: a sample input of at least two images. `about` becomes the file's metadata_props.

    Raises:
        ExportError: if onnx, onnxscript or onnxruntime is not installed.
    """
    try:
        import onnx  # noqa: F401 (what torch needs)
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f"{error.name} is not installed: pip install -r requirements-export.txt") from error
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    with _quiet():
        program = torch.onnx.export(
            model,
            (image,),
            dynamo=True,
            input_names=["image"],
            output_names=list(OUTPUTS),
            dynamic_shapes=({0: batch},),
            verbose=False,
        )
    proto = program.model_proto
    for key, value in about.items():
        proto.metadata_props.add(key=key, value=value)
    content = proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as PyTorch, for the timing
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return Exported(content, lambda images: tuple(session.run(list(OUTPUTS), {"image": images})))


class _quiet(warnings.catch_warnings):  # noqa: N801 (used as a function)
    """The exporter warns about every size that it takes as fixed, which the images' sizes are."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        logging.getLogger("onnx_ir").setLevel(logging.ERROR)
