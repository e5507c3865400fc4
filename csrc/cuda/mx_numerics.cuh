// Scale bytes and element codes of the MX formats, bit for bit those of aotrain/formats/{e8m0,rounding}.py.
//
// Everything is integer arithmetic and correctly rounded float32 operations, so a CPU computes what a GPU does. Compile
// with -fmad=false (nvcc) or -ffp-contract=off, and without flushing of subnormals, the default of both.
#pragma once

#include "portable.cuh"

namespace aotrain::mx {

enum Rounding : int32_t { kFloor, kCeil, kEven, kRceil };

constexpr uint32_t kNanByte = 255, kInfinity = 0x7F800000, kMantissaMask = 0x7FFFFF, kTopMantissaBit = 0x400000;

// `kMaxExponent`: that of kMax. `kMinExponent`: of the smallest normal value, biased as in float32. `kNanWord`: codes of
// a block of NaNs; a format without NaN stores +0.
struct E4m3 {
    static constexpr int kBits = 8, kMantissa = 3;
    static constexpr uint32_t kMaxExponent = 8, kMinExponent = 127 - 6, kNanWord = 0x7F7F7F7F;
    static constexpr float kMax = 448.0f;
};

struct E5m2 {
    static constexpr int kBits = 8, kMantissa = 2;
    static constexpr uint32_t kMaxExponent = 15, kMinExponent = 127 - 14, kNanWord = 0x7F7F7F7F;
    static constexpr float kMax = 57344.0f;
};

struct E2m1 {
    static constexpr int kBits = 4, kMantissa = 1;
    static constexpr uint32_t kMaxExponent = 2, kMinExponent = 127, kNanWord = 0;
    static constexpr float kMax = 6.0f;
};

template <class E>
constexpr int kCodesPerWord = 32 / E::kBits;

// The scale byte of a block from the float32 bits of its largest magnitude, where NaN is above infinity.
template <class E>
AOTRAIN_DEVICE uint32_t scale_byte(uint32_t amax, int rounding) {
    if (amax >= kInfinity) return kNanByte;
    if (rounding == kRceil) {
        constexpr float kInverseMax = 1.0f / E::kMax;
        const uint32_t bits = bits_as<uint32_t>(bits_as<float>(amax) * kInverseMax), exponent = bits >> 23;
        // The byte 0 means 2^-127, a subnormal, and serves all below it.
        return exponent + ((bits & kMantissaMask) > (exponent == 0 ? kTopMantissaBit : 0));
    }
    const uint32_t bits = rounding == kEven ? amax + (kTopMantissaBit >> E::kMantissa) : amax;
    const uint32_t exponent = (bits >> 23) + (rounding == kCeil && (bits & kMantissaMask) != 0);
    return exponent > E::kMaxExponent ? exponent - E::kMaxExponent : 0;
}

// 2^(127 - byte), the factor that quantization applies; NaN for a block of NaNs.
AOTRAIN_DEVICE float inverse_of(uint32_t byte) {
    const uint32_t finite = byte < 254 ? (254 - byte) << 23 : kTopMantissaBit;
    return bits_as<float>(byte == kNanByte ? 0x7FC00000u : finite);
}

// The code of y, which is not NaN: to nearest even, saturating.
//
// Adding 2^k to |y| rounds it to a multiple of 2^(k - 23). k is such that this is the format's step at |y|, that of the
// smallest normal value for subnormals. The low bits of the sum then count steps, the leading one included, and codes
// ascend by one a step, 2^kMantissa steps a binade.
template <class E>
AOTRAIN_DEVICE uint32_t code_of(float y) {
    constexpr uint32_t kDropped = 23 - E::kMantissa;
    const uint32_t bits = bits_as<uint32_t>(y), magnitude = smaller(bits & 0x7FFFFFFF, bits_as<uint32_t>(E::kMax));
    const uint32_t exponent = larger(magnitude >> 23, E::kMinExponent), unit = (exponent + kDropped) << 23;
    const uint32_t steps = bits_as<uint32_t>(bits_as<float>(magnitude) + bits_as<float>(unit)) - unit;
    return (steps + ((exponent - E::kMinExponent) << E::kMantissa)) | (bits >> 31 << (E::kBits - 1));
}

#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 890
#define AOTRAIN_NATIVE_FLOAT8 1
// Two codes in 16 bits, the first in the lower half; the instruction takes the upper one first.
__device__ __forceinline__ uint32_t native_pair(float first, float second, E4m3) {
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
    return pair;
}

__device__ __forceinline__ uint32_t native_pair(float first, float second, E5m2) {
    uint16_t pair;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
    return pair;
}
#endif
// 4-bit conversions are features of an architecture (sm_100a) or a family (sm_100f), absent from plain sm_100 code.
#if __CUDA_ARCH__ >= 1000 && (defined(__CUDA_ARCH_SPECIFIC__) || defined(__CUDA_ARCH_FAMILY_SPECIFIC__))
#define AOTRAIN_NATIVE_FLOAT4 1
__device__ __forceinline__ uint32_t native_eight(const float (&y)[8]) {
    uint32_t word;
    asm("{\n"
        ".reg .b8 a, b, c, d;\n"
        "cvt.rn.satfinite.e2m1x2.f32 a, %2, %1;\n"
        "cvt.rn.satfinite.e2m1x2.f32 b, %4, %3;\n"
        "cvt.rn.satfinite.e2m1x2.f32 c, %6, %5;\n"
        "cvt.rn.satfinite.e2m1x2.f32 d, %8, %7;\n"
        "mov.b32 %0, {a, b, c, d};\n"
        "}"
        : "=r"(word)
        : "f"(y[0]), "f"(y[1]), "f"(y[2]), "f"(y[3]), "f"(y[4]), "f"(y[5]), "f"(y[6]), "f"(y[7]));
    return word;
}
#endif
#endif

// A word of codes, the first in the lowest bits; no y is NaN.
//
// For all values but NaN the GPU's instructions are code_of (PTX ISA, cvt): .rn is to nearest even, .satfinite makes
// what lies beyond the largest value that value with its sign, subnormals are flushed neither in nor out, and zero keeps
// its sign. What they make of a NaN does not matter: its block is overwritten with kNanWord (block_scale).
template <class E>
AOTRAIN_DEVICE uint32_t encode_word(const float (&y)[kCodesPerWord<E>]) {
#if defined(AOTRAIN_NATIVE_FLOAT8)
    if constexpr (E::kBits == 8) return native_pair(y[0], y[1], E{}) | native_pair(y[2], y[3], E{}) << 16;
#endif
#if defined(AOTRAIN_NATIVE_FLOAT4)
    if constexpr (E::kBits == 4) return native_eight(y);
#endif
    uint32_t word = 0;
    AOTRAIN_UNROLL
    for (int i = 0; i < kCodesPerWord<E>; i++) word |= code_of<E>(y[i]) << (i * E::kBits);
    return word;
}

// What a block's elements have in common. Its codes are (encode_word(x * inverse) & keep) | fill.
struct BlockScale {
    uint32_t byte;
    float inverse;
    uint32_t keep, fill;
};

template <class E>
AOTRAIN_DEVICE BlockScale block_scale(uint32_t amax, int rounding) {
    const uint32_t byte = scale_byte<E>(amax, rounding);
    const bool nan = byte == kNanByte;
    return {byte, inverse_of(byte), nan ? 0 : ~0u, nan ? E::kNanWord : 0};
}

// Three formats of x. A word holds kPerWord elements; the pattern of a magnitude, its bits in the input's format, has
// the order of the magnitudes with NaN above infinity. `raise` keeps the larger patterns of two words, `amax_bits` makes
// the pattern of lane k float32.
struct Float32 {
    static constexpr int kPerWord = 1;
    AOTRAIN_DEVICE static float value(uint32_t word, int) { return bits_as<float>(word); }
    AOTRAIN_DEVICE static uint32_t raise(uint32_t largest, uint32_t word) { return larger(largest, word & 0x7FFFFFFF); }
    AOTRAIN_DEVICE static uint32_t amax_bits(uint32_t largest, int) { return largest; }
};

AOTRAIN_DEVICE uint32_t raise_halves(uint32_t largest, uint32_t word) {
    const uint32_t magnitudes = word & 0x7FFF7FFF;
#if defined(__CUDA_ARCH__)
    return __vmaxu2(largest, magnitudes);
#else
    return larger(largest >> 16, magnitudes >> 16) << 16 | larger(largest & 0xFFFF, magnitudes & 0xFFFF);
#endif
}

struct Bfloat16 {
    static constexpr int kPerWord = 2;
    AOTRAIN_DEVICE static float value(uint32_t word, int k) { return bits_as<float>(amax_bits(word, k)); }
    AOTRAIN_DEVICE static uint32_t raise(uint32_t largest, uint32_t word) { return raise_halves(largest, word); }
    AOTRAIN_DEVICE static uint32_t amax_bits(uint32_t word, int k) { return k ? word & 0xFFFF0000 : word << 16; }
};

struct Float16 {
    static constexpr int kPerWord = 2;
    // Exponents are 15 too small after a shift to float32's place, which a product with 2^112 mends, for subnormals
    // too; infinities and NaNs, which it leaves finite, get float32's largest exponent.
    AOTRAIN_DEVICE static float value(uint32_t word, int k) {
        const uint32_t half = k ? word >> 16 : word & 0xFFFF, magnitude = (half & 0x7FFF) << 13;
        const uint32_t scaled = bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f);
        const uint32_t special = magnitude >= 0x0F800000 ? kInfinity : 0;
        return bits_as<float>(scaled | special | (half & 0x8000) << 16);
    }
    AOTRAIN_DEVICE static uint32_t raise(uint32_t largest, uint32_t word) { return raise_halves(largest, word); }
    AOTRAIN_DEVICE static uint32_t amax_bits(uint32_t word, int k) { return bits_as<uint32_t>(value(word, k)); }
};

}  // namespace aotrain::mx
