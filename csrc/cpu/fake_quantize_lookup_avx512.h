// Fake quantization of bfloat16 by table (Lookup in fake_quantize.h), 32 elements at a time: no scale is computed.
// Included by fake_quantize_avx512.h.
#pragma once

namespace aotrain::avx512 {

// Where each of 16 groups finds its numbers; what is one word is there twice.
struct Rows {
    alignas(64) uint32_t floor[kGroups];    // the magnitude of level 0
    alignas(64) uint32_t shift[kGroups];    // what the exponent adds to the table's values
    alignas(64) uint32_t row[kGroups];      // index of the mantissa's rows in the table
};

inline __m512i twice(__m512i words) { return _mm512_or_si512(words, _mm512_slli_epi32(words, 16)); }

// From the largest magnitudes of n groups; false if one of them is beyond the table.
inline bool find_rows(const FakeQuantize& f, __m512i keys, int64_t n, Rows& rows) {
    const __mmask16 above = _mm512_cmpge_epi32_mask(keys, all(static_cast<uint32_t>(f.first_key)));
    const __mmask16 within = _mm512_mask_cmple_epi32_mask(above, keys, all(static_cast<uint32_t>(f.last_key)));
    const auto wanted = static_cast<__mmask16>((uint32_t{1} << n) - 1);
    if ((within & wanted) != wanted) return false;
    const __m512i shift = _mm512_sub_epi32(_mm512_and_si512(keys, all(0x7F80)), all(static_cast<uint32_t>(f.exponent)));
    _mm512_store_si512(rows.floor, twice(_mm512_sub_epi32(keys, all(kLevels - 1))));
    _mm512_store_si512(rows.shift, twice(_mm512_and_si512(shift, all(0xFFFF))));
    _mm512_store_si512(rows.row, _mm512_slli_epi32(_mm512_and_si512(keys, all(0x7F)), 6));
    return true;
}

// A group's rows, and where its elements are in them.
struct Row {
    __m512i offsets, values, floor;
    Row(const FakeQuantize& f, const Rows& rows, int64_t j) {
        const uint16_t* row = f.table + rows.row[j];
        const __m512i plain = _mm512_loadu_si512(row + kRowWords);
        offsets = _mm512_loadu_si512(row);
        values = _mm512_mask_add_epi16(plain, static_cast<__mmask32>(f.nonzero), plain, all(rows.shift[j]));
        floor = all(rows.floor[j]);
    }
    __m512i index(__m512i bits) const {
        const __m512i level = _mm512_subs_epu16(Words::magnitudes(bits), floor);
        const __m512i offset = _mm512_permutexvar_epi16(_mm512_srli_epi16(level, 4), offsets);
        const __m512i steps = _mm512_srli_epi16(_mm512_add_epi16(level, offset), 9);
        // Plus 16 where the sign is: steps | (~sign & 16).
        return _mm512_ternarylogic_epi32(steps, _mm512_srli_epi16(bits, 11), all(0x00100010), 0xF2);
    }
};

template <int64_t Size>
void lookup_range(const FakeQuantize& f, int64_t first, int64_t last) {
    Rows rows;
    const auto *x = static_cast<const uint16_t*>(f.x), *grad = static_cast<const uint16_t*>(f.grad);
    auto* out = static_cast<uint16_t*>(f.out);
    const int64_t few = groups_at_once(f), size = Size ? Size : f.size, words = words_of(size);
    const __m512i highest = _mm512_set1_epi16(static_cast<int16_t>(16 + f.highest_step));
    for (int64_t group = first; group < last; group += few) {
        const int64_t n = last - group < few ? last - group : few;
        __m512i unused, largest[kGroups];
        for (int64_t j = 0; j < n; j++) fold_group<Bfloat16, true>(x + (group + j) * size, size, unused, largest[j]);
        for (int64_t j = n; j < kGroups; j++) largest[j] = _mm512_setzero_si512();
        if (!find_rows(f, fold_vectors<Bfloat16, true>(largest), n, rows)) {
            select_arithmetic<Bfloat16>(f)(f, group, group + n);
            continue;
        }
        for (int64_t j = 0; j < n; j++) {
            const int64_t at = (group + j) * size;
            const Row row(f, rows, j);
            for_each_32(size, [&](int64_t i, auto which) {
                const __m512i index = row.index(which.load16(x + at + i));
                const __mmask32 saturated = _mm512_cmpgt_epi16_mask(index, highest);
                if (grad == out) {  // only what saturates is touched
                    _mm512_mask_storeu_epi16(out + at + i, saturated, _mm512_setzero_si512());
                } else if (grad) {
                    which.store16(out + at + i, _mm512_maskz_mov_epi16(~saturated, which.load16(grad + at + i)));
                } else {
                    which.store16(out + at + i, _mm512_permutexvar_epi16(index, row.values));
                    if (f.saturated) f.saturated[(group + j) * words + i / 32] = saturated;
                }
            });
        }
    }
}

// The gradient of groups of 32 elements with that of their scales.
void lookup_with_scales(const FakeQuantize& f, int64_t first, int64_t last) {
    Rows rows;
    Scales s{};
    const auto *x = static_cast<const uint16_t*>(f.x), *grad = static_cast<const uint16_t*>(f.grad);
    auto* out = static_cast<uint16_t*>(f.out);
    const __m512i highest = _mm512_set1_epi16(static_cast<int16_t>(16 + f.highest_step));
    for (int64_t group = first; group < last; group += kGroups) {
        const int64_t n = last - group < kGroups ? last - group : kGroups;
        __m512i largest[kGroups];
        __m512 due[kGroups];
        for (int64_t j = 0; j < kGroups; j++) {
            largest[j] = j < n ? Words::magnitudes(_mm512_loadu_si512(x + (group + j) * 32)) : _mm512_setzero_si512();
            due[j] = _mm512_setzero_ps();
        }
        const __m512i keys = fold_vectors<Bfloat16, true>(largest);
        if (!find_rows(f, keys, n, rows)) {
            select_arithmetic<Bfloat16>(f)(f, group, group + n);
            continue;
        }
        _mm512_store_si512(s.key, twice(keys));
        for (int64_t j = 0; j < n; j++) {
            const int64_t at = (group + j) * 32;
            const Row row(f, rows, j);
            const __m512i bits = _mm512_loadu_si512(x + at), index = row.index(bits);
            const __m512i values = _mm512_permutexvar_epi16(index, row.values), g = _mm512_loadu_si512(grad + at);
            const __m512i kept = _mm512_maskz_mov_epi16(_mm512_cmple_epi16_mask(index, highest), g);
            __m512 element[2], value[2], gradient[2], straight[2];
            Bfloat16::widen(bits, element), Bfloat16::widen(values, value);
            Bfloat16::widen(g, gradient), Bfloat16::widen(kept, straight);
            for (int h = 0; h < 2; h++)
                value[h] = _mm512_sub_ps(_mm512_mul_ps(gradient[h], value[h]), _mm512_mul_ps(straight[h], element[h]));
            due[j] = Bfloat16::sum_neighbours(value);
            _mm512_storeu_si512(out + at, kept);
            s.where[j] = __builtin_ctz(_mm512_cmpeq_epi16_mask(Words::magnitudes(bits), all(s.key[j])));
        }
        _mm512_store_ps(s.total, _mm512_add_ps(sum_vectors(due), _mm512_setzero_ps()));
        avx512_portable::add_due<avx512_portable::Bfloat16>(f, group, n, s);
    }
}

}  // namespace aotrain::avx512
