// What the paths of fake_quantize share.
#pragma once

#include <cstdint>

#include "isa.h"

namespace aotrain {

enum Input : int32_t { kFloat32Input, kBfloat16Input, kFloat16Input };
enum Mapping : int32_t { kSymmetric, kNeverClipping, kAsymmetric };

// The scales of so many groups are found together.
constexpr int64_t kGroups = 16;
// Adding it rounds a float of less than 2^22 to an integer, ties to even.
constexpr float kRound = 12582912.0f;

// One call, all fields 64 bits, as aotrain/kernels/_fake_quantize_cpu.py packs them.
struct FakeQuantize {
    const void* x;
    const void* grad;      // of the values; null to make the values instead of the gradient of x
    void* out;             // may be grad
    int64_t groups, size;  // groups of `size` adjacent elements, one after the other
    int64_t lowest, highest, zero_point, mapping;  // codes; the zero point of the symmetric mappings
    int64_t input, scale_dtype;                    // Input
    int64_t wide;                                  // whether the arithmetic is in float32, whatever the input
    int64_t eps;                                   // bits of a float: the smallest scale
    const uint16_t* table;                         // see Lookup; null where the values are computed
    int64_t first_key, last_key;                   // the largest magnitudes of groups that it is for, as bfloat16 bits
    int64_t exponent, nonzero, highest_step;       // of its values: bits, a bit each; the last step that has a code
    int64_t constant_below;  // bits of a float: up to this largest magnitude, a scale is a constant
    int64_t with_scales;     // whether a gradient is also that of the scales (aotrain/formats/scale_gradient.py)
    uint32_t* saturated;  // null, or, to make values: a bit per element without a code, groups padded to whole words
};

// A bfloat16 group's values follow from the mantissa of its largest magnitude, but for a power of two. For each such
// mantissa a table has two rows. With `level` the magnitude's bits, less those of the largest one, plus 511, and at
// least 0, `steps = (level + row[0][level / 16]) >> 9` are the magnitude's steps, and `row[1][steps]` is the value of a
// negative element, `row[1][16 + steps]` that of another one. aotrain/kernels/_fake_quantize_table.py makes it.
constexpr int64_t kLevels = 512;
constexpr int64_t kRowWords = 32;

// The arithmetic of each element is rounded to the input's dtype only where scales are in it, too.
inline bool is_narrow(const FakeQuantize& f) {
    return f.input != kFloat32Input && !f.wide && f.scale_dtype == f.input;
}

// Of the groups that are done together. A group with a NaN or an infinity has a scale that is NaN.
struct Scales {
    alignas(64) float smallest[kGroups], largest[kGroups];  // with 0
    alignas(64) float scale[kGroups], inverse[kGroups];
    alignas(64) float low[kGroups], high[kGroups];  // the codes' bounds less the zero point
    alignas(64) uint32_t key[kGroups];  // of AVX-512 alone: bits of the largest magnitude of a symmetric mapping
    alignas(64) float total[kGroups];   // sum of what is due to the scale
    alignas(64) int64_t where[kGroups];  // first element of largest magnitude
};

// A call that clears what saturated.
struct Clear {
    void* grad;
    const uint32_t* saturated;
    int64_t groups, size, bytes;  // of an element
};

// Words of `saturated` that a group has.
inline int64_t words_of(int64_t size) { return (size + 31) / 32; }

using GroupRange = void (*)(const FakeQuantize& f, int64_t first, int64_t last);

}  // namespace aotrain
