// Kernels for 32 channels per head and dilation 1: K = 7 without multiplicative filters, as in
// ELSA-Swin, and K = 5 with any filters, as in ELSA-VOLO.
#include <algorithm>
#include <type_traits>

#include "attention_tiles.cuh"

namespace elsa::cuda {
namespace tiles {
namespace {

// Parts of a block's shared memory, in bytes; each a multiple of 16.
template <int K>
constexpr int64_t kWeightBytes = kWeights<K> * sizeof(float);
template <int K>
constexpr int kFilters = kFilter<K> * (kMultiplies<K> ? 2 : 1);
template <int K>
constexpr int kFactors = kMultiplies<K> ? kFilter<K> : 0;
template <int K, typename S>
constexpr int64_t kGatherBytes = kWeightBytes<K> + kFilters<K> * sizeof(float) +
                                 int64_t{kHaloRows<K>} * kGatherPitch<K, S> * sizeof(S);
template <int K, typename S>
constexpr int64_t kLogitsBytes =
    kWeightBytes<K> + kFactors<K> * sizeof(float) +
    (int64_t{kHaloRows<K>} * kValuePitch<K, S> + int64_t{kRows} * kGradPitch<S>)*sizeof(S);
template <int K>
constexpr int64_t kGhostBytes = int64_t{kWarps} * K * K * kDepth * sizeof(float);
template <int K>
constexpr bool kAligned = kWeightBytes<K> % 16 == 0 && kFilter<K> % 4 == 0 &&
                          kValuePitch<K, __half> % 8 == 0 && kGatherPitch<K, __half> % 8 == 0;
static_assert(kAligned<5> && kAligned<7>);

template <int K, typename S>
__global__ void __launch_bounds__(kThreads) forward_kernel(Forward<S> call) {
  float* weights = block_memory<float>();
  float* filters = weights + kWeights<K>;
  S* values = reinterpret_cast<S*>(filters + kFilters<K>);
  const Operands<S>& a = call.operands;
  const Tile t = tile_of_block(a);
  load_tile<kHaloRows<K>, kHaloColumns<K>, kGatherPitch<K, S>>(
      values, a.value, a, t, t.top - K / 2, t.left - K / 2);
  load_logits<K>(weights, a, t);
  load_filters<K, false>(filters, a, t);
  __syncthreads();
  {
    float* own = weights + weights_at<K>(threadIdx.x / kColumns, threadIdx.x % kColumns);
    float taps[K * K];
    read_taps<K>(taps, own);
    softmax(taps);
    write_taps<K>(own, taps);
  }
  __syncthreads();
  gather<K>(values, weights, filters, a, t, call.out);
}

// Gradient of the logits, and the softmax for the kernel that follows. For the products over
// channels a thread has all taps of one row of the kernel, for a strip of positions.
template <int K, typename S>
__global__ void __launch_bounds__(kThreads) logits_kernel(Backward<S> call) {
  constexpr int kTaps = K * K;
  float* weights = block_memory<float>();
  float* factors = weights + kWeights<K>;
  S* values = reinterpret_cast<S*>(factors + kFactors<K>);
  S* grads = values + kHaloRows<K> * kValuePitch<K, S>;
  const Operands<S>& a = call.operands;
  const Tile t = tile_of_block(a);
  load_tile<kHaloRows<K>, kHaloColumns<K>, kValuePitch<K, S>>(
      values, a.value, a, t, t.top - K / 2, t.left - K / 2);
  load_tile<kRows, kColumns, kGradPitch<S>>(grads, call.grad, a, t, t.top, t.left);
  load_logits<K>(weights, a, t);
  if constexpr (kMultiplies<K>) load_filter<K, false>(factors, a.ghost_mul, 1.0f, t);
  __syncthreads();

  // K * 16 threads have work here, the others have none.
  const int row = threadIdx.x % kRows, left = threadIdx.x / kRows % 2 * kStrip;
  const int ky = threadIdx.x / (2 * kRows);
  float products[kStrip][K] = {};
  if (ky < K) {
    const S* value = values + (row + ky) * kValuePitch<K, S> + left * kDepth;
    const S* grad = grads + row * kGradPitch<S> + left * kDepth;
    const float* factor = factors + ky * K * kFilterPitch;
#pragma unroll 1
    for (int channel = 0; channel < kDepth; channel += 4) {
      float4 pixels[kWindow<K>], multiply[K];
#pragma unroll
      for (int i = 0; i < kWindow<K>; ++i) pixels[i] = load4(value + i * kDepth + channel);
#pragma unroll
      for (int kx = 0; kx < K; ++kx)
        if constexpr (kMultiplies<K>) multiply[kx] = load4(factor + kx * kFilterPitch + channel);
#pragma unroll
      for (int i = 0; i < kStrip; ++i) {
        const float4 upstream = load4(grad + i * kDepth + channel);
#pragma unroll
        for (int kx = 0; kx < K; ++kx) {
          float4 g = upstream;
          if constexpr (kMultiplies<K>) {
            g.x *= multiply[kx].x;
            g.y *= multiply[kx].y;
            g.z *= multiply[kx].z;
            g.w *= multiply[kx].w;
          }
          const float4& v = pixels[i + kx];
          float& product = products[i][kx];
          product += g.x * v.x;
          product += g.y * v.y;
          product += g.z * v.z;
          product += g.w * v.w;
        }
      }
    }
  }

  // From here on a thread has one position; its logits make room for its products.
  const int own_row = threadIdx.x / kColumns, own_column = threadIdx.x % kColumns;
  float* own = weights + weights_at<K>(own_row, own_column);
  float attention[kTaps];
  read_taps<K>(attention, own);
  const Softmax<float> normaliser = softmax(attention);
  if (inside(a, t.top + own_row, t.left + own_column))
    call.softmax[pixel_at(a, t, t.top + own_row, t.left + own_column) * a.heads + t.head] =
        normaliser;
  __syncthreads();
  if (ky < K) {
#pragma unroll
    for (int i = 0; i < kStrip; ++i)
      write_row<K>(weights + weights_at<K>(row, left + i) + ky * kTapRow, products[i]);
  }
  __syncthreads();
  {
    float grad_attention[kTaps], dot = 0;
    read_taps<K>(grad_attention, own);
#pragma unroll
    for (int o = 0; o < kTaps; ++o) dot += attention[o] * grad_attention[o];
#pragma unroll
    for (int o = 0; o < kTaps; ++o) attention[o] *= grad_attention[o] - dot;
    write_taps<K>(own, attention);
  }
  __syncthreads();

  const int lane = threadIdx.x % kWarp, other = lane + kWarp;
  for (int tile_row = threadIdx.x / kWarp; tile_row < kRows; tile_row += kWarps) {
    if (!row_inside(a, t.top + tile_row)) break;
    const int64_t first = pixel_at(a, t, t.top + tile_row, t.left);
    S* to = call.grad_logits + (first * a.heads + t.head) * kTaps;
#pragma unroll 8
    for (int column = 0; column < kColumns; ++column, to += a.heads * kTaps) {
      if (!column_inside(a, t.left + column)) break;
      const float* from = weights + weights_at<K>(tile_row, column);
      if (lane < kTaps) store(to + lane, from[slot<K>(lane)]);
      if (other < kTaps) store(to + other, from[slot<K>(other)]);
    }
  }
}

// Attention with which the positions around the tile's positions q read them, sorted by q: the
// weights of a sum over taps in reverse order, which is the gradient of the values. A quarter of a
// warp reads one row of taps of a position p.
template <int K, typename S>
__device__ void load_readers(
    float* weights, const Softmax<float>* normalisers, const Operands<S>& a, const Tile& t) {
  constexpr int kQuarters = kWarp / 8, kSteps = (kHaloColumns<K> + kQuarters - 1) / kQuarters;
  constexpr int kRadius = K / 2, kTaps = K * K;
  const int kx = threadIdx.x % 8, quarter = threadIdx.x % kWarp / 8;
  if (kx >= K) return;
  const int height = static_cast<int>(a.height), width = static_cast<int>(a.width);
#pragma unroll 1
  for (int i = threadIdx.x / kWarp; i < K * kRows; i += kWarps) {
    const int ky = i / kRows, row = i % kRows, tap = ky * K + kx;
    const int y = t.top + row - (ky - kRadius);
    const int64_t first = pixel_at(a, t, clamped(y, height), 0);
    const S* of_row = a.logits.data + first * a.logits.stride + t.head * kTaps + tap;
    const Softmax<float>* normalisers_of_row = normalisers + first * a.heads + t.head;
    float* out = weights + weights_at<K>(row, 0) + slot<K>(kTaps - 1 - tap);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int from = step * kQuarters + quarter, column = from - 2 * kRadius + kx;
      const int x = t.left - kRadius + from, pixel = clamped(x, width);
      const Softmax<float> normaliser = normalisers_of_row[pixel * a.heads];
      const float attention =
          power(number(*taps_at(a, of_row, pixel)), normaliser.max) * normaliser.scale;
      if (static_cast<unsigned>(column) < static_cast<unsigned>(kColumns))
        out[column * kWeightPitch<K>] = inside(a, y, x) ? attention : 0.0f;
    }
  }
}

template <int K, typename S>
__global__ void __launch_bounds__(kThreads) value_kernel(Backward<S> call) {
  float* weights = block_memory<float>();
  float* filters = weights + kWeights<K>;
  S* grads = reinterpret_cast<S*>(filters + kFilters<K>);
  const Operands<S>& a = call.operands;
  const Tile t = tile_of_block(a);
  load_tile<kHaloRows<K>, kHaloColumns<K>, kGatherPitch<K, S>>(
      grads, call.grad, a, t, t.top - K / 2, t.left - K / 2);
  load_readers<K>(weights, call.softmax, a, t);
  load_filters<K, true>(filters, a, t);
  __syncthreads();
  gather<K>(grads, weights, filters, a, t, call.grad_value);
}

// The attention of an image row's positions: a lane finds that of one tap, and all read it.
template <int K, typename S>
struct RowAttention {
  const S* logits;
  const Softmax<float>* normalisers;
  float* shared;  // of this warp: two positions take turns

  __device__ RowAttention(const Backward<S>& call, int64_t row, int64_t head, float* shared)
      : logits(
            call.operands.logits.data + row * call.operands.width * call.operands.logits.stride +
            head * K * K + threadIdx.x % kWarp),
        normalisers(call.softmax + row * call.operands.width * call.operands.heads + head),
        shared(shared) {}
  // The taps of a position, in rows of kTapRow numbers.
  __device__ const float* at(int x, const Operands<S>& a) const {
    const int lane = threadIdx.x % kWarp;
    float* taps = shared + x % 2 * K * kTapRow;
    if (lane < K * K) {
      const Softmax<float> normaliser = normalisers[static_cast<int64_t>(x) * a.heads];
      taps[slot<K>(lane)] =
          power(number(*taps_at(a, logits, x)), normaliser.max) * normaliser.scale;
    }
    __syncwarp();
    return taps;
  }
};

// Gradients of a channel's filters: of the additive one, and of the multiplicative one.
template <int K>
struct FilterSums {
  float add[K][K] = {}, mul[K][K] = {};
};

// Adds an image row's part to a channel's gradients of the filters. A window of K x K values moves
// along in registers, with the next column, which is read a step ahead. Border: the window leaves
// the map above or below.
template <bool Border, int K, typename S>
__device__ void add_row(
    FilterSums<K>& sums, const S* value, const S* grad, const RowAttention<K, S>& attention, int y,
    const Backward<S>& call) {
  constexpr int kColumnsHeld = K + 1, kRadius = K / 2;
  const Operands<S>& a = call.operands;
  const int width = static_cast<int>(a.width), height = static_cast<int>(a.height);
  const int value_step = static_cast<int>(a.value.stride);
  const int grad_step = static_cast<int>(call.grad.stride);
  const S* rows[K];
#pragma unroll
  for (int ky = 0; ky < K; ++ky) {
    const int row = y + ky - kRadius;
    rows[ky] = value + ((Border ? clamped(row, height) : row) - y) * a.width * a.value.stride;
  }
  const auto read_column = [&](float (&column)[K], int x) {
#pragma unroll
    for (int ky = 0; ky < K; ++ky) {
      column[ky] = 0;
      if (x < width && (!Border || row_inside(a, y + ky - kRadius)))
        column[ky] = number(rows[ky][static_cast<int64_t>(x) * value_step]);
    }
  };
  // Column x + kx - kRadius is in slot (x + kx) % kColumnsHeld.
  float window[kColumnsHeld][K] = {};
#pragma unroll
  for (int column = 0; column <= kRadius; ++column) read_column(window[column + kRadius], column);
  float next_grad = number(*grad);
#pragma unroll 1
  for (int x = 0; x < width;) {
#pragma unroll
    for (int step = 0; step < kColumnsHeld; ++step) {
      if (x == width) break;
      const float g = next_grad;
      const float* taps = nullptr;
      if constexpr (kMultiplies<K>) taps = attention.at(x, a);
      read_column(window[(step + K) % kColumnsHeld], x + kRadius + 1);
      ++x;
      next_grad = x < width ? number(grad[static_cast<int64_t>(x) * grad_step]) : 0.0f;
#pragma unroll
      for (int ky = 0; ky < K; ++ky) {
        float row[kTapRow];
        if constexpr (kMultiplies<K>) read_row(row, taps + ky * kTapRow);
#pragma unroll
        for (int kx = 0; kx < K; ++kx) {
          const float product = g * window[(step + kx) % kColumnsHeld][ky];
          sums.add[ky][kx] += product;
          if constexpr (kMultiplies<K>) sums.mul[ky][kx] += row[kx] * product;
        }
      }
    }
  }
}

// Gradients of the filters, summed over a part of the image rows. A lane has a channel, a warp one
// row after the other.
template <int K, typename S>
__global__ void __launch_bounds__(kThreads, kMultiplies<K> ? 2 : 3)
    ghost_kernel(Backward<S> call, int64_t rows_a_part) {
  constexpr int kRadius = K / 2, kTaps = K * K;
  float* shared = block_memory<float>();  // [warp][tap][channel]
  const Operands<S>& a = call.operands;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t head = blockIdx.x, rows = a.batch * a.height;
  const int64_t begin = blockIdx.y * rows_a_part;
  const int64_t end = begin + rows_a_part < rows ? begin + rows_a_part : rows;
  FilterSums<K> sums;
  for (int64_t row = begin + warp; row < end; row += kWarps) {
    const S* grad = call.grad.data + row * a.width * call.grad.stride + head * kDepth + lane;
    const S* value = a.value.data + row * a.width * a.value.stride + head * kDepth + lane;
    const RowAttention<K, S> attention(call, row, head, shared + warp * kTaps * kDepth);
    const int y = static_cast<int>(row % a.height);
    if (y >= kRadius && y + kRadius < a.height)
      add_row<false>(sums, value, grad, attention, y, call);
    else
      add_row<true>(sums, value, grad, attention, y, call);
  }
  const auto write = [&](const float (&sum)[K][K], float* parts) {
    __syncthreads();
#pragma unroll
    for (int o = 0; o < kTaps; ++o) shared[(warp * kTaps + o) * kDepth + lane] = sum[o / K][o % K];
    __syncthreads();
    for (int o = warp; o < kTaps; o += kWarps) {
      float total = 0;
      for (int i = 0; i < kWarps; ++i) total += shared[(i * kTaps + o) * kDepth + lane];
      parts[((blockIdx.y * kTaps + o) * a.heads + head) * kDepth + lane] = total;
    }
  };
  if (call.add_parts) write(sums.add, call.add_parts);
  if (kMultiplies<K> && call.mul_parts) write(sums.mul, call.mul_parts);
}

// Calls body with the kernel size as a constant.
template <typename Body>
void with_kernel(int kernel, const Body& body) {
  if (kernel == 5) return body(std::integral_constant<int, 5>());
  body(std::integral_constant<int, 7>());
}

}  // namespace
}  // namespace tiles

template <typename S>
int64_t shared_bytes_tiles(int64_t kernel) {
  int64_t most = 0;
  tiles::with_kernel(static_cast<int>(kernel), [&](auto k) {
    most = std::max({tiles::kGatherBytes<k, S>, tiles::kLogitsBytes<k, S>, tiles::kGhostBytes<k>});
  });
  return most;
}

template <typename S>
void forward_tiles(const Forward<S>& call, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(tiles::tile_count(call.operands)));
  tiles::with_kernel(call.operands.kernel, [&](auto k) {
    launch(
        tiles::forward_kernel<k, S>, blocks, tiles::kThreads, tiles::kGatherBytes<k, S>, stream,
        call);
  });
}

int64_t ghost_parts_tiles(int64_t rows) {
  return std::clamp<int64_t>((rows + tiles::kWarps - 1) / tiles::kWarps, 1, 128);
}

template <typename S>
void backward_tiles(const Backward<S>& call, cudaStream_t stream) {
  const Operands<S>& a = call.operands;
  const dim3 blocks(static_cast<unsigned>(tiles::tile_count(a)));
  const dim3 parts(static_cast<unsigned>(a.heads), static_cast<unsigned>(call.parts));
  const int64_t rows_a_part = (a.batch * a.height + call.parts - 1) / call.parts;
  tiles::with_kernel(a.kernel, [&](auto k) {
    launch(
        tiles::logits_kernel<k, S>, blocks, tiles::kThreads, tiles::kLogitsBytes<k, S>, stream,
        call);
    launch(
        tiles::value_kernel<k, S>, blocks, tiles::kThreads, tiles::kGatherBytes<k, S>, stream,
        call);
    if (!call.grad_add && !call.grad_mul) return;
    launch(
        tiles::ghost_kernel<k, S>, parts, tiles::kThreads, tiles::kGhostBytes<k>, stream, call,
        rows_a_part);
  });
  launch_sum_parts(call, stream);
}

#define ELSA_INSTANTIATE(S)                                       \
  template void forward_tiles(const Forward<S>&, cudaStream_t);   \
  template void backward_tiles(const Backward<S>&, cudaStream_t); \
  template int64_t shared_bytes_tiles<S>(int64_t);
ELSA_INSTANTIATE(float)
ELSA_INSTANTIATE(__half)
ELSA_INSTANTIATE(__nv_bfloat16)
#undef ELSA_INSTANTIATE

}  // namespace elsa::cuda
