"""Checkpoint files: spoilt bytes, random pickles, tensors of wrong shapes.

A file is read and converted, or refused in one sentence; nothing in it is executed.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import sys
import zipfile
from pathlib import Path

import attack_files
import torch

from elsa_core import ELSASwin
from elsa_core.runtime.errors import UsageError
from elsa_core.weights import convert_file, read_checkpoint, safetensors

ARCH = dict(embed_dim=12, depths=(1, 1, 1, 2), num_heads=(1, 2, 3, 4), group_width=4)
ARCH |= dict(kernel_size=3, window_size=3)
STATE = ELSASwin(arch=ARCH).state_dict()
META = {"epoch": 3, "meta": {"dataset_meta": {"classes": ["a"], "palette": [[0, 0, 0]]}}}
# What only a file's code would do.
FORBIDDEN = {
    "os.mkdir",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.bind",
}
FUNCTIONS = [
    *("os system", "posix mkdir", "builtins eval", "builtins getattr", "builtins set"),
    *("collections OrderedDict", "collections deque", "argparse Namespace", "numpy dtype"),
    *("numpy.core.multiarray _reconstruct", "numpy.core.multiarray scalar", "torch Size"),
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch FloatStorage"),
    *("torch.storage _load_from_bytes", "builtins bytearray", "copyreg _reconstructor"),
    *("yacs.config CfgNode", "mmengine.logging.history_buffer HistoryBuffer", "torch float32"),
]
OPCODES = b"()]}\x8f.0120NQRtqabedslu\x81\x85\x86\x87\x88\x89\x90\x91\x92\x94\x95\x93oi"


def _guard(event: str, _: tuple) -> None:
    if event in FORBIDDEN:
        print(f"the file has executed {event}", flush=True)
        os._exit(3)


def write_zip(path: Path, content: bytes, records: list[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for name, data in records:
            archive.writestr(name, data)


def records_of(value: object) -> tuple[bytes, list[tuple[str, bytes]]]:
    file = io.BytesIO()
    torch.save(value, file)
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/data.pkl")]
        return archive.read("archive/data.pkl"), [(name, archive.read(name)) for name in names]


def random_pickle(rng: random.Random) -> bytes:
    """Opcodes with arguments that fit them, in an order that need not."""
    parts = []
    for _ in range(rng.choice((3, 10, 40, 200))):
        match rng.randrange(6):
            case 0:
                module, name = rng.choice(FUNCTIONS).split()
                parts.append(f"c{module}\n{name}\n".encode())
            case 1:
                number = rng.choice((0, 1, 2, 255, 2**31 - 1))
                parts.append(b"J" + number.to_bytes(4, "little"))
            case 2:
                text = rng.choice((b"f4", b"latin1", b"storage", b"0", b"cpu", b"x" * 50))
                parts.append(b"X" + len(text).to_bytes(4, "little") + text)
            case 3:
                place = rng.choice((0, 1, 2, 5, 10**6, 2**31))
                parts.append(rng.choice((b"r", b"j")) + place.to_bytes(4, "little"))
            case 4:
                parts.append(rng.choice((b"h", b"q")) + bytes([rng.randrange(8)]))
            case _:
                parts.append(bytes([rng.choice(OPCODES)]) * rng.choice((1, 1, 1, 2, 50)))
    return b"\x80" + bytes([rng.randrange(2, 6)]) + b"".join(parts) + b"."


def spoilt(content: bytes, rng: random.Random) -> bytes:
    """With a few bytes flipped, cut, doubled or put in."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(data) or 1)
        match rng.randrange(5):
            case 0:
                data[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[place : place + rng.choice((1, 4, 100, len(data)))]
            case 2:
                data[place:place] = data[place : place + rng.choice((1, 8, 64))]
            case 3:
                data[place:place] = rng.randbytes(rng.choice((1, 4, 9)))
            case 4:
                data[place : place + 8] = rng.choice((bytes(8), b"\xff" * 8, b"\xff\xff\xff\x7f"))
    return bytes(data)


def wrong_shapes(rng: random.Random) -> dict[str, torch.Tensor]:
    state = dict(STATE)
    for name in rng.sample(sorted(state), rng.choice((1, 1, 3, 20))):
        match rng.randrange(5):
            case 0:
                del state[name]
            case 1:
                state[name + rng.choice(("", ".weight", "0", "\n"))] = state.pop(name)
            case 2:
                state[name] = torch.zeros(
                    [rng.choice((0, 1, 3, 9)) for _ in range(rng.randrange(6))]
                )
            case 3:
                state[name] = state[name].to(rng.choice((torch.half, torch.int8, torch.complex64)))
            case 4:
                number = rng.choice(("7", "99", "999", "1000000000", "9" * 5000, "-1", "a"))
                state[f"layers.{number}.blocks.{number}.attn.pre_proj.weight"] = state[name]
    prefix = rng.choice(("", "", "backbone.", "module.", "_orig_mod.", "backbone.bottom_up."))
    return {prefix + name: tensor for name, tensor in state.items()}


def case(seed: int) -> None:
    rng = random.Random(seed)
    torch.set_num_threads(1)
    kind = rng.choice(("bytes", "bytes", "pickle", "pickle", "zipped", "shapes", "crafted"))
    path = Path(f"{kind}.pth")
    if kind == "shapes":
        torch.save({"state_dict": wrong_shapes(rng), **META}, path)
    elif kind == "crafted":
        attack_files.EXECUTING[rng.choice(sorted(attack_files.EXECUTING))](path)
        path.write_bytes(
            spoilt(path.read_bytes(), rng) if rng.random() < 0.7 else path.read_bytes()
        )
    elif kind == "pickle":
        path.write_bytes(random_pickle(rng))
    elif kind == "zipped":
        content, records = records_of({"state_dict": STATE, **META})
        content = random_pickle(rng) if rng.random() < 0.4 else spoilt(content, rng)
        write_zip(path, content, records)
    else:
        value, file = {"state_dict": STATE, **META}, io.BytesIO()
        match rng.randrange(4):
            case 0:
                torch.save(value, file)
            case 1:
                torch.save(value, file, _use_new_zipfile_serialization=False)
            case 2:
                arrays = {name: tensor.numpy() for name, tensor in STATE.items()}
                file.write(pickle.dumps({"model": arrays, "__author__": "x"}, rng.randrange(2, 6)))
            case 3:
                safetensors.save(file, STATE, {"dataset_meta": "{}"})
        path.write_bytes(spoilt(file.getvalue(), rng))
    sys.addaudithook(_guard)
    for use in (read_checkpoint, lambda one: convert_file(one, "out.pth", "backbone")):
        try:
            use(path)
        except UsageError as error:
            sentence = str(error)
            assert len(sentence) < 1000, sentence
