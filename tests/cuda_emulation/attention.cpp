// csrc/cuda/attention.cpp, registered for tensors of the CPU.
#include "../../csrc/elsa.cpp"

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(space, device, m) _TORCH_LIBRARY_IMPL(space, CPU, m, C10_UID)

#include "../../csrc/cuda/attention.cpp"
