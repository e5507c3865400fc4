// What the paths of nvfp4_cast share.
#pragma once

#include <cstdint>

#include "cast.h"

namespace aotrain {

constexpr int64_t kNvfp4Block = 16;

// One operand, all fields 64 bits, as aotrain/kernels/_nvfp4_cpu.py packs them.
//
// Rows and columns are those of the operand, its columns along the contracted dimension. In the memory of the source
// either columns are adjacent ("along"), or rows are ("across").
struct Nvfp4 {
    const void* x;
    uint8_t* data;        // [rows, padded / 2]
    uint8_t* scale;       // [rows, padded / 16]
    float* global_scale;  // 1
    int64_t rows, columns, padded;
    int64_t stride;  // elements from one row to the next (along), or from one column to the next (across)
    int64_t across, input;
    int64_t block_rows;  // 1 or 16
    int64_t transform;   // whether to transform along columns; only across
    int64_t negative;    // bit i: sign i is -1
    int64_t stochastic, seed_word;
};

// What one read of the source finds.
struct Nvfp4Measures {
    uint32_t amax = 0;  // bits of a float32
    int64_t checksum = 0;
};

// The global level of scales, and the key of the noise.
struct Nvfp4Level {
    float global, inverse;
    uint64_t key;
};

struct Nvfp4Loops {
    // Raise the measures by n adjacent elements.
    void (*measure)(const void* x, int64_t n, Nvfp4Measures& measures);
    // The largest pattern after the transform of the columns first..first + 15, for all operand rows.
    uint32_t (*measure_transformed)(const Nvfp4& c, int64_t first);
    // Data and scales of operand rows first..last - 1; of multiples of 16 where blocks are.
    void (*cast_along)(const Nvfp4& c, const Nvfp4Level& level, int64_t first, int64_t last);
    // Data and scales of up to 64 operand rows from `first_row` and 128 columns from `first_column`.
    void (*cast_across)(const Nvfp4& c, const Nvfp4Level& level, int64_t first_row, int64_t first_column);
};

constexpr int64_t kNvfp4TileRows = 64, kNvfp4TileColumns = 128;

}  // namespace aotrain
