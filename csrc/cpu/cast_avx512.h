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

// Each input has the magnitudes of 64 elements as four vectors, and which elements are negative. `kPairs`:
// the vectors hold even, odd, even and odd elements, 32 of each pair of vectors; otherwise 16 after 16.

struct Float32 : avx512_portable::Float32 {
    static constexpr bool kPairs = false;
    static __mmask64 load(const Bits* x, __mmask64 k, __m512 magnitude[4]) {
        __mmask16 negative[4];
        for (int j = 0; j < 4; j++) {
            const __m512 value = _mm512_maskz_loadu_ps(part(k, j), x + 16 * j);
            magnitude[j] = _mm512_abs_ps(value);
            negative[j] = _mm512_movepi32_mask(as_int(value));
        }
        return join(negative);
    }
};

// Halves of 32 16-bit elements each, and which of them are negative.
inline __mmask64 load_halves(const uint16_t* x, __mmask64 k, __m512i half[2]) {
    half[0] = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(k), x);
    half[1] = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(k >> 32), x + 32);
    return _mm512_kunpackd(_mm512_movepi16_mask(half[1]), _mm512_movepi16_mask(half[0]));
}

struct Bfloat16 : avx512_portable::Bfloat16 {
    static constexpr bool kPairs = true;
    static __mmask64 load(const Bits* x, __mmask64 k, __m512 magnitude[4]) {
        __m512i half[2];
        const __mmask64 negative = load_halves(x, k, half);
        for (int j = 0; j < 2; j++) {
            const __m512i absolute = _mm512_and_si512(half[j], all(0x7FFF7FFF));
            magnitude[2 * j] = as_float(_mm512_slli_epi32(absolute, 16));
            magnitude[2 * j + 1] = as_float(_mm512_and_si512(absolute, all(0xFFFF0000)));
        }
        return negative;
    }
};

struct Float16 : avx512_portable::Float16 {
    static constexpr bool kPairs = false;
    static __mmask64 load(const Bits* x, __mmask64 k, __m512 magnitude[4]) {
        __m512i half[2];
        const __mmask64 negative = load_halves(x, k, half);
        for (int j = 0; j < 2; j++) {
            const __m512i absolute = _mm512_and_si512(half[j], all(0x7FFF7FFF));
            magnitude[2 * j] = _mm512_cvtph_ps(_mm512_castsi512_si256(absolute));
            magnitude[2 * j + 1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(absolute, 1));
        }
        return negative;
    }
};

template <bool Pairs>
inline void load_scales(const float* inverse, __mmask64 k, __m512 scale[4]) {
    for (int j = 0; j < 4; j++) scale[j] = _mm512_maskz_loadu_ps(part(k, j), inverse + 16 * j);
    if (!Pairs) return;
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, all(1));
    for (int j = 0; j < 4; j += 2) {
        const __m512 first = scale[j], second = scale[j + 1];
        scale[j] = _mm512_permutex2var_ps(first, even, second);
        scale[j + 1] = _mm512_permutex2var_ps(first, odd, second);
    }
}

// code_of of cast_portable.h for y >= 0; only the lowest byte of each element counts, and it has the bias added.
template <class E>
inline __m512i biased_code(__m512 y) {
    constexpr int kDropped = 23 - E::kMantissa;
    const __m512i own = _mm512_and_si512(as_int(y), all(0x7F800000));
    const __m512i exponent = _mm512_max_epu32(own, all(E::kMinExponent << 23));
    const __m512 sum = _mm512_add_ps(y, as_float(_mm512_add_epi32(exponent, all(kDropped << 23))));
    return _mm512_add_epi32(as_int(sum), _mm512_srli_epi32(exponent, kDropped));
}

// The bias of biased_code, and what stands for NaN until signs are set: no other code.
template <class E>
inline constexpr uint32_t kBias = (E::kMinExponent << E::kMantissa) & 0xFF;
template <class E>
inline constexpr uint32_t kNanMark = 0x7F;
template <>
inline __m512i biased_code<Int8>(__m512 y) {
    return _mm512_cvtps_epi32(y);
}
template <>
inline constexpr uint32_t kBias<Int8> = 0;
template <>
inline constexpr uint32_t kNanMark<Int8> = 0;  // as zero: neither has a sign

// The lowest bytes of 64 elements, in their order.
template <bool Pairs>
inline __m512i pack(const __m512i x[4]) {
    alignas(64) static constexpr struct Order {
        uint8_t at[64] = {};
        constexpr Order() {  // 64 and above: the second operand
            for (int i = 0; i < 64; i++) at[i] = static_cast<uint8_t>(Pairs ? i % 32 / 2 * 4 + i % 2 * 64 : i % 32 * 4);
        }
    } order;
    const __m512i at = _mm512_load_si512(order.at);
    const __m512i low = _mm512_permutex2var_epi8(x[0], at, x[1]), high = _mm512_permutex2var_epi8(x[2], at, x[3]);
    return _mm512_mask_mov_epi8(low, 0xFFFFFFFF00000000, high);
}

// `Each`: a scale per element; otherwise *inverse is that of all.
template <class In, class E, bool Regular, bool Each>
inline void encode_loop(const void* from, int64_t n, const float* inverse, uint8_t* codes) {
    constexpr bool kInteger = std::is_same_v<E, Int8>;
    const auto* x = static_cast<const typename In::Bits*>(from);
    const __m512 common = _mm512_set1_ps(*inverse);
    __m512 scale[4] = {common, common, common, common};
    for (int64_t i = 0; i < n; i += 64) {
        const __mmask64 k = first_bits(n, i);
        if (Each) load_scales<In::kPairs>(inverse + i, k, scale);
        __m512 magnitude[4];
        __m512i biased[4];
        __mmask64 negative = In::load(x + i, k, magnitude);
        for (int j = 0; j < 4; j++) {
            __m512 y = _mm512_mul_ps(magnitude[j], scale[j]);
            if (E::kSaturate) y = _mm512_min_ps(_mm512_set1_ps(static_cast<float>(E::kMax)), y);  // a NaN stays
            biased[j] = biased_code<E>(y);
            if (!Regular)
                biased[j] = _mm512_mask_mov_epi32(biased[j], _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q),
                                                  all(kBias<E> + kNanMark<E>));
        }
        const __m512i code = _mm512_sub_epi8(pack<In::kPairs>(biased), _mm512_set1_epi8(static_cast<char>(kBias<E>)));
        const __mmask64 nan = Regular ? 0 : _mm512_cmpeq_epi8_mask(code, _mm512_set1_epi8(kNanMark<E>));
        negative &= ~nan;  // one NaN
        __m512i with_sign = kInteger ? _mm512_mask_sub_epi8(code, negative, _mm512_setzero_si512(), code)
                                     : _mm512_mask_add_epi8(code, negative, code,
                                                            _mm512_set1_epi8(static_cast<char>(E::kSign)));
        if (E::kNan != kNanMark<E>) with_sign = _mm512_mask_mov_epi8(with_sign, nan, _mm512_set1_epi8(E::kNan));
        _mm512_mask_storeu_epi8(codes + i, k, with_sign);
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

template <class In>
inline const CastLoops& select_element(const Cast& c) {
    if (saturates(c.scale_format)) {
        if (c.element == kE4m3) return kLoops<In, Saturating<E4m3>>;
        return c.element == kE5m2 ? kLoops<In, Saturating<E5m2>> : kLoops<In, Saturating<E2m1>>;
    }
    if (c.element == kE2m1) return kLoops<In, E2m1>;
    return c.element == kE4m3 ? kLoops<In, E4m3> : c.element == kE5m2 ? kLoops<In, E5m2> : kLoops<In, Int8>;
}

inline const CastLoops& select(const Cast& c) {
    if (c.input == kFloat32Input) return select_element<Float32>(c);
    return c.input == kBfloat16Input ? select_element<Bfloat16>(c) : select_element<Float16>(c);
}

}  // namespace aotrain::avx512

#pragma GCC pop_options
