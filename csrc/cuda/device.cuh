// What all CUDA kernels share: number types, warps, launches, and the sum over parts.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <cstdint>
#include <cstring>
#include <utility>

#include "answers.h"
#include "attention.h"

namespace elsa::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

// Storage to arithmetic type and back. Named conversions: PyTorch switches the operators off.
__device__ inline float number(float x) { return x; }
__device__ inline double number(double x) { return x; }
__device__ inline float number(__half x) { return __half2float(x); }
__device__ inline float number(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void store(float* out, float x) { *out = x; }
__device__ inline void store(double* out, double x) { *out = x; }
__device__ inline void store(__half* out, float x) { *out = __float2half_rn(x); }
__device__ inline void store(__nv_bfloat16* out, float x) { *out = __float2bfloat16_rn(x); }

// Two 16-bit numbers in a register, the first in the lower half.
template <typename S>
__device__ uint32_t pack(float x, float y) {
  S numbers[2];
  store(numbers, x);
  store(numbers + 1, y);
  uint32_t pair;
  memcpy(&pair, numbers, sizeof(pair));
  return pair;
}

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }

// All lanes get the same result, to the last bit: the partners of each step add the same two.
template <typename T>
__device__ T warp_sum(T x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
template <typename T>
__device__ T warp_max(T x) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, x, step);
    x = other > x ? other : x;
  }
  return x;
}

// The block's dynamic shared memory.
template <typename T>
__device__ T* block_memory() {
  extern __shared__ double2 shared[];
  return reinterpret_cast<T*>(shared);
}

// A position of the map and a head; `pixel` counts positions through all images.
struct Place {
  int64_t pixel, y, x;
  int head;
};

// Heads change fastest: neighbouring warps read the same pixel's logits.
template <typename S>
__device__ Place place(const Operands<S>& a, int64_t item) {
  const int64_t pixel = item / a.heads;
  return {
      pixel, pixel / a.width % a.height, pixel % a.width, static_cast<int>(item - pixel * a.heads)};
}

// Lets a kernel's blocks on the current device have so much shared memory, always the same.
inline void allow_shared(const void* kernel, int64_t bytes) {
  static Answers<std::pair<const void*, int>, int64_t> allowed;
  allowed.get({kernel, current_device()}, [&] {
    STD_CUDA_CHECK(cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
    return bytes;
  });
}

// Runs kernel(arguments...) with `shared` bytes of shared memory in each block.
template <typename... Parameters, typename... Arguments>
void launch(
    void (*kernel)(Parameters...), dim3 blocks, int threads, int64_t shared, cudaStream_t stream,
    Arguments&&... arguments) {
  if (shared > 48 * 1024) allow_shared(reinterpret_cast<const void*>(kernel), shared);
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

constexpr int kSumWarps = 8;

// out[c, o] = sum over parts of parts[part, o, c], in an order that depends on nothing but sizes.
template <typename S>
__global__ void sum_parts(
    const Arithmetic<S>* parts, int64_t count, int64_t channels, int64_t taps, S* out) {
  using T = Arithmetic<S>;
  T* sums = block_memory<T>();  // [kSumWarps][kWarp]
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t size = channels * taps, i = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  T sum = 0;
  if (i < size)
    for (int64_t part = warp; part < count; part += kSumWarps) sum += parts[part * size + i];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || i >= size) return;
  for (int other = 1; other < kSumWarps; ++other) sum += sums[other * kWarp + lane];
  store(out + i % channels * taps + i / channels, sum);
}

template <typename S>
void launch_sum_parts(const Backward<S>& call, cudaStream_t stream) {
  const Operands<S>& a = call.operands;
  const int64_t channels = a.heads * a.depth, taps = a.kernel * a.kernel;
  const dim3 blocks(static_cast<unsigned>((channels * taps + kWarp - 1) / kWarp));
  const int64_t shared = kSumWarps * kWarp * sizeof(Arithmetic<S>);
  const auto sum = [&](const Arithmetic<S>* parts, S* out) {
    launch(
        sum_parts<S>, blocks, kSumWarps * kWarp, shared, stream, parts, call.parts, channels, taps,
        out);
  };
  if (call.grad_add) sum(call.add_parts, call.grad_add);
  if (call.grad_mul) sum(call.mul_parts, call.grad_mul);
}

}  // namespace elsa::cuda
