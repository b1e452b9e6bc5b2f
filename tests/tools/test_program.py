"""Programs of torch.export in .pt2 files: any size, no framework, nothing hostile executed."""

import json
import pickle
import resource
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from digit_models import DET, SEG, untrained

from elsa_core import ELSASwin, ELSAVolo, elsa_attention
from elsa_core.runtime.errors import UsageError
from elsa_tools.export import program as programs
from elsa_tools.export.build import wrap
from elsa_tools.export.models import Backbone, Exportable
from elsa_tools.export.program import compile_program, load_program, save_program
from elsa_tools.predict import load_inferencer

pytestmark = pytest.mark.slow
ARCH = {"embed_dim": 12, "depths": [1, 2], "num_heads": [1, 2], "group_width": 4}
NORMALISATION = [123.0, 116.0, 103.0], [58.0, 57.0, 57.0]
SHAPES = [(1, 3, 56, 56), (3, 3, 112, 112), (2, 3, 64, 96), (1, 3, 97, 131), (1, 3, 33, 190)]
ROOT = str(Path(__file__).resolve().parents[2])


def random_images(shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 255


def assert_same(program, module, shapes=SHAPES):
    for shape in shapes:
        image = random_images(shape)
        with torch.no_grad():
            wanted = module.eval()(image)
        for a, b in zip(program(image), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    module = Backbone(ELSASwin(ARCH, out_indices=(0, 1)), NORMALISATION)
    path = tmp_path_factory.mktemp("program") / "small.pt2"
    save_program(module, str(path), '{"schema": 1}')
    return module, path


def test_any_size_and_the_record(saved):
    module, path = saved
    program = load_program(str(path))
    assert json.loads(program.record) == {"schema": 1} and not program.compiled
    assert_same(program, module)
    for size in ((4, 4), (30, 33), (5, 200)):  # the last map has a side of 1
        image = torch.randn(1, 3, *size)
        for a, b in zip(program(image), module(image), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="does not serve inputs of 1x4x64x64"):
        program(torch.zeros(1, 4, 64, 64))
    assert ROOT.encode() not in path.read_bytes()


@pytest.mark.parametrize("pyramid", [False, True])
def test_elsa_volo_at_any_size(pyramid, tmp_path):
    torch.manual_seed(0)
    arch = dict(depths=(1, 1, 1, 1), embed_dims=(12, 24), num_heads=(2, 3), stem_dim=8)
    module = Backbone(ELSAVolo(arch, pyramid=pyramid, img_size=64), NORMALISATION)
    path = str(tmp_path / "volo.pt2")
    save_program(module, path, "{}")
    # The grid of the position embedding and one position, too.
    assert_same(load_program(path), module, [*SHAPES, (1, 3, 64, 64), (2, 3, 4, 5)])


SCRIPT = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[4].split()))  # None: cannot be imported
import torch
image, wanted = torch.load(sys.argv[2])
if sys.argv[3] == "ours":
    from elsa_tools.export.program import load_program
    outputs = load_program(sys.argv[1])(image)
else:
    import elsa_core
    with torch.no_grad():
        outputs = torch.export.load(sys.argv[1]).module()(image)
for a, b in zip(outputs, wanted, strict=True):
    torch.testing.assert_close(a, b)
"""
FRAMEWORKS = (
    "detectron2 fvcore mmcv mmengine mmdet mmseg mmpretrain torchvision numpy cv2 PIL onnx "
    "onnxruntime pycocotools elsa_d2 elsa_mm"
)


@pytest.mark.parametrize("loader", ["ours", "torch"])
def test_no_framework_is_needed(saved, loader, tmp_path):
    module, path = saved
    blocked = FRAMEWORKS + (" elsa_tools" if loader == "torch" else "")
    image = random_images((1, 3, 72, 64))
    with torch.no_grad():
        torch.save((image, tuple(module(image))), tmp_path / "wanted.pt")
    arguments = [str(path), str(tmp_path / "wanted.pt"), loader, blocked]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("framework", SEG)
def test_upernet(framework, tmp_path):
    torch.manual_seed(0)
    inferencer = load_inferencer(SEG[framework], None, device="cpu")
    module = wrap(inferencer)
    path = str(tmp_path / "upernet.pt2")
    save_program(module, path, "{}")
    assert_same(load_program(path), module, SHAPES[:4])


def test_detector(tmp_path):
    module = wrap(untrained(DET["mmdet"]))
    path = str(tmp_path / "detector.pt2")
    save_program(module, path, "{}")
    program = load_program(path)
    for batch, *size in [(2, 97, 131), (1, 224, 224), (1, 65, 300)]:
        image, sizes = random_images((batch, 3, *size)), torch.tensor([size] * batch)
        with torch.no_grad():
            wanted = dict(zip(module.names, module(image, sizes), strict=True))
        found = dict(zip(module.names, program(image, sizes), strict=True))
        assert len(wanted["scores"]) > 0
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def change_model(change):
    def apply(files, _):
        files["models/model.json"] = change(files["models/model.json"].decode()).encode()

    return apply


def evaluated(mark):
    return f"__import__('pathlib').Path({str(mark)!r}).touch()"


def first_text(key, text_of):
    """Replaces the first text under the key in the program."""

    def apply(files, mark):
        model = json.loads(files["models/model.json"])

        def replace(value):
            for name, content in value.items() if isinstance(value, dict) else enumerate(value):
                if name == key and content:
                    value[name] = text_of(mark) if isinstance(content, str) else [text_of(mark)]
                    return True
                if isinstance(content, dict | list) and replace(content):
                    return True
            return False

        assert replace(model)
        files["models/model.json"] = json.dumps(model).encode()

    return apply


def pickled_weight(files, mark):
    name = "data/weights/model_weights_config.json"
    config = json.loads(files[name])
    entry = next(iter(config["config"].values()))
    entry["use_pickle"] = True
    files[name] = json.dumps(config).encode()
    files["data/weights/" + entry["path_name"]] = pickle.dumps(Evil(mark))


def opaque_constant(files, mark):
    name = "data/constants/model_constants_config.json"
    config = json.loads(files[name])
    next(iter(config["config"].values()))["path_name"] = "opaque_obj_0"
    files[name] = json.dumps(config).encode()
    files["data/constants/opaque_obj_0"] = pickle.dumps(Evil(mark))


def pickled_example(files, mark):
    files["data/sample_inputs/model.pt"] = pickle.dumps(Evil(mark))


def old_weights(files, mark):
    files["data/weights/model.pt"] = pickle.dumps(Evil(mark))


def library(files, mark):
    files["data/aotinductor/model/a.wrapper.so"] = b"\x7fELF"


def tree_with_a_module(files, mark):
    spec = json.dumps(
        [1, {"type": "collections.defaultdict", "context": "[]", "children_spec": []}]
    )
    first_text("out_spec", lambda mark: spec)(files, mark)


HOSTILE = {
    "weight": pickled_weight,
    "constant": opaque_constant,
    "example": pickled_example,
    "old": old_weights,
    "library": library,
    "size": first_text("expr_str", evaluated),
    "symbol": first_text("expr_str", lambda mark: f"Symbol({evaluated(mark)!r})"),
    "guard": first_text("guards_code", evaluated),
    "function": first_text("target", lambda mark: "torch.os.system"),
    "operator": first_text("target", lambda mark: "_operator.methodcaller"),
    "name": first_text("forward_arg_names", lambda mark: f"x={evaluated(mark)}"),
    "tree": tree_with_a_module,
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_file_executes_nothing(saved, attack, tmp_path):
    files = {}
    with zipfile.ZipFile(saved[1]) as archive:
        for name in archive.namelist():
            files[name.partition("/")[2]] = archive.read(name)
    mark, path = tmp_path / "executed", tmp_path / "hostile.pt2"
    HOSTILE[attack](files, mark)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"small/{name}", content)
    with pytest.raises(UsageError, match="was refused|compiled code"):
        load_program(str(path))
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"x" * 1000])
def test_no_program(content, tmp_path):
    path = tmp_path / "no.pt2"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="must be a .pt2 file"):
        load_program(str(path))


def test_a_failure_leaves_the_old_file(saved, tmp_path):
    module, _ = saved
    path = tmp_path / "a.pt2"
    path.write_text("as before")

    def differ(part):
        assert load_program(part).record == "{}"
        raise UsageError("they differ")

    with pytest.raises(UsageError, match="they differ"):
        save_program(module, str(path), "{}", differ)

    class Branches(Backbone):
        def forward(self, image):
            return image if image.sum() > 0 else -image

    backbone = ELSASwin(ARCH, out_indices=(0, 1))

    for save in (save_program, compile_program):
        with pytest.raises(UsageError, match="PyTorch cannot export the model: "):
            save(Branches(backbone, None), str(path), "{}")
    with pytest.raises(UsageError, match=r"must end in \.pt2"):
        save_program(module, str(tmp_path / "a.onnx"), "{}")
    assert path.read_text() == "as before"
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt2"]


def test_a_full_disk_leaves_the_old_file(saved, tmp_path):
    path = tmp_path / "a.pt2"
    path.write_text("as before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UsageError, match="cannot be written: File too large"):
            save_program(saved[0], str(path), "{}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "as before"
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt2"]


class Attention(Exportable):
    """The operator alone: a whole backbone compiles for a minute."""

    def example(self):
        return (torch.zeros(2, 3, 97, 131),)

    def forward(self, image):
        x = image.permute(0, 2, 3, 1)
        return elsa_attention(x, x.repeat(1, 1, 1, 9), kernel_size=3).sigmoid()


def test_compiled(tmp_path, monkeypatch):
    path = str(tmp_path / "compiled.pt2")
    options = {"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False}
    with torch._inductor.config.patch(options):
        compile_program(Attention(), path, '{"name": "é \\" }"}')
    with pytest.raises(UsageError, match="compiled code, which is run unchecked"):
        load_program(path)
    program = load_program(path, compiled=True)
    assert program.compiled and json.loads(program.record) == {"name": 'é " }'}
    for shape in SHAPES:
        image = random_images(shape)
        torch.testing.assert_close(program(image)[0], Attention()(image))


def test_no_compiler(tmp_path):
    with torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)}):
        with pytest.raises(UsageError, match=r"needs a C\+\+ compiler, none was found"):
            compile_program(Attention(), str(tmp_path / "a.pt2"), "{}")


def test_linear_layers_are_the_fast_ones(saved):
    targets = [node.target for node in load_program(str(saved[1])).function.graph.nodes]
    assert programs.linear in targets
    assert torch.ops.aten.linear.default not in targets
