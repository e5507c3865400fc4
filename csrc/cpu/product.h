// What the paths of the emulated scaled_mm share.
#pragma once

#include <cstdint>

#include "isa.h"

namespace aotrain {

// A product of codes to scale, all fields 64 bits, as aotrain/kernels/_mm_cpu.py packs them.
struct Product {
    void* values;         // [rows, columns], float32 or bfloat16
    const int32_t* sums;  // what to scale, of the same shape; null: the values, in place
    const float* row_scale;
    const float* column_scale;
    int64_t rows, columns;
    int64_t row_step, column_step;  // 0: one scale for all, else 1
    int64_t bf16;
};

// Decoded values to scale in place, with a scale per block.
struct Blocks {
    void* values;  // [rows, columns], float32 or bfloat16
    const float* scale;
    int64_t rows, columns, block_rows, block_columns;
    int64_t bf16;
};

struct ProductLoops {
    // to[i] = table[codes[i]] of 2 or 4 bytes each.
    void (*decode16)(const uint8_t* codes, int64_t n, const void* table, void* to);
    void (*decode32)(const uint8_t* codes, int64_t n, const void* table, void* to);
    void (*scale_rows)(const Product& product, int64_t first, int64_t last);
    void (*scale_blocks)(const Blocks& blocks, int64_t first, int64_t last);
};

}  // namespace aotrain
