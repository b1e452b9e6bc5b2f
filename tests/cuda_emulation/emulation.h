// Runs the threads of a block, one at a time, each up to its next barrier.
#pragma once

#include <cstdint>
#include <functional>

#include "include/cuda_runtime_api.h"

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

namespace emulation {

void wait_for_block();
void wait_for_warp();
// Gives the warp a value and takes the one of a lane.
uint64_t exchange(uint64_t value, int lane);

void require(bool condition, const char* rule);
cudaError_t allow_shared(void* kernel, int bytes);
cudaError_t run(const cudaLaunchConfig_t& config, void* kernel, const std::function<void()>& body);

}  // namespace emulation
