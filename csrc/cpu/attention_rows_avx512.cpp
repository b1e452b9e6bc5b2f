// Row kernels for x86-64 with AVX-512.
#if defined(__x86_64__)
#define ELSA_ROWS_NAMESPACE avx512
#define ELSA_ROWS_VECTOR_BYTES 64
#define ELSA_ROWS_TILE 8
#define ELSA_ROWS_TARGET "avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"
#include "attention_rows_impl.h"
#endif
