// What the paths of scaled_cast share.
#pragma once

#include <cstdint>

#include "isa.h"

namespace aotrain {

enum Input : int32_t { kFloat32Input, kBfloat16Input, kFloat16Input };
enum Element : int32_t { kE4m3, kE5m2, kInt8 };

// One cast, all fields 64 bits, as aotrain/kernels/_cast_cpu.py packs them.
//
// Rows, columns and blocks are those of the memory: columns are adjacent. `transposed` says that the matrix to cast is
// the transpose; codes and scales are written in its order.
struct Cast {
    const void* x;
    uint8_t* codes;
    float* scale;
    int64_t batch, rows, columns;
    int64_t batch_stride, row_stride;   // in elements
    int64_t block_rows, block_columns;  // at least 1, at most rows and columns
    int64_t transposed, input, element, power_of_two;
};

struct E4m3 {
    static constexpr int kMantissa = 3;
    static constexpr uint32_t kMinExponent = 127 - 6;  // of the smallest normal value, biased as in float32
    static constexpr double kMax = 448.0;
};

struct E5m2 {
    static constexpr int kMantissa = 2;
    static constexpr uint32_t kMinExponent = 127 - 14;
    static constexpr double kMax = 57344.0;
};

struct Int8 {
    static constexpr double kMax = 127.0;
};

// The loops of one input and element format. The pattern of a magnitude is its bits in the input's format: patterns
// have the order of the magnitudes, and NaN is above infinity.
struct CastLoops {
    // The largest pattern of n magnitudes.
    uint32_t (*amax)(const void* x, int64_t n);
    // The same of each of n <= kChunk columns over rows that are `stride` elements apart.
    void (*amax_columns)(const void* x, int64_t stride, int64_t rows, int64_t n, uint32_t* amax);
    // The codes of n elements times their inverse scale: 0 or NaN if their block has an infinity or a NaN, else
    // positive and small enough for nothing to exceed the element's largest value.
    void (*encode)(const void* x, int64_t n, float inverse, uint8_t* codes);
    // The same with a scale of their own each; `regular`: all of them are positive.
    void (*encode_each)(const void* x, int64_t n, const float* inverse, bool regular, uint8_t* codes);
    // to[c][r] = from[r][c] for 16 rows and 16 columns.
    void (*transpose16)(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride);
};

constexpr int64_t kChunk = 1024;

}  // namespace aotrain
