// Keeps a binary that was built on a new Linux loadable on those that PyTorch's own wheels support
// (glibc 2.28): asks for old versions of functions that glibc has in several. Its first version for
// a machine has them all.
#pragma once

#include <cstdint>  // defines __GLIBC__ as well

#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver exp,exp@GLIBC_2.2.5");
__asm__(".symver dlsym,dlsym@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver exp,exp@GLIBC_2.17");
__asm__(".symver dlsym,dlsym@GLIBC_2.17");
#endif
