// Quantize a matrix to float8, int8 or e2m1 with one scale per block: bit for bit formats.quantize of aotrain/formats/cast.py.
//
// One pass finds the largest magnitude of every block, a second one writes the codes. A matrix whose blocks span few
// rows is done block by row block, so that the second pass finds its input in the cache. A transposed matrix is encoded
// a tile at a time, in the order of its memory, and the tile's codes are transposed: a byte each.
//
// Compile with -ffp-contract=off. C ABI, no torch headers: one build serves every torch version.
#include "cast.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#define AOTRAIN_PORTABLE "cast_portable.h"
#include "portable_isas.h"
#if AOTRAIN_X86
#include "cast_avx512.h"
#endif

namespace aotrain {
namespace {

constexpr int64_t kTileRows = 64, kTileColumns = 512, kRowsAhead = 2;
constexpr int64_t kUnitElements = 32768;     // a thread takes about as many at a time
constexpr int64_t kCachedBytes = 512 << 10;  // what surely stays in a core's own cache
constexpr int64_t kRowsPerMaximum = 32;      // whose maximum is merged with that of the block at once
constexpr int64_t kShortRun = 16;            // of elements with one scale: not worth a call

int64_t blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }

const CastLoops& select(int isa, const Cast& c) {
#if AOTRAIN_X86
    if (isa == kAvx512) return avx512::select(c);
    if (isa == kAvx2) return avx2::select(c);
#endif
    (void)isa;
    return scalar::select(c);
}

float value_of_pattern(int64_t input, uint32_t pattern) {
    if (input == kFloat32Input) return scalar::Float32::value(pattern);
    const auto bits = static_cast<uint16_t>(pattern);
    return input == kBfloat16Input ? scalar::Bfloat16::value(bits) : scalar::Float16::value(bits);
}

void raise(uint32_t& largest, uint32_t pattern) {
    uint32_t old = __atomic_load_n(&largest, __ATOMIC_RELAXED);
    while (old < pattern &&
           !__atomic_compare_exchange_n(&largest, &old, pattern, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

template <class Function>
void parallel_for(int64_t units, int threads, const Function& function) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && units > 1)
    for (int64_t unit = 0; unit < units; unit++) function(unit);
}

class Matrix {
   public:
    Matrix(const Cast& cast, const CastLoops& loops)
        : c(cast),
          f(loops),
          grid_rows(blocks(cast.rows, cast.block_rows)),
          grid_columns(blocks(cast.columns, cast.block_columns)),
          element_max(max_of(cast.element)),
          mantissa_bits(cast.element == kE2m1   ? E2m1::kMantissa
                        : cast.element == kE5m2 ? E5m2::kMantissa
                                                : E4m3::kMantissa),
          amax(grid_rows * grid_columns),
          inverse(grid_rows * grid_columns),
          regular(grid_rows) {}

    void run(int threads) {
        if (!c.transposed && c.block_rows * c.columns * item() <= kCachedBytes) {
            const int64_t each = std::max<int64_t>(1, kUnitElements / (c.block_rows * c.columns));
            parallel_for(blocks(grid_rows, each), threads, [&](int64_t unit) {
                for (int64_t i = unit * each; i < std::min(grid_rows, (unit + 1) * each); i++) {
                    for (int64_t part = 0; part < parts_per_block_row(); part++) find_amax(i, part);
                    find_scales(i);
                    quantize_rows(i * c.block_rows, std::min(c.rows, (i + 1) * c.block_rows));
                }
            });
            return;
        }
        const int64_t parts = parts_per_block_row();
        parallel_for(grid_rows * parts, threads, [&](int64_t unit) { find_amax(unit / parts, unit % parts); });
        for (int64_t i = 0; i < grid_rows; i++) find_scales(i);
        if (c.transposed) {
            const int64_t across = blocks(c.columns, kTileColumns);
            parallel_for(across * blocks(c.rows, kTileRows), threads, [&](int64_t unit) {
                quantize_tile(unit / across * kTileRows, unit % across * kTileColumns);
            });
        } else {
            const int64_t each = std::max<int64_t>(1, kUnitElements / c.columns);
            parallel_for(blocks(c.rows, each), threads,
                         [&](int64_t unit) { quantize_rows(unit * each, std::min(c.rows, (unit + 1) * each)); });
        }
    }

   private:
    const Cast& c;
    const CastLoops& f;
    const int64_t grid_rows, grid_columns;
    const double element_max;
    const int mantissa_bits;  // of a float format
    std::vector<uint32_t> amax;
    std::vector<float> inverse;
    std::vector<uint8_t> regular;  // whether no block of a row of blocks has an infinity or a NaN

    static double max_of(int64_t element) {
        if (element == kE2m1) return E2m1::kMax;
        return element == kE4m3 ? E4m3::kMax : element == kE5m2 ? E5m2::kMax : Int8::kMax;
    }
    int64_t item() const { return c.input == kFloat32Input ? 4 : 2; }
    const void* at(int64_t row, int64_t column) const {
        return static_cast<const char*>(c.x) + (row * c.row_stride + column) * item();
    }
    bool short_runs() const { return c.block_columns < kShortRun; }
    int64_t columns_per_part() const { return std::max<int64_t>(1, kChunk / c.block_columns) * c.block_columns; }
    int64_t parts_per_block_row() const {
        return short_runs() ? blocks(c.columns, columns_per_part()) : blocks(c.block_rows, kRowsPerMaximum);
    }

    // One part of a row of blocks: some rows, or with short runs some columns of all rows.
    void find_amax(int64_t grid_row, int64_t part) {
        uint32_t* cells = amax.data() + grid_row * grid_columns;
        const int64_t first = grid_row * c.block_rows, last = std::min(c.rows, first + c.block_rows);
        if (!short_runs()) {
            const int64_t begin = first + part * kRowsPerMaximum, end = std::min(last, begin + kRowsPerMaximum);
            for (int64_t j = 0; j < grid_columns; j++) {
                const int64_t column = j * c.block_columns, n = std::min(c.block_columns, c.columns - column);
                uint32_t largest = 0;
                for (int64_t row = begin; row < end; row++) largest = std::max(largest, f.amax(at(row, column), n));
                raise(cells[j], largest);
            }
            return;
        }
        const int64_t begin = part * columns_per_part(), end = std::min(c.columns, begin + columns_per_part());
        uint32_t largest[kChunk];
        f.amax_columns(at(first, begin), c.row_stride, last - first, end - begin, largest);
        for (int64_t column = begin; column < end; column++) {
            uint32_t& cell = cells[column / c.block_columns];
            cell = std::max(cell, largest[column - begin]);
        }
    }

    // scales_from_amax of aotrain/formats/scaling.py.
    void find_scales(int64_t grid_row) {
        bool all_regular = true;
        for (int64_t j = 0; j < grid_columns; j++) {
            const int64_t cell = grid_row * grid_columns + j, at = c.transposed ? j * grid_rows + grid_row : cell;
            const float largest = value_of_pattern(c.input, amax[cell]);
            inverse[cell] = is_e8m0(c.scale_format) ? e8m0_scale(largest, static_cast<uint8_t*>(c.scale)[at])
                                                    : float_scale(largest, static_cast<float*>(c.scale)[at]);
            all_regular &= inverse[cell] > 0;
        }
        regular[grid_row] = all_regular;
    }

    // Write the scale of a block with this largest magnitude; return the inverse.
    float float_scale(float largest, float& scale) const {
        const double magnitude = largest;
        auto inv = static_cast<float>(element_max / (magnitude < 1e-12 ? 1e-12 : magnitude));
        if (c.scale_format == kPowerOfTwoScale && inv == inv)
            inv = scalar::bits_as<float>(scalar::bits_as<uint32_t>(inv) & 0x7F800000);
        scale = inv == inv ? 1.0f / inv : __builtin_nanf("");
        return inv;
    }

    // The same for a byte: e8m0_from_amax and e8m0_inverse of aotrain/formats/e8m0.py.
    float e8m0_scale(float largest, uint8_t& scale) const {
        constexpr uint32_t kMantissa = 0x7FFFFF, kHalfOfSmallestNormal = 0x400000;
        uint32_t bits = scalar::bits_as<uint32_t>(largest), byte;
        if (bits >= 0x7F800000) {
            scale = 255;
            return __builtin_nanf("");
        }
        if (c.scale_format == kE8m0Rceil) {
            bits = scalar::bits_as<uint32_t>(largest * static_cast<float>(1.0 / element_max));
            byte = (bits >> 23) + ((bits & kMantissa) > (bits >> 23 ? 0 : kHalfOfSmallestNormal));
        } else {
            if (c.scale_format == kE8m0Even) bits += 1u << (22 - mantissa_bits);
            byte = (bits >> 23) + (c.scale_format == kE8m0Ceil && (bits & kMantissa));
            const auto max_exponent = scalar::bits_as<uint32_t>(static_cast<float>(element_max)) >> 23;
            byte = byte > max_exponent - 127 ? byte - (max_exponent - 127) : 0;
        }
        scale = static_cast<uint8_t>(byte);
        return scalar::bits_as<float>(byte < 254 ? (254 - byte) << 23 : kHalfOfSmallestNormal);
    }

    // Codes of columns first..last-1 of a row, in the order of the memory.
    void quantize(int64_t row, int64_t first, int64_t last, uint8_t* to) const {
        const int64_t grid_row = row / c.block_rows;
        const float* inv = inverse.data() + grid_row * grid_columns;
        if (c.block_columns == 1) {
            f.encode_each(at(row, first), last - first, inv + first, regular[grid_row], to);
        } else if (short_runs()) {
            float each[kTileColumns];
            for (int64_t begin = first; begin < last; begin += kTileColumns) {
                const int64_t n = std::min(kTileColumns, last - begin);
                for (int64_t i = 0; i < n; i++) each[i] = inv[(begin + i) / c.block_columns];
                f.encode_each(at(row, begin), n, each, regular[grid_row], to + begin - first);
            }
        } else {
            for (int64_t begin = first; begin < last;) {
                const int64_t j = begin / c.block_columns, end = std::min(last, (j + 1) * c.block_columns);
                f.encode(at(row, begin), end - begin, inv[j], to + begin - first);
                begin = end;
            }
        }
    }

    void quantize_rows(int64_t first, int64_t last) const {
        for (int64_t row = first; row < last; row++) quantize(row, 0, c.columns, c.codes + row * c.columns);
    }

    // A tile's row is too short for the hardware to see a stream.
    void prefetch_row(int64_t row, int64_t column, int64_t n) const {
        if (row >= c.rows) return;
        for (int64_t i = 0; i < n; i += 64 / item()) __builtin_prefetch(at(row, column + i));
    }

    void quantize_tile(int64_t first_row, int64_t first_column) const {
        alignas(64) uint8_t tile[kTileRows][kTileColumns], lines[16][kTileRows];
        const int64_t rows = std::min(kTileRows, c.rows - first_row);
        const int64_t columns = std::min(kTileColumns, c.columns - first_column);
        for (int64_t i = 0; i < rows; i++) {
            prefetch_row(first_row + i + kRowsAhead, first_column, columns);
            quantize(first_row + i, first_column, first_column + columns, tile[i]);
        }
        for (int64_t j = 0; j < columns; j += 16) {
            for (int64_t i = 0; i < rows; i += 16) f.transpose16(tile[i] + j, kTileColumns, lines[0] + i, kTileRows);
            // Whole lines at once: those of a power-of-two number of rows compete for the same place in the cache.
            uint8_t* to = c.codes + (first_column + j) * c.rows + first_row;
            for (int64_t k = 16; k < std::min<int64_t>(32, columns - j); k++) __builtin_prefetch(to + k * c.rows, 1);
            for (int64_t k = 0; k < std::min<int64_t>(16, columns - j); k++, to += c.rows) {
                if (rows == kTileRows)
                    std::memcpy(to, lines[k], kTileRows);
                else
                    std::memcpy(to, lines[k], static_cast<size_t>(rows));
            }
        }
    }
};

}  // namespace
}  // namespace aotrain

extern "C" {

// The fastest path this CPU has, an Isa.
int aotrain_scaled_cast_isa() { return aotrain::best_isa(); }

// `isa` must be one that the CPU has.
void aotrain_scaled_cast(const aotrain::Cast* cast, int isa, int threads) {
    using namespace aotrain;
    Cast one = *cast;
    const int64_t cells = blocks(one.rows, one.block_rows) * blocks(one.columns, one.block_columns);
    const int64_t item = one.input == kFloat32Input ? 4 : 2;
    for (int64_t i = 0; i < cast->batch; i++) {
        Matrix(one, select(isa, one)).run(threads);
        one.x = static_cast<const char*>(one.x) + one.batch_stride * item;
        one.codes += one.rows * one.columns;
        one.scale = static_cast<char*>(one.scale) + cells * (is_e8m0(one.scale_format) ? 1 : 4);
    }
}
}
