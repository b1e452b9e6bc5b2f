// elsa::attention and its backward on CUDA devices: checks, memory, and the choice of the kernels.
#include "attention.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include "../problem.h"
#include "answers.h"

namespace elsa::cuda {
namespace {

using Ghost = std::optional<Tensor>;

template <typename S>
const S* input(const Ghost& tensor) {
  return tensor ? static_cast<const S*>(tensor->const_data_ptr()) : nullptr;
}
template <typename S>
Map<const S> map(const EvenMap& map) {
  return {static_cast<const S*>(map.tensor.const_data_ptr()), map.stride};
}
template <typename S>
S* output(const Ghost& tensor) {
  return tensor ? static_cast<S*>(tensor->mutable_data_ptr()) : nullptr;
}

Problem check(
    const Tensor& value, const Tensor& logits, const Ghost& ghost_add, const Ghost& ghost_mul,
    int64_t kernel_size, int64_t dilation, const Tensor* grad = nullptr) {
  const Problem p = check_problem(value, logits, ghost_add, ghost_mul, kernel_size, dilation, grad);
  require(
      kernel_size <= kLargestKernel, "elsa_attention needs kernel_size of at most ", kLargestKernel,
      " on CUDA devices, got ", kernel_size);
  require(
      std::max(p.heads, p.channels / p.heads) <= kMostCounted, "elsa_attention needs at most ",
      kMostCounted, " heads, and channels a head, on CUDA devices, got ", p.heads, " and ",
      p.channels / p.heads);
  return p;
}

cudaStream_t current_stream(const Problem& p) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(p.device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Of shared memory, for a block on the current device.
int64_t most_shared_bytes() {
  static Answers<int, int> answers;
  const int device = current_device();
  return answers.get(device, [&] {
    int bytes = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return bytes;
  });
}

enum class Kernels { any, tiles, k7_matrix };

template <typename S>
Kernels choose(const Problem& p, bool multiplied, std::initializer_list<const EvenMap*> maps) {
  if constexpr (!std::is_same_v<S, double>) {
    int64_t most = std::max({p.height, p.width, p.heads});
    for (const EvenMap* map : maps) most = std::max(most, map->stride);
    const bool has_tiles = p.kernel == 5 || (p.kernel == 7 && !multiplied);
    if (!has_tiles || p.channels != 32 * p.heads || p.dilation != 1 || most >= kMostTiles ||
        p.pixels() * p.heads > kMostCounted)
      return Kernels::any;
    const int64_t bytes = most_shared_bytes();
    if constexpr (sizeof(S) == 2) {
      if (p.kernel == 7 && bytes >= shared_bytes_k7_matrix() && has_k7_matrix<S>())
        return Kernels::k7_matrix;
    }
    if (bytes >= shared_bytes_tiles<S>(p.kernel)) return Kernels::tiles;
  }
  return Kernels::any;
}

template <typename S>
void forward(Kernels kernels, const Forward<S>& call, cudaStream_t stream) {
  if constexpr (sizeof(S) == 2) {
    if (kernels == Kernels::k7_matrix) return forward_k7_matrix(call, stream);
  }
  if constexpr (!std::is_same_v<S, double>) {
    if (kernels == Kernels::tiles) return forward_tiles(call, stream);
  }
  forward_any(call, stream);
}

template <typename S>
void backward(Kernels kernels, const Backward<S>& call, cudaStream_t stream) {
  if constexpr (sizeof(S) == 2) {
    if (kernels == Kernels::k7_matrix) return backward_k7_matrix(call, stream);
  }
  if constexpr (!std::is_same_v<S, double>) {
    if (kernels == Kernels::tiles) return backward_tiles(call, stream);
  }
  backward_any(call, stream);
}

// Makes a copy of the map unless each of its pixels can be read in steps of 16 bytes.
template <typename S>
void align(const Problem& p, EvenMap& map) {
  const auto address = reinterpret_cast<uintptr_t>(map.tensor.const_data_ptr());
  if ((address | (map.stride * sizeof(S))) % 16 != 0) map = copied(p, map.tensor);
}

// The inputs as the kernels want them; keeps copies alive.
struct Inputs {
  Inputs(
      const Problem& p, const Tensor& value, const Tensor& logits, const Ghost& ghost_add,
      const Ghost& ghost_mul)
      : problem(p), value(evenly_spaced(p, value)), logits(evenly_spaced(p, logits)) {
    if (ghost_add) add = torch::stable::contiguous(*ghost_add);
    if (ghost_mul) mul = torch::stable::contiguous(*ghost_mul);
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
  EvenMap value, logits;
  Ghost add, mul;
};

Tensor attention(
    const Tensor& value, const Tensor& logits, const Ghost& ghost_add, const Ghost& ghost_mul,
    int64_t kernel_size, int64_t dilation) {
  const Problem p = check(value, logits, ghost_add, ghost_mul, kernel_size, dilation);
  const torch::stable::accelerator::DeviceGuard guard(p.device_index);
  const cudaStream_t stream = current_stream(p);
  Tensor out = empty(p, p.dtype, {p.batch, p.height, p.width, p.channels});
  if (p.is_empty()) return out;
  Inputs inputs(p, value, logits, ghost_add, ghost_mul);
  with_type<__half, __nv_bfloat16>(p, [&](auto number) {
    using S = decltype(number);
    const Kernels kernels = choose<S>(p, inputs.mul.has_value(), {&inputs.value, &inputs.logits});
    if (kernels != Kernels::any) align<S>(p, inputs.value);
    forward<S>(kernels, {inputs.operands<S>(), output<S>(out)}, stream);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const Tensor& value, const Tensor& logits, const Ghost& ghost_add,
    const Ghost& ghost_mul, int64_t kernel_size, int64_t dilation, bool ghost_gradients) {
  const Problem p = check(value, logits, ghost_add, ghost_mul, kernel_size, dilation, &grad);
  const bool has_add = ghost_gradients && ghost_add, has_mul = ghost_gradients && ghost_mul;
  const torch::stable::accelerator::DeviceGuard guard(p.device_index);
  const cudaStream_t stream = current_stream(p);
  const int64_t taps = p.kernel * p.kernel;
  const auto filters = [&](bool wanted) {
    return wanted ? empty(p, p.dtype, {p.channels, p.kernel, p.kernel}) : empty(p, p.dtype, {0});
  };
  Tensor grad_value = empty(p, p.dtype, {p.batch, p.height, p.width, p.channels});
  Tensor grad_logits = empty(p, p.dtype, {p.batch, p.height, p.width, p.heads * taps});
  Tensor grad_add = filters(has_add), grad_mul = filters(has_mul);
  if (p.is_empty())
    return {
        grad_value, grad_logits, torch::stable::zero_(grad_add), torch::stable::zero_(grad_mul)};
  Inputs inputs(p, value, logits, ghost_add, ghost_mul);
  EvenMap grads = evenly_spaced(p, grad);
  with_type<__half, __nv_bfloat16>(p, [&](auto number) {
    using S = decltype(number);
    using T = Arithmetic<S>;
    const Kernels kernels =
        choose<S>(p, inputs.mul.has_value(), {&grads, &inputs.value, &inputs.logits});
    if (kernels != Kernels::any) {
      align<S>(p, inputs.value);
      align<S>(p, grads);
    }
    const int32_t arithmetic = dtype_of<T>();
    const int64_t parts = kernels == Kernels::any ? ghost_parts_any(p.pixels(), p.channels * taps)
                                                  : ghost_parts_tiles(p.batch * p.height);
    const auto sums = [&](bool wanted) {
      return wanted ? Ghost(empty(p, arithmetic, {parts, taps, p.channels})) : Ghost();
    };
    const Tensor softmax = empty(p, arithmetic, {p.pixels(), p.heads, 2});
    const Ghost add_parts = sums(has_add), mul_parts = sums(has_mul);
    const Backward<S> call{
        inputs.operands<S>(),
        map<S>(grads),
        output<S>(grad_value),
        output<S>(grad_logits),
        has_add ? output<S>(grad_add) : nullptr,
        has_mul ? output<S>(grad_mul) : nullptr,
        output<Softmax<T>>(softmax),
        parts,
        output<T>(add_parts),
        output<T>(mul_parts)};
    backward(kernels, call, stream);
  });
  return {grad_value, grad_logits, grad_add, grad_mul};
}

std::string cuda_architectures() { return architectures(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(elsa, m) { m.def("cuda_architectures() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(elsa, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
}

STABLE_TORCH_LIBRARY_IMPL(elsa, CUDA, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace elsa::cuda
