// The kernels for K = 7 and 32 channels per head, in 16-bit types, on tensor cores.
#include <algorithm>

#include "attention_k7_matrix.cuh"

namespace elsa::cuda {
namespace tiles {
namespace {

// Channels that a block of the ghost kernel has: half a head, so that more blocks fit.
constexpr int kGhostDepth = 16, kGhostHalves = kDepth / kGhostDepth;
constexpr int kGhostWarpChannels = kGhostDepth / kWarps;

// Shared memory of a block, in bytes; each part is a multiple of 16.
constexpr int64_t kGatherBytes = (kTilePixels + kPlane) * kDepth * 2 + kFilterPairs * 4;
constexpr int64_t kLogitsBytes = (kTilePixels + kGradPixels) * kDepth * 2 + kWeightPairs * 4;
constexpr int64_t kGhostBytes = (kTilePixels + kGradPixels + kPlane + kGradPlane) * kGhostDepth * 2;
// Two blocks fit where a multiprocessor has 100 KB, 1 KB of which each block leaves to the system.
static_assert(std::max({kGatherBytes, kLogitsBytes, kGhostBytes}) <= (100 - 2 * 1) * 1024 / 2);

template <typename S>
__global__ void __launch_bounds__(kThreads, 4) forward_kernel(Forward<S> call) {
  S* tile = block_memory<S>();
  S* planes = tile + kTilePixels * kDepth;  // before, logits
  Pair* filter = reinterpret_cast<Pair*>(planes + kPlane * kDepth);
  const Operands<S>& a = call.operands;
  const Tile t = tile_of_block(a);
  const Lane lane;
  copy_tile<kDepth, kHaloRows<kKernel>, kTileColumns>(
      tile, a.value, a, t, t.head * kDepth, t.top - kRadius, t.left - kRadius);
  Pair* logits = reinterpret_cast<Pair*>(planes);
  load_logits(logits, a, t, lane);
  if (a.ghost_add) load_filter<false>(filter, a, t, lane);
  __syncwarp();
  Band attention;
#pragma unroll
  for (int row = 0; row < kWarpRows; ++row) {
    float taps[2 * kKernel];
    softmax<S>(taps, logits + lane.position(row) * kPositionPairs, lane);
#pragma unroll
    for (int ky = 0; ky < kKernel; ++ky)
      attention[row][ky] = pack<S>(taps[2 * ky], taps[2 * ky + 1]);
  }
  wait_for_copies();
  __syncthreads();
  gather(tile, planes, filter, attention, a, t, lane, call.out);
}

// Gradient of the logits, and the softmax for the kernel that follows. In a product the rows of the
// first factor are the positions of two image rows, and the columns of the second the pixels of
// one; what lies outside of the band is left.
template <typename S>
__global__ void __launch_bounds__(kThreads, 3) logits_kernel(Backward<S> call) {
  S* tile = block_memory<S>();
  S* grads = tile + kTilePixels * kDepth;
  Pair* logits = reinterpret_cast<Pair*>(grads + kGradPixels * kDepth);  // and their gradients
  const Operands<S>& a = call.operands;
  const Tile t = tile_of_block(a);
  const Lane lane;
  const int channel = t.head * kDepth;
  copy_tile<kDepth, kHaloRows<kKernel>, kTileColumns>(
      tile, a.value, a, t, channel, t.top - kRadius, t.left - kRadius);
  copy_tile<kDepth, kRows, kColumns>(grads, call.grad, a, t, channel, t.top, t.left);
  load_logits(logits, a, t, lane);
  wait_for_copies();
  __syncthreads();

  Pair grad[kWarpRows / 2][2][4];  // of two rows of positions, in two halves of the channels
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const S* grad_row =
        grads + chunk_at<kDepth>(
                    (lane.top + lane.index / 8 % 2) * kColumns + lane.strip + lane.index % 8,
                    2 * half + lane.index / 16);
#pragma unroll
    for (int j = 0; j < kWarpRows / 2; ++j)
      load_matrices(grad[j][half], grad_row + j * 2 * kColumns * kDepth);
  }

  float products[kWarpRows][2 * kKernel];
  const bool left = lane.left();
  const S* from = tile + chunk_at<kDepth>(
                             lane.top * kTileColumns + lane.strip + lane.index % 8, lane.index / 8);
#pragma unroll
  for (int row = 0; row < kPixelRows; ++row) {
    Pair pixels[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      load_matrices(pixels[half], from + (row * kTileColumns + half * 8) * kDepth);
#pragma unroll
    for (int j = 0; j < kWarpRows / 2; ++j) {
      const int ky = row - 2 * j;  // of the upper positions; the lower ones' is one less
      if (ky < 0 || ky > kKernel) continue;
      float sums[2][4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        multiply_add<S>(sums[half], grad[j][0], pixels[half][0], pixels[half][1]);
        multiply_add<S>(sums[half], grad[j][1], pixels[half][2], pixels[half][3]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (ky < kKernel) products[2 * j][2 * ky + i] = left ? sums[0][i] : sums[1][i];
        if (ky > 0) products[2 * j + 1][2 * ky - 2 + i] = left ? sums[0][2 + i] : sums[1][2 + i];
      }
    }
  }

  const int x = t.left + lane.strip + lane.row;
#pragma unroll
  for (int row = 0; row < kWarpRows; ++row) {
    Pair* own = logits + lane.position(row) * kPositionPairs;
    float attention[2 * kKernel], dot = 0;
    const Softmax<float> normaliser = softmax<S>(attention, own, lane);
    const int y = t.top + lane.top + row;
    if (lane.column == 0 && inside(a, y, x))
      call.softmax[pixel_at(a, t, y, x) * a.heads + t.head] = normaliser;
#pragma unroll
    for (int i = 0; i < 2 * kKernel; ++i) dot += attention[i] * products[row][i];
    dot = quad_sum(dot);
#pragma unroll
    for (int i = 0; i < 2 * kKernel; ++i) attention[i] *= products[row][i] - dot;
#pragma unroll
    for (int ky = 0; ky < kKernel; ++ky)
      own[ky * kPairs + lane.pair()] = pack<S>(attention[2 * ky], attention[2 * ky + 1]);
  }
  __syncwarp();

  const int tap = lane.index, other = tap + kWarp, left_x = t.left + lane.strip;
  const int step = static_cast<int>(a.heads) * kTaps;
#pragma unroll 1
  for (int row = lane.top; row < lane.top + kWarpRows; ++row) {
    const int y = t.top + row;
    if (!row_inside(a, y)) break;
    S* to = call.grad_logits + (pixel_at(a, t, y, left_x) * a.heads + t.head) * kTaps + tap;
    const S* own = reinterpret_cast<S*>(logits + (row * kColumns + lane.strip) * kPositionPairs);
#pragma unroll
    for (int column = 0; column < kStrip; ++column) {
      const bool valid = column_inside(a, left_x + column);
      const S* numbers = own + column * 2 * kPositionPairs;
      if (valid) to[column * step] = numbers[half_slot(tap, column)];
      if (valid && other < kTaps) to[column * step + kWarp] = numbers[half_slot(other, column)];
    }
  }
}

// The band of a sum over taps in reverse order, which is the gradient of the values: attention with
// which pixels read the warp's positions.
template <typename S>
__device__ void read_readers(
    Band& band, const Softmax<float>* normalisers, const Operands<S>& a, const Tile& t,
    const Lane& lane) {
  // The lane's numbers are for two neighbouring pixels, whichever row of the image.
  const int height = static_cast<int>(a.height), width = static_cast<int>(a.width);
  int columns[2], taps[2];
  Pair valid = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int pixel = 2 * lane.column + (lane.left() ? 0 : 8) + i;
    const int x = t.left + lane.strip + pixel - kRadius, tap = pixel - lane.row;
    columns[i] = clamped(x, width);
    taps[i] = kKernel - 1 - clamped(tap, kKernel);
    if (tap == clamped(tap, kKernel) && column_inside(a, x)) valid |= 0xffffu << 16 * i;
  }
#pragma unroll
  for (int pixel_row = 0; pixel_row < kPixelRows; ++pixel_row) {
    const int y = t.top + lane.top + pixel_row - kRadius;
    const int64_t of_row = pixel_at(a, t, clamped(y, height), 0);
    const Pair mask = row_inside(a, y) ? valid : 0;
    Softmax<float> normaliser[2];
    const S* logits[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t pixel = of_row + columns[i];
      normaliser[i] = normalisers[pixel * a.heads + t.head];
      logits[i] = a.logits.data + pixel * a.logits.stride + t.head * kTaps + taps[i];
    }
#pragma unroll
    for (int row = 0; row < kWarpRows; ++row) {
      const int ky = pixel_row - row;
      if (ky < 0 || ky >= kKernel) continue;
      float attention[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float logit = number(logits[i][(kKernel - 1 - ky) * kKernel]);
        attention[i] = power(logit, normaliser[i].max) * normaliser[i].scale;
      }
      band[row][ky] = pack<S>(attention[0], attention[1]) & mask;
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads, 4) value_kernel(Backward<S> call) {
  S* tile = block_memory<S>();
  S* planes = tile + kTilePixels * kDepth;
  Pair* filter = reinterpret_cast<Pair*>(planes + kPlane * kDepth);
  const Operands<S>& a = call.operands;
  const Tile t = tile_of_block(a);
  const Lane lane;
  copy_tile<kDepth, kHaloRows<kKernel>, kTileColumns>(
      tile, call.grad, a, t, t.head * kDepth, t.top - kRadius, t.left - kRadius);
  if (a.ghost_add) load_filter<true>(filter, a, t, lane);
  Band attention;
  read_readers(attention, call.softmax, a, t, lane);
  __syncwarp();  // or the compiler waits before it reads
  wait_for_copies();
  __syncthreads();
  gather(tile, planes, filter, attention, a, t, lane, call.grad_value);
}

// Gradient of the additive filters of half a head, summed over a part of the tiles. In a product
// the first factor has the pixels of a channel, columns of the image as rows, the second the
// gradients of a strip of positions; both are summed over the tile's rows and strips. Of the pixels
// that a position thus meets, those in the band are its taps.
template <typename S>
__global__ void __launch_bounds__(kThreads, 4) ghost_kernel(Backward<S> call, int64_t tiles) {
  S* tile = block_memory<S>();
  S* grads = tile + kTilePixels * kGhostDepth;
  S* planes = grads + kGradPixels * kGhostDepth;
  S* grad_planes = planes + kPlane * kGhostDepth;
  const Operands<S>& a = call.operands;
  const Lane lane;
  const int head = blockIdx.x / kGhostHalves, block_channel = blockIdx.x * kGhostDepth;
  const int channel = lane.warp * kGhostWarpChannels;
  // Two warps turn the same 8 channels.
  const int turned = lane.warp % 2 * kChunk, part = lane.warp / 2;
  // Of a channel's pixels: columns 0 to 7 of two rows of taps, then 8 to 15; behind the former,
  // 16 to 23.
  constexpr int kRowChunks = kTileColumns / kChunk;
  const int chunk = (lane.index % 8 + lane.index / 8 % 2) * kRowChunks + lane.index / 16;
  const S* pixels_of_two = planes + channel * kPlane + (chunk ^ exchanged(channel)) * kChunk;
  const PlaneRow plane_row(lane);
  const S* pixels_of_last = planes + channel * kPlane + plane_row.offset +
                            (exchanged(channel) ? plane_row.exchange : 0) +
                            (kKernel - 1) * kTileColumns;
  // Rows of positions are two chunks, so that those of the last four rows are exchanged.
  const int strip = lane.index / 8 % 2 ^ lane.index % 8 / 4;
  const S* grad = grad_planes + (channel + lane.index / 16) * kGradPlane +
                  lane.index % 8 * kColumns + strip * kChunk;
  // A lane's positions are the columns 2 * lane.column and the next one of a strip.
  const int first = lane.row - 2 * lane.column, second = first - 1;
  float sums[kGhostWarpChannels][kKernel][2] = {};
  const int64_t begin = tiles * blockIdx.y / gridDim.y, end = tiles * (blockIdx.y + 1) / gridDim.y;
  const auto copy = [&](const Tile& t) {
    copy_tile<kGhostDepth, kHaloRows<kKernel>, kTileColumns>(
        tile, a.value, a, t, block_channel, t.top - kRadius, t.left - kRadius);
    copy_tile<kGhostDepth, kRows, kColumns>(grads, call.grad, a, t, block_channel, t.top, t.left);
  };
  int left = static_cast<int>(end - begin);
  Tile t = tile_at(a, static_cast<unsigned>(begin), head);
  if (left > 0) copy(t);
  while (left > 0) {
    wait_for_copies();
    __syncthreads();
    transpose_pixels<kGhostDepth, 2>(planes, tile, turned, part, lane);
    transpose<kGhostDepth, kGradPixels, kGradPlane, 2>(
        grad_planes, grads, turned, part, lane, [](int i) { return (i ^ i / 8 % 2) * kChunk; });
    __syncthreads();
    next_tile(t, a);
    if (--left > 0) copy(t);
#pragma unroll
    for (int two = 0; two < kGhostWarpChannels; two += 2) {
      Pair positions[4];
      load_transposed(positions, grad + two * kGradPlane);
#pragma unroll
      for (int c = two; c < two + 2; ++c) {
        const Pair upper = positions[c % 2 * 2], lower = positions[c % 2 * 2 + 1];
#pragma unroll
        for (int ky = 0; ky < kKernel - 1; ky += 2) {
          const S* from = pixels_of_two + c * kPlane + ky * kTileColumns;
          Pair near[4], right[2];
          load_transposed(near, from);
          load_transposed(right, from + 2 * kChunk);
          const Pair far[4] = {near[2], near[3], right[0], right[1]};
          float products[2][4] = {};  // of pixels 0 to 7 and 8 to 15 with positions
          multiply_add<S>(products[0], near, upper, lower);
          multiply_add<S>(products[1], far, upper, lower);
#pragma unroll
          for (int two_ky = 0; two_ky < 2; ++two_ky) {
            float (&sum)[2] = sums[c][ky + two_ky];
            sum[0] += first >= 0 ? products[0][2 * two_ky] : products[1][2 * two_ky];
            sum[1] += second >= 0 ? products[0][2 * two_ky + 1] : products[1][2 * two_ky + 1];
          }
        }
        Pair pixels[4];
        load_transposed(pixels, pixels_of_last + c * kPlane);
        float products[4] = {};
        multiply_add<S>(products, pixels, upper, lower);
        sums[c][kKernel - 1][0] += first >= 0 ? products[0] : products[2];
        sums[c][kKernel - 1][1] += second >= 0 ? products[1] : products[3];
      }
    }
  }

  // Each tap of a channel is in 8 numbers of the warp, one for each column of a strip.
  float* parts = reinterpret_cast<float*>(planes + channel * kPlane);  // [column][tap]
#pragma unroll
  for (int c = 0; c < kGhostWarpChannels; ++c) {
    __syncwarp();
#pragma unroll
    for (int ky = 0; ky < kKernel; ++ky) {
      float* out = parts + 2 * lane.column * kKernel * kTapRow + ky * kTapRow;
      out[first & 7] = sums[c][ky][0];
      out[kKernel * kTapRow + (second & 7)] = sums[c][ky][1];
    }
    __syncwarp();
    for (int o = lane.index; o < kTaps; o += kWarp) {
      float total = 0;
      for (int column = 0; column < kStrip; ++column)
        total += parts[column * kKernel * kTapRow + slot<kKernel>(o)];
      call.add_parts[(blockIdx.y * kTaps + o) * a.heads * kDepth + block_channel + channel + c] =
          total;
    }
  }
}

}  // namespace
}  // namespace tiles

int64_t shared_bytes_k7_matrix() {
  return std::max({tiles::kGatherBytes, tiles::kLogitsBytes, tiles::kGhostBytes});
}

template <typename S>
bool has_k7_matrix() {
  static Answers<int, bool> answers;
  return answers.get(current_device(), [] {
    cudaFuncAttributes attributes;
    STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, tiles::forward_kernel<S>));
    return attributes.ptxVersion >= 80;
  });
}

template <typename S>
void forward_k7_matrix(const Forward<S>& call, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(tiles::tile_count(call.operands)));
  launch(tiles::forward_kernel<S>, blocks, tiles::kThreads, tiles::kGatherBytes, stream, call);
}

template <typename S>
void backward_k7_matrix(const Backward<S>& call, cudaStream_t stream) {
  const Operands<S>& a = call.operands;
  const int64_t tiles = tiles::tile_count(a);
  const dim3 blocks(static_cast<unsigned>(tiles));
  launch(tiles::logits_kernel<S>, blocks, tiles::kThreads, tiles::kLogitsBytes, stream, call);
  launch(tiles::value_kernel<S>, blocks, tiles::kThreads, tiles::kGatherBytes, stream, call);
  if (!call.grad_add) return;
  launch(
      tiles::ghost_kernel<S>,
      dim3(static_cast<unsigned>(a.heads * tiles::kGhostHalves), static_cast<unsigned>(call.parts)),
      tiles::kThreads, tiles::kGhostBytes, stream, call, tiles / a.heads);
  launch_sum_parts(call, stream);
}

#define ELSA_INSTANTIATE(S)                                         \
  template bool has_k7_matrix<S>();                                 \
  template void forward_k7_matrix(const Forward<S>&, cudaStream_t); \
  template void backward_k7_matrix(const Backward<S>&, cudaStream_t);
ELSA_INSTANTIATE(__half)
ELSA_INSTANTIATE(__nv_bfloat16)
#undef ELSA_INSTANTIATE

}  // namespace elsa::cuda
