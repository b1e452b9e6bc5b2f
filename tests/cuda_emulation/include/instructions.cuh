// What csrc/cuda/instructions.cuh has, which this takes the place of: the same, lane by lane. A
// copy is made when it is waited for, no earlier.
#ifndef ELSA_INSTRUCTIONS_CUH
#define ELSA_INSTRUCTIONS_CUH

#include <array>
#include <cstring>

#include "../../../csrc/cuda/device.cuh"

namespace elsa::cuda {

inline float exponential2(float x) { return std::exp2(x); }

inline void copy_async(void* shared, const void* map, bool read) {
  emulation::require(
      (reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(map)) % 16 == 0,
      "copies of 16 bytes are aligned");
  emulation::copy_later(shared, map, read ? 16 : 0, 16);
}
inline void wait_for_copies() { emulation::copy_now(); }

using Pair = uint32_t;

namespace emulated {

template <typename S>
float half_of(Pair pair, int second) {
  S numbers[2];
  std::memcpy(numbers, &pair, sizeof(pair));
  return number(numbers[second]);
}

template <int Count>
void load(Pair (&matrices)[Count], const void* row, bool transposed) {
  using Row = std::array<uint16_t, 8>;
  emulation::require(
      reinterpret_cast<uintptr_t>(row) % sizeof(Row) == 0, "rows of a matrix start at 16 bytes");
  const auto places = emulation::share(reinterpret_cast<uintptr_t>(row));
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  for (int other = lane / 8 * 8; other < lane && lane < 8 * Count; ++other)
    emulation::require(
        (places[lane] - places[other]) / sizeof(Row) % 8 != 0,
        "rows of a matrix are in different memory banks");
  Row own{};
  if (lane < 8 * Count) std::memcpy(&own, row, sizeof(own));
  const auto rows = emulation::share(own);
  for (int i = 0; i < Count; ++i) {
    uint16_t numbers[2];
    for (int j = 0; j < 2; ++j) {
      const int first = lane / 4, second = lane % 4 * 2 + j;
      numbers[j] = rows[i * 8 + (transposed ? second : first)][transposed ? first : second];
    }
    std::memcpy(&matrices[i], numbers, sizeof(numbers));
  }
}

}  // namespace emulated

inline void load_matrices(Pair (&matrices)[4], const void* row) {
  emulated::load(matrices, row, false);
}
template <int Count>
void load_transposed(Pair (&matrices)[Count], const void* row) {
  emulated::load(matrices, row, true);
}

template <typename S>
void multiply_add(float (&sum)[4], const Pair (&a)[4], Pair b0, Pair b1) {
  const auto lanes = emulation::share(std::array<Pair, 6>{a[0], a[1], a[2], a[3], b0, b1});
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int quarter = row / 8 + k / 8 * 2;
      const float left = emulated::half_of<S>(lanes[row % 8 * 4 + k % 8 / 2][quarter], k % 2);
      const float right = emulated::half_of<S>(lanes[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
      sum[i] += left * right;
    }
  }
}

}  // namespace elsa::cuda

#endif
