// What a call of elsa::attention is about, and the checks that let no kernel read out of bounds.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace elsa {

// Sizes of value (batch, height, width, channels) and of the kernel; logits have
// heads * kernel^2 channels.
struct Problem {
  int64_t batch, height, width, channels, heads, kernel, dilation;
};

// The problem of these tensors. ValueError for shapes that do not fit together, TypeError for
// types that differ; grad (B, H, W, C) is checked where it is defined.
inline Problem check_problem(
    const at::Tensor& value, const at::Tensor& logits, const std::optional<at::Tensor>& ghost_add,
    const std::optional<at::Tensor>& ghost_mul, int64_t kernel_size, int64_t dilation,
    const at::Tensor& grad = {}) {
  TORCH_CHECK_VALUE(
      value.dim() == 4 && logits.dim() == 4 &&
          value.sizes().slice(0, 3) == logits.sizes().slice(0, 3),
      "elsa::attention: value (B, H, W, C) and logits (B, H, W, G*K*K) must agree in B, H, W, got ",
      value.sizes(), " and ", logits.sizes());
  TORCH_CHECK_VALUE(
      kernel_size > 0 && kernel_size % 2 == 1,
      "elsa::attention: kernel_size must be odd and positive, got ", kernel_size);
  TORCH_CHECK_VALUE(dilation > 0, "elsa::attention: dilation must be positive, got ", dilation);
  const int64_t taps = kernel_size * kernel_size, channels = value.size(3);
  TORCH_CHECK_VALUE(
      logits.size(3) > 0 && logits.size(3) % taps == 0,
      "elsa::attention: logits must have a multiple of ", taps,
      " channels (kernel_size squared), got ", logits.size(3));
  const int64_t heads = logits.size(3) / taps;
  TORCH_CHECK_VALUE(
      channels > 0 && channels % heads == 0,
      "elsa::attention: the channels of value must be a multiple of the ", heads, " heads, got ",
      channels);
  const auto check_like_value = [&](const at::Tensor& tensor, const char* name) {
    TORCH_CHECK_TYPE(
        tensor.scalar_type() == value.scalar_type(), "elsa::attention: ", name,
        " must have the dtype of value, ", value.scalar_type(), ", got ", tensor.scalar_type());
    TORCH_CHECK_VALUE(
        tensor.device() == value.device(), "elsa::attention: ", name,
        " must be on the device of value, ", value.device(), ", got ", tensor.device());
  };
  check_like_value(logits, "logits");
  for (const auto& ghost : {ghost_add, ghost_mul}) {
    if (!ghost) continue;
    TORCH_CHECK_VALUE(
        ghost->sizes() == at::IntArrayRef({channels, kernel_size, kernel_size}),
        "elsa::attention: ghost filters must have shape (C, K, K) = (", channels, ", ", kernel_size,
        ", ", kernel_size, "), got ", ghost->sizes());
    check_like_value(*ghost, "ghost filters");
  }
  if (grad.defined()) {
    TORCH_CHECK_VALUE(
        grad.sizes() == value.sizes(),
        "elsa::attention_backward: grad must have the shape of value, ", value.sizes(), ", got ",
        grad.sizes());
    check_like_value(grad, "grad");
  }
  return {value.size(0), value.size(1), value.size(2), channels, heads, kernel_size, dilation};
}

// The distance of a map's pixels where it is even, as in a slice of a projection's channels; else
// nothing. Axes of length 1 do not count: their strides are arbitrary.
inline std::optional<int64_t> pixel_stride(const at::Tensor& map) {
  if (map.size(3) > 1 && map.stride(3) != 1) return {};
  std::optional<int64_t> pixel;
  int64_t pixels = 1;
  for (const int axis : {2, 1, 0}) {
    if (map.size(axis) > 1) {
      if (!pixel) pixel = map.stride(axis);
      if (map.stride(axis) != pixels * *pixel) return {};
    }
    pixels *= map.size(axis);
  }
  return pixel.value_or(map.size(3));
}

// The map itself where its pixels are evenly spaced, else a copy; its strides say so on all axes.
// The kernels then need stride(2) alone.
inline at::Tensor evenly_spaced(const at::Tensor& map) {
  const auto pixel = pixel_stride(map);
  if (!pixel) return map.clone(at::MemoryFormat::Contiguous);
  const int64_t row = map.size(2) * *pixel, image = map.size(1) * row;
  const int64_t strides[] = {image, row, *pixel, 1};
  return map.strides() == strides ? map : map.as_strided(map.sizes(), strides);
}

}  // namespace elsa
