// Kernels for any number of channels per head, kernel size and dilation: a warp for each position
// and head, values straight from the caches.
#include <algorithm>
#include <cmath>

#include "device.cuh"

namespace elsa::cuda {
namespace {

constexpr int kMostWarps = 4;
constexpr int kSharedBytes = 48 * 1024;  // of a block, on any device
constexpr int64_t kMostBlocks = 1 << 30;
constexpr int kGhostThreads = 128;

static_assert(kLargestKernel * kLargestKernel * sizeof(double) <= kSharedBytes);

// The softmax of `taps` logits, by all lanes of a warp.
template <typename T, typename S>
__device__ Softmax<T> softmax(const S* logits, int taps, int lane) {
  T max = -INFINITY;
  for (int o = lane; o < taps; o += kWarp) {
    const T logit = number(logits[o]);
    max = logit > max ? logit : max;
  }
  max = warp_max(max);
  T sum = 0;
  for (int o = lane; o < taps; o += kWarp) sum += exponential(number(logits[o]) - max);
  return {max, 1 / warp_sum(sum)};
}

template <typename T, typename S>
__device__ T attention_of(const Softmax<T>& softmax, S logit) {
  return exponential(number(logit) - softmax.max) * softmax.scale;
}

// The pixel that a tap reads from a place, or with sign -1 the one that it reads the place from;
// false where that is outside of the map.
template <typename S>
__device__ bool tap_pixel(
    const Operands<S>& a, const Place& at, int ky, int kx, int sign, int64_t* pixel) {
  const int64_t dy = sign * (ky - a.kernel / 2) * a.dilation;
  const int64_t dx = sign * (kx - a.kernel / 2) * a.dilation;
  *pixel = at.pixel + dy * a.width + dx;
  return at.y + dy >= 0 && at.y + dy < a.height && at.x + dx >= 0 && at.x + dx < a.width;
}

// Filter of a channel at one tap, times the attention where it is multiplicative.
template <typename T, typename S>
__device__ T weight_of(const Operands<S>& a, T attention, int64_t filter) {
  if (a.ghost_mul) attention *= number(a.ghost_mul[filter]);
  if (a.ghost_add) attention += number(a.ghost_add[filter]);
  return attention;
}

// The block's shared memory: `taps` numbers for each warp.
template <typename T>
__device__ T* warp_memory(int taps) {
  return block_memory<T>() + threadIdx.x / kWarp * taps;
}

// Calls body(place, lane) for this warp's share of all positions and heads.
template <typename S, typename Body>
__device__ void for_places(const Operands<S>& a, const Body& body) {
  const int warps = blockDim.x / kWarp;
  const int64_t items = a.batch * a.height * a.width * a.heads;
  const int64_t step = static_cast<int64_t>(gridDim.x) * warps;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / kWarp; item < items;
       item += step)
    body(place(a, item), static_cast<int>(threadIdx.x % kWarp));
}

template <typename S>
__global__ void forward_kernel(Forward<S> call) {
  using T = Arithmetic<S>;
  const Operands<S>& a = call.operands;
  const int taps = a.kernel * a.kernel;
  T* attention = warp_memory<T>(taps);
  for_places(a, [&](const Place& at, int lane) {
    const S* logits = a.logits.data + at.pixel * a.logits.stride + at.head * taps;
    const Softmax<T> normaliser = softmax<T>(logits, taps, lane);
    __syncwarp();  // all lanes have read the attention of the place before
    for (int o = lane; o < taps; o += kWarp) attention[o] = attention_of(normaliser, logits[o]);
    __syncwarp();
    for (int c = lane; c < a.depth; c += kWarp) {
      const int64_t channel = static_cast<int64_t>(at.head) * a.depth + c;
      T sum = 0;
      for (int ky = 0, o = 0; ky < a.kernel; ++ky)
        for (int kx = 0; kx < a.kernel; ++kx, ++o) {
          int64_t pixel;
          if (tap_pixel(a, at, ky, kx, 1, &pixel))
            sum += weight_of(a, attention[o], channel * taps + o) *
                   number(a.value.data[pixel * a.value.stride + channel]);
        }
      store(call.out + at.pixel * a.heads * a.depth + channel, sum);
    }
  });
}

// Gradient of the logits, and the softmax for the kernels that follow.
template <typename S>
__global__ void logits_kernel(Backward<S> call) {
  using T = Arithmetic<S>;
  const Operands<S>& a = call.operands;
  const int taps = a.kernel * a.kernel;
  T* products = warp_memory<T>(taps);  // lanes keep to their own
  for_places(a, [&](const Place& at, int lane) {
    const S* logits = a.logits.data + at.pixel * a.logits.stride + at.head * taps;
    const int64_t first = static_cast<int64_t>(at.head) * a.depth;
    const S* grad = call.grad.data + at.pixel * call.grad.stride + first;
    const Softmax<T> normaliser = softmax<T>(logits, taps, lane);
    if (lane == 0) call.softmax[at.pixel * a.heads + at.head] = normaliser;
    T dot = 0;
    for (int o = lane; o < taps; o += kWarp) {
      T sum = 0;
      int64_t pixel;
      if (tap_pixel(a, at, o / a.kernel, o % a.kernel, 1, &pixel)) {
        const S* value = a.value.data + pixel * a.value.stride + first;
        for (int c = 0; c < a.depth; ++c) {
          const T product = number(grad[c]) * number(value[c]);
          sum += a.ghost_mul ? product * number(a.ghost_mul[(first + c) * taps + o]) : product;
        }
      }
      products[o] = sum;
      dot += attention_of(normaliser, logits[o]) * sum;
    }
    dot = warp_sum(dot);
    S* out = call.grad_logits + (at.pixel * a.heads + at.head) * taps;
    for (int o = lane; o < taps; o += kWarp)
      store(out + o, attention_of(normaliser, logits[o]) * (products[o] - dot));
  });
}

// Gradient of the values, gathered: each position asks all positions whose taps read it.
template <typename S>
__global__ void value_kernel(Backward<S> call) {
  using T = Arithmetic<S>;
  const Operands<S>& a = call.operands;
  const int taps = a.kernel * a.kernel;
  for_places(a, [&](const Place& at, int lane) {
    for (int first = 0; first < a.depth; first += kWarp) {
      const int c = first + lane;
      const int64_t channel = static_cast<int64_t>(at.head) * a.depth + c;
      T sum = 0;
      for (int base = 0; base < taps; base += kWarp) {
        // Each lane finds the attention of one tap; then all use all of them.
        const int tap = base + lane;
        long long pixel = -1;
        T attention = 0;
        int64_t reader;
        if (tap < taps && tap_pixel(a, at, tap / a.kernel, tap % a.kernel, -1, &reader)) {
          pixel = reader;
          attention = attention_of(
              call.softmax[reader * a.heads + at.head],
              a.logits.data[reader * a.logits.stride + at.head * taps + tap]);
        }
        for (int i = 0; i < kWarp && base + i < taps; ++i) {
          const long long from = __shfl_sync(kAllLanes, pixel, i);
          const T weight = __shfl_sync(kAllLanes, attention, i);
          if (from >= 0 && c < a.depth)
            sum += weight_of(a, weight, channel * taps + base + i) *
                   number(call.grad.data[from * call.grad.stride + channel]);
        }
      }
      if (c < a.depth) store(call.grad_value + at.pixel * a.heads * a.depth + channel, sum);
    }
  });
}

// Gradients of the ghost filters, summed over one part of the pixels: a thread for each number.
template <typename S>
__global__ void ghost_kernel(Backward<S> call, int64_t pixels_a_part) {
  using T = Arithmetic<S>;
  const Operands<S>& a = call.operands;
  const int taps = a.kernel * a.kernel;
  const int64_t channels = a.heads * a.depth, pixels = a.batch * a.height * a.width;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= channels * taps) return;
  const int64_t channel = i % channels;
  const int tap = static_cast<int>(i / channels), head = static_cast<int>(channel / a.depth);
  const int ky = tap / a.kernel, kx = tap % a.kernel;
  const int64_t begin = blockIdx.y * pixels_a_part;
  const int64_t end = begin + pixels_a_part < pixels ? begin + pixels_a_part : pixels;
  Place at{begin, begin / a.width % a.height, begin % a.width, head};
  T add = 0, mul = 0;
  for (; at.pixel < end; ++at.pixel) {
    int64_t pixel;
    if (tap_pixel(a, at, ky, kx, 1, &pixel)) {
      const T product = number(call.grad.data[at.pixel * call.grad.stride + channel]) *
                        number(a.value.data[pixel * a.value.stride + channel]);
      add += product;
      if (call.mul_parts)
        mul += product * attention_of(
                             call.softmax[at.pixel * a.heads + head],
                             a.logits.data[at.pixel * a.logits.stride + head * taps + tap]);
    }
    if (++at.x == a.width) {
      at.x = 0;
      if (++at.y == a.height) at.y = 0;
    }
  }
  const int64_t out = blockIdx.y * channels * taps + i;
  if (call.add_parts) call.add_parts[out] = add;
  if (call.mul_parts) call.mul_parts[out] = mul;
}

// Launches a kernel in which a warp takes a place and has `numbers` numbers of shared memory.
template <typename S, typename Call>
void launch_places(void (*kernel)(Call), const Call& call, int64_t numbers, cudaStream_t stream) {
  const Operands<S>& a = call.operands;
  const int64_t bytes = numbers * sizeof(Arithmetic<S>);
  const int64_t warps = bytes ? std::min<int64_t>(kMostWarps, kSharedBytes / bytes) : kMostWarps;
  const int64_t blocks = (a.pixels() * a.heads + warps - 1) / warps;
  launch(
      kernel, dim3(static_cast<unsigned>(std::min(blocks, kMostBlocks))),
      static_cast<int>(warps) * kWarp, warps * bytes, stream, call);
}

}  // namespace

template <typename S>
void forward_any(const Forward<S>& call, cudaStream_t stream) {
  const int64_t taps = call.operands.kernel * call.operands.kernel;
  launch_places<S>(forward_kernel<S>, call, taps, stream);
}

// Enough to fill a device, and never more than 64 MiB of sums.
int64_t ghost_parts_any(int64_t pixels, int64_t filter_size) {
  const int64_t wanted = std::min<int64_t>(256, (pixels + 127) / 128);
  return std::max<int64_t>(1, std::min(wanted, (int64_t{1} << 24) / filter_size));
}

template <typename S>
void backward_any(const Backward<S>& call, cudaStream_t stream) {
  const Operands<S>& a = call.operands;
  const int64_t taps = a.kernel * a.kernel;
  launch_places<S>(logits_kernel<S>, call, taps, stream);
  launch_places<S>(value_kernel<S>, call, 0, stream);
  if (!call.grad_add && !call.grad_mul) return;
  const int64_t filters = a.heads * a.depth * taps;
  const dim3 blocks(
      static_cast<unsigned>((filters + kGhostThreads - 1) / kGhostThreads),
      static_cast<unsigned>(call.parts));
  launch(
      ghost_kernel<S>, blocks, kGhostThreads, 0, stream, call,
      (a.pixels() + call.parts - 1) / call.parts);
  launch_sum_parts(call, stream);
}

#define ELSA_QUOTE(...) #__VA_ARGS__
#define ELSA_TEXT(...) ELSA_QUOTE(__VA_ARGS__)
const char* architectures() {
#ifdef __CUDA_ARCH_LIST__
  return ELSA_TEXT(__CUDA_ARCH_LIST__);
#else
  return "";
#endif
}
#undef ELSA_TEXT
#undef ELSA_QUOTE

#define ELSA_INSTANTIATE(S)                                   \
  template void forward_any(const Forward<S>&, cudaStream_t); \
  template void backward_any(const Backward<S>&, cudaStream_t);
ELSA_INSTANTIATE(float)
ELSA_INSTANTIATE(double)
ELSA_INSTANTIATE(__half)
ELSA_INSTANTIATE(__nv_bfloat16)
#undef ELSA_INSTANTIATE

}  // namespace elsa::cuda
