"""Command line of the digits data set: handwritten digits on photographs, as COCO and others.

Needs no network: the digits come with scikit-learn, the photographs with scikit-image.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from elsa_core.runtime.command_line import exit_status  # noqa: E402
from elsa_core.runtime.errors import UsageError  # noqa: E402

DETAILS = """\
written to OUT, with --layout standard:
  images/{training,validation}/NNNNNN.jpg            square RGB images, JPEG quality 95
  annotations/{training,validation}/NNNNNN.png       ADE20K layout: 1 background, 2..11 digits 0..9
  annotations/instances_{training,validation}.json   COCO layout: RLE masks, category ids 1..10
  meta.json                                          options, counts, checksum

with --layout cityscapes, two of these images side by side, digits 0..7 as the 8 classes with
instances, 8 and 9 as traffic sign and vegetation, on building and road:
  leftImg8bit/{train,val}/CITY/*_leftImg8bit.png     RGB images, 2*SIZE x SIZE
  gtFine/{train,val}/CITY/*_gtFine_*                 polygons.json; labelIds, labelTrainIds,
                                                     instanceIds and color .png
  annotations/instancesonly_filtered_gtFine_{train,val}.json    COCO layout, for MMDetection
with --layout imagenet, one digit an image:
  {train,val}/{0..9}/NNNNNN.JPEG
with --layout mixed, as standard, but for the validation images: seven sizes; colour, grey, RGBA,
turned by EXIF and 16-bit files by turns; every 20th a crowd of some 400 digits:
  images/validation/NNNNNN.{jpg,png}
with --layout panoptic, images and instances as standard, and COCO's panoptic files, where the
photograph is stuff:
  annotations/panoptic_{training,validation}.json, annotations/panoptic_{training,validation}/*.png

Each image shows 2 to 4 digits on a random crop of a photograph. Digits and photographs of the
validation part never occur in the training part. The same options give the same files. If OUT
already holds them, nothing is done; an interrupted run leaves nothing behind in OUT.

exit status: 0 done, 2 an error (one sentence on standard error), 130 interrupted
"""

PACKAGES = ("cv2", "pycocotools", "skimage", "sklearn", "tqdm")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make_digits.py",
        description="Make a small data set of handwritten digits on photographs.",
        epilog=DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", default="data/digits", help="folder to make (default: %(default)s)"
    )
    parser.add_argument(
        "--train", type=int, default=1600, help="training images, at least 1 (default: %(default)s)"
    )
    parser.add_argument(
        "--val", type=int, default=200, help="validation images, at least 1 (default: %(default)s)"
    )
    parser.add_argument(
        "--size", type=int, default=160, help="pixels a side, 64..2048 (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="0 or more, other images (default: %(default)s)"
    )
    parser.add_argument(
        "--layout",
        choices=("standard", "cityscapes", "imagenet", "mixed", "panoptic"),
        default="standard",
        help="whose folders and files it has: COCO's and ADE20K's, or another one's "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace a digits data set made with other options, or a damaged one",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    interrupted = f"interrupted, {options.out} is as it was before"
    return exit_status("make_digits", lambda: run(options), interrupted, PACKAGES)


def run(options: argparse.Namespace) -> int:
    from examples.digits.layouts import make_layout

    try:
        summary = make_layout(**vars(options))
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        reason = error.strerror or error
        raise UsageError(f"cannot make {options.out}: {reason}{place}") from error
    counts = ", ".join(
        f"{summary.images[part]} {part} images with {summary.objects[part]} digits"
        for part in summary.images
    )
    layout = "" if options.layout == "standard" else f", as {options.layout} is laid out"
    print(f"{summary.path}: {'wrote' if summary.made else 'already holds'} {counts}{layout}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
