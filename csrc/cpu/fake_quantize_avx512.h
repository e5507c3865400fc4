// Fake quantization with AVX-512, 32 elements at a time, and the scales of 16 groups at a time; included by
// fake_quantize.cpp.
#pragma once

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,fma,bmi2")

#define AOTRAIN_ISA avx512_portable
#include "fake_quantize_portable.h"
#undef AOTRAIN_ISA

#include "fake_quantize_dtypes_avx512.h"

namespace aotrain::avx512 {

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
    _mm512_store_si512(s.key, largest);
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

// Neighbours first, as pairwise_sum of scale_gradient.py.
inline float sum_pairwise(__m512 x) {
    x = _mm512_add_ps(x, _mm512_permute_ps(x, 0xB1));
    x = _mm512_add_ps(x, _mm512_permute_ps(x, 0x4E));
    x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0xB1));
    return _mm512_cvtss_f32(_mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0x4E)));
}

// Sums of neighbours within lanes of 128 bits, those of a before those of b; and of neighbouring lanes.
inline __m512 sum_pairs(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
}
inline __m512 sum_lanes(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}

// Sixteen vectors to one, whose element j is the sum of vector j, in the same order.
inline __m512 sum_vectors(const __m512 v[kGroups]) {
    __m512 quarter[4];
    for (int i = 0; i < 4; i++) {
        const __m512* a = v + 4 * i;
        quarter[i] = sum_pairs(sum_pairs(a[0], a[1]), sum_pairs(a[2], a[3]));
    }
    return sum_lanes(sum_lanes(quarter[0], quarter[1]), sum_lanes(quarter[2], quarter[3]));
}

// Of 32 elements, what is due to the scale, neighbours added.
template <class In>
inline __m512 find_due(const __m512 x[2], const __m512 value[2], const __m512 grad[2], const __mmask16 inside[2]) {
    __m512 due[2];
    for (int h = 0; h < 2; h++) {
        // Signs of zeros do not matter to a sum that 0 is added to.
        const __m512 straight = _mm512_maskz_mul_ps(inside[h], grad[h], x[h]);
        due[h] = _mm512_sub_ps(_mm512_mul_ps(grad[h], value[h]), straight);
    }
    return In::sum_neighbours(due);
}

// As in fake_quantize_portable.h; `terms` has room for a sum of each 32 elements and one more.
template <class In, bool Narrow>
inline void write_gradient_with_scales(const FakeQuantize& f, int64_t at, Scales& s, int64_t j, float* terms) {
    using Bits = typename In::Portable::Bits;
    const auto *x = static_cast<const Bits*>(f.x) + at, *grad = static_cast<const Bits*>(f.grad) + at;
    auto* out = static_cast<Bits*>(f.out) + at;
    const __m512 scale = _mm512_set1_ps(s.scale[j]), inverse = _mm512_set1_ps(s.inverse[j]);
    const __m512 low = _mm512_set1_ps(s.low[j]), high = _mm512_set1_ps(s.high[j]), round = _mm512_set1_ps(kRound);
    const uint32_t largest = s.key[j];
    int64_t where = -1;
    for_each_32(f.size, [&](int64_t i, auto which) {
        __m512 value[2], element[2], gradient[2];
        __mmask16 inside[2];
        In::load_pair(x + i, which, element);
        In::load_pair(grad + i, which, gradient);
        for (int h = 0; h < 2; h++) value[h] = steps_of<In, Narrow>(element[h], inverse);
        find_inside(value, low, high, inside);
        for (auto& v : value) {
            const __m512 code = _mm512_min_ps(_mm512_max_ps(v, low), high);
            v = In::round(_mm512_mul_ps(_mm512_sub_ps(code, round), scale));
        }
        In::keep(grad + i, out + i, which, inside);
        terms[i / 32] = sum_pairwise(find_due<In>(element, value, gradient, inside));
        if (where < 0) {
            const uint32_t found = In::find(x + i, which, largest) & which.mask();
            if (found) where = i + __builtin_ctz(found);
        }
    });
    s.total[j] = avx512_portable::sum_pairwise(terms, words_of(f.size));
    s.where[j] = where;
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
    std::vector<float> terms(f.with_scales ? words_of(f.size) + 1 : 0);
    for (int64_t group = first; group < last; group += few) {
        const int64_t n = last - group < few ? last - group : few;
        find_scales<In, Round, Narrow>(f, group, n, s);
        for (int64_t j = 0; j < n; j++) {
            const int64_t at = (group + j) * f.size;
            uint32_t* saturated = f.saturated ? f.saturated + (group + j) * words_of(f.size) : nullptr;
            if (f.with_scales)
                write_gradient_with_scales<In, Narrow>(f, at, s, j, terms.data());
            else if (grad)
                write_gradient<In, Narrow>(x + at, grad + at, out + at, f.size, s, j);
            else if (s.scale[j] != s.scale[j])
                write_nan<In>(out + at, f.size, saturated);
            else
                write_values<In, Narrow>(x + at, out + at, f.size, s, j, saturated);
        }
        if (f.with_scales) avx512_portable::add_due<typename In::Portable>(f, group, n, s);
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
    if (f.table && f.with_scales && f.size == 32) return lookup_with_scales;
    if (f.table && !f.with_scales) return f.size == 32 ? lookup_range<32> : lookup_range<0>;
    if (f.input == kFloat32Input) return group_range<Float32, Float32, false>;
    return f.input == kBfloat16Input ? select_arithmetic<Bfloat16>(f) : select_arithmetic<Float16>(f);
}

}  // namespace aotrain::avx512

#pragma GCC pop_options
