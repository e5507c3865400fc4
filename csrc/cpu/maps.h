// The dynamic maps of optimizer state as compile-time tables, from the formula of aotrain/formats/codebook.py; see
// docs/numerics.md 5.
//
// Magnitudes are u_0 < u_1 < ... < u_last = 1; the unsigned map stores the index of the magnitude, the signed one
// (u_0 = 0) its middle code plus or minus it. Midpoint j separates u_{j-1} from u_j.
#pragma once

#include <cstdint>

namespace aotrain {

constexpr double kUnits[7] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1e0};

// Encoding looks up, by the upper 16 bits of a magnitude, the index of the bucket's smallest member; a bucket holds at
// most one midpoint. The first bucket starts at 2^-24, below every midpoint.
constexpr int kBucketShift = 16;
constexpr int kFirstBucket = 103 << 7;
constexpr int kNumBuckets = (128 << 7) - kFirstBucket;

template <int Bits, bool Signed>
struct Map {
    static constexpr bool kSigned = Signed;
    static constexpr bool kLinear = Bits == 4 && !Signed;
    static constexpr int kDecades = Bits == 8 ? 7 : 3;
    static constexpr int kLast = kLinear ? 15 : Signed ? 1 << (Bits - 1) : (1 << Bits) - 1;  // index of magnitude 1
    static constexpr int kMiddle = Signed ? (1 << (Bits - 1)) - 1 : 0;                       // code of u_0
    static constexpr int kLastCode = (1 << Bits) - 1;

    float magnitude[kLast + 1] = {};
    float midpoint[kLast + 2] = {};  // [0] is below, [kLast + 1] above everything
    float offset[8] = {};            // A_d, and 1 for the top
    float stride[8] = {};            // B_d
    float value[1 << Bits] = {};     // of each code
    int32_t above[kLast + 1] = {};   // pattern of the midpoint above each index
    int32_t bucket[kNumBuckets] = {};

    static constexpr double unit(int decade) { return kUnits[7 - kDecades + decade]; }
    static constexpr int steps(int decade) { return 1 << (Signed ? decade : decade + 1); }
    static constexpr int first_index(int decade) { return Signed ? 1 << decade : (2 << decade) - 1; }

    constexpr Map() {
        if (kLinear) {
            for (int k = 0; k <= kLast; k++) magnitude[k] = static_cast<float>(k + 1) / 16.0f;
        } else {
            for (int d = 0; d < kDecades; d++) {
                offset[d] = static_cast<float>(unit(d) * (0.1 + 0.45 / steps(d)));
                stride[d] = static_cast<float>(unit(d) * 0.9 / steps(d));
                for (int k = 0; k < steps(d); k++) {
                    const float product = static_cast<float>(k) * stride[d];
                    magnitude[first_index(d) + k] = offset[d] + product;
                }
            }
            offset[kDecades] = magnitude[kLast] = 1.0f;
        }
        midpoint[0] = -1.0f;
        for (int j = 1; j <= kLast; j++) midpoint[j] = 0.5f * (magnitude[j - 1] + magnitude[j]);
        midpoint[kLast + 1] = 3e38f;
        for (int code = 0; code <= kLastCode; code++) {
            const int index = code - kMiddle;
            value[code] = index < 0 ? -magnitude[-index] : magnitude[index];
        }
        for (int j = 0; j < kLast; j++) above[j] = __builtin_bit_cast(int32_t, midpoint[j + 1]);
        above[kLast] = INT32_MAX;
        for (int b = 0, index = 0; b < kNumBuckets; b++) {
            const int32_t start = (b + kFirstBucket) << kBucketShift;
            if (above[index] <= start) index++;
            if (above[index] <= start) throw "a bucket holds two midpoints";  // an error at compile time
            bucket[b] = index;
        }
    }
};

template <int Bits, bool Signed>
inline constexpr Map<Bits, Signed> kMap{};

}  // namespace aotrain
