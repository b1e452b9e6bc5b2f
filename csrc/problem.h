// What a call of elsa::attention is about, and the checks that let no kernel read out of bounds.
//
// Tensors are those of LibTorch's stable ABI: a binary serves every PyTorch from
// TORCH_TARGET_VERSION (in setup.py) on. Each question to a tensor is a call into LibTorch; ask
// once per call of the operator, not in loops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "arithmetic.h"
#include "glibc.h"

namespace elsa {

using torch::stable::Tensor;

// Sizes of value (batch, height, width, channels) and of the kernel; logits have
// heads * kernel^2 channels.
struct Problem {
  int64_t batch, height, width, channels, heads, kernel, dilation;
  int32_t dtype, device_type, device_index;  // of all tensors, as LibTorch's shim numbers them

  int64_t pixels() const { return batch * height * width; }
  bool is_empty() const { return batch == 0 || height == 0 || width == 0; }
};

// Of (kernel - 1) * dilation, as in elsa_core/_problem.py: kernels add it to sizes of the map and
// multiply it by numbers of channels.
inline constexpr int64_t kMostReach = 0x7fffffff;

// Throws what Python sees as a RuntimeError. elsa_core/_problem.py checks the same before, in the
// same words, and tells ValueError from TypeError.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text;
  for (const int64_t size : tensor.sizes())
    text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

inline std::string device_of(const Tensor& tensor) {
  const auto device = tensor.device();
  if (device.is_cpu()) return "cpu";
  return (device.is_cuda() ? "cuda:" : "another device:") + std::to_string(device.index());
}

// As Python writes it.
inline std::string name_of_dtype(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  const ScalarType type = tensor.scalar_type();
  const std::pair<ScalarType, const char*> others[] = {
      {ScalarType::Byte, "uint8"},
      {ScalarType::Char, "int8"},
      {ScalarType::Short, "int16"},
      {ScalarType::Int, "int32"},
      {ScalarType::Long, "int64"},
      {ScalarType::Half, "float16"},
      {ScalarType::Float, "float32"},
      {ScalarType::Double, "float64"},
      {ScalarType::ComplexHalf, "complex32"},
      {ScalarType::ComplexFloat, "complex64"},
      {ScalarType::ComplexDouble, "complex128"}};
  for (const auto& [other, name] : others)
    if (type == other) return std::string("torch.") + name;
  std::string name = torch::headeronly::toString(type);
  for (char& letter : name)
    if (letter >= 'A' && letter <= 'Z') letter += 'a' - 'A';
  return "torch." + name;
}

inline int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}
template <typename S>
int32_t dtype_of() {
  return std::is_same_v<S, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

// Calls body(S()) with the number type that a device's kernels have for the problem's dtype.
template <typename Half, typename BFloat16, typename Body>
void with_type(const Problem& p, const Body& body) {
  if (p.dtype == aoti_torch_dtype_float32()) return body(float());
  if (p.dtype == aoti_torch_dtype_bfloat16()) return body(BFloat16());
  if (p.dtype == aoti_torch_dtype_float16()) return body(Half());
  return body(double());
}

// The problem of these tensors; throws where shapes do not fit together or types differ. grad
// (B, H, W, C) is checked where there is one.
inline Problem check_problem(
    const Tensor& value, const Tensor& logits, const std::optional<Tensor>& ghost_add,
    const std::optional<Tensor>& ghost_mul, int64_t kernel_size, int64_t dilation,
    const Tensor* grad = nullptr) {
  require(
      kernel_size > 0 && kernel_size % 2 == 1,
      "elsa_attention needs an odd, positive kernel_size, got ", kernel_size);
  require(dilation > 0, "elsa_attention needs a positive dilation, got ", dilation);
  require(
      kernel_size - 1 <= kMostReach / dilation,
      "elsa_attention needs (kernel_size - 1) * dilation of at most ", kMostReach,
      ", got kernel_size ", kernel_size, " and dilation ", dilation);
  const int32_t dtype = dtype_of(value);
  if (dtype != aoti_torch_dtype_float32() && dtype != aoti_torch_dtype_float64() &&
      dtype != aoti_torch_dtype_float16() && dtype != aoti_torch_dtype_bfloat16())
    fail(
        "elsa_attention needs tensors of float32, float64, float16 or bfloat16, got ",
        name_of_dtype(value), " for value");
  const auto sizes = value.sizes(), logit_sizes = logits.sizes();
  if (sizes.size() != 4 || logit_sizes.size() != 4 ||
      !sizes.slice(0, 3).equals(logit_sizes.slice(0, 3)))
    fail(
        "elsa_attention needs value [B, H, W, C] and logits [B, H, W, G*K*K] of the same B, H, W, "
        "got ",
        shape_of(value), " and ", shape_of(logits));
  const int64_t taps = kernel_size * kernel_size, channels = sizes[3];
  require(
      logit_sizes[3] > 0 && logit_sizes[3] % taps == 0,
      "elsa_attention needs logits with a multiple of ", taps,
      " channels (kernel_size squared), got ", logit_sizes[3]);
  const int64_t heads = logit_sizes[3] / taps;
  require(
      channels > 0 && channels % heads == 0, "elsa_attention needs value with a multiple of ",
      heads, " channels (the heads of the logits), got ", channels);
  Problem p{sizes[0], sizes[1], sizes[2], channels, heads, kernel_size, dilation, dtype};
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(value.get(), &p.device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(value.get(), &p.device_index));
  const auto check_like_value = [&](const Tensor& tensor, const char* name) {
    if (dtype_of(tensor) != p.dtype)
      fail(
          "elsa_attention needs all tensors of one dtype, got ", name_of_dtype(value),
          " for value and ", name_of_dtype(tensor), " for ", name);
    int32_t type, index;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index));
    if (type != p.device_type || index != p.device_index)
      fail(
          "elsa_attention needs all tensors on one device, got ", device_of(value),
          " for value and ", device_of(tensor), " for ", name);
  };
  check_like_value(logits, "logits");
  const int64_t filter[] = {channels, kernel_size, kernel_size};
  const auto check_ghost = [&](const std::optional<Tensor>& ghost, const char* name) {
    if (!ghost) return;
    if (!ghost->sizes().equals(filter))
      fail(
          "elsa_attention needs ", name, " of shape [C, K, K] = [", channels, ", ", kernel_size,
          ", ", kernel_size, "], got ", shape_of(*ghost));
    check_like_value(*ghost, name);
  };
  check_ghost(ghost_add, "ghost_add");
  check_ghost(ghost_mul, "ghost_mul");
  if (grad) {
    if (!grad->sizes().equals(sizes))
      fail(
          "elsa_attention needs grad of shape [B, H, W, C] = ", shape_of(value), ", got ",
          shape_of(*grad));
    check_like_value(*grad, "grad");
  }
  return p;
}

// How many numbers a tensor or a buffer of these sizes has.
inline int64_t product(std::initializer_list<int64_t> sizes) {
  constexpr int64_t kMost = int64_t{1} << 60;  // bytes of them fit in 64 bits, too
  int64_t numbers = 1;
  for (const int64_t size : sizes)
    require(
        !__builtin_mul_overflow(numbers, size, &numbers) && numbers < kMost,
        "elsa_attention: no memory for more than 2^60 numbers");
  return numbers;
}

// A contiguous tensor of unknown numbers on the problem's device.
inline Tensor empty(const Problem& p, int32_t dtype, std::initializer_list<int64_t> sizes) {
  constexpr size_t kMostAxes = 4;
  int64_t strides[kMostAxes], stride = 1;
  for (size_t axis = sizes.size(); axis-- > 0;) {
    strides[axis] = stride;
    stride = product({stride, std::max<int64_t>(sizes.begin()[axis], 1)});
  }
  AtenTensorHandle handle = nullptr;
  const auto failed = aoti_torch_empty_strided(
      sizes.size(), sizes.begin(), strides, dtype, p.device_type, p.device_index, &handle);
  // LibTorch writes the reason to its log. Frameworks look for these words on GPUs.
  if (failed)
    fail(
        "elsa_attention: no memory for a tensor of ", stride, " numbers",
        p.device_type == aoti_torch_device_type_cuda() ? ": CUDA out of memory. " : "");
  return Tensor(handle);
}

// A map (B, H, W, channels) whose neighbouring pixels are `stride` numbers apart, in all of the
// map, and whose channels of a pixel follow each other.
struct EvenMap {
  Tensor tensor;
  int64_t stride;
};

// A copy of one of the problem's maps, contiguous and in memory of its own.
inline EvenMap copied(const Problem& p, const Tensor& map) {
  const auto sizes = map.sizes();
  Tensor copy = empty(p, p.dtype, {sizes[0], sizes[1], sizes[2], sizes[3]});
  return {torch::stable::copy_(copy, map), sizes[3]};
}

// The map itself where its pixels are evenly spaced, as in a slice of a projection's channels, else
// a copy. Axes of length 1 do not count: their strides are arbitrary.
inline EvenMap evenly_spaced(const Problem& p, const Tensor& map) {
  const auto sizes = map.sizes(), strides = map.strides();
  bool even = sizes[3] == 1 || strides[3] == 1;
  std::optional<int64_t> pixel;
  int64_t pixels = 1;
  for (const int axis : {2, 1, 0}) {
    if (sizes[axis] > 1) {
      if (!pixel) pixel = strides[axis];
      even &= strides[axis] == pixels * *pixel;
    }
    pixels *= sizes[axis];
  }
  if (!even) return copied(p, map);
  return {map, pixel.value_or(sizes[3])};
}

}  // namespace elsa
