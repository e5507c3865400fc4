// AVX-512 path of the Adam(W) step; included by adam.cpp.
//
// A block is decoded and updated while the block before it is encoded: encoding needs a block's largest magnitude, and
// the two keep different units of the CPU busy.
#pragma once

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,fma,bmi2")

#define AOTRAIN_ISA avx512_portable
#include "adam_portable.h"
#undef AOTRAIN_ISA

namespace aotrain::avx512 {
using avx512_portable::kFloat8Values;
}
#include "codecs_avx512.h"

namespace aotrain::avx512 {

inline __m512 load(const float* p, __mmask16 k) { return _mm512_maskz_loadu_ps(k, p); }

inline __m512 load(const uint16_t* p, __mmask16 k) {
    return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k, p)), 16));
}

inline void store(float* p, __mmask16 k, __m512 x, const uint16_t*) { _mm512_mask_storeu_ps(p, k, x); }

// nearest_bf16 of adam_portable.h, or stochastic_bf16 if there is noise.
inline void store(uint16_t* p, __mmask16 k, __m512 x, const uint16_t* noise) {
    const __m512i bits = as_int(x), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, all(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, all(0x7FFF))), 16);
    if (noise) {
        const __m512i draw = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k, noise));
        const __m512i magnitude = _mm512_and_si512(bits, all(INT32_MAX));
        const __m512i limited = _mm512_min_epi32(magnitude, all(0x7F7F0000));
        const __m512i up = _mm512_srli_epi32(_mm512_add_epi32(limited, draw), 16);
        const __mmask16 finite = _mm512_cmplt_epi32_mask(magnitude, all(0x7F800000));
        rounded = _mm512_mask_or_epi32(rounded, finite, up, _mm512_and_si512(high, all(0x8000)));
    }
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, all(0x7FC0));
    _mm256_mask_storeu_epi16(p, k, _mm512_cvtepi32_epi16(rounded));
}

// fill_noise of adam_portable.h for 8 counters at a time: `noise` gets the bits of 64 elements from 8 * counter on.
inline void philox64(uint64_t key, uint64_t counter, uint32_t* noise) {
    // Unpacking below takes counters from every other lane.
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const __m512i low = _mm512_set1_epi64(0xFFFFFFFF);
    const __m512i counters = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(counter)), order);
    // One word in the low half of each lane; the multiplication ignores the high half.
    __m512i c0 = counters, c1 = _mm512_srli_epi64(counters, 32), c2 = _mm512_setzero_si512(), c3 = c2;
    uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; round++) {
        const __m512i product0 = _mm512_mul_epu32(c0, _mm512_set1_epi64(0xD2511F53));
        const __m512i product1 = _mm512_mul_epu32(c2, _mm512_set1_epi64(0xCD9E8D57));
        c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), c1, _mm512_set1_epi64(key0), 0x96);  // xor
        c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), c3, _mm512_set1_epi64(key1), 0x96);
        c1 = product1;
        c3 = product0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    const __m512i words01 = _mm512_ternarylogic_epi64(_mm512_slli_epi64(c1, 32), c0, low, 0xF8);
    const __m512i words23 = _mm512_ternarylogic_epi64(_mm512_slli_epi64(c3, 32), c2, low, 0xF8);
    _mm512_storeu_si512(noise, _mm512_unpacklo_epi64(words01, words23));
    _mm512_storeu_si512(noise + 16, _mm512_unpackhi_epi64(words01, words23));
}

inline const uint16_t* fill_noise(const Block& b, uint32_t* words) {
    const uint64_t first = static_cast<uint64_t>(b.index) >> 3, end = (static_cast<uint64_t>(b.index + b.n) + 7) >> 3;
    for (uint64_t counter = first; counter < end; counter += 8) philox64(b.key, counter, words + 4 * (counter - first));
    return reinterpret_cast<const uint16_t*>(words) + (b.index & 7);
}

// A block whose moments are updated but not yet encoded.
struct Buffer {
    alignas(64) float m[kMaxBlock], v[kMaxBlock];
    Block block;
    Scaling m_scaling, v_scaling;
    bool regular;  // whether encode can take it: no scale is NaN, infinite or nearly so
};

// The first min(n - i, 64) of 64 bits.
inline __mmask64 first_bits(int64_t n, int64_t i) { return n - i >= 64 ? ~uint64_t{0} : ~(~uint64_t{0} << (n - i)); }

template <class Codec>
inline void* at(void* state, int64_t i) {
    return static_cast<char*>(state) + i * Codec::kBytes / 64;
}

template <class Codec>
inline void encode64(const float* x, const Scaling& scaling, void* state, int64_t i, __mmask64 k) {
    __m512 vectors[4];
    for (int j = 0; j < 4; j++) vectors[j] = _mm512_load_ps(x + i + 16 * j);
    uint64_t unsure = Codec::encode(vectors, scaling, at<Codec>(state, i), k) & k;
    for (; unsure; unsure &= unsure - 1) {
        const int64_t element = i + __builtin_ctzll(unsure);
        const float y = x[element] / _mm512_cvtss_f32(scaling.scale);
        static_cast<uint8_t*>(state)[element] =
            static_cast<uint8_t>(avx512_portable::dynamic_code(kMap<8, Codec::kSigned>, y));
    }
}

template <class M, class V>
inline void encode64(Buffer& b, int64_t i, __mmask64 k) {
    encode64<M>(b.m, b.m_scaling, b.block.m, i, k);
    encode64<V>(b.v, b.v_scaling, b.block.v, i, k);
}

template <class M, class V>
inline void encode_rest(Buffer& b) {
    if (!b.regular) {
        avx512_portable::encode<true>(M::kFormat, b.m, b.block.m, b.block.m_scale, b.block.n);
        avx512_portable::encode<false>(V::kFormat, b.v, b.block.v, b.block.v_scale, b.block.n);
        return;
    }
    for (int64_t i = 0; i < b.block.n; i += 64) encode64<M, V>(b, i, first_bits(b.block.n, i));
}

template <class Codec>
inline bool set_scale(__m512i amax, float* scale, Scaling& scaling) {
    float value = __builtin_bit_cast(float, _mm512_reduce_max_epu32(amax));
    if (value < kAmaxMin) value = kAmaxMin;
    if (Codec::kFormat == kFloat8) value = value / kFloat8Max;
    scaling = {all(value), all(1.0f / value)};
    *scale = value;
    return value < kLargestScale;
}

struct Amax {
    __m512i m, v;  // patterns of magnitudes
};

// One vector of the update; m and v are replaced.
template <class P, class G>
inline void update(P* param, const G* grad, const uint16_t* noise, const Options& o, __mmask16 k, __m512& m,
                   __m512& v) {
    __m512 p = load(param, k), g = load(grad, k);
    if (o.maximize) g = _mm512_xor_ps(g, all(-0.0f));
    if (o.coupled_decay != 0.0f) g = _mm512_add_ps(g, _mm512_mul_ps(p, all(o.coupled_decay)));
    m = _mm512_add_ps(m, _mm512_mul_ps(_mm512_sub_ps(g, m), all(o.one_minus_beta1)));
    v = _mm512_add_ps(v, _mm512_mul_ps(_mm512_sub_ps(_mm512_mul_ps(g, g), v), all(o.one_minus_beta2)));
    const __m512 root = _mm512_mul_ps(_mm512_sqrt_ps(v), all(o.inv_sqrt_bias_correction2));
    const __m512 ratio = _mm512_div_ps(m, _mm512_add_ps(root, all(o.eps)));
    p = _mm512_mul_ps(p, all(o.decay_factor));
    store(param, k, _mm512_sub_ps(p, _mm512_mul_ps(ratio, all(o.step_size))), noise);
}

// 64 elements of the update; the moments go to the buffer, or, unquantized, back where they came from.
template <class M, class V, class P, class G>
inline void update64(Buffer& b, int64_t i, __mmask64 k, const uint16_t* noise, const Options& o, Amax& amax) {
    constexpr bool kQuantized = M::kFormat != kFloat32;
    const Block& block = b.block;
    __m512 m[4], v[4];
    M::decode(at<M>(block.m, i), k, all(kQuantized ? *block.m_scale : 1.0f), m);
    V::decode(at<V>(block.v, i), k, all(kQuantized ? *block.v_scale : 1.0f), v);
    for (int j = 0; j < 4; j++) {
        const int64_t element = i + 16 * j;
        const __mmask16 part = static_cast<__mmask16>(k >> (16 * j));
        update(static_cast<P*>(block.param) + element, static_cast<const G*>(block.grad) + element,
               noise ? noise + element : nullptr, o, part, m[j], v[j]);
        if (!kQuantized) continue;
        if (part != 0xFFFF) {  // lanes beyond the end: code 0 is a negative number, and 0 * inf is NaN
            m[j] = _mm512_maskz_mov_ps(part, m[j]);
            v[j] = _mm512_maskz_mov_ps(part, v[j]);
        }
        _mm512_store_ps(b.m + element, m[j]);
        _mm512_store_ps(b.v + element, v[j]);
        amax.m = _mm512_max_epu32(amax.m, as_int(_mm512_abs_ps(m[j])));
        amax.v = _mm512_max_epu32(amax.v, as_int(v[j]));  // never negative
    }
    if constexpr (!kQuantized) {
        M::encode(m, at<M>(block.m, i), k);
        V::encode(v, at<V>(block.v, i), k);
    }
}

template <class M, class V, class P, class G>
void step_range(const Tensor& tensor, const Options& o, int64_t first, int64_t last) {
    constexpr bool kQuantized = M::kFormat != kFloat32;
    Buffer buffers[2];
    uint32_t words[kMaxBlock / 2 + 64];
    Buffer* before = nullptr;
    for (int64_t number = first; number < last; number++) {
        Buffer& b = buffers[number & 1];
        b.block = block_at(tensor, o, number);
        const int64_t n = b.block.n;
        const uint16_t* noise = nullptr;
        if (o.stochastic) noise = fill_noise(b.block, words);
        Amax amax{_mm512_setzero_si512(), _mm512_setzero_si512()};
        if (before && before->regular && before->block.n == n && n % 64 == 0) {
            for (int64_t i = 0; i < n; i += 64) {
                update64<M, V, P, G>(b, i, ~uint64_t{0}, noise, o, amax);
                if constexpr (kQuantized) encode64<M, V>(*before, i, ~uint64_t{0});
            }
        } else {
            for (int64_t i = 0; i < n; i += 64) update64<M, V, P, G>(b, i, first_bits(n, i), noise, o, amax);
            if constexpr (kQuantized)
                if (before) encode_rest<M, V>(*before);
        }
        if constexpr (kQuantized) {
            const bool m_regular = set_scale<M>(amax.m, b.block.m_scale, b.m_scaling);
            const bool v_regular = set_scale<V>(amax.v, b.block.v_scale, b.v_scaling);
            b.regular = m_regular && v_regular;
            before = &b;
        }
    }
    if constexpr (kQuantized)
        if (before) encode_rest<M, V>(*before);
}

template <class M, class V>
StepRange select(bool param_bf16, bool grad_bf16) {
    if (param_bf16) return grad_bf16 ? step_range<M, V, uint16_t, uint16_t> : step_range<M, V, uint16_t, float>;
    return grad_bf16 ? step_range<M, V, float, uint16_t> : step_range<M, V, float, float>;
}

inline StepRange select(const Options& o) {
    switch (o.format) {
        case kDynamic8:
            return select<Dynamic8<SignedDynamic8>, Dynamic8<UnsignedDynamic8>>(o.param_bf16, o.grad_bf16);
        case kDynamic4: return select<Dynamic4<true>, Dynamic4<false>>(o.param_bf16, o.grad_bf16);
        case kFloat8: return select<Float8<true>, Float8<false>>(o.param_bf16, o.grad_bf16);
        default: return select<Float32<true>, Float32<false>>(o.param_bf16, o.grad_bf16);
    }
}

}  // namespace aotrain::avx512

#pragma GCC pop_options
