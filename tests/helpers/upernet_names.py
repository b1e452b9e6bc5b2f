"""MMSegmentation's names of UPerNet's parameters and buffers, and Detectron2's."""

import re

NAMES = [
    (r"decode_head\.psp_modules\.(\d)\.1\.", r"sem_seg_head.psp\1."),
    (r"decode_head\.bottleneck\.", "sem_seg_head.psp_bottleneck."),
    (r"decode_head\.lateral_convs\.(\d)\.", lambda m: f"sem_seg_head.lateral{int(m[1]) + 2}."),
    (r"decode_head\.fpn_convs\.(\d)\.", lambda m: f"sem_seg_head.fpn_output{int(m[1]) + 2}."),
    (r"decode_head\.fpn_bottleneck\.", "sem_seg_head.fpn_bottleneck."),
    (r"decode_head\.conv_seg\.", "sem_seg_head.predictor."),
    (r"auxiliary_head\.convs\.0\.", "sem_seg_head.aux_conv."),
    (r"auxiliary_head\.conv_seg\.", "sem_seg_head.aux_predictor."),
]


def our_name(name):
    for pattern, replacement in NAMES:
        name = re.sub("^" + pattern, replacement, name)
    return re.sub(
        r"(sem_seg_head\..*\.)bn\.", r"\1norm.", re.sub(r"\.conv\.weight$", ".weight", name)
    )
