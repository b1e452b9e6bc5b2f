// The operator's schema. Kernels register themselves at the foot of their own files; autograd,
// autocast and fake kernels are registered in elsa_core/operator.py.
#include <torch/library.h>

TORCH_LIBRARY(elsa, m) {
  m.def(
      "attention(Tensor value, Tensor logits, Tensor? ghost_add, Tensor? ghost_mul, "
      "SymInt kernel_size, SymInt dilation) -> Tensor");
  m.def(
      "attention_backward(Tensor grad, Tensor value, Tensor logits, Tensor? ghost_add, "
      "Tensor? ghost_mul, SymInt kernel_size, SymInt dilation) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
}
