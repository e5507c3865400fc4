// The dtypes of fake quantization with AVX-512, 32 elements at a time; included by fake_quantize_avx512.h.
#pragma once

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

// Element i is the sum of elements 2i and 2i + 1 of 32.
inline __m512 sum_even_and_odd(__m512 a, __m512 b) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_or_si512(even, all(1));
    return _mm512_add_ps(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
}

struct Words {
    static __m512i max(__m512i a, __m512i b) { return _mm512_max_epi16(a, b); }
    static __m512i min(__m512i a, __m512i b) { return _mm512_min_epi16(a, b); }
    static __m512i keys(__m512i x) {  // x ^ (x < 0 ? 0x7FFF : 0)
        return _mm512_ternarylogic_epi32(x, _mm512_srai_epi16(x, 15), all(0x7FFF7FFF), 0x78);
    }
    static __m512i magnitudes(__m512i x) { return _mm512_and_si512(x, all(0x7FFF7FFF)); }
    // Of 32 elements, which have this magnitude.
    template <class Which>
    static uint32_t find(const uint16_t* x, Which which, uint32_t magnitude) {
        const __m512i wanted = _mm512_set1_epi16(static_cast<int16_t>(magnitude));
        return _mm512_cmpeq_epi16_mask(magnitudes(which.load16(x)), wanted);
    }
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
    static void widen(__m512i words, __m512 value[2]) {
        value[0] = as_float(_mm512_slli_epi32(words, 16));
        value[1] = as_float(_mm512_and_si512(words, all(0xFFFF0000)));
    }
    template <class Which>
    static void load_pair(const uint16_t* x, Which which, __m512 value[2]) {
        widen(which.load16(x), value);
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
    static __m512 sum_neighbours(const __m512 x[2]) { return _mm512_add_ps(x[0], x[1]); }
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
    static __m512 sum_neighbours(const __m512 x[2]) { return sum_even_and_odd(x[0], x[1]); }
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
    template <class Which>
    static uint32_t find(const uint32_t* x, Which which, uint32_t magnitude) {
        uint32_t found[2];
        for (int half = 0; half < 2; half++)
            found[half] = _mm512_cmpeq_epi32_mask(magnitudes(which.load32(x, half)), all(magnitude));
        return found[0] | found[1] << 16;
    }
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
    static __m512 sum_neighbours(const __m512 x[2]) { return sum_even_and_odd(x[0], x[1]); }
    static uint32_t in_order(const __mmask16 inside[2]) { return _mm512_kunpackw(inside[1], inside[0]); }
    template <class Which>
    static void keep(const uint32_t* from, uint32_t* to, Which which, const __mmask16 inside[2]) {
        for (int half = 0; half < 2; half++)
            which.store32(to, half, _mm512_maskz_mov_epi32(inside[half], which.load32(from, half)));
    }
};

}  // namespace aotrain::avx512
