// Row kernels for x86-64 with AVX2 and FMA.
#if defined(__x86_64__)
#define ELSA_ROWS_NAMESPACE avx2
#define ELSA_ROWS_VECTOR_BYTES 32
#define ELSA_ROWS_TILE 4
#define ELSA_ROWS_TARGET "avx2,fma"
#include "attention_rows_impl.h"
#endif
