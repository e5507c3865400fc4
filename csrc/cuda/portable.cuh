// What lets the same functions be device code for nvcc and an ordinary program for any C++ compiler.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define AOTRAIN_DEVICE __device__ __forceinline__
#define AOTRAIN_UNROLL _Pragma("unroll")
#else
#define AOTRAIN_DEVICE inline
#define AOTRAIN_UNROLL
#endif

namespace aotrain {

template <typename To, typename From>
AOTRAIN_DEVICE To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
    return __builtin_bit_cast(To, x);
}

// N words of 32 bits that one instruction loads or stores.
template <int N>
struct alignas(4 * N) Words {
    uint32_t word[N];
};

template <typename T>
AOTRAIN_DEVICE T smaller(T a, T b) {
    return a < b ? a : b;
}

template <typename T>
AOTRAIN_DEVICE T larger(T a, T b) {
    return a > b ? a : b;
}

}  // namespace aotrain
