// elsa::attention and its backward on CUDA devices: checks, memory, and the choice of the kernels.
#include "attention.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../problem.h"

namespace elsa::cuda {
namespace {

using at::Tensor;

// Calls body(S()) with the number type that the kernels have for a tensor's type.
template <typename Body>
void with_type(at::ScalarType type, const Body& body) {
  switch (type) {
    case at::kFloat:
      return body(float());
    case at::kDouble:
      return body(double());
    case at::kHalf:
      return body(__half());
    case at::kBFloat16:
      return body(__nv_bfloat16());
    default:
      TORCH_CHECK_TYPE(
          false, "elsa::attention: value must be float32, float64, float16 or bfloat16, got ",
          type);
  }
}

template <typename S>
const S* input(const Tensor& tensor) {
  return tensor.defined() ? static_cast<const S*>(tensor.const_data_ptr()) : nullptr;
}
template <typename S>
Map<const S> map(const Tensor& tensor) {
  return {input<S>(tensor), tensor.stride(2)};
}
template <typename S>
S* output(const Tensor& tensor) {
  return tensor.defined() ? static_cast<S*>(tensor.mutable_data_ptr()) : nullptr;
}

Problem check(
    const Tensor& value, const Tensor& logits, const std::optional<Tensor>& ghost_add,
    const std::optional<Tensor>& ghost_mul, int64_t kernel_size, int64_t dilation,
    const Tensor& grad = {}) {
  const Problem p = check_problem(value, logits, ghost_add, ghost_mul, kernel_size, dilation, grad);
  TORCH_CHECK_VALUE(
      kernel_size <= kLargestKernel, "elsa::attention: kernel_size must be at most ",
      kLargestKernel, " on CUDA devices, got ", kernel_size);
  return p;
}

enum class Kernels { any, k7, k7_matrix };

template <typename S>
Kernels choose(const Problem& p, bool multiplied, const std::vector<Tensor>& maps) {
  if constexpr (!std::is_same_v<S, double>) {
    int64_t most = std::max({p.height, p.width, p.heads});
    for (const Tensor& map : maps) most = std::max(most, map.stride(2));
    if (p.kernel != 7 || p.channels != 32 * p.heads || p.dilation != 1 || multiplied ||
        most >= kMostK7)
      return Kernels::any;
    int device = 0, bytes = 0;
    C10_CUDA_CHECK(cudaGetDevice(&device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    if constexpr (sizeof(S) == 2) {
      if (bytes >= shared_bytes_k7_matrix() && has_k7_matrix<S>()) return Kernels::k7_matrix;
    }
    if (bytes >= shared_bytes_k7<S>()) return Kernels::k7;
  }
  return Kernels::any;
}

template <typename S>
void forward(Kernels kernels, const Forward<S>& call, cudaStream_t stream) {
  if constexpr (sizeof(S) == 2) {
    if (kernels == Kernels::k7_matrix) return forward_k7_matrix(call, stream);
  }
  if constexpr (!std::is_same_v<S, double>) {
    if (kernels == Kernels::k7) return forward_k7(call, stream);
  }
  forward_any(call, stream);
}

template <typename S>
void backward(Kernels kernels, const Backward<S>& call, cudaStream_t stream) {
  if constexpr (sizeof(S) == 2) {
    if (kernels == Kernels::k7_matrix) return backward_k7_matrix(call, stream);
  }
  if constexpr (!std::is_same_v<S, double>) {
    if (kernels == Kernels::k7) return backward_k7(call, stream);
  }
  backward_any(call, stream);
}

// The tensor itself where each of its pixels can be read in steps of 16 bytes, else a copy.
Tensor aligned(const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const bool suits = (address | (tensor.stride(2) * tensor.element_size())) % 16 == 0;
  return suits ? tensor : tensor.clone(at::MemoryFormat::Contiguous);
}

// The inputs as the kernels want them; keeps copies alive.
struct Inputs {
  Inputs(
      const Problem& p, const Tensor& value, const Tensor& logits,
      const std::optional<Tensor>& ghost_add, const std::optional<Tensor>& ghost_mul)
      : problem(p), value(evenly_spaced(value)), logits(evenly_spaced(logits)) {
    if (ghost_add) add = ghost_add->contiguous();
    if (ghost_mul) mul = ghost_mul->contiguous();
  }

  template <typename S>
  Operands<S> operands() const {
    const Problem& p = problem;
    // Beyond the map all dilations are the same; the bound keeps products far from overflowing.
    const int64_t dilation = std::min(p.dilation, std::max(p.height, p.width));
    return {
        p.batch,
        p.height,
        p.width,
        p.heads,
        static_cast<int>(p.channels / p.heads),
        static_cast<int>(p.kernel),
        dilation,
        map<S>(value),
        map<S>(logits),
        input<S>(add),
        input<S>(mul)};
  }

  Problem problem;
  Tensor value, logits, add, mul;
};

Tensor attention(
    const Tensor& value, const Tensor& logits, const std::optional<Tensor>& ghost_add,
    const std::optional<Tensor>& ghost_mul, int64_t kernel_size, int64_t dilation) {
  const Problem p = check(value, logits, ghost_add, ghost_mul, kernel_size, dilation);
  const c10::cuda::CUDAGuard guard(value.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  Tensor out = at::empty(value.sizes(), value.options());
  if (out.numel() == 0) return out;
  Inputs inputs(p, value, logits, ghost_add, ghost_mul);
  with_type(value.scalar_type(), [&](auto number) {
    using S = decltype(number);
    const Kernels kernels = choose<S>(p, inputs.mul.defined(), {inputs.value, inputs.logits});
    if (kernels != Kernels::any) inputs.value = aligned(inputs.value);
    forward<S>(kernels, {inputs.operands<S>(), output<S>(out)}, stream);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const Tensor& value, const Tensor& logits,
    const std::optional<Tensor>& ghost_add, const std::optional<Tensor>& ghost_mul,
    int64_t kernel_size, int64_t dilation) {
  const Problem p = check(value, logits, ghost_add, ghost_mul, kernel_size, dilation, grad);
  const c10::cuda::CUDAGuard guard(value.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const auto like = [&](const std::optional<Tensor>& ghost) {
    return ghost ? at::zeros(ghost->sizes(), ghost->options()) : at::empty({0}, value.options());
  };
  Tensor grad_value = at::empty(value.sizes(), value.options());
  Tensor grad_logits = at::empty(logits.sizes(), logits.options());
  Tensor grad_add = like(ghost_add), grad_mul = like(ghost_mul);
  if (value.numel() == 0) return {grad_value, grad_logits, grad_add, grad_mul};
  Inputs inputs(p, value, logits, ghost_add, ghost_mul);
  Tensor grads = evenly_spaced(grad);
  with_type(value.scalar_type(), [&](auto number) {
    using S = decltype(number);
    using T = Arithmetic<S>;
    const Kernels kernels =
        choose<S>(p, inputs.mul.defined(), {grads, inputs.value, inputs.logits});
    if (kernels != Kernels::any) {
      inputs.value = aligned(inputs.value);
      grads = aligned(grads);
    }
    const auto options = value.options().dtype(c10::CppTypeToScalarType<T>::value);
    const int64_t pixels = p.batch * p.height * p.width, taps = p.kernel * p.kernel;
    const int64_t parts = kernels == Kernels::any ? ghost_parts_any(pixels, p.channels * taps)
                                                  : ghost_parts_k7(p.batch * p.height);
    const auto sums = [&](const std::optional<Tensor>& ghost) {
      return ghost ? at::empty({parts, taps, p.channels}, options) : Tensor();
    };
    const Tensor softmax = at::empty({pixels, p.heads, 2}, options);
    const Tensor add_parts = sums(ghost_add), mul_parts = sums(ghost_mul);
    const Backward<S> call{
        inputs.operands<S>(),
        map<S>(grads),
        output<S>(grad_value),
        output<S>(grad_logits),
        ghost_add ? output<S>(grad_add) : nullptr,
        ghost_mul ? output<S>(grad_mul) : nullptr,
        output<Softmax<T>>(softmax),
        parts,
        output<T>(add_parts),
        output<T>(mul_parts)};
    backward(kernels, call, stream);
  });
  return {grad_value, grad_logits, grad_add, grad_mul};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(elsa, m) {
  m.def("cuda_architectures() -> str", [] { return std::string(architectures()); });
}

TORCH_LIBRARY_IMPL(elsa, CUDA, m) {
  m.impl("attention", &attention);
  m.impl("attention_backward", &attention_backward);
}

}  // namespace elsa::cuda
