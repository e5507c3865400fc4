// One cast: its arguments as Python packs them, and what follows from them for every tile.
#pragma once

#include <cstdint>

#include "mx_formats.h"

namespace aotrain::mx {

enum Input : int32_t { kFloat32Input, kBfloat16Input, kFloat16Input };

// A tile is as large as one tile of scales, 128 x 4 bytes (aotrain/formats/scale_layout.py), in both directions: each
// group of threads writes scale tiles of its own, and the zeros that pad them.
constexpr int kTile = 128, kBlock = 32, kBlocksPerTile = kTile / kBlock, kScaleTileBytes = kTile * kBlocksPerTile;
constexpr int kThreads = 256, kVector = 16;

// All fields 64 bits, as aotrain/kernels/_mx_cuda.py packs them. Columns of x are adjacent; strides are in elements.
// Codes and scales of a direction that is not asked for are null.
struct Arguments {
    const void* x;
    uint8_t *codes, *scale;      // blocks of 32 along a row: x[batch, rows, columns]
    uint8_t *codes_t, *scale_t;  // blocks of 32 along a column: the transpose [batch, columns, rows]
    int64_t batch, rows, columns, batch_stride, row_stride;
    int64_t input, element, rounding, blocked, device;
    // Rows of x in groups that end there, at multiples of kTile, or null: the blocked scales of columns are those of
    // each group's transpose, one group after the other. Nothing is written for rows after the last group.
    const int32_t* group_ends;
    int64_t groups;
};

// One direction's output. Pitches are bytes from a row, or a matrix, to the next, that of scales for the row-major
// order; `vectors`: rows of codes can be written 16 bytes at a time.
struct Output {
    uint8_t *codes, *scale;
    int64_t codes_pitch, codes_matrix, scale_pitch, scale_matrix;
    bool vectors;
};

struct Cast {
    const uint8_t* x;
    int64_t rows, columns, row_bytes, matrix_bytes;
    uint32_t row_tiles, column_tiles, tiles;
    ScaleRule rule;
    bool blocked, vectors, aligned;  // x can be read 16 bytes at a time; that, and all outputs be written so
    Output by_row, by_column;
    const int32_t* group_ends;
    int32_t groups;
};

inline int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

inline bool divisible(const void* pointer, int64_t pitch, int64_t matrix) {
    return (reinterpret_cast<uintptr_t>(pointer) | static_cast<uint64_t>(pitch | matrix)) % kVector == 0;
}

inline Output plan_output(uint8_t* codes, uint8_t* scale, int64_t rows, int64_t columns, const Arguments& a) {
    Output out;
    out.codes = codes;
    out.scale = scale;
    out.codes_pitch = a.element == kE2m1 ? blocks(columns, 2) : columns;
    out.codes_matrix = rows * out.codes_pitch;
    out.vectors = divisible(codes, out.codes_pitch, out.codes_matrix);
    out.scale_pitch = blocks(columns, kBlock);
    out.scale_matrix = rows * out.scale_pitch;
    if (a.blocked) out.scale_matrix = blocks(rows, kTile) * blocks(columns, kTile) * kScaleTileBytes;
    return out;
}

// False when there are more tiles than a launch can have.
inline bool plan(const Arguments& a, Cast& c) {
    const int64_t item = a.input == kFloat32Input ? 4 : 2;
    const int64_t row_tiles = blocks(a.rows, kTile), column_tiles = blocks(a.columns, kTile);
    if (row_tiles * column_tiles * a.batch > INT32_MAX) return false;
    c.x = static_cast<const uint8_t*>(a.x);
    c.rows = a.rows;
    c.columns = a.columns;
    c.row_bytes = a.row_stride * item;
    c.matrix_bytes = a.batch_stride * item;
    c.row_tiles = static_cast<uint32_t>(row_tiles);
    c.column_tiles = static_cast<uint32_t>(column_tiles);
    c.tiles = static_cast<uint32_t>(row_tiles * column_tiles * a.batch);
    c.rule = scale_rule_of(a.element, a.rounding);
    c.blocked = a.blocked != 0;
    c.vectors = divisible(a.x, c.row_bytes, c.matrix_bytes);
    c.by_row = plan_output(a.codes, a.scale, a.rows, a.columns, a);
    c.by_column = plan_output(a.codes_t, a.scale_t, a.columns, a.rows, a);
    c.group_ends = a.group_ends;
    c.groups = static_cast<int32_t>(a.groups);
    c.aligned = c.vectors && (!a.codes || c.by_row.vectors) && (!a.codes_t || c.by_column.vectors);
    return true;
}

}  // namespace aotrain::mx
