// Instructions that CUDA C++ has no function for. All but the first need compute capability 8.0.
#ifndef ELSA_INSTRUCTIONS_CUH
#define ELSA_INSTRUCTIONS_CUH

#include <cuda_bf16.h>

#include <type_traits>

#include "device.cuh"

namespace elsa::cuda {

// Whether the device that code is compiled for has them; elsewhere nothing calls them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasMatrices = false;
#else
constexpr bool kHasMatrices = true;
#endif

// 2^x, within 2 units in the last place; 0 where that is smaller than 2^-126.
__device__ inline float exponential2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// Copies 16 bytes of a map to shared memory, both aligned to as many; zeros where they are not to
// be read. They are there for this thread after wait_for_copies(), for the block after a barrier
// behind it.
__device__ inline void copy_async(void* shared, const void* map, bool read) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kHasMatrices)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(address), "l"(map), "r"(read ? 16 : 0)
                 : "memory");
}
__device__ inline void wait_for_copies() {
  if constexpr (kHasMatrices) asm volatile("cp.async.wait_all;" : : : "memory");
}

// Products of small matrices by the tensor cores, for 16-bit numbers with sums in float32.

// Two 16-bit numbers in a register, the first in the lower half.
using Pair = uint32_t;

// In a matrix of 8 x 8 that a warp holds, lane 4 * row + column has the numbers
// (row, 2 * column) and (row, 2 * column + 1).

// Reads four matrices of 8 x 8 from shared memory, where a row is 16 bytes: lane 8 * i + j names
// row j of matrix i.
__device__ inline void load_matrices(Pair (&matrices)[4], const void* row) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kHasMatrices)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address)
                 : "memory");
}
// The same, rows and columns exchanged.
__device__ inline void load_transposed(Pair (&matrices)[4], const void* row) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kHasMatrices)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address)
                 : "memory");
}
// Two matrices, whose rows lanes 0 to 15 name.
__device__ inline void load_transposed(Pair (&matrices)[2], const void* row) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kHasMatrices)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(matrices[0]), "=r"(matrices[1])
                 : "r"(address)
                 : "memory");
}

// sum (16 x 8) += a (16 x 16) * b (16 x 8). The quarters of a follow each other by columns:
// {upper left, lower left, upper right, lower right}; b0 and b1 are the upper and lower half of b,
// each transposed; sum is {upper first, upper second, lower first, lower second number}.
template <typename S>
__device__ void multiply_add(float (&sum)[4], const Pair (&a)[4], Pair b0, Pair b1) {
  if constexpr (!kHasMatrices)
    __trap();
  else if constexpr (std::is_same_v<S, __nv_bfloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace elsa::cuda

#endif
