// Softmax over the taps of one head and position, in the vectors of row_kernels. Included after
// vectors.h.
namespace elsa::cpu::ELSA_ROWS_NAMESPACE {
namespace {

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

// Softmax of N vectors. As with torch.softmax a row that has a NaN, or nothing but -infinity, or a
// +infinity becomes NaN.
template <typename T, int N>
ELSA_INLINE void softmax_vectors(vec<T> (&x)[N]) {
  vec<T> max = x[0];
#pragma GCC unroll 16
  for (int i = 1; i < N; ++i) max = x[i] > max ? x[i] : max;
  max = lane_max<T>(max);
  vec<T> sum{};
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) {
    x[i] = exp_nonpositive(x[i] - max);
    sum += x[i];
  }
  const vec<T> scale = 1 / lane_sum<T>(sum);
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) x[i] *= scale;
}

// Softmax of one position: `taps` logits to `attention`, which holds taps rounded up to
// kLaneMultiple. Taps is that number where the compiler knows it, or 0.
template <typename T, int Taps>
ELSA_INLINE void softmax(const T* logits, T* attention, int64_t taps, int64_t padded_taps) {
  constexpr int L = kLanes<T>, kFull = Taps / L, kRest = Taps % L;
  const T nothing = -__builtin_huge_val();
  if constexpr (kFull > 0) {
    // In registers, without a detour through memory.
    vec<T> x[kFull + (kRest > 0)];
#pragma GCC unroll 16
    for (int i = 0; i < kFull; ++i) x[i] = load(logits + i * L);
    if constexpr (kRest == 1) {
      x[kFull] = broadcast(nothing);
      x[kFull][0] = logits[kFull * L];
    } else if constexpr (kRest > 1) {
      typename Vector<T>::bits order;
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) order[i] = i < kRest ? L - kRest + i : L;
      x[kFull] = shuffle<T>(load(logits + Taps - L), broadcast(nothing), order);
    }
    softmax_vectors<T>(x);
#pragma GCC unroll 16
    for (int i = 0; i < kFull + (kRest > 0); ++i) store(attention + i * L, x[i]);
    return;
  }
  memcpy(attention, logits, taps * sizeof(T));
  for (int64_t o = taps; o < padded_taps; ++o) attention[o] = nothing;
  vec<T> max = load(attention);
  for (int64_t o = L; o < padded_taps; o += L) {
    const vec<T> x = load(attention + o);
    max = x > max ? x : max;
  }
  max = lane_max<T>(max);
  vec<T> sum{};
  for (int64_t o = 0; o < padded_taps; o += L) {
    const vec<T> e = exp_nonpositive(load(attention + o) - max);
    sum += e;
    store(attention + o, e);
  }
  const vec<T> scale = 1 / lane_sum<T>(sum);
  for (int64_t o = 0; o < padded_taps; o += L) store(attention + o, load(attention + o) * scale);
}

}  // namespace
}  // namespace elsa::cpu::ELSA_ROWS_NAMESPACE
