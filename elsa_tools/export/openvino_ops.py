"""Where OpenVINO reads ONNX's operators of detectors otherwise than ONNX defines them."""

from __future__ import annotations

import numpy as np
import openvino as ov


def follow_onnx(model: ov.Model) -> None:
    """Change a model that OpenVINO has read from an ONNX file, in place, so that it

    - gives equal values of TopK to the lower index (OpenVINO leaves their order open);
    - suppresses boxes of IoU > threshold in NonMaxSuppression (OpenVINO: IoU >= threshold).
    """
    for node in model.get_ops():
        if node.get_type_name() == "TopK":
            node.set_attribute("stable", True)
        elif node.get_type_name() == "NonMaxSuppression":
            threshold = node.input(3)
            constant = threshold.get_source_output().get_node()
            above = np.nextafter(constant.data, np.float32(np.inf), dtype=np.float32)
            threshold.replace_source_output(ov.op.Constant(np.array(above)).output(0))
