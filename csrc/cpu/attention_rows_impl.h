// The row kernels, written with the compiler's vector extension. Included once per instruction set,
// after ELSA_ROWS_NAMESPACE, _VECTOR_BYTES, _TILE and, but for the portable one, _TARGET are
// defined.
//
// No inline function or template of the standard library may be used below: its code would be
// compiled for this instruction set and the linker might pick that copy for the whole program.
#include <cstring>

#include "attention_rows.h"

#if defined(ELSA_ROWS_TARGET)
#define ELSA_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define ELSA_BEGIN_TARGET(isa) \
  ELSA_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define ELSA_END_TARGET _Pragma("clang attribute pop")
#else
#define ELSA_BEGIN_TARGET(isa) ELSA_PRAGMA(GCC target(isa))
#define ELSA_END_TARGET
#endif
ELSA_BEGIN_TARGET(ELSA_ROWS_TARGET)
#endif

namespace elsa::cpu::ELSA_ROWS_NAMESPACE {
namespace {

#define ELSA_INLINE inline __attribute__((always_inline))

constexpr int kTile = ELSA_ROWS_TILE;  // positions whose accumulators stay in registers together

template <typename T>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(ELSA_ROWS_VECTOR_BYTES)));
  typedef float unaligned
      __attribute__((vector_size(ELSA_ROWS_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t bits __attribute__((vector_size(ELSA_ROWS_VECTOR_BYTES)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(ELSA_ROWS_VECTOR_BYTES)));
  typedef double unaligned
      __attribute__((vector_size(ELSA_ROWS_VECTOR_BYTES), aligned(8), may_alias));
};

template <typename T>
using vec = typename Vector<T>::type;
template <typename T>
constexpr int kLanes = ELSA_ROWS_VECTOR_BYTES / sizeof(T);

template <typename T>
ELSA_INLINE vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Vector<T>::unaligned*>(p);
}
template <typename T>
ELSA_INLINE void store(T* p, vec<T> v) {
  *reinterpret_cast<typename Vector<T>::unaligned*>(p) = v;
}
template <typename T>
ELSA_INLINE vec<T> broadcast(T s) {
  return vec<T>{} + s;
}

// exp(x) for x <= 0: range reduction by ln 2 in two parts, then a degree 6 polynomial, within 2
// ulp; 0 where the result would be subnormal, NaN where x is.
ELSA_INLINE vec<float> exp_nonpositive(vec<float> x) {
  const vec<float> rounding = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vec<float> shifted = x * 1.44269504f + rounding;
  const vec<float> n = shifted - rounding;
  vec<float> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const auto exponent = (reinterpret_cast<Vector<float>::bits>(shifted) + 127) << 23;
  const vec<float> result = p * reinterpret_cast<vec<float>>(exponent);
  return x < -87.0f ? vec<float>{} : result;
}
ELSA_INLINE vec<double> exp_nonpositive(vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

template <typename T>
ELSA_INLINE T lane_sum(vec<T> v) {
  T lanes[kLanes<T>];
  memcpy(lanes, &v, sizeof v);
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
template <typename T>
ELSA_INLINE T lane_max(vec<T> v) {
  T lanes[kLanes<T>];
  memcpy(lanes, &v, sizeof v);
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      lanes[i] = lanes[i + half] > lanes[i] ? lanes[i + half] : lanes[i];
  return lanes[0];
}

// Asks for `n` numbers ahead of their use; a head's logits lie too far apart for the machine to
// foresee.
template <typename T>
ELSA_INLINE void prefetch(const T* p, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < n + kLine; i += kLine) __builtin_prefetch(p + i);
}

// Softmax of one position: `taps` logits to `attention`, whose padding becomes 0.
template <typename T>
ELSA_INLINE void softmax(const T* logits, T* attention, int64_t taps, int64_t padded_taps) {
  memcpy(attention, logits, taps * sizeof(T));
  for (int64_t o = taps; o < padded_taps; ++o) attention[o] = -__builtin_huge_val();
  vec<T> max = load(attention);
  for (int64_t o = kLanes<T>; o < padded_taps; o += kLanes<T>) {
    const vec<T> x = load(attention + o);
    max = x > max ? x : max;
  }
  const vec<T> shift = broadcast(lane_max<T>(max));
  vec<T> sum{};
  for (int64_t o = 0; o < padded_taps; o += kLanes<T>) {
    const vec<T> e = exp_nonpositive(load(attention + o) - shift);
    sum += e;
    store(attention + o, e);
  }
  const vec<T> scale = broadcast(T(1) / lane_sum<T>(sum));
  for (int64_t o = 0; o < padded_taps; o += kLanes<T>)
    store(attention + o, load(attention + o) * scale);
}

// Adds S taps to kTile outputs of NV vectors each: accumulator[p] += (mul * attention[p] + add) *
// row[p]. From one tap to the next the attention moves by `attention_step` and the row by
// `row_step` numbers.
template <typename T, int S, bool Mul, int NV>
ELSA_INLINE void add_taps(
    vec<T> (&accumulator)[kTile][NV], const T* attention, int64_t attention_step,
    int64_t attention_stride, const T* row, int64_t row_step, const T* mul, const T* add,
    int64_t depth) {
#pragma GCC unroll 16
  for (int s = 0; s < S; ++s) {
    vec<T> m[NV], a[NV];
#pragma GCC unroll 2
    for (int i = 0; i < NV; ++i) {
      a[i] = load(add + s * depth + i * kLanes<T>);
      if (Mul) m[i] = load(mul + s * depth + i * kLanes<T>);
    }
#pragma GCC unroll 8
    for (int p = 0; p < kTile; ++p) {
      const vec<T> weight = broadcast(attention[s * attention_step + p * attention_stride]);
#pragma GCC unroll 2
      for (int i = 0; i < NV; ++i) {
        const vec<T> w = Mul ? m[i] * weight + a[i] : weight + a[i];
        accumulator[p][i] += w * load(row + s * row_step + p * depth + i * kLanes<T>);
      }
    }
  }
}

// Calls body(channel, std::integral_constant-like NV) over the channels, two vectors at a time.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <typename T, typename Body>
ELSA_INLINE void for_channels(int64_t depth, const Body& body) {
  int64_t c = 0;
  for (; c + 2 * kLanes<T> <= depth; c += 2 * kLanes<T>) body(c, Count<2>());
  for (; c < depth; c += kLanes<T>) body(c, Count<1>());
}

// What the compiler knows of the shape: kernel size K, padded depth D and that the dilation is 1
// make the fast path of the published models; 0 and false stand for "any".
template <int K, int D, bool Dense>
struct Known {
  static constexpr int kStep = K > 0 ? K : 1;  // taps handled at once
  const RowShape& row;

  ELSA_INLINE int64_t width() const { return row.width; }
  ELSA_INLINE int64_t kernel() const { return K > 0 ? K : row.kernel; }
  ELSA_INLINE int64_t depth() const { return D > 0 ? D : row.depth; }
  ELSA_INLINE int64_t dilation() const { return Dense ? 1 : row.dilation; }
  ELSA_INLINE int64_t taps() const { return kernel() * kernel(); }
  ELSA_INLINE int64_t padded_taps() const {
    return (taps() + kLaneMultiple - 1) / kLaneMultiple * kLaneMultiple;
  }
  ELSA_INLINE int64_t span() const { return (kernel() - 1) * dilation(); }
};

template <typename T, typename Shape, bool Mul>
void forward_row(const Shape& shape, const ForwardRow<T>& row) {
  constexpr int kStep = Shape::kStep;
  const int64_t kernel = shape.kernel(), dilation = shape.dilation(), depth = shape.depth();
  const int64_t taps = shape.taps(), stride = shape.padded_taps(), width = shape.width();
  for (int64_t x = 0; x < width; x += kTile) {
    for (int64_t p = 0; p < kTile; ++p) {
      T* attention = row.attention + p * stride;
      if (x + p < width) {
        const T* logits = row.logits + (x + p) * row.logits_stride;
        prefetch(logits + kTile * row.logits_stride, taps);
        softmax(logits, attention, taps, stride);
      } else {
        memset(attention, 0, stride * sizeof(T));
      }
    }
    for_channels<T>(depth, [&](int64_t c, auto count) __attribute__((always_inline)) {
      constexpr int NV = decltype(count)::value;
      vec<T> accumulator[kTile][NV] = {};
      for (int64_t ky = 0; ky < kernel; ++ky) {
        if (!row.value[ky]) continue;
        for (int64_t kx = 0; kx < kernel; kx += kStep) {
          const int64_t tap = ky * kernel + kx;
          add_taps<T, kStep, Mul, NV>(
              accumulator, row.attention + tap, 1, stride,
              row.value[ky] + (x + kx * dilation) * depth + c, dilation * depth,
              Mul ? row.ghost_mul + tap * depth + c : nullptr, row.ghost_add + tap * depth + c,
              depth);
        }
      }
      for (int p = 0; p < kTile; ++p)
        for (int i = 0; i < NV; ++i)
          store(row.out + (x + p) * depth + c + i * kLanes<T>, accumulator[p][i]);
    });
  }
}

// Gradient of the logits. Positions lie along the vector here, so that the products over the
// channels need no sum across lanes.
template <typename T, typename Shape, bool Mul>
void backward_logits(const Shape& shape, const BackwardRow<T>& row) {
  constexpr int kStep = Shape::kStep, L = kLanes<T>;
  const int64_t kernel = shape.kernel(), dilation = shape.dilation(), depth = shape.depth();
  const int64_t taps = shape.taps(), stride = shape.padded_taps(),
                positions = shape.row.positions();
  const int64_t width = shape.width();
  const T* attention = row.attention + shape.span() * stride;
  T* weight = row.attention_tile;                  // (taps, L)
  T* grad_weight = weight + taps * kTileMultiple;  // (taps, L)
  for (int64_t x = 0; x < width; x += L) {
    const int64_t n = width - x < L ? width - x : L;
    for (int64_t p = 0; p < L; ++p)
      for (int64_t o = 0; o < taps; ++o) weight[o * L + p] = attention[(x + p) * stride + o];
    vec<T> dot{};
    for (int64_t ky = 0; ky < kernel; ++ky) {
      for (int64_t kx = 0; kx < kernel; kx += kStep) {
        const int64_t tap = ky * kernel + kx;
        vec<T> sum[kStep] = {};
        if (row.value_transposed[ky]) {
          const T* value = row.value_transposed[ky] + x + kx * dilation;
          const T* grad = row.grad_transposed + x;
          for (int64_t c = 0; c < depth; ++c, value += positions, grad += positions) {
            const vec<T> g = load(grad);
#pragma GCC unroll 16
            for (int s = 0; s < kStep; ++s) {
              const vec<T> product = g * load(value + s * dilation);
              sum[s] += Mul ? product * row.ghost_mul[(tap + s) * depth + c] : product;
            }
          }
        }
        for (int s = 0; s < kStep; ++s) {
          dot += sum[s] * load(weight + (tap + s) * L);
          store(grad_weight + (tap + s) * L, sum[s]);
        }
      }
    }
    for (int64_t o = 0; o < taps; ++o)
      store(grad_weight + o * L, load(weight + o * L) * (load(grad_weight + o * L) - dot));
    for (int64_t p = 0; p < n; ++p) {
      T* out = row.grad_logits + (x + p) * row.grad_logits_stride;
      for (int64_t o = 0; o < taps; ++o) out[o] = grad_weight[o * L + p];
    }
  }
}

// Gradient of the values: the transposed correlation, one input row (ky) after the other.
template <typename T, typename Shape, bool Mul>
void backward_value(const Shape& shape, const BackwardRow<T>& row) {
  constexpr int kStep = Shape::kStep;
  const int64_t kernel = shape.kernel(), dilation = shape.dilation(), depth = shape.depth();
  const int64_t stride = shape.padded_taps(), span = shape.span(), width = shape.width();
  for (int64_t ky = 0; ky < kernel; ++ky) {
    if (!row.grad_value[ky]) continue;
    for (int64_t x = 0; x < width + span; x += kTile) {
      for_channels<T>(depth, [&](int64_t c, auto count) __attribute__((always_inline)) {
        constexpr int NV = decltype(count)::value;
        vec<T> accumulator[kTile][NV] = {};
        for (int64_t kx = 0; kx < kernel; kx += kStep) {
          const int64_t tap = ky * kernel + kx, source = span + x - kx * dilation;
          add_taps<T, kStep, Mul, NV>(
              accumulator, row.attention + source * stride + tap, 1 - dilation * stride, stride,
              row.grad + source * depth + c, -dilation * depth,
              Mul ? row.ghost_mul + tap * depth + c : nullptr, row.ghost_add + tap * depth + c,
              depth);
        }
        for (int p = 0; p < kTile; ++p)
          for (int i = 0; i < NV; ++i) {
            T* out = row.grad_value[ky] + (x + p) * depth + c + i * kLanes<T>;
            store(out, load(out) + accumulator[p][i]);
          }
      });
    }
  }
}

// Gradient of one ghost filter; with Weighted the multiplicative one's, whose summands carry the
// attention.
template <typename T, typename Shape, bool Weighted>
void backward_ghost(const Shape& shape, const BackwardRow<T>& row, T* grad_ghost) {
  constexpr int kStep = Shape::kStep;
  const int64_t kernel = shape.kernel(), dilation = shape.dilation(), depth = shape.depth();
  const int64_t stride = shape.padded_taps(), width = shape.width();
  const T* attention = row.attention + shape.span() * stride;
  const T* grad = row.grad + shape.span() * depth;
  for (int64_t ky = 0; ky < kernel; ++ky) {
    if (!row.value[ky]) continue;
    for (int64_t kx = 0; kx < kernel; kx += kStep) {
      const int64_t tap = ky * kernel + kx;
      const T* value = row.value[ky] + kx * dilation * depth;
      for (int64_t c = 0; c < depth; c += kLanes<T>) {
        vec<T> sum[kStep] = {};
        for (int64_t x = 0; x < width; ++x) {
          const vec<T> g = load(grad + x * depth + c);
#pragma GCC unroll 16
          for (int s = 0; s < kStep; ++s) {
            const vec<T> product = g * load(value + (x + s * dilation) * depth + c);
            sum[s] += Weighted ? product * attention[x * stride + tap + s] : product;
          }
        }
        for (int s = 0; s < kStep; ++s) {
          T* out = grad_ghost + (tap + s) * depth + c;
          store(out, load(out) + sum[s]);
        }
      }
    }
  }
}

template <typename T, typename Shape, bool Mul>
void backward_row(const Shape& shape, const BackwardRow<T>& row) {
  const int64_t taps = shape.taps(), stride = shape.padded_taps();
  for (int64_t x = 0; x < shape.width(); ++x)
    softmax(
        row.logits + x * row.logits_stride, row.attention + (shape.span() + x) * stride, taps,
        stride);
  backward_logits<T, Shape, Mul>(shape, row);
  backward_value<T, Shape, Mul>(shape, row);
  if (row.grad_ghost_add) backward_ghost<T, Shape, false>(shape, row, row.grad_ghost_add);
  if (row.grad_ghost_mul) backward_ghost<T, Shape, true>(shape, row, row.grad_ghost_mul);
}

template <typename T, typename Shape>
void run(const Shape& shape, const ForwardRow<T>& row) {
  row.ghost_mul ? forward_row<T, Shape, true>(shape, row)
                : forward_row<T, Shape, false>(shape, row);
}
template <typename T, typename Shape>
void run(const Shape& shape, const BackwardRow<T>& row) {
  row.ghost_mul ? backward_row<T, Shape, true>(shape, row)
                : backward_row<T, Shape, false>(shape, row);
}

template <typename T, typename Row>
void dispatch(const RowShape& shape, const Row& row) {
  if (shape.kernel == 7 && shape.depth == 32 && shape.dilation == 1)
    return run<T>(Known<7, 32, true>{shape}, row);
  switch (shape.kernel) {
    case 3:
      return run<T>(Known<3, 0, false>{shape}, row);
    case 5:
      return run<T>(Known<5, 0, false>{shape}, row);
    case 7:
      return run<T>(Known<7, 0, false>{shape}, row);
    default:
      return run<T>(Known<0, 0, false>{shape}, row);
  }
}

#define ELSA_STRING_(text) #text
#define ELSA_STRING(text) ELSA_STRING_(text)

}  // namespace

template <>
RowKernels<float> row_kernels<float>() {
  return {
      ELSA_STRING(ELSA_ROWS_NAMESPACE), dispatch<float, ForwardRow<float>>,
      dispatch<float, BackwardRow<float>>};
}
template <>
RowKernels<double> row_kernels<double>() {
  return {
      ELSA_STRING(ELSA_ROWS_NAMESPACE), dispatch<double, ForwardRow<double>>,
      dispatch<double, BackwardRow<double>>};
}

}  // namespace elsa::cpu::ELSA_ROWS_NAMESPACE

#if defined(ELSA_ROWS_TARGET)
ELSA_END_TARGET
#endif
