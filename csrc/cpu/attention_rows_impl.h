// The row kernels, written with the compiler's vector extension. Included once per instruction set,
// after the macros of vectors.h and ELSA_ROWS_TILE are defined.
#include "../glibc.h"
#include "attention_rows.h"
#include "vectors.h"
// After vectors.h, which says what they are compiled for.
#include "softmax.h"

namespace elsa::cpu::ELSA_ROWS_NAMESPACE {
namespace {

constexpr int kTile = ELSA_ROWS_TILE;  // positions whose accumulators stay in registers together

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
  static constexpr int kTaps = K * K;
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
        softmax<T, Shape::kTaps>(logits, attention, taps, stride);
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
#pragma GCC unroll 8
      for (int p = 0; p < kTile; ++p) {
        if (x + p == width) break;
#pragma GCC unroll 2
        for (int i = 0; i < NV; ++i)
          store(row.out + (x + p) * row.out_stride + c + i * kLanes<T>, accumulator[p][i]);
      }
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
    transpose_matrix(attention + x * stride, L, taps, stride, weight, L);
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
    transpose_matrix(
        grad_weight, taps, n, L, row.grad_logits + x * row.grad_logits_stride,
        row.grad_logits_stride);
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

// Gradients of the ghost filters, in one pass; with Mul also the multiplicative one's, whose
// summands carry the attention.
template <typename T, typename Shape, bool Mul>
void backward_ghosts(const Shape& shape, const BackwardRow<T>& row) {
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
        vec<T> add[kStep] = {}, mul[kStep] = {};
        for (int64_t x = 0; x < width; ++x) {
          const vec<T> g = load(grad + x * depth + c);
#pragma GCC unroll 16
          for (int s = 0; s < kStep; ++s) {
            const vec<T> product = g * load(value + (x + s * dilation) * depth + c);
            add[s] += product;
            if (Mul) mul[s] += product * attention[x * stride + tap + s];
          }
        }
        for (int s = 0; s < kStep; ++s) {
          const int64_t o = (tap + s) * depth + c;
          if (row.grad_ghost_add)
            store(row.grad_ghost_add + o, load(row.grad_ghost_add + o) + add[s]);
          if (Mul) store(row.grad_ghost_mul + o, load(row.grad_ghost_mul + o) + mul[s]);
        }
      }
    }
  }
}

template <typename T, typename Shape, bool Mul>
void backward_row(const Shape& shape, const BackwardRow<T>& row) {
  const int64_t taps = shape.taps(), stride = shape.padded_taps();
  for (int64_t x = 0; x < shape.width(); ++x) {
    const T* logits = row.logits + x * row.logits_stride;
    prefetch(logits + kTile * row.logits_stride, taps);
    softmax<T, Shape::kTaps>(logits, row.attention + (shape.span() + x) * stride, taps, stride);
  }
  backward_logits<T, Shape, Mul>(shape, row);
  backward_value<T, Shape, Mul>(shape, row);
  if (row.grad_ghost_mul)
    backward_ghosts<T, Shape, true>(shape, row);
  else if (row.grad_ghost_add)
    backward_ghosts<T, Shape, false>(shape, row);
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
  if (shape.depth == 32 && shape.dilation == 1) {
    if (shape.kernel == 5) return run<T>(Known<5, 32, true>{shape}, row);
    if (shape.kernel == 7) return run<T>(Known<7, 32, true>{shape}, row);
  }
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

template <typename T>
void transpose_any(
    const T* source, int64_t rows, int64_t columns, int64_t source_stride, T* out,
    int64_t out_stride) {
  transpose_matrix(source, rows, columns, source_stride, out, out_stride);
}

#define ELSA_STRING_(text) #text
#define ELSA_STRING(text) ELSA_STRING_(text)

}  // namespace

template <>
RowKernels<float> row_kernels<float>() {
  return {
      ELSA_STRING(ELSA_ROWS_NAMESPACE), dispatch<float, ForwardRow<float>>,
      dispatch<float, BackwardRow<float>>, transpose_any<float>};
}
template <>
RowKernels<double> row_kernels<double>() {
  return {
      ELSA_STRING(ELSA_ROWS_NAMESPACE), dispatch<double, ForwardRow<double>>,
      dispatch<double, BackwardRow<double>>, transpose_any<double>};
}

}  // namespace elsa::cpu::ELSA_ROWS_NAMESPACE

ELSA_END_TARGET
