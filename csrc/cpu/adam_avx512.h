// AVX-512 path of the 8-bit Adam(W) step; included by adam.cpp.
#pragma once

#include <immintrin.h>

#include "adam.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")

namespace aotrain {
namespace {

template <bool Signed>
constexpr Lines<Signed> kLines{Map<Signed>{}};

// The permutation below looks up by the low 4 bits of the exponent of a number in [1, 256].
struct DecodeTable {
    float offset[16] = {};
    float stride[16] = {};  // times the number of steps, a power of two

    template <bool Signed>
    constexpr explicit DecodeTable(const Map<Signed>& map) {
        for (int d = 0; d < 8; d++) {
            const int slot = (127 + d + (Signed ? 0 : 1)) & 15;
            offset[slot] = map.offset[d];
            stride[slot] = d < 7 ? map.stride[d] * static_cast<float>(Map<Signed>::steps(d)) : 0.0f;
        }
    }
};
constexpr DecodeTable kSignedDecode{Map<true>{}};
constexpr DecodeTable kUnsignedDecode{Map<false>{}};

inline __m512 as_float(__m512i x) { return _mm512_castsi512_ps(x); }
inline __m512i as_int(__m512 x) { return _mm512_castps_si512(x); }

inline __m512 load(const float* p, __mmask16 k) { return _mm512_maskz_loadu_ps(k, p); }

inline __m512 load(const uint16_t* p, __mmask16 k) {
    return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k, p)), 16));
}

inline void store(float* p, __mmask16 k, __m512 x) { _mm512_mask_storeu_ps(p, k, x); }

inline void store(uint16_t* p, __mmask16 k, __m512 x) {  // round to nearest, ties to even; NaN stays NaN
    const __m512i bits = as_int(x), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0));
    _mm256_mask_storeu_epi16(p, k, _mm512_cvtepi32_epi16(rounded));
}

inline __m512i load_codes(const uint8_t* codes, __mmask16 k) {
    return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(k, codes));
}

// A_d + k * B_d, where f = (number of steps of the decade) + k.
inline __m512 decode_index(__m512 f, const DecodeTable& table) {
    const __m512i bits = as_int(f), slot = _mm512_srli_epi32(bits, 23);
    const __m512 offset = _mm512_permutexvar_ps(slot, _mm512_loadu_ps(table.offset));
    const __m512 stride = _mm512_permutexvar_ps(slot, _mm512_loadu_ps(table.stride));
    const __m512 one = _mm512_set1_ps(1.0f);
    // (bits & 0x7FFFFF) | bits of 1: k / steps + 1
    const __m512i fraction = _mm512_ternarylogic_epi32(bits, _mm512_set1_epi32(0x7FFFFF), as_int(one), 0xEA);
    return _mm512_add_ps(offset, _mm512_mul_ps(_mm512_sub_ps(as_float(fraction), one), stride));
}

inline __m512 decode_signed(__m512i code) {
    const __m512i centered = _mm512_sub_epi32(code, _mm512_set1_epi32(kZeroCode));
    const __m512 value = decode_index(_mm512_cvtepi32_ps(_mm512_abs_epi32(centered)), kSignedDecode);
    const __mmask16 nonzero = _mm512_test_epi32_mask(centered, centered);
    // value | (centered & sign bit)
    const __m512i sign = _mm512_set1_epi32(INT32_MIN);
    return as_float(_mm512_maskz_ternarylogic_epi32(nonzero, as_int(value), centered, sign, 0xF8));
}

inline __m512 decode_unsigned(__m512i code) {
    return decode_index(_mm512_cvtepi32_ps(_mm512_add_epi32(code, _mm512_set1_epi32(1))), kUnsignedDecode);
}

// Index by piecewise linear F of a ~ |x / scale|, or, where F is close to an integer, by x / scale and the midpoints.
template <bool Signed>
[[gnu::noinline]] __m512i exact_index(__m512 x, __m512 scale, __m512 line, __m512 cap) {
    const __m512 y = _mm512_div_ps(x, scale), a = _mm512_abs_ps(y);
    const __m512 limited = _mm512_min_ps(line, _mm512_add_ps(cap, _mm512_set1_ps(0.5f)));
    const __m512i nearest = _mm512_cvtps_epi32(limited);
    const float* midpoints = Signed ? kSigned.midpoint : kUnsigned.midpoint;
    const __m512 midpoint = _mm512_i32gather_ps(nearest, midpoints, 4);
    __mmask16 below = _mm512_cmp_ps_mask(a, midpoint, _CMP_LT_OQ);
    if (Signed) {  // a tie goes to the larger value
        const __mmask16 tie = _mm512_cmp_ps_mask(a, midpoint, _CMP_EQ_OQ);
        below = _kor_mask16(below, _kand_mask16(tie, _mm512_movepi32_mask(as_int(x))));
    }
    return _mm512_mask_sub_epi32(nearest, below, nearest, _mm512_set1_epi32(1));
}

inline __m512 lookup(const float* table, __m512i slot) {  // table[slot % 32]
    return _mm512_permutex2var_ps(_mm512_loadu_ps(table), slot, _mm512_loadu_ps(table + 16));
}

template <bool Signed>
inline __m128i encode(__m512 x, __m512 scale, __m512 inverse) {
    const Lines<Signed>& lines = kLines<Signed>;
    __m512 a = _mm512_mul_ps(x, inverse);
    if (Signed) a = _mm512_abs_ps(a);
    a = _mm512_max_ps(a, _mm512_set1_ps(0x1p-31f));
    const __m512i bias = _mm512_permutex2var_epi32(_mm512_loadu_si512(lines.bias), _mm512_srli_epi32(as_int(a), 23),
                                                   _mm512_loadu_si512(lines.bias + 16));
    const __m512i slot = _mm512_srli_epi32(_mm512_add_epi32(as_int(a), bias), 23);
    const __m512 line = _mm512_fmadd_ps(a, lookup(lines.slope, slot), lookup(lines.constant, slot));
    const __m512 cap = lookup(lines.cap, slot);
    __m512i index = _mm512_cvttps_epi32(_mm512_min_ps(line, cap));
    // The errors of a (2 units), of F and of the midpoints' rounding are below 2^-13 together.
    const __m512 distance = _mm512_abs_ps(_mm512_reduce_ps(line, _MM_FROUND_TO_NEAREST_INT));
    const __mmask16 unsure = _mm512_cmp_ps_mask(distance, _mm512_set1_ps(0x1p-12f), _CMP_LT_OQ);
    if (__builtin_expect(!_mm512_kortestz(unsure, unsure), 0)) index = exact_index<Signed>(x, scale, line, cap);
    if (!Signed) return _mm512_cvtepi32_epi8(index);
    const __m512i zero_code = _mm512_set1_epi32(kZeroCode);
    const __mmask16 negative = _mm512_movepi32_mask(as_int(x));
    __m512i code = _mm512_add_epi32(zero_code, index);
    code = _mm512_mask_sub_epi32(code, negative, zero_code, index);
    return _mm512_cvtepi32_epi8(_mm512_max_epi32(code, _mm512_setzero_si512()));  // there is no code for -1
}

template <bool Signed>
inline void encode_block(const float* x, uint8_t* codes, float* scale_out, __m512i amax, int64_t n) {
    uint32_t bits = _mm512_reduce_max_epu32(amax);
    float scale = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(bits))));
    if (scale < kAmaxMin) scale = kAmaxMin;
    *scale_out = scale;
    // 1 / scale would be subnormal or NaN.
    if (!(scale < 0x1p125f)) return encode_scalar<Signed>(x, codes, scale, n);
    const __m512 scales = _mm512_set1_ps(scale), inverse = _mm512_set1_ps(1.0f / scale);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m128i code = encode<Signed>(_mm512_loadu_ps(x + i), scales, inverse);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), code);
    }
    if (i < n) {
        const __mmask16 k = static_cast<__mmask16>((1u << (n - i)) - 1);
        _mm_mask_storeu_epi8(codes + i, k, encode<Signed>(_mm512_loadu_ps(x + i), scales, inverse));
    }
}

struct Amax {
    __m512i m, v;  // patterns of magnitudes
};

template <bool Plain, typename P, typename G>
inline void update(const Block<P, G>& b, const Scalars& s, int64_t i, __mmask16 k, float* ms, float* vs, Amax& amax) {
    __m512 m = _mm512_mul_ps(decode_signed(load_codes(b.m_codes + i, k)), _mm512_set1_ps(*b.m_scale));
    __m512 v = _mm512_mul_ps(decode_unsigned(load_codes(b.v_codes + i, k)), _mm512_set1_ps(*b.v_scale));
    __m512 p = load(b.param + i, k), g = load(b.grad + i, k);
    if (!Plain) {
        if (s.maximize) g = _mm512_xor_ps(g, _mm512_set1_ps(-0.0f));
        if (s.coupled_decay != 0.0f) g = _mm512_add_ps(g, _mm512_mul_ps(p, _mm512_set1_ps(s.coupled_decay)));
    }
    const __m512 c1 = _mm512_set1_ps(s.one_minus_beta1), c2 = _mm512_set1_ps(s.one_minus_beta2);
    m = _mm512_add_ps(m, _mm512_mul_ps(_mm512_sub_ps(g, m), c1));
    v = _mm512_add_ps(v, _mm512_mul_ps(_mm512_sub_ps(_mm512_mul_ps(g, g), v), c2));
    const __m512 root = _mm512_mul_ps(_mm512_sqrt_ps(v), _mm512_set1_ps(s.inv_sqrt_bias_correction2));
    const __m512 ratio = _mm512_div_ps(m, _mm512_add_ps(root, _mm512_set1_ps(s.eps)));
    p = _mm512_mul_ps(p, _mm512_set1_ps(s.decay_factor));
    store(b.param + i, k, _mm512_sub_ps(p, _mm512_mul_ps(ratio, _mm512_set1_ps(s.step_size))));
    if (k != 0xFFFF) {  // lanes beyond the end: code 0 is a negative number, and 0 * inf is NaN
        m = _mm512_maskz_mov_ps(k, m);
        v = _mm512_maskz_mov_ps(k, v);
    }
    _mm512_storeu_ps(ms + i, m);
    _mm512_storeu_ps(vs + i, v);
    amax.m = _mm512_max_epu32(amax.m, as_int(_mm512_abs_ps(m)));
    amax.v = _mm512_max_epu32(amax.v, as_int(_mm512_abs_ps(v)));
}

template <bool Plain, typename P, typename G>
void step_block(const Block<P, G>& b, const Scalars& s) {
    alignas(64) float m[kMaxBlock + 16], v[kMaxBlock + 16];
    Amax amax{_mm512_setzero_si512(), _mm512_setzero_si512()};
    int64_t i = 0;
    for (; i + 16 <= b.n; i += 16) update<Plain>(b, s, i, static_cast<__mmask16>(-1), m, v, amax);
    if (i < b.n) {
        const __mmask16 k = static_cast<__mmask16>((1u << (b.n - i)) - 1);
        update<Plain>(b, s, i, k, m, v, amax);
    }
    encode_block<true>(m, b.m_codes, b.m_scale, amax.m, b.n);
    encode_block<false>(v, b.v_codes, b.v_scale, amax.v, b.n);
}

}  // namespace

template <typename P, typename G>
void step_block_avx512(const Block<P, G>& b, const Scalars& s) {
    if (s.maximize || s.coupled_decay != 0.0f)
        step_block<false>(b, s);
    else
        step_block<true>(b, s);
}

}  // namespace aotrain

#pragma GCC pop_options
