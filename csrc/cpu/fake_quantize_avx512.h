// Fake quantization with AVX-512, 32 elements at a time, and the scales of 16 groups at a time; included by
// fake_quantize.cpp.
#pragma once

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,fma,bmi2")

#define AOTRAIN_ISA avx512_portable
#include "fake_quantize_portable.h"
#undef AOTRAIN_ISA

namespace aotrain::avx512 {

inline __m512 as_float(__m512i x) { return _mm512_castsi512_ps(x); }
inline __m512i as_int(__m512 x) { return _mm512_castps_si512(x); }
inline __m512i all(uint32_t x) { return _mm512_set1_epi32(static_cast<int32_t>(x)); }

// Which of 32 elements to load or store: all of them, or the first few.
struct Every {
    static __mmask32 mask() { return ~__mmask32{0}; }
    static __m512i load16(const void* x) { return _mm512_loadu_si512(x); }
    static __m512i load32(const void* x, int half) { return _mm512_loadu_si512(static_cast<const char*>(x) + 64 * half); }
    static void store16(void* to, __m512i x) { _mm512_storeu_si512(to, x); }
    static void store32(void* to, int half, __m512i x) { _mm512_storeu_si512(static_cast<char*>(to) + 64 * half, x); }
};

struct First {
    __mmask32 k;
    __mmask32 mask() const { return k; }
    explicit First(int64_t n) : k((uint32_t{1} << n) - 1) {}  // n < 32
    __mmask16 of_half(int half) const { return static_cast<__mmask16>(k >> (16 * half)); }
    __m512i load16(const void* x) const { return _mm512_maskz_loadu_epi16(k, x); }
    __m512i load32(const void* x, int half) const {
        return _mm512_maskz_loadu_epi32(of_half(half), static_cast<const char*>(x) + 64 * half);
    }
    void store16(void* to, __m512i x) const { _mm512_mask_storeu_epi16(to, k, x); }
    void store32(void* to, int half, __m512i x) const {
        _mm512_mask_storeu_epi32(static_cast<char*>(to) + 64 * half, of_half(half), x);
    }
};

// 32 elements at a time of n: function(index of the first, which of them).
template <class Function>
inline void for_each_32(int64_t n, const Function& function) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) function(i, Every{});
    if (i < n) function(i, First(n - i));
}

// Each dtype: two vectors with the numbers of 32 elements in an order of its own; storing such numbers, rounded, and
// storing those of 32 gradients whose bits are set in two masks of that order, and these as one; keys (see key_of) that are folded with
// an operation; and 2^k for which x + 2^k * (the power of two below x) rounds x to the dtype.

// key_of of integers of 32 bits, and the way back.
inline __m512i bits_of_keys(__m512i keys, uint32_t magnitude) {
    return _mm512_ternarylogic_epi32(keys, _mm512_srai_epi32(keys, 31), all(magnitude), 0x78);
}

struct Words {
    static __m512i max(__m512i a, __m512i b) { return _mm512_max_epi16(a, b); }
    static __m512i min(__m512i a, __m512i b) { return _mm512_min_epi16(a, b); }
    static __m512i keys(__m512i x) {  // x ^ (x < 0 ? 0x7FFF : 0)
        return _mm512_ternarylogic_epi32(x, _mm512_srai_epi16(x, 15), all(0x7FFF7FFF), 0x78);
    }
    static __m512i magnitudes(__m512i x) { return _mm512_and_si512(x, all(0x7FFF7FFF)); }
    template <class Which, class Function>
    static void each_vector(const uint16_t* x, Which which, const Function& function) {
        function(which.load16(x));
    }
    // The halves of each element's 32 bits, folded, as an integer of 32 bits.
    static __m512i fold_max(__m512i x) {
        return _mm512_max_epi32(_mm512_srai_epi32(x, 16), _mm512_srai_epi32(_mm512_slli_epi32(x, 16), 16));
    }
    static __m512i fold_min(__m512i x) {
        return _mm512_min_epi32(_mm512_srai_epi32(x, 16), _mm512_srai_epi32(_mm512_slli_epi32(x, 16), 16));
    }
};

struct Bfloat16 : Words {
    using Portable = avx512_portable::Bfloat16;
    static constexpr float kSplit = 0x1p16f;
    template <class Which>
    static void load_pair(const uint16_t* x, Which which, __m512 value[2]) {
        const __m512i words = which.load16(x);
        value[0] = as_float(_mm512_slli_epi32(words, 16));
        value[1] = as_float(_mm512_and_si512(words, all(0xFFFF0000)));
    }
    static __m512 value_of_keys(__m512i keys) { return as_float(_mm512_slli_epi32(bits_of_keys(keys, 0x7FFF), 16)); }
    static __m512 round(__m512 x) { return as_float(_mm512_and_si512(rounded(x), all(0xFFFF0000))); }
    static __m512i rounded(__m512 x) {
        const __m512i bits = as_int(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), all(1));
        return _mm512_add_epi32(_mm512_add_epi32(bits, all(0x7FFF)), odd);
    }
    template <class Which>
    static void store_pair(uint16_t* to, Which which, const __m512 value[2]) {
        const __m512i low = _mm512_srli_epi32(rounded(value[0]), 16), high = rounded(value[1]);
        which.store16(to, _mm512_ternarylogic_epi32(low, high, all(0xFFFF0000), 0xF8));
    }
    static uint32_t in_order(const __mmask16 inside[2]) {
        return _pdep_u32(inside[0], 0x55555555) | _pdep_u32(inside[1], 0xAAAAAAAA);
    }
    template <class Which>
    static void keep(const uint16_t* from, uint16_t* to, Which which, const __mmask16 inside[2]) {
        const __m512i words = which.load16(from);
        const __m512i low = _mm512_maskz_and_epi32(inside[0], words, all(0x0000FFFF));
        const __m512i both = _mm512_mask_or_epi32(low, inside[1], low, _mm512_and_si512(words, all(0xFFFF0000)));
        which.store16(to, both);
    }
};

struct Float16 : Words {
    using Portable = avx512_portable::Float16;
    static constexpr float kSplit = 0x1p13f;
    static constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    template <class Which>
    static void load_pair(const uint16_t* x, Which which, __m512 value[2]) {
        const __m512i words = which.load16(x);
        value[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(words));
        value[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1));
    }
    static __m512 value_of_keys(__m512i keys) {
        return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits_of_keys(keys, 0x7FFF)));
    }
    static __m512 round(__m512 x) { return _mm512_cvtph_ps(_mm512_cvtps_ph(x, kNearest)); }
    template <class Which>
    static void store_pair(uint16_t* to, Which which, const __m512 value[2]) {
        const __m256i low = _mm512_cvtps_ph(value[0], kNearest), high = _mm512_cvtps_ph(value[1], kNearest);
        which.store16(to, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
    }
    static uint32_t in_order(const __mmask16 inside[2]) { return _mm512_kunpackw(inside[1], inside[0]); }
    template <class Which>
    static void keep(const uint16_t* from, uint16_t* to, Which which, const __mmask16 inside[2]) {
        const auto kept = static_cast<__mmask32>(_mm512_kunpackw(inside[1], inside[0]));
        which.store16(to, _mm512_maskz_mov_epi16(kept, which.load16(from)));
    }
};

struct Float32 {
    using Portable = avx512_portable::Float32;
    static constexpr float kSplit = 0;
    static __m512i max(__m512i a, __m512i b) { return _mm512_max_epi32(a, b); }
    static __m512i min(__m512i a, __m512i b) { return _mm512_min_epi32(a, b); }
    static __m512i fold_max(__m512i x) { return x; }
    static __m512i fold_min(__m512i x) { return x; }
    static __m512i keys(__m512i x) {
        return _mm512_ternarylogic_epi32(x, _mm512_srai_epi32(x, 31), all(0x7FFFFFFF), 0x78);
    }
    static __m512i magnitudes(__m512i x) { return _mm512_and_si512(x, all(0x7FFFFFFF)); }
    static __m512 value_of_keys(__m512i keys) { return as_float(bits_of_keys(keys, 0x7FFFFFFF)); }
    static __m512 round(__m512 x) { return x; }
    template <class Which, class Function>
    static void each_vector(const uint32_t* x, Which which, const Function& function) {
        for (int half = 0; half < 2; half++) function(which.load32(x, half));
    }
    template <class Which>
    static void load_pair(const uint32_t* x, Which which, __m512 value[2]) {
        for (int half = 0; half < 2; half++) value[half] = as_float(which.load32(x, half));
    }
    template <class Which>
    static void store_pair(uint32_t* to, Which which, const __m512 value[2]) {
        for (int half = 0; half < 2; half++) which.store32(to, half, as_int(value[half]));
    }
    static uint32_t in_order(const __mmask16 inside[2]) { return _mm512_kunpackw(inside[1], inside[0]); }
    template <class Which>
    static void keep(const uint32_t* from, uint32_t* to, Which which, const __mmask16 inside[2]) {
        for (int half = 0; half < 2; half++)
            which.store32(to, half, _mm512_maskz_mov_epi32(inside[half], which.load32(from, half)));
    }
};

// Keys of group elements, folded to one vector; `Magnitudes` instead of keys for their maximum alone.
template <class In, bool Magnitudes>
inline void fold_group(const typename In::Portable::Bits* x, int64_t size, __m512i& smallest, __m512i& largest) {
    __m512i low = _mm512_setzero_si512(), high = low;  // 0 is always within the bounds
    for_each_32(size, [&](int64_t i, auto which) {
        In::each_vector(x + i, which, [&](__m512i bits) {
            const __m512i keys = Magnitudes ? In::magnitudes(bits) : In::keys(bits);
            high = In::max(high, keys);
            if (!Magnitudes) low = In::min(low, keys);
        });
    });
    smallest = low, largest = high;
}

template <class In, bool Max>
inline __m512i merge(__m512i a, __m512i b) {
    return Max ? In::max(a, b) : In::min(a, b);
}

// Sixteen vectors to one, whose element j is vector j folded.
template <class In, bool Max>
inline __m512i fold_vectors(const __m512i v[kGroups]) {
    __m512i quarter[4];
    for (int i = 0; i < 4; i++) {
        const __m512i *a = v + 4 * i;
        const __m512i ab = merge<In, Max>(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
        const __m512i cd = merge<In, Max>(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
        quarter[i] = merge<In, Max>(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    }
    // Lanes of 128 bits: the even ones and the odd ones of two vectors.
    auto lanes = [](__m512i a, __m512i b) {
        return merge<In, Max>(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
    };
    const __m512i all_lanes = lanes(lanes(quarter[0], quarter[1]), lanes(quarter[2], quarter[3]));
    return Max ? In::fold_max(all_lanes) : In::fold_min(all_lanes);
}

// find_scales of fake_quantize_portable.h, of 16 groups in each operation.
template <class In, class Round, bool Narrow>
inline void find_scales(const FakeQuantize& f, __m512i smallest, __m512i largest, Scales& s) {
    const __m512i limit = all(In::Portable::kInfinity);
    const __mmask16 finite = _mm512_mask_cmpgt_epi32_mask(_mm512_cmplt_epi32_mask(largest, limit), smallest,
                                                          all(~uint32_t{In::Portable::kInfinity}));
    const auto lowest = static_cast<float>(f.lowest), highest = static_cast<float>(f.highest);
    const __m512 high = In::value_of_keys(largest), range = _mm512_set1_ps(highest - lowest);
    const __m512 low = f.mapping == kSymmetric ? _mm512_setzero_ps() : In::value_of_keys(smallest);
    const __m512 eps = _mm512_set1_ps(__builtin_bit_cast(float, static_cast<uint32_t>(f.eps)));
    __m512 scale, zero_point = _mm512_set1_ps(static_cast<float>(f.zero_point));
    if (f.mapping == kSymmetric) {
        scale = Round::round(_mm512_div_ps(high, _mm512_set1_ps((highest - lowest) / 2)));
    } else if (f.mapping == kAsymmetric) {
        scale = Round::round(_mm512_div_ps(Round::round(_mm512_sub_ps(high, low)), range));
    } else {
        const __m512 below = Round::round(_mm512_div_ps(low, _mm512_set1_ps(lowest)));
        scale = _mm512_max_ps(below, Round::round(_mm512_div_ps(high, _mm512_set1_ps(highest))));
    }
    scale = _mm512_max_ps(scale, eps);
    if (f.mapping == kAsymmetric) {
        const __m512 steps = Round::round(_mm512_div_ps(low, scale)), round = _mm512_set1_ps(kRound);
        const __m512 code = _mm512_sub_ps(_mm512_set1_ps(lowest), _mm512_sub_ps(_mm512_add_ps(steps, round), round));
        zero_point = _mm512_min_ps(_mm512_max_ps(code, _mm512_set1_ps(lowest)), _mm512_set1_ps(highest));
    }
    float smallest_normal = 0x1p-126f;
    if (f.scale_dtype == kBfloat16Input) scale = Bfloat16::round(scale);
    if (f.scale_dtype == kFloat16Input) scale = Float16::round(scale), smallest_normal = 0x1p-14f;
    scale = _mm512_max_ps(scale, _mm512_set1_ps(smallest_normal));
    const __mmask16 regular = _mm512_mask_cmp_ps_mask(finite, scale, _mm512_set1_ps(3.4028234e38f), _CMP_LE_OQ);
    __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), scale);
    if (Narrow) inverse = Round::round(inverse);
    const __m512 nan = _mm512_set1_ps(__builtin_nanf(""));
    _mm512_store_ps(s.scale, _mm512_mask_blend_ps(regular, nan, scale));
    _mm512_store_ps(s.inverse, _mm512_mask_blend_ps(regular, nan, inverse));
    _mm512_store_ps(s.low, _mm512_sub_ps(_mm512_set1_ps(kRound + lowest), zero_point));
    _mm512_store_ps(s.high, _mm512_sub_ps(_mm512_set1_ps(kRound + highest), zero_point));
}

// Scales of n groups; `low` and `high` are the bounds of steps as `steps_of` gives them.
template <class In, class Round, bool Narrow>
inline void find_scales(const FakeQuantize& f, int64_t first, int64_t n, Scales& s) {
    const auto* x = static_cast<const typename In::Portable::Bits*>(f.x) + first * f.size;
    __m512i low[kGroups], high[kGroups];
    for (int64_t j = n; j < kGroups; j++) low[j] = high[j] = _mm512_setzero_si512();
    __m512i smallest = _mm512_setzero_si512();
    if (f.mapping == kSymmetric) {
        for (int64_t j = 0; j < n; j++) fold_group<In, true>(x + j * f.size, f.size, low[j], high[j]);
    } else {
        for (int64_t j = 0; j < n; j++) fold_group<In, false>(x + j * f.size, f.size, low[j], high[j]);
        smallest = fold_vectors<In, false>(low);
    }
    find_scales<In, Round, Narrow>(f, smallest, fold_vectors<In, true>(high), s);
}

// kRound plus the whole numbers nearest x / scale.
template <class In, bool Narrow>
inline __m512 steps_of(__m512 x, __m512 inverse) {
    __m512 quotient = _mm512_mul_ps(x, inverse);
    if (Narrow) {
        // Less than half of the smallest normal number is not rounded, nor does it matter.
        const __m512 power = as_float(_mm512_and_si512(as_int(quotient), all(0xFF800000)));
        const __m512 split = _mm512_set1_ps(In::kSplit);
        quotient = _mm512_fnmadd_ps(power, split, _mm512_fmadd_ps(power, split, quotient));
    }
    return _mm512_add_ps(quotient, _mm512_set1_ps(kRound));
}

// Which of 32 numbers in two vectors have steps within bounds; no step of a group without a scale has.
inline void find_inside(const __m512 steps[2], __m512 low, __m512 high, __mmask16 inside[2]) {
    for (int h = 0; h < 2; h++) {
        const __mmask16 above = _mm512_cmp_ps_mask(steps[h], low, _CMP_GE_OQ);
        inside[h] = _mm512_mask_cmp_ps_mask(above, steps[h], high, _CMP_LE_OQ);
    }
}

// `saturated` may be null, as in FakeQuantize.
template <class In, bool Narrow>
inline void write_values(const typename In::Portable::Bits* x, typename In::Portable::Bits* out, int64_t size,
                         const Scales& s, int64_t j, uint32_t* saturated) {
    const __m512 scale = _mm512_set1_ps(s.scale[j]), inverse = _mm512_set1_ps(s.inverse[j]);
    const __m512 round = _mm512_set1_ps(kRound);
    const __m512 low = _mm512_set1_ps(s.low[j]), high = _mm512_set1_ps(s.high[j]);
    for_each_32(size, [&](int64_t i, auto which) {
        __m512 value[2];
        In::load_pair(x + i, which, value);
        for (auto& v : value) v = steps_of<In, Narrow>(v, inverse);
        if (saturated) {
            __mmask16 inside[2];
            find_inside(value, low, high, inside);
            saturated[i / 32] = ~In::in_order(inside) & which.mask();
        }
        for (auto& v : value) {
            const __m512 code = _mm512_min_ps(_mm512_max_ps(v, low), high);
            v = _mm512_mul_ps(_mm512_sub_ps(code, round), scale);
        }
        In::store_pair(out + i, which, value);
    });
}

// A group without a scale.
template <class In>
inline void write_nan(typename In::Portable::Bits* out, int64_t size, uint32_t* saturated) {
    avx512_portable::fill_nan<typename In::Portable>(out, 0, size);
    if (saturated) for_each_32(size, [&](int64_t i, auto which) { saturated[i / 32] = which.mask(); });
}

template <class In, bool Narrow>
inline void write_gradient(const typename In::Portable::Bits* x, const typename In::Portable::Bits* grad,
                           typename In::Portable::Bits* out, int64_t size, const Scales& s, int64_t j) {
    const __m512 inverse = _mm512_set1_ps(s.inverse[j]);
    const __m512 low = _mm512_set1_ps(s.low[j]), high = _mm512_set1_ps(s.high[j]);
    for_each_32(size, [&](int64_t i, auto which) {
        __m512 value[2];
        __mmask16 inside[2];
        In::load_pair(x + i, which, value);
        for (auto& v : value) v = steps_of<In, Narrow>(v, inverse);
        find_inside(value, low, high, inside);
        // In place, what is kept need not be touched; in small groups a wrong guess of it costs more than it saves.
        if (grad != out || size <= 64 || (inside[0] & inside[1]) != 0xFFFF) In::keep(grad + i, out + i, which, inside);
    });
}

// What lies in the first cache from the bounds to the values.
inline int64_t groups_at_once(const FakeQuantize& f) { return f.size >= 2048 ? 1 : f.size >= 256 ? 4 : kGroups; }

template <class In, class Round, bool Narrow>
void group_range(const FakeQuantize& f, int64_t first, int64_t last) {
    using Bits = typename In::Portable::Bits;
    Scales s{};
    const auto *x = static_cast<const Bits*>(f.x), *grad = static_cast<const Bits*>(f.grad);
    auto* out = static_cast<Bits*>(f.out);
    const int64_t few = groups_at_once(f);
    for (int64_t group = first; group < last; group += few) {
        const int64_t n = last - group < few ? last - group : few;
        find_scales<In, Round, Narrow>(f, group, n, s);
        for (int64_t j = 0; j < n; j++) {
            const int64_t at = (group + j) * f.size;
            uint32_t* saturated = f.saturated ? f.saturated + (group + j) * words_of(f.size) : nullptr;
            if (grad)
                write_gradient<In, Narrow>(x + at, grad + at, out + at, f.size, s, j);
            else if (s.scale[j] != s.scale[j])
                write_nan<In>(out + at, f.size, saturated);
            else
                write_values<In, Narrow>(x + at, out + at, f.size, s, j, saturated);
        }
    }
}

template <class In>
inline GroupRange select_arithmetic(const FakeQuantize& f) {
    if (is_narrow(f)) return group_range<In, In, true>;
    return f.wide ? group_range<In, Float32, false> : group_range<In, In, false>;
}

}  // namespace aotrain::avx512

#include "fake_quantize_lookup_avx512.h"

namespace aotrain::avx512 {

// `saturated` has the bits of 32 elements a word, groups padded to whole words.
inline void clear_range(const Clear& c, int64_t first, int64_t last) {
    const __m512i zero = _mm512_setzero_si512();
    const bool whole = c.size % 32 == 0;  // groups follow each other without a gap
    const int64_t size = whole ? (last - first) * c.size : c.size;
    const uint32_t* saturated = c.saturated + first * words_of(c.size);
    for (int64_t group = first; group < last; group += whole ? last - first : 1) {
        auto* grad = static_cast<char*>(c.grad) + group * c.size * c.bytes;
        // Storing nothing is cheaper than a wrong guess of whether there is something to store.
        for (int64_t i = 0; i < size; i += 32, grad += 32 * c.bytes) {
            const uint32_t word = *saturated++;
            if (c.bytes == 2) {
                _mm512_mask_storeu_epi16(grad, word, zero);
            } else {
                _mm512_mask_storeu_epi32(grad, static_cast<__mmask16>(word), zero);
                _mm512_mask_storeu_epi32(grad + 64, static_cast<__mmask16>(word >> 16), zero);
            }
        }
    }
}

inline GroupRange select(const FakeQuantize& f) {
    if (f.table) return f.size == 32 ? lookup_range<32> : lookup_range<0>;
    if (f.input == kFloat32Input) return group_range<Float32, Float32, false>;
    return f.input == kBfloat16Input ? select_arithmetic<Bfloat16>(f) : select_arithmetic<Float16>(f);
}

}  // namespace aotrain::avx512

#pragma GCC pop_options
