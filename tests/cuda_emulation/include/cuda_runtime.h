// What nvcc gives to kernels: threads, shared memory, vector types and functions of a warp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../emulation.h"
#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __shared__
#define __launch_bounds__(...)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

using std::max;
using std::min;
inline void __syncthreads() { emulation::wait_for_block(); }
inline void __syncwarp() { emulation::wait_for_warp(); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  emulation::require(mask == 0xffffffff, "all lanes must take part in a shuffle");
  return emulation::share(value)[lane];
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ other);
}

template <typename... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Parameters...)) {
  attributes->ptxVersion = emulation::ptx_version();
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  return emulation::run(
      *config, reinterpret_cast<const void*>(kernel), [&] { kernel(Parameters(arguments)...); });
}
