// What the paths of scaled_cast share.
#pragma once

#include <cstdint>

#include "isa.h"

namespace aotrain {

enum Input : int32_t { kFloat32Input, kBfloat16Input, kFloat16Input };
enum Element : int32_t { kE4m3, kE5m2, kInt8, kE2m1 };
// Formats of the scale: float32, the same with inverse scales that are powers of two, or the bytes of E8M0 with one of
// its roundings (aotrain/formats/e8m0.py).
enum ScaleFormat : int32_t { kFloat32Scale, kPowerOfTwoScale, kE8m0Floor, kE8m0Ceil, kE8m0Even, kE8m0Rceil };

// One cast, all fields 64 bits, as aotrain/kernels/_cast_cpu.py packs them.
//
// Rows, columns and blocks are those of the memory: columns are adjacent. `transposed` says that the matrix to cast is
// the transpose; codes and scales are written in its order.
struct Cast {
    const void* x;
    uint8_t* codes;
    void* scale;  // float or, for E8M0, uint8_t
    int64_t batch, rows, columns;
    int64_t batch_stride, row_stride;   // in elements
    int64_t block_rows, block_columns;  // at least 1, at most rows and columns
    int64_t transposed, input, element, scale_format;
};

constexpr bool is_e8m0(int64_t scale_format) { return scale_format >= kE8m0Floor; }
// Whether these scales may leave elements beyond the largest value.
constexpr bool saturates(int64_t scale_format) { return scale_format == kE8m0Floor || scale_format == kE8m0Even; }

struct E4m3 {
    static constexpr bool kSaturate = false;
    static constexpr int kMantissa = 3;
    static constexpr uint32_t kMinExponent = 127 - 6;  // of the smallest normal value, biased as in float32
    static constexpr double kMax = 448.0;
    static constexpr uint8_t kSign = 0x80, kNan = 0x7F;
};

struct E5m2 {
    static constexpr bool kSaturate = false;
    static constexpr int kMantissa = 2;
    static constexpr uint32_t kMinExponent = 127 - 14;
    static constexpr double kMax = 57344.0;
    static constexpr uint8_t kSign = 0x80, kNan = 0x7F;
};

// Codes in the low half of a byte; a NaN is zero.
struct E2m1 {
    static constexpr bool kSaturate = false;
    static constexpr int kMantissa = 1;
    static constexpr uint32_t kMinExponent = 127;
    static constexpr double kMax = 6.0;
    static constexpr uint8_t kSign = 0x08, kNan = 0;
};

struct Int8 {
    static constexpr bool kSaturate = false;
    static constexpr double kMax = 127.0;
    static constexpr uint8_t kSign = 0x80, kNan = 0;
};

template <class E>
struct Saturating : E {
    static constexpr bool kSaturate = true;
};

// The loops of one input and element format. The pattern of a magnitude is its bits in the input's format: patterns
// have the order of the magnitudes, and NaN is above infinity.
struct CastLoops {
    // The largest pattern of n magnitudes.
    uint32_t (*amax)(const void* x, int64_t n);
    // The same of each of n <= kChunk columns over rows that are `stride` elements apart.
    void (*amax_columns)(const void* x, int64_t stride, int64_t rows, int64_t n, uint32_t* amax);
    // The codes of n elements times their inverse scale: 0 or NaN if their block has an infinity or a NaN, else
    // positive and, unless the codes saturate, small enough for nothing to exceed the element's largest value.
    void (*encode)(const void* x, int64_t n, float inverse, uint8_t* codes);
    // The same with a scale of their own each; `regular`: all of them are positive.
    void (*encode_each)(const void* x, int64_t n, const float* inverse, bool regular, uint8_t* codes);
    // to[c][r] = from[r][c] for 16 rows and 16 columns.
    void (*transpose16)(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride);
};

constexpr int64_t kChunk = 1024;

}  // namespace aotrain
