// Row kernels for any machine: 16-byte vectors, which every 64-bit instruction set offers.
#define ELSA_ROWS_NAMESPACE portable
#define ELSA_ROWS_VECTOR_BYTES 16
#define ELSA_ROWS_TILE 4
#include "attention_rows_impl.h"
