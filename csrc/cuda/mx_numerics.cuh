// Scale bytes and element codes of the MX formats, bit for bit those of aotrain/formats/{e8m0,rounding}.py.
//
// Everything is integer arithmetic and correctly rounded float32 operations, so a CPU computes what a GPU does. Compile
// with -fmad=false (nvcc) or -ffp-contract=off, and without flushing of subnormals, the default of both.
#pragma once

#include "mx_formats.h"
#include "portable.cuh"

namespace aotrain::mx {

constexpr uint32_t kNanByte = 255, kInfinity = 0x7F800000;

// The scale byte of a block from the float32 bits of its largest magnitude, where NaN is above infinity.
AOTRAIN_DEVICE uint32_t scale_byte(uint32_t amax, const ScaleRule& rule) {
    const uint32_t bits = bits_as<uint32_t>(bits_as<float>(amax) * rule.factor);
    const uint32_t exponent = (bits + (bits < 0x800000 ? rule.add_to_subnormal : rule.add)) >> 23;
    return amax >= kInfinity ? kNanByte : exponent > rule.subtract ? exponent - rule.subtract : 0;
}

// 2^(127 - byte), the factor that quantization applies, for bytes up to 253: no finite amax has a larger one.
AOTRAIN_DEVICE float inverse_of(uint32_t byte) { return bits_as<float>((254 - byte) << 23); }

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
// The instruction takes the upper of two codes first.
__device__ __forceinline__ uint32_t native_word(const float (&y)[4], E4m3) {
    uint32_t word;
    asm("{\n"
        ".reg .b16 a, b;\n"
        "cvt.rn.satfinite.e4m3x2.f32 a, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 b, %4, %3;\n"
        "mov.b32 %0, {a, b};\n"
        "}"
        : "=r"(word)
        : "f"(y[0]), "f"(y[1]), "f"(y[2]), "f"(y[3]));
    return word;
}

__device__ __forceinline__ uint32_t native_word(const float (&y)[4], E5m2) {
    uint32_t word;
    asm("{\n"
        ".reg .b16 a, b;\n"
        "cvt.rn.satfinite.e5m2x2.f32 a, %2, %1;\n"
        "cvt.rn.satfinite.e5m2x2.f32 b, %4, %3;\n"
        "mov.b32 %0, {a, b};\n"
        "}"
        : "=r"(word)
        : "f"(y[0]), "f"(y[1]), "f"(y[2]), "f"(y[3]));
    return word;
}
#endif
// 4-bit conversions are features of an architecture (sm_100a) or a family (sm_100f), absent from plain sm_100 code.
#if __CUDA_ARCH__ >= 1000 && (defined(__CUDA_ARCH_SPECIFIC__) || defined(__CUDA_ARCH_FAMILY_SPECIFIC__))
#define AOTRAIN_NATIVE_FLOAT4 1
__device__ __forceinline__ uint32_t native_word(const float (&y)[8], E2m1) {
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

// y * factor, each product rounded by itself.
template <int N>
AOTRAIN_DEVICE void scale_all(float (&y)[N], float factor) {
    AOTRAIN_UNROLL
    for (int i = 0; i < N; i += 2) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
        asm("{\n"
            ".reg .b64 pair, factors;\n"
            "mov.b64 pair, {%0, %1};\n"
            "mov.b64 factors, {%2, %2};\n"
            "mul.rn.f32x2 pair, pair, factors;\n"
            "mov.b64 {%0, %1}, pair;\n"
            "}"
            : "+f"(y[i]), "+f"(y[i + 1])
            : "f"(factor));
#else
        y[i] *= factor;
        y[i + 1] *= factor;
#endif
    }
}

// A word of the codes of y * inverse, the first in the lowest bits; no product is NaN.
//
// For all values but NaN the GPU's instructions are code_of (PTX ISA, cvt): .rn is to nearest even, .satfinite makes
// what lies beyond the largest value that value with its sign, subnormals are flushed neither in nor out, and zero
// keeps its sign. What they make of a NaN does not matter: in its block, all codes are kNanWord.
template <class E>
AOTRAIN_DEVICE uint32_t encode_word(float (&y)[kCodesPerWord<E>], float inverse) {
    scale_all(y, inverse);
#if defined(AOTRAIN_NATIVE_FLOAT8)
    if constexpr (E::kBits == 8) return native_word(y, E{});
#endif
#if defined(AOTRAIN_NATIVE_FLOAT4)
    if constexpr (E::kBits == 4) return native_word(y, E{});
#endif
    uint32_t word = 0;
    AOTRAIN_UNROLL
    for (int i = 0; i < kCodesPerWord<E>; i++) word |= code_of<E>(y[i]) << (i * E::kBits);
    return word;
}

// `codes` unless the block is one of NaNs. No branch: the words of a block share the mask.
template <class E>
AOTRAIN_DEVICE uint32_t or_nan(uint32_t codes, uint32_t byte) {
    const uint32_t nan = byte == kNanByte ? ~0u : 0;
    return (codes & ~nan) | (E::kNanWord & nan);
}

// Three formats of x. A word holds kPerWord elements; the pattern of a magnitude, its bits in the input's format, has
// the order of the magnitudes with NaN above infinity. `raise` keeps the larger patterns of two words, `amax_bits`
// makes the pattern of lane k float32.
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
    AOTRAIN_DEVICE static float value(uint32_t word, int k) {
        const uint32_t half = k ? word >> 16 : word & 0xFFFF;
#if defined(__CUDA_ARCH__)
        float value;  // exact, and NaN of a NaN
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(half)));
        return value;
#else
        // Exponents are 15 too small after a shift to float32's place, which a product with 2^112 mends, for subnormals
        // too; infinities and NaNs, which it leaves finite, get float32's largest exponent.
        const uint32_t magnitude = (half & 0x7FFF) << 13;
        const uint32_t scaled = bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f);
        const uint32_t special = magnitude >= 0x0F800000 ? kInfinity : 0;
        return bits_as<float>(scaled | special | (half & 0x8000) << 16);
#endif
    }
    AOTRAIN_DEVICE static uint32_t raise(uint32_t largest, uint32_t word) { return raise_halves(largest, word); }
    AOTRAIN_DEVICE static uint32_t amax_bits(uint32_t word, int k) { return bits_as<uint32_t>(value(word, k)); }
};

}  // namespace aotrain::mx
