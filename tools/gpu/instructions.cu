// Whether the instructions of csrc/cuda/instructions.cuh do on a device what kernels rely on.
// Prints a line of JSON for each of them; the rehearsal compiles it with tests/cuda_emulation.
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../../csrc/cuda/instructions.cuh"

#ifndef __CUDACC__
constexpr int cudaMemcpyHostToDevice = 0, cudaMemcpyDeviceToHost = 0;
cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = std::aligned_alloc(16, (bytes + 15) / 16 * 16);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, int) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
#endif

namespace {

using namespace elsa::cuda;

constexpr int kNumbers = 8;  // 16-bit numbers of a row of a matrix, 16 bytes
constexpr int kRows = 32;    // of four matrices
constexpr uint16_t kPoison = 0xabcd;

// What a warp reads and leaves, a row or a register of each lane.
struct Inputs {
  uint16_t rows[kRows][kNumbers];
  Pair a[kWarp][4], b[kWarp][2];
  float sum[kWarp][4];
};
struct Outputs {
  uint16_t copied[kRows][kNumbers];
  Pair loaded[kWarp][4], transposed[kWarp][4];
  float product[kWarp][4];
};

__host__ __device__ inline bool reads(int lane) { return lane % 3 != 1; }
// The row of shared memory that a lane names, so that no lane names its own.
__host__ __device__ inline int row_of(int lane) { return (lane * 5 + 3) % kRows; }

template <typename S>
__global__ void use_all(const Inputs* inputs, Outputs* outputs) {
  auto* rows = block_memory<uint16_t>();
  uint16_t* copied = rows + kRows * kNumbers;
  const int lane = threadIdx.x;
  for (int i = 0; i < kNumbers; ++i) {
    rows[lane * kNumbers + i] = inputs->rows[lane][i];
    copied[lane * kNumbers + i] = kPoison;
  }
  __syncwarp();
  copy_async(copied + lane * kNumbers, inputs->rows[lane], reads(lane));
  wait_for_copies();
  __syncwarp();
  for (int i = 0; i < kNumbers; ++i) outputs->copied[lane][i] = copied[lane * kNumbers + i];

  const uint16_t* row = rows + row_of(lane) * kNumbers;
  load_matrices(outputs->loaded[lane], row);
  load_transposed(outputs->transposed[lane], row);

  float sum[4];
  Pair a[4];
  for (int i = 0; i < 4; ++i) {
    sum[i] = inputs->sum[lane][i];
    a[i] = inputs->a[lane][i];
  }
  multiply_add<S>(sum, a, inputs->b[lane][0], inputs->b[lane][1]);
  for (int i = 0; i < 4; ++i) outputs->product[lane][i] = sum[i];
}

bool failed = false;

void report(const char* check, int wrong, const std::string& first) {
  failed |= wrong > 0;
  std::printf(
      "{\"case\": \"%s\", \"wrong\": %d%s}\n", check, wrong,
      wrong ? (", \"first\": \"" + first + "\"").c_str() : "");
}

// Counts the numbers of all lanes that are not as `expected` says.
template <typename T, int count>
void compare(
    const char* check, const T (&found)[kWarp][count],
    const std::function<T(int lane, int i)>& expected) {
  int wrong = 0;
  std::string first;
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < count; ++i)
      if (found[lane][i] != expected(lane, i) && wrong++ == 0)
        first = "lane " + std::to_string(lane) + ", number " + std::to_string(i) + ": " +
                std::to_string(found[lane][i]) + ", expected " + std::to_string(expected(lane, i));
  report(check, wrong, first);
}

Pair pair(uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; }

uint16_t bits(float x, __half*) {
  const __half number = __float2half_rn(x);
  uint16_t bits;
  std::memcpy(&bits, &number, 2);
  return bits;
}
uint16_t bits(float x, __nv_bfloat16*) {
  const __nv_bfloat16 number = __float2bfloat16_rn(x);
  uint16_t bits;
  std::memcpy(&bits, &number, 2);
  return bits;
}

// Small whole numbers, which both types and all sums have exactly.
float left(int row, int k) { return static_cast<float>((row * 7 + k * 3) % 13 - 6); }
float right(int k, int column) { return static_cast<float>((k * 5 + column * 11) % 17 - 8); }
float start(int row, int column) { return static_cast<float>(row * 8 + column); }

template <typename S>
bool run(const char* type) {
  S* const kind = nullptr;
  Inputs inputs;
  for (int row = 0; row < kRows; ++row)
    for (int i = 0; i < kNumbers; ++i) inputs.rows[row][i] = row * kNumbers + i;
  for (int lane = 0; lane < kWarp; ++lane) {
    const int row = lane / 4, two = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const int y = row + i % 2 * 8, k = two + i / 2 * 8;
      inputs.a[lane][i] = pair(bits(left(y, k), kind), bits(left(y, k + 1), kind));
      inputs.sum[lane][i] = start(row + i / 2 * 8, two + i % 2);
    }
    for (int i = 0; i < 2; ++i) {
      const int k = two + i * 8;
      inputs.b[lane][i] = pair(bits(right(k, row), kind), bits(right(k + 1, row), kind));
    }
  }
  void *given = nullptr, *results = nullptr;
  Outputs outputs;
  std::memset(&outputs, 0xff, sizeof(outputs));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(kWarp);
  config.dynamicSmemBytes = 2 * kRows * kNumbers * sizeof(uint16_t);
  cudaError_t error = cudaMalloc(&given, sizeof(inputs));
  if (error == cudaSuccess) error = cudaMalloc(&results, sizeof(outputs));
  if (error == cudaSuccess)
    error = cudaMemcpy(given, &inputs, sizeof(inputs), cudaMemcpyHostToDevice);
  if (error == cudaSuccess)
    error = cudaMemcpy(results, &outputs, sizeof(outputs), cudaMemcpyHostToDevice);
  if (error == cudaSuccess)
    error = cudaLaunchKernelEx(
        &config, use_all<S>, static_cast<const Inputs*>(given), static_cast<Outputs*>(results));
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  if (error == cudaSuccess)
    error = cudaMemcpy(&outputs, results, sizeof(outputs), cudaMemcpyDeviceToHost);
  if (error != cudaSuccess) {
    std::printf(
        "{\"case\": \"%s\", \"error\": \"CUDA error %d\"}\n", type, static_cast<int>(error));
    return false;
  }
  const std::string name(type);
  compare<uint16_t, kNumbers>(
      ("cp.async with zero fill, " + name).c_str(), outputs.copied,
      [&](int lane, int i) { return reads(lane) ? inputs.rows[lane][i] : uint16_t{0}; });
  const auto number = [&](int matrix, int row, int column) {
    return inputs.rows[row_of(matrix * 8 + row)][column];
  };
  compare<Pair, 4>(("ldmatrix, " + name).c_str(), outputs.loaded, [&](int lane, int i) {
    const int row = lane / 4, two = lane % 4 * 2;
    return pair(number(i, row, two), number(i, row, two + 1));
  });
  compare<Pair, 4>(("ldmatrix.trans, " + name).c_str(), outputs.transposed, [&](int lane, int i) {
    const int column = lane / 4, two = lane % 4 * 2;
    return pair(number(i, two, column), number(i, two + 1, column));
  });
  compare<float, 4>(("mma, " + name).c_str(), outputs.product, [&](int lane, int i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    float sum = start(row, column);
    for (int k = 0; k < 16; ++k) sum += left(row, k) * right(k, column);
    return sum;
  });
  return true;
}

}  // namespace

int main() {
  const bool ran = run<__half>("fp16") && run<__nv_bfloat16>("bf16");
  return ran ? failed : 2;
}
