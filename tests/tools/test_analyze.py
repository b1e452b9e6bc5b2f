"""tools/analyze.py: filters that explain the output exactly, and pictures that show them."""

import json

import numpy as np
import pytest
import torch
import volo_weights
from PIL import Image
from weights_models import PHOTOGRAPHS, TINY, detector, original, save, swin

pytest.importorskip("matplotlib")
from matplotlib.backends.backend_agg import FigureCanvasAgg

from elsa_core import ELSASwin, ELSAVolo
from elsa_core.filters import neighbourhood_filters
from elsa_core.runtime.errors import UsageError
from elsa_core.weights import convert_file
from elsa_tools.archs import read_arch
from elsa_tools.inspect import attention, cli, picture

COFFEE = PHOTOGRAPHS / "coffee.png"
# Height 50 and width 70: maps of 13x18 and 7x9, of which pixels are in corners, at borders, inside.
PIXELS = [(0, 0), (69, 0), (0, 49), (69, 49), (30, 20), (68, 3)]


@pytest.fixture(scope="module")
def weights():
    return detector("mask_rcnn")


@pytest.mark.parametrize("ghosts", [(0, 1), (0, 0), (2, 0), (1, 0.5)], ids=str)
@pytest.mark.parametrize("stage, block", [(0, 0), (1, 0), (1, 1)])
def test_filters_applied_by_hand_give_the_operators_output(ghosts, stage, block):
    torch.manual_seed(stage)
    arch = dict(embed_dim=12, depths=[1, 2, 1], num_heads=[2, 3, 4], group_width=4, kernel_size=5)
    backbone = ELSASwin(
        {**arch, "lam": ghosts[0], "gamma": ghosts[1]}, out_indices=(2,), init_std=0.3
    ).double()
    layer = backbone.layers[stage].blocks[block].attn
    given = []
    handle = layer.post_proj.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    image = torch.randn(3, 50, 70, dtype=torch.double)
    backbone.eval()(image.unsqueeze(0))
    handle.remove()
    backbone.train()
    filters = neighbourhood_filters(backbone, image, stage, block, PIXELS)
    by_hand = (filters.effective * filters.neighbourhoods()).sum((-2, -1))
    stride = 4 * 2**stage
    expected = torch.stack([given[0][0, y // stride, x // stride] for x, y in PIXELS])
    assert filters.stride == stride
    assert torch.allclose(by_hand, expected, rtol=0, atol=1e-12)
    assert torch.equal(filters.output, expected.detach())
    heads = arch["num_heads"][stage]
    assert filters.attention.shape == (len(PIXELS), heads, 5, 5)
    assert torch.allclose(filters.attention.sum((-2, -1)), torch.ones(1, dtype=torch.double))
    assert (filters.ghost_mul is not None, filters.ghost_add is not None) == tuple(
        map(bool, ghosts)
    )
    assert backbone.training and not layer.pre_proj._forward_hooks


VOLO = dict(depths=[2, 1, 1, 1], embed_dims=[12, 24], num_heads=[2, 4], stem_dim=8)


@pytest.mark.parametrize("pyramid", [False, True])
def test_filters_of_elsa_volo(pyramid):
    """Its first stage alone attends with ELSA, with both ghost filters, at 8 pixels a position."""
    torch.manual_seed(0)
    backbone = ELSAVolo(VOLO, init_std=0.3, pyramid=pyramid).double().eval()
    image = torch.randn(3, 50, 70, dtype=torch.double)
    filters = neighbourhood_filters(backbone, image, 0, 1, PIXELS)
    by_hand = (filters.effective * filters.neighbourhoods()).sum((-2, -1))
    assert torch.allclose(by_hand, filters.output, rtol=0, atol=1e-12)
    assert filters.ghost_mul is not None and filters.ghost_add is not None
    assert filters.positions.tolist() == [[y // 8, x // 8] for x, y in PIXELS]
    with pytest.raises(ValueError, match="stage must be 0, which attends with ELSA, got 1"):
        neighbourhood_filters(backbone, image, 1, 0, PIXELS)


@pytest.mark.parametrize(
    "stage, block, pixels, sentence",
    [
        (3, 0, [(0, 0)], "stage must be one of 0..2, which attend with ELSA, got 3"),
        (0, 1, [(0, 0)], "block of stage 0 must be one of 0..0, got 1"),
        (0, 0, [(32, 0)], "width and height are 32 and 24, got 32,0"),
        (0, 0, [(0, -1)], "got 0,-1"),
        (0, 0, [], "one pixel at least"),
    ],
)
def test_filters_that_are_not_there(stage, block, pixels, sentence):
    with pytest.raises(ValueError, match=sentence):
        neighbourhood_filters(ELSASwin(TINY), torch.zeros(3, 24, 32), stage, block, pixels)


def look(path, **options):
    backbone, name = attention.trained_backbone(str(path))
    photo, _ = attention.read_photo(str(COFFEE), 64)
    return attention.look(backbone, name, photo, [(5, 9), (40, 30)], 2, **options)


def test_every_container_of_the_same_weights_gives_the_same_filters(weights, tmp_path):
    mmdet = save(tmp_path, {"state_dict": weights}, "mmdet.pth")
    convert_file(mmdet, tmp_path / "d2.safetensors", "detectron2")
    convert_file(mmdet, tmp_path / "backbone.pth", "backbone")
    save(tmp_path, original("mask_rcnn"), "original.pth")
    expected = look(mmdet)
    assert expected.title == "ELSA-Swin 12 channels, blocks 1-1-1-2 of mmdet.pth: stage 2, block 1"
    for name in ("d2.safetensors", "backbone.pth", "original.pth"):
        view = look(tmp_path / name)
        assert np.array_equal(view.attention, expected.attention)
        assert np.array_equal(view.effective, expected.effective)
        assert name in view.title
    (ghost,) = expected.ghosts.values()
    assert np.allclose(expected.effective, expected.attention + ghost, atol=1e-6)


def test_filters_of_a_checkpoint_of_elsa_volo(tmp_path):
    """With a position embedding of 112 pixels, and heads of other stages that nothing tells."""
    weights = volo_weights.classifier()
    backbone, name = attention.trained_backbone(str(save(tmp_path, weights)))
    assert name.startswith("ELSA-VOLO 24-40 channels, blocks 1-2-1-1 of source")
    photo, _ = attention.read_photo(str(COFFEE), 64)
    view = attention.look(backbone, name, photo, [(40, 30)], 1, head=2)
    mul, add = (one[8:16].mean(0).numpy() for one in weights["network.0.0.attn.ghost_head"][:, 0])
    assert np.allclose(view.ghosts["multiplied"], mul) and np.allclose(view.ghosts["added"], add)
    assert view.stride == 8 and "head 2 of 3" in view.of


def test_heads_and_channels(weights, tmp_path):
    path = save(tmp_path, {"state_dict": weights})
    ghosts = weights["backbone.layers.1.blocks.0.attn.ghost_head"][0].numpy()
    heads = [look(path, head=number) for number in (1, 2)]
    assert np.allclose(heads[1].ghosts["added"], ghosts[12:].mean(0), atol=1e-6)
    channel = look(path, channel=13)
    assert np.array_equal(channel.attention, heads[1].attention)
    assert np.allclose(channel.ghosts["added"], ghosts[12], atol=1e-6)
    assert channel.of == "channel 13 of 24, in head 2"
    mean = look(path)
    assert np.allclose(mean.effective, (heads[0].effective + heads[1].effective) / 2, atol=1e-6)


@pytest.mark.parametrize("position", [(2, 4), (0, 0)])
def test_picture_has_the_weights_in_their_place_and_colours(position):
    """One strong weight of the second pixel's filter, looked up in the drawn photograph."""
    row, column = position
    shape, stride = (2, 5, 5), 8
    filters = np.zeros(shape)
    filters[1, row, column], filters[1, 4, 1] = 1.0, -1.0
    photo = np.full((80, 120, 3), (40, 200, 40), np.uint8)
    pixels = [(100, 60), (50, 33)]
    ghosts = {"added": filters[1]}
    view = attention.View(photo, pixels, stride, np.abs(filters), ghosts, filters, "", "")
    figure = picture.draw(view)
    FigureCanvasAgg(figure).draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
    overview, *panels = figure.axes
    # The cell of pixel (50, 33) begins at (48, 32); 2 cells lie left of it and above it.
    left, right, top, bottom = picture.neighbourhood_extent((50, 33), stride, 5)
    assert (left, right, top, bottom) == (32, 72, 16, 56)

    def color(panel, x, y):
        across, up = panel.transData.transform((x, y))
        return pixels[pixels.shape[0] - 1 - int(up), int(across)]

    center = (left + stride * (column + 0.5), top + stride * (row + 0.5))
    red, green, blue = color(overview, *center)
    assert red > 90 and red > 3 * green and red > 2 * blue
    red, green, blue = color(overview, left + stride * 1.5, top + stride * 4.5)
    assert blue > 80 and blue > 2 * red
    # Elsewhere in the neighbourhood the photograph shines through, outside it is as it was.
    assert color(overview, left + 2.5 * stride + 3, top + 3.5 * stride)[0] > 60
    assert tuple(color(overview, 10, 70)) == (40, 200, 40)
    assert overview.get_images()[2].get_extent() == [left, right, bottom, top]
    titles = [panel.get_title() for panel in panels[:4]]
    assert titles == ["what it sees", "attention", "ghost, added", "effective"]
    assert panels[0].get_xlim() == (80.0, 120.0) and panels[4].get_ylim() == (56.0, 16.0)


def test_command_line_draws_a_checkpoint(weights, tmp_path, capsys):
    checkpoint = save(tmp_path, {"state_dict": weights})
    out = tmp_path / "new/filters.png"
    arguments = ["filters", str(checkpoint), "--image", str(COFFEE), "--max-size", "100"]
    arguments += ["--pixel", "300,200", "599,399", "--stage", "1", "--out", str(out)]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "source.pth: stage 1, block 1; mean of the channels of its one head" in said
    assert f"wrote: {out} (2 pixels of {COFFEE}, shrunk to 100x67)" in said
    with Image.open(out) as image:
        assert image.format == "PNG" and min(image.size) > 500
    assert [path.name for path in out.parent.iterdir()] == ["filters.png"]


SMALL = "{'embed_dim': 12, 'depths': [1, 1], 'num_heads': [1, 2], 'group_width': 4}"
UNTRAINED = ["filters", "--image", str(COFFEE), "--max-size", "64", "--arch", SMALL]


@pytest.mark.parametrize(
    "arch, name",
    [
        (SMALL, "ELSA-Swin 12 channels, blocks 1-1"),
        (str(VOLO), "ELSA-VOLO 12-24 channels, blocks 2-1-1-1"),
    ],
)
def test_untrained_weights_are_called_so_and_are_the_same_each_time(arch, name, tmp_path, capsys):
    assert cli.main([*UNTRAINED, "--arch", arch, "--out", str(tmp_path / "filters.png")]) == 0
    assert f"{name}, untrained random weights: stage 1, block" in capsys.readouterr().out
    first, second = (attention.untrained_backbone(read_arch(arch))[0] for _ in range(2))
    assert torch.equal(first.patch_embed.proj.weight, second.patch_embed.proj.weight)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--arch", "tiny", "--stage", "4"], "--stage must be one of 1..3 in this model, got 4"),
        (["--arch", "tiny", "--stage", "3", "--block", "7"], "--block must be one of 1..6"),
        (["--arch", "tiny", "--head", "4"], "--head must be one of 1..3"),
        (["--arch", "tiny", "--channel", "0"], "--channel must be one of 1..96"),
        (["--arch", "tiny", "--head", "1", "--channel", "1"], "exclude each other"),
        (["--arch", "tiny", "--pixel", "600,0"], "--pixel: a pixel must be within the image"),
        (
            ["--arch", "huge"],
            "--arch must be one of tiny, small, base, volo_d1, .*, volo_d5 or a dict",
        ),
        (
            ["--arch", "volo_d1", "--stage", "2"],
            "must be 1 in this .*, got 2: the other stages have",
        ),
        (["--arch", "{'embed_dim': 32}"], "--arch: a dict arch needs embed_dim, depths"),
        (["--arch", "tiny", "--image", "b.png", "--out", "b.png"], "another file than b.png"),
        (["--arch", "tiny", "--out", "a.jpg"], "--out must name a .png file, got a.jpg"),
        (["--arch", "tiny", "--image", __file__], "test_analyze.py cannot be read"),
        (["--arch", "tiny", "--image", "gone.png"], "the image gone.png cannot be read: No such"),
        (["gone.pth"], "gone.pth cannot be read: No such file"),
        (["gone.pth", "--arch", "tiny"], "either CHECKPOINT or --arch is needed, got both"),
        ([], "got neither"),
        (["swin.pth"], "swin.pth holds stock Swin.*which has no ELSA attention to look at"),
        (["volo.pth"], "volo.pth holds stock VOLO.*which has no ELSA attention to look at"),
    ],
)
def test_refusals(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "swin.pth" in arguments:
        save(tmp_path, swin(), "swin.pth")
    if "volo.pth" in arguments:
        save(tmp_path, volo_weights.stock().state_dict(), "volo.pth")
    if "b.png" in arguments:
        (tmp_path / "b.png").touch()
    before = sorted(tmp_path.iterdir())
    required = ["--image", str(COFFEE), "--out", "a.png", "--max-size", "600"]
    assert cli.main(["filters", *required, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("analyze: ") and error.count("\n") == 1
    with pytest.raises(UsageError, match=sentence):
        raise UsageError(error)
    assert sorted(tmp_path.iterdir()) == before


def test_malformed_pixel(capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(["filters", "--arch", "tiny", "--image", "a", "--out", "b", "--pixel", "3;4"])
    assert status.value.code == 2
    assert "a pixel is X,Y, two whole numbers, got 3;4" in capsys.readouterr().err


def test_full_disk_leaves_no_picture(tmp_path, monkeypatch, capsys):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    out = tmp_path / "a.png"
    assert cli.main([*UNTRAINED, "--out", str(out)]) == 2
    said = f"analyze: {out} cannot be written: No space left on device\n"
    assert capsys.readouterr().err == said
    assert not list(tmp_path.iterdir())


def test_json_of_parts(tmp_path, capsys):
    out = tmp_path / "parts.json"
    assert cli.main(["parts", "--arch", "tiny", "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    assert (record["model"], record["size"]) == ("ELSA-Swin tiny", [224, 224])
    assert record["parameters"] == sum(part["parameters"] for part in record["parts"])
    assert record["parameters"] == 28_373_322
    table = capsys.readouterr().out
    assert "28,373,322" in table and "4.769 G" in table and "grouped convolution" in table
