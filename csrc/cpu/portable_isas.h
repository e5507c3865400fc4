// The portable loops of one header, for each instruction set that the compiler makes vectors of them for: namespaces
// scalar and avx2. The includer defines AOTRAIN_PORTABLE, the name of the header. No include guard for that reason.
#include "isa.h"

#define AOTRAIN_ISA scalar
#include AOTRAIN_PORTABLE
#undef AOTRAIN_ISA

#if AOTRAIN_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define AOTRAIN_ISA avx2
#include AOTRAIN_PORTABLE
#undef AOTRAIN_ISA
#pragma GCC pop_options
#endif

#undef AOTRAIN_PORTABLE
