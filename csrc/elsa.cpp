// The operators' schemas. Kernels register themselves at the foot of their own files; autograd,
// autocast and fake kernels are registered in elsa_core/operator.py and elsa_core/_grouped_conv.py.
#include <torch/csrc/stable/library.h>

#include <sstream>

#include "glibc.h"

STABLE_TORCH_LIBRARY(elsa, m) {
  m.def(
      "attention(Tensor value, Tensor logits, Tensor? ghost_add, Tensor? ghost_mul, "
      "SymInt kernel_size, SymInt dilation) -> Tensor");
  m.def(
      "attention_backward(Tensor grad, Tensor value, Tensor logits, Tensor? ghost_add, "
      "Tensor? ghost_mul, SymInt kernel_size, SymInt dilation, bool ghost_gradients=True) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def("grouped_conv(Tensor query, Tensor key, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "grouped_conv_backward(Tensor grad, Tensor query, Tensor key, Tensor weight, Tensor? bias) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

// What newer compilers take from newer libraries, defined here as glibc.h says.
#if defined(__GLIBC__) && defined(__GLIBCXX__)
// std::shared_ptr asks this for whether it may do without atomic operations: it may not.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;
#endif
