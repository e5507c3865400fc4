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

template <int64_t Size>
void lookup_range(const FakeQuantize& f, int64_t first, int64_t last) {
    Rows rows;
    const auto *x = static_cast<const uint16_t*>(f.x), *grad = static_cast<const uint16_t*>(f.grad);
    auto* out = static_cast<uint16_t*>(f.out);
    const int64_t few = groups_at_once(f), size = Size ? Size : f.size, words = words_of(size);
    const auto nonzero = static_cast<__mmask32>(f.nonzero);
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
            const uint16_t* row = f.table + rows.row[j];
            const __m512i offsets = _mm512_loadu_si512(row), plain = _mm512_loadu_si512(row + kRowWords);
            const __m512i values = _mm512_mask_add_epi16(plain, nonzero, plain, all(rows.shift[j]));
            const __m512i floor = all(rows.floor[j]);
            for_each_32(size, [&](int64_t i, auto which) {
                const __m512i bits = which.load16(x + at + i);
                const __m512i level = _mm512_subs_epu16(Words::magnitudes(bits), floor);
                const __m512i offset = _mm512_permutexvar_epi16(_mm512_srli_epi16(level, 4), offsets);
                const __m512i steps = _mm512_srli_epi16(_mm512_add_epi16(level, offset), 9);
                // Plus 16 where the sign is: steps | (~sign & 16).
                const __m512i index =
                    _mm512_ternarylogic_epi32(steps, _mm512_srli_epi16(bits, 11), all(0x00100010), 0xF2);
                const __mmask32 saturated = _mm512_cmpgt_epi16_mask(index, highest);
                if (grad == out) {  // only what saturates is touched
                    _mm512_mask_storeu_epi16(out + at + i, saturated, _mm512_setzero_si512());
                } else if (grad) {
                    which.store16(out + at + i, _mm512_maskz_mov_epi16(~saturated, which.load16(grad + at + i)));
                } else {
                    which.store16(out + at + i, _mm512_permutexvar_epi16(index, values));
                    if (f.saturated) f.saturated[(group + j) * words + i / 32] = saturated;
                }
            });
        }
    }
}

}  // namespace aotrain::avx512
