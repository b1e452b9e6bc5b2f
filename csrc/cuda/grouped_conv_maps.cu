// Grouped 7x7 convolution of the product of two maps, on tensor cores.
#include <algorithm>

#include "grouped_conv.cuh"

namespace elsa::cuda {
namespace grouped {
namespace {

constexpr int kRows = 16, kThreads = kRows / kWarpRows * kChunks * kWarp;
constexpr int64_t kTileBytes = kChunks * kTilePlane<kRows> * 2;
static_assert(kRows * kColumns * kChunks * kChunk * 2 <= kTileBytes);
constexpr int kPackThreads = 256;

// Weights as the lanes of a warp hold them, (chunks, kPairs, lanes, 2) pairs: of two taps, the
// weights of two input channels for an output channel. For the gradient of the input, input and
// output change places, and taps are in reverse order. 0 between groups, and where there is no tap.
template <bool Gradient, typename S>
__global__ void pack_kernel(const S* weight, int64_t chunks, int group_width, S* packed) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
  const int second = index % 2, lane = index / 2 % kWarp;
  const int pair = index / (2 * kWarp) % kPairs, tap = tap_of(pair, second);
  const int64_t chunk = index / (2 * kWarp * kPairs);
  if (chunk >= chunks) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int out = lane / 4, in = lane % 4 * 2 + i;
    const bool any = tap < kTaps && out / group_width == in / group_width;
    if (Gradient) {
      const int other = out;
      out = in;
      in = other;
    }
    const int64_t row = (chunk * kChunk + out) * group_width + in % group_width;
    S number;
    store(&number, 0.0f);
    if (any) number = weight[row * kTaps + (Gradient ? kTaps - 1 - tap : tap)];
    packed[index * 2 + i] = number;
  }
}

// sums += the convolution of a plane, at 16 positions of each of kWarpRows rows. In a product the
// rows of the first factor are positions, its columns the channels of two taps' pixels, and the
// columns of the second output channels.
template <typename S>
__device__ void convolve(
    float (&sums)[kWarpRows][4], const S* plane, const Pair (&taps)[kPairs][2], int lane) {
  const S* across = plane + (lane % 16 + lane / 16) * kChunk;
  const S* down = plane + (lane % 16 + kKernel - 1 + lane / 16 * kHaloColumns) * kChunk;
#pragma unroll
  for (int row = 0; row < kPixelRows; ++row) {
    Pair pixels[kRowTaps][4], last[4];
#pragma unroll
    for (int i = 0; i < kRowTaps; ++i)
      load_matrices(pixels[i], across + (row * kHaloColumns + 2 * i) * kChunk);
    if (row + 1 < kPixelRows) load_matrices(last, down + row * kHaloColumns * kChunk);
#pragma unroll
    for (int i = 0; i < kRowTaps; ++i) {
#pragma unroll
      for (int y = 0; y < kWarpRows; ++y) {
        const int ky = row - y;
        if (ky < 0 || ky >= kKernel) continue;
        const Pair(&two)[2] = taps[ky * kRowTaps + i];
        multiply_add<S>(sums[y], pixels[i], two[0], two[1]);
      }
    }
#pragma unroll
    for (int y = 0; y < kWarpRows; ++y) {
      const int pair = last_pair(row - y);
      if (pair >= 0) multiply_add<S>(sums[y], last, taps[pair][0], taps[pair][1]);
    }
  }
}

// Where a chunk of a position is among the tile's results: in different banks for what eight lanes
// write, and for what they read.
__device__ inline int result(int position, int chunk) {
  return (position * kChunks + (chunk ^ (position / 2 % kChunks))) * kChunk;
}

// The convolution of a tile in shared memory, which makes room for it: (positions, kChunks, kChunk)
// as result() says.
template <typename S>
__device__ void convolve_tile(S* tile, const GroupedConv<S>& a, const Place& place, const S* bias) {
  const int lane = threadIdx.x % kWarp, chunk = threadIdx.x / kWarp % kChunks;
  const int top = threadIdx.x / (kWarp * kChunks) * kWarpRows;
  const int channel = place.channel + chunk * kChunk;
  const bool works = channel < a.channels && place.top + top < a.height;
  Pair taps[kPairs][2];
  float sums[kWarpRows][4] = {};
  if (works) {
    const uint2* packed = reinterpret_cast<const uint2*>(a.packed) +
                          static_cast<int64_t>(channel / kChunk) * kPairs * kWarp + lane;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const uint2 two = packed[i * kWarp];
      taps[i][0] = two.x;
      taps[i][1] = two.y;
    }
    if (bias) {
      const float first = number(bias[channel + lane % 4 * 2]);
      const float second = number(bias[channel + lane % 4 * 2 + 1]);
#pragma unroll
      for (int y = 0; y < kWarpRows; ++y) {
        sums[y][0] = sums[y][2] = first;
        sums[y][1] = sums[y][3] = second;
      }
    }
  }
  __syncthreads();
  if (works)
    convolve(sums, tile + chunk * kTilePlane<kRows> + top * kHaloColumns * kChunk, taps, lane);
  __syncthreads();
  if (works) {
#pragma unroll
    for (int y = 0; y < kWarpRows; ++y) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int position = (top + y) * kColumns + i * 8 + lane / 4;
        *reinterpret_cast<Pair*>(tile + result(position, chunk) + lane % 4 * 2) =
            pack<S>(sums[y][2 * i], sums[y][2 * i + 1]);
      }
    }
  }
  __syncthreads();
}

// Calls write(numbers, row, column) for each chunk of the tile's results within the map.
template <typename S, typename Write>
__device__ void write_tile(
    const S* tile, const GroupedConv<S>& a, const Place& place, const Write& write) {
  const int chunk = threadIdx.x % kChunks, own = static_cast<int>(threadIdx.x) / kChunks;
#pragma unroll
  for (int first = 0; first < kRows * kColumns; first += kThreads / kChunks) {
    const int position = first + own, row = position / kColumns, column = position % kColumns;
    if (inside(a, place.top + row, place.left + column))
      write(*reinterpret_cast<const uint4*>(tile + result(position, chunk)), row, column);
  }
}
template <typename S>
__device__ void store_chunk(S* out, const uint4& numbers) {
  *reinterpret_cast<uint4*>(out) = numbers;
}

// Where a block's results are in a contiguous map, and those of its other positions from there.
template <typename S>
__device__ int64_t first_result(const GroupedConv<S>& a, const Place& place, int channel) {
  return pixel_at(a, place, place.top, place.left) * a.channels + channel;
}
template <typename S>
__device__ int result_offset(const GroupedConv<S>& a, int row, int column) {
  return (row * static_cast<int>(a.width) + column) * a.channels;
}

template <typename S>
__device__ Place place_of_block(const GroupedConv<S>& a) {
  const unsigned chunks = chunk_blocks(a.channels);
  return place_of<kRows>(a, blockIdx.x / chunks, blockIdx.x % chunks);
}

template <typename S>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(GroupedConvForward<S> call) {
  S* tile = block_memory<S>();
  const GroupedConv<S>& a = call.operands;
  const Place place = place_of_block(a);
  load_tile<kRows, kThreads, 4, 2>(tile, a, place, a.query, a.key);
  convolve_tile(tile, a, place, a.bias);
  const int channel = place.channel + threadIdx.x % kChunks * kChunk;
  if (channel >= a.channels) return;
  S* out = call.out + first_result(a, place, channel);
  write_tile(tile, a, place, [&](const uint4& numbers, int row, int column) {
    store_chunk(out + result_offset(a, row, column), numbers);
  });
}

// The gradient of the product, which goes on to its factors.
template <typename S>
__global__ void __launch_bounds__(kThreads, 2) maps_kernel(GroupedConvBackward<S> call) {
  S* tile = block_memory<S>();
  const GroupedConv<S>& a = call.operands;
  const Place place = place_of_block(a);
  load_tile<kRows, kThreads, 8, 1>(tile, a, place, call.grad);
  convolve_tile(tile, a, place, static_cast<const S*>(nullptr));
  const int channel = place.channel + threadIdx.x % kChunks * kChunk;
  if (channel >= a.channels) return;
  const Chunks<S> query(a.query, a, place, channel), key(a.key, a, place, channel);
  const int64_t first = first_result(a, place, channel);
  write_tile(tile, a, place, [&](const uint4& numbers, int row, int column) {
    const int64_t at = first + result_offset(a, row, column);
    store_chunk(call.grad_query + at, product<S>(numbers, key.load(row, column)));
    store_chunk(call.grad_key + at, product<S>(numbers, query.load(row, column)));
  });
}

template <typename S>
dim3 blocks(const GroupedConv<S>& a) {
  return dim3(static_cast<unsigned>(grouped_conv_blocks(a.batch, a.height, a.width, a.channels)));
}
template <bool Gradient, typename S>
void launch_pack(const GroupedConv<S>& a, cudaStream_t stream) {
  const int64_t pairs = packed_weights(a.channels) / 2;
  launch(
      pack_kernel<Gradient, S>,
      dim3(static_cast<unsigned>((pairs + kPackThreads - 1) / kPackThreads)), kPackThreads, 0,
      stream, a.weight, static_cast<int64_t>(a.channels / kChunk), a.group_width, a.packed);
}

}  // namespace
}  // namespace grouped

int64_t packed_weights(int64_t channels) {
  return channels / grouped::kChunk * grouped::kPairs * kWarp * 4;
}
int64_t grouped_conv_blocks(int64_t batch, int64_t height, int64_t width, int64_t channels) {
  return grouped::tile_count<grouped::kRows>(batch, height, width) *
         grouped::chunk_blocks(channels);
}

template <typename S>
bool has_grouped_conv() {
  static Answers<int, bool> answers;
  return answers.get(current_device(), [] {
    cudaFuncAttributes attributes;
    STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, grouped::forward_kernel<S>));
    return attributes.ptxVersion >= 80;
  });
}

template <typename S>
void forward_grouped_conv(const GroupedConvForward<S>& call, cudaStream_t stream) {
  const GroupedConv<S>& a = call.operands;
  grouped::launch_pack<false>(a, stream);
  launch(
      grouped::forward_kernel<S>, grouped::blocks(a), grouped::kThreads, grouped::kTileBytes,
      stream, call);
}

template <typename S>
void backward_grouped_conv(const GroupedConvBackward<S>& call, cudaStream_t stream) {
  const GroupedConv<S>& a = call.operands;
  grouped::launch_pack<true>(a, stream);
  launch(
      grouped::maps_kernel<S>, grouped::blocks(a), grouped::kThreads, grouped::kTileBytes, stream,
      call);
  backward_grouped_conv_weight(call, stream);
}

#define ELSA_INSTANTIATE(S)                                                          \
  template bool has_grouped_conv<S>();                                               \
  template void forward_grouped_conv<S>(const GroupedConvForward<S>&, cudaStream_t); \
  template void backward_grouped_conv<S>(const GroupedConvBackward<S>&, cudaStream_t);
ELSA_INSTANTIATE(__half)
ELSA_INSTANTIATE(__nv_bfloat16)
#undef ELSA_INSTANTIATE

}  // namespace elsa::cuda
