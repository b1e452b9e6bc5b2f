"""The classification head of ELSA-VOLO; configs name it by its path, as it needs MMPretrain."""

from __future__ import annotations

from typing import Any

import torch
from mmpretrain.models.heads import ClsHead
from mmpretrain.models.losses import LabelSmoothLoss
from mmpretrain.structures import DataSample
from torch import Tensor, nn
from torch.nn import functional as F

from elsa_core.volo_classifier import combined_logits, swap_box


class VoloHead(ClsHead):
    """Classifies the class token and the patch tokens of `elsa_mm.volo.ELSAVoloTokens`.

    Its logits are those of the class token plus half of each class's largest one of all patch
    tokens (arXiv 2106.13112). It trains by the loss of the class token, whose target is mixed by
    the area of MixToken's box, plus ``aux_loss_weight`` times the mean loss of the patch tokens
    (token labelling, arXiv 2104.10858). MixToken is undone in the patch tokens' logits, so that
    each has the target of its own image: the image's, or that of its position where the data
    samples have a field ``token_label`` with the probabilities [num_classes, H/16, W/16]. Nothing
    here reads files of token labels or crops them with the images, and MMPretrain's batch
    augmentations do not mix them.

    Args:
        num_classes: number of classes.
        in_channels: channels of the tokens.
        aux: classify the patch tokens.
        aux_loss_weight: of the patch tokens' loss, in relation to the class token's.
        loss: a loss that takes probabilities [N, num_classes] as targets; label smoothing of 0.1
            unless given.
        init_cfg: of the linear layers; weights of deviation 0.02 and biases of 0 unless given.

    Raises:
        ValueError: in training, for a ``token_label`` of another shape, or that only some of the
            images have.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        aux: bool = True,
        aux_loss_weight: float = 0.5,
        loss: dict | nn.Module | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(
            loss=loss or LabelSmoothLoss(label_smooth_val=0.1),
            init_cfg=init_cfg or dict(type="Normal", layer="Linear", std=0.02, bias=0.0),
        )
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.aux_loss_weight = aux_loss_weight
        self.fc = nn.Linear(in_channels, num_classes)
        self.aux_fc = nn.Linear(in_channels, num_classes) if aux else None

    def pre_logits(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Return the class token [B, D]."""
        return feats[0]

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Return the logits of evaluation [B, num_classes]."""
        logits = self.fc(self.pre_logits(feats))
        return logits if self.aux_fc is None else combined_logits(logits, self._aux_logits(feats))

    def _aux_logits(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Return the logits of the patch tokens [B, H, W, num_classes]."""
        assert self.aux_fc is not None
        return self.aux_fc(feats[1].permute(0, 2, 3, 1))

    def loss(
        self, feats: tuple[Tensor, ...], data_samples: list[DataSample], **options: Any
    ) -> dict[str, Tensor]:
        """Return "loss" or, with patch tokens, "loss_cls" and "loss_aux"."""
        token, patches, box = feats
        targets = self._targets(data_samples, token.device)
        top, left, bottom, right = box.unbind()
        share = (bottom - top) * (right - left) / patches[0, 0].numel()
        mixed = targets + share * (targets.flip(0) - targets)
        loss = self.loss_module(self.fc(token), mixed, avg_factor=len(token), **options)
        if self.aux_fc is None:
            return {"loss": loss}
        aux = swap_box(self._aux_logits(feats), box)
        aux_targets = self._aux_targets(data_samples, targets, aux)
        aux_loss = self.loss_module(
            aux.flatten(0, 2), aux_targets.flatten(0, 2), avg_factor=aux[..., 0].numel(), **options
        )
        return {"loss_cls": loss, "loss_aux": self.aux_loss_weight * aux_loss}

    def _targets(self, data_samples: list[DataSample], device: torch.device) -> Tensor:
        """Return the images' targets [B, num_classes]."""
        if "gt_score" in data_samples[0]:
            return torch.stack([sample.gt_score for sample in data_samples]).to(device).float()
        labels = torch.cat([sample.gt_label for sample in data_samples]).to(device)
        return F.one_hot(labels, self.num_classes).float()

    def _aux_targets(self, data_samples: list[DataSample], targets: Tensor, aux: Tensor) -> Tensor:
        """Return the targets of the patch tokens, in the shape of their logits ``aux``."""
        given = ["token_label" in sample for sample in data_samples]
        if not any(given):
            return targets[:, None, None].expand_as(aux)
        if not all(given):
            raise ValueError(
                f"all images of a batch must have token_label or none, got {sum(given)} of "
                f"{len(given)}"
            )
        labels = [torch.as_tensor(sample.token_label) for sample in data_samples]
        shape = (self.num_classes, *aux.shape[1:3])
        for label in labels:
            if label.shape != shape:
                raise ValueError(
                    f"token_label must have the shape {shape} of classes and patch tokens, got "
                    f"{tuple(label.shape)}"
                )
        return torch.stack(labels).to(aux.device).float().permute(0, 2, 3, 1)
