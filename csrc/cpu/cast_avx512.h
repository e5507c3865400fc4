// Encoding with AVX-512, 64 elements at a time; included by scaled_cast.cpp. The other loops are the portable ones.
#pragma once

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,fma")

#define AOTRAIN_ISA avx512_portable
#include "cast_portable.h"
#undef AOTRAIN_ISA

namespace aotrain::avx512 {

inline __m512 as_float(__m512i x) { return _mm512_castsi512_ps(x); }
inline __m512i as_int(__m512 x) { return _mm512_castps_si512(x); }
inline __m512i all(uint32_t x) { return _mm512_set1_epi32(static_cast<int32_t>(x)); }

// The first min(n - i, 64) of 64 bits.
inline __mmask64 first_bits(int64_t n, int64_t i) { return n - i >= 64 ? ~uint64_t{0} : ~(~uint64_t{0} << (n - i)); }

inline __mmask64 join(const __mmask16 k[4]) {
    return _mm512_kunpackd(_mm512_kunpackw(k[3], k[2]), _mm512_kunpackw(k[1], k[0]));
}

inline __mmask16 part(__mmask64 k, int j) { return static_cast<__mmask16>(k >> (16 * j)); }

struct Float32 : avx512_portable::Float32 {
    static __m512 load(const Bits* x, __mmask16 k) { return _mm512_maskz_loadu_ps(k, x); }
};

struct Bfloat16 : avx512_portable::Bfloat16 {
    static __m512 load(const Bits* x, __mmask16 k) {
        return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k, x)), 16));
    }
};

struct Float16 : avx512_portable::Float16 {
    static __m512 load(const Bits* x, __mmask16 k) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(k, x)); }
};

// code_of of cast_portable.h without the sign; only the lowest byte of each element counts.
template <class E>
inline __m512i magnitude_code(__m512 y) {
    constexpr int kDropped = 23 - E::kMantissa;
    const __m512i own = _mm512_and_si512(as_int(y), all(0x7F800000));
    const __m512i exponent = _mm512_max_epu32(own, all(E::kMinExponent << 23));
    const __m512 step = as_float(_mm512_add_epi32(exponent, all(kDropped << 23)));
    const __m512 sum = _mm512_add_ps(_mm512_abs_ps(y), step);
    return _mm512_add_epi32(as_int(sum), _mm512_srli_epi32(exponent, kDropped));
}

// The lowest bytes of 64 elements, in their order.
inline __m512i pack(const __m512i x[4]) {
    alignas(64) static constexpr struct Order {
        uint8_t at[64] = {};
        constexpr Order() {
            for (int i = 0; i < 64; i++) at[i] = static_cast<uint8_t>(i % 32 * 4);  // 64 and above: the second operand
        }
    } order;
    const __m512i at = _mm512_load_si512(order.at);
    const __m512i low = _mm512_permutex2var_epi8(x[0], at, x[1]), high = _mm512_permutex2var_epi8(x[2], at, x[3]);
    return _mm512_mask_mov_epi8(low, 0xFFFFFFFF00000000, high);
}

// Codes of 64 products.
template <class E, bool Regular>
inline __m512i encode64(const __m512 y[4]) {
    __m512i code[4];
    __mmask16 negative[4], nan[4];
    for (int j = 0; j < 4; j++) {
        code[j] = magnitude_code<E>(y[j]);
        negative[j] = _mm512_movepi32_mask(as_int(y[j]));
        if (!Regular) nan[j] = _mm512_cmp_ps_mask(y[j], y[j], _CMP_UNORD_Q);
    }
    constexpr auto kBias = static_cast<char>(static_cast<uint8_t>(E::kMinExponent << E::kMantissa));
    __m512i codes = _mm512_sub_epi8(pack(code), _mm512_set1_epi8(kBias));
    codes = _mm512_mask_add_epi8(codes, join(negative), codes, _mm512_set1_epi8(-128));
    return Regular ? codes : _mm512_mask_mov_epi8(codes, join(nan), _mm512_set1_epi8(0x7F));
}

// `Each`: a scale per element; otherwise *inverse is that of all.
template <class In, class E, bool Regular, bool Each>
inline void encode_loop(const void* from, int64_t n, const float* inverse, uint8_t* codes) {
    const auto* x = static_cast<const typename In::Bits*>(from);
    const __m512 common = _mm512_set1_ps(*inverse);
    for (int64_t i = 0; i < n; i += 64) {
        const __mmask64 k = first_bits(n, i);
        __m512 y[4];
        for (int j = 0; j < 4; j++) {
            const int64_t at = i + 16 * j;
            const __m512 scale = Each ? _mm512_maskz_loadu_ps(part(k, j), inverse + at) : common;
            y[j] = _mm512_mul_ps(In::load(x + at, part(k, j)), scale);
        }
        _mm512_mask_storeu_epi8(codes + i, k, encode64<E, Regular>(y));
    }
}

template <class In, class E>
void encode(const void* x, int64_t n, float inverse, uint8_t* codes) {
    if (inverse > 0)
        encode_loop<In, E, true, false>(x, n, &inverse, codes);
    else
        encode_loop<In, E, false, false>(x, n, &inverse, codes);
}

template <class In, class E>
void encode_each(const void* x, int64_t n, const float* inverse, bool regular, uint8_t* codes) {
    if (regular)
        encode_loop<In, E, true, true>(x, n, inverse, codes);
    else
        encode_loop<In, E, false, true>(x, n, inverse, codes);
}

template <class In, class E>
inline constexpr CastLoops kLoops{avx512_portable::amax<In>, avx512_portable::amax_columns<In>, encode<In, E>,
                                  encode_each<In, E>, avx512_portable::transpose16};

inline const CastLoops& select(int64_t input, int64_t element) {
    if (input == kFloat32Input) return element == kE4m3 ? kLoops<Float32, E4m3> : kLoops<Float32, E5m2>;
    if (input == kBfloat16Input) return element == kE4m3 ? kLoops<Bfloat16, E4m3> : kLoops<Bfloat16, E5m2>;
    return element == kE4m3 ? kLoops<Float16, E4m3> : kLoops<Float16, E5m2>;
}

}  // namespace aotrain::avx512

#pragma GCC pop_options
