"""Exported models of a few operators, which find the same in every image."""

import torch
from torch import nn

from elsa_tools.export.record import KEY, Record, Resize

DYNAMIC = torch.export.Dim.DYNAMIC
# Of the image, x1 y1 x2 y2; the last two leave it, one wholly.
BOXES = [[0.1, 0.2, 0.5, 0.6], [0.5, 0.1, 1.2, 0.9], [-0.4, 0.2, -0.1, 0.6]]
SCORES = [0.9, 0.6, 0.3]
RECORD = Record(
    task="detection",
    framework="mmdet",
    classes=("cat", "dog", "café"),
    colours=((255, 0, 0), (0, 255, 0), (0, 0, 255)),
    resize=Resize(64, 100, "opencv"),
    masks="logits",
)


class Toy(nn.Module):
    """Three objects in each image, with the scores SCORES where its first pixel is white; the left
    half of each mask is set."""

    def __init__(self):
        super().__init__()
        self.register_buffer("fractions", torch.tensor(BOXES))
        self.register_buffer("of_white", torch.tensor(SCORES))
        logits = torch.full((28, 28), -8.0)
        logits[:, :14] = 8
        self.register_buffer("logits", logits)

    def example(self):
        return EXAMPLE

    def dynamic_shapes(self):
        return SHAPES

    def forward(self, image, size):
        count = image.shape[0]
        sides = size.flip(1).repeat(1, 2).float()
        boxes = (self.fractions * sides[:, None]).reshape(-1, 4)
        scores = (image[:, 0, 0, :1] / 255 * self.of_white).reshape(-1)
        number = torch.arange(3, device=image.device)
        labels = (number + torch.zeros_like(size[:, :1])).reshape(-1)
        images = (torch.arange(count)[:, None] + torch.zeros_like(number)).reshape(-1)
        masks = self.logits + torch.zeros_like(scores)[:, None, None]
        return boxes, scores, labels, images, masks


NAMES = ("boxes", "scores", "labels", "images", "masks")
EXAMPLE = (torch.zeros(2, 3, 40, 50), torch.tensor([[40, 50], [30, 20]]))
SHAPES = ({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC}, {0: DYNAMIC})


def save_onnx(path, record=RECORD, names=NAMES):
    program = torch.onnx.export(
        Toy().eval(),
        EXAMPLE,
        dynamo=True,
        opset_version=20,
        input_names=["image", "size"],
        output_names=list(names),
        dynamic_shapes=SHAPES,
        verbose=False,
    )
    if record is not None:
        program.model.metadata_props[KEY] = record.to_json()
    program.save(str(path))
    return str(path)


def save_pt2(path, record=RECORD):
    from elsa_tools.export.program import save_program

    save_program(Toy().eval(), str(path), record.to_json())
    return str(path)
