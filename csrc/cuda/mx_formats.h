// The element formats of MX and the roundings of their scales, as numbers (aotrain/formats/{element,e8m0}.py).
#pragma once

#include <cstdint>

namespace aotrain::mx {

enum Element : int32_t { kE4m3, kE5m2, kE2m1 };
enum Rounding : int32_t { kFloor, kCeil, kEven, kRceil };

// `kMaxExponent`: that of kMax. `kMinExponent`: of the smallest normal value, biased as in float32. `kNanWord`: codes
// of a block of NaNs; a format without NaN stores +0.
struct E4m3 {
    static constexpr int kBits = 8, kMantissa = 3;
    static constexpr uint32_t kMaxExponent = 8, kMinExponent = 127 - 6, kNanWord = 0x7F7F7F7F;
    static constexpr float kMax = 448.0f;
};

struct E5m2 {
    static constexpr int kBits = 8, kMantissa = 2;
    static constexpr uint32_t kMaxExponent = 15, kMinExponent = 127 - 14, kNanWord = 0x7F7F7F7F;
    static constexpr float kMax = 57344.0f;
};

struct E2m1 {
    static constexpr int kBits = 4, kMantissa = 1;
    static constexpr uint32_t kMaxExponent = 2, kMinExponent = 127, kNanWord = 0;
    static constexpr float kMax = 6.0f;
};

template <class E>
constexpr int kCodesPerWord = 32 / E::kBits;

// How a scale byte follows from a largest magnitude, the same few operations for all roundings: the exponent of
// `amax * factor` after an addition to its bits, minus `subtract`.
struct ScaleRule {
    float factor;
    uint32_t add, add_to_subnormal, subtract;
};

template <class E>
ScaleRule scale_rule(int64_t rounding) {
    constexpr uint32_t kToNextPower = 0x7FFFFF, kHalfStep = 0x400000 >> E::kMantissa;
    if (rounding == kFloor) return {1.0f, 0, 0, E::kMaxExponent};
    if (rounding == kCeil) return {1.0f, kToNextPower, kToNextPower, E::kMaxExponent};
    if (rounding == kEven) return {1.0f, kHalfStep, kHalfStep, E::kMaxExponent};
    // The byte 0 means 2^-127, a subnormal with the top bit of the mantissa, and serves all below it.
    return {1.0f / E::kMax, kToNextPower, 0x3FFFFF, 0};
}

inline ScaleRule scale_rule_of(int64_t element, int64_t rounding) {
    if (element == kE4m3) return scale_rule<E4m3>(rounding);
    return element == kE5m2 ? scale_rule<E5m2>(rounding) : scale_rule<E2m1>(rounding);
}

}  // namespace aotrain::mx
