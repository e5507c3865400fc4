// The loops of nvfp4_cast, included once per instruction set after cast_portable.h of the same; the includer defines
// AOTRAIN_ISA, the name of the namespace. No include guard for that reason.
//
// Loops over the elements of a small array with a constant length are what the compiler turns into vectors.

namespace aotrain::AOTRAIN_ISA {

constexpr int kLanes = kNvfp4TileRows;  // operand rows of a tile, side by side in vectors
constexpr int kRun = 256;               // columns of a row that are cast at a time
constexpr int kRunBlocks = kRun / kNvfp4Block;

template <class In>
void measure(const void* from, int64_t n, Nvfp4Measures& measures) {
    const auto* x = static_cast<const typename In::Bits*>(from);
    int32_t largest = 0;
    int64_t sum = 0;
    for (int64_t i = 0; i < n; i++) {
        const int32_t bits = bits_as<int32_t>(In::value(x[i]));
        const int32_t magnitude = bits & 0x7FFFFFFF;
        largest = magnitude > largest ? magnitude : largest;
        sum += bits;
    }
    if (static_cast<uint32_t>(largest) > measures.amax) measures.amax = static_cast<uint32_t>(largest);
    measures.checksum += sum;
}

// 16 columns of the operand, n <= kLanes of its rows; zeros elsewhere.
template <class In>
inline void load_group(const Nvfp4& c, int64_t row, int64_t column, float v[16][kLanes]) {
    const auto* x = static_cast<const typename In::Bits*>(c.x) + column * c.stride + row;
    const int64_t n = c.rows - row < kLanes ? c.rows - row : kLanes;
    for (int j = 0; j < 16; j++, x += c.stride) {
        if (column + j >= c.columns) {
            for (int i = 0; i < kLanes; i++) v[j][i] = 0;
        } else if (n == kLanes) {
            for (int i = 0; i < kLanes; i++) v[j][i] = In::value(x[i]);
        } else {
            for (int i = 0; i < kLanes; i++) v[j][i] = i < n ? In::value(x[i]) : 0.0f;
        }
    }
}

// hadamard_transform of aotrain/formats/hadamard.py along the first dimension.
inline void transform_group(int64_t negative, float v[16][kLanes]) {
    for (int j = 0; j < 16; j++)
        if (negative >> j & 1)
            for (int i = 0; i < kLanes; i++) v[j][i] = -v[j][i];
    for (int distance = 1; distance < 16; distance *= 2) {
        for (int j = 0; j < 16; j++) {
            if (j & distance) continue;
            for (int i = 0; i < kLanes; i++) {
                const float sum = v[j][i] + v[j + distance][i], difference = v[j][i] - v[j + distance][i];
                v[j][i] = sum;
                v[j + distance][i] = difference;
            }
        }
    }
    for (int j = 0; j < 16; j++)
        for (int i = 0; i < kLanes; i++) v[j][i] *= 0.25f;
}

inline void amax_of_group(const float v[16][kLanes], int32_t amax[kLanes]) {
    for (int i = 0; i < kLanes; i++) amax[i] = 0;
    for (int j = 0; j < 16; j++) {
        for (int i = 0; i < kLanes; i++) {
            const int32_t magnitude = bits_as<int32_t>(v[j][i]) & 0x7FFFFFFF;
            amax[i] = magnitude > amax[i] ? magnitude : amax[i];
        }
    }
}

template <class In>
uint32_t measure_transformed(const Nvfp4& c, int64_t first) {
    alignas(64) float v[16][kLanes];
    alignas(64) int32_t amax[kLanes];
    int32_t largest = 0;
    for (int64_t row = 0; row < c.rows; row += kLanes) {
        load_group<In>(c, row, first, v);
        transform_group(c.negative, v);
        amax_of_group(v, amax);
        for (int i = 0; i < kLanes; i++) largest = amax[i] > largest ? amax[i] : largest;
    }
    return static_cast<uint32_t>(largest);
}

// Comparisons are of bits, which have the order of the magnitudes, and without a condition: gcc 12 moves the arithmetic
// that depends on one into a branch, and then makes no vectors. Arguments are not negative. All ones where a < b:
inline int32_t less(int32_t a, int32_t b) { return (a - b) >> 31; }
inline int32_t lesser(int32_t a, int32_t b) { return b + ((a - b) & less(a, b)); }
inline int32_t greater(int32_t a, int32_t b) { return a - ((a - b) & less(a, b)); }

constexpr int32_t kInfinity = 0x7F800000, kSix = 0x40C00000;
constexpr int32_t kLow = 118 << 23, kHigh = 0x43E00000;  // 2^-9 and 448

// The scales of n blocks, and what their elements are multiplied by: _block_scales and quantize_nvfp4 of
// aotrain/formats/nvfp4.py. The rounding is that of code_of<E4m3> in cast_portable.h.
template <int n>
inline void block_scales(const int32_t* amax, const Nvfp4Level& level, uint8_t* code, float* inverse) {
    constexpr int32_t kSmallest = E4m3::kMinExponent << 23;
    for (int i = 0; i < n; i++) {
        const float quotient = bits_as<float>(amax[i]) / 6.0f / level.global;
        const int32_t all = bits_as<int32_t>(quotient) & 0x7FFFFFFF, relative = lesser(greater(all, kLow), kHigh);
        const int32_t exponent = greater(relative & kInfinity, kSmallest);
        const float step = bits_as<float>(exponent + (20 << 23)), sum = bits_as<float>(relative) + step;
        const int32_t bits = bits_as<int32_t>(sum) + (exponent >> 20) - (kSmallest >> 20);
        const int32_t bad = less(kInfinity - 1, amax[i]) | less(kInfinity, all);
        code[i] = static_cast<uint8_t>((bits | bad) & 0x7F);
        inverse[i] = bits_as<float>(bits_as<int32_t>(level.inverse / (sum - step)) | (bad & 0x7FC00000));
    }
}

// A magnitude that e2m1 has, and its binade as float32 bits; all below 2 count as that of 1.
struct Saturated {
    float magnitude;
    int32_t exponent;
};

constexpr int32_t kOne = 127 << 23;

inline Saturated saturate(float y) {
    const int32_t magnitude = lesser(bits_as<int32_t>(y) & 0x7FFFFFFF, kSix);
    return {bits_as<float>(magnitude), greater(magnitude & kInfinity, kOne)};
}

// With the sign of y; NaN is code 0.
inline uint8_t signed_code(int32_t code, float y) {
    const int32_t bits = bits_as<int32_t>(y), with_sign = (code & 7) | (bits >> 28 & 8);
    return static_cast<uint8_t>(with_sign & ~less(kInfinity, bits & 0x7FFFFFFF));
}

// round_nearest to e2m1 as a code: code_of in cast_portable.h, with one bit of mantissa.
inline uint8_t nearest_code(float y) {
    const Saturated s = saturate(y);
    const float sum = s.magnitude + bits_as<float>(s.exponent + (22 << 23));
    return signed_code(bits_as<int32_t>(sum) + (s.exponent >> 22) - (kOne >> 22), y);
}

// round_stochastic to e2m1 as a code, with 16 random bits.
inline uint8_t stochastic_code(float y, uint32_t noise) {
    const Saturated s = saturate(y);
    const float steps = s.magnitude * bits_as<float>(2 * kOne + (1 << 23) - s.exponent);  // exact, below 4
    const int32_t whole = static_cast<int32_t>(steps);
    // frac + noise / 2^16 >= 1, without a sum that rounds.
    const float threshold = 1.0f - static_cast<float>(static_cast<int32_t>(noise)) * 0x1p-16f;
    const int32_t down = less(bits_as<int32_t>(steps - static_cast<float>(whole)), bits_as<int32_t>(threshold));
    return signed_code(((s.exponent - kOne) >> 22) + whole + 1 + down, y);  // down is -1 or 0
}

// Philox4x32-10 of n counters, first + i * step: word[k][i].
template <int n>
inline void philox(uint64_t key, uint64_t first, uint64_t step, uint32_t word[4][n]) {
    for (int i = 0; i < n; i++) {
        const uint64_t counter = first + static_cast<uint64_t>(i) * step;
        uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
        uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
        for (int round = 0; round < 10; round++) {
            const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
            c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
            c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
            c1 = static_cast<uint32_t>(p1);
            c3 = static_cast<uint32_t>(p0);
            k0 += 0x9E3779B9;
            k1 += 0xBB67AE85;
        }
        word[0][i] = c0;
        word[1][i] = c1;
        word[2][i] = c2;
        word[3][i] = c3;
    }
}

template <class In>
inline void load_run(const Nvfp4& c, int64_t row, int64_t column, float v[kRun]) {
    const auto* x = static_cast<const typename In::Bits*>(c.x) + row * c.stride + column;
    const int64_t n = c.columns - column;
    if (n >= kRun) {
        for (int i = 0; i < kRun; i++) v[i] = In::value(x[i]);
    } else {
        for (int i = 0; i < kRun; i++) v[i] = i < n ? In::value(x[i]) : 0.0f;
    }
}

inline void encode_run(const Nvfp4& c, const Nvfp4Level& level, int64_t row, int64_t column, const float inverse[],
                       float v[kRun]) {
    alignas(64) uint8_t code[kRun], packed[kRun / 2];
    for (int b = 0; b < kRunBlocks; b++)
        for (int i = 0; i < 16; i++) v[16 * b + i] *= inverse[b];
    if (c.stochastic) {
        alignas(64) uint32_t word[4][kRun / 8];
        alignas(64) uint32_t noise[kRun];
        philox<kRun / 8>(level.key, static_cast<uint64_t>(row * c.padded + column) / 8, 1, word);
        for (int i = 0; i < kRun / 8; i++) {
            for (int k = 0; k < 4; k++) {
                noise[8 * i + 2 * k] = word[k][i] & 0xFFFF;
                noise[8 * i + 2 * k + 1] = word[k][i] >> 16;
            }
        }
        for (int i = 0; i < kRun; i++) code[i] = stochastic_code(v[i], noise[i]);
    } else {
        for (int i = 0; i < kRun; i++) code[i] = nearest_code(v[i]);
    }
    for (int i = 0; i < kRun / 2; i++) packed[i] = static_cast<uint8_t>(code[2 * i] | code[2 * i + 1] << 4);
    const int64_t n = c.padded - column < kRun ? c.padded - column : kRun;
    __builtin_memcpy(c.data + (row * c.padded + column) / 2, packed, static_cast<size_t>(n / 2));
}

template <class In>
void cast_along(const Nvfp4& c, const Nvfp4Level& level, int64_t first, int64_t last) {
    alignas(64) float v[kRun], inverse[kRunBlocks];
    alignas(64) int32_t amax[kRunBlocks];
    uint8_t scale[kRunBlocks];
    for (int64_t top = first; top < last; top += c.block_rows) {
        const int64_t bottom = top + c.block_rows < last ? top + c.block_rows : last;
        for (int64_t column = 0; column < c.padded; column += kRun) {
            for (int b = 0; b < kRunBlocks; b++) amax[b] = 0;
            for (int64_t row = top; row < bottom; row++) {
                load_run<In>(c, row, column, v);
                for (int b = 0; b < kRunBlocks; b++) {
                    int32_t largest = amax[b];
                    for (int i = 0; i < 16; i++) {
                        const int32_t magnitude = bits_as<int32_t>(v[16 * b + i]) & 0x7FFFFFFF;
                        largest = magnitude > largest ? magnitude : largest;
                    }
                    amax[b] = largest;
                }
            }
            block_scales<kRunBlocks>(amax, level, scale, inverse);
            const int64_t n = (c.padded - column < kRun ? c.padded - column : kRun) / 16;
            for (int64_t row = top; row < bottom; row++) {
                if (bottom - top > 1) load_run<In>(c, row, column, v);
                encode_run(c, level, row, column, inverse, v);
                __builtin_memcpy(c.scale + (row * c.padded + column) / 16, scale, static_cast<size_t>(n));
            }
        }
    }
}

// 8 bytes of codes for each lane: byte[p][i] has columns 2 p and 2 p + 1.
inline void encode_group(const Nvfp4& c, const Nvfp4Level& level, int64_t row, int64_t column, const float* inverse,
                         float v[16][kLanes], uint8_t byte[8][kLanes]) {
    for (int j = 0; j < 16; j++)
        for (int i = 0; i < kLanes; i++) v[j][i] *= inverse[i];
    if (!c.stochastic) {
        for (int p = 0; p < 8; p++)
            for (int i = 0; i < kLanes; i++)
                byte[p][i] = static_cast<uint8_t>(nearest_code(v[2 * p][i]) | nearest_code(v[2 * p + 1][i]) << 4);
        return;
    }
    alignas(64) uint32_t word[4][kLanes];
    const uint64_t first = static_cast<uint64_t>(row * c.padded + column) / 8, step = static_cast<uint64_t>(c.padded) / 8;
    for (int half = 0; half < 2; half++) {
        philox<kLanes>(level.key, first + static_cast<uint64_t>(half), step, word);
        for (int k = 0; k < 4; k++) {
            const int p = 4 * half + k;
            for (int i = 0; i < kLanes; i++) {
                const uint32_t even = stochastic_code(v[2 * p][i], word[k][i] & 0xFFFF);
                const uint32_t odd = stochastic_code(v[2 * p + 1][i], word[k][i] >> 16);
                byte[p][i] = static_cast<uint8_t>(even | odd << 4);
            }
        }
    }
}

template <class In>
void cast_across(const Nvfp4& c, const Nvfp4Level& level, int64_t first_row, int64_t first_column) {
    constexpr int kGroups = kNvfp4TileColumns / 16;
    alignas(64) float v[16][kLanes], inverse[kLanes];
    alignas(64) int32_t amax[kLanes];
    alignas(64) uint8_t byte[16][kLanes], scale[kLanes], tile[kLanes][8 * kGroups], scales[kLanes][kGroups];
    const int64_t columns = c.padded - first_column < kNvfp4TileColumns ? c.padded - first_column : kNvfp4TileColumns;
    const int64_t rows = c.rows - first_row < kLanes ? c.rows - first_row : kLanes;
    for (int64_t g = 0; g < columns / 16; g++) {
        const int64_t column = first_column + 16 * g;
        load_group<In>(c, first_row, column, v);
        if (c.transform) transform_group(c.negative, v);
        amax_of_group(v, amax);
        if (c.block_rows == 16) {
            for (int b = 0; b < kLanes; b += 16) {
                int32_t largest = 0;
                for (int i = 0; i < 16; i++) largest = amax[b + i] > largest ? amax[b + i] : largest;
                for (int i = 0; i < 16; i++) amax[b + i] = largest;
            }
        }
        block_scales<kLanes>(amax, level, scale, inverse);
        encode_group(c, level, first_row, column, inverse, v, byte + 8 * (g & 1));
        for (int i = 0; i < kLanes; i++) scales[i][g] = scale[i];
        if (g & 1)  // 16 bytes of each lane are complete
            for (int i = 0; i < kLanes; i += 16) transpose16(byte[0] + i, kLanes, tile[i] + 8 * (g - 1), 8 * kGroups);
    }
    for (int64_t i = 0; i < rows; i++) {
        const int64_t at = (first_row + i) * c.padded + first_column;
        __builtin_memcpy(c.data + at / 2, tile[i], static_cast<size_t>(columns / 2));
        __builtin_memcpy(c.scale + at / 16, scales[i], static_cast<size_t>(columns / 16));
    }
}

template <class In>
inline constexpr Nvfp4Loops kNvfp4Loops{measure<In>, measure_transformed<In>, cast_along<In>, cast_across<In>};

inline const Nvfp4Loops& select_nvfp4(int64_t input) {
    if (input == kFloat32Input) return kNvfp4Loops<Float32>;
    return input == kBfloat16Input ? kNvfp4Loops<Bfloat16> : kNvfp4Loops<Float16>;
}

}  // namespace aotrain::AOTRAIN_ISA
