"""Domain-related feature selection: weight the student's features by the teacher's (Sec. 4.3, Eqs. 4 to 6).

Legend: B images, C channels, N = H W positions.
"""

import torch
from torch import Tensor, nn


def selection_weight(teacher: Tensor) -> Tensor:
    """Softmax w of the teacher's feature over positions, per image and channel (Eq. 4), (B, C, H, W).

    The constant rho that the paper subtracts cancels in the softmax; torch subtracts the maximum itself.
    """
    return teacher.flatten(2).softmax(dim=2).view_as(teacher)


class DomainRelatedFeatureSelection(nn.Module):
    """(F_S)^P = F_S * w * (theta + F^g) (Eq. 6), one theta (1, C_i, 1, 1) per level, shared by both teachers.

    mode: prior as in Eq. 6; all leaves out w, F_S * (theta + F^g) (our reading of (F_S)^A in Table 10); none
    returns F_S. theta starts at 1. With features of both signs, theta + F^g may change sign where a channel's
    mean over the image is below -theta.
    """

    def __init__(self, channels: tuple[int, ...], *, mode: str, learnable: bool) -> None:
        super().__init__()
        self.mode = mode
        learns = learnable and mode != "none"
        self.theta = nn.ParameterList(nn.Parameter(torch.ones(1, c, 1, 1), learns) for c in channels)

    def forward(self, student: Tensor, teacher: Tensor, level: int) -> Tensor:
        """Student and teacher (B, C, H, W) of a level to (F_S)^P (B, C, H, W)."""
        if self.mode == "none":
            return student
        weight = self.theta[level] + teacher.mean(dim=(2, 3), keepdim=True)  # F^g, Eq. 5
        if self.mode == "prior":
            weight = weight * selection_weight(teacher)
        return student * weight
