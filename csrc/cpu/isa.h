// The instruction sets that kernels have paths for.
#pragma once

#include <cstdint>

// Clang has no `#pragma GCC target`; what it builds runs the portable loops.
#if defined(__x86_64__) && !defined(__clang__)
#define AOTRAIN_X86 1
#include <immintrin.h>
#endif

namespace aotrain {

enum Isa : int32_t { kScalar, kAvx2, kAvx512 };

// The fastest that this CPU has.
inline Isa best_isa() {
#if AOTRAIN_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vbmi"))
        return kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
    return kScalar;
}

}  // namespace aotrain
