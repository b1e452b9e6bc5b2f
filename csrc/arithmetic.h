// The type that numbers are computed in.
#pragma once

#include <type_traits>

namespace elsa {

// Sums and softmax are computed in float, or in double for double.
template <typename S>
using Arithmetic = std::conditional_t<std::is_same_v<S, double>, double, float>;

}  // namespace elsa
