// Runs the threads of a block, one at a time, each up to its next barrier.
#pragma once

#include <array>
#include <cstring>
#include <functional>
#include <type_traits>

#include "include/cuda_runtime_api.h"

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

namespace emulation {

void wait_for_block();
void wait_for_warp();
// Gives the warp a few bytes, and finds those of all lanes one after the other.
const char* exchange(const void* bytes, int count);
// Gives the warp a value and takes those of all lanes.
template <typename T>
std::array<T, 32> share(const T& value) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::array<T, 32> all;
  std::memcpy(all.data(), exchange(&value, sizeof(T)), sizeof(all));
  return all;
}

// Copies `count` bytes and fills up with zeros to `size`, as soon as the thread waits for it.
void copy_later(void* to, const void* from, int count, int size);
void copy_now();

int ptx_version();
void require(bool condition, const char* rule);
cudaError_t run(
    const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body);

}  // namespace emulation
