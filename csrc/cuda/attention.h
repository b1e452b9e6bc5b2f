// What the CUDA kernels take and write. Plain pointers to device memory: the kernels know no
// tensor.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../arithmetic.h"

// A PyTorch without CUDA has none of these, and loads the extension for its CPU kernels.
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg

namespace elsa::cuda {

// A map (B, H, W, channels): neighbouring pixels are `stride` numbers apart, in all of the map, and
// the channels of a pixel follow each other.
template <typename S>
struct Map {
  S* data;
  int64_t stride;
};

// The softmax of one head and position without its taps: attention = exp(logit - max) * scale.
// Two numbers rather than log(sum), whose rounding would spoil the attention of large logits.
// Aligned so that they are read at once.
template <typename T>
struct alignas(2 * sizeof(T)) Softmax {
  T max, scale;
};

// Ghost filters are (C, K, K) and contiguous, or null for none.
template <typename S>
struct Operands {
  int64_t batch, height, width, heads;
  int depth;  // channels per head
  int kernel;
  int64_t dilation;
  Map<const S> value, logits;
  const S *ghost_add, *ghost_mul;

  int64_t pixels() const { return batch * height * width; }
};

template <typename S>
struct Forward {
  Operands<S> operands;
  S* out;  // (B, H, W, C), contiguous as all results are
};

template <typename S>
struct Backward {
  Operands<S> operands;
  Map<const S> grad;
  S *grad_value, *grad_logits;
  S *grad_add, *grad_mul;  // (C, K, K), null where there is no filter or nobody wants its gradient
  // Work space: softmax (B, H, W, G), and sums over a part of the pixels (parts, K*K, C) for each
  // of these two gradients that is there.
  Softmax<Arithmetic<S>>* softmax;
  int64_t parts;
  Arithmetic<S>*add_parts, *mul_parts;
};

// The architectures that the kernels are compiled for, as nvcc names them: "800,900".
const char* architectures();

// Kernels for any size, in attention_any.cu. The largest kernel is bounded by shared memory.
inline constexpr int64_t kLargestKernel = 77;
// Of heads, of channels per head, and of the blocks of a grid: they are counted in 32 bits.
inline constexpr int64_t kMostCounted = 0x7fffffff;
template <typename S>
void forward_any(const Forward<S>& call, cudaStream_t stream);
template <typename S>
void backward_any(const Backward<S>& call, cudaStream_t stream);
int64_t ghost_parts_any(int64_t pixels, int64_t filter_size);

// Kernels for what models use, in attention_tiles.cu: 32 channels per head, dilation 1, K = 7
// without ghost_mul or K = 5 with any filters, not in double precision. Maps must be aligned to 16
// bytes, pixel by pixel, and height, width, heads and all strides be less than kMostTiles.
inline constexpr int64_t kMostTiles = 1 << 22;
template <typename S>
void forward_tiles(const Forward<S>& call, cudaStream_t stream);
template <typename S>
void backward_tiles(const Backward<S>& call, cudaStream_t stream);
int64_t ghost_parts_tiles(int64_t rows);
// Bytes of shared memory that a block needs at most.
template <typename S>
int64_t shared_bytes_tiles(int64_t kernel);

// The same for K = 7 and 16-bit types on tensor cores, in attention_k7_matrix.cu.
template <typename S>
void forward_k7_matrix(const Forward<S>& call, cudaStream_t stream);
template <typename S>
void backward_k7_matrix(const Backward<S>& call, cudaStream_t stream);
int64_t shared_bytes_k7_matrix();
// Whether the code that serves the current device was compiled for one with these tensor cores.
template <typename S>
bool has_k7_matrix();

}  // namespace elsa::cuda
