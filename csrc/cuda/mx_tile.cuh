// Cast one tile of 128 x 128 elements, in one read, along rows, along columns, or both: the body of the kernel.
//
// x is copied to shared memory. Along rows, eight threads take a row's 128 elements, 16 each, and two of them a block
// of 32. Along columns, a thread takes 32 rows of two adjacent columns; the codes then go through shared memory, in
// place of x, so that what a warp writes is contiguous: 128 bytes of each row of codes, in both directions. Scales of
// the tile gather in shared memory as well, in the order of a scale tile.
//
// A group of threads is a type, `Group`: on a GPU a thread runs its own part (mx_cast.cu); in tests a loop runs the
// parts of all threads between two barriers (group_host.h), and checks every access. It has
//   threads(f)                    f(thread) for each thread
//   barrier()                     all that was loaded and stored before is done
//   keep_larger_of_pairs(local)   each thread gets the larger value of threads 2i and 2i + 1
//   Local<T>                      a variable per thread, local[thread]
//   shared, tile                  the shared memory, and which tile to cast
//   load<T>, store                of global and shared memory; `Access` says which of the kernel's accesses it is
//   copy                          16 bytes from global to shared memory, not there before the next barrier; the first
//                                 `bytes` are read, the others are zeros
#pragma once

#include "mx_numerics.cuh"
#include "mx_plan.h"

namespace aotrain::mx {

enum Ways : int { kRows = 1, kColumns = 2, kBothWays = 3 };

enum Access : int {
    kReadX,
    kReadGroupEnds,
    kTileWrite,
    kTileReadRow,
    kTileReadColumn,
    kRowScaleWrite,
    kColumnScaleWrite,
    kScaleRead,
    kCodesWrite,
    kCodesRead,
    kWriteRowCodes,
    kWriteColumnCodes,
    kWriteScale,
    kAccesses
};

template <class In>
constexpr int kItem = 4 / In::kPerWord;
template <class In>
constexpr int kChunkElements = kVector / kItem<In>;  // a chunk is 16 bytes
template <class In>
constexpr int kRowChunks = kTile / kChunkElements<In>;
template <class E>
constexpr int kCodeChunks = kTile * E::kBits / 8 / kVector;  // of a column of codes

constexpr int kPartElements = 16;  // of a row that a thread takes
constexpr int kPartsPerRow = kTile / kPartElements, kRowsPerPass = kThreads / kPartsPerRow;
constexpr int kPairs = kTile / 2;  // of columns
static_assert(kPartElements * 2 == kBlock && kPairs * kBlocksPerTile == kThreads, "two threads a block, one a pair");

template <class In>
constexpr int kTileBytes = kTile * kTile * kItem<In>;
template <class In>
constexpr int kSharedBytes = kTileBytes<In> + 2 * kScaleTileBytes;  // x, later codes; scales of rows; of columns

struct Tile {
    int64_t batch, row, column;  // of its first element
    uint32_t row_tile, column_tile;
    int rows, columns;  // that the matrix has of it
};

// How much of `size` lies before the end that is `left` away.
template <typename T>
AOTRAIN_DEVICE int within(T left, int size) {
    return left >= size ? size : left > 0 ? static_cast<int>(left) : 0;
}

AOTRAIN_DEVICE Tile tile_of(const Cast& c, uint32_t index) {
    const uint32_t row_of_tiles = index / c.column_tiles, column_tile = index - row_of_tiles * c.column_tiles;
    const uint32_t batch = row_of_tiles / c.row_tiles, row_tile = row_of_tiles - batch * c.row_tiles;
    const int64_t row = int64_t{row_tile} * kTile, column = int64_t{column_tile} * kTile;
    return {batch, row, column, row_tile, column_tile, within(c.rows - row, kTile), within(c.columns - column, kTile)};
}

// Where a chunk of x lies in shared memory. A quarter of a warp reads the k-th chunk of eight parts of a row at a time:
// moving chunks inside their eight, by the number of the eight, puts these into different banks.
template <class In>
AOTRAIN_DEVICE int tile_offset(int row, int chunk) {
    constexpr int kChunksPerPart = kPartElements / kChunkElements<In>;
    return (row * kRowChunks<In> + (chunk ^ (chunk >> 3 & (kChunksPerPart - 1)))) * kVector;
}

// Where a chunk of a column's codes lies. It is written for eight pairs of columns at a time and read in order.
template <class E>
AOTRAIN_DEVICE int code_offset(int column, int chunk) {
    return ((column * kCodeChunks<E> + chunk) ^ (column >> 1 & 7)) * kVector;
}

// Where a scale lies in its tile of 128 rows and four blocks.
AOTRAIN_DEVICE int scale_offset(int row, int block) {
    return row % 32 * 16 + row / 32 * 4 + block;
}

template <int N, class Group>
AOTRAIN_DEVICE void store_part(Group& g, Access access, uint8_t* to, const Words<N>& words, int bytes, bool vectors) {
    if (vectors && bytes == 4 * N) {
        g.store(access, to, words);
        return;
    }
    AOTRAIN_UNROLL
    for (int i = 0; i < 4 * N; i++)
        if (i < bytes) g.store(access, to + i, static_cast<uint8_t>(words.word[i / 4] >> (i % 4 * 8)));
}

// A chunk of a matrix whose rows are not aligned, an element at a time.
template <class In, class Group>
AOTRAIN_DEVICE void load_elements(Group& g, uint8_t* to, const uint8_t* from, int bytes) {
    Words<4> words{};
    AOTRAIN_UNROLL
    for (int i = 0; i < kChunkElements<In>; i++) {
        if (i * kItem<In> >= bytes) continue;
        if constexpr (In::kPerWord == 1)
            words.word[i] = g.template load<uint32_t>(kReadX, from + i * 4);
        else
            words.word[i / 2] |= uint32_t{g.template load<uint16_t>(kReadX, from + i * 2)} << (i % 2 * 16);
    }
    g.store(kTileWrite, to, words);
}

template <class In, bool kFull, class Group>
AOTRAIN_DEVICE void load_tile(const Cast& c, const Tile& t, Group& g, int thread) {
    constexpr int kRowsAtOnce = kThreads / kRowChunks<In>;
    const int chunk = thread % kRowChunks<In>, first = thread / kRowChunks<In>;
    const int row_bytes = within(t.columns * kItem<In> - chunk * kVector, kVector);
    const uint8_t* from = c.x + t.batch * c.matrix_bytes + (t.row + first) * c.row_bytes + t.column * kItem<In>;
    AOTRAIN_UNROLL
    for (int i = 0; i < kTile / kRowsAtOnce; i++) {
        const int row = i * kRowsAtOnce + first, bytes = kFull ? kVector : row < t.rows ? row_bytes : 0;
        uint8_t* to = g.shared + tile_offset<In>(row, chunk);
        if (kFull || c.vectors)
            g.copy(kReadX, to, from + chunk * kVector, bytes);
        else
            load_elements<In>(g, to, from + chunk * kVector, bytes);
        from += kRowsAtOnce * c.row_bytes;
    }
}

template <class In>
struct RowPart {
    Words<4> chunk[kPartElements / kChunkElements<In>];

    AOTRAIN_DEVICE float value(int i) const {
        constexpr int kEach = kChunkElements<In>, kLanes = In::kPerWord;
        return In::value(chunk[i / kEach].word[i % kEach / kLanes], i % kLanes);
    }
};

// Reads a thread's part of a row; the float32 bits of its largest magnitude.
template <class In, class Group>
AOTRAIN_DEVICE uint32_t read_row_part(Group& g, int thread, int pass, RowPart<In>& part) {
    constexpr int kChunks = kPartElements / kChunkElements<In>;
    const int row = pass * kRowsPerPass + thread / kPartsPerRow, first = thread % kPartsPerRow * kChunks;
    uint32_t largest = 0;
    AOTRAIN_UNROLL
    for (int k = 0; k < kChunks; k++) {
        part.chunk[k] = g.template load<Words<4>>(kTileReadRow, g.shared + tile_offset<In>(row, first + k));
        AOTRAIN_UNROLL
        for (int w = 0; w < 4; w++) largest = In::raise(largest, part.chunk[k].word[w]);
    }
    return larger(In::amax_bits(largest, 0), In::amax_bits(largest, In::kPerWord - 1));
}

template <class In, class E, bool kFull, class Group>
AOTRAIN_DEVICE void cast_row_part(
    const Cast& c, const Tile& t, Group& g, int thread, int pass, const RowPart<In>& part, uint32_t amax
) {
    constexpr int kWords = kPartElements / kCodesPerWord<E>;
    const uint32_t byte = scale_byte(amax, c.rule);
    const float inverse = inverse_of(byte);
    Words<kWords> codes;
    AOTRAIN_UNROLL
    for (int w = 0; w < kWords; w++) {
        float y[kCodesPerWord<E>];
        AOTRAIN_UNROLL
        for (int i = 0; i < kCodesPerWord<E>; i++) y[i] = part.value(w * kCodesPerWord<E> + i);
        codes.word[w] = or_nan<E>(encode_word<E>(y, inverse), byte);
    }
    const int row = pass * kRowsPerPass + thread / kPartsPerRow, index = thread % kPartsPerRow;
    if (index % 2 == 0)
        g.store(kRowScaleWrite, g.shared + kTileBytes<In> + scale_offset(row, index / 2), static_cast<uint8_t>(byte));
    const int64_t column = t.column + index * kPartElements;
    uint8_t* to = c.by_row.codes + t.batch * c.by_row.codes_matrix + (t.row + row) * c.by_row.codes_pitch +
                  column * E::kBits / 8;
    if constexpr (kFull) {
        g.store(kWriteRowCodes, to, codes);
        return;
    }
    const int bytes = (within(t.columns - index * kPartElements, kPartElements) * E::kBits + 7) / 8;
    if (row < t.rows) store_part(g, kWriteRowCodes, to, codes, bytes, c.by_row.vectors);
}

// The codes of two columns of 32 rows.
template <class E>
struct ColumnPart {
    static constexpr int kChunks = kBlock * E::kBits / 8 / kVector;
    Words<4> chunk[2][kChunks];
};

template <class In, class E, class Group>
AOTRAIN_DEVICE void cast_column_part(const Cast& c, Group& g, int thread, ColumnPart<E>& codes) {
    constexpr int kLanes = In::kPerWord;
    using Pair = Words<2 / kLanes>;
    const int column = thread % kPairs * 2, block = thread / kPairs, inside = column % kChunkElements<In> * kItem<In>;
    const uint8_t* from = g.shared + tile_offset<In>(block * kBlock, column / kChunkElements<In>) + inside;
    Pair x[kBlock], largest{};
    AOTRAIN_UNROLL
    for (int row = 0; row < kBlock; row++) {
        x[row] = g.template load<Pair>(kTileReadColumn, from + row * kTile * kItem<In>);
        AOTRAIN_UNROLL
        for (int w = 0; w < 2 / kLanes; w++) largest.word[w] = In::raise(largest.word[w], x[row].word[w]);
    }
    AOTRAIN_UNROLL
    for (int side = 0; side < 2; side++) {
        const int w = side / kLanes, lane = side % kLanes;
        const uint32_t byte = scale_byte(In::amax_bits(largest.word[w], lane), c.rule);
        const float inverse = inverse_of(byte);
        AOTRAIN_UNROLL
        for (int i = 0; i < kBlock / kCodesPerWord<E>; i++) {
            float y[kCodesPerWord<E>];
            AOTRAIN_UNROLL
            for (int k = 0; k < kCodesPerWord<E>; k++)
                y[k] = In::value(x[i * kCodesPerWord<E> + k].word[w], lane);
            codes.chunk[side][i / 4].word[i % 4] = or_nan<E>(encode_word<E>(y, inverse), byte);
        }
        g.store(kColumnScaleWrite, g.shared + kTileBytes<In> + kScaleTileBytes + scale_offset(column + side, block),
                static_cast<uint8_t>(byte));
    }
}

template <class E, class Group>
AOTRAIN_DEVICE void stage_column_part(Group& g, int thread, const ColumnPart<E>& codes) {
    constexpr int kChunks = ColumnPart<E>::kChunks;
    const int column = thread % kPairs * 2, first = thread / kPairs * kChunks;
    AOTRAIN_UNROLL
    for (int side = 0; side < 2; side++) {
        AOTRAIN_UNROLL
        for (int k = 0; k < kChunks; k++)
            g.store(kCodesWrite, g.shared + code_offset<E>(column + side, first + k), codes.chunk[side][k]);
    }
}

template <class E, bool kFull, class Group>
AOTRAIN_DEVICE void write_columns(const Cast& c, const Tile& t, Group& g, int thread) {
    constexpr int kColumnsAtOnce = kThreads / kCodeChunks<E>;
    const int chunk = thread % kCodeChunks<E>, first = thread / kCodeChunks<E>;
    const int bytes = within((t.rows * E::kBits + 7) / 8 - chunk * kVector, kVector);
    uint8_t* to = c.by_column.codes + t.batch * c.by_column.codes_matrix +
                  (t.column + first) * c.by_column.codes_pitch + t.row * E::kBits / 8 + chunk * kVector;
    AOTRAIN_UNROLL
    for (int i = 0; i < kTile / kColumnsAtOnce; i++) {
        const int column = i * kColumnsAtOnce + first;
        const auto codes = g.template load<Words<4>>(kCodesRead, g.shared + code_offset<E>(column, chunk));
        if constexpr (kFull)
            g.store(kWriteColumnCodes, to, codes);
        else if (column < t.columns)
            store_part(g, kWriteColumnCodes, to, codes, bytes, c.by_column.vectors);
        to += kColumnsAtOnce * c.by_column.codes_pitch;
    }
}

// The rows of tiles that the transpose of x, or of the group of its rows that a tile is in, has columns of scale tiles.
struct ScaleColumns {
    int64_t first, count;  // no count: the tile is in no group
};

template <class Group>
AOTRAIN_DEVICE ScaleColumns scale_columns(const Cast& c, const Tile& t, Group& g) {
    if (c.group_ends == nullptr) return {0, c.row_tiles};
    const auto end = [&](int group) {
        return g.template load<int32_t>(kReadGroupEnds, reinterpret_cast<const uint8_t*>(c.group_ends + group));
    };
    int low = 0, high = c.groups;  // around the first group that ends after the tile's first row
    while (low < high) {
        const int middle = (low + high) / 2;
        if (end(middle) <= t.row)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == c.groups) return {0, 0};
    const int64_t first = low > 0 ? end(low - 1) : 0;
    return {first / kTile, (end(low) - first) / kTile};
}

// The scales of a tile, four of a row by each of 128 threads; row-major. `row_tile`, `column_tile` and the numbers of
// rows and columns in the tile are those of the output: for the transpose, x's columns and rows.
template <class Group>
AOTRAIN_DEVICE void write_scale_rows(
    Group& g, int thread, const uint8_t* shared, const Output& out, int64_t batch, int64_t row_tile,
    int64_t column_tile, int rows, int columns
) {
    if (thread >= rows) return;
    const auto word = g.template load<Words<1>>(kScaleRead, shared + scale_offset(thread, 0));
    uint8_t* to = out.scale + batch * out.scale_matrix + (row_tile * kTile + thread) * out.scale_pitch +
                  column_tile * kBlocksPerTile;
    const int bytes = (columns + kBlock - 1) / kBlock;
    store_part(g, kWriteScale, to, word, bytes, reinterpret_cast<uintptr_t>(to) % 4 == 0);
}

// The same as one of the output's scale tiles.
template <class Group>
AOTRAIN_DEVICE void write_scale_tile(
    Group& g, int thread, const uint8_t* shared, const Output& out, int64_t batch, int64_t tile
) {
    const auto word = g.template load<Words<1>>(kScaleRead, shared + thread * 4);
    g.store(kWriteScale, out.scale + batch * out.scale_matrix + tile * kScaleTileBytes + thread * 4, word);
}

template <int kWays, class Group>
AOTRAIN_DEVICE void write_scales(
    const Cast& c, const Tile& t, Group& g, int thread, const uint8_t* shared, const ScaleColumns& of_columns
) {
    const int index = thread % kTile;
    if ((kWays & kRows) != 0 && thread < kTile) {
        if (c.blocked)
            write_scale_tile(g, index, shared, c.by_row, t.batch, int64_t{t.row_tile} * c.column_tiles + t.column_tile);
        else
            write_scale_rows(g, index, shared, c.by_row, t.batch, t.row_tile, t.column_tile, t.rows, t.columns);
    }
    if ((kWays & kColumns) != 0 && thread >= kTile) {
        shared += kScaleTileBytes;
        if (!c.blocked) {
            write_scale_rows(g, index, shared, c.by_column, t.batch, t.column_tile, t.row_tile, t.columns, t.rows);
        } else if (of_columns.count > 0) {
            const int64_t row = t.column_tile, column = t.row_tile - of_columns.first;
            const int64_t before = of_columns.first * c.column_tiles;  // tiles of the groups before
            write_scale_tile(g, index, shared, c.by_column, t.batch, before + row * of_columns.count + column);
        }
    }
}

// `kFull`: the matrix has all of the tile, and everything is aligned.
template <class In, class E, int kWays, bool kFull, class Group>
AOTRAIN_DEVICE void cast_tile(const Cast& c, const Tile& t, Group& g) {
    typename Group::template Local<ScaleColumns> of_columns;
    g.threads([&](int thread) {
        load_tile<In, kFull>(c, t, g, thread);
        if constexpr ((kWays & kColumns) != 0) of_columns[thread] = scale_columns(c, t, g);
    });
    g.barrier();
    if constexpr ((kWays & kRows) != 0) {
        AOTRAIN_UNROLL
        for (int pass = 0; pass < kTile / kRowsPerPass; pass++) {
            typename Group::template Local<RowPart<In>> part;
            typename Group::template Local<uint32_t> amax;
            g.threads([&](int thread) { amax[thread] = read_row_part<In>(g, thread, pass, part[thread]); });
            g.keep_larger_of_pairs(amax);
            g.threads([&](int thread) {
                cast_row_part<In, E, kFull>(c, t, g, thread, pass, part[thread], amax[thread]);
            });
        }
    }
    if constexpr ((kWays & kColumns) != 0) {
        typename Group::template Local<ColumnPart<E>> codes;
        g.threads([&](int thread) { cast_column_part<In, E>(c, g, thread, codes[thread]); });
        g.barrier();  // x has been read; codes take its place
        g.threads([&](int thread) { stage_column_part<E>(g, thread, codes[thread]); });
    }
    g.barrier();
    g.threads([&](int thread) {
        if constexpr ((kWays & kColumns) != 0) write_columns<E, kFull>(c, t, g, thread);
        write_scales<kWays>(c, t, g, thread, g.shared + kTileBytes<In>, of_columns[thread]);
    });
}

template <class In, class E, int kWays, class Group>
AOTRAIN_DEVICE void cast_tile(const Cast& c, Group& g) {
    const Tile t = tile_of(c, g.tile);
    if (c.aligned && t.rows == kTile && t.columns == kTile)
        cast_tile<In, E, kWays, true>(c, t, g);
    else
        cast_tile<In, E, kWays, false>(c, t, g);
}

}  // namespace aotrain::mx
