"""Where OpenVINO reads ONNX's operators of detectors otherwise than ONNX defines them."""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import opset13 as op


def follow_onnx(model: ov.Model) -> None:
    """Change a model that OpenVINO has read from an ONNX file, in place, so that it

    - gives equal values of TopK to the lower index (OpenVINO leaves their order open);
    - suppresses boxes of IoU > threshold in NonMaxSuppression (OpenVINO: IoU >= threshold).
    """
    for node in model.get_ops():
        if node.get_type_name() == "TopK":
            _order_ties(node)
        elif node.get_type_name() == "NonMaxSuppression":
            threshold = node.input(3)
            constant = threshold.get_source_output().get_node()
            above = np.nextafter(constant.data, np.float32(np.inf), dtype=np.float32)
            threshold.replace_source_output(ov.op.Constant(np.array(above)).output(0))


def _order_ties(node: ov.Node) -> None:
    """Replace a TopK over the rows of [B, N] by operators that give ties to the lower index.

    OpenVINO's own stable TopK takes time k * N: here it sorts the k chosen values alone.
    """
    scores, k = node.input_value(0), node.input_value(1)
    users = [output.get_target_inputs() for output in node.outputs()]
    top = op.topk(scores, k, 1, "max", "value", index_element_type="i64")
    least = op.reduce_min(top.output(0), np.array([1]), keep_dims=True)
    above, equal = op.greater(scores, least), op.equal(scores, least)
    count = op.reduce_sum(op.convert(above, "i64"), np.array([1]), keep_dims=True)
    place = op.cum_sum(op.convert(equal, "i64"), np.int64(1))
    first = op.less_equal(place, op.subtract(op.convert(k, "i64"), count))
    chosen = op.non_zero(op.logical_or(above, op.logical_and(equal, first)), "i64")
    column = op.gather(chosen, np.int64(1), np.int64(0))
    index = op.reshape(column, op.shape_of(top.output(1)), False)
    values = op.gather_elements(scores, index, 1)
    order = op.topk(values, k, 1, "max", "value", index_element_type="i64", stable=True)
    index = op.gather_elements(index, order.output(1), 1)
    for inputs, output in zip(users, (order.output(0), index.output(0)), strict=True):
        for target in inputs:
            target.replace_source_output(output)
