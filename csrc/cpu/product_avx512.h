// Decoding with AVX-512, 64 codes at a time, by lookups of bytes; included by scaled_mm.cpp. The other loops are the
// portable ones.
#pragma once

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,fma")

#define AOTRAIN_ISA avx512_portable
#include "product_portable.h"
#undef AOTRAIN_ISA

namespace aotrain::avx512 {

// One byte of each of 256 values.
struct Plane {
    __m512i part[4];

    Plane(const void* table, int item, int byte) {
        alignas(64) uint8_t bytes[256];
        for (int i = 0; i < 256; i++) bytes[i] = static_cast<const uint8_t*>(table)[i * item + byte];
        for (int i = 0; i < 4; i++) part[i] = _mm512_load_si512(bytes + 64 * i);
    }

    __m512i look_up(__m512i codes, __mmask64 upper_half) const {
        const __m512i low = _mm512_permutex2var_epi8(part[0], codes, part[1]);
        return _mm512_mask_mov_epi8(low, upper_half, _mm512_permutex2var_epi8(part[2], codes, part[3]));
    }
};

// Of n elements, those from i on that a vector of `Lanes` takes.
template <int Lanes>
inline uint64_t first_bits(int64_t n, int64_t i) {
    const int64_t left = n - i;
    return left >= Lanes ? ~uint64_t{0} >> (64 - Lanes) : left <= 0 ? 0 : ~(~uint64_t{0} << left);
}

void decode16(const uint8_t* codes, int64_t n, const void* table, void* to) {
    const Plane low(table, 2, 0), high(table, 2, 1);
    uint16_t* x = static_cast<uint16_t*>(to);
    // So that unpacking, which takes the halves of 128-bit lanes, gives elements in order.
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    for (int64_t i = 0; i < n; i += 64) {
        const __m512i raw = _mm512_maskz_loadu_epi8(first_bits<64>(n, i), codes + i);
        const __m512i index = _mm512_permutexvar_epi64(order, raw);
        const __mmask64 upper_half = _mm512_movepi8_mask(index);
        const __m512i lows = low.look_up(index, upper_half), highs = high.look_up(index, upper_half);
        const auto first = static_cast<__mmask32>(first_bits<32>(n, i));
        const auto second = static_cast<__mmask32>(first_bits<32>(n, i + 32));
        _mm512_mask_storeu_epi16(x + i, first, _mm512_unpacklo_epi8(lows, highs));
        _mm512_mask_storeu_epi16(x + i + 32, second, _mm512_unpackhi_epi8(lows, highs));
    }
}

void decode32(const uint8_t* codes, int64_t n, const void* table, void* to) {
    const Plane planes[4] = {{table, 4, 0}, {table, 4, 1}, {table, 4, 2}, {table, 4, 3}};
    uint32_t* x = static_cast<uint32_t*>(to);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int64_t i = 0; i < n; i += 64) {
        const __m512i raw = _mm512_maskz_loadu_epi8(first_bits<64>(n, i), codes + i);
        const __m512i index = _mm512_permutexvar_epi32(order, raw);
        const __mmask64 upper_half = _mm512_movepi8_mask(index);
        __m512i byte[4], value[4];
        for (int j = 0; j < 4; j++) byte[j] = planes[j].look_up(index, upper_half);
        for (int half = 0; half < 2; half++) {
            const __m512i low = half ? _mm512_unpackhi_epi8(byte[0], byte[1]) : _mm512_unpacklo_epi8(byte[0], byte[1]);
            const __m512i high = half ? _mm512_unpackhi_epi8(byte[2], byte[3]) : _mm512_unpacklo_epi8(byte[2], byte[3]);
            value[2 * half] = _mm512_unpacklo_epi16(low, high);
            value[2 * half + 1] = _mm512_unpackhi_epi16(low, high);
        }
        for (int j = 0; j < 4; j++) {
            const int64_t at = i + 16 * j;
            _mm512_mask_storeu_epi32(x + at, static_cast<__mmask16>(first_bits<16>(n, at)), value[j]);
        }
    }
}

constexpr ProductLoops kProductLoops{decode16, decode32, avx512_portable::scale_rows, avx512_portable::scale_blocks};

}  // namespace aotrain::avx512

#pragma GCC pop_options
