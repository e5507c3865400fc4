// Decoding and encoding 64 elements of optimizer state with AVX-512; included by adam_avx512.h.
//
// A codec gives `kBytes`, what 64 elements take; `decode`, their four vectors times the block's scale; and `encode`,
// the opposite, which returns the elements it is not sure of. Those are for the portable code.
#pragma once

#include "adam.h"

namespace aotrain::avx512 {

inline __m512 as_float(__m512i x) { return _mm512_castsi512_ps(x); }
inline __m512i as_int(__m512 x) { return _mm512_castps_si512(x); }
inline __m512i all(int32_t x) { return _mm512_set1_epi32(x); }
inline __m512 all(float x) { return _mm512_set1_ps(x); }

constexpr float kLargestScale = 0x1p125f;  // the reciprocal of a larger one would be subnormal

// A block's scale as the encoders use it.
struct Scaling {
    __m512 scale, inverse;
};

// where & mask: b, elsewhere a.
inline __m512i select(__m512i a, __m512i b, uint32_t mask) {
    return _mm512_ternarylogic_epi32(a, b, all(static_cast<int32_t>(mask)), 0xD8);
}

template <int Right>
inline __m512i shift(__m512i x) {
    if constexpr (Right >= 0)
        return _mm512_srli_epi32(x, Right);
    else
        return _mm512_slli_epi32(x, -Right);
}

inline __mmask64 join(const __mmask16 k[4]) {
    return _mm512_kunpackd(_mm512_kunpackw(k[3], k[2]), _mm512_kunpackw(k[1], k[0]));
}

// Bits Shift to Shift + 7 of 64 elements as bytes, in their order.
template <int Shift>
inline __m512i pack_bytes(const __m512i x[4]) {
    const __m512i low = select(shift<Shift>(x[0]), shift<Shift - 8>(x[1]), 0x0000FF00);
    const __m512i high = select(shift<Shift - 16>(x[2]), shift<Shift - 24>(x[3]), 0xFF000000);
    alignas(64) static constexpr struct Order {
        uint8_t at[64] = {};
        constexpr Order() {
            for (int i = 0; i < 64; i++) at[i] = static_cast<uint8_t>(i % 16 * 4 + i / 16);
        }
    } order;
    return _mm512_permutexvar_epi8(_mm512_load_si512(order.at), select(low, high, 0xFFFF0000));
}

// Bytes so ordered that unpacking each 128-bit lane to 32 bits, low half before high half, gives elements in order.
inline __m512i order_for_unpack(__m512i bytes) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, bytes);
}

inline void unpack_words(__m512i low_words, __m512i high_words, __m512i x[4], int first) {
    x[first] = _mm512_unpacklo_epi16(low_words, high_words);
    x[first + 1] = _mm512_unpackhi_epi16(low_words, high_words);
}

inline __m128i quarter(__m512i x, int j) {
    switch (j) {
        case 0: return _mm512_castsi512_si128(x);
        case 1: return _mm512_extracti32x4_epi32(x, 1);
        case 2: return _mm512_extracti32x4_epi32(x, 2);
        default: return _mm512_extracti32x4_epi32(x, 3);
    }
}

// 128 float32 values by the planes of their bytes.
struct Planes {
    alignas(64) uint8_t byte[4][128] = {};

    constexpr void set(int index, float x) {
        const uint32_t bits = __builtin_bit_cast(uint32_t, x);
        for (int plane = 0; plane < 4; plane++) byte[plane][index] = static_cast<uint8_t>(bits >> (8 * plane));
    }

    // byte[plane][index % 128]
    __m512i look_up(int plane, __m512i index) const {
        return _mm512_permutex2var_epi8(_mm512_load_si512(byte[plane]), index, _mm512_load_si512(byte[plane] + 64));
    }
};

// Linear pieces F of a = |x / scale| + kTiny, one per slot of a's exponent, with F crossing every j at midpoint j to
// within 1e-4, so that floor(F) is the index of the nearest magnitude wherever F is not close to an integer.
//
// Decade d has one line. It overshoots in its last step, which is twice as long: there the result is limited by `cap`,
// and F is close to an integer again at the decade's end. The end lies inside an octave: `bias` makes mantissas beyond
// it carry into the next slot, which is free to be the next decade's because a decade is longer than two octaves.
template <bool Signed>
struct Lines {
    static constexpr double kTiny = 0x1p-31;  // makes zero's exponent a slot
    // The tables give kBase + F + kMargin, whose bits from kShift on are floor(F), wherever the bits below are not one
    // of the 2 * kUnsure smallest: there F is within kUnsure units of the last place of an integer.
    static constexpr double kBase = 1024.0;
    static constexpr int kShift = 13, kUnsure = 2;
    static constexpr double kOrigin = kBase + kUnsure * 0x1p-13;

    alignas(64) int32_t bias[32] = {};
    alignas(64) float slope[32] = {};
    alignas(64) float constant[32] = {};
    alignas(64) float cap[32] = {};

    static constexpr int slot_of(double x) {  // the low 5 bits of the float32 exponent, for 2^-31 <= x <= 1
        int slot = 31;
        for (; x < 1.0; x *= 2.0) slot--;
        return slot;
    }

    constexpr void fill(int first, double at, double index, double per_step, double limit) {
        for (int slot = first; slot < 32; slot++) {
            slope[slot] = static_cast<float>(1.0 / per_step);
            constant[slot] = static_cast<float>(index - (at + kTiny) / per_step + kOrigin);
            cap[slot] = static_cast<float>(limit + kOrigin);
        }
    }

    constexpr int carry_from(double value) {
        const double a = value + kTiny;
        const int slot = slot_of(a);
        double mantissa = a;
        while (mantissa < 1.0) mantissa *= 2.0;
        bias[slot] = (1 << 23) - static_cast<int32_t>((mantissa - 1.0) * (1 << 23));
        return slot + 1;
    }

    constexpr Lines() {
        const Map<8, Signed> map;
        constexpr int last = Map<8, Signed>::kLast;
        constexpr double kAbove = 1.0 + 1.0 / (1 << 21), kBelow = 1.0 - 1.0 / (1 << 21), kNone = 300.0;
        fill(0, 0.0, 0.5, 2.0 * map.midpoint[1], kNone);
        for (int d = 0; d < 7; d++) {
            const int first = map.first_index(d);
            const double a = map.offset[d], b = map.stride[d];
            const int slot = carry_from(map.midpoint[first] * kAbove);
            fill(slot, a - 0.5 * b, first, b, d < 6 ? map.first_index(d + 1) - 0.5 : kNone);
        }
        // The last two midpoints are closer than a step.
        const double low = map.midpoint[last - 1], high = map.midpoint[last];
        fill(carry_from(low * kBelow), low, last - 1, high - low, kNone);
    }
};

template <bool Signed>
inline constexpr Lines<Signed> kLines{};

inline __m512 look_up(const float* table, __m512i slot) {  // table[slot % 32]
    return _mm512_permutex2var_ps(_mm512_load_ps(table), slot, _mm512_load_ps(table + 16));
}

struct SignedDynamic8 {
    static constexpr Format kFormat = kDynamic8;
    static constexpr int kBytes = 64;
    static constexpr bool kSigned = true;

    static void decode(const void* state, __mmask64 k, __m512 scale, __m512 x[4]) {
        alignas(64) static constexpr struct Table : Planes {
            constexpr Table() {
                for (int i = 0; i < 128; i++) set(i, kMap<8, true>.magnitude[i + 1]);
            }
        } table;
        const __m512i middle = _mm512_set1_epi8(kMap<8, true>.kMiddle);
        const __m512i codes = order_for_unpack(_mm512_maskz_loadu_epi8(k, state));
        const __mmask64 negative = _mm512_cmplt_epu8_mask(codes, middle);
        const __mmask64 nonzero = _mm512_cmpneq_epu8_mask(codes, middle);
        // Codes above the middle have magnitude code - 127, below it 127 - code; less 1.
        const __m512i index = _mm512_mask_sub_epi8(codes, negative, _mm512_set1_epi8(126), codes);
        __m512i plane[4];
        for (int j = 0; j < 4; j++) plane[j] = _mm512_maskz_mov_epi8(nonzero, table.look_up(j, index));
        plane[3] = _mm512_mask_add_epi8(plane[3], negative, plane[3], _mm512_set1_epi8(-128));
        __m512i bits[4];
        unpack_words(_mm512_unpacklo_epi8(plane[0], plane[1]), _mm512_unpacklo_epi8(plane[2], plane[3]), bits, 0);
        unpack_words(_mm512_unpackhi_epi8(plane[0], plane[1]), _mm512_unpackhi_epi8(plane[2], plane[3]), bits, 2);
        for (int j = 0; j < 4; j++) x[j] = _mm512_mul_ps(as_float(bits[j]), scale);
    }
};

struct UnsignedDynamic8 {
    static constexpr Format kFormat = kDynamic8;
    static constexpr int kBytes = 64;
    static constexpr bool kSigned = false;

    // A_d + k * B_d, where code + 1 = (number of steps of decade d) + k: a number in [1, 256] whose exponent is d + 1
    // and whose mantissa is k.
    static void decode(const void* state, __mmask64 k, __m512 scale, __m512 x[4]) {
        alignas(64) static constexpr struct Table {
            float offset[16] = {};
            float stride[16] = {};  // times the number of steps, a power of two

            constexpr Table() {
                for (int d = 0; d < 8; d++) {
                    const int slot = (127 + d + 1) & 15;
                    offset[slot] = kMap<8, false>.offset[d];
                    const float steps = static_cast<float>(d < 7 ? kMap<8, false>.steps(d) : 0);
                    stride[slot] = kMap<8, false>.stride[d] * steps;
                }
            }
        } table;
        const __m512i codes = _mm512_maskz_loadu_epi8(k, state);
        const __m512 offsets = _mm512_load_ps(table.offset), strides = _mm512_load_ps(table.stride), one = all(1.0f);
        for (int j = 0; j < 4; j++) {
            const __m512i code = _mm512_cvtepu8_epi32(quarter(codes, j));
            const __m512i bits = as_int(_mm512_cvtepi32_ps(_mm512_add_epi32(code, all(1))));
            const __m512i slot = _mm512_srli_epi32(bits, 23);
            // (bits & 0x7FFFFF) | bits of 1: k / steps + 1
            const __m512 fraction = as_float(_mm512_ternarylogic_epi32(bits, all(0x7FFFFF), as_int(one), 0xEA));
            // fraction * stride - stride is exact before its rounding, so this is one multiplication by k.
            const __m512 stride = _mm512_permutexvar_ps(slot, strides);
            const __m512 above = _mm512_fmsub_ps(fraction, stride, stride);
            x[j] = _mm512_mul_ps(_mm512_add_ps(_mm512_permutexvar_ps(slot, offsets), above), scale);
        }
    }
};

template <class Decoder>
struct Dynamic8 : Decoder {
    // |x| times 1 / scale has an error of 2 units, which is 2^-15 of F at most; F's own is below 1e-4, and adding kBase
    // rounds by 2^-14 twice: no more than kUnsure units of 2^-13 in all.
    static __mmask64 encode(const __m512 x[4], const Scaling& s, void* state, __mmask64 k) {
        using L = Lines<Decoder::kSigned>;
        const L& lines = kLines<Decoder::kSigned>;
        __m512i bits[4];
        __mmask16 unsure[4], negative[4];
        for (int j = 0; j < 4; j++) {
            const __m512 magnitude = Decoder::kSigned ? _mm512_abs_ps(x[j]) : x[j];
            const __m512 a = _mm512_fmadd_ps(magnitude, s.inverse, all(static_cast<float>(L::kTiny)));
            const __m512i bias =
                _mm512_permutex2var_epi32(_mm512_load_si512(lines.bias), _mm512_srli_epi32(as_int(a), 23),
                                          _mm512_load_si512(lines.bias + 16));
            const __m512i slot = _mm512_srli_epi32(_mm512_add_epi32(as_int(a), bias), 23);
            const __m512 line = _mm512_fmadd_ps(a, look_up(lines.slope, slot), look_up(lines.constant, slot));
            unsure[j] = _mm512_testn_epi32_mask(as_int(line), all((1 << L::kShift) - 2 * L::kUnsure));
            bits[j] = as_int(_mm512_min_ps(line, look_up(lines.cap, slot)));
            if (Decoder::kSigned) negative[j] = _mm512_movepi32_mask(as_int(x[j]));
        }
        __m512i codes = pack_bytes<L::kShift>(bits);
        if (Decoder::kSigned) {
            const __m512i middle = _mm512_set1_epi8(kMap<8, true>.kMiddle);
            const __m512i above = _mm512_add_epi8(middle, codes);
            // Saturating: there is no code for -1.
            codes = _mm512_mask_subs_epu8(above, join(negative), middle, codes);
        }
        _mm512_mask_storeu_epi8(state, k, codes);
        const __mmask16 any = _kor_mask16(_kor_mask16(unsure[0], unsure[1]), _kor_mask16(unsure[2], unsure[3]));
        return __builtin_expect(any == 0, 1) ? 0 : join(unsure);
    }
};

template <bool Signed>
struct Dynamic4 {
    static constexpr Format kFormat = kDynamic4;
    static constexpr int kBytes = 32;
    static constexpr bool kSigned = Signed;

    static __mmask32 pairs(__mmask64 k) { return static_cast<__mmask32>(_pext_u64(k, 0x5555555555555555)); }

    static void decode(const void* state, __mmask64 k, __m512 scale, __m512 x[4]) {
        const __m512i words = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(pairs(k), state));
        // The even element is the high half: byte 0 of a word; the odd one byte 1.
        const __m512i nibbles = _mm512_or_si512(_mm512_srli_epi16(words, 4), _mm512_slli_epi16(words, 8));
        const __m512 values = _mm512_loadu_ps(kMap<4, Signed>.value);
        for (int j = 0; j < 4; j++)  // the lookup takes the low 4 bits
            x[j] = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(quarter(nibbles, j)), values), scale);
    }

    static __m512i code_of(__m512 y) {
        if (!Signed)  // floor(16 y - 0.5), exact
            return _mm512_cvttps_epi32(_mm512_max_ps(_mm512_fmsub_ps(y, all(16.0f), all(0.5f)), all(0.0f)));
        const __m512i sign = _mm512_srai_epi32(as_int(y), 31);
        // Below zero the midpoints < |y| count: those <= the float32 before it.
        const __m512i magnitude = _mm512_add_epi32(_mm512_and_si512(as_int(y), all(INT32_MAX)), sign);
        const int32_t* table = kMap<4, Signed>.above;
        const __m512i above = _mm512_maskz_loadu_epi32(0xFF, table);
        __m512i index = _mm512_maskz_mov_epi32(_mm512_cmpge_epi32_mask(magnitude, all(table[3])), all(4));
        for (const int step : {2, 1, 1}) {
            const __m512i midpoint = _mm512_permutexvar_epi32(_mm512_add_epi32(index, all(step - 1)), above);
            index = _mm512_mask_add_epi32(index, _mm512_cmpge_epi32_mask(magnitude, midpoint), index, all(step));
        }
        const __m512i offset = _mm512_sub_epi32(_mm512_xor_si512(index, sign), sign);
        return _mm512_max_epi32(_mm512_add_epi32(all(7), offset), all(0));
    }

    static __mmask64 encode(const __m512 x[4], const Scaling& s, void* state, __mmask64 k) {
        __m512i codes[4];
        for (int j = 0; j < 4; j++) codes[j] = code_of(_mm512_div_ps(x[j], s.scale));
        const __m512i bytes = _mm512_maskz_mov_epi8(k, pack_bytes<0>(codes));
        const __m512i words = _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(0x0110));
        _mm256_mask_storeu_epi8(state, pairs(k), _mm512_cvtepi16_epi8(words));
        return 0;
    }
};

template <bool Signed>
struct Float8 {
    static constexpr Format kFormat = kFloat8;
    static constexpr int kBytes = 64;
    static constexpr bool kSigned = Signed;

    static void decode(const void* state, __mmask64 k, __m512 scale, __m512 x[4]) {
        alignas(64) static constexpr struct Table : Planes {
            constexpr Table() {
                for (int i = 0; i < 128; i++) set(i, kFloat8Values.value[i]);
            }
        } table;
        // Four significant bits: the upper two bytes of the float32 are enough.
        const __m512i codes = order_for_unpack(_mm512_maskz_loadu_epi8(k, state));
        const __m512i low = table.look_up(2, codes);
        const __m512i high = _mm512_ternarylogic_epi32(table.look_up(3, codes), codes, _mm512_set1_epi8(-128), 0xF8);
        __m512i bits[4];
        unpack_words(_mm512_setzero_si512(), _mm512_unpacklo_epi8(low, high), bits, 0);
        unpack_words(_mm512_setzero_si512(), _mm512_unpackhi_epi8(low, high), bits, 2);
        for (int j = 0; j < 4; j++) x[j] = _mm512_mul_ps(as_float(bits[j]), scale);
    }

    static __m512i code_of(__m512 y) {  // as float8_code of adam_portable.h, without NaN
        const __m512 magnitude = _mm512_min_ps(_mm512_abs_ps(y), all(kFloat8Max));
        const __m512i bits = as_int(magnitude);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 20), all(1));
        __m512i code = _mm512_add_epi32(_mm512_add_epi32(bits, odd), all(0x7FFFF - (120 << 23)));
        code = _mm512_srli_epi32(code, 20);
        const __m512i subnormal = _mm512_and_si512(as_int(_mm512_add_ps(magnitude, all(0x1p14f))), all(0xF));
        code = _mm512_mask_mov_epi32(code, _mm512_cmplt_epi32_mask(bits, all(0x3C800000)), subnormal);
        return _mm512_ternarylogic_epi32(code, _mm512_srli_epi32(as_int(y), 24), all(0x80), 0xF8);
    }

    static __mmask64 encode(const __m512 x[4], const Scaling& s, void* state, __mmask64 k) {
        __m512i codes[4];
        for (int j = 0; j < 4; j++) codes[j] = code_of(_mm512_div_ps(x[j], s.scale));
        _mm512_mask_storeu_epi8(state, k, pack_bytes<0>(codes));
        return 0;
    }
};

template <bool Signed>
struct Float32 {
    static constexpr Format kFormat = kFloat32;
    static constexpr int kBytes = 256;
    static constexpr bool kSigned = Signed;

    static __mmask16 part(__mmask64 k, int j) { return static_cast<__mmask16>(k >> (16 * j)); }

    static void decode(const void* state, __mmask64 k, __m512, __m512 x[4]) {
        for (int j = 0; j < 4; j++) x[j] = _mm512_maskz_loadu_ps(part(k, j), static_cast<const float*>(state) + 16 * j);
    }

    static void encode(const __m512 x[4], void* state, __mmask64 k) {
        for (int j = 0; j < 4; j++) _mm512_mask_storeu_ps(static_cast<float*>(state) + 16 * j, part(k, j), x[j]);
    }
};

}  // namespace aotrain::avx512
