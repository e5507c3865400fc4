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
};

// The arithmetic of each element is rounded to the input's dtype only where scales are in it, too.
inline bool is_narrow(const FakeQuantize& f) {
    return f.input != kFloat32Input && !f.wide && f.scale_dtype == f.input;
}

// Of the groups that are done together. A group with a NaN or an infinity has a scale that is NaN.
struct Scales {
    alignas(64) float smallest[kGroups], largest[kGroups];  // with 0
    alignas(64) float scale[kGroups], inverse[kGroups];
    alignas(64) float low[kGroups], high[kGroups];  // the codes' bounds less the zero point
};

using GroupRange = void (*)(const FakeQuantize& f, int64_t first, int64_t last);

}  // namespace aotrain
