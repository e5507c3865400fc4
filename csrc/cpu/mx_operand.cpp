// What training adds to the MX cast of an operand to e2m1: the random Hadamard transform, and stochastic rounding with
// bits of Philox4x32-10. Bit for bit quantize_mx of aotrain/formats/mx.py.
//
// Compile with -ffp-contract=off. C ABI, no torch headers: one build serves every torch version.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define AOTRAIN_VECTORS __attribute__((target_clones("arch=skylake-avx512", "avx2", "default")))
#else
#define AOTRAIN_VECTORS
#endif

namespace {

constexpr int64_t kChunk = 4096;  // elements, a multiple of the 8 that share a counter
constexpr int64_t kBlock = 32;
constexpr int kRounds = 10;
enum Rounding : int32_t { kFloor, kCeil, kEven, kRceil };  // E8M0_ROUNDINGS of aotrain/formats/e8m0.py

template <class To, class From>
inline To bits_as(From x) {
    return __builtin_bit_cast(To, x);
}

// The 16 bits of elements 8 * first to 8 * (first + n) - 1: philox_bits16 of aotrain/formats/random.py.
AOTRAIN_VECTORS void noise_of(uint64_t key, uint64_t first, int64_t n, uint16_t* noise) {
    for (int64_t i = 0; i < n; i++) {
        const uint64_t counter = first + static_cast<uint64_t>(i);
        auto c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
        uint32_t c2 = 0, c3 = 0, key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
        for (int round = 0; round < kRounds; round++) {
            const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
            c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ key0;
            c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ key1;
            c1 = static_cast<uint32_t>(b), c3 = static_cast<uint32_t>(a);
            key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
        }
        const uint32_t words[4] = {c0, c1, c2, c3};
        for (int j = 0; j < 4; j++) {
            noise[8 * i + 2 * j] = static_cast<uint16_t>(words[j]);
            noise[8 * i + 2 * j + 1] = static_cast<uint16_t>(words[j] >> 16);
        }
    }
}

// e8m0_from_amax of aotrain/formats/e8m0.py for e2m1, from the bits of the largest magnitude.
uint8_t scale_of(uint32_t bits, int rounding) {
    constexpr uint32_t kMantissa = 0x7FFFFF, kHalfOfSmallestNormal = 0x400000;
    if (bits >= 0x7F800000) return 255;
    if (rounding == kRceil) {
        bits = bits_as<uint32_t>(bits_as<float>(bits) * static_cast<float>(1.0 / 6.0));
        const bool up = (bits & kMantissa) > (bits >> 23 ? 0 : kHalfOfSmallestNormal);
        return static_cast<uint8_t>((bits >> 23) + up);
    }
    if (rounding == kEven) bits += kHalfOfSmallestNormal >> 1;
    const uint32_t byte = (bits >> 23) + (rounding == kCeil && (bits & kMantissa));
    return static_cast<uint8_t>(byte > 2 ? byte - 2 : 0);
}

// Codes of n elements: |y| is a whole number of 2^-16 steps and a rest; adding noise to the number and dropping 16 bits
// rounds up where fraction + noise / 2^16 >= 1, as the rest, less than one, does not matter.
AOTRAIN_VECTORS void encode(const float* x, const float* inverse, const uint16_t* noise, int64_t n, uint8_t* codes) {
    for (int64_t i = 0; i < n; i++) {
        const float y = x[i] * inverse[i];
        const uint32_t sign = bits_as<uint32_t>(y) >> 31;
        uint32_t bits = bits_as<uint32_t>(y) & 0x7FFFFFFF;
        const bool nan = bits > 0x7F800000;
        bits = bits > 0x40C00000 ? 0x40C00000 : bits;  // 6
        const uint32_t biased = bits >> 23 > 127 ? bits >> 23 : 127;
        const float units = bits_as<float>(bits) * bits_as<float>((127 + 17 + 127 - biased) << 23);
        const uint32_t steps = (static_cast<uint32_t>(static_cast<int32_t>(units)) + noise[i]) >> 16;
        const uint32_t code = ((biased - 127) << 1) + steps;
        codes[i] = static_cast<uint8_t>(nan ? 0 : code | sign << 3);
    }
}

AOTRAIN_VECTORS uint32_t largest_of(const float* x, int64_t n) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        bits &= 0x7FFFFFFF;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

AOTRAIN_VECTORS void transform(float* x, const float* signs, int64_t size, float factor) {
    for (int64_t i = 0; i < size; i++) x[i] *= signs[i];
    for (int64_t distance = 1; distance < size; distance *= 2)
        for (int64_t start = 0; start < size; start += 2 * distance)
            for (int64_t i = start; i < start + distance; i++) {
                const float u = x[i], v = x[i + distance];
                x[i] = u + v, x[i + distance] = u - v;
            }
    for (int64_t i = 0; i < size; i++) x[i] *= factor;
}

}  // namespace

extern "C" {

// Transform [n, size] in place: hadamard_transform of aotrain/formats/hadamard.py.
void aotrain_hadamard(float* x, const float* signs, int64_t n, int64_t size, int threads) {
    const auto factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(size)));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < n; i++) transform(x + i * size, signs, size, factor);
}

// Quantize [rows, columns] to codes and scales [rows, ceil(columns / 32)] with the noise of this key.
void aotrain_mx_stochastic(const float* x, int64_t rows, int64_t columns, uint64_t key, int rounding, uint8_t* codes,
                           uint8_t* scale, int threads) {
    const int64_t blocks = (columns + kBlock - 1) / kBlock, chunks = (columns + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t unit = 0; unit < rows * chunks; unit++) {
        const int64_t row = unit / chunks, first = unit % chunks * kChunk, n = std::min(kChunk, columns - first);
        float inverse[kChunk];
        uint16_t noise[kChunk + 8];
        const float* from = x + row * columns + first;
        for (int64_t i = 0; i < n; i += kBlock) {
            const int64_t size = std::min(kBlock, n - i);
            const uint8_t byte = scale_of(largest_of(from + i, size), rounding);
            scale[row * blocks + (first + i) / kBlock] = byte;
            const uint32_t bits = byte < 254 ? (254u - byte) << 23 : 0x400000;
            std::fill_n(inverse + i, size, byte == 255 ? __builtin_nanf("") : bits_as<float>(bits));
        }
        noise_of(key, static_cast<uint64_t>(row * blocks * kBlock + first) / 8, (n + 7) / 8, noise);
        encode(from, inverse, noise, n, codes + row * columns + first);
    }
}
}
