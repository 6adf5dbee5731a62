"""ReMIND, our recipe: REverse distillation, Multi-scale embedding, hard-position mINing, Discrimination head.

One frozen teacher, UniNet's bottleneck and student (Sec. 4.2), and synthetic defects (docs/RECIPE.md): the
student restores normal features, of which only the hardest positions teach; a head learns from the defects'
masks where teacher and student differ as they do on defects. A bank of training patches and their places
knows what a student restores although it was never there, as a part in the wrong place. With `adapt` among
`loss.terms` a second teacher learns with the head to show defects, and stays as the frozen one on normals.

Legend: B images; a feature list holds one (B, C_i, H_i, W_i) per level, fine to coarse.
"""

import math
from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import Tensor, nn

from losses.kd import hardest_distance
from losses.similarity import unmasked_positions
from losses.supervised import focal_loss, upsample
from model.backbone import BackboneInfo, input_normalisation
from model.base import AnomalyModel, Batch
from model.decision import Prediction, added, distance_map, top_mean
from model.heads import DiscriminationHead
from model.motion import SpeedHead
from model.peers.memory_bank import coreset, nearest, patches_of, placed, sample_patches
from model.student import build_bottleneck_and_student
from model.teachers import Features, FeatureStandardizer
from utils.config import Config, OptimConfig

MINED_FROM = 0.3  # share of the training after which only `hard_ratio` of the positions teaches
BANK_SIZE = 1 << 10  # patches, chosen to cover all; 4096 gain nothing on validation (docs/LOG.md)
RARE = 0.02  # of the candidates; a defect has 0.1 to 2.4 % where a fifth of the images show one (docs/LOG.md)
USUAL = 0.01  # share of the positions of a normal image whose distances are a bank's and a student's unit
LEAST = 1e-3  # of the patches' length that the bank's unit is: cdist in fp32 has no more digits
BEYOND = 2  # how much more a distance from the bank counts above that unit
BANK_IMAGES = 1 << 9  # at most, from whose patches they are chosen
CANDIDATES = 1 << 18  # patches at most from which they are chosen, fewer where one has more than 256 numbers
PLACE = 6  # standard deviations of a patch's features that the side of an image counts (docs/LOG.md)
REPAIR = 0.1  # weight of restoring what was there; with 1 screw loses 11 points of image AUROC (docs/LOG.md)
SECOND_RATE = 0.2  # of the second teacher, in shares of `optim.lr`; screw has no more with 0.6 (docs/LOG.md)
HEAD_FLOOR = 0.05  # added to the head's probability, so that a defect which it does not know still shows


class ReMIND(AnomalyModel):
    """Reverse distillation, with a head where training shows defects with their masks."""

    cuda_graphs = True

    def __init__(self, backbone: nn.Module, info: BackboneInfo, config: Config) -> None:
        super().__init__()
        self.configure(info, config)
        self.teacher = backbone.eval().requires_grad_(False)
        self.second = deepcopy(self.teacher).requires_grad_(True) if "adapt" in config.loss.terms else None
        self.scale = FeatureStandardizer(info.channels, gain=config.model.feature_gain)
        self.bottleneck, self.student = build_bottleneck_and_student(info, config.model)
        with_defects = config.data.synthetic > 0 or config.model.setting == "supervised"
        self.head = DiscriminationHead(info.channels) if with_defects else None
        self.fits = BANK_IMAGES if config.model.bank_fraction else 0
        self.side = 0 if config.data.tile else PLACE  # a tile's place in its image is not known
        if self.fits:
            self.register_buffer("bank", torch.zeros(0, sum(info.channels[-2:]) + 2))
            self.register_buffer("place", torch.zeros(()))  # what an image's side counts beside features
            self.register_buffer("usual", torch.ones(2))  # distances of normals from student and bank
        video = config.model.head == "speed"
        self.speed = SpeedHead(*input_normalisation(config.model.backbone)) if video else None

    def fit_statistics(self, images: Iterable[Tensor]) -> None:
        """Measure the features' scale on batches of training normals."""
        with torch.no_grad():
            self.scale.fit(self.teacher(batch) for batch in images)

    @torch.no_grad()
    def fit(self, images: Iterable[Tensor], *, seed: int) -> None:
        """Fill the bank of patches from training normals (B, 3, H, W), before the first step."""
        if not self.fits:
            super().fit(images, seed=seed)
        patches = (placed(patches_of(self.teacher(batch))) for batch in images)
        most = CANDIDATES * 256 // max(256, self.bank.shape[1])  # 256 MiB
        bank = sample_patches(patches, self.config.bank_fraction, seed=seed, most=most)
        self.place = self.side * bank[:, :-2].var(dim=0, correction=min(1, len(bank) - 1)).sum().sqrt()
        bank[:, -2:] *= self.place
        self.bank = coreset(bank, BANK_SIZE, rare=RARE, seed=seed)

    @torch.no_grad()
    def fit_score(self, images: Iterable[Tensor]) -> None:
        """Measure distances and, of videos, speed on normals; images: batches (B, 3, H, W)."""
        mode = self.training
        self.eval()
        images = images if self.speed is None else list(images)
        if self.fits:
            self.usual = torch.cat([self._highest_distances(batch) for batch in images]).mean(dim=0)
            self.usual[1].clamp_(min=LEAST * self.bank.norm(dim=1).mean())  # else rounding, of equal images
        if self.speed is not None:
            self.speed.power.zero_()  # so the score is the maps' alone
            pairs = [(self.predict(batch).score, self.speed.speed(batch)) for batch in images]
            self.speed.fit(*(torch.cat(scores) for scores in zip(*pairs, strict=True)))
        self.train(mode)

    def _highest_distances(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to (B, 2): mean of the largest 1 % of the distances from student and bank."""
        raw = self.teacher(images)
        maps = [distance_map(t, s) for t, s in zip(*self.restored(raw, images), strict=True)]
        both = added(maps, maps[0].shape[1:]), nearest(placed(patches_of(raw), self.place), self.bank)
        share = torch.full((len(images),), USUAL, device=images.device)
        return torch.stack([top_mean(m, share, limit=USUAL) for m in both], dim=1)

    def restored(self, raw: Features, images: Tensor) -> tuple[Features, Features]:
        """The second teacher's features of `images`, else the frozen one's, `raw`, scaled; the student's."""
        teacher = self.scale(raw if self.second is None else self.second(images))
        inputs = [t.detach() for t in teacher]
        return teacher, self.student(self.bottleneck(inputs), inputs)

    def loss(self, batch: Batch, progress: float | Tensor) -> dict[str, Tensor]:
        """L_KD of the hardest normal positions, summed over levels, and the head's focal and Dice loss.

        batch: image (B, 3, H, W) and mask (B, 1, H, W) of its defects. The share of positions that counts
        falls in a line from 1 to `hard_ratio`. With clean (B, 3, H, W), the images without their synthetic
        defects, the student restores the normal features there: a tenth of their mean distance is added.
        keep: the mean distance of the second teacher's features from the frozen one's on normal positions.
        """
        mask = batch["mask"]
        with torch.no_grad():
            raw = self.teacher(batch["image"])
        (teacher, student), frozen = self.restored(raw, batch["image"]), self.scale(raw)
        if "clean" in batch:
            with torch.no_grad():
                clean = self.scale(self.teacher(batch["clean"]))
        mined = torch.as_tensor(progress / MINED_FROM, dtype=torch.float64).clamp(max=1)
        share = 1 - (1 - self.loss_config.hard_ratio) * mined
        with torch.autocast(batch["image"].device.type, enabled=False):
            normal = [unmasked_positions(t.shape[2:], mask) for t in teacher]
            parts = {"kd": _summed_distance(frozen, student, normal, share)}
            if self.second is not None:
                parts["keep"] = _summed_distance(frozen, teacher, normal, 1)
            if "clean" in batch:
                differs = (batch["image"] != batch["clean"]).any(dim=1, keepdim=True)
                changed = [~unmasked_positions(t.shape[2:], differs) for t in clean]
                parts["repair"] = REPAIR * _summed_distance(clean, student, changed, 1)
            if self.head is not None:
                # detached: the student would learn to show the synthetic kinds of defects, and only those
                logits = self.head(teacher, [s.detach() for s in student])
                parts["head"] = focal_loss(upsample(logits, mask.shape[2:]), mask)
            return parts | {"total": torch.stack(list(parts.values())).sum()}

    def predict(self, images: Tensor) -> Prediction:
        """Images (B, 3, H, W) to maps (B, H, W) and scores (B,).

        Distances from student and bank, each over its largest on normals, are summed; above 1 the bank's is
        tripled. The head's probability of a defect multiplies the sum, speed the score alone.
        """
        raw = self.teacher(images) if self.fits or self.second is None else []
        teacher, student = self.restored(raw, images)
        size, factor = images.shape[2:], None
        if self.head is not None:
            factor = upsample(self.head(teacher, student), size)[:, 0].sigmoid() + HEAD_FLOOR
        maps = [distance_map(t, s) for t, s in zip(teacher, student, strict=True)]
        if self.fits:
            far = nearest(placed(patches_of(raw), self.place), self.bank) / self.usual[1]
            maps = [*(m / self.usual[0] for m in maps), far + BEYOND * (far - 1).relu()]
        found = self.decision(maps, size, highest=math.inf if self.fits else 2, factor=factor)
        if self.speed is not None:
            found.score = found.score * self.speed(images)
        return found

    def parameter_groups(self, optim: OptimConfig) -> list[dict]:
        """All that learns at `lr`, but the second teacher at SECOND_RATE of it."""
        if self.second is None:
            return super().parameter_groups(optim)
        second = {"name": "teacher", "params": list(self.second.parameters()), "lr": SECOND_RATE * optim.lr}
        learning = [p for n, p in self.named_parameters() if p.requires_grad and not n.startswith("second.")]
        return [{"name": "model", "params": learning, "lr": optim.lr}, second]

    def train(self, mode: bool = True) -> "ReMIND":
        """As of any model; the second teacher's batch norms keep their statistics, else it drifts."""
        super().train(mode)
        if self.second is not None:
            self.second.eval()
        return self

    def parts_to_fold(self) -> list[nn.Module]:
        """All that has batch norms."""
        parts = (self.teacher, self.second, self.bottleneck, self.student, self.head)
        return [part for part in parts if part is not None]


def _summed_distance(a: Features, b: Features, where: list[Tensor], share: float | Tensor) -> Tensor:
    levels = zip(a, b, where, strict=True)
    return torch.stack([hardest_distance(t.float(), s.float(), at, share) for t, s, at in levels]).sum()
