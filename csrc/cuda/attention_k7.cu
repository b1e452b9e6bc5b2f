// Kernels for K = 7, 32 channels per head, dilation 1 and no multiplicative filter, as in all
// published models.
#include <algorithm>

#include "attention_k7.cuh"

namespace elsa::cuda {
namespace k7 {
namespace {

// Parts of a block's shared memory, in bytes; each a multiple of 16.
constexpr int64_t kWeightBytes = kWeights * sizeof(float);
constexpr int64_t kFilterBytes = kFilter * sizeof(float);
template <typename S>
constexpr int64_t kGatherBytes =
    kWeightBytes + kFilterBytes + int64_t{kHaloRows} * kGatherPitch<S> * sizeof(S);
template <typename S>
constexpr int64_t kLogitsBytes =
    kWeightBytes + (int64_t{kHaloRows} * kValuePitch<S> + int64_t{kRows} * kGradPitch<S>)*sizeof(S);
constexpr int64_t kGhostBytes = int64_t{kWarps} * kTaps * kDepth * sizeof(float);
static_assert(kWeightBytes % 16 == 0 && kFilterBytes % 16 == 0);
static_assert(kValuePitch<__half> % 8 == 0 && kGatherPitch<__half> % 8 == 0);

template <typename S>
__global__ void __launch_bounds__(kThreads) forward_kernel(Forward<S> call) {
  float* weights = block_memory<float>();
  float* filter = weights + kWeights;
  S* values = reinterpret_cast<S*>(filter + kFilter);
  const Operands<S>& a = call.operands;
  const Tile t = tile_of_block(a);
  load_tile<kHaloRows, kHaloColumns, kGatherPitch<S>>(
      values, a.value, a, t, t.top - kRadius, t.left - kRadius);
  load_logits(weights, a, t);
  load_filter<false>(filter, a, t);
  __syncthreads();
  {
    float* own = weights + weights_at(threadIdx.x / kColumns, threadIdx.x % kColumns);
    float taps[kTaps];
    read_taps(taps, own);
    softmax(taps);
    write_taps(own, taps);
  }
  __syncthreads();
  gather(values, weights, filter, a, t, call.out);
}

// Gradient of the logits, and the softmax for the kernel that follows. For the products over
// channels a thread has all taps of one row of the kernel, for a strip of positions.
template <typename S>
__global__ void __launch_bounds__(kThreads) logits_kernel(Backward<S> call) {
  float* weights = block_memory<float>();
  S* values = reinterpret_cast<S*>(weights + kWeights);
  S* grads = values + kHaloRows * kValuePitch<S>;
  const Operands<S>& a = call.operands;
  const Tile t = tile_of_block(a);
  load_tile<kHaloRows, kHaloColumns, kValuePitch<S>>(
      values, a.value, a, t, t.top - kRadius, t.left - kRadius);
  load_tile<kRows, kColumns, kGradPitch<S>>(grads, call.grad, a, t, t.top, t.left);
  load_logits(weights, a, t);
  __syncthreads();

  // 7 * 16 threads have work here, the last 16 have none.
  const int row = threadIdx.x % kRows, left = threadIdx.x / kRows % 2 * kStrip;
  const int ky = threadIdx.x / (2 * kRows);
  float products[kStrip][kKernel] = {};
  if (ky < kKernel) {
    const S* value = values + (row + ky) * kValuePitch<S> + left * kDepth;
    const S* grad = grads + row * kGradPitch<S> + left * kDepth;
#pragma unroll 1
    for (int channel = 0; channel < kDepth; channel += 4) {
      float4 pixels[kWindow];
#pragma unroll
      for (int i = 0; i < kWindow; ++i) pixels[i] = load4(value + i * kDepth + channel);
#pragma unroll
      for (int i = 0; i < kStrip; ++i) {
        const float4 g = load4(grad + i * kDepth + channel);
#pragma unroll
        for (int kx = 0; kx < kKernel; ++kx) {
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
  float* own = weights + weights_at(own_row, own_column);
  float attention[kTaps];
  read_taps(attention, own);
  const Softmax<float> normaliser = softmax(attention);
  if (inside(a, t.top + own_row, t.left + own_column))
    call.softmax[pixel_at(a, t, t.top + own_row, t.left + own_column) * a.heads + t.head] =
        normaliser;
  __syncthreads();
  if (ky < kKernel) {
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      const float* row_products = products[i];
      float* to = weights + weights_at(row, left + i) + ky * kTapRow;
      store4(to, {row_products[0], row_products[1], row_products[2], row_products[3]});
      store4(to + 4, {row_products[4], row_products[5], row_products[6], 0.0f});
    }
  }
  __syncthreads();
  {
    float grad_attention[kTaps], dot = 0;
    read_taps(grad_attention, own);
#pragma unroll
    for (int o = 0; o < kTaps; ++o) dot += attention[o] * grad_attention[o];
#pragma unroll
    for (int o = 0; o < kTaps; ++o) attention[o] *= grad_attention[o] - dot;
    write_taps(own, attention);
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
      const float* from = weights + weights_at(tile_row, column);
      store(to + lane, from[slot(lane)]);
      if (other < kTaps) store(to + other, from[slot(other)]);
    }
  }
}

// Attention with which the positions around the tile's positions q read them, sorted by q: the
// weights of a sum over taps in reverse order, which is the gradient of the values. A quarter of a
// warp reads one row of taps of a position p.
template <typename S>
__device__ void load_readers(
    float* weights, const Softmax<float>* normalisers, const Operands<S>& a, const Tile& t) {
  constexpr int kQuarters = kWarp / 8, kSteps = (kHaloColumns + kQuarters - 1) / kQuarters;
  const int kx = threadIdx.x % 8, quarter = threadIdx.x % kWarp / 8;
  if (kx == kKernel) return;
  const int height = static_cast<int>(a.height), width = static_cast<int>(a.width);
#pragma unroll 1
  for (int i = threadIdx.x / kWarp; i < kKernel * kRows; i += kWarps) {
    const int ky = i / kRows, row = i % kRows, tap = ky * kKernel + kx;
    const int y = t.top + row - (ky - kRadius);
    const int64_t first = pixel_at(a, t, clamped(y, height), 0);
    const S* of_row = a.logits.data + first * a.logits.stride + t.head * kTaps + tap;
    const Softmax<float>* normalisers_of_row = normalisers + first * a.heads + t.head;
    float* out = weights + weights_at(row, 0) + slot(kTaps - 1 - tap);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int from = step * kQuarters + quarter, column = from - 2 * kRadius + kx;
      const int x = t.left - kRadius + from, pixel = clamped(x, width);
      const Softmax<float> normaliser = normalisers_of_row[pixel * a.heads];
      const float attention =
          power(number(*taps_at(a, of_row, pixel)), normaliser.max) * normaliser.scale;
      if (static_cast<unsigned>(column) < static_cast<unsigned>(kColumns))
        out[column * kWeightPitch] = inside(a, y, x) ? attention : 0.0f;
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads) value_kernel(Backward<S> call) {
  float* weights = block_memory<float>();
  float* filter = weights + kWeights;
  S* grads = reinterpret_cast<S*>(filter + kFilter);
  const Operands<S>& a = call.operands;
  const Tile t = tile_of_block(a);
  load_tile<kHaloRows, kHaloColumns, kGatherPitch<S>>(
      grads, call.grad, a, t, t.top - kRadius, t.left - kRadius);
  load_readers(weights, call.softmax, a, t);
  load_filter<true>(filter, a, t);
  __syncthreads();
  gather(grads, weights, filter, a, t, call.grad_value);
}

// Adds an image row's part to a channel's gradient of the filter. A window of 7 x 7 values moves
// along in registers, with the next column, which is read a step ahead. Border: the window leaves
// the map above or below.
template <bool Border, typename S>
__device__ void add_row(
    float (&sum)[kKernel][kKernel], const S* value, const S* grad, int y, const Backward<S>& call) {
  constexpr int kColumnsHeld = kKernel + 1;
  const Operands<S>& a = call.operands;
  const int width = static_cast<int>(a.width), height = static_cast<int>(a.height);
  const int value_step = static_cast<int>(a.value.stride);
  const int grad_step = static_cast<int>(call.grad.stride);
  const S* rows[kKernel];
#pragma unroll
  for (int ky = 0; ky < kKernel; ++ky) {
    const int row = y + ky - kRadius;
    rows[ky] = value + ((Border ? clamped(row, height) : row) - y) * a.width * a.value.stride;
  }
  const auto read_column = [&](float (&column)[kKernel], int x) {
#pragma unroll
    for (int ky = 0; ky < kKernel; ++ky) {
      column[ky] = 0;
      if (x < width && (!Border || row_inside(a, y + ky - kRadius)))
        column[ky] = number(rows[ky][static_cast<int64_t>(x) * value_step]);
    }
  };
  // Column x + kx - 3 is in slot (x + kx) % 8.
  float window[kColumnsHeld][kKernel] = {};
#pragma unroll
  for (int column = 0; column <= kRadius; ++column) read_column(window[column + kRadius], column);
  float next_grad = number(*grad);
#pragma unroll 1
  for (int x = 0; x < width;) {
#pragma unroll
    for (int step = 0; step < kColumnsHeld; ++step) {
      if (x == width) break;
      const float g = next_grad;
      read_column(window[(step + kKernel) % kColumnsHeld], x + kRadius + 1);
      ++x;
      next_grad = x < width ? number(grad[static_cast<int64_t>(x) * grad_step]) : 0.0f;
#pragma unroll
      for (int kx = 0; kx < kKernel; ++kx)
#pragma unroll
        for (int ky = 0; ky < kKernel; ++ky)
          sum[ky][kx] += g * window[(step + kx) % kColumnsHeld][ky];
    }
  }
}

// Gradient of the additive filters, summed over a part of the image rows. A lane has a channel, a
// warp one row after the other.
template <typename S>
__global__ void __launch_bounds__(kThreads, 3) ghost_kernel(Backward<S> call, int64_t rows_a_part) {
  float* sums = block_memory<float>();  // [warp][tap][channel]
  const Operands<S>& a = call.operands;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t head = blockIdx.x, rows = a.batch * a.height;
  const int64_t begin = blockIdx.y * rows_a_part;
  const int64_t end = begin + rows_a_part < rows ? begin + rows_a_part : rows;
  float sum[kKernel][kKernel] = {};
  for (int64_t row = begin + warp; row < end; row += kWarps) {
    const S* grad = call.grad.data + row * a.width * call.grad.stride + head * kDepth + lane;
    const S* value = a.value.data + row * a.width * a.value.stride + head * kDepth + lane;
    const int y = static_cast<int>(row % a.height);
    if (y >= kRadius && y + kRadius < a.height)
      add_row<false>(sum, value, grad, y, call);
    else
      add_row<true>(sum, value, grad, y, call);
  }
#pragma unroll
  for (int o = 0; o < kTaps; ++o)
    sums[(warp * kTaps + o) * kDepth + lane] = sum[o / kKernel][o % kKernel];
  __syncthreads();
  for (int o = warp; o < kTaps; o += kWarps) {
    float total = 0;
    for (int i = 0; i < kWarps; ++i) total += sums[(i * kTaps + o) * kDepth + lane];
    call.add_parts[((blockIdx.y * kTaps + o) * a.heads + head) * kDepth + lane] = total;
  }
}

}  // namespace
}  // namespace k7

template <typename S>
int64_t shared_bytes_k7() {
  return std::max({k7::kGatherBytes<S>, k7::kLogitsBytes<S>, k7::kGhostBytes});
}

template <typename S>
void forward_k7(const Forward<S>& call, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(k7::tile_count(call.operands)));
  launch(k7::forward_kernel<S>, blocks, k7::kThreads, k7::kGatherBytes<S>, stream, call);
}

int64_t ghost_parts_k7(int64_t rows) {
  return std::clamp<int64_t>((rows + k7::kWarps - 1) / k7::kWarps, 1, 128);
}

template <typename S>
void backward_k7(const Backward<S>& call, cudaStream_t stream) {
  const Operands<S>& a = call.operands;
  const dim3 blocks(static_cast<unsigned>(k7::tile_count(a)));
  launch(k7::logits_kernel<S>, blocks, k7::kThreads, k7::kLogitsBytes<S>, stream, call);
  launch(k7::value_kernel<S>, blocks, k7::kThreads, k7::kGatherBytes<S>, stream, call);
  if (!call.grad_add) return;
  const int64_t rows = a.batch * a.height;
  launch(
      k7::ghost_kernel<S>, dim3(static_cast<unsigned>(a.heads), static_cast<unsigned>(call.parts)),
      k7::kThreads, k7::kGhostBytes, stream, call, (rows + call.parts - 1) / call.parts);
  launch_sum_parts(call, stream);
}

#define ELSA_INSTANTIATE(S)                                    \
  template void forward_k7(const Forward<S>&, cudaStream_t);   \
  template void backward_k7(const Backward<S>&, cudaStream_t); \
  template int64_t shared_bytes_k7<S>();
ELSA_INSTANTIATE(float)
ELSA_INSTANTIATE(__half)
ELSA_INSTANTIATE(__nv_bfloat16)
#undef ELSA_INSTANTIATE

}  // namespace elsa::cuda
