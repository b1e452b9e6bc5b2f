// Gradients of the grouped convolution's weight and bias, on tensor cores.
#include <algorithm>

#include "grouped_conv.cuh"

namespace elsa::cuda {
namespace grouped {
namespace {

constexpr int kRows = kWarpRows, kThreads = kChunks * kWarp;
constexpr int kGradPlane = plane_of(kRows * kColumns);
constexpr int64_t kTileBytes = kChunks * (kTilePlane<kRows> + kGradPlane) * 2;

// Starts to copy the block's channels of a tile of gradients to shared memory; zeros outside of the
// map.
template <typename S>
__device__ void copy_grads(
    S* grads, const GroupedConv<S>& a, const Place& place, const Map<const S>& map) {
  const int chunk = threadIdx.x % kChunks, channel = place.channel + chunk * kChunk;
  const int own = static_cast<int>(threadIdx.x) / kChunks;
  const Chunks<S> from(map, a, place, channel);
#pragma unroll
  for (int first = 0; first < kRows * kColumns; first += kThreads / kChunks) {
    const int position = first + own, row = position / kColumns, column = position % kColumns;
    const bool read = channel < a.channels && inside(a, place.top + row, place.left + column);
    copy_async(
        grads + chunk * kGradPlane + position * kChunk, read ? from.at(row, column) : map.data,
        read);
  }
}

// sums[pair of taps] += the products of a plane of pixels with one of gradients. In a product the
// rows of the first factor are the channels of two taps' pixels, its columns positions of an image
// row, and the columns of the second output channels. Where the first factor is ones, the sums are
// the gradient of the bias.
template <typename S>
__device__ void multiply_planes(
    float (&sums)[kPairs][4], float (&bias)[4], const S* pixel_plane, const S* grad_plane,
    int lane) {
  const Pair one = pack<S>(1, 1), ones[4] = {one, one, one, one};
  Pair grads[kWarpRows / 2][4];  // of two rows
#pragma unroll
  for (int j = 0; j < kWarpRows / 2; ++j) {
    load_transposed(grads[j], grad_plane + (j * 2 * kColumns + lane) * kChunk);
    multiply_add<S>(bias, ones, grads[j][0], grads[j][1]);
    multiply_add<S>(bias, ones, grads[j][2], grads[j][3]);
  }
  const int second = lane / 8 % 2, column = lane / 16 * 8 + lane % 8;
  const S* across = pixel_plane + (column + second) * kChunk;
  const S* down = pixel_plane + (column + kKernel - 1 + second * kHaloColumns) * kChunk;
  const auto add = [&](float (&sum)[4], const Pair(&pixels)[4], int y) {
    multiply_add<S>(sum, pixels, grads[y / 2][y % 2 * 2], grads[y / 2][y % 2 * 2 + 1]);
  };
#pragma unroll
  for (int row = 0; row < kPixelRows; ++row) {
    Pair pixels[4];
#pragma unroll
    for (int i = 0; i < kRowTaps; ++i) {
      load_transposed(pixels, across + (row * kHaloColumns + 2 * i) * kChunk);
#pragma unroll
      for (int y = 0; y < kWarpRows; ++y) {
        const int ky = row - y;
        if (ky >= 0 && ky < kKernel) add(sums[ky * kRowTaps + i], pixels, y);
      }
    }
    if (row + 1 == kPixelRows) break;
    load_transposed(pixels, down + row * kHaloColumns * kChunk);
#pragma unroll
    for (int y = 0; y < kWarpRows; ++y) {
      const int pair = last_pair(row - y);
      if (pair >= 0) add(sums[pair], pixels, y);
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads, 3)
    weight_kernel(GroupedConvBackward<S> call, int64_t tiles) {
  S* tile = block_memory<S>();
  S* grads = tile + kChunks * kTilePlane<kRows>;
  const GroupedConv<S>& a = call.operands;
  const int lane = threadIdx.x % kWarp, chunk = threadIdx.x / kWarp;
  const int channel = (blockIdx.x * kChunks + chunk) * kChunk;
  const bool works = channel < a.channels;
  float sums[kPairs][4] = {}, bias[4] = {};
  const unsigned end = static_cast<unsigned>(tiles * (blockIdx.y + 1) / gridDim.y);
#pragma unroll 1
  for (unsigned i = static_cast<unsigned>(tiles * blockIdx.y / gridDim.y); i < end; ++i) {
    const Place place = place_of<kRows>(a, i, blockIdx.x);
    copy_grads(grads, a, place, call.grad);
    load_tile<kRows, kThreads, 2, 1>(tile, a, place, a.query, a.key);
    wait_for_copies();
    __syncthreads();
    if (works)
      multiply_planes(
          sums, bias, tile + chunk * kTilePlane<kRows>, grads + chunk * kGradPlane, lane);
    __syncthreads();
  }
  if (!works) return;

  // A lane has an input channel and two neighbouring output channels, of the same group or not.
  const int in = lane / 4, out = lane % 4 * 2, size = a.group_width * kTaps;
  if (in / a.group_width == out / a.group_width) {
    float* parts =
        call.weight_parts +
        (static_cast<int64_t>(blockIdx.y) * size + in % a.group_width * kTaps) * a.channels +
        channel + out;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        const int64_t tap = tap_of(pair, second);
        if (tap < kTaps)
          *reinterpret_cast<float2*>(parts + tap * a.channels) = {
              sums[pair][2 * second], sums[pair][2 * second + 1]};
      }
    }
  }
  if (in == 0)
    *reinterpret_cast<float2*>(
        call.bias_parts + static_cast<int64_t>(blockIdx.y) * a.channels + channel + out) = {
        bias[0], bias[1]};
}

}  // namespace
}  // namespace grouped

// Enough blocks for the largest devices, each of which adds to what is to be summed.
int64_t grouped_conv_parts(int64_t batch, int64_t height, int64_t width, int64_t channels) {
  constexpr int64_t kBlocks = 384;
  const int64_t tiles = grouped::tile_count<grouped::kRows>(batch, height, width);
  return std::clamp<int64_t>(kBlocks / grouped::chunk_blocks(channels), 1, tiles);
}

template <typename S>
void backward_grouped_conv_weight(const GroupedConvBackward<S>& call, cudaStream_t stream) {
  const GroupedConv<S>& a = call.operands;
  const dim3 blocks(grouped::chunk_blocks(a.channels), static_cast<unsigned>(call.parts));
  launch(
      grouped::weight_kernel<S>, blocks, grouped::kThreads, grouped::kTileBytes, stream, call,
      grouped::tile_count<grouped::kRows>(a.batch, a.height, a.width));
  const auto sum = [&](const float* parts, int64_t taps, S* out) {
    const int64_t channels = a.channels, size = channels * taps;
    launch(
        sum_parts<S>, dim3(static_cast<unsigned>((size + kWarp - 1) / kWarp)), kSumWarps * kWarp,
        kSumWarps * kWarp * sizeof(float), stream, parts, call.parts, channels, taps, out);
  };
  sum(call.weight_parts, a.group_width * grouped::kTaps, call.grad_weight);
  if (call.grad_bias) sum(call.bias_parts, 1, call.grad_bias);
}

template void backward_grouped_conv_weight<__half>(
    const GroupedConvBackward<__half>&, cudaStream_t);
template void backward_grouped_conv_weight<__nv_bfloat16>(
    const GroupedConvBackward<__nv_bfloat16>&, cudaStream_t);

}  // namespace elsa::cuda
