"""A trained model for use: `load_detector(RUN).predict(image)`."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar, overload

import numpy as np
import torch
from PIL import Image

from datasets.images import read_image, to_rgb
from datasets.loader import ImageSet
from datasets.samples import UNKNOWN, Sample
from datasets.transforms import Decode, Normalise
from model.backbone import input_normalisation
from model.base import AnomalyModel
from model.build import build_model
from model.exported import FILE, exported_model
from model.inference import Predicted, ScoringOptions, for_inference, predictions
from utils.checkpoint import Checkpoint, load_trained, restore_model
from utils.config import Config
from utils.device import choose_device, choose_precision
from utils.errors import ConfigError

ImageLike = str | Path | Image.Image | np.ndarray
Item = TypeVar("Item", bound=ImageLike)
_log = logging.getLogger("uninet")


def check_rate(rate: float) -> None:
    """Raise ConfigError for a false-alarm rate that is not between 0 and 1."""
    if not 0 < rate < 1:
        raise ConfigError(f"the false-alarm rate is {rate}; choose a value between 0 and 1")


@dataclass(frozen=True)
class Calibration:
    """Decides without labelled anomalies: scores of held-out normal training images.

    low, high: the map values shown as coldest and hottest colour.
    """

    scores: tuple[float, ...]
    low: float
    high: float

    def __post_init__(self) -> None:
        if not np.isfinite([*self.scores, self.low, self.high]).all():
            found = "scores or maps of the held-out normals are not finite"
            raise FloatingPointError(f"{found}; train again with a lower optim.lr or --precision fp32")

    def p_values(self, scores: np.ndarray) -> np.ndarray:
        """Share of normals at least as anomalous, each new image (N,) counted with them: (N,) in (0, 1].

        If a new image is normal and exchangeable with the held-out ones (same process, same camera, no
        drift), its p-value is at most r with probability at most r, whatever the model.
        """
        held_out = np.sort(np.asarray(self.scores))
        above = len(held_out) - np.searchsorted(held_out, scores, side="left")
        return (1 + above) / (1 + len(held_out))

    @property
    def pixel_level(self) -> float:
        """Map value above which a pixel is marked: one in a thousand pixels of the held-out normals is.

        Middle of the colour scale; unlike the p-values of whole images no guarantee.
        """
        return (self.low + self.high) / 2

    def smallest_rate(self) -> float:
        """The smallest false-alarm rate that these normals can guarantee, 1 / (n + 1)."""
        return 1 / (1 + len(self.scores))


@dataclass(frozen=True)
class Detection:
    """What a detector says of one image.

    score: higher is more anomalous. anomaly_map: (height, width) float32 at the size of the upright image.
    p_value, is_anomalous: None if the run held no normal images out (data.calibration_fraction).
    """

    score: float
    anomaly_map: np.ndarray
    p_value: float | None
    is_anomalous: bool | None


@dataclass
class Detector:
    """A run's model on a device. `predict` may be called from several threads, which take turns."""

    path: Path
    state: Checkpoint  # without the weights, which `model` holds
    config: Config
    model: AnomalyModel  # as it was trained
    normalise: Normalise
    calibration: Calibration | None
    device: torch.device
    precision: str
    batch_size: int

    def __post_init__(self) -> None:
        self._turn = threading.Lock()

    @cached_property
    def deployed(self) -> AnomalyModel:
        """A copy of the model that only predicts, and is faster; on a CPU in fp32 its exported file."""
        exported = None
        if self.device.type == "cpu" and self.precision == "fp32":
            exported = exported_model(self.path.parent / FILE, self.model, self.config, self.normalise)
        return exported or for_inference(self.model)

    @overload
    def predict(self, images: ImageLike, *, false_alarm_rate: float = 0.01) -> Detection: ...
    @overload
    def predict(self, images: list[Item], *, false_alarm_rate: float = 0.01) -> list[Detection]: ...

    def predict(
        self, images: ImageLike | list[Item], *, false_alarm_rate: float = 0.01
    ) -> Detection | list[Detection]:
        """Score an image, or a list of images of any sizes, as predict.py does.

        images: paths, PIL images, (height, width, 3) uint8 RGB arrays. docs/IMAGES.md says how other modes
        become RGB. false_alarm_rate: share of normal images that may be flagged.
        Raises ValueError for what is no such image, and for a rate that is not between 0 and 1; ConfigError
        if the model takes several frames of a video; FloatingPointError as `predictions`.
        """
        data = self.config.data
        if self.config.model.head == "frame" or data.stack_frames:
            instead = "give predict.py or test.py the folder of a clip"
            raise ConfigError(f"this model takes several frames of a video, no single images: {instead}")
        check_rate(false_alarm_rate)
        given = images if isinstance(images, list | tuple) else [images]
        decode = Decode(data.image_size, data.resize, data.center_crop)
        with self._turn:
            found = list(self._detections(_GivenImages(given, decode, self.normalise), false_alarm_rate))
        return found if given is images else found[0]

    def _detections(self, data: "_GivenImages", rate: float) -> Iterator[Detection]:
        for part in self.predictions(data, quiet=True):
            p_values = [None] * len(part.score)
            if self.calibration:
                p_values = self.calibration.p_values(part.score).tolist()
            for i, score, anomaly_map, p in zip(part.indices, part.score, part.maps, p_values, strict=True):
                whole = data.decode.to_image(anomaly_map, *data.sizes[i])
                yield Detection(float(score), whole, p, None if p is None else p <= rate)

    def predictions(self, data: ImageSet, *, quiet: bool = False) -> Iterator[Predicted]:
        """The function `predictions` with the deployed model."""
        options = ScoringOptions(self.batch_size, self.device, self.precision, quiet)
        return predictions(self.deployed, data, options)


def load_detector(
    run: str | Path,
    *,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] | None = None,
    batch_size: int | None = None,
    change: Callable[[Config], Config] | None = None,
) -> Detector:
    """The model of a run folder or of a checkpoint file, ready to predict.

    device: auto, cpu, cuda or cuda:N. precision: auto, fp32 or bf16, else a ValueError; by default the run's,
    in which its held-out images were scored. change: of its configuration, but for the model's own settings.
    """
    path, state = load_trained(run)
    config = state.config if change is None else change(state.config)
    place = choose_device(device)
    precision = choose_precision(precision or config.run.eval_precision, place)
    batch_size = config.run.eval_batch_size if batch_size is None else batch_size
    if batch_size < 1:
        raise ConfigError(f"--eval-batch-size is {batch_size}; it is at least 1")
    config = replace(config, run=replace(config.run, eval_precision=precision, eval_batch_size=batch_size))
    model = build_model(config, pretrained=False).to(place).to(memory_format=torch.channels_last)
    restore_model(model, state.model, source=path)
    return Detector(
        path=path,
        state=replace(state, model={}),
        config=config,
        model=model.eval(),
        normalise=Normalise(*input_normalisation(config.model.backbone)),
        calibration=_calibration(state, config, precision),
        device=place,
        precision=precision,
        batch_size=batch_size,
    )


def _calibration(state: Checkpoint, config: Config, precision: str) -> Calibration | None:
    """The run's calibration, if its held-out scores can be compared with those of `config`."""
    if state.calibration is None:
        return None
    trained, compared = ((c.data.name, c.data.category, c.score) for c in (state.config, config))
    if trained != compared:
        _log.warning("no p-values: the held-out scores are of the run's own dataset and score settings")
        return None
    if precision != state.config.run.eval_precision:
        _log.warning(
            "p-values compare scores in %s with held-out ones in %s: take them as approximate",
            precision, state.config.run.eval_precision,
        )  # fmt: skip
    return Calibration(**state.calibration)


class _GivenImages(ImageSet):
    """Images that were given in Python; `sizes` are (width, height) of those decoded so far."""

    def __init__(self, images: Sequence[ImageLike], decode: Decode, normalise: Normalise) -> None:
        self.images = images
        self.sizes: dict[int, tuple[int, int]] = {}
        names = (x if isinstance(x, str | Path) else f"images[{i}]" for i, x in enumerate(images))
        paths = [Path(name).expanduser() for name in names]
        samples = [Sample(path, UNKNOWN, None, "", "predict", "", str(path)) for path in paths]
        super().__init__(samples, decode, normalise)

    def _decoded(self, index: int) -> np.ndarray:
        image, path = self.images[index], self.samples[index].path
        picture = read_image(path) if isinstance(image, str | Path) else to_rgb(image, name=str(path))
        self.sizes[index] = picture.size
        return np.asarray(self.decode.fit(picture))
