// elsa::grouped_conv and its backward on CUDA devices: checks and memory.
#include "grouped_conv.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <type_traits>

#include "../problem.h"

namespace elsa::cuda {
namespace {

using Bias = std::optional<Tensor>;

// The problem of these tensors, with groups as heads; throws unless the kernels serve it.
Problem check(
    const Tensor& query, const Tensor& key, const Tensor& weight, const Bias& bias,
    const Tensor* grad = nullptr) {
  const auto sizes = query.sizes(), weights = weight.sizes();
  if (sizes.size() != 4 || !key.sizes().equals(sizes) || weights.size() != 4 ||
      weights[0] != sizes[3])
    fail(
        "elsa::grouped_conv needs query and key [B, H, W, C] and weight [C, width, K, K], got ",
        shape_of(query), ", ", shape_of(key), " and ", shape_of(weight));
  const int64_t channels = sizes[3], group_width = weights[1];
  require(
      weights[2] == 7 && weights[3] == 7 && (group_width == 4 || group_width == 8) &&
          channels % 8 == 0,
      "elsa::grouped_conv needs on CUDA devices a kernel size of 7, groups of 4 or 8 channels and "
      "a multiple of 8 channels, got weight ",
      shape_of(weight));
  Problem p{sizes[0], sizes[1], sizes[2], channels, channels / group_width, 7, 1, dtype_of(query)};
  if (p.dtype != aoti_torch_dtype_float16() && p.dtype != aoti_torch_dtype_bfloat16())
    fail(
        "elsa::grouped_conv needs float16 or bfloat16 on CUDA devices, got ", name_of_dtype(query));
  require(
      p.height <= kMostPitch && p.width <= kMostPitch / std::max<int64_t>(p.channels, 1) &&
          grouped_conv_blocks(p.batch, p.height, p.width, p.channels) <= kMostCounted,
      "elsa::grouped_conv needs height and width * channels of at most ", kMostPitch,
      " on CUDA devices, and fewer positions in all, got ", shape_of(query));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(query.get(), &p.device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(query.get(), &p.device_index));
  const auto check_like_query = [&](const Tensor& tensor, const char* name) {
    int32_t type, index;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index));
    if (dtype_of(tensor) != p.dtype || type != p.device_type || index != p.device_index)
      fail(
          "elsa::grouped_conv needs all tensors of one dtype and on one device, got ",
          name_of_dtype(query), " on ", device_of(query), " for query and ", name_of_dtype(tensor),
          " on ", device_of(tensor), " for ", name);
  };
  check_like_query(key, "key");
  check_like_query(weight, "weight");
  if (bias) {
    require(
        bias->sizes().size() == 1 && bias->sizes()[0] == channels,
        "elsa::grouped_conv needs bias of shape [C] = [", channels, "], got ", shape_of(*bias));
    check_like_query(*bias, "bias");
  }
  if (grad) {
    require(
        grad->sizes().equals(sizes),
        "elsa::grouped_conv needs grad of shape [B, H, W, C] = ", shape_of(query), ", got ",
        shape_of(*grad));
    check_like_query(*grad, "grad");
  }
  return p;
}

template <typename Body>
void with_16_bits(const Problem& p, const Body& body) {
  const auto checked = [&](auto number) {
    require(
        has_grouped_conv<decltype(number)>(),
        "elsa::grouped_conv needs a device of compute capability 8.0 or later, and kernels that "
        "were compiled for one");
    body(number);
  };
  if (p.dtype == aoti_torch_dtype_bfloat16()) return checked(__nv_bfloat16());
  checked(__half());
}

template <typename S>
S* data(const Tensor& tensor) {
  return static_cast<S*>(tensor.mutable_data_ptr());
}

// A map that the kernels can read: aligned to 16 bytes, pixel by pixel, and not too wide. A
// copy where it must be; keep it alive.
struct Readable {
  Readable(const Problem& p, const Tensor& tensor) : map(evenly_spaced(p, tensor)) {
    const auto address = reinterpret_cast<uintptr_t>(map.tensor.const_data_ptr());
    if ((address | (map.stride * 2)) % 16 != 0 || map.stride < 0 ||
        map.stride > kMostPitch / p.width)
      map = copied(p, map.tensor);
  }
  template <typename S>
  Map<const S> as() const {
    return {static_cast<const S*>(map.tensor.const_data_ptr()), map.stride};
  }
  EvenMap map;
};

// The inputs as the kernels want them, and their work space; keeps them alive.
struct Inputs {
  Inputs(
      const Problem& p, const Tensor& query, const Tensor& key, const Tensor& weight,
      const Bias& bias)
      : problem(p),
        query(p, query),
        key(p, key),
        weight(torch::stable::contiguous(weight)),
        packed(empty(p, p.dtype, {packed_weights(p.channels)})) {
    if (bias) this->bias = torch::stable::contiguous(*bias);
  }
  template <typename S>
  GroupedConv<S> operands() const {
    const Problem& p = problem;
    return {
        p.batch,
        p.height,
        p.width,
        static_cast<int>(p.channels),
        static_cast<int>(p.channels / p.heads),
        query.as<S>(),
        key.as<S>(),
        data<S>(weight),
        bias ? data<S>(*bias) : nullptr,
        data<S>(packed)};
  }
  Problem problem;
  Readable query, key;
  Tensor weight;
  Bias bias;
  Tensor packed;
};

cudaStream_t current_stream(const Problem& p) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(p.device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

Tensor grouped_conv(
    const Tensor& query, const Tensor& key, const Tensor& weight, const Bias& bias) {
  const Problem p = check(query, key, weight, bias);
  const torch::stable::accelerator::DeviceGuard guard(p.device_index);
  Tensor out = empty(p, p.dtype, {p.batch, p.height, p.width, p.channels});
  if (p.is_empty()) return out;
  const Inputs inputs(p, query, key, weight, bias);
  with_16_bits(p, [&](auto number) {
    using S = decltype(number);
    forward_grouped_conv<S>({inputs.operands<S>(), data<S>(out)}, current_stream(p));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> grouped_conv_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& weight,
    const Bias& bias) {
  const Problem p = check(query, key, weight, bias, &grad);
  const torch::stable::accelerator::DeviceGuard guard(p.device_index);
  const int64_t width = p.channels / p.heads, taps = p.kernel * p.kernel;
  Tensor grad_query = empty(p, p.dtype, {p.batch, p.height, p.width, p.channels});
  Tensor grad_key = empty(p, p.dtype, {p.batch, p.height, p.width, p.channels});
  Tensor grad_weight = empty(p, p.dtype, {p.channels, width, p.kernel, p.kernel});
  Tensor grad_bias = empty(p, p.dtype, {bias ? p.channels : 0});
  if (p.is_empty())
    return {
        grad_query, grad_key, torch::stable::zero_(grad_weight), torch::stable::zero_(grad_bias)};
  const Inputs inputs(p, query, key, weight, bias);
  const Readable grads(p, grad);
  const int64_t parts = grouped_conv_parts(p.batch, p.height, p.width, p.channels);
  const Tensor weight_parts = empty(p, dtype_of<float>(), {parts, width * taps, p.channels});
  const Tensor bias_parts = empty(p, dtype_of<float>(), {parts, p.channels});
  with_16_bits(p, [&](auto number) {
    using S = decltype(number);
    const GroupedConvBackward<S> call{
        inputs.operands<S>(),
        grads.as<S>(),
        data<S>(grad_query),
        data<S>(grad_key),
        data<S>(grad_weight),
        bias ? data<S>(grad_bias) : nullptr,
        parts,
        data<float>(weight_parts),
        data<float>(bias_parts)};
    backward_grouped_conv(call, current_stream(p));
  });
  return {grad_query, grad_key, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(elsa, CUDA, m) {
  m.impl("grouped_conv", TORCH_BOX(&grouped_conv));
  m.impl("grouped_conv_backward", TORCH_BOX(&grouped_conv_backward));
}

}  // namespace elsa::cuda
